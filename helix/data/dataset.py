"""The contract of a data set: which recordings it has, how one sounds, and which rows train, validate and test.

A member is a frozen keyword-only dataclass in helix/data/datasets/, registered in helix.registry.DATASETS; its
fields are its options and part of a trial's identity. It lists recordings from metadata alone (`scan`) and decodes one
at a time (`wave`); shards.py does the rest.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

#: How many problems an error message spells out before it says how many more there are.
PROBLEMS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One recording as its metadata describes it.

    `path` is relative to the source, None where the wave is made up. `group` names the longer recording that several
    clips were cut from: rows of one group never stand on both sides of a comparison.
    """

    recording_id: str
    label: int
    path: str | None
    fold: int | None
    speaker: str | None
    group: str


class DatasetError(ValueError):
    """What is wrong with a data set's files: every problem at once, the first 20 of them in words."""

    def __init__(self, subject: str, problems: Sequence[str]):
        super().__init__(subject, tuple(problems))
        self.subject, self.problems = subject, tuple(problems)

    def __str__(self) -> str:
        shown = [f"  {problem}" for problem in self.problems[:PROBLEMS_SHOWN]]
        more = len(self.problems) - PROBLEMS_SHOWN
        return "\n".join([self.subject, *shown, *([f"  +{more} more"] if more > 0 else [])])


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file of the official download; None where nobody publishes the checksum or the size."""

    url: str
    name: str
    sha256: str | None = None
    md5: str | None = None
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a source holds. `missing` (recording id -> reason) a partial set may leave out; `problems` nobody may."""

    recordings: list[Recording]
    missing: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False, kw_only=True)
class Index:
    """The prepared recordings as columns; row r of each array is recording r. A fold of -1 stands for none."""

    recording_id: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    samples: np.ndarray
    label: np.ndarray
    speaker: np.ndarray
    fold: np.ndarray
    group: np.ndarray
    crc32: np.ndarray
    source_sha256: np.ndarray
    padded_samples: np.ndarray

    def __len__(self) -> int:
        return len(self.recording_id)


