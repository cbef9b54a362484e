"""fit(): the one training loop, for every variant, with or without Ray; stopping it anywhere changes nothing.

Everything random is a pure function of (seed, epoch, step, clip), so a checkpoint is weights, optimiser state and a
position. B batch, T samples, C classes.
"""

import contextlib
import itertools
import logging
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from helix.data.augment import pairing
from helix.data.clips import Clips
from helix.data.dataset import Dataset
from helix.data.loader import Batches, Device, Host, in_order
from helix.data.shards import Recordings
from helix.data.splits import halves
from helix.models.classifier import Classifier, build_classifier, cost
from helix.models.scan import scan_backend
from helix.registry import DATASETS
from helix.spec import TrialSpec, derive_seed, identity, resolve, to_json, trial_id
from helix.storage import Storage, json_bytes, sealed
from helix.training.checkpoint import (
    CheckpointError,
    Progress,
    Saver,
    become,
    best_manifest,
    load_checkpoint,
    prune,
    replica,
    save_interval_s,
    weights_sha256,
)
from helix.training.graphs import Choice, Graphed, graphed
from helix.training.metrics import Evaluation, select
from helix.training.optim import build_optimizer, learning_rate
from helix.training.precision import precision_of
from helix.training.ranks import Ranks
from helix.training.step import Position, logits_of, take, train_step

logger = logging.getLogger(__name__)

#: What is not finite where the training of a step was and its evaluation is not: no single step is to blame.
EVALUATED = ("test loss", "validation loss")


class DivergedError(Exception):
    """The `what` of an optimiser step (its loss or gradient, or the test loss after it) stopped being finite."""

    def __init__(self, trial_id: str, step: int, what: str = "loss"):
        super().__init__(trial_id, step, what)
        self.trial_id, self.step, self.what = trial_id, step, what

    def __str__(self) -> str:
        return f"trial {self.trial_id} diverged: the {self.what} of step {self.step} is not finite"


