"""Rules on the data sets themselves: counts, lengths and official parts, as their own documentation has them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dashboards.claim import Case, Judgement, Rule
from dashboards.counts import Counts, official
from dashboards.text import count, listing
from helix.data.splits import OFFICIAL
from helix.registry import DATASETS


@dataclass(frozen=True, kw_only=True)
class Audio:
    """`hours` of all recordings; `longest_s` of one of them, and whether all are as long."""

    hours: float | None = None
    longest_s: float | None = None
    all_as_long: bool = True


#: By Piczak 2015; Salamon, Jacoby and Bello 2014 ("up to 4 s"); Warden 2018 ("one second or less"); Panayotov et al.
#: 2015, its table of subsets.
AUDIO: Mapping[str, Audio] = {
    "esc50": Audio(longest_s=5),
    "urbansound8k": Audio(longest_s=4, all_as_long=False),
    "speech_commands": Audio(longest_s=1, all_as_long=False),
    "librispeech": Audio(hours=100.6),
}


class OfData(Rule):
    """A rule on what a data set is. It needs no run; of a data set that the evidence does not hold it says nothing."""


@dataclass(frozen=True, kw_only=True)
class Holds(OfData):
    """The data set has so many classes, recordings (within the share `tolerance`) or folds, as it says of itself."""

    dataset: str
    what: Literal["classes", "recordings", "folds"]
    value: int
    tolerance: float = 0.0

    def judge(self, case: Case) -> Judgement:
        counts = _official(case, self.dataset)
        seen = getattr(counts, self.what) if counts else None
        if not seen:
            return Judgement(verdict="no data", because=f"the {self.what} of {self.dataset} are counted nowhere")
        right = abs(seen / self.value - 1) <= self.tolerance
        return Judgement(
            verdict="supported" if right else "contradicted", because=f"{count(seen)} {self.what} in the official set"
        )


@dataclass(frozen=True, kw_only=True)
class SimilarScale(OfData):
    """Neither data set has more than `factor` times the recordings of the other."""

    dataset: str
    other: str
    factor: float

    def judge(self, case: Case) -> Judgement:
        known = [_official(case, name) for name in (self.dataset, self.other)]
        sizes = [one.recordings for one in known if one is not None and one.recordings]
        if len(sizes) < 2:
            return Judgement(verdict="no data", because=f"{self.dataset} and {self.other} are not both counted")
        times = max(sizes) / min(sizes)
        told = f"{count(sizes[0])} recordings against {count(sizes[1])}, {times:.1f} times as many"
        return Judgement(verdict="supported" if times <= self.factor else "contradicted", because=told)


@dataclass(frozen=True, kw_only=True)
class Lasts(OfData):
    """Every recording of the data set lasts `seconds`, or all together last `hours` (within the share `tolerance`)."""

    dataset: str
    seconds: float | None = None
    hours: float | None = None
    tolerance: float = 0.02

    def judge(self, case: Case) -> Judgement:
        audio = AUDIO.get(self.dataset) if self.dataset in case.evidence.counts else None
        if audio is not None and self.hours is not None and audio.hours is not None:
            right, told = abs(audio.hours / self.hours - 1) <= self.tolerance, f"{audio.hours:g} hours"
        elif audio is not None and self.seconds is not None and audio.longest_s is not None:
            right = audio.all_as_long and audio.longest_s == self.seconds
            told = f"recordings of {'' if audio.all_as_long else 'up to '}{audio.longest_s:g} s"
        else:
            return Judgement(verdict="no data", because=f"how long {self.dataset} lasts is told nowhere")
        return Judgement(verdict="supported" if right else "contradicted", because=f"{told} in the official set")


@dataclass(frozen=True, kw_only=True)
class Parts(OfData):
    """The official split of the data set has these parts and no others."""

    dataset: str
    parts: tuple[str, ...]

    def judge(self, case: Case) -> Judgement:
        per_part = DATASETS.make(self.dataset).expected_per_fold if self.dataset in case.evidence.counts else {}
        sizes = {name: per_part[number] for name, number in OFFICIAL.items() if number in per_part}
        if not sizes:
            return Judgement(verdict="no data", because=f"the parts of {self.dataset} are counted nowhere")
        told = listing([f"{name} ({count(size)})" for name, size in sizes.items()])
        right = set(sizes) == set(self.parts)
        return Judgement(verdict="supported" if right else "contradicted", because=f"its official lists make {told}")


def _official(case: Case, dataset: str) -> Counts | None:
    """The counts of the set that the paper speaks of, whatever subset of it a sweep took; None where it took none."""
    return official(dataset) if dataset in case.evidence.counts and dataset in DATASETS.names() else None
