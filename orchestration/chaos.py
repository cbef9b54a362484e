"""`make chaos`: every fault is caused for real, and a table says what each one cost and how it ended.

    python -m orchestration.chaos --kills 100             every fault, at least a hundred processes killed
    python -m orchestration.chaos --short --where plain   the form that runs as a test
    python -m orchestration.chaos --fault "SIGTERM of a node"

Exit code: 0 every trial ended as its undisturbed twin and lost no more than it may, 1 one did not, 2 refused.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import get_args

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from helix.data.shards import open_prepared, prepare
from helix.storage import Storage, open_storage
from orchestration.fault import FAULTS, OUTAGE_S, Row, Site, Where
from orchestration.grid import expand, load_grid
from orchestration.machines import MachineError
from orchestration.twin import TwinError, Twins

GRID = "demo"

#: Trials of the demo grid that are over in seconds and still have several epochs, on data that is made on the fly.
OVERRIDES = ("data.options.clips_per_class=24", "training.epochs=4", "training.batch_size=8")
SHORT = ("data.options.clips_per_class=16", "training.epochs=3", "training.batch_size=8")
SHORT_VARIANTS = ("mamba-raw", "helix-mel")

#: Trials that last longer than Ray takes to start a worker again, with epochs long enough for a fault to hit one.
ON_RAY = ("data.options.clips_per_class=140", "training.epochs=4", "training.batch_size=2")
SHORT_ON_RAY = ("data.options.clips_per_class=80", "training.epochs=8", "training.batch_size=2")
RAY_VARIANTS = ("mamba-mel", "helix-mel")
SHORT_KILLS = 8
SHORT_OUTAGE_S = 10.0

HEADINGS = ("fault", "trial", "times", "steps lost", "seconds to the next step", "verdict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m orchestration.chaos", description="Cause every fault.")
    parser.add_argument("--kills", type=int, default=100, help="how many processes to kill (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="what draws the moments (default: 0)")
    parser.add_argument("--where", choices=get_args(Where), help="only faults of the plain loop, or of a sweep on Ray")
    parser.add_argument("--fault", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument(
        "--short",
        action="store_true",
        help=f"{SHORT_KILLS} kills, less of all",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--storage", help="an empty folder to work in (default: one that is removed afterwards)")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.fault if name not in FAULTS.names()]:
        parser.error(f"unknown fault {unknown[0]!r}; known: {', '.join(map(repr, FAULTS.names()))}")
    console = Console(stderr=given.markdown, highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="helix-chaos-") as folder:
        storage = open_storage(given.storage or folder)
        if storage.children("undisturbed") or storage.children("faults"):
            console.print(f"refused: {storage!r} has trials of an earlier run; give an empty place", markup=False)
            return 2
        rows = cause(
            storage,
            where=given.where,
            kills=SHORT_KILLS if given.short else given.kills,
            seed=given.seed,
            short=given.short,
            console=console,
            only=given.fault,
        )
    if given.markdown:
        sys.stdout.write(markdown(rows))
    else:
        console.print(table(rows))
    return 0 if all(row.passed is not False for row in rows) else 1


def cause(
    storage: Storage,
    *,
    where: Where | None,
    kills: int,
    seed: int,
    short: bool,
    console: Console,
    only: Sequence[str] = (),
) -> list[Row]:
    """Every fault of the chosen kind, or `only` the named ones, one by one; its rows are printed as they come."""
    rows: list[Row] = []
    with Twins() as twins:
        for place in get_args(Where) if where is None else (where,):
            site = prepared_site(storage, place, kills=kills, seed=seed, short=short, twins=twins, console=console)
            for name in FAULTS.names():
                if FAULTS[name].where != place or (only and name not in only):
                    continue
                console.print(name, style="bold", markup=False)
                for row in _rows_of(name, site):
                    rows.append(row)
                    console.print(f"  {row.trial}: {row.verdict}", markup=False)
    return rows


def _rows_of(name: str, site: Site) -> Iterator[Row]:
    """The rows of one fault; where it could not be carried out to its end, a row that says so and has not passed."""
    try:
        yield from FAULTS[name].cause(site)
    except (MachineError, TwinError, RuntimeError, OSError) as error:
        yield Row(fault=name, trial="-", verdict=f"not carried out to its end: {error}", passed=False)


def prepared_site(
    storage: Storage, where: Where, *, kills: int, seed: int, short: bool, twins: Twins, console: Console
) -> Site:
    """The trials that faults of this kind are done to, with their data."""
    whole, shorter = (ON_RAY, SHORT_ON_RAY) if where == "ray" else (OVERRIDES, SHORT)
    overrides = shorter if short else whole
    variants = RAY_VARIANTS if where == "ray" else SHORT_VARIANTS if short else None
    trials = expand(load_grid(GRID), overrides=overrides, folds=[1], variants=variants)
    data = trials[0].spec.data
    recordings = open_prepared(storage, prepare(data.dataset, data.options, source=None, storage=storage).prefix)
    return Site(
        grid=GRID,
        trials=tuple(trials),
        recordings=recordings,
        storage=storage,
        kills=kills,
        seed=seed,
        twins=twins,
        say=lambda line: console.print(f"  {line}", markup=False),
        overrides=overrides,
        outage_s=SHORT_OUTAGE_S if short else OUTAGE_S,
    )


def table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal."""
    made = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for heading in HEADINGS:
        made.add_column(heading, justify="left" if heading in ("fault", "trial", "verdict") else "right")
    for row in rows:
        made.add_row(*map(Text, _cells(row)), style="red" if row.passed is False else None)
    return made


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table of BENCHMARKS.md."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *map(_cells, rows)]
    # A row is one line, also where its verdict quotes what a program said.
    return "".join(f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in line)} |\n" for line in lines)


def _cells(row: Row) -> list[str]:
    seconds, steps = row.seconds_to_next_step, row.steps_lost
    return [
        row.fault,
        row.trial,
        str(row.count),
        "-" if steps is None else str(steps),
        "-" if seconds is None else f"{seconds:.1f}",
        row.verdict,
    ]


if __name__ == "__main__":
    sys.exit(main())
