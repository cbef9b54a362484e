"""The paper's Tables 1 to 5 with a sweep's numbers in their cells: what agrees, what does not, what is not there.

Accuracies are fractions; differences are taken on the folds that both sides have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dashboards.summary import CellSummary, Statistic, fold_mean, statistic
from dashboards.tables import Column, Figure, Table
from dashboards.text import GAP, NOT_FINITE, count, listing, mean_std, percent, plural, points
from dashboards.view import SweepView
from helix.published import FEASIBILITY, TABLES, TOLERANCE, PaperTable, Published, published
from helix.statistics import mean

Verdict = Literal["within", "inside the interval", "outside"]

#: Why a cell has nothing of ours.
NOT_ASKED = "not in this sweep"

#: The paper prints accuracies to a hundredth of a point.
PRINTED = 0.00005

#: The paper's names of the backbones, as it orders the columns of Table 1.
BACKBONES = {"mamba": "Pure Mamba", "helix": "HELIX", "attention": "Pure Attention"}


@dataclass(frozen=True, kw_only=True)
class PaperCell:
    """One cell of Tables 2 to 5: theirs as printed, and ours where this sweep has something; else `gap` says why not.

    `against` is the published number on the folds that we have. `at_theirs`: our best accuracy within as many epochs
    as the paper trained, where ours trained longer. `unlike`: in what our runs differ from the paper's.
    """

    row: str
    column: str
    measure: Literal["best_test", "last"]
    target: Published | None
    ours: Statistic
    against: float | None = None
    epochs: int | None = None
    at_theirs: float | None = None
    tolerance: float
    unlike: tuple[str, ...] = ()
    gap: str = ""

    @property
    def theirs(self) -> float | None:
        if self.target is None:
            return None
        return self.target.accuracy if self.measure == "best_test" else self.target.last

    @property
    def printed(self) -> str:
        """The paper's number as it prints it."""
        if self.target is not None and self.theirs is None and self.target.note:
            return "OOM"
        std = self.target.std if self.target is not None and self.measure == "best_test" else None
        return percent(self.theirs) if std is None else mean_std(self.theirs, std)

    @property
    def on_our_folds(self) -> float | None:
        """Their number on the folds that we have, where that is not the one that they print."""
        if self.against is None or self.theirs is None or abs(self.against - self.theirs) < PRINTED:
            return None
        return self.against

    @property
    def difference(self) -> float | None:
        return None if self.ours.mean is None or self.against is None else self.ours.mean - self.against

    @property
    def verdict(self) -> Verdict | None:
        """Whether the two agree: by the tolerance, or else because the interval of our mean holds their number."""
        if self.difference is None or self.against is None:
            return None
        if abs(self.difference) <= self.tolerance + PRINTED / 2:
            return "within"
        if self.ours.low is not None and self.ours.high is not None and self.ours.low <= self.against <= self.ours.high:
            return "inside the interval"
        return "outside"


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One of Tables 2 to 5 laid out as in the paper: a tuple of cells for each row, one for each column."""

    table: PaperTable
    rows: tuple[tuple[str, tuple[PaperCell, ...]], ...]

    @property
    def name(self) -> str:
        return f"paper-table-{self.table.number}"

    @property
    def cells(self) -> tuple[PaperCell, ...]:
        return tuple(cell for _, cells in self.rows for cell in cells)

    @property
    def asked(self) -> bool:
        """Whether this sweep has any of its cells, finished or not."""
        return any(cell.gap != NOT_ASKED for cell in self.cells)

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be said with the numbers."""
        measured = [cell for cell in self.cells if cell.ours.mean is not None]
        if not measured:
            return ()
        shared = [phrase for phrase in measured[0].unlike if all(phrase in cell.unlike for cell in measured)]
        said = [
            f"Within: at most {points(self.cells[0].tolerance, 1).lstrip('+')} points from the paper's number, a "
            "tolerance of ours. Inside the interval: further away, but in the 95 % interval of our mean, if it has one."
        ]
        if any(cell.ours.n > cell.ours.units for cell in measured):
            said.append("Seeds of a fold are averaged first: mean, std and interval are over folds.")
        left_out = sum(cell.ours.not_finite for cell in self.cells)
        if left_out:
            said.append(f"{plural(left_out, 'accuracy', 'accuracies')} of ours {NOT_FINITE}, in no mean here.")
        if shared:
            said.append(f"Not like for like: our runs have {listing(shared)}.")
        rest = {
            f"{cell.row} {cell.column}": listing([phrase for phrase in cell.unlike if phrase not in shared])
            for cell in measured
        }
        several = "; ".join(f"{name} {words}" for name, words in rest.items() if words)
        return (*said, f"Of single cells: {several}.") if several else tuple(said)


