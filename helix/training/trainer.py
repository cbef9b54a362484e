"""fit(): the one training loop, for every variant, with or without Ray; stopping it anywhere changes nothing.

Everything random is a pure function of (seed, epoch, step, clip), so a checkpoint is weights, optimiser state and a
position. B batch, T samples, C classes.
"""

import logging
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from helix.data.augment import augment, mixup
from helix.data.dataset import Dataset, halves
from helix.data.loader import Batches, in_order
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

#: What of a step is not finite where its training was and its evaluation is not: no single step is to blame.
TEST_LOSS = "test loss"


class DivergedError(Exception):
    """The `what` of an optimiser step (its loss or gradient, or the test loss after it) stopped being finite."""

    def __init__(self, trial_id: str, step: int, what: str = "loss"):
        super().__init__(trial_id, step, what)
        self.trial_id, self.step, self.what = trial_id, step, what

    def __str__(self) -> str:
        return f"trial {self.trial_id} diverged: the {self.what} of step {self.step} is not finite"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What one call of `fit` needs beside the spec, none of which is science.

    `micro_batch`: clips that go through the model at a time, None for the whole batch; gradients add up to those of the
    batch, each clip weighted the same. `recompute`: see helix.models.classifier.Classifier.
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
        self.micro_batch = how.micro_batch or self.spec.training.batch_size
        self.model, self.optimizer = self._initial()

    def _initial(self) -> tuple[Classifier, torch.optim.Optimizer]:
        """The model and its optimiser before the first step."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.spec.seed, "initial weights"))
            model = build_classifier(self.spec.model, self.spec.protocol, classes=self.classes).to(self.how.device)
        model.recompute = self.how.recompute
        return model, build_optimizer(model, self.spec.training, self.spec.protocol)

    def run(self) -> dict[str, Any]:
        storage = self.how.storage
        result = storage.get_json(f"{self.folder}/result.json")
        if result is not None:
            return result
        progress = self._restored()
        if progress is None:
            progress = Progress(epoch=0, step=0)
            described = {**identity(self.spec, self.recordings.manifest_sha256), "trial_id": self.id}
            storage.put_json(f"{self.folder}/spec.json", described)
        elif progress.row is not None:
            # The process may have died between the checkpoint and the row: putting it again writes the same bytes.
            storage.put_json(row_key(self.id, progress.epoch), progress.row)
        while progress.epoch < self.spec.training.epochs:
            try:
                progress = self._epoch(progress)
            except DivergedError as error:
                progress = self._rolled_back(error, progress)
        return self._finish()

    def _restored(self) -> Progress | None:
        """The newest checkpoint, loaded; None where there is none."""
        return load_checkpoint(
            self.how.storage, f"{self.folder}/checkpoints", model=self.model, optimizer=self.optimizer, trial_id=self.id
        )

    def _rolled_back(self, error: DivergedError, progress: Progress) -> Progress:
        """Where to train on from after a divergence, under `protocol.divergence = rollback` and once in a trial.

        The steps since that checkpoint are the same ones again, so the outcome does not depend on which one it is.
        """
        switched_on = self.spec.protocol.divergence == "rollback" and self.steps_per_epoch > 1
        if not switched_on or progress.skipped or error.what == TEST_LOSS:
            raise error
        logger.warning("%s; it goes back to the last checkpoint and leaves that step out", error)
        restored = self._restored()
        if restored is None:
            self.model, self.optimizer = self._initial()
            restored = Progress(epoch=0, step=0)
        return replace(restored, skipped=(error.step,))

    def _epoch(self, progress: Progress) -> Progress:
        """One epoch, or what is left of it: steps, evaluation, checkpoint, row."""
        epoch, began = progress.epoch, self.how.clock() - progress.seconds
        saved = self.how.clock()
        # Per step the loss and the norm of the gradient, left on the device; what a checkpoint holds was finite.
        losses = [self._number(math.nan if loss is None else loss) for loss in progress.losses]
        norms = [self._number(0.0) for _ in losses]
        hits = self._number(progress.hits)
        self.model.train()
        for step in range(progress.step, self.steps_per_epoch):
            total_step = epoch * self.steps_per_epoch + step + 1
            if total_step in progress.skipped:
                losses.append(self._number(math.nan))
                norms.append(self._number(0.0))
            else:
                loss, norm, step_hits = self._step(epoch, step)
                losses.append(loss)
                norms.append(norm)
                hits += step_hits
            self.how.on_step(total_step)
            now = self.how.clock()
            if self.how.save_now() or now - saved >= self.how.save_every_s:
                values = self._finite(epoch, losses, norms, progress.skipped)
                position = replace(
                    progress, step=step + 1, losses=values, hits=hits.item(), seconds=now - began, row=progress.row
                )
                self._save(position)
                saved = self.how.clock()
        values = self._finite(epoch, losses, norms, progress.skipped)
        row = self._row(epoch, values, hits.item(), began)
        position = Progress(epoch=epoch + 1, step=0, row=row, skipped=progress.skipped)
        self._save(position)
        self.how.storage.put_json(row_key(self.id, epoch + 1), row)
        self.how.on_epoch(row)
        return position

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.how.device)

    def _step(self, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """One optimiser step. Returns the loss, the gradient's norm and the number of hits, all on the device."""
        training, protocol, seed = self.spec.training, self.spec.protocol, self.spec.seed
        rate = learning_rate(training, protocol, epoch=epoch, step=step, steps_per_epoch=self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.batches.batch(epoch, step).to(self.how.device)
        wave_BT, label_B, samples_B = batch.wave_BT, batch.label_B, batch.samples_B
        if self.model.frontend.augmented:
            rate_hz = self.dataset.rate_hz
            wave_BT = augment(wave_BT, batch.clip_B, self.spec.augment, seed=seed, epoch=epoch, rate_hz=rate_hz)
        mixing = {"alpha": self.spec.augment.mixup_alpha, "seed": seed, "epoch": epoch, "step": step}
        if protocol.mixup_on == "waveform":
            mixed, partner_B, share = mixup(wave_BT, **mixing)
            features = self.model.features(mixed)
        else:
            features, partner_B, share = mixup(self.model.features(wave_BT), **mixing)
        other_B, samples_B = label_B[partner_B], torch.maximum(samples_B, samples_B[partner_B])
        self.optimizer.zero_grad(set_to_none=True)
        total, hits = self._number(0.0), self._number(0.0)
        for first in range(0, len(features), self.micro_batch):
            part = slice(first, first + self.micro_batch)
            logits_BC = self._logits(features[part], samples_B[part])
            a_B, b_B = (F.cross_entropy(logits_BC, wanted_B[part], reduction="sum") for wanted_B in (label_B, other_B))
            loss = (share * a_B + (1 - share) * b_B) / len(features)
            loss.backward()
            with torch.no_grad():
                guess_B = logits_BC.argmax(dim=1)
                total += loss
                hits += share * (guess_B == label_B[part]).sum() + (1 - share) * (guess_B == other_B[part]).sum()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.clip_norm)
        self.optimizer.step()
        return total, norm.double(), hits

    def _logits(self, features: Tensor, samples_B: Tensor) -> Tensor:
        """float32 logits [B, C], the matrix products at the precision of the spec."""
        half = self.spec.training.precision == "bf16"
        with torch.autocast(torch.device(self.how.device).type, dtype=torch.bfloat16, enabled=half):
            return self.model.logits(features, samples_B).float()

    def _finite(
        self, epoch: int, losses: list[Tensor], norms: list[Tensor], skipped: tuple[int, ...]
    ) -> tuple[float | None, ...]:
        """The losses of the epoch so far as numbers, read from the device in one go; raises DivergedError.

        A norm that is not finite means that the gradient is not, and it spoils the weights from that step on.
        """
        if not losses:
            return ()
        values: list[float | None] = []
        for step, (loss, norm) in enumerate(torch.stack([torch.stack(losses), torch.stack(norms)], 1).cpu().tolist()):
            total_step = epoch * self.steps_per_epoch + step + 1
            if total_step in skipped:
                values.append(None)
                continue
            for what, value in (("loss", loss), ("gradient", norm)):
                if not math.isfinite(value):
                    raise DivergedError(self.id, total_step, what)
            values.append(loss)
        return tuple(values)

    def _row(self, epoch: int, losses: tuple[float | None, ...], hits: float, began: float) -> dict[str, Any]:
        training, protocol = self.spec.training, self.spec.protocol
        test = self.tested = self._evaluate(self.test_clips, total_step=(epoch + 1) * self.steps_per_epoch)
        if not np.isfinite(test.loss):
            raise DivergedError(self.id, (epoch + 1) * self.steps_per_epoch, TEST_LOSS)
        taken = [loss for loss in losses if loss is not None]
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * self.steps_per_epoch,
            "lr": learning_rate(training, protocol, epoch=epoch, step=0, steps_per_epoch=self.steps_per_epoch),
            "train_loss": sum(taken) / len(taken),
            "train_losses": list(losses),
            "skipped_steps": [epoch * self.steps_per_epoch + n for n, loss in enumerate(losses, 1) if loss is None],
            "train_accuracy": hits / (len(taken) * training.batch_size),
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
        for batch in in_order(self.recordings, clips, batch_size=self.micro_batch):
            batch = batch.to(self.how.device)
            label_B = batch.label_B
            logits_BC = self._logits(self.model.features(batch.wave_BT), batch.samples_B)
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
            "skipped_steps": [step for row in rows for step in row["skipped_steps"]],
            "train_seconds": sum(row["seconds"] for row in rows),
            "finished": self.how.clock(),
            "device": self.how.device,
            "threads": torch.get_num_threads(),
            "micro_batch": self.micro_batch,
            "recompute": self.how.recompute,
            "scan": scan_backend(torch.device(self.how.device), torch.float32),
            "versions": versions(),
            "rows": rows,
        }
        storage.put_if_absent(f"{self.folder}/result.json", json_bytes(result))
        prune(storage, f"{self.folder}/checkpoints", keep=1)
        return storage.get_json(f"{self.folder}/result.json")


def versions() -> dict[str, str]:
    """The software that a result depends on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
