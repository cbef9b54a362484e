"""What a sweep found, computed from its view: means, spread, optimism, and how it stands beside the paper.

Pure functions. A half-finished sweep is the normal case: whatever is not known yet is None and never a zero. Accuracies
are fractions, differences are differences of fractions.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dashboards.counts import Counts, counts_of
from dashboards.text import NOT_FINITE, TIMES, mean_std, percent, plural
from dashboards.unlike import Setting, other_settings
from dashboards.view import CellView, DataFacts, SweepView, TrialView
from helix.protocol import PROFILES, SWITCHES
from helix.published import Published, published
from helix.statistics import Key, Units, contrast, deviation, mean, t_test, units

SELECTIONS = ("best_test", "last", "validation")

#: Two parameter counts further apart than this (relative) are not the same model; the band of the grids.
PARAMETER_BAND = 0.001


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """`n` trials as one number: the mean over folds, the seeds of a fold averaged first; over seeds of a single split.

    `std` is the spread of those `units`, and `low` to `high` the 95 % interval of their mean, corrected for training
    clips that folds share (Nadeau and Bengio). None where there is nothing to take it of. `not_finite`: so many trials
    more have a value that is no number; they are in none of this.
    """

    n: int
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None
    units: int = 0
    unit: Literal["fold", "seed"] = "fold"
    not_finite: int = 0

    @property
    def percent(self) -> str:
        """The mean in %, or why there is none: nothing yet, or nothing finite."""
        return NOT_FINITE if self.not_finite and not self.n else percent(self.mean)

    @property
    def percent_std(self) -> str:
        """The same with its spread: "55.10 ± 3.33"."""
        return self.percent if self.mean is None else mean_std(self.mean, self.std)

    @property
    def counted(self) -> str:
        """ "5 folds", "6 runs in 2 folds", "3 seeds", "1 run"."""
        if self.n < 2:
            return plural(self.n, "run")
        return plural(self.n, self.unit) if self.n == self.units else f"{self.n} runs in {plural(self.units, 'fold')}"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One finished trial: its fold, its seed, and its accuracy under each selection rule that could be applied.

    `not_finite`: the rules under which it has one that is no number.
    """

    trial_id: str
    fold: int
    seed: int
    accuracy: dict[str, float]
    not_finite: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Our best-test accuracy beside the published one, over the same folds where per-fold numbers are published.

    `theirs_std` is then the spread of those folds under our rule; for all folds and the population rule, the paper's.
    `unlike` says in what the two runs differ, in short phrases; empty where they are alike as far as we can tell.
    """

    published: Published
    ours: float | None
    theirs: float | None
    theirs_std: float | None
    folds: tuple[int, ...]
    unlike: tuple[str, ...]

    @property
    def difference(self) -> float | None:
        return None if self.ours is None or self.theirs is None else self.ours - self.theirs


@dataclass(frozen=True, kw_only=True)
class CellSummary:
    """One row of the main table. `accuracy` holds all three selections; `selected` is the one that the protocol rules.

    `ratio`: test clips over training clips of its data set, which corrects intervals over folds, and `folds`: how many
    that has, run or not. `at_chance`: the mean is not above guessing by two binomial standard errors of the clips
    tested (None where that cannot be said). `settings`: in what its trials are not as the paper's.
    """

    cell: CellView
    asked: int
    samples: tuple[Sample, ...]
    statuses: dict[str, int]
    accuracy: dict[str, Statistic]
    selected: Statistic
    optimism: Statistic
    train_seconds: float | None
    parameters: int | None
    tokens: int | None
    comparison: Comparison | None
    at_chance: bool | None
    settings: tuple[Setting, ...] = ()
    ratio: float = 0.0
    folds: int = 1

    @property
    def done(self) -> int:
        return len(self.samples)

    @property
    def why_none(self) -> str:
        """What to say of a cell that was asked for and has no result."""
        failed, running = self.statuses.get("failed", 0), self.statuses.get("running", 0)
        if failed == self.asked:
            return f"{plural(failed, 'trial')} failed"
        return f"no result yet, {running} running" if running else "no result yet"


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Cells of one data set by mean accuracy, best first. `shared`: the (fold, seed) pairs that all of them finished.

    Where `shared` is not empty the means are taken over those pairs alone, so that no cell gains by its folds. As
    everywhere, the seeds of a fold are averaged first.
    """

    order: tuple[tuple[CellSummary, float], ...]
    shared: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a sweep is, in trials, epochs and time."""

    asked: int
    statuses: dict[str, int]
    epochs_done: int
    epochs_asked: int
    train_seconds: float
    overhead_seconds: float

    @property
    def finished(self) -> bool:
        return self.statuses.get("done", 0) == self.asked


def statistic(values: Mapping[Key, float], rule: str, *, ratio: float = 0.0, folds: int = 1) -> Statistic:
    """Values by (fold, seed) as one number: the one rule for every cell, in a report, a ledger or MLflow.

    `rule` "population" divides the variance by the number of folds and "sample" by one less; one value has no spread.
    `ratio`: test clips over training clips. `folds`: of the data set, run or not. Where there are several, a spread is
    one over folds: that of the seeds of a single fold says nothing of the others and would stand among theirs.
    """
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    sample = units(finite)
    if sample.unit == "seed" and folds > 1 and finite:
        sample = Units(unit="fold", values=(math.fsum(sample.values) / len(sample.values),))
    tested = t_test(sample.values, ratio=ratio if sample.unit == "fold" else 0.0)
    return Statistic(
        n=len(finite),
        mean=mean(sample.values),
        std=deviation(sample.values, ddof=0 if rule == "population" else 1),
        low=tested.low,
        high=tested.high,
        units=len(sample.values),
        unit=sample.unit,
        not_finite=len(values) - len(finite),
    )


def summarise(view: SweepView) -> tuple[CellSummary, ...]:
    """Every cell of the view, in its order."""
    known = counts_of(view)
    return tuple(summarise_cell(view, cell, counts=known[cell.dataset]) for cell in view.cells)


def summarise_cell(view: SweepView, cell: CellView, *, counts: Counts) -> CellSummary:
    """One cell under the selection rule and the standard deviation that the view's protocol asks for."""
    samples = tuple(sample for trial in cell.trials if (sample := _sample(trial)) is not None)
    ratio, folds = counts.ratio, counts.folds
    accuracy = {rule: statistic(_given(samples, rule), view.std, ratio=ratio, folds=folds) for rule in SELECTIONS}
    optimism = {
        (sample.fold, sample.seed): sample.accuracy["best_test"] - sample.accuracy["validation"]
        for sample in samples
        if {"best_test", "validation"} <= sample.accuracy.keys()
    }
    results = [trial.state.result for trial in cell.trials if trial.state.result is not None]
    seconds = [result["train_seconds"] for result in results if result.get("train_seconds") is not None]
    parameters = cell.parameters or _first(result.get("parameters") for result in results)
    facts, settings = view.facts(cell.dataset), other_settings(cell, view.switches)
    return CellSummary(
        cell=cell,
        asked=len(cell.trials),
        samples=samples,
        statuses=dict(Counter(trial.state.status for trial in cell.trials)),
        accuracy=accuracy,
        selected=accuracy[view.select],
        optimism=statistic(optimism, view.std, ratio=ratio, folds=folds),
        train_seconds=math.fsum(seconds) / len(seconds) if seconds else None,
        parameters=parameters,
        tokens=cell.tokens or _first(result.get("tokens") for result in results),
        comparison=_compare(cell, samples, facts, parameters, view.std, settings),
        settings=settings,
        at_chance=_at_chance(accuracy, cell, facts),
        ratio=ratio,
        folds=folds,
    )


