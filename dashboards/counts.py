"""How much there is of a data set, run or not: classes, recordings, folds, and how far its folds overlap."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dashboards.view import SweepView
from helix.registry import DATASETS
from helix.statistics import mean, units


@dataclass(frozen=True, kw_only=True)
class Counts:
    """A data set by its own documentation. `ratio`: test clips over training clips, the mean over its folds.

    The ratio corrects every interval and test over folds, as Nadeau and Bengio do; one fold has 0.
    """

    classes: int
    recordings: int | None
    folds: int
    ratio: float


def official(dataset: str, options: Mapping[str, Any] | None = None) -> Counts:
    """The counts of the complete data set as its member in helix/data/datasets says them, with its own `options`."""
    member = DATASETS.make(dataset, options)
    per_fold, folds = member.expected_per_fold, member.folds
    recordings = member.expected_recordings
    known = unknown(len(folds), classes=member.class_count)
    if not recordings or len(folds) < 2:
        return replace(known, recordings=recordings)
    ratio = math.fsum(per_fold[fold] / (recordings - per_fold[fold]) for fold in folds) / len(folds)
    return replace(known, recordings=recordings, ratio=ratio)


def unknown(folds: int, *, classes: int = 0) -> Counts:
    """Of a data set of unknown size: equal folds are the best guess."""
    return Counts(classes=classes, recordings=None, folds=folds, ratio=1 / (folds - 1) if folds > 1 else 0.0)


def counts_of(view: SweepView) -> dict[str, Counts]:
    """Each data set of a view; the ratio is that of its finished trials, where they tell it."""
    found = {}
    for dataset in dict.fromkeys(cell.dataset for cell in view.cells):
        cells = [cell for cell in view.cells if cell.dataset == dataset]
        if dataset in DATASETS.names():
            known = official(dataset, cells[0].options)
        else:
            facts = view.facts(dataset)
            folds = {trial.fold for cell in cells for trial in cell.trials}
            known = unknown(len(folds), classes=facts.classes if facts else 0)
        seen = overlap((trial.fold, trial.state.result or {}) for cell in cells for trial in cell.trials)
        found[dataset] = known if seen is None or known.folds < 2 else replace(known, ratio=seen)
    return found


def overlap(results: Iterable[tuple[int, Mapping[str, Any]]]) -> float | None:
    """Test clips over training clips by (fold, result), the mean over folds; None where no result tells."""
    ratios = {
        (fold, at): result["test_clips"] / result["train_clips"]
        for at, (fold, result) in enumerate(results)
        if result.get("train_clips") and result.get("test_clips")
    }
    return mean(units(ratios).values)