@dataclass(frozen=True, eq=False, kw_only=True)
class Split:
    """Row numbers of an index, ascending and disjoint."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Dataset(ABC):
    """One data set. What depends on no option is a class variable, what may depend on one is a property."""

    rate_hz: ClassVar[int] = 16_000
    licence: ClassVar[str]
    url: ClassVar[str]
    #: The circular shift that the authors' code uses here, in seconds either way.
    authors_shift_s: ClassVar[float]
    needs_source: ClassVar[bool]
    #: The official files, where licence and address allow to fetch them.
    downloads: ClassVar[tuple[Download, ...]] = ()
    #: What a reader of results has to know about this data set.
    caveat: ClassVar[str | None] = None

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The names of the labels 0, 1, ..."""

    @property
    @abstractmethod
    def clip_samples(self) -> int:
        """Samples of one clip at `rate_hz`."""

    @property
    @abstractmethod
    def expected_cells(self) -> Mapping[tuple[int, int], int]:
        """How many recordings the complete data set has per (fold, label)."""

    @property
    def folds(self) -> tuple[int, ...]:
        return tuple(sorted({fold for fold, _ in self.expected_cells}))

    @property
    def expected_recordings(self) -> int:
        return sum(self.expected_cells.values())

    @abstractmethod
    def scan(self, source: Path | None) -> Scan:
        """Everything that the metadata of `source` says, good or bad, without decoding audio."""

    @abstractmethod
    def wave(self, recording: Recording, source: Path | None) -> np.ndarray:
        """int16 [samples], mono at `rate_hz`. Raises AudioError."""

    def recordings(self, source: Path | None) -> list[Recording]:
        """All recordings, sorted by id. Raises DatasetError with everything that is wrong, absent audio too."""
        return self.listing(source).recordings

    def listing(self, source: Path | None, *, allow_missing: bool = False) -> Scan:
        """The scan of `source`, sorted and found sound; what is missing stays listed with `allow_missing`.

        Raises DatasetError with everything that is wrong: no metadata, bad rows, duplicate ids, labels out of range
        and, unless `allow_missing`, absent audio.
        """
        if self.needs_source and source is None:
            raise DatasetError(
                self._subject(source), [f"it needs its files; get them at {self.url} and name the folder"]
            )
        found = self.scan(source)
        problems = list(found.problems)
        for recording_id, count in sorted(Counter(row.recording_id for row in found.recordings).items()):
            if count > 1:
                problems.append(f"{recording_id}: stands {count} times in the metadata; wanted once")
        for row in found.recordings:
            if not 0 <= row.label < len(self.classes):
                problems.append(f"{row.recording_id}: label {row.label}; wanted 0 to {len(self.classes) - 1}")
            if row.fold is not None and row.fold not in self.folds:
                problems.append(f"{row.recording_id}: fold {row.fold}; wanted one of {_listed(self.folds)}")
        if not allow_missing:
            problems += [f"{recording_id}: {reason}" for recording_id, reason in sorted(found.missing.items())]
        if problems:
            raise DatasetError(self._subject(source), problems)
        return Scan(
            recordings=sorted(found.recordings, key=lambda row: row.recording_id),
            missing=dict(sorted(found.missing.items())),
        )

    def shortfall(self, cells: Iterable[tuple[int | None, int]]) -> list[str]:
        """Where the recordings, each given as its (fold, label), differ in number from the complete data set."""
        found, lines = Counter(cells), []
        for fold in self.folds:
            wanted = {label: count for (of, label), count in self.expected_cells.items() if of == fold}
            total = sum(found[fold, label] for label in wanted)
            odd = [label for label in wanted if found[fold, label] != wanted[label]]
            if total == 0:
                lines.append(f"fold {fold}: no recordings; wanted {sum(wanted.values())}")
            elif odd:
                classes = ", ".join(f"{self.classes[label]} {found[fold, label]} of {wanted[label]}" for label in odd)
                lines.append(f"fold {fold}: {total} recordings of {sum(wanted.values())}; {classes}")
        return lines

    def split(self, index: Index, *, fold: int, validation: Literal["test_halves", "held_out"]) -> Split:
        """The rows for testing on `fold`, under the switch `protocol.validation`.

        "held_out": the next fold that is present (cyclic) selects and is not trained on. "test_halves": every other
        fold trains and nothing is held out; who selects does it on one half of the test rows (see `halves`).
        """
        present = tuple(int(number) for number in np.unique(index.fold) if number >= 0)
        if fold not in present:
            raise ValueError(f"fold {fold} is not among the prepared recordings; present: {_listed(present)}")
        if validation not in ("test_halves", "held_out"):
            raise ValueError(f"validation is {validation!r}; wanted test_halves or held_out")
        held_out = [fold]
        if validation == "held_out":
            held_out.append(present[(present.index(fold) + 1) % len(present)])
        trained = [number for number in present if number not in held_out]
        if not trained:
            raise ValueError(
                f"testing on fold {fold} with validation={validation} leaves no fold to train on; present: "
                f"{_listed(present)}; prepare more folds"
            )
        return Split(
            train=np.flatnonzero(np.isin(index.fold, trained)),
            validation=np.flatnonzero(np.isin(index.fold, held_out[1:])),
            test=np.flatnonzero(index.fold == fold),
        )

    def _subject(self, source: Path | None) -> str:
        return f"{type(self).__name__} from {source or 'no source'}:"


def halves(index: Index, rows: np.ndarray) -> np.ndarray:
    """bool [len(rows)]: True for the half that selects, False for the half that is reported.

    A group is never split. Groups are taken by size, then by a hash of their name, and each goes where fewer clips of
    its classes are, so that both halves hold about half of every class.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for position, row in enumerate(rows):
        members[str(index.group[row])].append(position)
    loads = (Counter[int](), Counter[int]())
    selects = np.zeros(len(rows), dtype=bool)
    for group in sorted(members, key=lambda name: (-len(members[name]), hashlib.sha256(name.encode()).digest())):
        labels = [int(index.label[rows[position]]) for position in members[group]]
        cost = [(sum(load[label] for label in labels), load.total()) for load in loads]
        side = int(cost[1] < cost[0])
        loads[side].update(labels)
        selects[members[group]] = bool(side)
    return selects


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