def sheets(summaries: Sequence[CellSummary], std: str) -> tuple[Sheet, ...]:
    """Tables 2 to 5, whatever of them the sweep has."""
    known = {(one.cell.dataset, one.cell.frontend, one.cell.backbone): one for one in reversed(summaries)}
    return tuple(
        Sheet(
            table=table,
            rows=tuple(
                (
                    row,
                    tuple(
                        _cell(table, row, backbone, column, known.get((table.dataset, column[1], backbone)), std)
                        for column in table.columns
                    ),
                )
                for row, backbone in table.rows
            ),
        )
        for table in TABLES
    )


def sheet_table(sheet: Sheet) -> Table:
    """A row for each cell of the paper's table, with everything that is known of it."""
    return Table(
        name=sheet.name,
        caption=f"Table {sheet.table.number} of the paper ({sheet.table.caption}) with ours beside it, accuracies in %",
        columns=(
            Column(heading="architecture"),
            Column(heading="what"),
            Column(heading="mean", number=True, group="ours", unit="%"),
            Column(heading="std", number=True, group="ours", unit="%"),
            Column(heading="low", number=True, group="ours, 95 % interval", unit="%"),
            Column(heading="high", number=True, group="ours, 95 % interval", unit="%"),
            Column(heading="runs", number=True, group="ours, runs"),
            Column(heading="epochs", number=True, group="ours, runs"),
            Column(heading="best in the paper's epochs", number=True, group="ours, runs", unit="%"),
            Column(heading="printed", number=True, group="the paper", unit="%"),
            Column(heading="std", number=True, group="the paper", unit="%"),
            Column(heading="epochs", number=True, group="the paper"),
            Column(heading="on our folds", number=True, group="the paper", unit="%"),
            Column(heading="points", number=True, group="ours minus theirs"),
            Column(heading="verdict", group="ours minus theirs"),
        ),
        rows=tuple(
            (
                cell.row,
                cell.column,
                *(_percent(value) for value in (cell.ours.mean, cell.ours.std, cell.ours.low, cell.ours.high)),
                Figure(cell.ours.n, cell.ours.counted) if cell.ours.n else Figure(None),
                Figure(cell.epochs, count(cell.epochs)),
                _percent(cell.at_theirs),
                Figure(None, cell.printed) if cell.theirs is None else _percent(cell.theirs),
                _percent(cell.target.std if cell.target is not None and cell.measure == "best_test" else None),
                Figure(cell.target.epochs if cell.target else None, count(cell.target.epochs if cell.target else None)),
                _percent(cell.against),
                Figure(None if cell.difference is None else 100 * cell.difference, points(cell.difference)),
                cell.verdict or cell.gap or GAP,
            )
            for cell in sheet.cells
        ),
        notes=sheet.notes,
    )


