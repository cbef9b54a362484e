"""What is taken for what: the counts of test clips of a cell, pooled over its trials, and the tables of them.

A count is [label, predicted, clips], as helix/training/metrics.py makes it; pairs that never occur are not listed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dashboards.tables import Column, Figure, Table, as_csv
from dashboards.text import GAP, count, listing, plural, slug
from dashboards.view import CellView, SweepView

#: Up to so many classes a whole matrix can be read; above, the largest confusions are shown and the rest is in a file.
MATRIX_CLASSES = 20

#: Confusions that are shown of a data set.
TOP = 12

#: Shades of a heat table, lightest first; the style sheet has one class for each.
SHADES = 8


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """One cell: its pooled counts, `of` which epochs of how many trials they are, and the clips of each class."""

    cell: CellView
    counts: Mapping[tuple[int, int], int]
    of: str
    clips: Mapping[int, int]

    def share(self, label: int, guess: int) -> float | None:
        """How much of the clips of a class was taken for another, or for itself; None where it was never tested."""
        return self.counts.get((label, guess), 0) / self.clips[label] if self.clips.get(label) else None


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A table whose cells are shaded: rows of (text, shade from 0 to SHADES) under the headings."""

    caption: str
    corner: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]


@dataclass(frozen=True, kw_only=True)
class PerClass:
    """What a page shows of the classes of one data set; `matrices` are empty where there are too many classes."""

    confusions: Heat | None
    accuracy: Heat
    matrices: tuple[tuple[str, Heat], ...]
    classes: int
    note: str


def confusion_of(result: Mapping[str, Any]) -> tuple[list[list[int]], str]:
    """[label, predicted, count] of a result and of which epoch they are, in words.

    A result of an earlier version knows the last epoch alone.
    """
    if "selected_confusion" in result:
        return result["selected_confusion"], f"epoch {result['selected_epoch']}, the one that the protocol selects"
    return result["confusion"], "the last epoch: this result kept none of the epoch that the protocol selects"


def pooled_confusion(results: Sequence[Mapping[str, Any]]) -> tuple[list[list[int]], str]:
    """The counts of several trials together, each of its selected epoch if all have one, else each of its last."""
    selected = all("selected_confusion" in result for result in results)
    key = "selected_confusion" if selected else "confusion"
    pooled: Counter[tuple[int, int]] = Counter()
    for result in results:
        pooled.update({(label, guess): clips for label, guess, clips in result[key]})
    said = "the epoch that the protocol selects" if selected else "the last epoch"
    return [
        [*pair, clips] for pair, clips in sorted(pooled.items())
    ], f"{plural(len(results), 'trial')}, {said} of each"