def rank(summaries: Sequence[CellSummary], select: str) -> Ranking:
    """The cells that have a result, by mean accuracy over the trials that all of them share."""
    measured = [summary for summary in summaries if summary.accuracy[select].n]
    if not measured:
        return Ranking(order=(), shared=())
    by_pair = [_by_pair(summary, select) for summary in measured]
    shared = sorted(set.intersection(*(set(pairs) for pairs in by_pair)))
    means = [fold_mean({pair: pairs[pair] for pair in shared or pairs}) or 0.0 for pairs in by_pair]
    order = sorted(zip(measured, means, strict=True), key=lambda item: -item[1])
    return Ranking(order=tuple(order), shared=tuple(shared))


def paired(first: CellSummary, second: CellSummary, select: str) -> dict[Key, float]:
    """Accuracy of `first` minus accuracy of `second` on every (fold, seed) that both finished."""
    return contrast([(_by_pair(first, select), 1.0), (_by_pair(second, select), -1.0)])[0]


def fold_mean(values: Mapping[Key, float]) -> float | None:
    """The mean over folds of the means over their seeds: of a cell with more seeds on one fold, not the mean of all."""
    return mean(units(values).values)


def progress(view: SweepView) -> Progress:
    """Trials by status, epochs, and the time of finished trials in training and beyond it."""
    trials = view.trials()
    results = [trial.state.result or {} for _, trial in trials]
    return Progress(
        asked=len(trials),
        statuses=dict(Counter(trial.state.status for _, trial in trials)),
        epochs_done=sum(min(trial.state.epochs_done, cell.epochs) for cell, trial in trials),
        epochs_asked=sum(cell.epochs for cell, _ in trials),
        train_seconds=math.fsum(result.get("train_seconds") or 0.0 for result in results),
        overhead_seconds=math.fsum(overhead_seconds(trial) or 0.0 for _, trial in trials),
    )


