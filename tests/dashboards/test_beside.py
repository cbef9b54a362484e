"""The paper's tables with ours in them: theirs as printed, ours computed by hand, gaps that say why."""

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import pytest
from scipy import stats

from dashboards.beside import NOT_ASKED, PaperCell, Sheet, feasibility_table, paper_tables, sheet_table, sheets
from dashboards.evidence import sweep_evidence
from dashboards.summary import SELECTIONS, Statistic, summarise
from dashboards.tables import Figure, as_csv, shown
from dashboards.verdicts import ledger
from dashboards.view import StepMemory, SweepView
from helix.published import FEASIBILITY, PUBLISHED, TABLES, TOLERANCE, published
from helix.statistics import t_test

MakeView = Callable[..., SweepView]


def laid_out(view: SweepView) -> dict[int, Sheet]:
    return {sheet.table.number: sheet for sheet in sheets(summarise(view), view.std)}


def cell_of(view: SweepView, number: int, row: str, column: str) -> PaperCell:
    return next(one for one in laid_out(view)[number].cells if (one.row, one.column) == (row, column))


def test_every_published_accuracy_stands_in_a_table_of_the_paper():
    printed = {
        (table.dataset, frontend, backbone)
        for table in TABLES
        for _, backbone in table.rows
        for _, frontend, _ in table.columns
    }
    assert printed == {(one.dataset, one.frontend, one.backbone) for one in PUBLISHED}
    assert set(TOLERANCE) == {table.dataset for table in TABLES}


def test_table_2_is_laid_out_as_in_the_paper(make_view: MakeView):
    sheet = laid_out(make_view(folds=(1, 2, 3, 4, 5)))[2]
    assert [row for row, _ in sheet.rows] == ["Pure Mamba", "HELIX", "Pure Attention"]
    assert [[cell.printed for cell in cells] for _, cells in sheet.rows] == [
        ["55.10 ± 3.33", "53.75 ± 2.92"],
        ["50.20 ± 3.71", "51.85 ± 2.41"],
        ["44.60 ± 3.16", "46.10 ± 2.97"],
    ]


def test_our_number_its_interval_and_the_difference_are_those_of_the_folds(make_view: MakeView):
    view = make_view(folds=(1, 2, 3, 4, 5))
    summary = next(one for one in summarise(view) if one.cell.variant == "helix-mel")
    values = [sample.accuracy["best_test"] for sample in summary.samples]
    found = cell_of(view, 2, "HELIX", "Spectrogram")
    assert found.ours.mean == pytest.approx(fmean(values))
    shared = math.sqrt(1 + 5 * 400 / 1600)  # the folds share training clips
    low, high = stats.t.interval(0.95, 4, loc=fmean(values), scale=shared * stats.sem(values))
    assert (found.ours.low, found.ours.high) == (pytest.approx(low), pytest.approx(high))
    assert found.difference == pytest.approx(fmean(values) - 0.5185)
    assert found.epochs == 20


def test_a_difference_is_taken_on_the_folds_that_both_have(make_view: MakeView):
    target = published("esc50", "raw", "mamba")
    assert target is not None
    assert target.per_fold is not None
    found = cell_of(make_view(folds=(2, 4)), 2, "Pure Mamba", "Raw")
    assert found.on_our_folds == pytest.approx(fmean([target.per_fold[1], target.per_fold[3]]))
    assert found.printed == "55.10 ± 3.33"
    assert cell_of(make_view(folds=(1, 2, 3, 4, 5)), 2, "Pure Mamba", "Raw").on_our_folds is None


def test_seeds_of_one_fold_are_no_folds(make_view: MakeView):
    one = cell_of(make_view(folds=(1, 2), seeds=(0, 1, 2)), 2, "HELIX", "Raw")
    assert one.ours.n == 6
    view = make_view(folds=(1, 2), seeds=(0, 1, 2))
    samples = next(one for one in summarise(view) if one.cell.variant == "helix-raw").samples
    by_fold = [fmean(s.accuracy["best_test"] for s in samples if s.fold == fold) for fold in (1, 2)]
    low, _ = stats.t.interval(0.95, 1, loc=fmean(by_fold), scale=math.sqrt(1 + 2 / 4) * stats.sem(by_fold))
    assert one.ours.low == pytest.approx(low)
    assert one.ours.mean == pytest.approx(fmean(by_fold))
    assert one.ours.counted == "6 runs in 2 folds"
    assert any("Seeds of a fold are averaged first" in note for note in laid_out(view)[2].notes)


