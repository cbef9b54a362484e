"""The frame of the benches: medians of runs in turns, ratios, targets, strict options, and honest gaps."""

import itertools
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from helix import bench
from helix.bench import (
    TIMING_COLUMNS,
    Conditions,
    Outcome,
    Row,
    Table,
    Target,
    Timing,
    as_markdown,
    figure,
    main,
    race,
    ratio_of,
    read_options,
    runs_within,
    timing_row,
)
from helix.registry import BENCHES, Registry

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured on Linux only")


class Clock:
    """Time that only passes where a test says so: work that costs a second of CPU takes two on the wall."""

    def __init__(self):
        self.cpu_s = 0.0

    def __call__(self) -> tuple[float, float]:
        return self.cpu_s, 2 * self.cpu_s

    def work(self, *seconds: float, log: list[str] | None = None, name: str = "") -> Callable[[], None]:
        """Something that costs so many CPU seconds at its first, second, ... call."""
        costs = iter(seconds)

        def run() -> None:
            self.cpu_s += next(costs)
            if log is not None:
                log.append(name)

        return run


def test_a_race_gives_medians_without_the_warm_up_in_turns():
    clock, log = Clock(), []
    contestants = {
        "a": clock.work(9, 3, 1, 2, log=log, name="a"),
        "b": clock.work(9, 5, 5, 8, log=log, name="b"),
    }
    found = race(contestants, Conditions(repeats=3, budget_s=1000), clocks=clock)
    assert found == {"a": Timing(cpu_s=2, wall_s=4, runs=3), "b": Timing(cpu_s=5, wall_s=10, runs=3)}
    assert log == ["a", "b"] * 4


def test_what_is_too_slow_to_wait_for_runs_once_and_what_is_slow_runs_less_often():
    clock = Clock()
    contestants = {
        "slow": clock.work(50),
        "middling": clock.work(5, *[4] * 9),
        "fast": clock.work(*[1] * 9),
    }
    found = race(contestants, Conditions(repeats=5, patience_s=90, budget_s=30), clocks=clock)
    assert [timing.runs for timing in found.values() if isinstance(timing, Timing)] == [1, 3, 5]
    assert found["slow"] == Timing(cpu_s=50, wall_s=100, runs=1)


def test_one_that_raises_has_its_error_as_result_and_stops_no_other():
    clock = Clock()

    def raises() -> None:
        raise RuntimeError("no memory\nat all")

    found = race({"a": raises, "b": clock.work(*[1] * 3)}, Conditions(repeats=2), clocks=clock)
    row = timing_row("a", found["a"], found["b"], each_s=1)
    assert row == Row(name="a", values=(None,) * 4, note="RuntimeError: no memory")
    assert isinstance(found["b"], Timing)


class Memory:
    """Something that is held."""


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_error_does_not_hold_the_memory_that_others_need(fails_at: int):
    clock, held = Clock(), []
    calls = itertools.count(1)

    def fails() -> None:
        memory = Memory()
        held.append(weakref.ref(memory))
        try:
            if next(calls) >= fails_at:
                raise ValueError("too much")
        except ValueError as error:
            raise MemoryError from error

    def needs_it() -> None:
        assert all(ref() is None for ref in held)
        clock.cpu_s += 1

    found = race({"fails": fails, "needs it": needs_it}, Conditions(repeats=3), clocks=clock)
    assert isinstance(found["fails"], MemoryError) and isinstance(found["needs it"], Timing)


def test_one_that_raises_only_later_has_no_figure_either():
    clock = Clock()
    found = race({"a": clock.work(1, 1)}, Conditions(repeats=5), clocks=clock)
    assert isinstance(found["a"], StopIteration)


@pytest.mark.parametrize(("first_s", "runs"), [(0.0, 7), (1.0, 7), (5.0, 6), (29.0, 1), (100.0, 1)])
def test_the_budget_bounds_the_runs(first_s: float, runs: int):
    assert runs_within(first_s, Conditions(repeats=7, budget_s=30)) == runs


def test_a_row_has_the_ratio_and_the_time_per_element():
    ours, theirs = Timing(cpu_s=0.5, wall_s=0.25, runs=3), Timing(cpu_s=2.0, wall_s=1.0, runs=1)
    row = timing_row("theirs", theirs, ours, each_s=1e-12 * 1e6)
    assert dict(zip((*TIMING_COLUMNS, "ps per element"), row.values, strict=True)) == {
        "CPU ms": 2000,
        "wall ms": 1000,
        "times ours": 4,
        "ps per element": 2e6,
    }
    assert row.note == "one run"
    assert ratio_of({"a": theirs, "b": ours}, "a", "b") == 4
    assert ratio_of({"a": theirs, "b": RuntimeError()}, "a", "b") is None
    assert ratio_of({"a": theirs}, "a", "b") is None


@pytest.mark.parametrize(
    ("at_most", "found", "verdict"),
    [
        (False, 20.0, "met"),
        (False, 19.9, "missed"),
        (True, 20.0, "met"),
        (True, 20.1, "missed"),
        (True, None, "not measured"),
        (False, None, "not measured"),
    ],
)
def test_a_target_is_met_missed_or_not_measured(at_most: bool, found: float | None, verdict: str):
    assert Target(name="speed", wanted=20, found=found, unit="times", at_most=at_most).verdict == verdict


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0"),
        (1234.5, "1,234"),
        (12.345, "12.3"),
        (0.123, "0.123"),
        (4.2e-7, "4.2e-07"),
        (float("inf"), "inf"),
    ],
)
def test_a_figure_has_three_digits(value: float | None, shown: str):
    assert figure(value) == shown


