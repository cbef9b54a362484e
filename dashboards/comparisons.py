"""Every comparison that the cells of one data set allow, measured in all ways at once; and the table of them."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import combinations

from dashboards.counts import unknown
from dashboards.evidence import Evidence, Variant
from dashboards.tables import Column, Figure, Table, without_gaps
from dashboards.text import GAP, MINUS, SELECTION_WORDS, number, percent, plural, points, slug
from helix.statistics import (
    ALPHA,
    Effect,
    Interval,
    Key,
    Outlook,
    SignFlip,
    TTest,
    Units,
    bootstrap,
    contrast,
    effect,
    holm,
    outlook,
    sign_flip,
    t_test,
    two_shares,
    units,
)

#: (group, heading) of the columns of comparisons that the files have and a page has no room for.
ONLY_IN_FILES = {
    ("95 % interval, paired t", "low"),
    ("95 % interval, paired t", "high"),
    ("the same, bootstrap", "low"),
    ("the same, bootstrap", "high"),
    ("", "std"),
    ("effect", "g"),
    ("effect", "ahead in"),
}

#: Why seeds have no corrected test where their data set has more folds than theirs.
OF_ONE_FOLD = "seeds of one fold show no spread between folds, which is what is corrected"


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of cells of one data set: two of them for a difference, four for an interaction."""

    dataset: str
    terms: tuple[tuple[Variant, float], ...]

    @property
    def name(self) -> str:
        return " ".join(
            f"{'+' if weight > 0 else MINUS} {backbone} {frontend}" for (frontend, backbone), weight in self.terms
        ).removeprefix("+ ")

    @property
    def canonical(self) -> "Contrast":
        """The same up to its sign, so that no question counts twice in a family."""
        ordered = sorted(self.terms)
        sign = 1.0 if ordered[0][1] > 0 else -1.0
        return Contrast(self.dataset, tuple((variant, sign * weight) for variant, weight in ordered))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One contrast in numbers. `paired` is the plain t test, `corrected` that of Nadeau and Bengio, over folds.

    `p_holm` is the corrected p and `low` to `high` the corrected interval, both adjusted for a family of so many (Holm;
    Bonferroni, for Holm has no intervals). `outlook` is of that Holm p. `ratio`: test clips over training clips.
    `clip_errors`: where each side is one run, their difference in standard errors that come from the test clips alone.
    """

    contrast: Contrast
    units: Units
    paired: TTest
    corrected: TTest
    flip: SignFlip
    resampled: Interval
    effect: Effect
    outlook: Outlook
    ratio: float = 0.0
    p_holm: float | None = None
    family: int = 0
    low: float | None = None
    high: float | None = None
    clip_errors: float | None = None

    @property
    def mean(self) -> float:
        assert self.paired.mean is not None, "what has no pair is not measured"
        return self.paired.mean

    @property
    def counted(self) -> str:
        return plural(self.paired.n, self.units.unit)


@dataclass(frozen=True, kw_only=True)
class _Paired:
    """What a contrast is measured by. `folds_exist`: of its data set, run or not."""

    differences: Mapping[Key, float]
    units: Units
    corrected: TTest
    ratio: float
    folds_exist: int


def difference(dataset: str, first: Variant, second: Variant) -> Contrast:
    """First minus second."""
    return Contrast(dataset, ((first, 1.0), (second, -1.0)))


def interaction(dataset: str, frontends: tuple[str, str], backbones: tuple[str, str]) -> Contrast:
    """How much more the first backbone gains by the first frontend over the second than the other backbone does."""
    (one, other), (here, there) = frontends, backbones
    return Contrast(dataset, (((one, here), 1.0), ((other, here), -1.0), ((one, there), -1.0), ((other, there), 1.0)))


def measure(asked: Contrast, evidence: Evidence) -> Measured | None:
    """The contrast in numbers, a family of its own; None where no (fold, seed) has all of its cells."""
    return measure_family([asked], evidence).get(asked)


def measure_family(asked: Iterable[Contrast], evidence: Evidence) -> dict[Contrast, Measured]:
    """Every contrast of one data set that can be measured, with Holm's p over those that ask different questions."""
    every = {one: _paired(one, evidence) for one in dict.fromkeys(asked)}
    pairs = {one: found for one, found in every.items() if found is not None}
    if len({one.dataset for one in pairs}) > 1:
        raise ValueError("a family is of one data set; given contrasts of several")
    tests: dict[Contrast, TTest] = {}
    for one, found in pairs.items():
        tests.setdefault(one.canonical, found.corrected)
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    size = sum(p is not None for p in adjusted.values())
    # Holm goes on with those that are open, and each of them is settled by a p below this.
    left = ALPHA / max(sum(p >= ALPHA for p in adjusted.values() if p is not None), 1)

    def measured(one: Contrast, found: _Paired) -> Measured:
        values = found.units.values
        tested = found.corrected.p is not None
        wide = t_test(values if tested else (), ratio=found.ratio, confidence=1 - ALPHA / max(size, 1))
        return Measured(
            contrast=one,
            units=found.units,
            paired=t_test(values),
            corrected=found.corrected,
            flip=sign_flip(values),
            resampled=bootstrap(values),
            effect=effect(values),
            outlook=outlook(found.differences, ratio=found.ratio, folds_exist=found.folds_exist, alpha=left),
            ratio=found.ratio,
            p_holm=adjusted[one.canonical],
            family=size,
            low=wide.low,
            high=wide.high,
            clip_errors=_clip_errors(one, evidence, len(found.differences)),
        )

    return {one: measured(one, found) for one, found in pairs.items()}