def test_seeds_of_one_of_several_folds_are_no_interval_beside_the_papers_folds(make_view: MakeView):
    view = make_view(folds=(1, 2), seeds=(0, 1), status=lambda _, fold, __: ("done" if fold == 1 else "missing", 0))
    found = cell_of(view, 2, "Pure Mamba", "Raw")
    assert (found.ours.n, found.ours.counted) == (2, "2 runs in 1 fold")
    assert (found.ours.std, found.ours.low, found.ours.high) == (None, None, None)
    (row,) = [row for row in sheet_table(laid_out(view)[2]).rows if row[:2] == ("Pure Mamba", "Raw")]
    assert [cell.value for cell in row[3:6] if isinstance(cell, Figure)] == [None] * 3


def test_a_cell_has_one_interval_in_table_and_ledger(make_view: MakeView):
    values = {1: 0.50, 2: 0.51, 3: 0.53, 4: 0.54, 5: 0.54}
    view = make_view(folds=tuple(values), epochs=100, variants=[("mamba", "raw")], facts=None)
    (cell,) = view.cells
    trials = [
        replace(
            one,
            state=replace(
                one.state, result={**(one.state.result or {}), "accuracy": dict.fromkeys(SELECTIONS, values[one.fold])}
            ),
        )
        for one in cell.trials
    ]
    view = replace(view, cells=(replace(cell, trials=tuple(trials)),))
    found = cell_of(view, 2, "Pure Mamba", "Raw")
    (entry,) = [entry for entry in ledger(sweep_evidence(view)) if entry.claim.id == "esc50-mamba-raw"]
    assert found.verdict == "inside the interval"
    assert entry.judgement.verdict == "underpowered"
    plain = t_test(tuple(values.values()))
    assert plain.high is not None and plain.high < 0.551, "without the correction it would be outside"


def test_an_accuracy_that_is_not_finite_is_a_gap_with_a_name(make_view: MakeView):
    view = make_view(folds=(1, 2), variants=[("mamba", "raw")])
    (cell,) = view.cells

    def spoiled(*folds: int) -> SweepView:
        trials = [
            replace(
                one,
                state=replace(
                    one.state,
                    result={**(one.state.result or {}), "accuracy": dict.fromkeys(SELECTIONS, math.nan)},
                ),
            )
            if one.fold in folds
            else one
            for one in cell.trials
        ]
        return replace(view, cells=(replace(cell, trials=tuple(trials)),))

    half, none = (cell_of(spoiled(*folds), 2, "Pure Mamba", "Raw") for folds in ((1,), (1, 2)))
    assert (half.ours.n, half.ours.not_finite) == (1, 1)
    assert half.difference is not None and math.isfinite(half.difference)
    assert (none.ours.mean, none.difference, none.verdict, none.gap) == (None, None, None, "not finite")
    assert any("1 accuracy of ours not finite" in note for note in laid_out(spoiled(1))[2].notes)


@pytest.mark.parametrize(
    ("ours", "low", "high", "verdict"),
    [
        (0.531, 0.52, 0.54, "within"),
        (0.57, None, None, "within"),
        (0.52, 0.48, 0.56, "inside the interval"),
        (0.52, 0.51, 0.53, "outside"),
        (0.58, None, None, "outside"),
        (None, None, None, None),
    ],
)
def test_the_verdict_is_by_the_tolerance_and_then_by_the_interval(
    ours: float | None, low: float | None, high: float | None, verdict: str | None
):
    found = PaperCell(
        row="Pure Mamba",
        column="Raw",
        measure="best_test",
        target=published("esc50", "raw", "mamba"),
        ours=Statistic(n=5, mean=ours, low=low, high=high),
        against=0.551,
        tolerance=0.02,
    )
    assert found.verdict == verdict


