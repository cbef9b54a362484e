"""Every fault of the plain loop, caused for real, and a table that does not hide the one that went wrong."""

import io

import pytest
from rich.console import Console

from helix.registry import Registry
from orchestration import chaos
from orchestration.fault import FAULTS, Fault, Row


def row(**changes) -> Row:
    said = {"fault": "a | b", "trial": "mamba-raw fold 1 seed 0", "verdict": "bit-exact", "passed": True, **changes}
    return Row(**said)


def test_the_short_form_ends_every_trial_bit_exact(tmp_path):
    console = Console(file=io.StringIO())
    rows = chaos.cause(chaos.open_storage(str(tmp_path)), where="plain", kills=6, seed=1, short=True, console=console)
    told = "\n".join(f"{row.fault}, {row.trial}: {row.verdict}" for row in rows)
    assert all(row.passed is not False for row in rows), told
    assert {row.fault for row in rows} == {name for name in FAULTS.names() if FAULTS[name].where == "plain"}
    assert sum(row.count for row in rows if row.fault == "process killed") == 6
    for one in rows:
        assert one.passed is None or "bit-exact" in one.verdict
        if one.passed and one.fault.startswith(("SIGTERM", "disk full", "storage away")):
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


def test_the_table_of_the_benchmarks_is_markdown():
    lines = chaos.markdown([row(steps_lost=3, seconds_to_next_step=1.25), row(passed=None, count=0)]).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {7}
    assert "| 1 | 3 | 1.2 | bit-exact |" in lines[2]
    assert "| 0 | - | - | bit-exact |" in lines[3]
