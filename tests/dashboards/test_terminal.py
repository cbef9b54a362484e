"""The table at the end of a sweep: the numbers of the report, in 100 columns."""

from collections.abc import Callable
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from dashboards.summary import summarise
from dashboards.terminal import summary_table
from dashboards.text import GAP, mean_std, percent
from dashboards.view import Spent, SweepView

MakeView = Callable[..., SweepView]


def printed(view: SweepView, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(summary_table(view))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_table_has_the_numbers_of_the_summary(make_view: MakeView):
    view = make_view()
    text = printed(view)
    for summary in summarise(view):
        assert summary.cell.variant in text
        assert mean_std(summary.selected.mean, summary.selected.std) in text
        assert percent(summary.accuracy["validation"].mean) in text


@pytest.mark.parametrize("dataset", ["esc50", "tones"])
def test_the_table_fits_100_columns_and_loses_nothing(make_view: MakeView, dataset: str):
    text = printed(make_view(dataset=dataset, folds=tuple(range(1, 11)), seeds=(0, 1, 2)))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "30/30" in text


@pytest.mark.parametrize("dataset", ["esc50", "tones"])
def test_what_cells_cost_stands_beside_them_where_it_is_known(make_view: MakeView, dataset: str):
    view = make_view(dataset=dataset)
    assert "cost" not in printed(view)
    dear = replace(view.cells[0].trials[0], spent=Spent(hours=2.0, usd=1.25))
    cells = (replace(view.cells[0], trials=(dear, *view.cells[0].trials[1:])), *view.cells[1:])
    text = printed(replace(view, cells=cells))
    assert "$1.25" in text
    assert "$0.00" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text


def test_every_short_heading_is_explained(make_view: MakeView):
    text = " ".join(printed(make_view()).split())
    assert "valid.: by the best test epoch, the last, the one chosen by validation" in text
    assert "optim.: best minus valid." in text


def test_gaps_are_dashes(make_view: MakeView):
    text = printed(make_view(folds=(1, 2), status=lambda variant, fold, seed: ("done" if fold == 1 else "missing", 0)))
    assert "1/2" in text
    assert f"± {GAP}" in text


def test_names_are_text_and_not_markup(make_view: MakeView):
    assert "[red]esc50[/red]" in printed(make_view(dataset="[red]esc50[/red]", facts=None))


def test_an_empty_sweep_prints_an_empty_table(make_view: MakeView):
    assert "variant" in printed(make_view(folds=(), facts=None))
