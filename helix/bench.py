"""How a part of helix compares with what others wrote, timed and weighed in one run; prints figures and targets.

    helix bench scan
    helix bench step tokens=500 --repeats 9 --markdown
    python -m helix.bench scan --json

A bench is a frozen dataclass in a file under benches/, registered in BENCHES: its fields are its options, and `run`
returns an Outcome. Only ratios of figures from one run mean anything: machines differ, and so do their loads.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from helix.errors import first_line, in_one_line
from helix.registry import BENCHES

PARTS_FAILED = 1
REFUSED = 2

#: A contestant whose first run takes longer is not run again: that run is its figure.
PATIENCE_S = 20.0

#: What all runs of one contestant in one race may take together, beside the first.
BUDGET_S = 30.0

#: Columns of a table that goes to a file or a pipe.
PLAIN_WIDTH = 130

#: The versions that stand below the figures, where they are installed.
SHOWN = (
    *("torch", "numba", "mambapy", "transformers", "mamba-ssm", "causal-conv1d"),
    *("soundfile", "soxr", "torchaudio", "webdataset", "litdata"),
)


class NotRunError(Exception):
    """A contestant that was not asked to run; says why."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant in a table: a number for each column, None where there is none; `note` says why, or what of it."""

    name: str
    values: tuple[float | None, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Figures that belong side by side; `columns` name the quantity and its unit."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A promise about a figure: at least or at most so much. `found` is None where this run did not measure it."""

    name: str
    wanted: float
    found: float | None
    unit: str
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        return "met" if (self.found <= self.wanted if self.at_most else self.found >= self.wanted) else "missed"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a bench found, or a part of it. `failed`: what ended in an error that is no figure; a row says which."""

    tables: tuple[Table, ...]
    targets: tuple[Target, ...] = ()
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The same for all contestants. `say` is told what is measured next, since some of it takes minutes; `show` is
    given each part of the outcome as soon as it is there, by a bench that has several, in their order."""

    repeats: int = 7
    threads: int = 1
    patience_s: float = PATIENCE_S
    budget_s: float = BUDGET_S
    say: Callable[[str], None] = field(default=lambda _line: None)
    show: Callable[[Outcome], None] = field(default=lambda _part: None)


class Bench(Interface):
    """A member of BENCHES."""

    def run(self, how: Conditions) -> Outcome: ...


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Medians in seconds over `runs` runs: the CPU time of the whole process, and the time on the wall.

    Of work on a GPU (helix.gpu.clock) the first is the time that passed in its stream."""

    cpu_s: float
    wall_s: float
    runs: int


def race(
    contestants: Mapping[str, Callable[[], object]], how: Conditions, *, clocks: Callable[[], tuple[float, float]]
) -> dict[str, Timing | Exception]:
    """Time all contestants in turns, so that whatever the machine does meanwhile meets all of them.

    Each is run once to warm up; where that takes longer than `patience_s` it is the figure, else as many runs follow as
    `repeats` and `budget_s` allow. `clocks` reads (CPU seconds, wall seconds). One that raises has its error as result.
    """
    samples: dict[str, list[tuple[float, float]]] = {}
    left: dict[str, int] = {}
    failed: dict[str, Timing | Exception] = {}

    def take(name: str) -> None:
        try:
            samples[name].append(timed(contestants[name], clocks))
        except Exception as error:  # a peer may raise anything; that is its result
            failed[name], left[name] = without_frames(error), 0

    for name in contestants:
        how.say(name)
        samples[name], left[name] = [], 0
        take(name)
        if name not in failed and (first_s := samples[name][0][1]) <= how.patience_s:
            samples[name].clear()
            left[name] = runs_within(first_s, how)
    while any(left.values()):
        for name in [name for name, runs in left.items() if runs]:
            left[name] -= 1
            take(name)
    medians = {
        name: Timing(
            cpu_s=statistics.median(cpu_s for cpu_s, _ in taken),
            wall_s=statistics.median(wall_s for _, wall_s in taken),
            runs=len(taken),
        )
        for name, taken in samples.items()
        if name not in failed
    }
    return {name: failed.get(name) or medians[name] for name in contestants}


def runs_within(first_s: float, how: Conditions) -> int:
    """How often something is run that took so long the first time: at least once."""
    return max(1, min(how.repeats, int(how.budget_s / max(first_s, 1e-9))))


def without_frames(error: Exception) -> Exception:
    """The error without the frames that it went through, whose variables would hold the memory that it is about."""
    with contextlib.suppress(AttributeError):
        error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def timed(function: Callable[[], object], clocks: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one call."""
    gc.collect()
    cpu_s, wall_s = clocks()
    function()
    after_cpu_s, after_wall_s = clocks()
    return after_cpu_s - cpu_s, after_wall_s - wall_s


def process_clocks() -> tuple[float, float]:
    """The CPU seconds of all threads of this process, and the seconds on the wall."""
    return time.process_time(), time.perf_counter()


def timing_row(name: str, result: Timing | Exception, ours: Timing | Exception, *, each_s: float) -> Row:
    """CPU ms, wall ms, the ratio of its CPU time to that of `ours`, and what each element or token costs.

    `each_s`: seconds of the whole run that are one unit of the last column, so 1e-12 times the number of elements for
    picoseconds per element.
    """
    if isinstance(result, Exception):
        return Row(name=name, values=(None,) * 4, note=brief(result))
    ratio = result.cpu_s / ours.cpu_s if isinstance(ours, Timing) else None
    note = f"median of {result.runs}" if result.runs > 1 else "one run"
    return Row(name=name, values=(1e3 * result.cpu_s, 1e3 * result.wall_s, ratio, result.cpu_s / each_s), note=note)


#: The columns of `timing_row`, before that of what each costs.
TIMING_COLUMNS = ("CPU ms", "wall ms", "times ours")


def ratio_of(results: Mapping[str, Timing | Exception], slow: str, fast: str) -> float | None:
    """How many times the CPU time of `fast` it is that `slow` takes; None where one of them has none."""
    a, b = results.get(slow), results.get(fast)
    return a.cpu_s / b.cpu_s if isinstance(a, Timing) and isinstance(b, Timing) else None


def brief(error: Exception) -> str:
    """The first line of an error, for a note beside its row."""
    return f"not run: {first_line(error)}" if isinstance(error, NotRunError) else in_one_line(error)


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 1 where a part of the bench failed, 2 where it was refused."""
    parser = argparse.ArgumentParser(prog="helix bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help=f"known: {', '.join(BENCHES.names())}")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the bench, e.g. tokens=500,3000")
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the median counts (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the kernels (default: 1)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument("--markdown", action="store_true", help="print a section for BENCHMARKS.md")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    given: Any = parser.parse_intermixed_args(arguments)
    aside = Console(stderr=True, highlight=False)
    threads_before = torch.get_num_threads()
    command = shlex.join(["helix", "bench", *(part for part in arguments if part not in ("--json", "--markdown"))])
    facts = {"command": command, **machine(), "threads": str(given.threads)}
    began = time.perf_counter()
    paper = _Json() if given.json else _Markdown(facts) if given.markdown else _Plain()
    try:
        if given.repeats < 1 or given.threads < 1:
            raise ValueError(f"--repeats is {given.repeats} and --threads is {given.threads}; wanted 1 or more of each")
        bench: Bench = BENCHES.make(given.name, read_options(given.name, given.options))
        torch.set_num_threads(given.threads)
        how = Conditions(
            repeats=given.repeats,
            threads=given.threads,
            say=lambda line: aside.print(line, style="dim"),
            show=paper.show,
        )
        outcome = bench.run(how)
    except ValueError as error:
        aside.print(f"refused: {error}", markup=False)
        return REFUSED
    finally:
        torch.set_num_threads(threads_before)
    paper.end(outcome, {**facts, "took": f"{time.perf_counter() - began:.0f} s"})
    if outcome.failed:
        aside.print(f"failed: {', '.join(outcome.failed)}", markup=False)
    return PARTS_FAILED if outcome.failed else 0


def read_options(name: str, options: Sequence[str]) -> dict[str, Any]:
    """key=value, the values as YAML; a list may be written without its brackets. The registry checks the types."""
    read: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"{option!r} is not an option of bench {name!r}; wanted key=value, as in tokens=500,3000")
        default = getattr(BENCHES[name], key, None)
        read[key] = yaml.safe_load(f"[{value}]" if isinstance(default, tuple) and "[" not in value else value)
        if isinstance(default, tuple) and default:
            for item in read[key]:
                if type(item) is not type(default[0]):
                    raise ValueError(f"bench {name!r}: option {key} has {item!r}; wanted values such as {default[0]!r}")
    return read


def require_positive(bench: Any, *, zero: Sequence[str] = ()) -> None:
    """ValueError where a size of a bench is not 1 or more; those in `zero` may be 0, which leaves their part out."""
    for name, value in dataclasses.asdict(bench).items():
        for size in value if isinstance(value, tuple) else (value,):
            if type(size) is int and size < (0 if name in zero else 1):
                raise ValueError(f"{name} is {size}; wanted {'0' if name in zero else '1'} or more")


def machine() -> dict[str, str]:
    """What figures cannot be read without: the processor, its cores, the versions, the day."""
    versions = [f"Python {platform.python_version()}"]
    for name in SHOWN:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return {
        "processor": f"{processor()}, {os.cpu_count()} cores{load}",
        "versions": ", ".join(versions),
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def figure(value: float | None) -> str:
    """Three significant digits, as a person reads them."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-2:
        return f"{value:.1e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def as_json(outcome: Outcome, facts: Mapping[str, str]) -> str:
    targets = [{**dataclasses.asdict(target), "verdict": target.verdict} for target in outcome.targets]
    tables = [dataclasses.asdict(table) for table in outcome.tables]
    found = {"facts": dict(facts), "tables": tables, "targets": targets, "failed": list(outcome.failed)}
    return json.dumps(found, indent=2)


def as_markdown(outcome: Outcome, facts: Mapping[str, str]) -> str:
    """A section of BENCHMARKS.md below its heading."""
    return "\n".join([_markdown_head(facts), *_markdown_parts(outcome)])


def _markdown_head(facts: Mapping[str, str]) -> str:
    said = "".join(f"- {name}: {value}\n" for name, value in facts.items() if name != "command")
    return f"    {facts['command']}\n\n{said}"


def _markdown_parts(outcome: Outcome) -> list[str]:
    parts = []
    for table in outcome.tables:
        rows = [(row.name, *map(figure, row.values), row.note) for row in table.rows]
        parts.append(f"**{table.title}**\n\n{_pipes(('', *table.columns, ''), rows)}")
    if outcome.targets:
        parts.append(f"**Targets**\n\n{_pipes(TARGET_COLUMNS, _target_cells(outcome))}")
    return parts


# What is printed, and when


class _Plain:
    """Tables and targets for a person: of each part once it is there, then the rest and the facts."""

    def __init__(self):
        self.console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
        self.shown: list[Table | Target] = []

    def show(self, part: Outcome) -> None:
        self.print(part)
        self.shown += (*part.tables, *part.targets)
        sys.stdout.flush()

    def print(self, part: Outcome) -> None:
        for table in part.tables:
            rows = [(row.name, *map(figure, row.values), row.note) for row in table.rows]
            self.console.print(table.title, style="bold", markup=False)
            self.console.print(_rich(("", *table.columns, ""), rows), "")
        if part.targets:
            self.console.print("Targets", style="bold")
            self.console.print(_rich(TARGET_COLUMNS, _target_cells(part)), "")

    def rest_of(self, outcome: Outcome) -> Outcome:
        """What was not shown as a part."""
        seen = {id(figures) for figures in self.shown}
        return dataclasses.replace(
            outcome,
            tables=tuple(table for table in outcome.tables if id(table) not in seen),
            targets=tuple(target for target in outcome.targets if id(target) not in seen),
        )

    def end(self, outcome: Outcome, facts: Mapping[str, str]) -> None:
        self.print(self.rest_of(outcome))
        for name, value in facts.items():
            self.console.print(f"{name}: {value}", markup=False)


class _Markdown(_Plain):
    """A section of BENCHMARKS.md; where it came in parts, how long it took is its last line."""

    def __init__(self, facts: Mapping[str, str]):
        super().__init__()
        self.facts = facts

    def print(self, part: Outcome) -> None:
        if not self.shown:
            sys.stdout.write(_markdown_head(self.facts))
        sys.stdout.write("".join(f"\n{written}" for written in _markdown_parts(part)))

    def end(self, outcome: Outcome, facts: Mapping[str, str]) -> None:
        if not self.shown:
            self.facts = facts
        self.print(self.rest_of(outcome))
        if self.shown:
            sys.stdout.write(f"\n- took: {facts['took']}\n")


class _Json:
    """One value, so all of it at the end."""

    def show(self, part: Outcome) -> None: ...

    def end(self, outcome: Outcome, facts: Mapping[str, str]) -> None:
        sys.stdout.write(as_json(outcome, facts) + "\n")


TARGET_COLUMNS = ("target", "wanted", "found", "")


def _target_cells(outcome: Outcome) -> list[tuple[str, ...]]:
    return [
        (
            target.name,
            f"{'at most' if target.at_most else 'at least'} {figure(target.wanted)} {target.unit}",
            figure(target.found) if target.found is None else f"{figure(target.found)} {target.unit}",
            target.verdict,
        )
        for target in outcome.targets
    ]


def _pipes(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *(["---:"] * (len(head) - 2)), "---"], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _rich(head: Sequence[str], rows: Sequence[Sequence[str]]) -> RichTable:
    made = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(head):
        made.add_column(column, justify="right" if 0 < index < len(head) - 1 else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell.replace("[", r"\[") for cell in row))
    return made


if __name__ == "__main__":
    sys.exit(main())
