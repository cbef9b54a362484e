"""Rules on numbers as they are printed: accuracies, sizes, tokens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dashboards.claim import Case, Judgement, OfAuthors, Rule, Verdict, no_data, share_of_folds
from dashboards.comparisons import p_shown
from dashboards.evidence import Evidence, Variant
from dashboards.text import count, listing, percent, plural, points
from helix.statistics import ALPHA, Key, TTest, deviation, equal_spreads, joined, mean, t_test, units


@dataclass(frozen=True, kw_only=True)
class Reported(Rule):
    """A cell of a table: the accuracy and, where there are folds, its spread over them (ddof 0, as the paper has it).

    `per_fold`: what the authors had on each fold. On a part of the folds their mean over the same ones is what runs
    are held against: they may exclude it, but agreement there leaves the other folds and the spread open. Both numbers
    are told by `tolerance`, and beyond it by a test of the mean difference or of equal spreads. Theirs is one seed on
    each fold, a draw like any other: the mean is held against it with its own uncertainty, the spread seed by seed.
    """

    dataset: str
    variant: Variant
    accuracy: float
    tolerance: float
    std: float | None = None
    per_fold: tuple[float, ...] | None = None
    last: bool = False

    @property
    def cells(self) -> tuple[tuple[str, Variant], ...]:
        return ((self.dataset, self.variant),)

    def judge(self, case: Case) -> Judgement:
        runs = case.evidence.runs(self.dataset, self.variant)
        if runs is not None and runs.only_claim:
            return Judgement(verdict="no data", because="one run, of which nothing is published but this number")
        given = runs.accuracy.get("last" if self.last else "best_test") if runs is not None else None
        if runs is None or not given:
            return no_data(case, self.cells)
        if runs.rerun and not self.last:  # a number is no evidence of itself
            given = runs.rerun
        if runs.other_course or runs.other_practice:
            return Judgement(verdict="no data", because=f"no runs like the paper's: {'; '.join(runs.unlike)}")
        sample, folds = units(given), sorted({fold for fold, _ in given})
        centre = mean(sample.values)
        assert centre is not None
        told = f"{percent(centre)} % over {plural(len(sample.values), sample.unit)}"
        counts = case.evidence.counts.get(self.dataset)
        ratio = counts.ratio or 0.0 if counts is not None and sample.unit == "fold" else 0.0
        test = self._test(given, ratio, folds=counts.folds if counts is not None else 1)
        share = share_of_folds(case.evidence, self.dataset, len(folds))
        if not share:
            return self._spread(given, self._mean(test, centre - self.accuracy, told))
        if self.per_fold is None or len(folds) == 1:
            return Judgement(verdict="underpowered", because=f"{told}, {share}")
        theirs = mean([self.per_fold[fold - 1] for fold in folds])
        assert theirs is not None
        found = self._mean(test, centre - theirs, f"{told}, {share}; theirs on these {percent(theirs)} %")
        return replace(found, verdict="underpowered") if found.verdict == "supported" else found

    def _test(self, given: Mapping[Key, float], ratio: float, *, folds: int) -> TTest:
        """The test of no difference from theirs: paired where their folds are known, and else with their own error.

        That is the printed spread over `folds`, or where none is printed that of one seed of ours, as if theirs had it.
        """
        sample = units(given)
        if self.per_fold is not None and sample.unit == "fold":
            paired = units({(fold, seed): value - self.per_fold[fold - 1] for (fold, seed), value in given.items()})
            return t_test(paired.values, ratio=ratio)
        if self.std is not None and folds > 1:
            variance = self.std**2 * folds / (folds - 1)
        else:
            seeds = [sample.values] if sample.unit == "seed" else by_seed(given)
            variance = _mean_variance(seeds, ddof=1) or 0.0
        return t_test([value - self.accuracy for value in sample.values], ratio=ratio, other=variance / folds)

    def _mean(self, test: TTest, off: float, told: str) -> Judgement:
        """What the mean says of theirs, from which it is `off`."""
        if abs(off) <= self.tolerance:
            return Judgement(verdict="supported", because=told)
        told += f": off by {points(off)}"
        if test.low is None or test.high is None:
            return Judgement(verdict="underpowered", because=f"{told}; {test.why}")
        if test.low <= 0 <= test.high:
            return Judgement(verdict="underpowered", because=f"{told}, and inside the interval")
        return Judgement(verdict="contradicted", because=told)

    def _spread(self, given: Mapping[Key, float], found: Judgement) -> Judgement:
        """The judgement on the mean over all folds, with what the spread of one seed over them says of the printed one.

        Means over several seeds spread less than one seed does, and theirs is one.
        """
        if self.std is None:
            return found
        seeds = by_seed(given)
        population, sample = (_mean_variance(seeds, ddof=ddof) for ddof in (0, 1))
        if population is None or sample is None:
            why = f"{found.because}; no seed has all folds, so that their spread is not known"
            return Judgement(verdict=_left_open(found), because=why)
        spread = math.sqrt(population)
        each = f" of one seed, over {plural(len(seeds), 'seed')}" if len(seeds) > 1 else ""
        told = f"{found.because}; std {percent(spread)}{each} (divided by n; {percent(math.sqrt(sample))} by n - 1)"
        if abs(spread - self.std) <= self.tolerance:
            return replace(found, because=told)
        told += f", off by {points(spread - self.std)}"
        theirs = self.per_fold or ()
        ps = [equal_spreads(values, theirs) for values in seeds if len(values) == len(theirs)]
        p = joined([p for p in ps if p is not None])
        if p is not None:
            told += f": p {p_shown(p)} for a spread like theirs on the same folds"
        if p is not None and p < ALPHA:
            return Judgement(verdict="contradicted", because=told)
        return Judgement(verdict=_left_open(found), because=told)


@dataclass(frozen=True, kw_only=True)
class Size(OfAuthors):
    """Every cell has about `parameters`, within the share `tolerance`."""

    parameters: int
    tolerance: float

    def published(self, evidence: Evidence) -> Judgement:
        sizes = sorted({runs.parameters for runs in evidence.cells.values() if runs.parameters})
        if not sizes:
            return Judgement(verdict="no data", because="the models were not counted")
        told = (
            f"{count(sizes[0])} to {count(sizes[-1])} parameters" if len(sizes) > 1 else f"{count(sizes[0])} parameters"
        )
        off = [size for size in sizes if abs(size / self.parameters - 1) > self.tolerance]
        return Judgement(verdict="contradicted" if off else "supported", because=told)


@dataclass(frozen=True, kw_only=True)
class Matched(OfAuthors):
    """On each data set the largest model is at most the share `band` larger than the smallest of the same frontends."""

    band: float
    within_frontend: bool

    def published(self, evidence: Evidence) -> Judgement:
        groups: dict[tuple[str, str], list[int]] = {}
        for runs in evidence.cells.values():
            if runs.parameters:
                group = runs.dataset, runs.frontend if self.within_frontend else ""
                groups.setdefault(group, []).append(runs.parameters)
        worst = max(
            ((max(sizes) / min(sizes) - 1, group) for group, sizes in groups.items() if len(sizes) > 1), default=None
        )
        if worst is None:
            return Judgement(verdict="no data", because="no two models to compare")
        share, (dataset, frontend) = worst
        told = f"at most {100 * share:.3f} % apart, on {dataset}{' ' + frontend if frontend else ''}"
        return Judgement(verdict="supported" if share <= self.band else "contradicted", because=told)


@dataclass(frozen=True, kw_only=True)
class Tokens(OfAuthors):
    """A clip of `dataset` is so many tokens by that frontend, within the share `tolerance`."""

    dataset: str
    frontend: str
    tokens: int
    tolerance: float = 0.0

    def published(self, evidence: Evidence) -> Judgement:
        seen = evidence.tokens.get((self.dataset, self.frontend))
        if seen is None:
            return Judgement(verdict="no data", because=f"no {self.frontend} clip of {self.dataset} was counted")
        off = abs(seen / self.tokens - 1)
        told = f"{count(seen)} tokens" + (f", {100 * off:.0f} % off" if seen != self.tokens else "")
        return Judgement(verdict="supported" if off <= self.tolerance else "contradicted", because=told)


@dataclass(frozen=True, kw_only=True)
class Shortens(OfAuthors):
    """A mel clip of `dataset` has `times` fewer tokens than a raw one, or fewer still."""

    dataset: str
    times: float

    def published(self, evidence: Evidence) -> Judgement:
        raw, mel = (evidence.tokens.get((self.dataset, frontend)) for frontend in ("raw", "mel"))
        if raw is None or mel is None:
            return Judgement(verdict="no data", because=f"no raw and mel clip of {self.dataset} were counted")
        told = f"{count(raw)} against {count(mel)} tokens, {raw / mel:.1f} times fewer"
        return Judgement(verdict="supported" if raw / mel > self.times else "contradicted", because=told)


@dataclass(frozen=True, kw_only=True)
class Prints(OfAuthors):
    """The paper prints an accuracy of each of these data sets, with `folds` one over its folds."""

    datasets: tuple[str, ...]
    folds: bool = False

    def published(self, evidence: Evidence) -> Judgement:
        printed = {name: self._accuracies(evidence, name) for name in self.datasets}
        told = listing([f"{found} of {name}" for name, found in printed.items() if found])
        absent = [name for name, found in printed.items() if not found]
        if not absent:
            return Judgement(verdict="supported", because=f"accuracies: {told}")
        return Judgement(
            verdict="contradicted", because=f"no accuracy of {listing(absent)}" + (f"; {told}" if told else "")
        )

    def _accuracies(self, evidence: Evidence, dataset: str) -> int:
        """How many variants have one."""
        known = [
            runs.accuracy["best_test"] for runs in evidence.cells.values() if runs.dataset == dataset and runs.accuracy
        ]
        return sum(not self.folds or len({fold for fold, _ in given}) > 1 for given in known)


def by_seed(given: Mapping[Key, float]) -> list[list[float]]:
    """The accuracies by fold of each seed that has them on all folds that any seed has."""
    folds = sorted({fold for fold, _ in given})
    seeds = sorted({seed for _, seed in given})
    return [[given[fold, seed] for fold in folds] for seed in seeds if all((fold, seed) in given for fold in folds)]


def _mean_variance(seeds: Sequence[Sequence[float]], *, ddof: Literal[0, 1]) -> float | None:
    """The mean over seeds of the variance of each; None where none has two values."""
    return mean([std**2 for values in seeds if (std := deviation(values, ddof=ddof)) is not None])


def _left_open(found: Judgement) -> Verdict:
    """The verdict where the spread shows nothing: what the mean excludes stays excluded."""
    return "underpowered" if found.verdict == "supported" else found.verdict
