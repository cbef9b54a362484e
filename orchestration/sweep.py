"""The entry point: a grid -> what is missing -> Ray Tune -> results, MLflow, a report. Running it again continues it.

    python orchestration/sweep.py --grid demo
    python orchestration/sweep.py --grid esc50 --source ESC-50-master training.epochs=20

Exit code: 0 every trial is done, 1 some are not, 2 the request was refused before anything was spent, 130 interrupted.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file, from any directory, whether the package is installed or not
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if entry != str(here))]

import argparse
import contextlib
import io
import logging
import math
import os
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.tune
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dashboards.live import LiveView
from dashboards.report import write_report
from dashboards.terminal import summary_table
from helix.data.shards import CorruptShardError, Recordings
from helix.protocol import PROFILES
from helix.spec import to_json
from helix.storage import FolderStorage, Storage, open_storage
from helix.training.memory import GIB, Device, Placement, available_bytes, gib
from orchestration.connection import ClusterError, connect, cpu_count, driver_resources, joins_cluster
from orchestration.grid import GRIDS, PRESETS, Grid, Trial, expand, load_grid
from orchestration.ledger import TrialState, read
from orchestration.plan import Planned, Snapshot, check_trials, make_plan, pack, place, price
from orchestration.preprocessing import check_listing, prepared_data, rehearsed_data
from orchestration.tracking import BackgroundTracker, Tracker, attempt_replay, local_folder, without_secrets
from orchestration.worker import drive

logger = logging.getLogger(__name__)

#: Columns of tables that go to a file or a pipe.
PLAIN_WIDTH = 120

SOME_FAILED = 1
REFUSED = 2
INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One execution of a grid, checked and planned: nothing has been trained yet."""

    storage: Storage
    storage_named: bool
    recordings: Recordings
    plan: list[Planned]
    snapshot: Snapshot
    workers: int | None
    threads: int
    gpu: bool
    limit_bytes: int | None

    def missing(self) -> list[Planned]:
        """The trials that have no result yet."""
        return [entry for entry in self.plan if self.snapshot.state(entry.trial_id).status != "done"]

    def placement(self, entry: Planned) -> Placement:
        """How a step of this trial fits into what a worker has."""
        return place(entry.trial, limit_bytes=self.limit_bytes, device="cuda" if self.gpu else "cpu")


def main(arguments: Sequence[str] | None = None, *, train_missing: bool = True) -> int:
    """Run the command line, or without `train_missing` report on what is stored. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(name)s: %(message)s")
    if not options.verbose:  # Tune logs a pack's traceback at every attempt; finish() says what matters of it
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # The stream is named so that the console keeps it while Ray's own printing is redirected.
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, width=width)
    try:
        sweep = plan_sweep(options, command=["python", "orchestration/sweep.py", *arguments], console=console)
        if sweep is not None and train_missing:
            for entry in sweep.missing():
                sweep.placement(entry)
    except (ValueError, OSError, ClusterError, CorruptShardError) as error:
        return refuse(error)
    if sweep is None:
        return 0
    try:
        if train_missing:
            run_sweep(sweep, console)
    except (ConnectionError, ClusterError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues where this one stopped")
        return INTERRUPTED
    try:
        return finish(sweep, console)
    except OSError as error:
        console.print(f"no report: {error}; what is stored is not lost, the same command goes on with it", markup=False)
        return SOME_FAILED


def refuse(error: Exception) -> int:
    """Say why nothing was started. Returns the exit code."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"refused: {error}", markup=False)
    return REFUSED


