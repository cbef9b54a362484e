"""The console script `helix`: everything under one name."""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dashboards.evidence import published_evidence
from dashboards.paper import write_published
from dashboards.terminal import claims_table, statistics_table, summary_table
from dashboards.verdicts import evidence_tables, ledger, tallied
from helix import bench, doctor
from helix.data.dataset import Dataset, DatasetError
from helix.data.download import DownloadError, fetch_all
from helix.data.shards import CorruptShardError
from helix.models.scan import forced, wanted_backend
from helix.protocol import PROFILES
from helix.published import GPU_BYTES
from helix.registry import DATASETS
from helix.spec import PRECISIONS, TrialSpec, apply_overrides, identity
from helix.storage import Storage, open_storage
from helix.training import feasibility as feasible
from helix.training.feasibility import TOKENS, Cell, table
from helix.training.memory import GIB, gib
from orchestration import status, sweep
from orchestration.asked import asked_grids, read_asked, stored_view
from orchestration.certify import BIT_EXACT, certificate_table, certify, check_wanted
from orchestration.connection import ClusterError, cpu_count, rehearse
from orchestration.forecast import Forecast, calibrate, forecasts, measured, shape
from orchestration.from_mlflow import view_from_mlflow
from orchestration.grid import BACKBONES, GRIDS, PRESETS, expand, load_grid
from orchestration.ledger import CERTIFICATES, begun_trials
from orchestration.money import MARKETS, machine_facts, read_prices
from orchestration.options import add_data_arguments, chosen_storage, names, numbers, report_parser, sweep_parser
from orchestration.plan import check_trials, make_plan, with_memory
from orchestration.preprocessing import clip_facts, described, prepare_with_ray, prepared_data, refuse_needless, summary
from orchestration.progress import ProgressDisplay
from orchestration.restart import restart
from orchestration.tracking_place import check_tracking_uri, tracking_uri
from orchestration.twin import TwinError, Twins
from orchestration.verification import verify_storage


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit codes are those of orchestration/sweep.py."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="helix", description="Which audio model is better, and is the difference real?"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (about, _) in COMMANDS.items():
        commands.add_parser(name, help=about, add_help=False)
    chosen = parser.parse_known_args(arguments[:1])[0].command
    return COMMANDS[chosen][1](arguments[1:])


def prepare(arguments: Sequence[str]) -> int:
    """`helix prepare esc50 --source DIR`."""
    parser = argparse.ArgumentParser(
        prog="helix prepare",
        description="Decode a data set into shards. Killed and run again it goes on; done, it verifies and repairs.",
    )
    parser.add_argument("dataset", help=f"known: {', '.join(DATASETS.names())}")
    parser.add_argument(
        "options", nargs="*", metavar="key=value", help="options of the data set, e.g. clips_per_class=20"
    )
    add_data_arguments(parser)
    parser.add_argument("--shard-mib", type=float, default=64, metavar="MIB", help="size of a shard (default: 64)")
    parser.add_argument("--workers", type=int, metavar="N", help="tasks at once (default: what the machines hold)")
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch the official files into --source (default: ./downloads), verify and unpack them, and prepare those",
    )
    given = parser.parse_intermixed_args(arguments)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False)
    try:
        base = apply_overrides(TrialSpec(), {"data.dataset": given.dataset})
        data = apply_overrides(base, [f"data.options.{option}" for option in given.options]).data
        dataset: Dataset = DATASETS.make(data.dataset, data.options)
        storage, storage_named = chosen_storage(given)
        storage.check_writable()
        with ProgressDisplay(console) as progress:
            source = given.source
            if given.download:
                source = download(data.dataset, dataset, source or Path("downloads"), console, progress)
            refuse_needless(source, dataset, data.dataset)
            prepared = prepare_with_ray(
                data,
                source=source,
                storage=storage,
                storage_named=storage_named,
                allow_partial=given.allow_partial,
                quarantine=given.quarantine,
                shard_mib=given.shard_mib,
                workers=given.workers,
                watch=progress.watch,
            )
        facts = clip_facts(storage, data, prepared)
    except DatasetError as error:  # all of it: who mends a source wants to see every file at once
        print("\n  ".join([f"refused: {error.subject}", *error.problems]), file=sys.stderr)  # noqa: T201
        return sweep.REFUSED
    except (ValueError, OSError, ClusterError, CorruptShardError, DownloadError) as error:
        return sweep.refuse(error)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where this one stopped")
        return sweep.INTERRUPTED
    console.print(f"prepared: {summary(prepared)}")
    for line in described(storage, prepared):
        console.print(f"  {line}")
    console.print(f"clips of {data.dataset} under the profile paper (what a sweep hears):")
    for line in facts:
        console.print(f"  {line}")
    return 0