def feasibility_table(view: SweepView) -> Table:
    """The paper's Table 1 with the predicted memory of one step beside its words."""
    memory = {(one.tokens, one.backbone, one.attn_impl): one for one in view.memory}
    backbones = {one.backbone for one in view.memory}
    rows = []
    for tokens, words in FEASIBILITY.items():
        row: list[str | Figure] = [f"{count(tokens)} ({tokens // 100} s)"]
        for backbone in BACKBONES:
            row.append(words[backbone])
            for attn_impl in ("weights", "sdpa"):
                # without attention there is but one way, which is the authors' as well
                one = memory.get((tokens, backbone, attn_impl)) or memory.get((tokens, backbone, "sdpa"))
                row.append(
                    Figure(None, NOT_ASKED if backbones else GAP)
                    if one is None
                    else Figure(one.predicted_bytes, f"{_gigabytes(one.predicted_bytes)}, {one.verdict}")
                )
        rows.append(tuple(row))
    columns = [Column(heading="tokens")]
    for name in BACKBONES.values():
        columns += [
            Column(heading="the paper", group=name),
            Column(heading="authors' attention", number=True, group=name, unit="bytes"),
            Column(heading="ours", number=True, group=name, unit="bytes"),
        ]
    return Table(
        name="paper-table-1",
        caption="Table 1 of the paper: what trains on a GPU of 48 GB, with the predicted peak of one training step",
        columns=tuple(columns),
        rows=tuple(rows),
        notes=("The memory was not predicted for this page.",)
        if not view.memory
        else (
            "Predicted, not measured: GB of one step on one clip in fp32 at the paper's width, 1,313 classes, from the "
            "shapes of the real step. The authors' attention keeps a matrix of weights, tokens by tokens per head; "
            "ours gives the same outputs without one. Fits: with the error bound; tight: only without it. The paper's "
            "slow is over twice the time of Pure Mamba, of which memory says nothing.",
        ),
    )


def paper_tables(view: SweepView, summaries: Sequence[CellSummary]) -> tuple[Table, ...]:
    """Table 1, and those of Tables 2 to 5 of which this sweep has anything."""
    return (feasibility_table(view), *(sheet_table(sheet) for sheet in sheets(summaries, view.std) if sheet.asked))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.0f}" if size >= 10e9 else f"{size / 1e9:.1f}"


def _cell(
    table: PaperTable,
    row: str,
    backbone: str,
    column: tuple[str, str, Literal["best_test", "last"]],
    summary: CellSummary | None,
    std: str,
) -> PaperCell:
    label, frontend, measure = column
    target = published(table.dataset, frontend, backbone)
    known = {"row": row, "column": label, "measure": measure, "target": target, "tolerance": TOLERANCE[table.dataset]}
    if summary is None:
        return PaperCell(ours=Statistic(n=0), gap=NOT_ASKED, **known)
    if not summary.samples:
        return PaperCell(ours=Statistic(n=0), epochs=summary.cell.epochs, gap=summary.why_none, **known)
    values = {(one.fold, one.seed): one.accuracy[measure] for one in summary.samples if measure in one.accuracy}
    against = target and (target.accuracy if measure == "best_test" else target.last)
    if target is not None and target.per_fold is not None and measure == "best_test":
        values = {key: value for key, value in values.items() if 1 <= key[0] <= target.folds}
        against = mean([target.per_fold[fold - 1] for fold in sorted({fold for fold, _ in values})])
    ours = statistic(values, std, ratio=summary.ratio, folds=summary.folds)
    return PaperCell(
        ours=replace(ours, not_finite=summary.accuracy[measure].not_finite),
        gap=NOT_FINITE if not values and summary.accuracy[measure].not_finite else "",
        against=against if values else None,
        epochs=summary.cell.epochs,
        at_theirs=_within(summary, target) if measure == "best_test" else None,
        unlike=summary.comparison.unlike if summary.comparison is not None else (),
        **known,
    )


def _within(summary: CellSummary, target: Published | None) -> float | None:
    """Our best test accuracy in the first epochs, as many as the paper trained: as a cell's own, by folds."""
    if target is None or target.epochs is None or target.epochs >= summary.cell.epochs:
        return None
    best = {}
    for trial in summary.cell.trials:
        seen = [row["test_accuracy"] for row in trial.state.rows[: target.epochs]]
        if trial.state.result is not None and (finite := [one for one in seen if math.isfinite(one)]):
            best[trial.fold, trial.seed] = max(finite)
    return fold_mean(best)


def _percent(value: float | None) -> Figure:
    return Figure(None if value is None else 100 * value, percent(value))
