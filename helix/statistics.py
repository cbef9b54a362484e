"""Is a difference real? Statistics of paired differences over folds and seeds.

A difference is taken between variants on one fold and one seed. The unit of every test is the fold: seeds of one fold
share its training and test clips, so they are averaged first. Where there is one fold, as on an official split, the
unit is the seed, and then nothing is said of other test clips. What cannot be computed is None, and `why` says why.
A value that is not finite is no measurement: every function here refuses it, and the caller leaves it out and says so.

Sources: Nadeau and Bengio 2003, doi 10.1023/A:1024068626366 (corrected resampled t); Holm 1979 (the family); Hedges
1981, doi 10.3102/10769986006002107 (small-sample correction); Efron 1987, doi 10.1080/01621459.1987.10478410 (BCa).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

#: (fold, seed)
Key = tuple[int, int]

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8

#: Up to so many units every choice of signs is counted; above, `DRAWS` of them are drawn with a fixed seed.
EXACT_UNITS = 20
DRAWS = 200_000

RESAMPLES = 9_999

#: A number of folds or seeds beyond this is as good as none.
MOST = 1_000


@dataclass(frozen=True, kw_only=True)
class Units:
    """Paired differences ready to be tested: one value a unit. `unpaired` counts the (fold, seed) that not all have."""

    unit: Literal["fold", "seed"]
    values: tuple[float, ...]
    unpaired: int = 0


@dataclass(frozen=True, kw_only=True)
class TTest:
    """A two-sided one-sample t test of mean 0 with its interval. `std` has ddof 1."""

    n: int
    mean: float | None = None
    std: float | None = None
    t: float | None = None
    p: float | None = None
    low: float | None = None
    high: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class SignFlip:
    """The two-sided sign-flip test of mean 0. `smallest` is the least p that so many units could give."""

    n: int
    p: float | None = None
    smallest: float = 1.0
    exact: bool = True
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Interval:
    low: float | None = None
    high: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """`d_z`: mean over standard deviation (ddof 1) of the differences. `g`: the same without its small-sample bias.

    `superiority`: the share of units in which the first is ahead; a tie counts half.
    """

    d_z: float | None = None
    g: float | None = None
    superiority: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Components:
    """Variance of the differences between folds and, within a fold, between seeds. None: these data cannot tell."""

    fold: float | None = None
    seed: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What would settle an open comparison with a power of 80 %, were the observed effect the true one.

    `folds` in all with `seeds` on each of them. None: no number would, or none can be told; `said` says which.
    `supposed`: it is enough only if seeds make all of the spread, which one seed a fold cannot show.
    """

    settled: bool = False
    folds: int | None = None
    seeds: int | None = None
    supposed: bool = False
    said: str = ""


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing. ValueError: a value is not finite."""
    _finite(values)
    return math.fsum(values) / len(values) if values else None


def deviation(values: Sequence[float], *, ddof: Literal[0, 1]) -> float | None:
    """The standard deviation, divided by n - `ddof`; None below two values, which have no spread."""
    _finite(values)
    n = len(values)
    if n < 2:
        return None
    centre = math.fsum(values) / n
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (n - ddof))


def contrast(terms: Sequence[tuple[Mapping[Key, float], float]]) -> tuple[dict[Key, float], int]:
    """The weighted sum of several cells on every (fold, seed) that all of them have, and how many not all have.

    Sums are rounded to 1e-12: accuracies are no finer, and 0.55 - 0.5 - 0.35 + 0.3, a tie, would else be 5e-17.
    """
    shared = set.intersection(*(set(cell) for cell, _ in terms)) if terms else set()
    some = set().union(*(set(cell) for cell, _ in terms))
    sums = {key: math.fsum(weight * cell[key] for cell, weight in terms) for key in sorted(shared)}
    return {key: round(value, 12) + 0.0 for key, value in sums.items()}, len(some - shared)


def units(differences: Mapping[Key, float], unpaired: int = 0) -> Units:
    """One value a fold, the mean over its seeds; where there is but one fold, one value a seed.

    ValueError: a value is not finite.
    """
    _finite(tuple(differences.values()))
    by_fold: dict[int, list[float]] = {}
    for (fold, _), value in sorted(differences.items()):
        by_fold.setdefault(fold, []).append(value)
    if len(by_fold) == 1:
        return Units(unit="seed", values=tuple(next(iter(by_fold.values()))), unpaired=unpaired)
    values = tuple(math.fsum(found) / len(found) for found in by_fold.values())
    return Units(unit="fold", values=values, unpaired=unpaired)


def t_test(values: Sequence[float], *, ratio: float = 0.0, other: float = 0.0, confidence: float = CONFIDENCE) -> TTest:
    """Student's t test of mean 0, by `ratio` (test clips over training clips) corrected as Nadeau and Bengio do.

    Folds share most of their training clips, so their differences are not independent and the variance of their mean is
    s^2 (1 / n + ratio) rather than s^2 / n. A ratio of 0 is the plain paired t test. `other`: the variance of a number
    that the mean is held against, which widens the interval; the degrees of freedom stay n - 1, Welch's at their least.
    """
    if ratio < 0 or other < 0 or not 0 < confidence < 1:
        given = f"ratio is {ratio}, other {other} and confidence {confidence}"
        raise ValueError(f"{given}; wanted 0 or more, 0 or more, and between 0 and 1")
    n, centre, std = len(values), mean(values), deviation(values, ddof=1)
    if centre is None or std is None:
        return TTest(n=n, mean=centre, why="one value shows no spread" if n else "nothing is paired")
    if _flat(values):
        return TTest(
            n=n, mean=centre, std=0.0, why=f"all {n} values are the same, so there is no spread to test against"
        )
    error = math.sqrt(std**2 * (1 / n + ratio) + other)
    margin = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(centre) / error, n - 1))
    return TTest(n=n, mean=centre, std=std, t=centre / error, p=p, low=centre - margin, high=centre + margin)


def smallest_p(n: int) -> float:
    """The smallest two-sided p that an exact sign-flip test over this many units can give: 2 / 2^n."""
    return min(1.0, 2.0 ** (1 - n))


def sign_flip(values: Sequence[float], *, seed: int = 0, exact_units: int = EXACT_UNITS) -> SignFlip:
    """The share of all 2^n choices of signs whose sum is as far from 0 as the one seen.

    Above `exact_units` it is estimated by (b + 1) / (m + 1) from m = 200,000 choices drawn with `seed`.
    """
    _finite(values)
    n = len(values)
    if n == 0:
        return SignFlip(n=0, why="nothing is paired")
    given = np.asarray(values, dtype=np.float64)
    # Sums that are equal on paper differ in their last bits by the order in which they were added.
    seen = abs(math.fsum(values)) - 1e-12 * float(np.abs(given).sum())
    if n <= exact_units:
        sums = given[:1]  # the other sign of the first value mirrors all of it
        for value in given[1:]:
            sums = np.concatenate([sums + value, sums - value])
        return SignFlip(n=n, p=float(np.mean(np.abs(sums) >= seen)), smallest=smallest_p(n))
    rng = np.random.default_rng(seed)
    beyond = 0
    for _ in range(DRAWS // 1_000):
        signs = rng.integers(0, 2, size=(1_000, n), dtype=np.int8) * 2.0 - 1.0
        beyond += int(np.count_nonzero(np.abs(signs @ given) >= seen))
    return SignFlip(n=n, p=(beyond + 1) / (DRAWS + 1), smallest=1 / (DRAWS + 1), exact=False)


def bootstrap(
    values: Sequence[float],
    *,
    method: Literal["percentile", "BCa"] = "BCa",
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """The bootstrap interval of the mean over 9,999 resamples of the units. Of few units it is too narrow."""
    _finite(values)
    if len(values) < 2:
        return Interval(why="one value cannot be resampled" if values else "nothing is paired")
    if _flat(values):
        return Interval(why=f"all {len(values)} values are the same, and so is every resample")
    given = np.asarray(values, dtype=np.float64)
    size = float(np.abs(given).max())

    def rounded(resample: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        """The mean, but for the last bits: BCa counts the resamples whose mean is that of the values."""
        return np.mean(resample / size, axis=axis).round(12) * size

    found = stats.bootstrap(
        (given,),
        rounded,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method=method,
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    if not (math.isfinite(low) and math.isfinite(high)):
        return Interval(why=f"the {method} interval does not exist for these {len(values)} values")
    return Interval(low=low, high=high)


def holm(ps: Sequence[float | None]) -> tuple[float | None, ...]:
    """Holm's adjusted p of each member of a family, in the given order. None is a test that was not made: no member."""
    _finite([p for p in ps if p is not None])
    order = sorted((p, index) for index, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = highest
    return tuple(adjusted)


def effect(values: Sequence[float]) -> Effect:
    """Effect sizes of paired differences."""
    _finite(values)
    n = len(values)
    if n == 0:
        return Effect(why="nothing is paired")
    ahead = sum(1.0 if value > 0 else 0.5 if value == 0 else 0.0 for value in values) / n
    std = deviation(values, ddof=1)
    if std is None:
        return Effect(superiority=ahead, why="one value shows no spread")
    if _flat(values):
        return Effect(superiority=ahead, why=f"all {n} values are the same: no spread to measure by")
    d_z = math.fsum(values) / n / std
    if n == 2:
        return Effect(d_z=d_z, superiority=ahead, why="the small-sample correction needs three values")
    return Effect(d_z=d_z, g=d_z * hedges(n - 1), superiority=ahead)


def hedges(df: int) -> float:
    """Hedges' exact factor gamma(df / 2) / (sqrt(df / 2) gamma((df - 1) / 2)) for two or more degrees of freedom."""
    if df < 2:
        raise ValueError(f"df is {df}; Hedges' correction is defined for 2 degrees of freedom or more")
    return math.exp(float(special.gammaln(df / 2) - special.gammaln((df - 1) / 2))) / math.sqrt(df / 2)


def components(differences: Mapping[Key, float]) -> Components:
    """The variance between folds and between seeds of one fold, by a one-way analysis of variance (never below 0)."""
    by_fold: dict[int, list[float]] = {}
    for (fold, _), value in sorted(differences.items()):
        by_fold.setdefault(fold, []).append(value)
    free = sum(len(found) - 1 for found in by_fold.values())
    means = [math.fsum(found) / len(found) for found in by_fold.values()]
    if free == 0:
        return Components(why="with one seed a fold the part of the seeds cannot be told from that of the folds")
    seed = (
        math.fsum(
            (value - centre) ** 2 for found, centre in zip(by_fold.values(), means, strict=True) for value in found
        )
        / free
    )
    between = deviation(means, ddof=1)
    if between is None:
        return Components(seed=seed, why="one fold shows no spread between folds")
    share = math.fsum(1 / len(found) for found in by_fold.values()) / len(by_fold)
    return Components(fold=max(between**2 - seed * share, 0.0), seed=seed)


def power(difference: float, std: float, n: int, *, ratio: float = 0.0, alpha: float = ALPHA) -> float:
    """How often a two-sided t test over n units, corrected by `ratio`, finds a true difference of this size."""
    _finite((difference, std, ratio))
    if n < 2:
        return 0.0
    if std == 0:
        return 1.0 if difference else alpha
    away = abs(difference) / (std * math.sqrt(1 / n + ratio))
    critical = float(stats.t.ppf(1 - alpha / 2, n - 1))
    # Far out the noncentral t underflows to nan, where its tail is 0 for all purposes.
    tails = float(stats.nct.sf(critical, n - 1, away)), float(stats.nct.cdf(-critical, n - 1, away))
    return math.fsum(tail for tail in tails if math.isfinite(tail)) if math.isfinite(tails[0]) else 1.0


def outlook(
    differences: Mapping[Key, float],
    *,
    ratio: float,
    folds_exist: int,
    wanted: float = POWER,
    alpha: float = ALPHA,
) -> Outlook:
    """How many folds and seeds would bring p below `alpha`, were the observed mean and spread the true ones.

    Folds that are missing come first, with as many seeds as the others have; where all `folds_exist` are not enough,
    seeds are added on all of them. More seeds shrink the seeds' part of the variance and never the folds' part; the
    correction for shared training clips shrinks with neither. `alpha`: what decides, after Holm where it does.
    """
    sample = units(differences)
    found = t_test(sample.values, ratio=ratio if sample.unit == "fold" else 0.0)
    if sample.unit == "seed" and folds_exist > 1:
        other = "the other fold" if folds_exist == 2 else f"some of the other {folds_exist - 1} folds"
        return Outlook(said=f"first {other}: one fold shows no spread between folds")
    if found.p is None or found.mean is None or abs(found.mean) < 1e-12 or found.std is None:
        return Outlook(said=f"no number can be told: {found.why or 'the mean difference is 0'}")
    if found.p < alpha:
        return Outlook(settled=True, said="nothing: it is settled")
    effect_size, std, n = found.mean, found.std, found.n
    if sample.unit == "seed":
        seeds = _least(lambda count: power(effect_size, std, count, alpha=alpha) >= wanted, n + 1)
        said = f"{seeds} seeds in all" if seeds else f"no number: not even {MOST:,} seeds"
        return Outlook(folds=1 if seeds else None, seeds=seeds, said=said)
    most = max(Counter(fold for fold, _ in differences).values())
    every = max(folds_exist, n)
    parts = components(differences)

    def variance(seeds: int) -> float:
        """Of the difference on a fold with so many seeds: the best case where the parts of it are not known."""
        if parts.fold is None or parts.seed is None:
            return std**2 / seeds
        return min(std**2, parts.fold + parts.seed / seeds)

    def enough(folds: int, seeds: int) -> bool:
        return power(effect_size, math.sqrt(variance(seeds)), folds, ratio=ratio, alpha=alpha) >= wanted

    least = n if len(differences) < n * most else n + 1
    folds = next((count for count in range(least, every + 1) if enough(count, most)), None)
    whole = "both folds" if every == 2 else f"all {every} folds"
    if folds is not None:
        what = whole if folds == every else f"{folds} of the {every} folds"
        return Outlook(folds=folds, seeds=most, said=f"{what} {_each(most)}")
    supposed = parts.fold is None or parts.seed is None
    seeds = _least(lambda count: enough(every, count), most + 1)
    if seeds is None:
        why = ", for seeds do not shrink the spread between folds" if parts.fold else ""
        return Outlook(said=f"no number: not even {whole} with {MOST:,} seeds each{why}")
    said = f"{whole} {_each(seeds)}"
    if supposed:
        said += ", if seeds make all of the spread; more, or no number, if folds do"
    return Outlook(folds=every, seeds=seeds, supposed=supposed, said=said)


def equal_spreads(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The two-sided p of equal variances of paired values: sums and differences are then uncorrelated.

    None below three pairs, and where sums or differences are all the same. Pitman 1939 and Morgan 1939, Biometrika 31.
    """
    sums = [one + other for one, other in zip(first, second, strict=True)]
    differences = [one - other for one, other in zip(first, second, strict=True)]
    if len(sums) < 3 or _flat(sums) or _flat(differences):
        return None
    r = float(np.corrcoef(sums, differences)[0, 1])
    away = abs(r) * math.sqrt((len(sums) - 2) / (1 - r * r)) if abs(r) < 1 else math.inf
    return 2 * float(stats.t.sf(away, len(sums) - 2))


def joined(ps: Sequence[float]) -> float | None:
    """One p of several of one hypothesis, however they depend on each other: twice their mean. None of none.

    Rueschendorf 1982, doi 10.2307/1426524; Vovk and Wang 2020, doi 10.1093/biomet/asaa027. One p is itself.
    """
    _finite(ps)
    return None if not ps else ps[0] if len(ps) == 1 else min(1.0, 2 * math.fsum(ps) / len(ps))


def two_shares(first: float, second: float, clips: int) -> float:
    """Two accuracies on as many clips each, in standard errors of their difference: noise of the test clips alone.

    Hits on the same clips agree more often than not, which is not known here, so that this errs towards noise.
    """
    error = math.sqrt((first * (1 - first) + second * (1 - second)) / clips)
    return (first - second) / error if error else math.copysign(math.inf, first - second) if first != second else 0.0


def _least(is_enough: Callable[[int], bool], start: int) -> int | None:
    """The smallest count from `start` to `MOST` that is enough, for a condition that stays true once it is."""
    low, high = start - 1, MOST
    if start > MOST or not is_enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _each(seeds: int) -> str:
    return f"with {seeds:,} {'seed' if seeds == 1 else 'seeds'} each"


def _finite(values: Sequence[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"a value is {value} among {len(values)}; wanted finite numbers: leave it out and say so")


def _flat(values: Sequence[float]) -> bool:
    """Whether the values differ by rounding alone, or by so little that the square of it is no number but 0."""
    return max(values) - min(values) <= 1e-12 * max(1e-140, *(abs(value) for value in values))
