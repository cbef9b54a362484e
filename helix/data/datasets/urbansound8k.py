"""UrbanSound8K: 8732 excerpts of urban sounds of up to 4 s, 10 classes, 10 folds. Salamon, Jacoby and Bello 2014, doi
10.1145/2647868.2655045.

Licence     CC BY-NC 3.0 by the text that comes with the data; the loader soundata says 4.0.
Address     https://zenodo.org/record/1203745, UrbanSound8K.tar.gz; the md5 below is the one soundata checks.
Counts      873, 888, 925, 990, 936, 823, 838, 806, 816 and 837 in folds 1 to 10; 1000 of each class but car_horn
            (429), gun_shot (374) and siren (929).
Split       The ten official folds of metadata/UrbanSound8K.csv as they are. They must never be reshuffled: excerpts of
            one field recording (fsID, here the group) stand in one fold, and mixing them makes a test look 20 points
            better than it is.
Profiles    `shift`: the authors' code shifts by 0.4 s, the paper by 0.5 s.

Files have any rate, one or two channels and 8 to 32 bits; each is mixed to mono and resampled. An excerpt keeps its own
length; a clip is its first 4 s, with silence at the end where it is shorter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from helix.data.audio import decode
from helix.data.dataset import Dataset, Download, Recording, Scan, official_root, unlisted
from helix.data.metadata import read_table
from helix.registry import DATASETS

TABLE = Path("metadata", "UrbanSound8K.csv")
COLUMNS = ("slice_file_name", "fsID", "fold", "classID", "class")
CLIP_S = 4
PER_FOLD = {1: 873, 2: 888, 3: 925, 4: 990, 5: 936, 6: 823, 7: 838, 8: 806, 9: 816, 10: 837}
PER_CLASS = {
    "air_conditioner": 1000,
    "car_horn": 429,
    "children_playing": 1000,
    "dog_bark": 1000,
    "drilling": 1000,
    "engine_idling": 1000,
    "gun_shot": 374,
    "jackhammer": 1000,
    "siren": 929,
    "street_music": 1000,
}
CLASSES = tuple(PER_CLASS)
ARCHIVE = Download(
    url="https://zenodo.org/record/1203745/files/UrbanSound8K.tar.gz",
    name="UrbanSound8K.tar.gz",
    md5="9aa69802bbf37fb986f71ec1483a196e",
)


@DATASETS.register("urbansound8k")
@dataclass(frozen=True, kw_only=True)
class UrbanSound8K(Dataset):
    """The official layout, metadata/UrbanSound8K.csv beside audio/fold1 to audio/fold10."""

    licence: ClassVar[str] = "CC BY-NC 3.0 (so its own text; soundata says 4.0)"
    url: ClassVar[str] = "https://urbansounddataset.weebly.com/urbansound8k.html"
    authors_shift_s: ClassVar[float] = 0.4
    needs_source: ClassVar[bool] = True
    caveat: ClassVar[str | None] = (
        "classes are of unequal size, and excerpts are shorter than a clip of 4 s by up to 3.95 s"
    )

    @property
    def class_count(self) -> int:
        return len(CLASSES)

    @property
    def downloads(self) -> tuple[Download, ...]:
        return (ARCHIVE,)

    @property
    def clip_samples(self) -> int:
        return CLIP_S * self.rate_hz

    @property
    def expected_per_fold(self) -> Mapping[int, int]:
        return PER_FOLD

    @property
    def expected_per_class(self) -> Mapping[int, int]:
        return dict(enumerate(PER_CLASS.values()))

    def scan(self, source: Path | None) -> Scan:
        assert source is not None
        root = official_root(source, TABLE, "urbansound8k")
        recordings, absent, missing = [], [], {}
        table = read_table(root / TABLE, COLUMNS, name=str(TABLE))
        problems, listed = list(table.problems), set()
        there = {path.relative_to(root).as_posix() for path in root.glob("audio/fold*/[!.]*.wav") if path.is_file()}
        for line, row in table.rows:
            path = f"audio/fold{row['fold']}/{row['slice_file_name']}"
            listed.add(path)
            recording, problem = _parse(row, root.relative_to(source))
            if recording is None:
                problems.append(f"{TABLE} line {line}: {problem}")
            elif path not in there:
                absent.append(recording)
                missing[recording.recording_id] = f"{path} is not there"
            else:
                recordings.append(recording)
        if table.rows:
            missing |= unlisted(there, listed, TABLE)
        return Scan(recordings=recordings, classes=CLASSES, missing=missing, absent=absent, problems=problems)

    def wave(self, recording: Recording, source: Path | None) -> np.ndarray:
        assert source is not None and recording.path is not None
        return decode(source / recording.path, rate_hz=self.rate_hz)


def _parse(row: Mapping[str, str], root: Path) -> tuple[Recording | None, str]:
    """One row of the table as a recording, or what is wrong with it."""
    filename, source_id, fold, label, name = (row[column] for column in COLUMNS)
    if not filename.endswith(".wav") or Path(filename).name != filename:
        return None, f"slice_file_name is {filename!r}; wanted the name of a .wav file"
    if not fold.isdecimal() or not label.isdecimal():
        return None, f"{filename}: fold is {fold!r} and classID {label!r}; wanted two numbers"
    if not source_id or filename.partition("-")[0] != source_id:
        return None, f"{filename}: fsID is {source_id!r}; wanted {filename.partition('-')[0]!r}, as its name begins"
    if int(label) < len(CLASSES) and name != CLASSES[int(label)]:
        return None, f"{filename}: classID {label} is called {name!r}; wanted {CLASSES[int(label)]!r}"
    return (
        Recording(
            recording_id=filename.removesuffix(".wav"),
            label=int(label),
            path=(root / "audio" / f"fold{fold}" / filename).as_posix(),
            fold=int(fold),
            speaker=None,
            group=source_id,
        ),
        "",
    )