def download(name: str, dataset: Dataset, folder: Path, console: Console, progress: ProgressDisplay) -> Path:
    """Fetch the official files of a data set into `folder`; the source that they make. The licence is shown first."""
    downloads = dataset.downloads
    if not downloads:
        raise ValueError(
            f"{name} cannot be downloaded by this command; get it at {dataset.url} and name its folder with --source"
        )
    console.print(f"{name}: {dataset.licence} ({dataset.url})")
    for item in downloads:
        console.print(f"  {item.url}")
    return fetch_all(name, downloads, folder.resolve(), on_bytes=progress.on_bytes)


def verify(arguments: Sequence[str]) -> int:
    """`helix verify`: exit code 0 where everything is as it was written, 1 where something is damaged."""
    parser = argparse.ArgumentParser(
        prog="helix verify", description="Read back everything that is stored and list what is damaged."
    )
    parser.add_argument("dataset", nargs="?", help="only this data set (default: all data, trials and checkpoints)")
    parser.add_argument("--storage", help="where everything is kept (default: HELIX_STORAGE, or ./runs)")
    given = parser.parse_args(arguments)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False)
    try:
        if given.dataset is not None and given.dataset not in DATASETS.names():
            raise ValueError(f"unknown data set {given.dataset!r}; known: {', '.join(DATASETS.names())}")
        storage, _ = chosen_storage(given)
        found = verify_storage(storage, given.dataset)
    except (ValueError, OSError) as error:
        return sweep.refuse(error)
    for line in found.sound:
        console.print(f"whole    {line}")
    for line in found.unfinished:
        console.print(f"open     {line}")
    for line in found.damaged:
        console.print(f"damaged  {line}")
    if not found.sound and not found.unfinished and not found.damaged:
        console.print(f"nothing is stored in {storage!r}")
    if found.damaged:
        console.print(
            "what to do: helix prepare DATASET --source DIR mends data; a sweep passes over a damaged checkpoint and "
            "takes an older one; a trial whose spec or result is damaged has to be deleted and run again"
        )
    return 1 if found.damaged else 0


