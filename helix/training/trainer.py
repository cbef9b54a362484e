"""fit(): the one training loop, for every variant, with or without Ray; stopping it anywhere changes nothing.

Everything random is a pure function of (seed, epoch, step, clip), so a checkpoint is weights, optimiser state and a
position. B batch, T samples, C classes.
"""

import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from helix.data.augment import augment, mixup
from helix.data.dataset import Dataset, halves
from helix.data.loader import Batch, Batches, in_order
from helix.data.shards import Recordings
from helix.models.classifier import Classifier, build_classifier, cost
from helix.models.scan import scan_backend
from helix.registry import DATASETS
from helix.spec import TrialSpec, derive_seed, identity, resolve, trial_id
from helix.storage import Storage, json_bytes
from helix.training.checkpoint import Progress, load_checkpoint, prune, save_checkpoint, weights_sha256
from helix.training.metrics import Evaluation, select
from helix.training.optim import build_optimizer, learning_rate

logger = logging.getLogger(__name__)


class DivergedError(Exception):
    """The loss stopped being finite."""

    def __init__(self, trial_id: str, step: int):
        super().__init__(trial_id, step)
        self.trial_id, self.step = trial_id, step

    def __str__(self) -> str:
        return f"trial {self.trial_id} diverged: the loss of step {self.step} is not finite"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What one call of `fit` needs beside the spec, none of which is science.

    `micro_batch`: clips that go through the model together, None for the whole batch; `recompute`: each block is
    computed again in the backward and keeps only its input until then. helix.training.memory chooses both.
    `save_every_s`: seconds of training between checkpoints inside an epoch (each epoch ends with one anyway).
    `save_now`: asked at every step; True (a preemption notice, say) saves at this step and training goes on.
    `on_step`: told the optimiser steps so far after each step, and again after each batch that is evaluated, so that
    whoever listens knows that work goes on. `on_epoch`: told each row once its epoch is safe.
    """

    storage: Storage
    device: str = "cpu"
    micro_batch: int | None = None
    recompute: bool = False
    save_every_s: float = 300.0
    save_now: Callable[[], bool] = lambda: False
    on_step: Callable[[int], None] = lambda _total_step: None
    on_epoch: Callable[[dict[str, Any]], None] = lambda _row: None
    clock: Callable[[], float] = time.time


def trial_folder(trial_id: str) -> str:
    """Where everything about a trial lies in storage."""
    return f"trials/{trial_id}"


def row_key(trial_id: str, epoch: int) -> str:
    """Where the row of a finished epoch (from 1) lies."""
    return f"{trial_folder(trial_id)}/metrics/epoch-{epoch:04d}.json"


def fit(spec: TrialSpec, recordings: Recordings, how: Fit) -> dict[str, Any]:
    """Train one trial to its end, from its newest checkpoint if it has one, and put its result. Returns the result.

    Raises DivergedError when a loss is not finite, CheckpointError when no checkpoint can be trusted, OSError when the
    storage fails; a call that was stopped by any of them, or killed, is continued by calling again.
    """
    return _Trial(spec, recordings, how).run()


class _Trial:
    """One trial under way: what the parts of the loop share."""

    def __init__(self, spec: TrialSpec, recordings: Recordings, how: Fit):
        self.spec, self.recordings, self.how = resolve(spec), recordings, how
        self.id = trial_id(spec, recordings.manifest_sha256)
        self.folder = trial_folder(self.id)
        self.dataset: Dataset = DATASETS.make(self.spec.data.dataset, self.spec.data.options)
        self.classes = len(self.dataset.classes)
        clips = self.dataset.split(recordings.index, fold=self.spec.data.fold, validation=self.spec.protocol.validation)
        self.test_clips, self.validation_clips = clips.test, clips.validation
        self.half_a = halves(recordings.index, clips.test)
        self.batches = Batches(recordings, clips.train, batch_size=self.spec.training.batch_size, seed=self.spec.seed)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.tested: Evaluation | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.spec.seed, "initial weights"))
            model = build_classifier(self.spec.model, self.spec.protocol, classes=self.classes)
        self.model: Classifier = model.to(how.device)
        self.model.recompute = how.recompute
        self.optimizer = build_optimizer(self.model, self.spec.training, self.spec.protocol)

    def run(self) -> dict[str, Any]:
        storage = self.how.storage
        result = storage.get_json(f"{self.folder}/result.json")
        if result is not None:
            return result
        progress = load_checkpoint(
            storage, f"{self.folder}/checkpoints", model=self.model, optimizer=self.optimizer, trial_id=self.id
        )
        if progress is None:
            progress = Progress(epoch=0, step=0)
            described = {**identity(self.spec, self.recordings.manifest_sha256), "trial_id": self.id}
            storage.put_json(f"{self.folder}/spec.json", described)
        elif progress.row is not None:
            # The process may have died between the checkpoint and the row: putting it again writes the same bytes.
            storage.put_json(row_key(self.id, progress.epoch), progress.row)
        while progress.epoch < self.spec.training.epochs:
            progress = self._epoch(progress)
        return self._finish()

    def _epoch(self, progress: Progress) -> Progress:
        """One epoch, or what is left of it: steps, evaluation, checkpoint, row."""
        epoch, began = progress.epoch, self.how.clock() - progress.seconds
        saved = self.how.clock()
        losses = [torch.tensor(loss, dtype=torch.float64, device=self.how.device) for loss in progress.losses]
        hits = torch.tensor(progress.hits, dtype=torch.float64, device=self.how.device)
        self.model.train()
        for step in range(progress.step, self.steps_per_epoch):
            loss, step_hits = self._step(epoch, step)
            losses.append(loss)
            hits += step_hits
            self.how.on_step(epoch * self.steps_per_epoch + step + 1)
            now = self.how.clock()
            if self.how.save_now() or now - saved >= self.how.save_every_s:
                values = self._finite(epoch, losses)
                position = Progress(
                    epoch=epoch, step=step + 1, losses=values, hits=hits.item(), seconds=now - began, row=progress.row
                )
                self._save(position)
                saved = self.how.clock()
        values = self._finite(epoch, losses)
        row = self._row(epoch, values, hits.item(), began)
        position = Progress(epoch=epoch + 1, step=0, row=row)
        self._save(position)
        self.how.storage.put_json(row_key(self.id, epoch + 1), row)
        self.how.on_epoch(row)
        return position

    def _step(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """One optimiser step. Returns the loss and the number of correct predictions, both on the device."""
        batch = self.batches.batch(epoch, step).to(self.how.device)
        at = Position(epoch=epoch, step=step, steps_per_epoch=self.steps_per_epoch, rate_hz=self.dataset.rate_hz)
        return train_step(self.model, self.optimizer, batch, self.spec, at, micro_batch=self.how.micro_batch)

    def _finite(self, epoch: int, losses: list[Tensor]) -> tuple[float, ...]:
        """The losses of the epoch so far as numbers, read from the device in one go; raises DivergedError."""
        values = torch.stack(losses).cpu().tolist() if losses else []
        for step, value in enumerate(values):
            if not np.isfinite(value):
                raise DivergedError(self.id, epoch * self.steps_per_epoch + step + 1)
        return tuple(values)

    def _row(self, epoch: int, losses: tuple[float, ...], hits: float, began: float) -> dict[str, Any]:
        training, protocol = self.spec.training, self.spec.protocol
        test = self.tested = self._evaluate(self.test_clips, total_step=(epoch + 1) * self.steps_per_epoch)
        if not np.isfinite(test.loss):
            raise DivergedError(self.id, (epoch + 1) * self.steps_per_epoch)
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * self.steps_per_epoch,
            "lr": learning_rate(training, protocol, epoch=epoch, step=0, steps_per_epoch=self.steps_per_epoch),
            "train_loss": sum(losses) / len(losses),
            "train_losses": list(losses),
            "train_accuracy": hits / (len(losses) * training.batch_size),
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "test_half_a": test.hits(self.half_a),
            "test_half_b": test.hits(~self.half_a),
        }
        if len(self.validation_clips):
            validation = self._evaluate(self.validation_clips, total_step=(epoch + 1) * self.steps_per_epoch)
            row |= {"validation_accuracy": validation.accuracy, "validation_loss": validation.loss}
        now = self.how.clock()
        return row | {"seconds": now - began, "time": now}

    @torch.no_grad()
    def _evaluate(self, clips: np.ndarray, *, total_step: int) -> Evaluation:
        self.model.eval()
        labels, guesses, losses = [], [], []
        size = self.how.micro_batch or self.spec.training.batch_size
        for batch in in_order(self.recordings, clips, batch_size=size):
            logits_BC = self.model(batch.wave_BT.to(self.how.device))
            label_B = batch.label_B.to(self.how.device)
            losses.append(F.cross_entropy(logits_BC, label_B, reduction="none").double())
            guesses.append(logits_BC.argmax(dim=1))
            labels.append(label_B)
            self.how.on_step(total_step)
        loss = torch.cat(losses).mean().item()
        return Evaluation(label=torch.cat(labels).cpu().numpy(), predicted=torch.cat(guesses).cpu().numpy(), loss=loss)

    def _save(self, progress: Progress) -> None:
        save_checkpoint(
            self.how.storage,
            f"{self.folder}/checkpoints",
            model=self.model,
            optimizer=self.optimizer,
            progress=progress,
            total_step=progress.epoch * self.steps_per_epoch + progress.step,
            identity={"trial_id": self.id, **versions()},
        )

    def _finish(self) -> dict[str, Any]:
        """Gather the rows into the result and put it once; a result that is there already is the one that counts."""
        storage = self.how.storage
        rows = [storage.get_json(row_key(self.id, epoch)) for epoch in range(1, self.spec.training.epochs + 1)]
        chosen = select(rows)
        # The last epoch's predictions are at hand, unless this process only came to finish what another one trained.
        tested = self.tested or self._evaluate(self.test_clips, total_step=rows[-1]["step"])
        price = cost(self.spec.model, self.spec.protocol, classes=self.classes, samples=self.dataset.clip_samples)
        result = {
            "trial_id": self.id,
            **identity(self.spec, self.recordings.manifest_sha256),
            "protocol": self.spec.protocol.profile,
            "classes": self.classes,
            "parameters": price.parameters,
            "tokens": price.tokens,
            "train_clips": len(self.batches.rows),
            "test_clips": len(self.test_clips),
            "accuracy": {"best_test": chosen.best_test, "last": chosen.last, "validation": chosen.validation},
            "best_epoch": {"best_test": chosen.best_test_epoch, "validation": list(chosen.validation_epochs)},
            "confusion": tested.confusion(),
            "weights_sha256": weights_sha256(self.model),
            "train_seconds": sum(row["seconds"] for row in rows),
            "finished": self.how.clock(),
            "device": self.how.device,
            "threads": torch.get_num_threads(),
            "scan": scan_backend(torch.device(self.how.device), torch.float32),
            "versions": versions(),
            "rows": rows,
        }
        storage.put_if_absent(f"{self.folder}/result.json", json_bytes(result))
        prune(storage, f"{self.folder}/checkpoints", keep=1)
        return storage.get_json(f"{self.folder}/result.json")


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a step stands: `epoch` and `step` from 0."""

    epoch: int
    step: int
    steps_per_epoch: int
    rate_hz: int = Dataset.rate_hz