def attempts(trial: TrialView) -> int:
    """How many processes worked on a trial, as storage lists them or as its result counts them."""
    counted = (trial.state.result or {}).get("attempts")
    return max(len(trial.state.attempts), counted if isinstance(counted, int) else 0)


def overhead_seconds(trial: TrialView) -> float | None:
    """What a finished trial took beyond its training: the time of all its attempts less what the training itself took.

    That is starting again and steps trained twice, and not the time in which nobody worked on it. The steps trained
    twice alone are what `Spent` calls lost. None while it runs.
    """
    result = trial.state.result
    if result is None or result.get("train_seconds") is None:
        return None
    if attempts(trial) <= 1:
        return 0.0
    worked = math.fsum(one["ended"] - one["started"] for one in trial.state.attempts if "ended" in one)
    return max(worked - result["train_seconds"], 0.0)


def sampling_word(view: SweepView) -> str:
    """What the samples of the cells are called: folds, seeds, or trials where they differ in both."""
    folds = {trial.fold for _, trial in view.trials()}
    seeds = {trial.seed for _, trial in view.trials()}
    return "fold" if len(seeds) <= 1 else "seed" if len(folds) <= 1 else "trial"


def averaged_over(view: SweepView, dataset: str) -> tuple[str, str]:
    """The unit of means and spreads on a data set ("fold", or "seed" of a single split), and what is done to get it."""
    if counts_of(view)[dataset].folds < 2:
        return "seed", "seeds"
    seeds = {trial.seed for cell, trial in view.trials() if cell.dataset == dataset}
    return "fold", "folds, the seeds of a fold averaged first" if len(seeds) > 1 else "folds"


def changed_switches(view: SweepView) -> dict[str, str]:
    """The switches in force that the profile sets otherwise, with what the profile would set."""
    if view.profile not in PROFILES:
        return {}
    return {
        name: row[view.profile]
        for name, row in SWITCHES.items()
        if name in view.switches and view.switches[name] != row[view.profile]
    }


