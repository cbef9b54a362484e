"""Rules on differences between variants: by the corrected t test, adjusted for the family, over folds or seeds."""

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dashboards.claim import (
    Case,
    Judgement,
    Rule,
    Verdict,
    lacking,
    less_than_the_papers,
    no_data,
    share_of_folds,
)
from dashboards.comparisons import Contrast, Measured, difference, interaction, p_shown
from dashboards.evidence import Variant
from dashboards.text import points
from helix.statistics import ALPHA

#: Which verdict on a part is that on the whole: the first of these that any part has.
DECISIVE: tuple[Verdict, ...] = ("contradicted", "no data", "underpowered", "supported")


@dataclass(frozen=True, kw_only=True)
class _Pair(Rule):
    """A rule on two variants of one data set."""

    dataset: str
    first: Variant
    second: Variant

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        return (difference(self.dataset, self.first, self.second),)

    @property
    def cells(self) -> tuple[tuple[str, Variant], ...]:
        return (self.dataset, self.first), (self.dataset, self.second)

    def judge(self, case: Case) -> Judgement:
        found = case.numbers.get(self.contrasts[0])
        if found is None:
            return no_data(case, self.cells)
        return less_than_the_papers(case, self.cells) or _of_all_folds(case, [found], self.of(found))

    @abstractmethod
    def of(self, found: Measured) -> Judgement:
        """What the measured difference says of the claim."""


@dataclass(frozen=True, kw_only=True)
class Better(_Pair):
    """`first` is more accurate, where the paper says so `by` (within `tolerance`) or by `at_least` so much.

    The sign is told by Holm's p. A size is excluded by the interval of the family; `by` is missed by the mean, and
    `at_least` is shown where the whole interval is above it.
    """

    by: float | None = None
    tolerance: float = 0.01
    at_least: float | None = None

    def of(self, found: Measured) -> Judgement:
        direction = _direction(found)
        if found.low is None or found.high is None:
            return direction
        if self.by is not None:
            return _sized(found, self.by, self.tolerance)
        if self.at_least is not None and found.high < self.at_least:
            excludes = f"{_family(found)}, excludes {points(self.at_least, 1)}: {_told(found)}"
            return _judged("contradicted", excludes, found)
        if direction.verdict == "supported" and self.at_least is not None and found.low < self.at_least:
            shown = (
                f"a difference is shown, its size is not: {_family(found)}, has less than {points(self.at_least, 1)}"
            )
            return _judged("underpowered", f"{shown} as well; {_told(found)}", found)
        return direction


@dataclass(frozen=True, kw_only=True)
class Level(_Pair):
    """The two differ by less than `within`: the interval of the family decides, for a large p shows no equality."""

    within: float

    def of(self, found: Measured) -> Judgement:
        if found.low is None or found.high is None:
            return _judged("underpowered", f"{_told(found)}; {found.corrected.why}", found)
        told = f"of at most {100 * self.within:g} points either way; {_told(found)}"
        if _inside(found, self.within):
            return _judged("supported", f"{_family(found)}, lies inside that {told}", found)
        if found.high < -self.within or found.low > self.within:
            return _judged("contradicted", f"{_family(found)}, lies outside that {told}", found)
        return _judged("underpowered", f"{_family(found)}, is wider than that {told}", found)


@dataclass(frozen=True, kw_only=True)
class Depends(Rule):
    """The gain by `frontends[0]` over `frontends[1]` is not the same with both backbones: one interaction, two-sided.

    An interaction that is shown to be of at most `within`, a bound of ours, is none. With `by` it is of that size
    (within `tolerance`), larger with `backbones[0]`.
    """

    dataset: str
    frontends: tuple[str, str]
    backbones: tuple[str, str]
    within: float = 0.01
    by: float | None = None
    tolerance: float = 0.01

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        return (interaction(self.dataset, self.frontends, self.backbones),)

    @property
    def cells(self) -> tuple[tuple[str, Variant], ...]:
        return tuple((self.dataset, (frontend, backbone)) for frontend in self.frontends for backbone in self.backbones)

    def judge(self, case: Case) -> Judgement:
        found = case.numbers.get(self.contrasts[0])
        if found is None:
            return no_data(case, self.cells)
        return less_than_the_papers(case, self.cells) or _of_all_folds(case, [found], self._of(found))

    def _of(self, found: Measured) -> Judgement:
        direction = _direction(found)
        if self.by is not None and found.low is not None:
            return _sized(found, self.by, self.tolerance)
        if self.by is None and direction.verdict == "contradicted":
            return _judged("supported", direction.because, found)
        if direction.verdict == "underpowered" and _inside(found, self.within):
            told = f"{_family(found)}, shows at most {100 * self.within:g} points either way: {_told(found)}"
            return _judged("contradicted", told, found)
        return direction


@dataclass(frozen=True, kw_only=True)
class Flips(Rule):
    """Which of two frontends is better depends on the backbone: one of them gains by the one, another by the other."""

    dataset: str
    frontends: tuple[str, str]
    backbones: tuple[str, ...]

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        first, second = self.frontends
        return tuple(difference(self.dataset, (first, one), (second, one)) for one in self.backbones)

    @property
    def cells(self) -> tuple[tuple[str, Variant], ...]:
        return tuple((self.dataset, (frontend, backbone)) for backbone in self.backbones for frontend in self.frontends)

    def judge(self, case: Case) -> Judgement:
        found = [case.numbers[one] for one in self.contrasts if one in case.numbers]
        if len(found) < len(self.contrasts):
            return no_data(case, self.cells)
        return less_than_the_papers(case, self.cells) or _of_all_folds(case, found, self._of(found))

    def _of(self, found: Sequence[Measured]) -> Judgement:
        directions = [_direction(one) for one in found]
        told = "; ".join(one.because for one in directions)
        verdicts = {one.verdict for one in directions}
        if {"supported", "contradicted"} <= verdicts:
            return Judgement(verdict="supported", because=told)
        if "underpowered" not in verdicts:
            better = self.frontends[0 if verdicts == {"supported"} else 1]
            return Judgement(verdict="contradicted", because=f"{better} is better with each backbone: {told}")
        return Judgement(verdict="underpowered", because=told)