# The command


@dataclass(frozen=True, kw_only=True)
class Toy:
    tokens: tuple[int, ...] = (5, 6)
    name: str = ""
    size: int = 1

    def run(self, how: Conditions) -> Outcome:
        values = (float(self.size), None)
        assert torch.get_num_threads() == how.threads
        rows = (Row(name=f"[{n}] | {self.name}", values=values, note="why") for n in self.tokens)
        target = Target(name="speed", wanted=2, found=self.size, unit="times")
        return Outcome(tables=(Table(title="toys", columns=("a", "b"), rows=tuple(rows)),), targets=(target,))


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry = Registry("bench", "helix.registry")
    registry.register("toy")(Toy)
    monkeypatch.setattr(bench, "BENCHES", registry)


@pytest.mark.usefixtures("toys")
def test_options_are_read_strictly():
    assert read_options("toy", ["tokens=1,2", "name=x", "size=3"]) == {"tokens": [1, 2], "name": "x", "size": 3}
    assert read_options("toy", ["tokens=7"]) == {"tokens": [7]}
    assert read_options("toy", ["tokens="]) == {"tokens": []}
    with pytest.raises(ValueError, match="key=value"):
        read_options("toy", ["tokens"])


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["boat"], "known: toy"),
        (["toy", "sise=3"], "tokens, name, size"),
        (["toy", "size=x"], "wanted int"),
        (["toy", "--repeats", "0"], "1 or more"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture):
    assert main(arguments) == 2
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("toys")
def test_json_has_all_that_was_found_and_where(capsys: pytest.CaptureFixture):
    threads = torch.get_num_threads()
    assert main(["toy", "size=3", "tokens=5", "--json", "--threads", "2"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["facts"]["command"] == "helix bench toy size=3 tokens=5 --threads 2"
    assert {"processor", "versions", "date", "threads"} <= set(said["facts"])
    assert said["tables"][0]["rows"] == [{"name": "[5] | ", "values": [3.0, None], "note": "why"}]
    assert said["targets"][0]["verdict"] == "met"
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("toys")
def test_a_terminal_shows_rows_targets_and_the_machine(capsys: pytest.CaptureFixture):
    assert main(["toy"]) == 0
    said = capsys.readouterr().out
    for words in ("[5] |", "[6] |", "at least 2.00 times", "missed", "processor", "versions", "helix bench toy"):
        assert words in said


@dataclass(frozen=True, kw_only=True)
class InParts:
    """Two parts, between which the console is looked at."""

    fails: bool = False
    dies: bool = False

    def run(self, how: Conditions) -> Outcome:
        parts = []
        for name in ("first", "second"):
            if name == "second" and self.dies:
                raise KeyboardInterrupt
            row, target = Row(name=f"row of the {name}", values=(1.0,)), Target(name=name, wanted=2, found=3.0, unit="")
            parts.append(Outcome(tables=(Table(title=name, columns=("a",), rows=(row,)),), targets=(target,)))
            how.show(parts[-1])
        last = Table(title="last", columns=("a",), rows=(Row(name="row of the last", values=(1.0,)),))
        return Outcome(
            tables=(*(table for part in parts for table in part.tables), last),
            targets=tuple(target for part in parts for target in part.targets),
            failed=("second",) if self.fails else (),
        )


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry = Registry("bench", "helix.registry")
    registry.register("parts")(InParts)
    monkeypatch.setattr(bench, "BENCHES", registry)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("form", [[], ["--markdown"]])
def test_what_is_there_is_printed_though_the_rest_never_comes(form: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(KeyboardInterrupt):
        main(["parts", "dies=true", *form])
    said = capsys.readouterr().out
    assert "row of the first" in said and "met" in said and "row of the second" not in said


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("form", [[], ["--markdown"]])
def test_each_part_is_printed_once_with_its_targets_and_what_is_left_at_the_end(
    form: list[str], capsys: pytest.CaptureFixture
):
    assert main(["parts", *form]) == 0
    said = capsys.readouterr().out
    order = ["row of the first", "met", "row of the second", "row of the last", "took"]
    assert [said.count(words) for words in order] == [1, 2, 1, 1, 1]
    assert sorted(order, key=said.index) == order
    assert said.startswith("    helix bench parts") == bool(form)


@pytest.mark.usefixtures("parts")
def test_json_is_one_value_also_of_a_bench_in_parts_and_a_failed_part_is_the_exit_code(capsys: pytest.CaptureFixture):
    assert main(["parts", "fails=true", "--json"]) == bench.PARTS_FAILED == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [table["title"] for table in found["tables"]] == ["first", "second", "last"]
    assert found["failed"] == ["second"] and "failed: second" in said.err


def test_markdown_is_a_table_whatever_stands_in_its_cells():
    said = as_markdown(
        Toy().run(Conditions(threads=torch.get_num_threads())), {"command": "helix bench toy", "date": "today"}
    )
    assert said.startswith("    helix bench toy\n\n- date: today\n")
    for _, block in itertools.groupby(said.splitlines(), key=lambda line: line.startswith("|")):
        lines = list(block)
        if lines[0].startswith("|"):
            assert len({line.count("|") for line in lines}) == 1
    assert "| speed | at least 2.00 times | 1.00 times | missed |" in said


def test_the_members_are_found():
    assert {"scan", "step"} <= set(BENCHES.names())