def feasibility(arguments: Sequence[str]) -> int:
    """`helix feasibility --measure --tokens 500,3000`."""
    parser = argparse.ArgumentParser(
        prog="helix feasibility",
        description="The paper's Table 1: the memory of one training step, predicted from shapes; ours (sdpa) and as "
        "the authors' code asks for attention (weights), keeping what every block computed and recomputing it.",
    )
    parser.add_argument("--tokens", type=numbers, default=list(TOKENS), metavar="500,3000", help="these lengths")
    parser.add_argument("--backbones", type=names, default=list(BACKBONES), metavar="NAME,...")
    parser.add_argument("--batch", type=int, default=1, help="clips in a batch (default: 1)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument(
        "--memory-gib",
        type=float,
        default=GPU_BYTES / GIB,
        help="what has to fit (default: the paper's 48 GB GPU)",
    )
    parser.add_argument("--measure", action="store_true", help="take real steps on this machine's CPU as well")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    given = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else sweep.PLAIN_WIDTH)
    try:
        if not 0 < given.memory_gib < math.inf:
            raise ValueError(f"--memory-gib is {given.memory_gib}; wanted a positive number")
        if given.json and not given.json.parent.is_dir():
            raise ValueError(f"--json names {given.json}, and there is no folder {given.json.parent}; make it first")
        limit_bytes = int(given.memory_gib * GIB)
        if unknown := set(given.backbones) - set(BACKBONES):
            raise ValueError(f"unknown backbone {sorted(unknown)[0]!r}; known: {', '.join(BACKBONES)}")
        patterns = {name: BACKBONES[name] for name in given.backbones}
        cells = table(patterns, tokens=given.tokens, batch=given.batch, precision=given.precision)
        if given.measure:
            cells = [_say(feasible.measured(cell), console) for cell in cells]
        if given.json:
            figures = {"limit_bytes": limit_bytes, "cells": [cell.as_json(limit_bytes) for cell in cells]}
            given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        return sweep.refuse(error)
    console.print(_feasibility_table(cells, limit_bytes))
    console.print(
        "predicted, measured: the peak of one training step on a CPU, without the process itself; on GPU: predicted "
        "for one. fits: also with the process and the error bound; tight: without them only. The paper's verdicts are "
        "of its authors' code on a GPU."
    )
    return 0


def _say(cell: Cell, console: Console) -> Cell:
    """Tell of a cell as soon as it is measured, since the next may take long."""
    name = f"{cell.tokens:,} tokens, {cell.backbone}, {cell.attn_impl}{', recomputing' if cell.recompute else ''}"
    found = f"not measured: {cell.why_not}"
    if cell.measured is not None:
        found = f"{gib(cell.measured.peak_bytes)}, {cell.measured.step_seconds:.2f} s a step"
    console.print(f"{name}: {found}", markup=False)
    return cell


def _feasibility_table(cells: Sequence[Cell], limit_bytes: int) -> Table:
    title = f"One training step of {cells[0].spec.training.batch_size} clip(s), against {gib(limit_bytes)}"
    shown = Table(title=title, title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    for heading in (
        "tokens",
        "backbone",
        "attention",
        "blocks",
        "on GPU",
        "verdict",
        "predicted",
        "measured",
        "step s",
        "paper",
    ):
        numeric = heading in ("tokens", "on GPU", "predicted", "measured", "step s")
        shown.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for cell in cells:
        peak, seconds = (
            ("", "") if cell.measured is None else (gib(cell.measured.peak_bytes), f"{cell.measured.step_seconds:.2f}")
        )
        shown.add_row(
            f"{cell.tokens:,}",
            cell.backbone,
            cell.attn_impl if "attention" in cell.spec.model.pattern else "-",
            "recomputed" if cell.recompute else "kept",
            gib(cell.on_gpu.peak_bytes),
            cell.verdict(limit_bytes),
            gib(cell.predicted.peak_bytes),
            peak,
            seconds,
            # What the paper found, it found with what the authors' code does.
            cell.paper if cell.is_papers else "",
        )
    return shown


def report(arguments: Sequence[str]) -> int:
    """`helix report --grid esc50`, the same `--from-mlflow`, or `--published` of the paper's own numbers."""
    if "--from-mlflow" in arguments:
        return report_from_mlflow(arguments)
    if "--published" not in arguments:
        if {"-h", "--help"} & set(arguments):
            forms = (report_parser(), from_mlflow_parser(), published_parser())
            print("\n".join(form.format_help() for form in forms), end="")  # noqa: T201
            return 0
        return report_stored(arguments)
    given = published_parser().parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else sweep.PLAIN_WIDTH)
    try:
        storage, _ = chosen_storage(given)
        storage.check_writable()
        page, *tables = sweep.put_reports(storage, write_published)
        evidence = published_evidence()
    except (ValueError, OSError) as error:
        return sweep.refuse(error)
    entries = ledger(evidence)
    console.print(claims_table(entries))
    for one in evidence_tables(evidence, entries):
        if one.name.startswith("statistics-"):
            console.print(statistics_table(one))
    console.print(tallied(entries))
    console.print(f"page:    {page}", markup=False)
    console.print(f"tables:  {len(tables)} files in {page.with_suffix('')}", markup=False)
    return 0