@dataclass(frozen=True, kw_only=True)
class Grows(Rule):
    """The lead of `first` over `second` grows from each data set, shorter clips first, to the next."""

    datasets: tuple[str, ...]
    first: Variant
    second: Variant

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        return tuple(difference(dataset, self.first, self.second) for dataset in self.datasets)

    @property
    def cells(self) -> tuple[tuple[str, Variant], ...]:
        return tuple((dataset, variant) for dataset in self.datasets for variant in (self.first, self.second))

    def judge(self, case: Case) -> Judgement:
        found = [case.numbers[one] for one in self.contrasts if one in case.numbers]
        told = ", ".join(f"{points(one.mean)} on {one.contrast.dataset} ({one.counted})" for one in found)
        if len(found) < len(self.datasets):
            return Judgement(
                verdict="no data", because=lacking(case, self.cells) + (f"; so far {told}" if told else "")
            )
        return less_than_the_papers(case, self.cells) or _of_all_folds(case, found, self._of(found, told))

    def _of(self, found: Sequence[Measured], told: str) -> Judgement:
        steps = list(itertools.pairwise(found))
        if any(_below(later, earlier) for earlier, later in steps):
            return Judgement(
                verdict="contradicted", because=f"it shrinks on the way by more than both intervals: {told}"
            )
        if all(_below(earlier, later) for earlier, later in steps):
            return Judgement(verdict="supported", because=f"each step is beyond both intervals: {told}")
        order = "in this order" if all(one.mean < two.mean for one, two in steps) else "not in this order"
        return Judgement(verdict="underpowered", because=f"the means are {order}, the intervals do not part: {told}")


@dataclass(frozen=True)
class All(Rule):
    """Every part has to hold: contradicted by one part, without data or underpowered where one part is."""

    rules: tuple[Rule, ...]

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        return tuple(one for rule in self.rules for one in rule.contrasts)

    @property
    def cells(self) -> tuple[tuple[str, Variant], ...]:
        return tuple(dict.fromkeys(cell for rule in self.rules for cell in rule.cells))

    def judge(self, case: Case) -> Judgement:
        parts = [rule.judge(case) for rule in self.rules]
        verdict: Verdict = next(one for one in DECISIVE if any(part.verdict == one for part in parts))
        # What decides comes first; a part that says the same as another says it once.
        decisive = dict.fromkeys(part.because for part in parts if part.verdict == verdict)
        others = dict.fromkeys(f"{part.because} ({part.verdict})" for part in parts if part.verdict != verdict)
        return Judgement(verdict=verdict, because="; ".join([*decisive, *others]))


def _of_all_folds(case: Case, found: Sequence[Measured], judged: Judgement) -> Judgement:
    """The judgement, if what it rests on is on all folds; on a part of them it is open, whatever that part shows."""
    shares = [
        share_of_folds(case.evidence, one.contrast.dataset, one.paired.n if one.units.unit == "fold" else 1)
        for one in found
    ]
    told = "; ".join(dict.fromkeys(one for one in shares if one))
    return replace(judged, verdict="underpowered", because=f"{told}: {judged.because}") if told else judged


def _below(one: Measured, other: Measured) -> bool:
    """Whether the whole interval of the one lies below that of the other."""
    return one.high is not None and other.low is not None and one.high < other.low


def _judged(verdict: Verdict, because: str, found: Measured) -> Judgement:
    return Judgement(verdict=verdict, because=because, measured=found)


def _direction(found: Measured) -> Judgement:
    """Whether the contrast is above 0, below 0, or neither can be said."""
    said = _told(found)
    if found.p_holm is None:
        return _judged("underpowered", f"{said}; {found.corrected.why}", found)
    if found.p_holm < ALPHA:
        return _judged("supported" if found.mean > 0 else "contradicted", said, found)
    return _judged("underpowered", said, found)


def _sized(found: Measured, by: float, tolerance: float) -> Judgement:
    """Whether the contrast, which has an interval, is above 0 and `by` so much."""
    assert found.low is not None and found.high is not None
    direction = _direction(found)
    if not (found.low <= by + tolerance and by - tolerance <= found.high):
        return _judged("contradicted", f"{_family(found)}, excludes {points(by, 1)}: {_told(found)}", found)
    if direction.verdict == "supported" and abs(found.mean - by) > tolerance:
        return _judged("underpowered", f"above 0, not by {points(by, 1)}: {_told(found)}", found)
    return direction


def _inside(found: Measured, within: float) -> bool:
    """Whether the interval of the family lies in that band around 0."""
    return found.low is not None and found.high is not None and -within <= found.low and found.high <= within


def _family(found: Measured) -> str:
    return f"{points(found.low, 1)} to {points(found.high, 1)}, the interval of the family"


def _told(found: Measured) -> str:
    one = found.corrected
    said = f"{found.contrast.name} on {found.contrast.dataset}: {points(found.mean)} points ({found.counted}"
    if one.p is not None:
        said += f", 95 % {points(one.low, 1)} to {points(one.high, 1)}, p {p_shown(one.p)}"
        said += f", Holm {p_shown(found.p_holm)} of {found.family}" if found.family > 1 else ""
    if found.clip_errors is not None:
        said += f", {abs(found.clip_errors):.1f} standard errors of the test clips alone"
    return said + ")"
