"""A sweep on a local Ray of which parts are killed, or all of it: it ends as if nothing had happened."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from helix.data.shards import open_prepared
from helix.spec import from_json, to_json, trial_id
from helix.storage import FolderStorage, Storage, open_storage
from helix.training.trainer import Fit, fit
from orchestration import sweep
from orchestration.certify import BIT_EXACT, compare
from orchestration.connection import cpu_count
from orchestration.grid import expand, load_grid
from orchestration.ledger import attempts_at
from orchestration.twin import Order, Twins
from tests.orchestration.test_sweep import SMALL, SWEEP, environment, results, run


def science(result: dict) -> tuple[str, str]:
    """Weights and metrics of a result, without the clock."""
    rows = [
        {key: value for key, value in row.items() if key not in ("seconds", "time", "system")} for row in result["rows"]
    ]
    return result["weights_sha256"], json.dumps(rows, sort_keys=True)


@pytest.mark.ray
def test_a_sweep_that_is_killed_and_run_again_ends_as_if_nothing_had_happened(tmp_path):
    (tmp_path / "killed").mkdir()
    arguments = [*SMALL, "training.epochs=20"]
    output = (tmp_path / "killed" / "output").open("w")
    command = [sys.executable, str(SWEEP), *arguments]
    driver = subprocess.Popen(command, cwd=tmp_path / "killed", env=environment(), stdout=output, stderr=output)
    storage, deadline = FolderStorage(tmp_path / "killed" / "runs"), time.monotonic() + 200
    while len(list(_under(storage, "metrics"))) < 5:
        assert driver.poll() is None, (tmp_path / "killed" / "output").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert len(results(storage.root)) < 2
    assert "2 trials: 0 done, 2 to train" in (tmp_path / "killed" / "output").read_text()

    again = run(arguments, cwd=tmp_path / "killed")
    assert again.returncode == 0, again.stdout + again.stderr
    after = results(storage.root)
    assert len(after) == 2
    end_as_undisturbed(storage, tmp_path / "whole", overrides=arguments[8:], variants=["mamba-mel", "attention-raw"])
    assert all(marker in again.stdout for marker in ("report:", "MLflow:", "mlflow ui", "attention-raw", "mamba-mel"))
    assert "compare: http://127.0.0.1:5000/#/compare-runs?runs=%5B%22" in again.stdout
    assert "runs:    http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=helix" in again.stdout

    weights = {name: storage.path(f"trials/{name}/result.json").stat().st_mtime_ns for name in after}
    third = run(arguments, cwd=tmp_path / "killed")
    assert third.returncode == 0, third.stdout + third.stderr
    assert "2 trials: 2 done, 0 to train" in third.stdout
    assert {name: storage.path(f"trials/{name}/result.json").stat().st_mtime_ns for name in after} == weights
    assert (storage.root / "reports" / "demo.html").stat().st_size > 10_000


def ranks_of(driver: subprocess.Popen) -> list[psutil.Process]:
    """The processes of a sweep that train."""
    family = psutil.Process(driver.pid).children(recursive=True)
    return [process for process in family if "RayTrainWorker" in " ".join(process.cmdline())]


@pytest.mark.ray
@pytest.mark.skipif(cpu_count() < 2, reason="two ranks need two cores")
def test_two_ranks_of_which_one_is_killed_end_as_two_that_are_not_and_near_to_one(tmp_path):
    arguments = [*SMALL[:2], "--variants", "mamba-mel", *SMALL[4:6], *SMALL[8:], "training.epochs=12", "--ranks", "2"]
    storages, drivers = {}, {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        output = (tmp_path / name / "output").open("w")
        drivers[name] = subprocess.Popen(
            [sys.executable, str(SWEEP), *arguments],
            cwd=tmp_path / name,
            env=environment(),
            stdout=output,
            stderr=output,
        )
        storages[name] = FolderStorage(tmp_path / name / "runs")
    try:
        deadline = time.monotonic() + 500
        while len(list(_under(storages["killed"], "metrics"))) < 3:
            assert drivers["killed"].poll() is None, (tmp_path / "killed" / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (name,) = storages["killed"].children("trials")
        (attempt,) = [storages["killed"].get_json(k) for k in storages["killed"].keys(f"trials/{name}/attempts")]
        (other,) = [process for process in ranks_of(drivers["killed"]) if process.pid != attempt["pid"]]
        other.kill()
        assert [driver.wait(timeout=500) for driver in drivers.values()] == [0, 0]
    finally:
        for driver in drivers.values():
            driver.kill()
    whole, killed = (results(storage.root)[name] for storage in storages.values())
    attempts = [storages["killed"].get_json(key) for key in storages["killed"].keys(f"trials/{name}/attempts")]
    assert [(one["outcome"], one["ranks"]) for one in attempts] == [("lost", 2), ("done", 2)]
    assert attempts[1]["from_step"] > 0
    assert attempts[0]["share"] == min(1.0, 2 / cpu_count())
    assert science(killed) == science(whole)

    spec = from_json(whole["spec"])
    (prefix,) = storages["whole"].children("data")
    recordings = open_prepared(storages["whole"], f"data/{prefix}")
    one = fit(spec, recordings, Fit(storage=FolderStorage(tmp_path / "one")))
    assert one["trial_id"] == name
    for a, b in zip(one["rows"][:3], whole["rows"][:3], strict=True):
        assert b["train_losses"] == pytest.approx(a["train_losses"], rel=1e-3)


#: Runs a command on one core of this machine.
ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.ray
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="takes cores away from a process")
def test_processes_of_ray_that_are_killed_on_a_machine_that_is_full_do_not_keep_the_sweep_from_its_end(tmp_path):
    """The one worker takes the only core; what a dead controller or driver reserved for it has to be given back."""
    trial = [*SMALL[-4:], "training.epochs=60"]
    arguments = ["--grid", "demo", "--variants", "mamba-mel", "--folds", "1", *trial]
    output = (tmp_path / "output").open("w")
    driver = subprocess.Popen(
        [sys.executable, "-c", ONE_CORE, sys.executable, str(SWEEP), *arguments],
        cwd=tmp_path,
        env=environment(),
        stdout=output,
        stderr=output,
    )
    storage = FolderStorage(tmp_path / "runs")

    def working(attempts: int) -> None:
        """Wait until so many attempts were begun, and the last of them has finished an epoch."""
        deadline, before = time.monotonic() + 150, 0
        while time.monotonic() < deadline:
            assert driver.poll() is None, (tmp_path / "output").read_text()
            begun, rows = len(list(_under(storage, "attempts"))), len(list(_under(storage, "metrics")))
            before = before if begun == attempts else rows
            if begun == attempts and rows > before:
                return
            time.sleep(0.02)
        pytest.fail(f"attempt {attempts} did not get on: {(tmp_path / 'output').read_text()}")

    try:
        working(1)
        _named(driver.pid, "ray::TrainController").kill()
        working(2)
        _named(driver.pid, "ray::ImplicitFunc").kill()
        assert driver.wait(timeout=300) == 0, (tmp_path / "output").read_text()
    finally:
        driver.kill()
        driver.wait()
    (name,) = results(storage.root)
    assert [one["outcome"] for one in attempts_at(storage, name)] == ["lost", "lost", "done"]
    end_as_undisturbed(storage, tmp_path / "whole", overrides=trial, variants=["mamba-mel"])


def end_as_undisturbed(storage: FolderStorage, twin: Path, *, overrides: list[str], variants: list[str]) -> None:
    """The trials of fold 1 of the demo end bit for bit as in a process that nobody disturbs and that knows no Ray."""
    (data,) = storage.children("data")
    recordings = open_prepared(storage, f"data/{data}")
    with Twins() as twins:
        for trial in expand(load_grid("demo"), overrides=overrides, folds=[1], variants=variants):
            whole = Order(spec=to_json(trial.spec), source=repr(storage), data=f"data/{data}", storage=str(twin))
            assert twins.run(whole).status == 0
            name = trial_id(trial.spec, recordings.manifest_sha256)
            assert compare(open_storage(whole.storage), storage, name)["verdict"] == BIT_EXACT


def _named(pid: int, title: str) -> psutil.Process:
    """The process below `pid` that Ray calls so."""
    (found,) = [one for one in psutil.Process(pid).children(recursive=True) if _title(one).startswith(title)]
    return found


def _title(process: psutil.Process) -> str:
    try:
        return process.cmdline()[0]
    except (psutil.Error, IndexError):  # it has just ended
        return ""


@pytest.mark.ray
def test_sigterm_to_the_driver_saves_what_is_under_way_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "temporary").mkdir()
    arguments = [*SMALL, "--variants", "mamba-mel", "training.epochs=2000"]
    output = tmp_path / "output"
    with output.open("w") as out:
        # Ray names its sockets after its own folder, which would get too long: only the driver's folder is moved.
        moved = environment(TMPDIR=str(tmp_path / "temporary"), RAY_TMPDIR=tempfile.gettempdir())
        command = [sys.executable, str(SWEEP), *arguments]
        driver = subprocess.Popen(command, cwd=tmp_path, env=moved, stdout=out, stderr=out)
    storage, family = FolderStorage(tmp_path / "runs"), []
    try:
        deadline = time.monotonic() + 100
        while len(list(_under(storage, "metrics"))) < 3:
            assert driver.poll() is None, output.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        family = psutil.Process(driver.pid).children(recursive=True)
        assert ranks_of(driver)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=60) == sweep.INTERRUPTED, output.read_text()
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive
    finally:
        driver.kill()
        driver.wait()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert "stopped: interrupted (SIGTERM); every trial under way was saved" in output.read_text()
    (name,) = storage.children("trials")
    (attempt,) = attempts_at(storage, name)
    assert attempt["outcome"] == "stopped"
    assert attempt["kept_step"] == attempt["step"] > 0
    assert not list((tmp_path / "temporary").glob("helix-ray-*"))


def _under(storage: Storage, folder: str):
    """What the trials have in this folder of theirs."""
    for name in storage.children("trials"):
        yield from storage.children(f"trials/{name}/{folder}")
