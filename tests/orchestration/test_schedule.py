"""Re-runs: an unchanged grid runs nothing, a changed one exactly what changed, and it is said what that moved."""

import json
from pathlib import Path
from typing import Any

import pytest

from helix import spec
from helix.storage import FolderStorage, Storage
from orchestration import schedule, sweep
from orchestration.worker import work_through

SMALL = (
    *("--grid", "demo", "--variants", "mamba-mel,attention-raw", "--folds", "1,2", "--storage", "runs"),
    *("data.options.clips_per_class=16", "model.width=40", "model.options.mamba.d_state=16", "training.batch_size=24"),
    *("training.epochs=1",),
)


class Here:
    """Trains in this process, in place of Ray, and remembers what it was given."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []

    def __call__(self, planned: sweep.Sweep, console: Any) -> None:
        missing = planned.missing()
        self.ran.append([entry.trial.label for entry in missing])
        specs = [entry.trial.spec for entry in missing]
        work_through(specs, planned.recordings, planned.storage, sweep_id=f"here-{len(self.ran)}")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    runs = Here()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(sweep, "run_sweep", runs)
    return runs


def differences(storage: Storage) -> list[str]:
    """The difference reports of re-runs, oldest first."""
    return sorted(key for key in storage.keys("reports") if "-changes-" in key and key.endswith(".json"))


def test_an_unchanged_grid_runs_nothing_and_a_changed_one_exactly_what_changed(here: Here, tmp_path, capsys):
    storage = FolderStorage(tmp_path / "runs")
    assert schedule.main(SMALL) == 0
    assert [len(labels) for labels in here.ran] == [4]
    assert "no finished run of this grid is on record" in capsys.readouterr().out
    kept = storage.get("sweeps/demo/last.json")

    assert schedule.main(SMALL) == 0
    out = capsys.readouterr().out
    assert "nothing changed" in out
    assert "all 4 trials are done; nothing is run" in out
    assert len(here.ran) == 1
    assert storage.get("sweeps/demo/last.json") == kept

    # one more fold: new trials alone, and no cell that was there moved
    assert schedule.main([*SMALL, "--folds", "1,2,3"]) == 0
    assert here.ran[1] == ["mamba-mel fold 3 seed 0", "attention-raw fold 3 seed 0"]
    assert "2 trials new, of mamba-mel, attention-raw" in capsys.readouterr().out

    assert schedule.main([*SMALL, "training.lr=0.002"]) == 0
    out = capsys.readouterr().out
    assert "training.lr: 0.006 -> 0.002 (4 trials)" in out
    assert "2 trials no longer asked for" in out
    assert len(here.ran[-1]) == 4
    report = differences(storage)[-1]
    said = storage.get_json(report)
    assert [cell["variant"] for cell in said["cells"]] == ["mamba-mel", "attention-raw"]
    for cell in said["cells"]:
        assert cell["pairs"] == 2
        assert cell["verdict"] in ("within noise", "beyond noise", "same numbers")
    assert storage.get(report.replace(".json", ".md")).startswith(b"# demo: what changed, and what that moved")


def test_what_is_no_longer_of_this_science_is_run_again(here: Here, tmp_path, capsys, monkeypatch):
    few = [*SMALL, "--folds", "1", "--variants", "mamba-mel"]
    assert schedule.main(few) == 0
    monkeypatch.setattr(spec, "SCIENCE_VERSION", spec.SCIENCE_VERSION + 1)
    capsys.readouterr()
    assert schedule.main(few) == 0
    assert (
        f"the science changed: version {spec.SCIENCE_VERSION - 1} -> {spec.SCIENCE_VERSION}" in capsys.readouterr().out
    )
    assert here.ran == [["mamba-mel fold 1 seed 0"]] * 2
    (report,) = differences(FolderStorage(tmp_path / "runs"))
    (cell,) = FolderStorage(tmp_path / "runs").get_json(report)["cells"]
    assert cell["verdict"] == "same numbers"  # the version was raised, and nothing else


def test_a_run_that_did_not_finish_is_not_what_the_next_one_is_compared_with(here: Here, tmp_path, capsys, monkeypatch):
    few = [*SMALL, "--folds", "1", "--variants", "mamba-mel"]
    monkeypatch.setattr(sweep, "run_sweep", lambda planned, console: "the budget is spent")
    assert schedule.main(few) == sweep.STOPPED
    assert not (tmp_path / "runs" / "sweeps").exists()
    monkeypatch.setattr(sweep, "run_sweep", here)
    assert schedule.main(few) == 0
    assert json.loads((tmp_path / "runs" / "sweeps" / "demo" / "last.json").read_text())["trials"][0]["fold"] == 1


def test_what_sweep_refuses_is_refused_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert schedule.main(["--grid", "nonsense"]) == sweep.REFUSED
    assert "unknown grid 'nonsense'" in capsys.readouterr().err
