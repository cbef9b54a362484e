"""Every fault of the plain loop, caused for real, and a table that does not hide the one that went wrong."""

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from helix.registry import Registry
from orchestration import chaos, fault
from orchestration.fault import FAULTS, Bench, Fault, Row, Site
from orchestration.grid import VARIANTS, Trial
from orchestration.machines import MachineError
from orchestration.twin import Attempt, Order


def row(**changes) -> Row:
    said = {"fault": "a | b", "trial": "mamba-raw fold 1 seed 0", "verdict": "bit-exact", "passed": True, **changes}
    return Row(**said)


def test_the_short_form_ends_every_trial_bit_exact(tmp_path):
    console = Console(file=io.StringIO())
    rows = chaos.cause(
        chaos.open_storage(str(tmp_path)), where="plain", kills=chaos.SHORT_KILLS, seed=1, short=True, console=console
    )
    told = "\n".join(f"{row.fault}, {row.trial}: {row.verdict}" for row in rows)
    assert all(row.passed is not False for row in rows), told
    assert {row.fault for row in rows} == {name for name in FAULTS.names() if FAULTS[name].where == "plain"}
    assert sum(row.count for row in rows if row.fault == "process killed") == chaos.SHORT_KILLS
    for one in rows:
        assert one.passed is None or "bit-exact" in one.verdict
        if one.passed and one.fault.startswith(("SIGTERM", "disk full", "storage")):
            assert one.steps_lost == 0


def test_a_fault_that_went_wrong_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys):
    only: Registry[Fault] = Registry("fault", "orchestration.fault")
    only.register("one")(Fault(where="plain", cause=lambda _site: [row(verdict="drift", passed=False), row()]))
    only.register("other")(Fault(where="ray", cause=lambda _site: [row(fault="on ray")]))
    monkeypatch.setattr(chaos, "FAULTS", only)
    assert chaos.main(["--short", "--where", "plain"]) == 1
    said = capsys.readouterr().out
    assert "drift" in said and "on ray" not in said
    assert chaos.main(["--short", "--where", "ray", "--markdown"]) == 0
    assert "| on ray | mamba-raw fold 1 seed 0 |" in capsys.readouterr().out


def test_a_fault_that_could_not_be_carried_out_is_a_row_that_did_not_pass(monkeypatch: pytest.MonkeyPatch, capsys):
    def never(_site: Site):
        yield row(fault="on ray")
        raise MachineError("the trial goes on: waited 240 s in vain")

    only: Registry[Fault] = Registry("fault", "orchestration.fault")
    only.register("one")(Fault(where="ray", cause=never))
    only.register("other")(Fault(where="ray", cause=lambda _site: [row(fault="the other")]))
    monkeypatch.setattr(chaos, "FAULTS", only)
    assert chaos.main(["--where", "ray", "--markdown"]) == 1
    said = capsys.readouterr().out
    assert "| on ray |" in said and "waited 240 s in vain" in said and "| the other |" in said
    assert chaos.main(["--fault", "other", "--markdown"]) == 0
    assert "| one |" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        chaos.main(["--fault", "third"])
    assert "unknown fault 'third'; known: 'one', 'other'" in capsys.readouterr().err


def test_the_table_of_the_benchmarks_is_markdown():
    lines = chaos.markdown(
        [row(steps_lost=3, seconds_to_next_step=1.25), row(passed=None, count=0, verdict="bit-exact\n")]
    ).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {7}
    assert "| 1 | 3 | 1.2 | bit-exact |" in lines[2]
    assert "| 0 | - | - | bit-exact |" in lines[3]


def bench(address: str, spec: Any) -> Bench:
    nothing = cast(Any, None)
    return Bench(
        fault="a fault",
        trial=Trial(variant=VARIANTS[0], spec=spec),
        trial_id="0123456789abcdef",
        order=Order(spec={}, source="", data="", storage=address),
        storage=nothing,
        whole=nothing,
        pace=nothing,
        twins=nothing,
    )


@pytest.mark.parametrize(
    ("verdict", "problem", "passed"), [("bit-exact", "", True), ("bit-exact", "x", False), ("drift", "", False)]
)
def test_a_fault_passes_where_the_bits_are_the_same_and_nothing_went_otherwise(
    verdict: str, problem: str, passed: bool, tiny_spec, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fault, "compare", lambda *_: {"verdict": verdict})
    attempts = [Attempt(began=0.0, from_step=0, steps=[(1, 1.0), (2, 2.0)], ended=3.0)]
    attempts.append(Attempt(began=3.0, from_step=1, steps=[(2, 5.0)], ended=6.0))
    made = bench("file:///nowhere", tiny_spec).row(attempts, problem=problem)
    assert (made.passed, made.steps_lost, made.seconds_to_next_step) == (passed, 1, 2.0)
    assert verdict in made.verdict and problem in made.verdict


def test_a_fault_that_cannot_be_caused_here_says_why(tiny_spec, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")  # no mount
    for name, address, reason in (
        ("disk full during a save", f"file://{tmp_path}/disk", "the right to mount"),
        ("disk full during a save", "s3://bucket/prefix", "the storage is no folder"),
        ("storage away for a while", "s3://bucket/prefix", "the storage is no folder"),
        ("storage answers 500, resets, truncated", "s3://bucket/prefix", "the storage is no folder"),
    ):
        site = cast(Site, SimpleNamespace(bench=lambda _name, address=address: bench(address, tiny_spec)))
        (made,) = FAULTS[name].cause(site)
        assert made.passed is None and reason in made.verdict


def test_a_place_that_was_used_is_refused(tmp_path, capsys):
    (tmp_path / "undisturbed" / "trials").mkdir(parents=True)
    assert chaos.main(["--storage", str(tmp_path)]) == 2
    assert "an earlier run" in capsys.readouterr().out
