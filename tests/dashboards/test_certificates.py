"""What the report says of certificates: the newest of each backend, honestly beside the results, and escaped."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dashboards.certificates import certified
from dashboards.report import render_report
from dashboards.view import SweepView
from helix.spec import SCIENCE_VERSION

MakeView = Callable[..., SweepView]
EVIL = "<script>alert('x')</script>"


def certificate(**changes: Any) -> dict[str, Any]:
    return {
        "certificate_id": "20260101-000000-abcdef",
        "grid": "esc50",
        "trial": "mamba-raw fold 1 seed 0",
        "trial_id": "0123456789abcdef",
        "science_version": SCIENCE_VERSION,
        "scan": "numba",
        "device": "cpu",
        "device_name": "cpu (x86_64)",
        "threads": 1,
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789ab+",
        "made": 1.0,
        "steps": 50,
        "kills_asked": 12,
        "kills": [{"moment": "at any time", "step": 3}] * 11,
        "steps_lost": 31,
        "seconds_lost": 75.0,
        "restarts_at_step_0": 0,
        "rows": {"count": 4, "problems": []},
        "largest_difference": None,
        "verdict": "bit-exact",
        **changes,
    }


def section(view: SweepView) -> str:
    return render_report(view).partition("<h2>Certificate</h2>")[2].partition("</section>")[0]


@pytest.fixture
def view(make_view: MakeView) -> SweepView:
    return make_view()


def test_a_sweep_without_a_certificate_says_how_to_make_one(view: SweepView):
    assert "<code>helix certify --grid esc50 --kills 12</code>" in section(view)
    assert "<table" not in section(view)


def test_a_certificate_shows_its_verdict_its_kills_and_what_they_cost(view: SweepView):
    said = section(replace(view, certificates=(certificate(),)))
    for words in ("bit-exact", "11 of 12", "31 of 50", "1 min 15 s", "scan numba on cpu (x86_64)", "0123456789ab+"):
        assert words in said
    assert 'class="bad"' not in said


def test_a_drift_is_marked_and_measured(view: SweepView):
    drift = certificate(
        verdict="drift",
        largest_difference={"weights": 3.14159e-6, "rows": 0.25},
        rows={"count": 4, "problems": ["the rows are of epochs [2]"]},
    )
    said = section(replace(view, certificates=(drift,)))
    assert 'class="bad"' in said
    assert "3.1e-06 in weights, 0.25 in rows" in said
    assert "the rows are of epochs [2]" in said


def test_the_newest_of_each_backend_counts_also_where_it_is_the_worse(view: SweepView):
    made = (
        certificate(made=3.0, verdict="drift", trial="newer"),
        certificate(made=1.0, trial="older"),
        certificate(made=2.0, scan="mamba_ssm", device="cuda", trial="elsewhere"),
    )
    rows = certified(replace(view, certificates=made)).rows
    assert {(row.certificate["trial"], row.exact) for row in rows} == {("newer", False), ("elsewhere", True)}


def test_certificates_of_another_grid_or_another_science_say_nothing(view: SweepView):
    made = (certificate(grid="demo"), certificate(science_version=SCIENCE_VERSION + 1))
    assert certified(replace(view, certificates=made)).rows == ()


def test_it_counts_the_results_that_ran_on_the_same_backend_and_names_the_others(make_view: MakeView):
    def on(view: SweepView, scan: str, cell: int) -> SweepView:
        trial = view.cells[cell].trials[0]
        state = replace(trial.state, result={**(trial.state.result or {}), "scan": scan})
        cells = list(view.cells)
        cells[cell] = replace(cells[cell], trials=(replace(trial, state=state),))
        return replace(view, cells=tuple(cells))

    view = make_view(folds=(1,), variants=[("mamba", "raw"), ("helix", "raw")])
    view = on(on(view, "numba", 0), "reference", 1)
    trial_id = view.cells[0].trials[0].trial_id
    found = certified(replace(view, certificates=(certificate(trial_id=trial_id),)))
    assert [(row.results, row.in_sweep) for row in found.rows] == [(1, True)]
    assert found.uncovered == (("scan reference on cpu, torch 2.13.0", 1),)
    said = section(replace(view, certificates=(certificate(),)))
    assert "Without a certificate: 1 result (scan reference on cpu, torch 2.13.0)." in said
    assert "of this grid with other settings or data" in said


def test_what_a_certificate_says_is_escaped(view: SweepView):
    evil = certificate(
        trial=EVIL,
        trial_id=EVIL,
        scan=EVIL,
        device_name=EVIL,
        commit=EVIL,
        verdict=EVIL,
        versions={"torch": EVIL},
        rows={"count": 1, "problems": [EVIL]},
    )
    said = section(replace(view, certificates=(evil,)))
    assert "<script" not in said
    assert said.count("&lt;script&gt;") == 8
