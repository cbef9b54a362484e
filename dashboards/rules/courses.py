"""Rules on the course of training: where it ended, whether it was still rising, when two variants part."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dashboards.claim import Case, Judgement, Rule, less_than_the_papers
from dashboards.evidence import Evidence, Variant
from dashboards.text import plural, points
from helix.published import SMOOTHING
from helix.statistics import Key, TTest, t_test, units

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
    """Smoothed over 7 epochs, `first` is ahead of `second` after epoch `after` (to `until`), and the lead `widens`.

    `fold`: the one whose curves the paper shows; else all. Of each pair of runs the lead's mean and slope over these
    epochs count once, and t tests over the pairs judge them: it is contradicted where an interval excludes it, and
    supported where both tests show it and the mean of the pairs is ahead in each of the epochs.
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
        leads = {
            key: [one - other for one, other in zip(smooth(curves[0][key]), smooth(curves[1][key]), strict=False)][
                self.after : self.until
            ]
            for key in shared
        }
        if min(map(len, leads.values())) < SMOOTHING:
            return Judgement(verdict="no data", because=f"fewer than {SMOOTHING} epochs after epoch {self.after}")
        counts = case.evidence.counts.get(self.dataset)
        ratio = counts.ratio if counts is not None else 0.0
        ahead = _tested({key: math.fsum(lead) / len(lead) for key, lead in leads.items()}, ratio)
        widening = _tested({key: slope(lead) for key, lead in leads.items()}, ratio)
        # of pairs that trained differently long, the epochs that all of them have
        together = [math.fsum(at) / len(at) for at in zip(*leads.values(), strict=False)]
        always = all(lead > 0 for lead in together)
        told = (
            f"{_in_points(ahead)} points ahead after epoch {self.after}, in {sum(lead > 0 for lead in together)} of "
            f"{plural(len(together), 'epoch')}; the lead changes by {_in_points(widening)} points an epoch "
            f"({plural(len(leads), 'pair')})"
        )
        asked = [ahead, widening] if self.widens else [ahead]
        if any(one.high is not None and one.high < 0 for one in asked):
            return Judgement(verdict="contradicted", because=told)
        shown = always and all(one.low is not None and one.low > 0 for one in asked)
        return Judgement(verdict="supported" if shown else "underpowered", because=told)


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


def _tested(values: Mapping[Key, float], ratio: float) -> TTest:
    """The t test of values by (fold, seed), corrected by `ratio` where it is over folds."""
    sample = units(values)
    return t_test(sample.values, ratio=ratio if sample.unit == "fold" else 0.0)


def _in_points(test: TTest) -> str:
    told = test.why if test.low is None else f"95 % {points(test.low)} to {points(test.high)}"
    return f"{points(test.mean)} ({told})"