def _sample(trial: TrialView) -> Sample | None:
    """What a finished trial counts as; None for one without a result, however many epochs it has behind it."""
    if trial.state.result is None:
        return None
    given = trial.state.result.get("accuracy") or {}
    known = {rule: float(given[rule]) for rule in SELECTIONS if given.get(rule) is not None}
    if not known:
        return None
    accuracy = {rule: value for rule, value in known.items() if math.isfinite(value)}
    return Sample(
        trial_id=trial.trial_id,
        fold=trial.fold,
        seed=trial.seed,
        accuracy=accuracy,
        not_finite=tuple(rule for rule in known if rule not in accuracy),
    )


def _given(samples: Sequence[Sample], rule: str) -> dict[Key, float]:
    """What the samples have under a rule, with nan for what is no number: it counts as left out."""
    return {
        (sample.fold, sample.seed): sample.accuracy.get(rule, math.nan)
        for sample in samples
        if rule in sample.accuracy or rule in sample.not_finite
    }


def _compare(
    cell: CellView,
    samples: Sequence[Sample],
    facts: DataFacts | None,
    parameters: int | None,
    std: str,
    settings: Sequence[Setting],
) -> Comparison | None:
    target = published(cell.dataset, cell.frontend, cell.backbone)
    if target is None:
        return None
    usable = [sample for sample in samples if "best_test" in sample.accuracy]
    theirs = Statistic(n=target.folds, mean=target.accuracy, std=target.std)
    if target.per_fold is not None:
        usable = [sample for sample in usable if 1 <= sample.fold <= target.folds]
        chosen = {sample.fold for sample in usable} or set(range(1, target.folds + 1))
        theirs = statistic({(fold, 0): target.per_fold[fold - 1] for fold in sorted(chosen)}, std)
    folds = tuple(sorted({sample.fold for sample in usable}))
    unlike = []
    if target.epochs is None:
        unlike.append(f"{plural(cell.epochs, 'epoch')} where the paper states none")
    elif target.epochs != cell.epochs:
        unlike.append(f"{plural(cell.epochs, 'epoch')} instead of {target.epochs}")
    if parameters and target.parameters and abs(parameters / target.parameters - 1) > PARAMETER_BAND:
        unlike.append(f"a model {_ratio(parameters / target.parameters)} the size")
    if facts is not None and facts.partial:
        unlike.append("part of the recordings")
    unlike += [setting.phrase for setting in settings]
    if usable and target.per_fold is not None and len(folds) < target.folds:
        unlike.append(f"{plural(len(folds), 'fold')} of {target.folds}")
    return Comparison(
        published=target,
        ours=fold_mean({(sample.fold, sample.seed): sample.accuracy["best_test"] for sample in usable}),
        theirs=theirs.mean,
        theirs_std=theirs.std,
        folds=folds,
        unlike=tuple(unlike),
    )


def _at_chance(accuracy: dict[str, Statistic], cell: CellView, facts: DataFacts | None) -> bool | None:
    """Judged by validation where there is one: the best of many test epochs is above guessing even for noise."""
    mean = accuracy["validation"].mean if accuracy["validation"].n else accuracy["last"].mean
    if mean is None or facts is None:
        return None
    tested = [trial.state.rows[-1] for trial in cell.trials if trial.state.result is not None and trial.state.rows]
    clips = sum(row[half][1] for row in tested for half in ("test_half_a", "test_half_b") if half in row)
    if clips == 0:
        return None
    return mean <= facts.chance + 2 * math.sqrt(facts.chance * (1 - facts.chance) / clips)


def _by_pair(summary: CellSummary, select: str) -> dict[tuple[int, int], float]:
    return {
        (sample.fold, sample.seed): sample.accuracy[select] for sample in summary.samples if select in sample.accuracy
    }


def _first(values: Iterable[int | None]) -> int | None:
    return next((value for value in values if value is not None), None)


def _ratio(value: float) -> str:
    return f"{value:.2g}{TIMES}" if value < 10 else f"{value:.0f}{TIMES}"