def test_a_cell_that_nobody_asked_for_says_so_and_has_no_number(make_view: MakeView):
    view = make_view(variants=[("mamba", "raw")])
    found = laid_out(view)
    assert [sheet.asked for sheet in found.values()] == [True, False, False, False]
    assert {cell.gap for cell in found[2].cells} == {"", NOT_ASKED}
    assert all(cell.difference is None and cell.verdict is None for cell in found[3].cells)


@pytest.mark.parametrize(
    ("status", "gap"),
    [("missing", "no result yet"), ("running", "no result yet, 3 running"), ("failed", "3 trials failed")],
)
def test_a_cell_without_a_result_says_why(make_view: MakeView, status: str, gap: str):
    found = cell_of(make_view(status=lambda *_: (status, 0)), 2, "HELIX", "Raw")
    assert found.gap == gap
    assert found.difference is None


def test_longer_runs_are_also_read_at_the_papers_epochs(make_view: MakeView):
    view = make_view(dataset="concat_speech_commands", facts=None, folds=(1,), epochs=60)
    found = cell_of(view, 4, "HELIX Raw", "Best accuracy")
    rows = next(cell for cell in view.cells if cell.variant == "helix-raw").trials[0].state.rows
    assert found.at_theirs == max(row["test_accuracy"] for row in rows[:24])
    assert cell_of(view, 4, "HELIX Raw", "Final accuracy").ours.mean == rows[-1]["test_accuracy"]
    short = make_view(dataset="concat_speech_commands", facts=None, folds=(1,), epochs=20)
    assert cell_of(short, 4, "HELIX Raw", "Best accuracy").at_theirs is None


def test_the_run_that_ran_out_of_memory_has_no_difference(make_view: MakeView):
    view = make_view(dataset="voxpopuli", facts=None, folds=(1,))
    found = cell_of(view, 5, "Pure Attention Raw", "Best accuracy")
    assert found.printed == "OOM"
    assert ",OOM," in as_csv(sheet_table(laid_out(view)[5]))
    assert found.ours.mean is not None
    assert found.difference is None


def test_runs_unlike_the_papers_are_said_to_be_so(make_view: MakeView):
    notes = " ".join(laid_out(make_view(folds=(1, 2, 3, 4, 5)))[2].notes)
    assert "Not like for like: our runs have 20 epochs instead of 100 and part of the recordings." in notes


def test_the_file_has_a_row_for_each_cell_of_the_papers_table(make_view: MakeView):
    view = make_view(folds=(1,))
    for sheet in laid_out(view).values():
        table = sheet_table(sheet)
        assert len(table.rows) == len(sheet.cells)
    names = [table.name for table in paper_tables(view, summarise(view))]
    assert names == ["paper-table-1", "paper-table-2"], "files of tables that have nothing of ours are not written"


def test_table_1_has_the_papers_words_and_the_predicted_memory(make_view: MakeView):
    memory = (
        StepMemory(backbone="mamba", tokens=30_000, attn_impl="sdpa", predicted_bytes=5_700_000_000, verdict="fits"),
        StepMemory(backbone="attention", tokens=30_000, attn_impl="weights", predicted_bytes=119 * 10**9, verdict="no"),
        StepMemory(
            backbone="attention", tokens=30_000, attn_impl="sdpa", predicted_bytes=4_100_000_000, verdict="fits"
        ),
    )
    table = feasibility_table(replace(make_view(), memory=memory))
    assert [[row[1], row[4], row[7]] for row in table.rows] == [list(words.values()) for words in FEASIBILITY.values()]
    assert [shown(cell) for cell in table.rows[2][7:]] == ["OOM", "119, no", "4.1, fits"]
    assert [shown(cell) for cell in table.rows[2][1:4]] == ["trains", "5.7, fits", "5.7, fits"]
    assert shown(table.rows[2][5]) == NOT_ASKED
    assert isinstance(table.rows[2][8], Figure)
    assert table.rows[2][8].value == 119 * 10**9
    assert "not predicted" in feasibility_table(make_view()).notes[0]