def family(evidence: Evidence, dataset: str, also: Iterable[Contrast] = ()) -> dict[Contrast, Measured]:
    """What is compared on a data set: all that its cells allow, and what is asked `also`; one family, one p of each."""
    variants = [(runs.frontend, runs.backbone) for runs in evidence.of_dataset(dataset)]
    return measure_family([*every_contrast(dataset, variants), *also], evidence)


def every_contrast(dataset: str, variants: Sequence[Variant]) -> list[Contrast]:
    """Frontends within each backbone, backbones within each frontend, and how much the one depends on the other."""
    frontends = list(dict.fromkeys(frontend for frontend, _ in variants))
    backbones = list(dict.fromkeys(backbone for _, backbone in variants))
    there = set(variants)
    asked = [
        difference(dataset, (one, backbone), (other, backbone))
        for backbone in backbones
        for one, other in combinations(frontends, 2)
    ]
    asked += [
        difference(dataset, (frontend, one), (frontend, other))
        for frontend in frontends
        for one, other in combinations(backbones, 2)
    ]
    asked += [
        interaction(dataset, pair, both) for pair in combinations(frontends, 2) for both in combinations(backbones, 2)
    ]
    return [one for one in asked if {variant for variant, _ in one.terms} <= there]


def statistics_table(evidence: Evidence, dataset: str, *, also: Iterable[Contrast] = (), short: bool = False) -> Table:
    """The `family` of one data set, with the columns that any of it fills; `short`: without ONLY_IN_FILES."""
    asked: dict[Contrast, Measured] = {}
    for measured in family(evidence, dataset, also).values():
        asked.setdefault(measured.contrast.canonical, measured)
    found = list(asked.values())
    table = Table(
        name=f"statistics-{slug(dataset)}",
        caption=f"Paired differences on {dataset}, in percentage points ({SELECTION_WORDS[evidence.select]})",
        columns=(
            Column(heading="comparison"),
            Column(heading="n", number=True),
            Column(heading="difference", number=True, unit="points"),
            Column(heading="std", number=True, unit="points"),
            Column(heading="low", number=True, group="95 % interval, paired t", unit="points"),
            Column(heading="high", number=True, group="95 % interval, paired t", unit="points"),
            Column(heading="low", number=True, group="the same, corrected", unit="points"),
            Column(heading="high", number=True, group="the same, corrected", unit="points"),
            Column(heading="low", number=True, group="the same, bootstrap", unit="points"),
            Column(heading="high", number=True, group="the same, bootstrap", unit="points"),
            Column(heading="paired t", number=True, group="p"),
            Column(heading="corrected", number=True, group="p"),
            Column(heading="Holm", number=True, group="p"),
            Column(heading="sign flip", number=True, group="p"),
            Column(heading="d_z", number=True, group="effect"),
            Column(heading="g", number=True, group="effect"),
            Column(heading="ahead in", number=True, group="effect", unit="%"),
            Column(heading="what would settle it"),
        ),
        rows=tuple(_row(measured) for measured in found),
    )
    if short:
        table = _shortened(table)
    table = without_gaps(table)
    there = {column.heading for column in table.columns} | {column.group for column in table.columns}
    return replace(table, notes=_notes(found, there))


def _shortened(table: Table) -> Table:
    """The table without what few readers look for: a page has no room for all columns, which the files have."""
    kept = [index for index, column in enumerate(table.columns) if (column.group, column.heading) not in ONLY_IN_FILES]
    columns = (table.columns[index] for index in kept)
    return replace(
        table,
        # the first interval that is left has none before it to be the same as
        columns=tuple(
            replace(one, group=one.group.replace("the same", "95 % interval")) if one.group else one for one in columns
        ),
        rows=tuple(tuple(row[index] for index in kept) for row in table.rows),
    )


