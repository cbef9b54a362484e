"""What moved between two runs of a grid: beyond noise or within it, on the pairs that both have."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from dashboards.view import SweepView, TrialEntry
from helix.protocol import profile
from helix.spec import DataSpec, ModelSpec, TrialSpec
from helix.storage import FolderStorage, sealed
from orchestration.changes import as_markdown, moved
from orchestration.ledger import TrialState


def state(name: str, accuracy: float) -> TrialState:
    return TrialState(trial_id=name, status="done", result={"accuracy": {"best_test": accuracy}, "rows": []})


def compared(tmp_path: Path, before: list[float], after: list[float], *, same: bool = False, seeds: int = 1) -> Any:
    """Accuracies by fold; of several seeds, the seeds of a fold one after the other."""
    storage = FolderStorage(tmp_path)
    entries, trials = [], []
    for at, accuracy in enumerate(after, 1):
        spec = TrialSpec(data=DataSpec(fold=1 + (at - 1) // seeds), model=ModelSpec(), seed=(at - 1) % seeds)
        name = f"{at:016d}" if same else f"9{at:015d}"
        entries.append(TrialEntry(variant="mamba-raw", backbone="mamba", spec=spec, state=state(name, accuracy)))
    for at, accuracy in enumerate(before, 1):
        row = {"epoch": 1, "step": 1, "test_accuracy": accuracy, "seconds": 1.0, "time": 1.0}
        result = {"accuracy": {"best_test": accuracy}, "rows": [row], "finished": 1.0}
        storage.put_json(f"trials/{at:016d}/result.json", sealed(result))
        where = {"fold": 1 + (at - 1) // seeds, "seed": (at - 1) % seeds}
        trials.append({"variant": "mamba-raw", **where, "trial_id": f"{at:016d}"})
    view = SweepView.build(
        grid="demo",
        question="?",
        protocol=replace(profile("paper"), select="best_test"),
        command="",
        created=0.0,
        storage="",
        data=[],
        trials=entries,
    )
    (found,) = moved(view, {"trials": trials}, storage, now=0.0)
    return found


def test_a_shift_of_every_fold_is_beyond_noise(tmp_path):
    found = compared(tmp_path, [0.50, 0.52, 0.48, 0.51, 0.49], [0.60, 0.61, 0.59, 0.61, 0.58])
    assert (found.verdict, found.pairs) == ("beyond noise", 5)
    assert found.before == pytest.approx(0.5)
    assert found.after == pytest.approx(0.598)
    assert found.p == pytest.approx(2 / 2**5)
    assert 0 < found.low < 0.098 < found.high


def test_the_interval_is_that_of_a_paired_t_test(tmp_path):
    before, after = [0.50, 0.52, 0.48, 0.51], [0.53, 0.52, 0.49, 0.55]
    found = compared(tmp_path, before, after)
    wanted = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_folds_that_go_up_and_down_are_noise(tmp_path):
    assert compared(tmp_path, [0.5, 0.5, 0.5, 0.5], [0.52, 0.48, 0.53, 0.48]).verdict == "within noise"


def test_one_fold_shows_no_noise_to_judge_by(tmp_path):
    assert compared(tmp_path, [0.5], [0.9]).verdict == "one pair"


def test_the_same_trials_are_unchanged_and_other_trials_may_have_the_same_numbers(tmp_path):
    assert compared(tmp_path / "a", [0.5, 0.6], [0.5, 0.6], same=True).verdict == "unchanged"
    assert compared(tmp_path / "b", [0.5, 0.6], [0.5, 0.6]).verdict == "same numbers"


def test_only_folds_that_both_runs_have_are_compared(tmp_path):
    found = compared(tmp_path, [0.5, 0.5], [0.6, 0.7, 0.1])
    assert (found.pairs, found.before, found.after) == (2, 0.5, pytest.approx(0.65))


def test_differences_that_are_all_the_same_are_no_noise(tmp_path):
    assert compared(tmp_path, [0.5, 0.5, 0.5], [0.6, 0.6, 0.6]).verdict == "beyond noise"


def test_seeds_of_a_fold_are_one_pair(tmp_path):
    after = [0.55, 0.56, 0.54, 0.60, 0.61, 0.62]
    found = compared(tmp_path, [0.5] * 6, after, seeds=3)
    wanted = stats.ttest_1samp([0.05, 0.11], 0).confidence_interval(0.95)
    assert (found.pairs, found.verdict) == (2, "within noise")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.after == pytest.approx(0.58)


def test_few_pairs_are_called_few(tmp_path):
    text = as_markdown(
        "demo", ["training.lr: 1 -> 2"], [compared(tmp_path, [0.5, 0.5], [0.6, 0.7])], select="x", command="c"
    )
    assert "With 2 pairs the exact sign-flip test cannot reach p < 0.05 (at best 0.5)" in text
    assert "| mamba-raw | 50.00 | 65.00 | +15.00 |" in text