def published_parser() -> argparse.ArgumentParser:
    """The options of `helix report --published`."""
    parser = argparse.ArgumentParser(
        prog="helix report --published",
        description="The paper's claims and comparisons, judged by the numbers that are published: a page and tables.",
    )
    parser.add_argument("--published", action="store_true", required=True, help="of the paper's own numbers")
    parser.add_argument(
        "--storage", help="where reports/published.html and its tables go (default: HELIX_STORAGE, or ./runs)"
    )
    return parser


def from_mlflow_parser() -> argparse.ArgumentParser:
    """The options of `helix report --from-mlflow`."""
    parser = argparse.ArgumentParser(
        prog="helix report --from-mlflow",
        description="The report of what was asked of a grid last, from MLflow alone: the storage is not read.",
    )
    parser.add_argument("--from-mlflow", action="store_true", required=True, help="read MLflow and nothing else")
    parser.add_argument("--grid", required=True, help="the grid whose report is wanted")
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="where MLflow is (default: MLFLOW_TRACKING_URI, or the SQLite file in HELIX_STORAGE or ./runs); "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD sign in",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: reports/GRID.html, in this folder)"
    )
    return parser


def report_stored(arguments: Sequence[str]) -> int:
    """`helix report --grid esc50`: of what was asked last, or of what the options ask; nothing is trained."""
    given = report_parser().parse_intermixed_args(arguments)
    chosen = (given.overrides, given.profile, given.preset, given.folds, given.seeds, given.variants)
    try:
        storage, _ = chosen_storage(given)
        asked = None if any(chosen) else read_asked(storage, given.grid)
        if asked is None:
            _check_stored(storage, given.grid, whole=not any(chosen))
            return sweep.main(arguments, train_missing=False)
        check_tracking_uri(storage)
        storage.check_writable()
        prices = read_prices(given.prices) if given.prices else None
    except (ValueError, OSError) as error:
        return sweep.refuse(error)
    return sweep.finish(
        storage,
        lambda: stored_view(storage, asked, now=time.time(), prices=prices),
        sweep.console(),
        trained=False,
    )


def _check_stored(storage: Storage, grid: str, *, whole: bool) -> None:
    """ValueError where there is nothing to report on, and a report would only make a new storage.

    `whole`: no options ask for trials, which another grid may have trained.
    """
    load_grid(grid)
    known = asked_grids(storage)
    anything = known or begun_trials(storage) or storage.children(CERTIFICATES)
    if not anything or (whole and known):
        raise ValueError(status.unknown(storage, grid, known))


def report_from_mlflow(arguments: Sequence[str]) -> int:
    """`helix report --grid demo --from-mlflow`; 0 every trial is done, 1 some are not, 2 MLflow does not tell."""
    given = from_mlflow_parser().parse_args(arguments)
    out = sweep.console()
    page = given.out or Path("reports", f"{given.grid}.html")
    try:
        if page.suffix != ".html":
            raise ValueError(f"--out is {page}; wanted a name that ends in .html, for its tables go beside it")
        uri = given.tracking_uri or tracking_uri(open_storage(os.environ.get("HELIX_STORAGE") or "runs"))
        view = with_memory(view_from_mlflow(uri, given.grid, now=time.time()))
        _, *tables = sweep.write_page(view, page)
    except (ValueError, OSError) as error:
        return sweep.refuse(error)
    out.print(summary_table(view))
    for gap in view.gaps:
        out.print(gap, markup=False)
    out.print(f"report:  {shlex.join([sys.executable, '-m', 'webbrowser', page.absolute().as_uri()])}", markup=False)
    out.print(f"tables:  {len(tables)} files in {page.with_suffix('')}", markup=False)
    done = all(trial.state.status == "done" for _, trial in view.trials())
    return 0 if done else sweep.SOME_FAILED


