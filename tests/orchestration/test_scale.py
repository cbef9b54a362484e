"""Two thousand trials: planned and read without asking the same thing twice, scheduled with nothing to train."""

import collections
from pathlib import Path

import pytest

from helix.storage import FolderStorage
from orchestration import plan as plan_module
from orchestration import scale
from orchestration.worker import run_trial


class Counting(FolderStorage):
    """A storage that counts what it is asked."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.asked: collections.Counter[str] = collections.Counter()

    def get(self, key: str) -> bytes:
        self.asked["get"] += 1
        return super().get(key)

    def children(self, prefix: str) -> list[str]:
        self.asked["children"] += 1
        return super().children(prefix)


def test_two_thousand_trials_are_planned_with_the_work_of_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: collections.Counter[str] = collections.Counter()
    real = plan_module.cost

    def counted(*given, **named):
        calls["cost"] += 1
        return real(*given, **named)

    monkeypatch.setattr(plan_module, "cost", counted)
    storage = Counting(tmp_path)
    sweep = scale.planned(storage, 2000)
    assert len({entry.trial_id for entry in sweep.plan}) == 2000
    assert calls["cost"] <= 2 * 6  # each of six models once to check and once to plan
    storage.asked.clear()
    assert len(sweep.missing()) == 2000
    view = sweep.snapshot()
    assert sum(len(cell.trials) for cell in view.cells) == 2000
    assert sum(storage.asked.values()) <= 6  # listings; no trial is asked for by itself


def test_the_trainer_that_does_nothing_leaves_what_a_trial_leaves(tmp_path: Path):
    sweep = scale.planned(FolderStorage(tmp_path), 2)
    for entry in sweep.plan:
        done = run_trial(entry.trial.spec, sweep.recordings, sweep.storage, sweep_id="s", trainer=scale.nothing)
        assert done == "done"
    assert sweep.missing() == []
    assert [len(state.attempts) for state in sweep.snapshot.states().values()] == [1, 1]
