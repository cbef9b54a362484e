"""The contract of a data set: which recordings it has, how one sounds, which rows train, validate and test, and which
clips are made of them.

A member is a frozen keyword-only dataclass in helix/data/datasets/, registered in helix.registry.DATASETS; its
fields are its options and part of a trial's identity. It lists recordings from metadata alone (`scan`) and decodes one
at a time (`wave`); shards.py does the rest.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from helix.data.clips import Clips, single
from helix.data.index import Index, Recording, listed_index
from helix.data.splits import Split, by_folds, listed
from helix.protocol import Protocol
from helix.registry import DATASETS

__all__ = [
    "Dataset",
    "DatasetError",
    "Download",
    "Index",
    "PartFacts",
    "Recording",
    "Scan",
    "Split",
    "listed_index",
    "official_root",
    "recordings_of",
    "split_facts",
    "unlisted",
]

#: How many problems an error message spells out before it says how many more there are.
PROBLEMS_SHOWN = 20


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
    """What a source holds. `missing` (recording id, or the path of a file without a row -> reason) a partial set may
    leave out; `problems` nobody may.

    `classes` are the names of the labels 0, 1, ...: those of the listing, so that a part of the audio has the classes
    of the whole. `absent` are the rows behind `missing` as far as they can be read: they are checked like the others.
    `notes`: one plain sentence each on what was left out by rule and counted.
    """

    recordings: list[Recording]
    classes: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    absent: list[Recording] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()


class Dataset(ABC):
    """One data set. What depends on no option is a class variable, what may depend on one is a property."""

    rate_hz: ClassVar[int] = 16_000
    licence: ClassVar[str]
    url: ClassVar[str]
    #: The circular shift that the authors' code uses here, in seconds either way.
    authors_shift_s: ClassVar[float]
    needs_source: ClassVar[bool]
    #: What a reader of results has to know about this data set.
    caveat: ClassVar[str | None] = None
    #: The data set whose recordings this one reads, where they are not its own: nothing is stored twice.
    shares: ClassVar[str | None] = None
    #: Whether each clip is made for one recording, so that clips can be counted before anything is decoded.
    clip_per_recording: ClassVar[bool] = True

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        absent = [name for name in ("licence", "url", "authors_shift_s", "needs_source") if not hasattr(cls, name)]
        if absent:
            raise ValueError(
                f"data set class {cls.__name__} does not say its {listed(absent)}; set them as class variables"
            )

    @property
    @abstractmethod
    def class_count(self) -> int:
        """How many classes the complete data set has; their names come with the listing."""

    @property
    @abstractmethod
    def clip_samples(self) -> int:
        """Samples of one clip at `rate_hz`."""

    @property
    def downloads(self) -> tuple[Download, ...]:
        """The official files, where licence and address allow to fetch them."""
        return ()

    @property
    def recording_samples(self) -> int:
        """Samples of a typical recording, by which shards are planned."""
        return self.clip_samples

    @property
    def expected_cells(self) -> Mapping[tuple[int, int], int]:
        """How many recordings the complete data set has per (fold, label); empty where that is not published."""
        return {}

    @property
    def expected_per_fold(self) -> Mapping[int, int]:
        """How many per fold; empty where that is not published."""
        return _summed(self.expected_cells, 0)

    @property
    def expected_per_class(self) -> Mapping[int, int]:
        """How many per label; empty where that is not published."""
        return _summed(self.expected_cells, 1)

    @property
    def expected_recordings(self) -> int | None:
        """How many recordings there are; None where that is not published."""
        return sum(self.expected_per_fold.values()) or None

    @property
    def folds(self) -> tuple[int, ...]:
        """What a trial may be tested on."""
        return tuple(sorted(self.expected_per_fold))

    @property
    def fold_column(self) -> tuple[int, ...]:
        """What the fold of a recording may be; empty where recordings belong to none."""
        return tuple(sorted(self.expected_per_fold))

    @abstractmethod
    def scan(self, source: Path | None) -> Scan:
        """Everything that the metadata of `source` says, good or bad, without decoding audio."""

    @abstractmethod
    def wave(self, recording: Recording, source: Path | None) -> np.ndarray:
        """int16 [samples], mono at `rate_hz`, of the recording's own length. Raises AudioError."""

    def split(self, index: Index, *, fold: int, protocol: Protocol) -> Split:
        """The recordings for testing on `fold`. Raises ValueError where a part would be empty."""
        return by_folds(index, fold=fold, validation=protocol.validation)

    def clips(  # members that draw use what this one leaves unused
        self,
        index: Index,
        rows: np.ndarray,
        *,
        protocol: Protocol,  # noqa: ARG002
        seed: int,  # noqa: ARG002
        epoch: int | None,  # noqa: ARG002
    ) -> Clips:
        """The clips made of `rows`, as many in every epoch: a pure function of (seed, epoch).

        None as epoch is evaluation: always the same clips, whatever the seed.
        """
        return single(index, rows, clip_samples=self.clip_samples)

    @property
    def recording_options(self) -> dict[str, Any]:
        """Those options (of the data set in `shares`, where it is set) that decide which recordings there are.

        Settings that differ in others only share their prepared recordings.
        """
        return asdict(self)  # pyright: ignore

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
        problems, fold_column = list(found.problems), self.fold_column
        rows = [*found.recordings, *found.absent]
        for recording_id, count in sorted(Counter(row.recording_id for row in rows).items()):
            if count > 1:
                problems.append(f"{recording_id}: stands {count} times in the metadata; wanted once")
        for row in rows:
            if not 0 <= row.label < len(found.classes):
                problems.append(f"{row.recording_id}: label {row.label}; wanted 0 to {len(found.classes) - 1}")
            if row.fold is not None and row.fold not in fold_column:
                problems.append(f"{row.recording_id}: fold {row.fold}; wanted one of {listed(fold_column)}")
        if not allow_missing:
            problems += [f"{recording_id}: {reason}" for recording_id, reason in sorted(found.missing.items())]
        if problems:
            raise DatasetError(self._subject(source), problems)
        return Scan(
            recordings=sorted(found.recordings, key=lambda row: row.recording_id),
            classes=found.classes,
            missing=dict(sorted(found.missing.items())),
            absent=found.absent,
            notes=found.notes,
        )

    def shortfall(self, cells: Iterable[tuple[int | None, int]], classes: Sequence[str]) -> list[str]:
        """Where the recordings, each given as its (fold, label), and the classes differ from the complete data set."""
        found, lines = Counter(cells), []
        if len(classes) != self.class_count:
            lines.append(f"{len(classes)} classes; wanted {self.class_count}")
        per_fold, per_class = _summed(found, 0), _summed(found, 1)
        for fold, wanted in sorted(self.expected_per_fold.items()):
            cell = {label: count for (of, label), count in self.expected_cells.items() if of == fold}
            odd = [label for label in cell if found[fold, label] != cell[label]]
            total = per_fold.get(fold, 0)
            if total == 0:
                lines.append(f"fold {fold}: no recordings; wanted {wanted}")
            elif odd or total != wanted:
                named = ", ".join(f"{_named(classes, label)} {found[fold, label]} of {cell[label]}" for label in odd)
                lines.append(f"fold {fold}: {total} recordings of {wanted}{'; ' if named else ''}{named}")
        if not self.expected_cells:
            lines += [
                f"{_named(classes, label)}: {per_class.get(label, 0)} recordings of {wanted}"
                for label, wanted in sorted(self.expected_per_class.items())
                if per_class.get(label, 0) != wanted
            ]
        wanted = self.expected_recordings
        if not lines and wanted is not None and found.total() != wanted:
            lines.append(f"{found.total()} recordings of {wanted}")
        return lines

    def _subject(self, source: Path | None) -> str:
        return f"{type(self).__name__} from {source or 'no source'}:"


