"""Thousands of trials planned, read and scheduled with nothing to train, beside bare Ray Tune in the same run.

    python -m orchestration.scale --trials 2000 --tune-trials 24

Scheduling is everything but the training: the time from handing trials to Ray until all are recorded as done, divided
by their number. Bare Ray Tune runs a function that returns at once, once per trial; ours runs `sweep.train`
with a trainer that puts an empty result, so leases, attempts and results are put as ever, in packs that share a worker.
Both run as many at once, in one Ray that both find started and warm. Exit code 1 where a bound is passed.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import ray.tune

from helix.data.shards import Recordings, open_prepared, prepare
from helix.spec import TrialSpec, trial_id
from helix.storage import FolderStorage, json_bytes, sealed
from helix.training.trainer import Fit, trial_folder
from orchestration import sweep
from orchestration.connection import connect, driver_resources
from orchestration.grid import expand, load_grid
from orchestration.ledger import read_all
from orchestration.money import Limits
from orchestration.needs import Room
from orchestration.plan import Snapshot, check_trials, make_plan

#: What may not be passed: seconds of planning, bytes of the driver, and our overhead over that of bare Ray Tune.
MOST_PLANNING_S = 10.0
MOST_BYTES = 10**9
MOST_RATIO = 1.2

TINY = ("data.options.clips_per_class=16",)


def nothing(spec: TrialSpec, recordings: Recordings, how: Fit) -> None:
    """Stands in for `fit`: the result of a trial that trained nothing."""
    name = trial_id(spec, recordings.manifest_sha256)
    now = time.time()
    row = {"epoch": 1, "step": 1, "test_accuracy": 0.0, "seconds": 0.0, "time": now}
    result = {"trial_id": name, "rows": [row], "accuracy": {}, "train_seconds": 0.0, "finished": now}
    how.storage.put_if_absent(f"{trial_folder(name)}/result.json", json_bytes(sealed(result)))


def planned(storage: FolderStorage, trials: int) -> sweep.Sweep:
    """A sweep of so many trials of the demo grid, planned as the command plans one."""
    grid = load_grid("demo")
    per_seed = len(grid.variants) * len(grid.folds)
    asked = expand(grid, seeds=range(-(-trials // per_seed)), overrides=TINY)[:trials]
    check_trials(asked)
    prepared = prepare("tones", {"clips_per_class": 16}, source=None, storage=storage)
    recordings = open_prepared(storage, prepared.prefix)
    plan = make_plan(asked, recordings)
    snapshot = Snapshot(
        grid_name="demo", grid=grid, plan=plan, recordings=recordings, storage=storage, command="orchestration.scale"
    )
    return sweep.Sweep(
        storage=storage,
        storage_named=True,
        recordings=recordings,
        plan=plan,
        snapshot=snapshot,
        workers=None,
        threads=1,
        room=Room(),
        limits=Limits(),
    )


def bare(config: dict[str, Any]) -> dict[str, Any]:
    """The trial of bare Ray Tune."""
    return {"number": config["number"]}


def tune_seconds(trials: int, folder: Path) -> float:
    """Seconds that bare Ray Tune takes for so many trials that do nothing."""
    began = time.perf_counter()
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(bare, {"CPU": 1}),
        param_space={"number": ray.tune.grid_search(list(range(trials)))},
        run_config=ray.tune.RunConfig(name="bare", storage_path=str(folder), verbose=0),
    )
    with contextlib.redirect_stdout(sweep.RayMessages()):
        results = tuner.fit()
    assert len(results) == trials and not results.errors
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; prints one line of JSON last."""
    parser = argparse.ArgumentParser(prog="python -m orchestration.scale", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=2000, help="trials of ours (default: 2000)")
    parser.add_argument("--tune-trials", type=int, default=24, help="trials of bare Ray Tune (default: 24)")
    given = parser.parse_args(arguments)
    out, process = sweep.console(), psutil.Process()
    with tempfile.TemporaryDirectory(prefix="helix-scale-") as folder:
        storage = FolderStorage(Path(folder) / "storage")
        began, cpu = time.perf_counter(), time.process_time()
        ours = planned(storage, given.trials)
        missing = ours.missing()
        assert len(missing) == given.trials
        planning = time.perf_counter() - began, time.process_time() - cpu
        out.print(f"planning {given.trials} trials: {planning[0]:.1f} s ({planning[1]:.1f} s of CPU)")
        connect(storage_named=True)
        driver_resources()
        tune_seconds(2, Path(folder) / "warm")
        bare_s = tune_seconds(given.tune_trials, Path(folder) / "tune") / given.tune_trials
        out.print(f"bare Ray Tune: {1000 * bare_s:.0f} ms a trial, of {given.tune_trials}")
        began = time.perf_counter()
        errors, _ = sweep.train(ours, missing, trainer=nothing)
        ours_s = (time.perf_counter() - began) / given.trials
        began = time.perf_counter()
        states = read_all(storage, [entry.trial_id for entry in ours.plan], now=time.time())
        reading_s = time.perf_counter() - began
        left = [name for name, state in states.items() if state.status != "done"]
        if errors or left:
            out.print(f"{len(left)} trials are not done: {errors}", markup=False)
            return 1
    held = process.memory_info().rss
    out.print(f"ours: {1000 * ours_s:.0f} ms a trial, of {given.trials}: {ours_s / bare_s:.2f} of bare Ray Tune")
    out.print(f"reading {given.trials} results: {reading_s:.1f} s; the driver holds {held / 1e6:.0f} MB")
    figures = {
        "trials": given.trials,
        "planning_s": planning[0],
        "planning_cpu_s": planning[1],
        "tune_ms": 1000 * bare_s,
        "ours_ms": 1000 * ours_s,
        "ratio": ours_s / bare_s,
        "reading_s": reading_s,
        "driver_bytes": held,
    }
    out.print(json.dumps(figures), markup=False)
    within = planning[1] <= MOST_PLANNING_S and held <= MOST_BYTES and figures["ratio"] <= MOST_RATIO
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
