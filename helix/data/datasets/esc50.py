"""ESC-50: 2000 environmental recordings of 5 s, 50 classes, 5 folds. Piczak 2015, doi 10.1145/2733373.2806390."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from helix.data.audio import decode, fit_length
from helix.data.dataset import Dataset, Download, Recording, Scan, official_root, unlisted
from helix.data.metadata import read_table
from helix.registry import DATASETS

TABLE = Path("meta", "esc50.csv")
COLUMNS = ("filename", "fold", "target", "category", "src_file")
#: Files are called fold-clip-take-target.wav.
NAME = re.compile(r"(?P<fold>\d+)-\d+-[A-Z]+-(?P<target>\d+)\.wav", re.ASCII)
FOLDS = 5
PER_CLASS_AND_FOLD = 8
CLIP_S = 5
#: The newest commit of the official repository, which has no releases. GitHub packs the archive anew now and then, so
#: it has no checksum that lasts and none is published: what was loaded is checked by its counts and file by file.
COMMIT = "33c8ce9eb2cf0b1c2f8bcf322eb349b6be34dbb6"
ARCHIVE = Download(
    url=f"https://github.com/karolpiczak/ESC-50/archive/{COMMIT}.zip",
    name=f"ESC-50-{COMMIT}.zip",
)

# fmt: off
CLASSES = (
    "dog", "rooster", "pig", "cow", "frog", "cat", "hen", "insects", "sheep", "crow", "rain", "sea_waves",
    "crackling_fire", "crickets", "chirping_birds", "water_drops", "wind", "pouring_water", "toilet_flush",
    "thunderstorm", "crying_baby", "sneezing", "clapping", "breathing", "coughing", "footsteps", "laughing",
    "brushing_teeth", "snoring", "drinking_sipping", "door_wood_knock", "mouse_click", "keyboard_typing",
    "door_wood_creaks", "can_opening", "washing_machine", "vacuum_cleaner", "clock_alarm", "clock_tick",
    "glass_breaking", "helicopter", "chainsaw", "siren", "car_horn", "engine", "train", "church_bells", "airplane",
    "fireworks", "hand_saw",
)
# fmt: on


@DATASETS.register("esc50")
@dataclass(frozen=True, kw_only=True)
class Esc50(Dataset):
    """The official layout, meta/esc50.csv beside audio/. Any rate is accepted (the official download has 44.1 kHz)."""

    licence: ClassVar[str] = "CC BY-NC 3.0; the clips of ESC-10 CC BY 3.0"
    url: ClassVar[str] = "https://github.com/karolpiczak/ESC-50"
    authors_shift_s: ClassVar[float] = 0.5
    needs_source: ClassVar[bool] = True
    caveat: ClassVar[str | None] = (
        "its authors warn that some source recordings were band-limited in ways that depend on the class; and 4 source "
        "recordings (9 clips) stand in two folds, each time under two classes that are easily confused"
    )

    @property
    def classes(self) -> tuple[str, ...]:
        return CLASSES

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
    def expected_cells(self) -> Mapping[tuple[int, int], int]:
        return {(fold, label): PER_CLASS_AND_FOLD for fold in range(1, FOLDS + 1) for label in range(len(CLASSES))}

    def scan(self, source: Path | None) -> Scan:
        assert source is not None
        root = official_root(source, TABLE, "esc50")
        recordings, absent, missing = [], [], {}
        table = read_table(root / TABLE, COLUMNS, name=str(TABLE))
        problems = list(table.problems)
        there = {path.name for path in (root / "audio").glob("[!.]*.wav") if path.is_file()}
        for line, row in table.rows:
            recording, problem = _parse(row, root.relative_to(source))
            if recording is None:
                problems.append(f"{TABLE} line {line}: {problem}")
            elif row["filename"] not in there:
                absent.append(recording)
                missing[recording.recording_id] = f"audio/{row['filename']} is not there"
            else:
                recordings.append(recording)
        if table.rows:
            missing |= unlisted(
                (f"audio/{name}" for name in there), (f"audio/{row['filename']}" for _, row in table.rows), TABLE
            )
        return Scan(recordings=recordings, classes=self.classes, missing=missing, absent=absent, problems=problems)

    def wave(self, recording: Recording, source: Path | None) -> np.ndarray:
        assert source is not None and recording.path is not None
        return fit_length(decode(source / recording.path, rate_hz=self.rate_hz), self.clip_samples)


def _parse(row: Mapping[str, str], root: Path) -> tuple[Recording | None, str]:
    """One row of the table as a recording, or what is wrong with it."""
    filename, fold, target, category, src_file = (row[column] for column in COLUMNS)
    if not filename.endswith(".wav") or Path(filename).name != filename:
        return None, f"filename is {filename!r}; wanted the name of a .wav file"
    if not fold.isdecimal() or not target.isdecimal():
        return None, f"{filename}: fold is {fold!r} and target {target!r}; wanted two numbers"
    if not src_file:
        return None, f"{filename}: src_file is empty; wanted the number of its source recording"
    label = int(target)
    if label < len(CLASSES) and category != CLASSES[label]:
        return None, f"{filename}: target {label} is called {category!r}; wanted {CLASSES[label]!r}"
    named = NAME.fullmatch(filename)
    if named is None:
        return None, f"filename is {filename!r}; wanted fold-clip-take-target.wav, such as 1-100032-A-0.wav"
    known = 1 <= int(fold) <= FOLDS and label < len(CLASSES)  # what is not is reported with the range that is wanted
    if known and (int(named["fold"]), int(named["target"])) != (int(fold), label):
        return None, f"{filename}: fold {fold} and target {target} contradict the name of the file"
    return (
        Recording(
            recording_id=filename.removesuffix(".wav"),
            label=label,
            path=(root / "audio" / filename).as_posix(),
            fold=int(fold),
            speaker=None,
            group=src_file,
        ),
        "",
    )
