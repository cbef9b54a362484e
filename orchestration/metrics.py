"""What a sweep tells Prometheus through Ray: workers their speed and checkpoints, its driver queue, losses and cost.

Ray's agent on each machine serves the metrics, and dashboards/grafana.json draws them; where there is none they go
nowhere and cost nothing. They are a view: nothing reads them back. Labels have a value for each trial at most.
"""

import functools
import time
from collections import Counter as Counted
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from dashboards.view import Spent
from orchestration.ledger import TrialState

#: Seconds between two tellings of a worker: Ray collects every ten, and a step is not held up for less.
EVERY_S = 5.0

#: Upper ends in seconds of the buckets of checkpoint times: from a laptop's folder to gigabytes over a network.
CHECKPOINT_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

#: The labels of what a worker tells of a trial.
TRIAL_LABELS = ("grid", "variant", "fold", "trial")

STATUSES = ("done", "running", "failed", "partial", "missing")
OUTCOMES = ("done", "failed", "lost", "stopped", "under way")


def _gauge(name: str, about: str, *labels: str) -> Gauge:
    return _made(Gauge, name, about, labels)


def _counter(name: str, about: str, *labels: str) -> Counter:
    return _made(Counter, name, about, labels)


@functools.cache
def _made(kind: Any, name: str, about: str, labels: tuple[str, ...]) -> Any:
    """One metric of each name in a process."""
    return kind(name, description=about, tag_keys=labels)


@functools.cache
def _checkpoints() -> Histogram:
    return Histogram(
        "helix_checkpoint_seconds",
        description="How long a checkpoint held up the training (phase hold) and took to write (phase write).",
        boundaries=list(CHECKPOINT_S),
        tag_keys=(*TRIAL_LABELS, "phase"),
    )


class TrialMetrics:
    """What one attempt tells of its trial: made for `fit`, whose callbacks its methods are.

    `labels`: a value for each of TRIAL_LABELS. `used`: the bytes that the worker takes, asked when something is told.
    `predicted_bytes`: what helix.training.memory said a step would take, None where nothing was predicted.
    """

    def __init__(
        self,
        labels: Mapping[str, str],
        *,
        batch_size: int,
        predicted_bytes: int | None = None,
        used: Callable[[], int] | None = None,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.labels, self.batch_size = {name: str(labels[name]) for name in TRIAL_LABELS}, batch_size
        self.predicted_bytes, self.used = predicted_bytes, used
        self.every_s, self.clock = every_s, clock
        self._last, self._steps, self._told = 0, 0, clock()
        self._best = 0.0

    def on_step(self, total_step: int) -> None:
        """Count a step, done again or not; it is told with the next ones, every few seconds."""
        if total_step == self._last:  # a batch of an evaluation
            return
        self._last, self._steps = total_step, self._steps + 1
        if self.clock() - self._told >= self.every_s:
            self.tell()

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        """Tell of a finished epoch."""
        self._best = max(self._best, row["test_accuracy"])
        _gauge("helix_epoch", "Finished epochs.", *TRIAL_LABELS).set(row["epoch"], self.labels)
        about = "The best test accuracy of the epochs of this attempt, as a fraction."
        _gauge("helix_best_test_accuracy", about, *TRIAL_LABELS).set(self._best, self.labels)
        self.tell()

    def on_save(self, hold_s: float, write_s: float) -> None:
        """Tell of a checkpoint that was written."""
        for phase, seconds in (("hold", hold_s), ("write", write_s)):
            _checkpoints().observe(seconds, self.labels | {"phase": phase})

    def tell(self) -> None:
        """Tell of the steps since the last time, and of the memory."""
        self._told, steps, self._steps = self.clock(), self._steps, 0
        if steps:
            _counter("helix_steps", "Optimiser steps, done again or not.", *TRIAL_LABELS).inc(steps, self.labels)
            clips = steps * self.batch_size
            _counter("helix_clips", "Clips that were trained on.", *TRIAL_LABELS).inc(clips, self.labels)
        if self.predicted_bytes is not None:
            about = "The predicted peak of a training step, in bytes, without the process itself."
            _gauge("helix_memory_predicted_bytes", about, *TRIAL_LABELS).set(self.predicted_bytes, self.labels)
        if self.used is not None:
            about = "On a GPU the peak that tensors took, on a CPU what the process holds, in bytes."
            _gauge("helix_memory_used_bytes", about, *TRIAL_LABELS).set(self.used(), self.labels)


class SweepMetrics:
    """What the driver tells of a sweep, from what storage knows."""

    def __init__(self, grid: str):
        self.labels = {"grid": grid}

    def tell(self, states: Iterable[TrialState], spent: Spent, *, waiting: bool) -> None:
        """`states`: of all trials of the grid. `spent`: on all of their attempts. `waiting`: for a machine."""
        states = list(states)
        statuses = Counted(state.status for state in states)
        for status in STATUSES:
            said = self.labels | {"status": status}
            _gauge("helix_trials", "Trials of the grid.", "grid", "status").set(statuses[status], said)
        attempts = [attempt for state in states for attempt in state.attempts]
        outcomes = Counted(attempt.get("outcome", "under way") for attempt in attempts)
        for outcome in OUTCOMES:
            said, about = self.labels | {"outcome": outcome}, "Attempts at the trials; lost: with their machine."
            _gauge("helix_attempts", about, "grid", "outcome").set(outcomes[outcome], said)
        for name, about, value in (
            ("helix_lost_steps", "Optimiser steps that no checkpoint kept, done again.", lost_steps(attempts)),
            ("helix_waiting", "1 while trials wait for a machine, else 0.", float(waiting)),
            ("helix_cost_usd", "US dollars of all attempts, by the price table.", spent.usd),
            ("helix_lost_usd", "US dollars of work that had to be done again.", spent.lost_usd),
            ("helix_worker_hours", "Hours of all attempts.", spent.hours),
            ("helix_gpu_hours", "GPU-hours of all attempts.", spent.gpu_hours),
            ("helix_unpriced_hours", "Hours on machines that have no price.", spent.unpriced_hours),
        ):
            _gauge(name, about, "grid").set(value, self.labels)


def lost_steps(attempts: Sequence[Mapping[str, Any]]) -> int:
    """Steps that attempts finished and no checkpoint kept."""
    ended = (attempt for attempt in attempts if attempt.get("outcome") not in (None, "done"))
    return sum(max(one.get("step", 0) - max(one.get("kept_step", 0), one.get("from_step", 0)), 0) for one in ended)