def train_step(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    spec: TrialSpec,
    at: Position,
    *,
    micro_batch: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimiser step on a batch that is on the model's device; `spec` is resolved.

    Returns the loss and the number of correct predictions. helix.training.memory runs this same function on shapes
    alone, so what it predicts follows every change of it.
    """
    training, protocol, seed = spec.training, spec.protocol, spec.seed
    rate = learning_rate(training, protocol, epoch=at.epoch, step=at.step, steps_per_epoch=at.steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = rate
    # Before the forward, so that the gradients of the last step are not kept through it.
    optimizer.zero_grad(set_to_none=True)
    wave_BT, label_B = batch.wave_BT, batch.label_B
    if model.frontend.augmented:
        wave_BT = augment(wave_BT, batch.clip_B, spec.augment, seed=seed, epoch=at.epoch, rate_hz=at.rate_hz)
    mixing = {"alpha": spec.augment.mixup_alpha, "seed": seed, "epoch": at.epoch, "step": at.step}
    autocast = torch.autocast(wave_BT.device.type, torch.bfloat16, enabled=training.precision == "bf16")
    with autocast:
        if protocol.mixup_on == "waveform":
            mixed, label_B, other_B, share = mixup(wave_BT, label_B, **mixing)
            features = model.features(mixed)
        else:
            features, label_B, other_B, share = mixup(model.features(wave_BT), label_B, **mixing)
    size = micro_batch or len(label_B)
    loss, hits = (torch.zeros((), dtype=torch.float64, device=label_B.device) for _ in range(2))
    for part, label, other in zip(features.split(size), label_B.split(size), other_B.split(size), strict=True):
        with autocast:
            logits_BC = model.logits(part)
            # Sums over the clips divided by the size of the whole batch: a last part that is smaller weighs less.
            losses = [F.cross_entropy(logits_BC, target, reduction="sum") / len(label_B) for target in (label, other)]
            part_loss = share * losses[0] + (1 - share) * losses[1]
        part_loss.backward()
        with torch.no_grad():
            guess_B = logits_BC.argmax(dim=1)
            hits += share * (guess_B == label).sum() + (1 - share) * (guess_B == other).sum()
            loss += part_loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
    optimizer.step()
    return loss, hits


def versions() -> dict[str, str]:
    """The software that a result depends on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
