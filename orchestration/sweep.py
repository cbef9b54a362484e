"""The entry point: a grid -> what is missing -> Ray Tune -> results, MLflow, a report. Running it again continues it.

    python orchestration/sweep.py --grid demo
    python orchestration/sweep.py --grid esc50 --source ESC-50-master training.epochs=20

Exit code: 0 every trial is done, 1 some are not, 2 the request was refused before anything was spent, 3 the budget or
the time ended first and the same command goes on, 130 interrupted.
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
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.tune
import ray.tune.stopper
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dashboards.live import LiveView
from dashboards.report import report_tables, write_report
from dashboards.tables import drop_stale, write_tables
from dashboards.terminal import summary_table
from dashboards.text import cost_line, printable
from dashboards.view import SweepView
from helix.addresses import shown_uri
from helix.data.shards import CorruptShardError, Recordings
from helix.models.scan import drifts, wanted_backend
from helix.spec import to_json
from helix.storage import FolderStorage, Storage
from helix.training.memory import GIB, Placement, available_bytes, gib
from orchestration.asked import put_asked
from orchestration.connection import (
    ClusterError,
    connect,
    cpu_count,
    driver_resources,
    joins_cluster,
    offer,
)
from orchestration.grid import Grid, Trial, expand, load_grid
from orchestration.guard import CALLS, Guard, calls_answered
from orchestration.ledger import TrialState, read
from orchestration.lineage import code_facts
from orchestration.money import Limits, machine_facts, read_prices, until
from orchestration.needs import Need, Room, deal, need_of
from orchestration.options import chosen_storage, sweep_parser
from orchestration.plan import Planned, Snapshot, check_trials, make_plan, price, with_memory
from orchestration.preprocessing import check_listing, prepared_data, rehearsed_data
from orchestration.tracking import BackgroundTracker, Tracker, attempt_replay
from orchestration.tracking_place import check_tracking_uri, local_folder
from orchestration.worker import drive, worker_resources

logger = logging.getLogger(__name__)

#: Columns of tables that go to a file or a pipe.
PLAIN_WIDTH = 120

SOME_FAILED = 1
REFUSED = 2
STOPPED = 3
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
    room: Room
    limits: Limits
    deterministic: bool = False

    def missing(self) -> list[Planned]:
        """The trials that have no result yet."""
        states = self.snapshot.states()
        return [entry for entry in self.plan if states[entry.trial_id].status != "done"]

    @property
    def gpu(self) -> bool:
        return self.room.device == "cuda"

    def resources(self, gpus: float) -> dict[str, float]:
        """What a worker each of whose ranks has so much of GPUs asks the cluster for."""
        asked = {"threads": self.threads, "gpu": self.gpu, "gpus": gpus, "ranks": self.room.ranks}
        return worker_resources(asked)

    def need(self, entry: Planned) -> Need:
        """What this trial asks for, and how its step fits into that; ValueError says what would fit."""
        return need_of(entry.trial, self.room, tokens=entry.cost.tokens)

    def placement(self, entry: Planned) -> Placement:
        """How a step of this trial fits into what a rank of its worker has."""
        return self.need(entry).placement


def main(arguments: Sequence[str] | None = None, *, train_missing: bool = True) -> int:
    """Run the command line, or without `train_missing` report on what is stored. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = sweep_parser().parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(name)s: %(message)s")
    if not options.verbose:  # Tune logs a pack's traceback at every attempt; finish() says what matters of it
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    out = console()
    try:
        sweep = plan_sweep(options, command=["python", "orchestration/sweep.py", *arguments], console=out)
        if sweep is not None and train_missing:
            for entry in sweep.missing():
                sweep.placement(entry)
    except (ValueError, OSError, ClusterError, CorruptShardError) as error:
        return refuse(error)
    if sweep is None:
        return 0
    stopped = None
    try:
        if train_missing:
            stopped = run_sweep(sweep, out)
    except (ConnectionError, ClusterError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        out.print("interrupted; the same command continues where this one stopped")
        return INTERRUPTED
    return finish(sweep.storage, sweep.snapshot, out, stopped=stopped, trained=train_missing)


def console() -> Console:
    """Where a command talks to people."""
    # The stream is named so that the console keeps it while Ray's own printing is redirected.
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(file=sys.stdout, highlight=False, soft_wrap=True, width=width)


def refuse(error: Exception) -> int:
    """Say why nothing was started. Returns the exit code."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"refused: {error}", markup=False)
    return REFUSED


def unfinished(stopped: str | None) -> int:
    """The exit code of a sweep that left trials undone; `stopped`: why it stopped, if it had to."""
    if stopped is None:
        return SOME_FAILED
    return INTERRUPTED if stopped in CALLS.values() else STOPPED


def plan_sweep(options: argparse.Namespace, *, command: Sequence[str], console: Console) -> Sweep | None:
    """Check and plan; whatever can be refused is refused here, before anything is spent: ValueError or OSError say why.

    None after a dry run, which prints the plan and writes nothing.
    """
    storage, storage_named = chosen_storage(options)
    check_tracking_uri(storage)
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
    _check_ranks(options, trials)
    threads = _positive("--threads", options.threads) * options.ranks
    if threads > cpu_count() and not joins_cluster():
        asked = f"--threads is {options.threads}" + (f" on {options.ranks} ranks" if options.ranks > 1 else "")
        raise ValueError(f"{asked}, but this machine has {cpu_count()} cores")
    if options.workers is not None:
        _positive("--workers", options.workers)
    if options.gpus_per_trial is not None and not 0 < options.gpus_per_trial <= 1:
        raise ValueError(
            f"--gpus-per-trial is {options.gpus_per_trial}; wanted a share of one GPU, above 0 and at most 1, or auto "
            "(--ranks trains a trial on several)"
        )
    if options.gpus_per_trial is not None and options.device != "cuda":
        raise ValueError("--gpus-per-trial shares GPUs, and this sweep trains on CPU; add --device cuda")
    if options.deterministic:
        _check_determinism(options)
    ends = until(deadline=options.deadline, hours=options.hours, now=time.time())
    limits = Limits(budget_usd=options.budget_usd, ends=ends)
    prices = read_prices(options.prices) if options.prices else read_prices()
    if limits.budget_usd is not None and not joins_cluster():
        facts = machine_facts(held={}, resources={})
        if prices.per_hour(facts["instance_type"], facts["market"]) is None:
            raise ValueError(
                "--budget-usd needs the price of this machine; set HELIX_INSTANCE_TYPE to one that the price table has "
                f"({', '.join(prices.instance_types) or 'it is empty'}) and HELIX_MARKET to on-demand or spot"
            )
    if options.device == "cuda" and not joins_cluster() and not torch.cuda.is_available():
        raise ValueError(
            "--device is cuda, but torch finds no CUDA device on this machine; leave it out to train on CPU"
        )
    check_trials(trials)
    room = room_here(options, trials=len(trials))
    data, partial = trials[0].spec.data, options.allow_partial
    if options.dry_run:
        recordings = rehearsed_data(data, source=options.source, storage=storage, allow_partial=partial)
        if options.device == "cuda" and joins_cluster():  # only the cluster knows its GPUs
            connect(storage_named=storage_named)
            room = room.on(offer(prices), threads=options.threads)
        _print_plan(options.grid, grid, trials, recordings, storage, console, room=room)
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
            prices=prices,
        ),
        workers=options.workers,
        threads=options.threads,
        room=room,
        limits=limits,
        deterministic=options.deterministic,
    )


def run_sweep(sweep: Sweep, console: Console) -> str | None:
    """Train what has no result yet, showing it live and tracking it as it goes; why it stopped, if it had to."""
    put_asked(sweep.storage, sweep.snapshot.asked)
    missing = sweep.missing()
    console.print(f"{len(sweep.plan)} trials: {len(sweep.plan) - len(missing)} done, {len(missing)} to train")
    if not missing:
        return None
    tracker = Tracker(sweep.storage)
    problem = attempt_replay(tracker, sweep.snapshot())
    if problem:
        console.print(problem, markup=False)
    connect(storage_named=sweep.storage_named)
    with BackgroundTracker(tracker, sweep.snapshot), LiveView(sweep.snapshot, console=console):
        errors, stopped = train(sweep, missing)
    for error in errors:
        console.print(f"a worker gave up: {error}", markup=False)
    return stopped


def train(
    sweep: Sweep, missing: Sequence[Planned], *, trainer: Callable[..., Any] | None = None
) -> tuple[list[str], str | None]:
    """Hand the missing trials to Ray Tune in packs; each pack is one Tune trial that drives one Ray Train worker.

    Returns what went wrong with whole packs, a line each (what went wrong with a trial is recorded with the trial), and
    why the sweep stopped before its end, if it did. `trainer`: what the workers call in place of `fit`. Raises
    ClusterError where no machine could ever hold a worker.
    """
    on_offer = offer(sweep.snapshot.prices)
    sweep = replace(sweep, room=sweep.room.on(on_offer, threads=sweep.threads))
    try:
        needs = {entry.trial_id: sweep.need(entry) for entry in missing}
    except ValueError as error:  # what its own GPUs hold only a cluster says
        raise ClusterError(str(error)) from error
    for gpus in sorted({need.gpus for need in needs.values()}):
        if problem := on_offer.impossible(sweep.resources(gpus)):
            raise ClusterError(problem)
    dealt = deal(
        [(entry, needs[entry.trial_id].gpus) for entry in missing],
        slots=lambda gpus: on_offer.slots(sweep.resources(gpus)),
        device=sweep.room.device,
        workers=sweep.workers,
    )
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
            "data": sweep.recordings.prepared.prefix,
            "trial_ids": [entry.trial_id for entry in pack.entries],
            "specs": [to_json(entry.trial.spec) for entry in pack.entries],
            "placements": [_cut(needs[entry.trial_id].placement) for entry in pack.entries],
            "labels": [_labels(sweep.snapshot.grid_name, entry.trial) for entry in pack.entries],
            "threads": sweep.threads,
            "gpu": sweep.gpu,
            "gpus": pack.gpus,
            "ranks": sweep.room.ranks,
            "deterministic": sweep.deterministic,
            "scratch": scratch,
            "code": code_facts(),
        }
        for pack in dealt.packs
    ]
    packs_key = f"sweeps/{sweep_id}/packs"
    found = []
    for number, one in enumerate(packs):
        key = f"{packs_key}/{number:05d}.json"
        sweep.storage.put_json(key, one)
        found.append({"storage": repr(sweep.storage), "key": key, "trainer": trainer})
    wanted = [(sweep.resources(gpus), dealt.waiting(gpus)) for gpus in sorted({pack.gpus for pack in dealt.packs})]
    guard = Guard(sweep.snapshot, sweep.limits, sweep_id=sweep_id, wanted=wanted)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(drive, driver_resources()),
        param_space={"pack": ray.tune.grid_search(found)},
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=dealt.at_once),
        run_config=ray.tune.RunConfig(
            name="tune",
            storage_path=scratch,
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=8),
            stop=guard,
        ),
    )
    try:
        with guard, calls_answered(guard), contextlib.redirect_stdout(RayMessages()):
            results = tuner.fit()
    finally:
        with contextlib.suppress(OSError):
            sweep.storage.delete_folder(packs_key)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                sweep.storage.delete_folder(scratch_key)
    if guard.impossible:
        raise ClusterError(guard.impossible)
    errors = [result.error for result in results if result.error is not None]
    return sorted({(str(error).strip().splitlines() or [repr(error)])[-1] for error in errors}), guard.stopped


def _cut(placement: Placement) -> dict[str, Any]:
    """What the worker has to know of a placement."""
    said = {name: getattr(placement, name) for name in ("micro_batch", "recompute", "compact")}
    return said | {"peak_bytes": placement.predicted.peak_bytes}


def _labels(grid: str, trial: Trial) -> dict[str, str]:
    """What the metrics of a trial are labelled with."""
    return {"grid": grid, "variant": trial.variant.name, "fold": str(trial.spec.data.fold), "trial": trial.label}


def room_here(options: argparse.Namespace, *, trials: int) -> Room:
    """What workers may have, as far as this machine knows: of a cluster it knows nothing yet.

    On a CPU the workers of this machine share what it has left; of a GPU each has its share.
    """
    room = Room(device=options.device, gpus=options.gpus_per_trial, ranks=options.ranks)
    if options.memory_gib is not None:
        if not 0 < options.memory_gib < math.inf:
            raise ValueError(f"--memory-gib is {options.memory_gib}; wanted a positive number")
        room = replace(room, limit_bytes=int(options.memory_gib * GIB))
    if joins_cluster():
        return room
    if options.device == "cuda":
        gpus = range(torch.cuda.device_count())
        smallest = min(torch.cuda.get_device_properties(number).total_memory for number in gpus)
        return replace(room, gpu_bytes=smallest, most=max(1, cpu_count() // len(gpus) // options.threads))
    workers = options.workers or max(1, cpu_count() // (options.threads * options.ranks))
    shared = available_bytes() // (min(workers, trials) * options.ranks)
    return replace(room, limit_bytes=room.limit_bytes or shared)


class RayMessages(io.TextIOBase):
    """Takes what Ray prints of its own accord out of the live view and into the log, where --verbose shows it."""

    def write(self, text: str) -> int:
        for line in filter(None, map(str.strip, text.splitlines())):
            logger.info("%s", line)
        return len(text)


def put_reports(storage: Storage, write: Callable[[Path], tuple[Path, ...]]) -> tuple[Path, ...]:
    """Write reports into the local folder and, where the storage is a bucket, put them there as well."""
    local = local_folder(storage)
    page, *tables = written = write(local / "reports")
    if not isinstance(storage, FolderStorage):
        for path in written:
            storage.upload(path.relative_to(local).as_posix(), path)
        drop_stale(storage, page.with_suffix("").relative_to(local).as_posix(), tables)
    return written


def write_page(view: SweepView, page: Path) -> tuple[Path, ...]:
    """Write the report of a view and its tables beside it; the page, then the tables."""
    write_report(view, page, files=page.stem)
    tables = write_tables(report_tables(view), page.with_suffix(""))
    drop_stale(FolderStorage(page.parent), page.stem, tables)
    return page, *tables


def finish(
    storage: Storage,
    look: Callable[[], SweepView],
    console: Console,
    *,
    stopped: str | None = None,
    trained: bool = True,
) -> int:
    """Bring MLflow up to date, write the report, print the table and where to look. Returns the exit code.

    `look` gives the view of what is stored. `stopped`: why the sweep stopped, if it had to. `trained`: whether the
    command that is about to end trains what is missing.
    """
    try:
        return _finish(storage, with_memory(look()), console, stopped=stopped, trained=trained)
    except (OSError, ValueError) as error:  # ValueError: what is stored is not JSON
        console.print(f"no report: {error}; what is stored is not lost, the same command goes on with it", markup=False)
        return unfinished(stopped)


def _finish(storage: Storage, view: SweepView, console: Console, *, stopped: str | None, trained: bool) -> int:
    tracker = Tracker(storage)
    report = put_reports(storage, lambda folder: write_page(view, folder / f"{view.grid}.html"))[0]
    problem = attempt_replay(tracker, view, report)
    console.print(summary_table(view))
    states = [(cell.variant, trial) for cell, trial in view.trials()]
    undone = [(variant, trial) for variant, trial in states if trial.state.status != "done"]
    for variant, trial in undone:
        if trial.state.error is not None:
            console.print(
                f"failed: {variant} fold {trial.fold} seed {trial.seed}: {printable(trial.state.error or '')}",
                markup=False,
            )
    if undone:
        if stopped is not None:
            console.print(f"stopped: {stopped}; every trial under way was saved", markup=False)
        again = "the same command" if trained else f"the sweep's command ({view.command})"
        failed = sum(trial.state.status == "failed" for _, trial in undone)
        console.print(
            f"{len(undone)} of {len(states)} trials are not done; {_what_next(again, len(undone), failed)}",
            markup=False,
        )
    for line in view.damage:
        console.print(f"damaged: {printable(line)}", markup=False)
    if view.damage:
        console.print("helix verify lists all that is damaged, and says what to do")
    if view.spent.hours:
        console.print(f"cost:    {cost_line(view.spent)}", markup=False)
    console.print(f"\nreport:  {shlex.join([sys.executable, '-m', 'webbrowser', report.as_uri()])}", markup=False)
    if problem:
        console.print(f"MLflow:  {problem}", markup=False)
    elif tracker.uri.startswith("sqlite:"):
        # Without the variable MLflow starts a dozen processes for jobs of language models, which take a gigabyte.
        command = ["env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", sys.executable, "-m", "mlflow", "ui"]
        command += ["--backend-store-uri", tracker.uri]
        command += ["--host", "127.0.0.1", "--port", "5000", "--workers", "1"]
        console.print(f"MLflow:  {shlex.join(command)}    then open http://127.0.0.1:5000", markup=False)
    else:
        console.print(f"MLflow:  {shown_uri(tracker.uri)}", markup=False)
    if not problem:
        at = "http://127.0.0.1:5000" if tracker.uri.startswith("sqlite:") else shown_uri(tracker.uri)
        for links in tracker.compare_links(view).values():
            for what, link in links.items():
                console.print(f"{what + ':':9}{at.rstrip('/')}/{link}", markup=False)
    return unfinished(stopped) if undone or view.damage else 0


def _what_next(again: str, undone: int, failed: int) -> str:
    """What becomes of trials that are not done, of which some failed for good, once a sweep is asked for `again`."""
    if not failed:
        return f"{again} goes on with them"
    which = "them" if failed == undone else f"the {failed} that failed"
    rest = "" if failed == undone else " and goes on with the others"
    return f"{again} tries {which} again{rest}; what failed fails the same way unless something is changed first"


def _print_plan(
    name: str,
    grid: Grid,
    trials: Sequence[Trial],
    recordings: Recordings | None,
    storage: Storage,
    console: Console,
    *,
    room: Room,
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
        fits = replace(room, limit_bytes=None, gpu_bytes=None) if state.startswith("done") else room
        need = need_of(trial, fits, tokens=size.tokens)
        placement = need.placement
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
                "asks for": "" if room.device == "cpu" or state.startswith("done") else str(need),
                "steps": steps,
                "state": state,
            }
        )
    empty = {heading for heading in ("at a time", "asks for") if not any(row[heading] for row in rows)}
    rows = [{heading: row[heading] for heading in row if heading not in empty} for row in rows]
    for heading in rows[0]:
        numeric = heading in ("parameters", "tokens", "memory", "steps")
        table.add_column(heading, no_wrap=True, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    limit_bytes = room.limit(1.0 if room.gpus is None else room.gpus)
    holder = "a worker" if room.device == "cpu" or room.gpus is not None else "one with a whole GPU"
    console.print(
        "memory: not checked, since what a worker has is not known here; --memory-gib says it"
        if limit_bytes is None
        else f"memory: the predicted peak of a step; {holder} may hold {gib(limit_bytes)} with the process itself"
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


def _check_determinism(options: argparse.Namespace) -> None:
    """ValueError where --deterministic would do nothing, or HELIX_SCAN asks for the opposite."""
    if options.device != "cuda":
        raise ValueError("--deterministic is about GPUs: on a CPU the bits are always the same; add --device cuda")
    if drifts(wanted_backend()):
        raise ValueError(
            f"--deterministic asks for the same bits again, and HELIX_SCAN={wanted_backend()} for a scan that does not "
            "give them; leave one of them out"
        )


def _check_ranks(options: argparse.Namespace, trials: Sequence[Trial]) -> None:
    """Refuse numbers of ranks that cannot share a batch, or whole GPUs."""
    smallest = min(trial.spec.training.batch_size for trial in trials)
    if _positive("--ranks", options.ranks) > smallest:
        raise ValueError(f"--ranks is {options.ranks}, but a batch has {smallest} clips; each rank needs one")
    if options.ranks > 1 and options.gpus_per_trial not in (None, 1):
        raise ValueError("--ranks gives a trial several whole GPUs, and --gpus-per-trial a share of one; leave one out")


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} is {value}; wanted 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
