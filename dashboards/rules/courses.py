"""Rules on the course of training: where it ended, whether it was still rising, when two variants part."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dashboards.claim import Case, Judgement, Rule, less_than_the_papers
from dashboards.evidence import Evidence, Variant
from dashboards.text import plural, points
from helix.published import SMOOTHING

NO_LAST = "the accuracy after the last epoch is not known of all of these runs, as long as the paper's"


@dataclass(frozen=True, kw_only=True)
class Converged(Rule):
    """None of the cells ended more than `within` below its own best epoch."""

    of: tuple[tuple[str, Variant], ...]
    within: float

    @property
    def cells(self) -> tuple[tuple[str, Variant], ...]:
        return self.of

    def judge(self, case: Case) -> Judgement:
        drops = _drops(case.evidence, self.of)
        if not drops:
            return Judgement(verdict="no data", because=NO_LAST)
        worst = max(drops, key=lambda name: drops[name])
        told = f"{worst} ends {points(drops[worst]).lstrip('+')} points below its best epoch"
        if drops[worst] > self.within:
            return Judgement(verdict="contradicted", because=told)
        if len(drops) < len(self.of):
            return Judgement(verdict="no data", because=f"{NO_LAST}; {told}")
        return Judgement(verdict="supported", because=f"at most: {told}")


@dataclass(frozen=True, kw_only=True)
class Collapses(Rule):
    """The cell leaves its best epoch after epoch `after` and ends, smoothed over 7 epochs, at least `by` below it.

    Without its curve nobody can tell when, nor that it did not come back; one that ends near its best did not collapse.
    """

    dataset: str
    variant: Variant
    by: float
    after: int

    @property
    def cells(self) -> tuple[tuple[str, Variant], ...]:
        return ((self.dataset, self.variant),)

    def judge(self, case: Case) -> Judgement:
        drops = _drops(case.evidence, self.cells)
        runs = case.evidence.runs(self.dataset, self.variant)
        if not drops or runs is None:
            return Judgement(verdict="no data", because=NO_LAST)
        told = f"it ends {points(next(iter(drops.values()))).lstrip('+')} points below its best epoch"
        if next(iter(drops.values())) < self.by:
            return Judgement(verdict="contradicted", because=told)
        if not runs.curves:
            return Judgement(verdict="no data", because=f"{told}; when it fell, and for how long, is not published")
        for curve in runs.curves.values():
            best = curve.index(max(curve)) + 1
            if best > self.after + SMOOTHING:
                why = f"its best epoch came after epoch {self.after}"
                return Judgement(verdict="contradicted", because=f"{told}, but {why}")
            near = [epoch for epoch, value in enumerate(smooth(curve), 1) if max(curve) - value < self.by]
            # a best epoch that stands alone is near none of the smoothed ones
            left = max(near, default=best)
            if left == len(curve):
                return Judgement(verdict="contradicted", because=f"{told}, but by its last epoch alone")
            if left < self.after - SMOOTHING:
                return Judgement(verdict="contradicted", because=f"{told}, but fell by epoch {left + 1} already")
        return Judgement(verdict="supported", because=told)


@dataclass(frozen=True, kw_only=True)
class PullsAway(Rule):
    """Smoothed over 7 epochs, `first` is ahead in every epoch after `after` (to `until`), and the lead `widens`.

    `fold`: the one whose curves the paper shows; else all. One pair of runs alone shows nothing.
    """

    dataset: str
    first: Variant
    second: Variant
    after: int
    fold: int | None = None
    until: int | None = None
    widens: bool = True

    @property
    def cells(self) -> tuple[tuple[str, Variant], ...]:
        return (self.dataset, self.first), (self.dataset, self.second)

    def judge(self, case: Case) -> Judgement:
        sides = [case.evidence.runs(self.dataset, variant) for variant in (self.first, self.second)]
        curves = [runs.curves for runs in sides if runs is not None]
        both = sorted(set(curves[0]) & set(curves[1])) if len(curves) == 2 else []
        shared = [(fold, seed) for fold, seed in both if self.fold in (None, fold)]
        if not shared:
            where = f" on fold {self.fold}" if self.fold else ""
            return Judgement(verdict="no data", because=f"no accuracy by epoch of both is there{where}")
        less = less_than_the_papers(case, self.cells)
        if less is not None:
            return less
        leads = [
            [one - other for one, other in zip(smooth(curves[0][key]), smooth(curves[1][key]), strict=False)][
                self.after : self.until
            ]
            for key in shared
        ]
        if min(map(len, leads)) < SMOOTHING:
            return Judgement(verdict="no data", because=f"fewer than {SMOOTHING} epochs after epoch {self.after}")
        behind = sum(lead <= 0 for run in leads for lead in run)
        slopes = [slope(run) for run in leads]
        told = (
            f"ahead in {sum(map(len, leads)) - behind} of {sum(map(len, leads))} epochs after {self.after}, the lead "
            f"changes by {points(math.fsum(slopes) / len(slopes))} points an epoch ({plural(len(leads), 'pair')})"
        )
        if len(leads) == 1:
            return Judgement(verdict="underpowered", because=told)
        if behind or (self.widens and max(slopes) <= 0):
            return Judgement(verdict="contradicted", because=told)
        if self.widens and min(slopes) <= 0:
            return Judgement(verdict="underpowered", because=told)
        return Judgement(verdict="supported", because=told)


@dataclass(frozen=True, kw_only=True)
class StillRising(Rule):
    """Smoothed over 7 epochs, every cell was still rising over the last third of its epochs."""

    of: tuple[tuple[str, Variant], ...]
    at_least: float = 0.0005

    @property
    def cells(self) -> tuple[tuple[str, Variant], ...]:
        return self.of

    def judge(self, case: Case) -> Judgement:
        found = [case.evidence.runs(dataset, variant) for dataset, variant in self.of]
        if any(runs is None or runs.other_course or not runs.curves for runs in found):
            drops = _drops(case.evidence, self.of)
            told = ", ".join(f"{name} ends {points(drop).lstrip('+')} below its best" for name, drop in drops.items())
            why = "no accuracy by epoch of such runs is there" + (f"; {told}" if told else "")
            return Judgement(verdict="no data", because=why)
        curves = [curve for runs in found if runs is not None for curve in runs.curves.values()]
        ends = [slope(smooth(curve)[-max(len(curve) // 3, 3) :]) for curve in curves]
        told = f"the last third rises by {points(min(ends), 3)} to {points(max(ends), 3)} points an epoch"
        return Judgement(verdict="supported" if min(ends) >= self.at_least else "contradicted", because=told)


def smooth(curve: Sequence[float], width: int = SMOOTHING) -> list[float]:
    """The moving average over up to `width` epochs around each; at both ends over those that are there."""
    half = width // 2
    windows = [curve[max(at - half, 0) : at + half + 1] for at in range(len(curve))]
    return [math.fsum(window) / len(window) for window in windows]


def slope(values: Sequence[float]) -> float:
    """The least-squares slope per step; 0 for fewer than two values."""
    n = len(values)
    if n < 2:
        return 0.0
    centre, middle = math.fsum(values) / n, (n - 1) / 2
    return math.fsum((at - middle) * (value - centre) for at, value in enumerate(values)) / (n * (n * n - 1) / 12)


def _drops(evidence: Evidence, cells: Sequence[tuple[str, Variant]]) -> dict[str, float]:
    """How far below its best epoch each cell ended, where that is known of runs as long and large as the paper's."""
    found = [evidence.runs(dataset, variant) for dataset, variant in cells]
    return {
        f"{runs.backbone} {runs.frontend} on {runs.dataset}": runs.drop
        for runs in found
        if runs is not None and runs.drop is not None and not runs.other_course
    }