def plan_sweep(options: argparse.Namespace, *, command: Sequence[str], console: Console) -> Sweep | None:
    """Check and plan; whatever can be refused is refused here, before anything is spent: ValueError or OSError say why.

    None after a dry run, which prints the plan and writes nothing.
    """
    storage, storage_named = chosen_storage(options)
    grid = load_grid(options.grid)
    trials = expand(
        grid,
        profile_name=options.profile,
        overrides=options.overrides,
        preset=options.preset,
        folds=options.folds,
        seeds=options.seeds,
        variants=options.variants,
    )
    if _positive("--threads", options.threads) > cpu_count() and not joins_cluster():
        raise ValueError(f"--threads is {options.threads}, but this machine has {cpu_count()} cores")
    if options.workers is not None:
        _positive("--workers", options.workers)
    if options.device == "cuda" and not joins_cluster() and not torch.cuda.is_available():
        raise ValueError(
            "--device is cuda, but torch finds no CUDA device on this machine; leave it out to train on CPU"
        )
    check_trials(trials)
    limit_bytes = memory_limit(options, trials=len(trials))
    data, partial = trials[0].spec.data, options.allow_partial
    if options.dry_run:
        recordings = rehearsed_data(data, source=options.source, storage=storage, allow_partial=partial)
        _print_plan(
            options.grid, grid, trials, recordings, storage, console, limit_bytes=limit_bytes, device=options.device
        )
        return None
    check_listing(trials, source=options.source, allow_partial=partial)
    storage.check_writable()
    recordings = prepared_data(
        data,
        source=options.source,
        storage=storage,
        storage_named=storage_named,
        allow_partial=partial,
        quarantine=options.quarantine,
        say=console.print,
    )
    plan = make_plan(trials, recordings)
    return Sweep(
        storage=storage,
        storage_named=storage_named,
        recordings=recordings,
        plan=plan,
        snapshot=Snapshot(
            grid_name=options.grid,
            grid=grid,
            plan=plan,
            recordings=recordings,
            storage=storage,
            command=shlex.join(command),
        ),
        workers=options.workers,
        threads=options.threads,
        gpu=options.device == "cuda",
        limit_bytes=limit_bytes,
    )


def run_sweep(sweep: Sweep, console: Console) -> None:
    """Train what has no result yet, showing it live and tracking it as it goes."""
    missing = sweep.missing()
    console.print(f"{len(sweep.plan)} trials: {len(sweep.plan) - len(missing)} done, {len(missing)} to train")
    if not missing:
        return
    tracker = Tracker(sweep.storage)
    problem = attempt_replay(tracker, sweep.snapshot())
    if problem:
        console.print(_mlflow_trouble(tracker.uri, problem), markup=False)
    connect(storage_named=sweep.storage_named)
    with BackgroundTracker(tracker, sweep.snapshot), LiveView(sweep.snapshot, console=console):
        errors = train(sweep, missing)
    for error in errors:
        console.print(f"a worker gave up: {error}", markup=False)


def train(sweep: Sweep, missing: Sequence[Planned]) -> list[str]:
    """Hand the missing trials to Ray Tune in packs; each pack is one Tune trial that drives one Ray Train worker.

    Returns what went wrong with whole packs, a line each; what went wrong with a trial is recorded with the trial.
    """
    sweep_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    # Ray's folder holds nothing that a later sweep reads: results, rows and checkpoints are in our own storage. The
    # machines of a cluster have to share it; pyarrow, which reads it for Ray, takes its endpoint from the environment.
    scratch_key, aside = f"ray/{sweep_id}", None
    if not joins_cluster():
        scratch = aside = tempfile.mkdtemp(prefix="helix-ray-")
    elif isinstance(sweep.storage, FolderStorage):
        scratch = str(sweep.storage.path(scratch_key))
    else:
        scratch = f"{sweep.storage!r}/{scratch_key}"
    packs = [
        {
            "sweep_id": sweep_id,
            "storage": repr(sweep.storage),
            "data": sweep.recordings.prepared.prefix,
            "trial_ids": [entry.trial_id for entry in entries],
            "specs": [to_json(entry.trial.spec) for entry in entries],
            "placements": [_cut(sweep.placement(entry)) for entry in entries],
            "threads": sweep.threads,
            "gpu": sweep.gpu,
            "scratch": scratch,
        }
        for entries in pack(missing, workers=sweep.workers or _slots(sweep, missing))
    ]
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(drive, driver_resources()),
        param_space={"pack": ray.tune.grid_search(packs)},
        run_config=ray.tune.RunConfig(
            name="tune",
            storage_path=scratch,
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=8),
        ),
    )
    try:
        with contextlib.redirect_stdout(RayMessages()):
            results = tuner.fit()
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                sweep.storage.delete_folder(scratch_key)
    errors = [result.error for result in results if result.error is not None]
    return sorted({(str(error).strip().splitlines() or [repr(error)])[-1] for error in errors})