class StoppedError(Exception):
    """The trial was asked to stop; everything up to `step` is in a checkpoint, and the next call goes on from there."""

    def __init__(self, trial_id: str, step: int):
        super().__init__(trial_id, step)
        self.trial_id, self.step = trial_id, step

    def __str__(self) -> str:
        return f"trial {self.trial_id} was asked to stop; it is saved at step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What one call of `fit` needs beside the spec, none of which is science.

    `micro_batch`: clips that go through the model together, None for the whole batch; `recompute`: each block is
    computed again in the backward and keeps only its input until then. helix.training.memory chooses both.
    `graphs`: whether steps are replayed as a CUDA graph (helix.training.graphs), "auto" where that pays or as
    HELIX_GRAPHS says; where it cannot be the log says why, and the numbers are the same.
    `placement`: where the samples are gathered, "host" from memory maps or "device" from the whole set held there.
    `ahead`: how many batches are made before they are asked for, None for 2 on an accelerator and 0 on a CPU.
    `save_every_s`: the most seconds of training between checkpoints; how many it is follows from what a checkpoint
    costs and from `between_losses_s`, the mean time after which a machine is lost. The end of an epoch is saved as soon
    as the checkpoint before it is written. `save_now`: asked at every step; True (a preemption notice, say) saves at
    this step and training goes on. `stop_now`: asked at every step as well; True saves and raises StoppedError.
    `on_step`: told the optimiser steps so far after each step, and again after each batch that is evaluated, so that
    whoever listens knows that work goes on. `on_epoch`: told each row once it is stored. `measured`: what the machine
    did since it was last asked, asked at the end of each epoch; it stands in the row as "system", as no part of what
    was found. `on_save`: told of checkpoints that were written: the seconds for which one held up the training, and
    those that its writing took.
    `ranks`: the processes of this machine that train this trial together; each calls `fit` with the same spec and the
    same way to run it, on its own device. The effective batch stays the same, and micro-batches are of a rank's part of
    it. The first rank alone reads and writes the storage, and what it is asked by `stop_now` and the clock counts;
    `save_now` may be True on any rank, and every rank is told the rows.
    """

    storage: Storage
    device: str = "cpu"
    micro_batch: int | None = None
    recompute: bool = False
    graphs: Choice = "auto"
    placement: Literal["host", "device"] = "host"
    ahead: int | None = None
    save_every_s: float = 300.0
    between_losses_s: float = 4 * 3600.0
    save_now: Callable[[], bool] = lambda: False
    stop_now: Callable[[], bool] = lambda: False
    on_step: Callable[[int], None] = lambda _total_step: None
    on_epoch: Callable[[dict[str, Any]], None] = lambda _row: None
    measured: Callable[[], dict[str, float]] = dict
    on_save: Callable[[float, float], None] = lambda _hold_s, _write_s: None
    clock: Callable[[], float] = time.time
    ranks: Ranks = field(default_factory=Ranks)


def trial_folder(trial_id: str) -> str:
    """Where everything about a trial lies in storage."""
    return f"trials/{trial_id}"


def row_key(trial_id: str, epoch: int) -> str:
    """Where the row of a finished epoch (from 1) lies."""
    return f"{trial_folder(trial_id)}/metrics/epoch-{epoch:04d}.json"


def fit(spec: TrialSpec, recordings: Recordings, how: Fit) -> dict[str, Any]:
    """Train one trial to its end, from its newest checkpoint if it has one, and put its result. Returns the result.

    Raises StoppedError when it is asked to stop, DivergedError when a loss is not finite, CheckpointError when no
    checkpoint can be trusted, OSError when the storage fails; a call that was stopped by any of them, or killed, is
    continued by calling again. With several ranks what one of them raises is raised by all, or RankLostError where a
    rank is gone. Raises ValueError, before anything, where the device cannot compute with the precision of the spec;
    UnusableScanError, before the first step, where the model scans and the machine lacks what its scan needs.
    """
    with _current(how.device), how.ranks.together(), precision_of(spec.training.precision, how.device):
        trial = _Trial(spec, recordings, how)
        try:
            return trial.run()
        finally:
            trial.batches.close()
            trial.saver.close()


def _current(device: str) -> contextlib.AbstractContextManager[object]:
    """A CUDA device that has a number is the current one until the end of the block: libraries ask for that, not ours.

    Memory is pinned, streams are made and some kernels are launched there.
    """
    asked = torch.device(device)
    return torch.cuda.device(asked) if asked.type == "cuda" and asked.index is not None else contextlib.nullcontext()


class _Trial:
    """One trial under way: what the parts of the loop share."""

    def __init__(self, spec: TrialSpec, recordings: Recordings, how: Fit):
        self.spec, self.recordings, self.how, self.ranks = resolve(spec), recordings, how, how.ranks
        self.id = trial_id(spec, recordings.manifest_sha256)
        self.folder = trial_folder(self.id)
        self.dataset: Dataset = DATASETS.make(self.spec.data.dataset, self.spec.data.options)
        self.classes = len(recordings.classes)
        training, protocol, seed, index = self.spec.training, self.spec.protocol, self.spec.seed, recordings.index
        rows = self.dataset.split(index, fold=self.spec.data.fold, protocol=protocol)
        self.test_clips, self.validation_clips = (
            self.dataset.clips(index, part, protocol=protocol, seed=seed, epoch=None)
            for part in (rows.test, rows.validation)
        )
        self.half_a = halves(self.test_clips.label, self.test_clips.group)
        on_cpu = torch.device(how.device).type == "cpu"
        self.ahead = (0 if on_cpu else 2) if how.ahead is None else how.ahead
        host = Host(recordings=recordings, pinned=torch.device(how.device).type == "cuda")
        self.placement = Device(recordings, how.device) if how.placement == "device" else host
        self.batches = Batches(
            recordings,
            self.dataset,
            rows.train,
            batch_size=training.batch_size,
            seed=seed,
            protocol=protocol,
            placement=self.placement,
            ahead=self.ahead,
            pairs=partial(pairing, training.batch_size, alpha=self.spec.augment.mixup_alpha, seed=seed),
        )
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.tested: Evaluation | None = None
        self.micro_batch = how.micro_batch or self.ranks.largest_part(self.spec.training.batch_size)
        self.model, self.optimizer = self._initial()
        self.graph = self._graphed()
        described = {"trial_id": self.id, "spec": to_json(self.spec), "versions": versions()}
        self.saver = Saver(how.storage, self.folder, identity=described)
        self.saved, self.told = how.clock(), 0
        # Rows of finished epochs: those that no committed checkpoint has yet, and those stored and not yet told.
        self.pending: deque[dict[str, Any]] = deque()
        self.stored: deque[dict[str, Any]] = deque()

    def _initial(self) -> tuple[Classifier, torch.optim.Optimizer]:
        """The model and its optimiser before the first step."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.spec.seed, "initial weights"))
            model = build_classifier(self.spec.model, self.spec.protocol, classes=self.classes).to(self.how.device)
        model.recompute = self.how.recompute
        return model, build_optimizer(model, self.spec.training, self.spec.protocol)

    def _graphed(self) -> Graphed | None:
        """The step of this model and optimiser as a graph, None where it is not to be one."""
        how, spec = self.how, self.spec
        price = cost(spec.model, spec.protocol, classes=self.classes, samples=self.dataset.clip_samples)
        return graphed(
            partial(take, self.model, self.optimizer, spec=spec, micro_batch=self.micro_batch),
            self.model,
            self.optimizer,
            choice=how.graphs,
            device=how.device,
            ranks=self.ranks.count,
            tokens=self.micro_batch * price.tokens,
            settle=self.batches.settle,
        )

    def run(self) -> dict[str, Any]:
        storage = self.how.storage
        result = self.ranks.share(lambda: storage.get_json(f"{self.folder}/result.json"))
        if result is not None:
            return result
        progress = self._restored()
        if progress is None:
            progress = Progress(epoch=0, step=0)
            described = {**identity(self.spec, self.recordings.manifest_sha256), "trial_id": self.id}
            if self.ranks.first:
                storage.put_json(f"{self.folder}/spec.json", described)
        # The process may have died between the checkpoint and its rows: putting them again writes the same bytes.
        self._store(progress.rows)
        progress = replace(progress, rows=(), environments=self._environments(progress))
        while progress.epoch < self.spec.training.epochs:
            try:
                progress = self._epoch(progress)
            except DivergedError as error:
                progress = self._rolled_back(error, progress)
        if self.pending:
            self._save(progress)
        self.saver.wait(final=True)
        self._tell(*self.ranks.agree(self._untold))
        tested = self.tested
        if tested is None:  # this process only came to finish what another one trained
            steps = self.spec.training.epochs * self.steps_per_epoch
            tested = self._evaluate(self.test_clips, lambda: self.how.on_step(steps))
        return self.ranks.share(lambda: self._finish(progress, tested))

    def _environments(self, progress: Progress) -> tuple[str, ...]:
        """The environments that took part, this one last where it is new: bits are promised within one only."""
        software = ", ".join(f"{name} {version}" for name, version in versions().items() if name != "python")
        several = f", {self.ranks.count} ranks" if self.ranks.count > 1 else ""
        same = ", deterministic" if torch.are_deterministic_algorithms_enabled() else ""
        here = f"{torch.device(self.how.device).type}, scan {self._scan()}{same}, {software}{several}"
        if progress.environments and here not in progress.environments:
            logger.warning(
                "trial %s goes on in another environment (%s) than it began in (%s): the same up to rounding",
                *(self.id, here, "; ".join(progress.environments)),
            )
        return tuple(dict.fromkeys((*progress.environments, here)))

    def _scan(self) -> str:
        return scan_backend(torch.device(self.how.device), torch.float32)

    def _restored(self) -> Progress | None:
        """The newest checkpoint, loaded; None where there never was one. All ranks take on what the first one has then.

        Raises CheckpointError.
        """
        storage, prefix = self.how.storage, f"{self.folder}/checkpoints"

        def loaded() -> tuple[Progress | None, Any]:
            progress = load_checkpoint(storage, prefix, model=self.model, optimizer=self.optimizer, trial_id=self.id)
            rows = len(storage.children(f"{self.folder}/metrics"))
            if progress is None and rows:  # a row is put after a checkpoint that holds it, so there was one
                raise CheckpointError(prefix, [f"none has a manifest, though the rows of {rows} epochs are stored"])
            return progress, replica(self.model, self.optimizer) if self.ranks.count > 1 else None

        progress, state = self.ranks.share(loaded)
        if not self.ranks.first:
            become(self.model, self.optimizer, state)
        return progress

    def _rolled_back(self, error: DivergedError, progress: Progress) -> Progress:
        """Where to train on from after a divergence, under `protocol.divergence = rollback` and once in a trial.

        An epoch of a single step cannot leave that out; such a trial is stopped.
        The steps since that checkpoint are the same ones again, so the outcome does not depend on which one it is.
        """
        switched_on = self.spec.protocol.divergence == "rollback" and self.steps_per_epoch > 1
        self.saver.wait()
        if not switched_on or progress.skipped or error.what in EVALUATED:
            # No checkpoint will follow that they could wait for.
            self._store(tuple(self.pending))
            raise error
        logger.warning("%s; it goes back to the last checkpoint and leaves that step out", error)
        self.pending.clear()
        restored = self._restored()
        if restored is None:
            self.model, self.optimizer = self._initial()
            restored = Progress(epoch=0, step=0)
        self.graph = self._graphed()  # the moments lie elsewhere now
        return replace(restored, rows=(), skipped=(error.step,), environments=progress.environments)

    def _epoch(self, progress: Progress) -> Progress:
        """One epoch, or what is left of it: steps, evaluation, checkpoint, row."""
        epoch, began = progress.epoch, self.how.clock() - progress.seconds
        # Per step the loss and the norm of the gradient, left on the device; what a checkpoint holds was finite.
        losses = [self._number(math.nan if loss is None else loss) for loss in progress.losses]
        norms = [self._number(0.0) for _ in losses]
        hits = self._number(progress.hits)

        def position(step: int) -> Progress:
            values = self._finite(epoch, losses, norms, progress.skipped)
            seconds = self.how.clock() - began
            return replace(progress, step=step, losses=values, hits=hits.item(), seconds=seconds)

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
            rows, stop, save = self.ranks.agree(self._untold, self.ranks.first and self.how.stop_now(), self._due())
            self._tell(rows)
            if stop:
                self._leave(position(step + 1), total_step)
            if save:
                self._save(position(step + 1))

        def on_batch() -> None:
            self.how.on_step(total_steps)
            stop, save = self.ranks.agree(self.ranks.first and self.how.stop_now(), self.how.save_now())
            if stop:
                self._leave(position(self.steps_per_epoch), total_steps)
            if save:  # what is saved waits for its evaluation
                self._save(position(self.steps_per_epoch))

        total_steps = (epoch + 1) * self.steps_per_epoch
        row = self._row(epoch, self._finite(epoch, losses, norms, progress.skipped), hits.item(), began, on_batch)
        if self.ranks.first:
            self.pending.append(row)
        best = self._best(row, progress.best)
        progress = Progress(
            epoch=epoch + 1, step=0, skipped=progress.skipped, best=best, environments=progress.environments
        )
        if any(self.ranks.agree(self._due())):
            self._save(progress)
        self._tell(*self.ranks.agree(self._untold))
        return progress

    def _due(self) -> bool:
        """Whether to save now. Rows wait for a checkpoint, but none holds up the training by more than 1 % of it,
        unless `save_every_s` asks for that."""
        if self.how.save_now():
            return True
        if self.saver.busy or not self.ranks.first:
            return False
        interval_s = save_interval_s(
            hold_s=self.saver.hold_s,
            write_s=self.saver.write_s,
            between_losses_s=self.how.between_losses_s,
            most_s=self.how.save_every_s,
        )
        if self.pending:
            interval_s = min(100 * self.saver.hold_s, self.how.save_every_s)
        return self.how.clock() - self.saved >= interval_s

    def _save(self, progress: Progress) -> None:
        """Hand the state to the saver, with the rows that it makes safe."""
        if not self.ranks.first:
            return
        self.saver.wait()
        rows = tuple(self.pending)
        self.saver.save(
            self.model,
            self.optimizer,
            replace(progress, rows=rows),
            total_step=progress.epoch * self.steps_per_epoch + progress.step,
            then=lambda: self._store(rows),
        )
        self.saved = self.how.clock()

    def _leave(self, progress: Progress, total_step: int) -> NoReturn:
        """Save, and be gone once that is committed. Raises StoppedError."""
        self._save(progress)
        self.saver.wait(final=True)
        self._tell(*self.ranks.agree(self._untold))
        raise StoppedError(self.id, total_step)

    def _store(self, rows: Sequence[dict[str, Any]]) -> None:
        """Put rows whose checkpoint is committed."""
        for row in rows if self.ranks.first else ():
            self.how.storage.put_json(row_key(self.id, row["epoch"]), row)
            if self.pending and self.pending[0] is row:
                self.pending.popleft()
            self.stored.append(row)

    @property
    def _untold(self) -> int:
        """The rows that are stored and that the listener does not know of; the first rank knows."""
        return len(self.stored)

    def _tell(self, rows: float) -> None:
        """Tell the listeners of checkpoints and of so many stored rows, in the thread that trains."""
        if self.saver.written > self.told:
            self.told = self.saver.written
            self.how.on_save(self.saver.hold_s, self.saver.write_s)
        if rows:
            for row in self.ranks.share(lambda: [self.stored.popleft() for _ in range(int(rows))]):
                self.how.on_epoch(row)

    def _best(self, row: dict[str, Any], best: tuple[int, float] | None) -> tuple[int, float] | None:
        """The best epoch so far by what the protocol selects by; its weights are kept."""
        select_by = self.spec.protocol.select
        if select_by == "last":
            metric, better = "test_accuracy", row["epoch"] == self.spec.training.epochs
        else:
            metric = (
                "validation_accuracy" if select_by == "validation" and len(self.validation_clips) else "test_accuracy"
            )
            better = best is None or row[metric] > best[1]
        if not better:
            return best
        if self.ranks.first:
            assert self.tested is not None
            found = {"epoch": row["epoch"], "metric": metric, "value": row[metric]}
            self.saver.best(self.model, **found, confusion=self.tested.confusion())
        return row["epoch"], row[metric]

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.how.device)

    def _step(self, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """One optimiser step. Returns the loss, the gradient's norm and the number of hits, all on the device."""
        batch = self.batches.batch(epoch, step, rank=self.ranks.rank, ranks=self.ranks.count).to(self.how.device)
        at = Position(epoch=epoch, step=step, steps_per_epoch=self.steps_per_epoch, rate_hz=self.dataset.rate_hz)
        how = {"micro_batch": self.micro_batch, "ranks": self.ranks, "replay": self.graph}
        return train_step(self.model, self.optimizer, batch, self.spec, at, **how)

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

    def _row(
        self,
        epoch: int,
        losses: tuple[float | None, ...],
        hits: float,
        began: float,
        on_batch: Callable[[], None],
    ) -> dict[str, Any]:
        training, protocol = self.spec.training, self.spec.protocol
        test = self.tested = self._evaluate(self.test_clips, on_batch)
        validation = self._evaluate(self.validation_clips, on_batch) if len(self.validation_clips) else None
        for evaluation, what in zip((test, validation), EVALUATED, strict=True):
            if evaluation is not None and not math.isfinite(evaluation.loss):
                raise DivergedError(self.id, (epoch + 1) * self.steps_per_epoch, what)
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
        if validation is not None:
            row |= {"validation_accuracy": validation.accuracy, "validation_loss": validation.loss}
        now, system = self.how.clock(), self.how.measured()
        return row | {"seconds": now - began, "time": now} | ({"system": system} if system else {})

    @torch.no_grad()
    def _evaluate(self, clips: Clips, on_batch: Callable[[], None]) -> Evaluation:
        """Predictions on all clips; each rank makes those of its part and has them all."""
        self.model.eval()
        guess_N = torch.zeros(len(clips), dtype=torch.int64, device=self.how.device)
        loss_N = torch.zeros(len(clips), dtype=torch.float64, device=self.how.device)
        first, last = self.ranks.part(len(clips))
        how = {"batch_size": self.micro_batch, "placement": self.placement, "ahead": self.ahead}
        batches = in_order(self.recordings, clips.take(np.arange(first, last)), **how)
        # Ranks take equally many turns, so that they meet as often: one that has a batch less comes without one.
        turns = -(-self.ranks.largest_part(len(clips)) // self.micro_batch)
        for batch in itertools.islice(itertools.chain(batches, itertools.repeat(None)), turns):
            if batch is not None:
                batch = batch.to(self.how.device)
                done = slice(first, first + len(batch.label_B))
                logits_BC = logits_of(self.model, self.model.features(batch.wave_BT), batch.samples_B, self.spec)
                loss_N[done] = F.cross_entropy(logits_BC, batch.label_B, reduction="none").double()
                guess_N[done] = logits_BC.argmax(dim=1)
                first = done.stop
            on_batch()
        self.ranks.add([guess_N], [loss_N])
        return Evaluation(label=clips.label, predicted=guess_N.cpu().numpy(), loss=loss_N.mean().item())

    def _finish(self, progress: Progress, tested: Evaluation) -> dict[str, Any]:
        """Gather the rows into the result and put it once; a result that is there already is the one that counts."""
        storage = self.how.storage
        rows = [storage.get_json(row_key(self.id, epoch)) for epoch in range(1, self.spec.training.epochs + 1)]
        chosen = select(rows)
        price = cost(self.spec.model, self.spec.protocol, classes=self.classes, samples=self.dataset.clip_samples)
        best = self._best_of(rows)
        result = {
            "trial_id": self.id,
            **identity(self.spec, self.recordings.manifest_sha256),
            "protocol": self.spec.protocol.profile,
            "classes": self.classes,
            "parameters": price.parameters,
            "tokens": price.tokens,
            "train_clips": self.batches.clips_per_epoch,
            "test_clips": len(self.test_clips),
            "accuracy": {"best_test": chosen.best_test, "last": chosen.last, "validation": chosen.validation},
            "best_epoch": {"best_test": chosen.best_test_epoch, "validation": list(chosen.validation_epochs)},
            "confusion": tested.confusion(),
            **({"selected_epoch": best["epoch"], "selected_confusion": best["confusion"]} if best else {}),
            "weights_sha256": weights_sha256(self.model),
            "skipped_steps": [step for row in rows for step in row["skipped_steps"]],
            "train_seconds": sum(row["seconds"] for row in rows),
            "finished": self.how.clock(),
            "device": torch.device(self.how.device).type,
            "threads": torch.get_num_threads(),
            "micro_batch": self.micro_batch,
            "recompute": self.how.recompute,
            "ranks": self.ranks.count,
            "scan": self._scan(),
            "environments": list(progress.environments),
            "versions": versions(),
            "rows": rows,
        }
        storage.put_if_absent(f"{self.folder}/result.json", json_bytes(sealed(result)))
        prune(storage, f"{self.folder}/checkpoints", keep=1)
        return storage.get_json(f"{self.folder}/result.json")

    def _best_of(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """What stands beside the best weights, if it is of these rows and holds a confusion.

        It holds none where an earlier version wrote it. It is of other rows where a backend that is not deterministic
        trained its epoch again.
        """
        try:
            best = best_manifest(self.how.storage, self.folder)
        except ValueError as error:
            logger.warning("trial %s: what is stored of its best epoch cannot be used (%s)", self.id, error)
            return None
        if best is None or "confusion" not in best or best["value"] != rows[best["epoch"] - 1][best["metric"]]:
            return None
        return best


def versions() -> dict[str, str]:
    """The software that a result depends on; libraries of kernels where they are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for name in ("numba", "llvmlite", "triton", "mamba-ssm", "causal-conv1d"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
