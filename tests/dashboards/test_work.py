"""What a cell took: sums of its attempts, gaps where nothing is known."""

import csv
import io
import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from dashboards.report import render_report, report_tables
from dashboards.tables import as_csv, shown
from dashboards.view import Spent, SweepView
from dashboards.work import work_of, work_table

MakeView = Callable[..., SweepView]
NOTHING = Spent()


def with_attempts(view: SweepView, *outcomes: str, spent: Spent = NOTHING) -> SweepView:
    """Every trial had attempts that ended so, and cost so much."""
    attempts = tuple(
        {"attempt_id": str(n), "started": 0.0, "ended": 60.0, "outcome": one} for n, one in enumerate(outcomes)
    )
    cells = tuple(
        replace(
            cell,
            trials=tuple(
                replace(trial, state=replace(trial.state, attempts=attempts), spent=spent) for trial in cell.trials
            ),
        )
        for cell in view.cells
    )
    return replace(view, cells=cells)


def row_of(view: SweepView, name: str) -> dict[str, str]:
    table = work_table(view)
    row = next(row for row in table.rows if row[0] == name)
    return {
        f"{column.group} {column.heading}".strip(): shown(cell) for column, cell in zip(table.columns, row, strict=True)
    }


def test_attempts_are_counted_by_how_they_ended(make_view: MakeView):
    view = with_attempts(make_view(folds=(1, 2)), "lost", "stopped", "lost", "failed", "done")
    row = row_of(view, "helix-raw")
    assert row["attempts"] == "10"
    assert (row["of which preempted"], row["of which stopped"], row["of which failed"]) == ("4", "2", "2")
    assert row_of(view, "all")["attempts"] == "60"


def test_hours_and_money_are_added_and_the_lost_part_stands_beside_them(make_view: MakeView):
    spent = Spent(hours=1.0, gpu_hours=0.5, usd=2.0, lost_hours=0.25, lost_usd=0.5)
    row = row_of(with_attempts(make_view(folds=(1, 2)), "done", spent=spent), "mamba-mel")
    assert row["time worked"] == "2 h 00 min"
    assert row["time lost"] == "30 min 00 s"
    assert (row["cost GPU-hours"], row["cost US$"], row["cost of it lost"]) == ("1.00", "4.00", "1.00")


def test_the_file_names_the_units_that_a_page_writes_beside_its_numbers(make_view: MakeView):
    spent = Spent(hours=1.0, usd=2.0, lost_hours=0.25, lost_usd=0.5)
    view = with_attempts(make_view(folds=(1,), variants=[("mamba", "raw")]), "done", spent=spent)
    (row,) = csv.DictReader(io.StringIO(as_csv(work_table(view))))
    assert (row["time: worked, hours"], row["time: lost, hours"]) == ("1.0", "0.25")
    assert (row["trials, done"], row["cost: of it lost, US$"]) == ("1", "0.5")


def test_what_has_no_price_has_a_gap_and_no_zero(make_view: MakeView):
    spent = Spent(hours=1.0, unpriced_hours=1.0, unpriced=("unknown instance type",))
    view = with_attempts(make_view(folds=(1,)), "done", spent=spent)
    assert row_of(view, "mamba-raw")["cost US$"] == "\N{EN DASH}"
    assert any("have no price (unknown instance type)" in note for note in work_table(view).notes)


def test_speed_is_clips_trained_and_tested_by_the_time_of_an_epoch(make_view: MakeView):
    view = make_view(folds=(1,), variants=[("mamba", "raw")])
    seconds = sorted(row["seconds"] for row in view.cells[0].trials[0].state.rows)
    middle = (seconds[9] + seconds[10]) / 2
    assert work_of(view.cells[0]).clips_per_second == pytest.approx(2000 / middle, rel=1e-3)


def test_a_sweep_that_has_not_begun_has_gaps(make_view: MakeView):
    row = row_of(make_view(folds=(1,), status=lambda *_: ("missing", 0)), "all")
    assert row["trials"] == "0 of 6"
    assert row["clips/s"] == row["attempts"] == row["cost US$"] == row["time worked"] == "\N{EN DASH}"


def test_lost_means_one_thing_on_a_page(make_view: MakeView):
    view = make_view(folds=(1,), variants=[("mamba", "raw")])
    page = render_report(view)
    heads = [text for text in re.findall(r"<th[^>]*>(.*?)</th>", page) if "lost" in text]
    assert heads == ["lost", "of it lost"], "the time and the cost of steps that were trained again"
    assert ">restarting</th>" in page
    (trials,) = [table for table in report_tables(view) if table.name == "trials"]
    assert "restarting, s" in [column.heading for column in trials.columns]
    assert not any("lost" in column.heading for column in trials.columns)
