"""What a sentence of the paper claims, as data, and how it is judged. The sentences stand in dashboards/claims/.

A claim is supported where the numbers show it, contradicted where they exclude it, underpowered where they could do
neither, as runs on a part of the folds cannot, and without data where the runs that it speaks of are not there. Its
rule (dashboards/rules/) tells which.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dashboards.comparisons import Contrast, Measured, family
from dashboards.evidence import Evidence, Variant
from dashboards.text import SELECTION_WORDS, listing, plural

Verdict = Literal["supported", "contradicted", "underpowered", "no data"]
VERDICTS: tuple[Verdict, ...] = ("supported", "contradicted", "underpowered", "no data")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict and the numbers behind it, in a sentence. `measured`: the comparison it rests on, where it is one."""

    verdict: Verdict
    because: str
    measured: Measured | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a rule judges by: the evidence, and every comparison that any claim asked for, measured as one family."""

    evidence: Evidence
    numbers: Mapping[Contrast, Measured]


class Rule(ABC):
    """How a claim is judged. A member is a frozen dataclass; its fields are the cells and figures that it needs."""

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        """The comparisons that it rests on."""
        return ()

    @property
    def cells(self) -> tuple[tuple[str, Variant], ...]:
        """The cells (data set, variant) whose runs it needs."""
        return ()

    @abstractmethod
    def judge(self, case: Case) -> Judgement: ...


class OfAuthors(Rule):
    """A rule on what the authors set, built or ran. What a sweep was told to do is no evidence of it, run or not."""

    def judge(self, case: Case) -> Judgement:
        if not case.evidence.published:
            return Judgement(verdict="no data", because="it tells of what the authors did, which no other run can show")
        return self.published(case.evidence)

    @abstractmethod
    def published(self, evidence: Evidence) -> Judgement:
        """What the published numbers, text and code say of it."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`id` is short and stays. `where`: section, table or figure. `says`: the sentence in our words and its numbers."""

    id: str
    where: str
    says: str
    rule: Rule


@dataclass(frozen=True, kw_only=True)
class Untested:
    """A sentence that no run of a cell can test, and why; so that a reader sees that it was considered."""

    where: str
    says: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger. `unlike`: in what the runs behind it differ from the paper's, if they do."""

    claim: Claim
    judgement: Judgement
    unlike: tuple[str, ...] = ()


def asked(claims: Sequence[Claim], dataset: str) -> list[Contrast]:
    """The differences on a data set that claims rest on."""
    return [one for claim in claims for one in claim.rule.contrasts if one.dataset == dataset]


def judge(claims: Sequence[Claim], evidence: Evidence) -> tuple[Entry, ...]:
    """Every claim with its verdict, in order, by the comparisons of each data set: one family with their table."""
    numbers: dict[Contrast, Measured] = {}
    for dataset in dict.fromkeys(one.dataset for claim in claims for one in claim.rule.contrasts):
        numbers |= family(evidence, dataset, asked(claims, dataset))
    case = Case(evidence=evidence, numbers=numbers)
    return tuple(
        Entry(claim=claim, judgement=claim.rule.judge(case), unlike=_unlike(evidence, claim)) for claim in claims
    )


def no_data(case: Case, cells: Sequence[tuple[str, Variant]]) -> Judgement:
    return Judgement(verdict="no data", because=lacking(case, cells))


def less_than_the_papers(case: Case, cells: Sequence[tuple[str, Variant]]) -> Judgement | None:
    """No data, where runs of these cells are less than the paper's; None where all may speak of its sentences."""
    found = [case.evidence.runs(dataset, variant) for dataset, variant in cells]
    phrases = dict.fromkeys(phrase for runs in found if runs is not None for phrase in runs.less)
    return Judgement(verdict="no data", because=f"no runs like the paper's: {'; '.join(phrases)}") if phrases else None


def lacking(case: Case, cells: Sequence[tuple[str, Variant]]) -> str:
    lacking: dict[str, list[str]] = {}
    for dataset, (frontend, backbone) in cells:
        runs = case.evidence.runs(dataset, (frontend, backbone))
        if runs is None or not runs.accuracy.get(case.evidence.select):
            lacking.setdefault(dataset, []).append(f"{backbone} {frontend}")
    if not lacking:
        return f"no fold and seed that all have under {SELECTION_WORDS[case.evidence.select]}"
    return "; ".join(f"nothing of {listing(list(dict.fromkeys(names)))} on {name}" for name, names in lacking.items())


def share_of_folds(evidence: Evidence, dataset: str, folds: int) -> str:
    """ "2 of 5 folds" of runs on so many where the data set has more; empty where they are on all of them.

    What the paper says of a data set with folds it says of all of them, so runs on some settle nothing of it.
    """
    counts = evidence.counts.get(dataset)
    return f"{folds} of {plural(counts.folds, 'fold')}" if counts is not None and folds < counts.folds else ""


def _unlike(evidence: Evidence, claim: Claim) -> tuple[str, ...]:
    """In what the runs that a claim needs differ from the paper's, each phrase once."""
    phrases = [
        phrase
        for dataset, variant in claim.rule.cells
        if (runs := evidence.runs(dataset, variant)) is not None
        for phrase in runs.unlike
    ]
    return tuple(dict.fromkeys(phrases))