def _cut(placement: Placement) -> dict[str, Any]:
    """What the worker has to know of a placement."""
    return {name: getattr(placement, name) for name in ("micro_batch", "recompute", "compact")}


def memory_limit(options: argparse.Namespace, *, trials: int) -> int | None:
    """What one worker may hold, in bytes; None where nobody knows, as on a cluster that this machine is no part of.

    On a CPU the workers of this machine share what it has left; a GPU is one worker's.
    """
    if options.memory_gib is not None:
        if not 0 < options.memory_gib < math.inf:
            raise ValueError(f"--memory-gib is {options.memory_gib}; wanted a positive number")
        return int(options.memory_gib * GIB)
    if joins_cluster():
        return None
    if options.device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    workers = options.workers or max(1, cpu_count() // options.threads)
    return available_bytes() // min(workers, trials)


def _slots(sweep: Sweep, missing: Sequence[Planned]) -> int:
    """How many workers the cluster can run at once; as many as there are trials where it has yet to start its GPUs."""
    resources = ray.cluster_resources()
    if sweep.gpu:
        return int(resources.get("GPU", 0)) or len(missing)
    return max(1, int(resources.get("CPU", 0)) // sweep.threads)


class RayMessages(io.TextIOBase):
    """Takes what Ray prints of its own accord out of the live view and into the log, where --verbose shows it."""

    def write(self, text: str) -> int:
        for line in filter(None, map(str.strip, text.splitlines())):
            logger.info("%s", line)
        return len(text)


def finish(sweep: Sweep, console: Console) -> int:
    """Bring MLflow up to date, write the report, print the table and where to look. Returns the exit code."""
    view = sweep.snapshot()
    tracker = Tracker(sweep.storage)
    problem = attempt_replay(tracker, view)
    key = f"reports/{view.grid}.html"
    report = local_folder(sweep.storage) / key
    write_report(view, report)
    if not isinstance(sweep.storage, FolderStorage):
        sweep.storage.upload(key, report)
    console.print(summary_table(view))
    states = [(cell.variant, trial) for cell, trial in view.trials()]
    undone = [(variant, trial) for variant, trial in states if trial.state.status != "done"]
    for variant, trial in undone:
        if trial.state.error is not None:
            console.print(f"failed: {variant} fold {trial.fold} seed {trial.seed}: {trial.state.error}", markup=False)
    if undone:
        console.print(f"{len(undone)} of {len(states)} trials are not done; the same command goes on with them")
    console.print(f"\nreport:  {shlex.join([sys.executable, '-m', 'webbrowser', report.as_uri()])}", markup=False)
    if problem:
        console.print(f"MLflow:  {_mlflow_trouble(tracker.uri, problem)}", markup=False)
    elif tracker.uri.startswith("sqlite:"):
        # Without the variable MLflow starts a dozen processes for jobs of language models, which take a gigabyte.
        command = ["env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", sys.executable, "-m", "mlflow", "ui"]
        command += ["--backend-store-uri", tracker.uri]
        command += ["--host", "127.0.0.1", "--port", "5000", "--workers", "1"]
        console.print(f"MLflow:  {shlex.join(command)}    then open http://127.0.0.1:5000", markup=False)
    else:
        console.print(f"MLflow:  {without_secrets(tracker.uri)}", markup=False)
    return SOME_FAILED if undone else 0


def _mlflow_trouble(uri: str, problem: str) -> str:
    return (
        f"{without_secrets(uri)} does not answer ({problem}). Nothing is lost: all rows are in the storage, and the "
        "same command sends them later"
    )


def _print_plan(
    name: str,
    grid: Grid,
    trials: Sequence[Trial],
    recordings: Recordings | None,
    storage: Storage,
    console: Console,
    *,
    limit_bytes: int | None,
    device: Device,
) -> None:
    """What the grid asks and what each trial costs and how it stands; steps and ids need the prepared data."""
    console.print(grid.question.strip() + "\n", markup=False)
    table = Table(title=f"{name}: {len(trials)} trials", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    if recordings is None:
        known = {trial.label: ("-", "-", "data not prepared") for trial in trials}
        prices = [(trial, price(trial)) for trial in trials]
    else:
        plan = make_plan(trials, recordings)
        states = {entry.trial.label: read(storage, entry.trial_id, now=time.time()) for entry in plan}
        known = {
            entry.trial.label: (entry.trial_id, f"{entry.steps:,}", _progress(states[entry.trial.label]))
            for entry in plan
        }
        prices = [(entry.trial, entry.cost) for entry in plan]
    rows = []
    for trial, size in prices:
        name, steps, state = known[trial.label]
        # What is done is not trained again, so it has not to fit.
        placement = place(trial, limit_bytes=None if state.startswith("done") else limit_bytes, device=device)
        rows.append(
            {
                "variant": trial.variant.name,
                "fold": str(trial.spec.data.fold),
                "seed": str(trial.spec.seed),
                "id": name,
                "parameters": f"{size.parameters:,}",
                "tokens": f"{size.tokens:,}",
                "memory": gib(placement.predicted.peak_bytes),
                "at a time": _pieces(placement),
                "steps": steps,
                "state": state,
            }
        )
    if not any(row["at a time"] for row in rows):
        rows = [{heading: row[heading] for heading in row if heading != "at a time"} for row in rows]
    for heading in rows[0]:
        numeric = heading in ("parameters", "tokens", "memory", "steps")
        table.add_column(heading, no_wrap=True, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    console.print(
        "memory: not checked, since what a worker has is not known here; --memory-gib says it"
        if limit_bytes is None
        else f"memory: the predicted peak of a step; a worker may hold {gib(limit_bytes)} with the process itself"
    )
    if recordings is None:
        console.print(f"--source prepares {trials[0].spec.data.dataset}; ids and steps are known then")


def _pieces(placement: Placement) -> str:
    """How the batch is cut where it does not go through the model in one piece, keeping everything."""
    ways = [f"{placement.micro_batch} clips"] if placement.micro_batch else []
    ways += ["recomputed"] if placement.recompute else []
    return ", ".join(ways)


def _progress(state: TrialState) -> str:
    return f"{state.status}, {state.epochs_done} epochs" if state.epochs_done else state.status


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} is {value}; wanted 1 or more")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        description="Run a grid: train what is missing, track it, and compare. Running it again continues it.",
    )
    parser.add_argument("--grid", required=True, help=f"the question to ask; known: {', '.join(GRIDS.names())}")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. training.epochs=20 protocol.mel_pad=floor"
    )
    parser.add_argument(
        "--profile", default="paper", help=f"the setting of all protocol switches: {', '.join(PROFILES)}"
    )
    parser.add_argument("--preset", help=f"model size, in place of the grid's: {', '.join(PRESETS)}")
    parser.add_argument("--folds", type=numbers, metavar="1,2", help="these folds instead of the grid's")
    parser.add_argument("--seeds", type=numbers, metavar="0,1", help="these seeds instead of the grid's")
    parser.add_argument(
        "--variants", type=names, metavar="NAME,...", help="these variants only, e.g. mamba-raw,helix-raw"
    )
    add_data_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--verbose", action="store_true", help="show what Ray says as well")
    parser.add_argument("--workers", type=int, help="how many trials train at once (default: what the machines hold)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each worker (default: 1)")
    parser.add_argument(
        "--memory-gib",
        type=float,
        metavar="GIB",
        help="what one worker may hold; batches are cut to fit (default: this machine's share, or its GPU)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what a trial trains on (default: cpu)"
    )
    return parser


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command needs that touches a data set."""
    parser.add_argument(
        "--storage",
        help="the folder or s3://bucket/prefix that holds data, trials and reports (default: HELIX_STORAGE or ./runs)",
    )
    parser.add_argument("--source", type=Path, help="the folder of the data set's own files, to prepare it from")
    parser.add_argument("--allow-partial", action="store_true", help="accept a data set that is not complete")
    parser.add_argument(
        "--quarantine",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N files that cannot be used (default: 0)",
    )


def chosen_storage(options: argparse.Namespace) -> tuple[Storage, bool]:
    """The storage, and whether the user named it: with --storage, with HELIX_STORAGE, or else ./runs."""
    named = options.storage or os.environ.get("HELIX_STORAGE")
    return open_storage(named or "runs"), bool(named)


def numbers(text: str) -> list[int]:
    """Whole numbers from a list such as 1,2; argparse tells the user where it is none."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,2") from error


def names(text: str) -> list[str]:
    """Names from a list with commas."""
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
