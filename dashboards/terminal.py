"""The result of a sweep as a table for the terminal: the same numbers as the report, in at most 100 columns."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from dashboards.claim import Entry
from dashboards.summary import CellSummary, averaged_over, sampling_word, summarise
from dashboards.tables import Table as AnyTable
from dashboards.tables import shown
from dashboards.text import GAP, NOT_FINITE, SELECTION_WORDS, percent, plural, points
from dashboards.view import SweepView


def summary_table(view: SweepView) -> Table:
    """One row per cell: the selected accuracy, its spread and count, the other selections, and the paper's number."""
    summaries = summarise(view)
    many = len({cell.dataset for cell in view.cells}) > 1
    compared = any(summary.comparison is not None for summary in summaries)
    table = Table(
        title=Text(f"{view.grid}, profile {view.profile}: test accuracy in %, {SELECTION_WORDS[view.select]}"),
        title_justify="left",
        caption=Text(_caption(view, compared)),
        box=box.SIMPLE_HEAD,
        title_style="bold",
        caption_style="dim",
        caption_justify="left",
        header_style="bold",
        width=100 if many or compared else None,
    )
    if many:
        table.add_column("data set", overflow="fold")
    table.add_column("variant", overflow="fold")
    table.add_column("mean ± std", justify="right", no_wrap=True)
    table.add_column(f"{sampling_word(view)}s", justify="right", no_wrap=True)
    for heading in ("best", "last", "valid.", "optim."):
        table.add_column(heading, justify="right", no_wrap=True)
    if compared:
        table.add_column("paper", justify="right", no_wrap=True)
        table.add_column("diff.", justify="right", no_wrap=True)
    if view.spent.usd:
        table.add_column("cost", justify="right", no_wrap=True)
    for summary in summaries:
        cost = [Text(f"${summary.cell.spent.usd:,.2f}")] if view.spent.usd else []
        table.add_row(*_row(summary, many, compared), *cost)
    return table


def claims_table(entries: Sequence[Entry]) -> Table:
    """One row per claim that has data; the numbers behind the verdicts are in the files."""
    table = Table(
        title=Text("What the paper claims"),
        caption=Text("those without data are left out; the numbers behind each stand in the page and in claims.csv"),
        box=box.SIMPLE_HEAD,
        title_style="bold",
        title_justify="left",
        caption_style="dim",
        caption_justify="left",
        header_style="bold",
        width=100,
    )
    table.add_column("verdict", no_wrap=True)
    table.add_column("where", overflow="fold", max_width=18)
    table.add_column("what the paper says", overflow="fold")
    for entry in entries:
        if entry.judgement.verdict != "no data":
            table.add_row(*(Text(word) for word in (entry.judgement.verdict, entry.claim.where, entry.claim.says)))
    return table


def statistics_table(given: AnyTable) -> Table:
    """A table of dashboards/comparisons.py with those of its columns that a terminal has room for."""
    wanted = ("comparison", "n", "difference", "p: paired t", "p: corrected", "p: Holm", "p: sign flip")
    names = [f"{column.group}: {column.heading}".removeprefix(": ") for column in given.columns]
    there = [names.index(name) for name in wanted if name in names]
    table = Table(
        title=Text(given.caption),
        box=box.SIMPLE_HEAD,
        title_style="bold",
        title_justify="left",
        header_style="bold",
        width=100 if len(there) > 3 else None,
    )
    for at in there:
        # Wide enough for a difference of two; an interaction, of four, is folded.
        column = given.columns[at]
        heading = Text(names[at].replace("p: ", "p\n"))
        table.add_column(heading, justify="right" if column.number else "left", min_width=None if at else 29)
    for row in given.rows:
        table.add_row(*(Text(shown(row[at])) for at in there))
    return table


def _row(summary: CellSummary, many: bool, compared: bool) -> list[Text]:
    cell, comparison = summary.cell, summary.comparison
    row = [cell.dataset] if many else []
    row += [cell.variant, summary.selected.percent_std, f"{summary.done}/{summary.asked}"]
    row += [summary.accuracy[rule].percent for rule in ("best_test", "last", "validation")]
    row.append(points(summary.optimism.mean))
    if compared:
        row.append(percent(comparison.theirs) if comparison is not None else GAP)
        row.append(points(comparison.difference) if comparison is not None else GAP)
    return [Text(word) for word in row]


def _caption(view: SweepView, compared: bool) -> str:
    chance = ", ".join(f"{facts.name} {percent(facts.chance)} %" for facts in view.data)
    said = [f"guessing: {chance}"] if chance else []
    said.append("best, last, valid.: by the best test epoch, the last, the one chosen by validation")
    said.append("optim.: best minus valid.")
    datasets = dict.fromkeys(cell.dataset for cell in view.cells)
    overs = dict.fromkeys(averaged_over(view, dataset)[1] for dataset in datasets)
    said += [f"\N{PLUS-MINUS SIGN} over {' or '.join(overs)}"] if overs else []
    left_out = sum(summary.selected.not_finite for summary in summarise(view))
    if left_out:
        said.append(f"{plural(left_out, 'accuracy', 'accuracies')} {NOT_FINITE}, in no mean")
    if compared:
        said.append("diff.: our best minus the paper's, same folds where it gives them")
    return "; ".join(said)
