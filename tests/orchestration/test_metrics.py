"""What a sweep tells Prometheus: without Ray it goes nowhere and holds nothing up; what is told is right."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from dashboards.view import Spent
from orchestration import metrics
from orchestration.ledger import TrialState
from orchestration.metrics import OUTCOMES, STATUSES, TRIAL_LABELS, SweepMetrics, TrialMetrics, lost_steps

LABELS = {"grid": "demo", "variant": "mamba-raw", "fold": "1", "trial": "mamba-raw fold 1 seed 0"}


class Told:
    """Stands in for Ray's metrics and keeps what they are told: (name, labels) -> values."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = {}

    def __call__(self, kind: Any, name: str, about: str, labels: tuple[str, ...]) -> Any:
        told = self

        class Metric:
            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert sorted(tags) == sorted(labels) and about.endswith(".")
                told.values.setdefault((name, tuple(sorted(tags.items()))), []).append(value)

            set = inc

        return Metric()

    def of(self, name: str, **labels: str) -> list[float]:
        wanted = set(labels.items())
        return [
            value
            for (key, tags), values in self.values.items()
            if key == name and wanted <= set(tags)
            for value in values
        ]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found = Told()
    monkeypatch.setattr(metrics, "_made", found)
    return found


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def trial(clock: Callable[[], float] = time.monotonic, **changes: Any) -> TrialMetrics:
    return TrialMetrics(LABELS, batch_size=4, clock=clock, **changes)


def test_without_ray_all_of_it_goes_nowhere_and_a_step_takes_no_time():
    one = trial(predicted_bytes=10, used=lambda: 20, every_s=0.0)
    one.on_step(1)
    began = time.process_time()
    for step in range(2, 1002):
        one.on_step(step)
    assert (time.process_time() - began) / 1000 < 1e-3
    one.on_epoch({"epoch": 1, "test_accuracy": 0.5})
    one.on_save(0.1, 0.2)
    SweepMetrics("demo").tell([], Spent(), waiting=True)


def test_steps_are_told_together_every_few_seconds_and_none_twice(told: Told):
    clock = Clock()
    one = trial(clock, every_s=5.0)
    for second in range(1, 13):
        clock.now = float(second)
        one.on_step(100 + second)
    assert told.of("helix_steps") == [5.0, 5.0]
    one.on_step(112)  # a batch of the evaluation after it
    one.on_epoch({"epoch": 3, "test_accuracy": 0.25})
    assert told.of("helix_steps", **LABELS) == [5.0, 5.0, 2.0]
    assert sum(told.of("helix_clips")) == 4 * 12
    assert told.of("helix_epoch") == [3]


def test_steps_that_are_done_again_are_counted_again(told: Told):
    one = trial(every_s=1e9)
    for step in (1, 2, 3, 2, 3):
        one.on_step(step)
    one.tell()
    assert told.of("helix_steps") == [5]


def test_the_best_accuracy_never_falls_and_memory_is_told_beside_its_prediction(told: Told):
    one = trial(predicted_bytes=10, used=lambda: 20)
    for epoch, accuracy in enumerate((0.2, 0.4, 0.3), start=1):
        one.on_epoch({"epoch": epoch, "test_accuracy": accuracy})
    assert told.of("helix_best_test_accuracy") == [0.2, 0.4, 0.4]
    assert (told.of("helix_memory_predicted_bytes")[-1], told.of("helix_memory_used_bytes")[-1]) == (10, 20)


def test_a_sweep_tells_its_queue_its_losses_and_its_cost(told: Told):
    lost = {"outcome": "lost", "from_step": 10, "step": 35, "kept_step": 20}
    states = [
        TrialState(trial_id="a", status="running", attempts=(lost, {"from_step": 20})),
        TrialState(trial_id="b", status="done", attempts=({"outcome": "done"},)),
        TrialState(trial_id="c", status="missing"),
        TrialState(trial_id="d", status="missing"),
    ]
    SweepMetrics("demo").tell(states, Spent(hours=2.0, gpu_hours=1.0, usd=0.8, lost_usd=0.1), waiting=True)
    counted = {"done": [1], "running": [1], "failed": [0], "partial": [0], "missing": [2]}
    assert {status: told.of("helix_trials", status=status) for status in STATUSES} == counted
    assert [told.of("helix_attempts", outcome=outcome) for outcome in OUTCOMES] == [[1], [0], [1], [0], [1]]
    assert told.of("helix_lost_steps", grid="demo") == [15]
    assert (told.of("helix_cost_usd"), told.of("helix_lost_usd"), told.of("helix_waiting")) == ([0.8], [0.1], [1.0])


@pytest.mark.parametrize(
    ("attempt", "steps"),
    [
        ({"outcome": "done", "step": 10, "kept_step": 0}, 0),
        ({"step": 10, "kept_step": 0}, 0),  # under way
        ({"outcome": "failed", "from_step": 4, "step": 10, "kept_step": 7}, 3),
        ({"outcome": "lost", "from_step": 4, "step": 0, "kept_step": 4}, 0),  # not one step
        ({"outcome": "stopped", "from_step": 4, "step": 10, "kept_step": 10}, 0),
    ],
)
def test_lost_are_the_steps_that_no_checkpoint_kept(attempt: dict[str, Any], steps: int):
    assert lost_steps([attempt]) == steps


def test_labels_are_no_more_than_the_words_of_the_grid():
    assert TRIAL_LABELS == ("grid", "variant", "fold", "trial")
    with pytest.raises(KeyError):
        TrialMetrics({"grid": "demo"}, batch_size=4)