def confusion_csv(triples: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """A row for each class as it is, a column for each as it was taken for; counts of test clips."""
    counts = {(label, guess): clips for label, guess, clips in triples}
    table = Table(
        name="confusion",
        caption="What is taken for what",
        columns=(Column(heading="is / taken for"), *(Column(heading=name, number=True) for name in classes)),
        rows=tuple(
            (name, *(Figure(counts.get((label, guess), 0)) for guess in range(len(classes))))
            for label, name in enumerate(classes)
        ),
    )
    return as_csv(table)


def confusions(view: SweepView, dataset: str) -> tuple[Confusion, ...]:
    """Those of the cells of a data set that have a finished trial."""
    found = []
    for cell in view.cells:
        results = [trial.state.result for trial in cell.trials if trial.state.result is not None]
        results = [result for result in results if "confusion" in result]
        if cell.dataset != dataset or not results:
            continue
        triples, of = pooled_confusion(results)
        clips: Counter[int] = Counter()
        for label, _, tested in triples:
            clips[label] += tested
        counts = {(label, guess): tested for label, guess, tested in triples}
        found.append(Confusion(cell=cell, counts=counts, of=of, clips=clips))
    return tuple(found)


def class_names(view: SweepView, dataset: str, found: Sequence[Confusion]) -> tuple[str, ...]:
    """The names of the classes by label, or their numbers where nobody knows them."""
    facts = view.facts(dataset)
    highest = max((max(pair) for one in found for pair in one.counts), default=-1)
    known = facts.class_names if facts is not None else ()
    classes = max(highest + 1, facts.classes if facts is not None else 0, len(known))
    return tuple(known[label] if label < len(known) else f"class {label}" for label in range(classes))


def per_class(view: SweepView, dataset: str) -> PerClass | None:
    """What the page shows; None before the first trial is finished."""
    found = confusions(view, dataset)
    if not found:
        return None
    names = class_names(view, dataset, found)
    small = len(names) <= MATRIX_CLASSES
    return PerClass(
        confusions=_top(found, names),
        accuracy=_accuracy(found, names),
        matrices=tuple((one.cell.variant, _matrix(one, names)) for one in found) if small else (),
        classes=len(names),
        note=_note(found),
    )


def confusion_tables(view: SweepView, dataset: str) -> tuple[Table, ...]:
    """Accuracy per class of all variants, and of each variant its matrix, or a list of pairs where that is too wide."""
    found = confusions(view, dataset)
    if not found:
        return ()
    names = class_names(view, dataset, found)
    whole = len(names) <= MATRIX_CLASSES
    return (
        _classes_table(found, names, dataset),
        *((_matrix_table if whole else _pairs_table)(one, names) for one in found),
    )


def _name(one: Confusion) -> str:
    return f"confusion-{slug(one.cell.dataset)}-{slug(one.cell.variant)}"


def _classes_table(found: Sequence[Confusion], names: Sequence[str], dataset: str) -> Table:
    return Table(
        name=f"classes-{slug(dataset)}",
        caption=f"Test accuracy per class on {dataset}, in %",
        columns=(
            Column(heading="class"),
            Column(heading="clips", number=True),
            *(Column(heading=one.cell.variant, number=True, unit="%") for one in found),
        ),
        rows=tuple(
            (
                name,
                Figure(clips := max(one.clips.get(label, 0) for one in found), count(clips)),
                *(_figure(one.share(label, label)) for one in found),
            )
            for label, name in enumerate(names)
        ),
        notes=tuple(dict.fromkeys(f"{one.cell.variant}: {one.of}." for one in found)),
    )


def _matrix_table(one: Confusion, names: Sequence[str]) -> Table:
    return Table(
        name=_name(one),
        caption=f"Confusion of {one.cell.variant} on {one.cell.dataset} in clips ({one.of})",
        columns=(
            Column(heading="is"),
            *(Column(heading=name, number=True, group="taken for") for name in names),
        ),
        rows=tuple(
            (
                name,
                *(Figure(clips := one.counts.get((label, guess), 0), str(clips)) for guess in range(len(names))),
            )
            for label, name in enumerate(names)
        ),
    )


def _pairs_table(one: Confusion, names: Sequence[str]) -> Table:
    ordered = sorted(one.counts.items(), key=lambda item: (item[0][0] == item[0][1], -item[1], item[0]))
    return Table(
        name=_name(one),
        caption=f"Confusion of {one.cell.variant} on {one.cell.dataset}, confused pairs first ({one.of})",
        columns=(
            Column(heading="is"),
            Column(heading="taken for"),
            Column(heading="clips", number=True),
            Column(heading="% of the class", number=True),
        ),
        rows=tuple(
            (names[label], names[guess], Figure(clips, str(clips)), _figure(one.share(label, guess)))
            for (label, guess), clips in ordered
        ),
    )


def _top(found: Sequence[Confusion], names: Sequence[str]) -> Heat | None:
    """The pairs that are confused most often over all variants together, with the share of the class in each."""
    total: Counter[tuple[int, int]] = Counter()
    for one in found:
        total.update({pair: clips for pair, clips in one.counts.items() if pair[0] != pair[1]})
    largest = sorted(total, key=lambda pair: (-total[pair], pair))[:TOP]
    if not largest:
        return None
    return Heat(
        caption="The largest confusions: of 100 clips of a class, how many were taken for the other.",
        corner="is, taken for",
        headings=tuple(one.cell.variant for one in found),
        rows=tuple(
            (
                f"{names[label]}, {names[guess]}",
                tuple(_shaded(one.share(label, guess), digits=0) for one in found),
            )
            for label, guess in largest
        ),
    )


def _accuracy(found: Sequence[Confusion], names: Sequence[str]) -> Heat:
    return Heat(
        caption="Test accuracy per class, in %; the darker, the more of its clips were recognised.",
        corner="class",
        headings=tuple(one.cell.variant for one in found),
        rows=tuple(
            (name, tuple(_shaded(one.share(label, label), digits=0) for one in found))
            for label, name in enumerate(names)
        ),
    )


def _matrix(one: Confusion, names: Sequence[str]) -> Heat:
    return Heat(
        caption=f"{one.cell.variant}: test clips of each class (rows) by what they were taken for (columns).",
        corner="is / taken for",
        headings=tuple(names),
        rows=tuple(
            (
                name,
                tuple(
                    (str(one.counts.get((label, guess), 0) or "\N{MIDDLE DOT}"), _shade(one.share(label, guess)))
                    for guess in range(len(names))
                ),
            )
            for label, name in enumerate(names)
        ),
    )


def _note(found: Sequence[Confusion]) -> str:
    """Of what the counts are; said once where it is the same of all variants."""
    by_words: dict[str, list[str]] = {}
    for one in found:
        by_words.setdefault(one.of, []).append(one.cell.variant)
    if len(by_words) == 1:
        return f"Test clips of {found[0].of}, for every variant that has a result."
    return f"Test clips of {'; of '.join(f'{words} ({listing(names)})' for words, names in by_words.items())}."


def _shaded(share: float | None, *, digits: int) -> tuple[str, int]:
    return (GAP if share is None else f"{100 * share:.{digits}f}", _shade(share))


def _shade(share: float | None) -> int:
    """0 for nothing, then evenly up to SHADES."""
    return 0 if not share else max(1, round(SHADES * share))


def _figure(share: float | None) -> Figure:
    return Figure(None if share is None else 100 * share, GAP if share is None else f"{100 * share:.1f}")