def recordings_of(name: str, options: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """The data set whose prepared recordings `name` reads, and all options of it: what prepared data is keyed by."""
    dataset: Dataset = DATASETS.make(name, options)
    owner = dataset.shares or name
    return owner, DATASETS.resolve(owner, dataset.recording_options)


@dataclass(frozen=True, kw_only=True)
class PartFacts:
    """One part of a split in numbers. `silence`: the share of samples that only complete clips to one length."""

    recordings: int
    speakers: int
    clips: int
    silence: float
    clips_per_class: tuple[int, ...]

    def __str__(self) -> str:
        held = [count for count in self.clips_per_class if count]
        spread = f"{min(held)} to {max(held)} clips" if held else "no clips"
        classes = f"{len(held)} of {len(self.clips_per_class)} classes with {spread} each"
        speakers = f", {self.speakers} speakers" if self.speakers else ""
        return f"{self.clips} clips of {self.recordings} recordings{speakers}, {classes}, {self.silence:.1%} silence"


def split_facts(dataset: Dataset, index: Index, *, classes: int, fold: int, protocol: Protocol) -> dict[str, PartFacts]:
    """train, validation and test in numbers; what the first epoch trains on and what evaluation hears."""
    split = dataset.split(index, fold=fold, protocol=protocol)
    facts = {}
    for name, rows in (("train", split.train), ("validation", split.validation), ("test", split.test)):
        clips = dataset.clips(index, rows, protocol=protocol, seed=0, epoch=0 if name == "train" else None)
        facts[name] = PartFacts(
            recordings=len(rows),
            speakers=len({speaker for speaker in index.speaker[rows].tolist() if speaker is not None}),
            clips=len(clips),
            silence=clips.silence,
            clips_per_class=tuple(np.bincount(clips.label, minlength=classes).tolist()),
        )
    return facts


def official_root(source: Path, marker: Path, name: str) -> Path:
    """The folder of an official layout: `source` itself or the one folder inside it that has `marker`."""
    children = sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    found = [folder for folder in (source, *children) if (folder / marker).exists()]
    if not found:
        raise DatasetError(
            f"{name} from {source}:",
            [f"there is no {marker} in it or in a folder inside it; wanted the unpacked {name}"],
        )
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise DatasetError(f"{name} from {source}:", [f"holds {len(found)} copies ({names}); name one of them"])
    return found[0]


def unlisted(there: Iterable[str], rows: Iterable[str], table: object) -> dict[str, str]:
    """What is missing where files are there that no row of `table` names: their rows."""
    return dict.fromkeys(sorted(set(there) - set(rows)), f"is there, and {table} has no row for it")


def _summed(cells: Mapping[Any, int], part: int) -> dict[int, int]:
    """The counts by fold (part 0) or by label (part 1)."""
    sums = Counter[int]()
    for cell, count in cells.items():
        sums[cell[part]] += count
    return dict(sums)


def _named(classes: Sequence[str], label: int) -> str:
    return classes[label] if label < len(classes) else f"class {label}"