def certify_grid(arguments: Sequence[str]) -> int:
    """`helix certify --grid demo --kills 12 --seed 0`. Returns 0 where the twin ended bit-exact, 1 where not."""
    parser = argparse.ArgumentParser(
        prog="helix certify",
        description="Train one trial of a grid undisturbed and a twin that is killed again and again, and compare.",
    )
    parser.add_argument("--grid", required=True, help=f"known: {', '.join(GRIDS.names())}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for a sweep, e.g. training.epochs=4")
    parser.add_argument("--kills", type=int, default=12, help="how often the twin is killed (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="what draws the moments of the kills (default: 0)")
    parser.add_argument("--variant", help="which variant of the grid (default: its first)")
    parser.add_argument("--fold", type=int, help="which fold (default: the grid's first)")
    parser.add_argument("--profile", default="paper", help=f"known: {', '.join(PROFILES)}")
    parser.add_argument("--preset", help=f"model size, in place of the grid's: {', '.join(PRESETS)}")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to train on (default: cpu)")
    parser.add_argument(
        "--scan",
        default="auto",
        metavar="NAME",
        help="the scan of both runs (default: HELIX_SCAN, else the fastest, on cuda of those that give the same bits "
        "again); mamba_ssm shows its drift",
    )
    add_data_arguments(parser)
    given = parser.parse_intermixed_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        with forced(wanted_backend(given.scan)):
            check_wanted(kills=given.kills, device=given.device, threads=given.threads)
        trial = expand(
            load_grid(given.grid),
            profile_name=given.profile,
            overrides=given.overrides,
            preset=given.preset,
            folds=None if given.fold is None else [given.fold],
            variants=None if given.variant is None else [given.variant],
        )[0]
        check_trials([trial])
        storage, storage_named = chosen_storage(given)
        storage.check_writable()
        recordings = prepared_data(
            trial.spec.data,
            source=given.source,
            storage=storage,
            storage_named=storage_named,
            allow_partial=given.allow_partial,
            say=console.print,
        )
        make_plan([trial], recordings)
        with forced(wanted_backend(given.scan)), Twins() as twins:
            certificate = certify(
                trial,
                recordings,
                storage,
                grid=given.grid,
                kills=given.kills,
                seed=given.seed,
                twins=twins,
                device=given.device,
                threads=given.threads,
                say=lambda line: console.print(line, markup=False),
            )
    except (ValueError, OSError, RuntimeError, TwinError, ClusterError, CorruptShardError) as error:
        return sweep.refuse(error)
    except KeyboardInterrupt:
        return sweep.INTERRUPTED
    console.print(certificate_table(certificate))
    place = f"{CERTIFICATES}/{certificate['certificate_id']}"
    console.print(f"certificate: {place}.json in {storage!r}", markup=False)
    if certificate["verdict"] == BIT_EXACT:
        return 0
    console.print(f"what the two runs left is in {place}/", markup=False)
    return sweep.SOME_FAILED


def restart_trial(arguments: Sequence[str]) -> int:
    """`helix restart TRIAL_ID`."""
    parser = argparse.ArgumentParser(
        prog="helix restart",
        description="Move the checkpoints and rows of a trial aside, so that the next sweep trains it from step 0.",
    )
    parser.add_argument("trial_id", help="as the report and `trials/` in the storage name it")
    parser.add_argument("--storage", help="the folder that holds the trial (default: HELIX_STORAGE, or ./runs)")
    given = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        storage, _ = chosen_storage(given)
        restart(storage, given.trial_id, say=lambda line: console.print(line, markup=False))
    except (ValueError, OSError) as error:
        return sweep.refuse(error)
    return 0


def plan_grid(arguments: Sequence[str]) -> int:
    """`helix plan --grid esc50 [the options of a sweep] [--calibrate]`."""
    parser = sweep_parser("helix plan")
    parser.description = "How long a grid will take and what it will cost, from steps that were measured."
    parser.add_argument("--calibrate", action="store_true", help="time a few steps of each variant on this machine")
    given = parser.parse_intermixed_args(arguments)
    console = sweep.console()
    try:
        if given.calibrate and given.ranks > 1:
            raise ValueError("--calibrate times steps of one process; leave out --ranks, or measure by a sweep with it")
        planned = sweep.plan_sweep(given, command=["helix", "plan", *arguments], console=console)
        if planned is None:  # a dry run, which is printed
            return 0
        now, states, entries = time.time(), planned.snapshot.states(), planned.plan
        shapes = {shape(identity(entry.trial.spec, "")["spec"]) for entry in entries}
        found = measured(planned.storage, shapes, now=now)
        if given.calibrate:
            has = {"CPU": cpu_count(), "GPU": torch.cuda.device_count()}
            here = {
                **machine_facts(held=planned.resources(planned.room.gpus or 1.0), resources=has),
                "device": given.device,
                "threads": given.threads,
            }
            torch.set_num_threads(given.threads)
            sizes = {entry.trial.label: planned.placement(entry) for entry in entries}
            found |= calibrate(
                entries,
                planned.recordings,
                here,
                placement=lambda trial: sizes[trial.label],
                say=lambda line: console.print(line, markup=False),
            )
        made = forecasts(entries, states, found, planned.snapshot.prices)
    except (ValueError, OSError, ClusterError, CorruptShardError) as error:
        return sweep.refuse(error)
    if not made:
        console.print("no step of these shapes was ever measured; --calibrate times some on this machine")
        return 0
    console.print(_forecast_table(given.grid, made))
    console.print(
        "hours: of work, by the median step of finished epochs (calibrated: training steps alone, without evaluation). "
        "cost: of what is left, on machines that are never idle; n of m: trials whose shape was measured there."
    )
    return 0


def _forecast_table(grid: str, made: Sequence[Forecast]) -> Table:
    shown = Table(title=f"{grid}: {made[0].asked} trials", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    shown.add_column("measured on", no_wrap=True)
    for heading in ("trials", "hours", "left", "hours left", *(f"{market} $" for market in MARKETS)):
        shown.add_column(heading, justify="right", no_wrap=True)
    for one in made:
        more = "at least " if one.measured < one.asked else ""
        shown.add_row(
            str(one.machine),
            f"{one.measured} of {one.asked}",
            f"{more}{one.hours:.2f}",
            f"{one.left_measured} of {one.left_asked}",
            f"{more}{one.left_hours:.2f}",
            *(f"{one.usd[market]:,.2f}" if market in one.usd else "no price" for market in MARKETS),
        )
    return shown


def diagnose(arguments: Sequence[str]) -> int:
    """`helix doctor`, which leaves it to this package to start a Ray."""
    return doctor.main(arguments, rehearse_ray=rehearse)


#: What `helix` can do: what it says of each, and the function that takes the rest of the line.
COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "sweep": ("train what a grid lacks, track it, and compare (the same as orchestration/sweep.py)", sweep.main),
    "report": (
        "write the report of a grid from what is stored now, without training; --from-mlflow: from MLflow alone; "
        "--published: of the paper's own numbers",
        report,
    ),
    "status": ("how sweeps stand now, from anywhere, from what is stored alone", status.main),
    "prepare": ("decode a data set into shards", prepare),
    "verify": ("read back everything that is stored and list what is damaged", verify),
    "doctor": ("what works on this machine, found by trying it, and what to do about the rest", diagnose),
    "bench": ("time and weigh a part beside implementations by others", bench.main),
    "feasibility": ("the paper's Table 1: which backbone trains on how many tokens, in how much memory", feasibility),
    "certify": ("kill a trial again and again, and show what that changes in it", certify_grid),
    "plan": ("how long a grid will take and what it will cost, from steps that were measured", plan_grid),
    "restart": ("give up the checkpoints of a trial, so that it is trained from step 0", restart_trial),
}


if __name__ == "__main__":
    sys.exit(main())
