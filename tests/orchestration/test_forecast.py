"""What a grid will take: from steps that were measured, on the machines they were measured on, and nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helix.spec import identity, to_json
from helix.storage import FolderStorage
from orchestration import cli
from orchestration.forecast import calibrate, forecasts, measured, shape
from orchestration.grid import Trial, expand, load_grid
from orchestration.ledger import read_all
from orchestration.money import Prices
from orchestration.plan import make_plan, place

SMALL = ("data.options.clips_per_class=16", "model.width=40", "model.options.mamba.d_state=16")
OPTIONS = (*SMALL, "training.batch_size=24", "training.epochs=4")
G5 = {"device": "cuda", "threads": 1, "instance_type": "g5.xlarge", "market": "spot", "gpus": 1.0, "share": 1.0}
PRICES = Prices(usd={("g5.xlarge", "spot"): 0.4, ("g5.xlarge", "on-demand"): 1.0})


def trials(**how: Any) -> list[Trial]:
    chosen = {"overrides": OPTIONS, "variants": ["mamba-mel", "attention-raw"], "folds": [1]} | how
    return expand(load_grid("demo"), **chosen)


def ran(storage: FolderStorage, trial: Trial, recordings: Any, *, epoch_s: float, machine: dict, epochs: int) -> None:
    """Leaves what a trial leaves that trained `epochs` epochs of three steps."""
    (entry,) = make_plan([trial], recordings)
    folder = f"trials/{entry.trial_id}"
    storage.put_json(f"{folder}/spec.json", identity(trial.spec, recordings.manifest_sha256))
    attempt = {"attempt_id": "a", "sweep_id": "s", "started": 0.0, "ended": 1e6, "outcome": "lost", **machine}
    storage.put_json(f"{folder}/attempts/a.json", attempt)
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "step": 3 * epoch, "test_accuracy": 0.5, "seconds": epoch_s, "time": 100.0 * epoch}
        storage.put_json(f"{folder}/metrics/epoch-{epoch:04d}.json", row)


def forecast(storage: FolderStorage, recordings: Any, **how: Any) -> list[Any]:
    plan = make_plan(trials(**how), recordings)
    shapes = {shape(identity(entry.trial.spec, "")["spec"]) for entry in plan}
    states = read_all(storage, [entry.trial_id for entry in plan], now=1e9)
    return forecasts(plan, states, measured(storage, shapes, now=1e9), PRICES)


def test_measured_epochs_foretell_other_folds_seeds_and_more_epochs(tmp_path: Path, tiny_data):
    storage = FolderStorage(tmp_path)
    for trial, epoch_s in zip(trials(), (360.0, 720.0), strict=True):
        ran(storage, trial, tiny_data, epoch_s=epoch_s, machine=G5, epochs=1)
    (found,) = forecast(storage, tiny_data, folds=[1, 2], seeds=[0, 1])
    assert (found.asked, found.measured, found.machine.instance_type) == (8, 8, "g5.xlarge")
    assert found.hours == pytest.approx(4 * 4 * (0.1 + 0.2))
    assert found.left_hours == pytest.approx(found.hours - 0.3)  # two of the eight have an epoch behind them
    assert found.usd == {"spot": pytest.approx(0.4 * 4.5), "on-demand": pytest.approx(4.5)}
    longer = [*OPTIONS, "training.epochs=8", "training.lr=0.001"]
    (found,) = forecast(storage, tiny_data, overrides=longer)
    assert found.hours == pytest.approx(8 * 0.3)


def test_a_shape_that_was_never_measured_has_no_number(tmp_path: Path, tiny_data):
    storage = FolderStorage(tmp_path)
    assert forecast(storage, tiny_data) == []
    ran(storage, trials()[0], tiny_data, epoch_s=360.0, machine=G5, epochs=1)
    (found,) = forecast(storage, tiny_data)
    assert (found.measured, found.asked) == (1, 2)
    assert found.hours == pytest.approx(0.4)
    assert forecast(storage, tiny_data, overrides=[*OPTIONS, "training.batch_size=12"]) == []


def test_machines_are_kept_apart_and_an_unknown_one_has_no_price(tmp_path: Path, tiny_data):
    storage = FolderStorage(tmp_path)
    ran(storage, trials()[0], tiny_data, epoch_s=360.0, machine=G5, epochs=1)
    other = trials(seeds=[7])[0]
    ran(storage, other, tiny_data, epoch_s=3600.0, machine={"device": "cpu", "threads": 2}, epochs=1)
    hours = {found.machine.instance_type: (found.hours, dict(found.usd)) for found in forecast(storage, tiny_data)}
    assert hours["g5.xlarge"][0] == pytest.approx(0.4)
    assert hours[""] == (pytest.approx(4.0), {})


def test_a_calibration_times_one_trial_of_each_shape_and_leaves_no_trace(tmp_path: Path, tiny_data):
    plan = make_plan(trials(seeds=[0, 1]), tiny_data)
    said: list[str] = []
    here = {"device": "cpu", "threads": 1, "gpus": 0.0, "share": 0.5}
    found = calibrate(
        plan,
        tiny_data,
        here,
        placement=lambda trial: place(trial, limit_bytes=None, device="cpu"),
        say=said.append,
    )
    assert len(said) == 2
    (machine,) = found
    assert machine.calibrated
    assert all(0 < seconds < 60 for seconds in found[machine].values())
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_when_nothing_was_measured_and_calibrates_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HELIX_INSTANCE_TYPE", raising=False)
    few = ["plan", "--grid", "demo", "--variants", "mamba-mel", "--folds", "1", *OPTIONS]
    assert cli.main(few) == 0
    assert "no step of these shapes was ever measured" in capsys.readouterr().out
    assert cli.main([*few, "--calibrate"]) == 0
    out = capsys.readouterr().out
    assert "unknown type, cpu x 1, calibrated" in out
    assert "1 of 1" in out
    assert "no price" in out
    assert not (tmp_path / "runs" / "trials").exists()
    assert cli.main([*few, "--calibrate", "--ranks", "2"]) == 2
    assert "--calibrate times steps of one process" in capsys.readouterr().err


def test_the_shape_of_a_stored_spec_is_that_of_the_plan(tiny_data):
    (trial,) = trials(variants=["mamba-mel"])
    value = identity(trial.spec, "m")["spec"]
    assert shape(value) == shape(identity(replace(trial.spec, seed=9), "other")["spec"])
    assert shape(value) != shape(value | {"model": to_json(trial.spec)["model"] | {"width": 48}})


@pytest.mark.parametrize("data", [b"{oh", b"[]", b"{}", b'{"spec": {}}', b'{"spec": 7}'])
def test_a_trial_whose_spec_is_damaged_is_passed_over(tmp_path: Path, tiny_data, data: bytes):
    storage = FolderStorage(tmp_path)
    for trial in trials():
        ran(storage, trial, tiny_data, epoch_s=360.0, machine=G5, epochs=1)
    before = forecast(storage, tiny_data)
    storage.put("trials/0123456789abcdef/spec.json", data)
    assert forecast(storage, tiny_data) == before