def p_shown(p: float | None) -> str:
    """0.0023 -> "0.002"; what is smaller is called so."""
    return GAP if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _row(one: Measured) -> tuple[str | Figure, ...]:
    # One unit is always ahead in 0 or 100 %, and its sign-flip test has p 1 whatever it is.
    ahead, flip = (one.effect.superiority, one.flip.p) if one.paired.n > 1 else (None, None)
    std = one.corrected.std
    return (
        one.contrast.name,
        Figure(one.paired.n, one.counted),
        _points(one.mean),
        Figure(None if std is None else 100 * std, percent(std)),
        *(_points(value) for value in (one.paired.low, one.paired.high)),
        *(_points(value) for value in (one.corrected.low, one.corrected.high)),
        *(_points(value) for value in (one.resampled.low, one.resampled.high)),
        *(Figure(p, p_shown(p)) for p in (one.paired.p, one.corrected.p, one.p_holm, flip)),
        *(Figure(d, number(d, ".2f")) for d in (one.effect.d_z, one.effect.g)),
        Figure(None if ahead is None else 100 * ahead, GAP if ahead is None else f"{100 * ahead:.0f} %"),
        one.outlook.said,
    )


def _notes(found: Sequence[Measured], there: Set[str]) -> tuple[str, ...]:
    """What has to be known of the columns and groups that are `there`, and of what was compared."""
    if not found:
        return ("No two cells share a finished fold and seed.",)
    size = max(one.family for one in found)
    said = []
    explained = {
        "Holm": f"adjusted over the {plural(size, 'comparison')} of this table that could be tested.",
        "d_z": "mean over standard deviation of the differences.",
        "g": "d_z without its small-sample bias.",
        "the same, bootstrap": "BCa, 9,999 resamples, seed 0; of few units it is too narrow.",
        "std": f"of the differences, divided by n {MINUS} 1 whatever the protocol has, as in t and d_z.",
    }
    named = {"the same, bootstrap": "Bootstrap"}
    words = " ".join(f"{named.get(name, name)}: {words}" for name, words in explained.items() if name in there)
    said += [words] if words else []
    if ratio := max(one.ratio for one in found):
        said.append(
            f"Corrected: by Nadeau and Bengio, for folds share training clips (test to training {ratio:.3g}); "
            "seeds of one fold are averaged first."
        )
    if size:
        said.append(
            "What would settle it: what brings its p after Holm below 0.05 with a power of 80 %, were the mean and "
            "the spread seen here the true ones. Missing folds come first, then seeds on all folds."
        )
    if any(one.units.unit == "seed" for one in found):
        said.append("On one split only seeds differ: nothing is said of other test clips.")
    floor = min(one.flip.smallest for one in found)
    if ALPHA <= floor < 1:
        said.append(f"With so few units no sign-flip test can reach p < 0.05; its smallest p is {floor:.4g}.")
    if any(not one.flip.exact for one in found):
        said.append("Sign flip: estimated from 200,000 choices of signs drawn with seed 0.")
    unpaired = sum(one.units.unpaired for one in found)
    if unpaired:
        said.append("Folds and seeds that not all cells of a comparison have finished are left out of it.")
    whys = dict.fromkeys(one.corrected.why for one in found if one.corrected.why)
    said += [f"Not corrected: {why}." if why == OF_ONE_FOLD else f"No test: {why}." for why in whys]
    return tuple(said)


def _paired(asked: Contrast, evidence: Evidence) -> _Paired | None:
    """What every (fold, seed) that has all of the cells says of the contrast; None where there is no such."""
    terms = []
    for variant, weight in asked.terms:
        runs = evidence.runs(asked.dataset, variant)
        if runs is None or not runs.accuracy.get(evidence.select):
            return None
        terms.append((runs.accuracy[evidence.select], weight))
    differences, unpaired = contrast(terms)
    if not differences:
        return None
    sample = units(differences, unpaired)
    counts = evidence.counts.get(asked.dataset) or unknown(len({fold for fold, _ in differences}))
    ratio = counts.ratio if sample.unit == "fold" else 0.0
    corrected = t_test(sample.values, ratio=ratio)
    if sample.unit == "seed" and counts.folds > 1 and corrected.p is not None:
        corrected = TTest(n=corrected.n, mean=corrected.mean, std=corrected.std, why=OF_ONE_FOLD)
    return _Paired(
        differences=differences,
        units=sample,
        corrected=corrected,
        ratio=ratio,
        folds_exist=counts.folds,
    )


def _clip_errors(asked: Contrast, evidence: Evidence, pairs: int) -> float | None:
    """The difference of two single runs against the noise of the clips that they were tested on."""
    if len(asked.terms) != 2 or pairs != 1:
        return None
    sides = [evidence.runs(asked.dataset, variant) for variant, _ in asked.terms]
    clips = [runs.test_clips for runs in sides if runs is not None]
    if None in clips or len(set(clips)) != 1 or not clips[0]:
        return None
    (one, other) = (runs.accuracy[evidence.select] for runs in sides if runs is not None)
    key = min(set(one) & set(other))
    return two_shares(one[key], other[key], clips[0]) * asked.terms[0][1]


def _points(value: float | None) -> Figure:
    return Figure(None if value is None else 100 * value, points(value))
