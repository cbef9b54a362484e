"""What the tests of helix.data stand on: small sources in official layouts, prepared tones, and real recordings."""

import csv
import gzip
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from helix.data.dataset import Dataset
from helix.data.datasets import librispeech, speech_commands, urbansound8k, voxpopuli
from helix.data.datasets.esc50 import CLASSES, COLUMNS
from helix.data.shards import Recordings, open_prepared, prepare
from helix.registry import DATASETS
from helix.storage import FolderStorage, Storage

ROOT = Path(__file__).resolve().parents[3]
PACKS = ROOT.parent / "shared" / "data"

EscLayout = Callable[..., Path]


def write_esc50(
    folder: Path,
    *,
    folds: Iterable[int] = (1, 2, 3),
    per_cell: int = 2,
    rate_hz: int = 16_000,
    samples: int = 1_600,
    labels: Iterable[int] = range(50),
) -> Path:
    """A small ESC-50 in the official layout; the two takes of a pair share their source recording."""
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    random = np.random.default_rng(0)
    with (folder / "meta" / "esc50.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for fold in folds:
            for label in labels:
                for take in range(per_cell):
                    src_file = f"{fold}{label:02d}{take // 2}"
                    filename = f"{fold}-{src_file}-{'ABCDEFGH'[take]}-{label}.wav"
                    table.writerow([filename, fold, label, CLASSES[label], src_file])
                    wave = random.integers(-20_000, 20_000, samples).astype(np.int16)
                    soundfile.write(folder / "audio" / filename, wave, rate_hz, subtype="PCM_16")
    return folder


def sound(path: Path, samples: int, *, rate_hz: int = 16_000, channels: int = 1, subtype: str = "PCM_16") -> None:
    """A file of noise that is the same for the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(list(path.name.encode()))
    wave_TC = random.uniform(-0.5, 0.5, (samples, channels))
    soundfile.write(path, wave_TC, rate_hz, subtype=subtype if path.suffix == ".wav" else None)


def touch(path: Path, _samples: int, **_how: Any) -> None:
    """An empty file: enough for everything that does not decode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def write_urbansound8k(
    folder: Path,
    *,
    folds: Iterable[int] = (1, 2, 3),
    per_cell: int = 2,
    cells: dict[tuple[int, int], int] | None = None,
    make: Callable[..., None] = sound,
) -> Path:
    """A small UrbanSound8K in the official layout: any rate, one or two channels, 16 or 24 bits, up to 4 s."""
    if cells is None:
        cells = {(fold, label): per_cell for fold in folds for label in range(10)}
    (folder / "metadata").mkdir(parents=True)
    with (folder / urbansound8k.TABLE).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class"])
        for (fold, label), count in cells.items():
            for take in range(count):
                source_id = f"{fold}{label:02d}{take // 2}"
                filename = f"{source_id}-{label}-0-{take}.wav"
                table.writerow([filename, source_id, 0.0, 4.0, 1, fold, label, urbansound8k.CLASSES[label]])
                number = len(cells) + take + label
                make(
                    folder / "audio" / f"fold{fold}" / filename,
                    [16, 2_000, 70_000][number % 3],
                    rate_hz=[16_000, 44_100, 48_000][number % 3],
                    channels=1 + number % 2,
                    subtype=["PCM_16", "PCM_24"][take % 2],
                )
    return folder


def write_speech_commands(
    folder: Path,
    *,
    words: Iterable[str] = speech_commands.WORDS,
    per_part: Callable[[str, str], int] = lambda _word, _part: 2,
    make: Callable[..., None] = sound,
) -> Path:
    """A small Speech Commands in the official layout; each speaker says every word and stands in one part."""
    lists: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for word in words:
        for number, part in enumerate(lists):
            for take in range(per_part(word, part)):
                line = f"{word}/{number}{take:07x}_nohash_0.wav"
                lists[part].append(line)
                make(folder / line, [1_600, 16_000, 9_000][(take + number) % 3])
    for part, name in speech_commands.LISTS.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lists[part]))
    sound(folder / speech_commands.NOT_WORDS / "hum.wav", 100)
    return folder


def write_librispeech(
    folder: Path,
    *,
    subset: str = "train-clean-100",
    speakers: int = 6,
    chapters: int = 3,
    utterances: int = 4,
    samples: Callable[[int], int] = lambda number: 5_000 + 37 * number,
    make: Callable[..., None] = sound,
) -> Path:
    """A small LibriSpeech in the official layout: every reader is listed, the first few have audio."""
    folder.mkdir(parents=True)
    readers = [str(14 + 3 * number) for number in range(librispeech.SPEAKERS[subset])]
    lines = ["; a comment", f";{'ID':<5}|SEX| SUBSET", "7 | F | dev-clean | 8.0 | Somebody | Else"]
    lines += [f"{reader:<5}| F | {subset} | 25.0 | Reader {reader}" for reader in readers]
    (folder / librispeech.TABLE).write_text("\n".join(lines) + "\n")
    number = 0
    for reader in readers[:speakers]:
        for chapter in range(100, 100 + chapters):
            place = folder / subset / reader / str(chapter)
            names = [f"{reader}-{chapter}-{utterance:04d}" for utterance in range(utterances)]
            for name in names:
                make(place / f"{name}.flac", samples(number))
                number += 1
            (place / f"{reader}-{chapter}.trans.txt").write_text("".join(f"{name} WORDS\n" for name in names))
    return folder


def write_voxpopuli(
    folder: Path,
    *,
    speakers: int = 5,
    sessions: int = 3,
    utterances: int = 3,
    whole_sessions: bool = True,
    make: Callable[..., None] = sound,
) -> Path:
    """A small VoxPopuli in the official layout, as whole sessions or as the utterances cut from them."""
    table_at = folder / voxpopuli.TABLES[0]
    table_at.parent.mkdir(parents=True)
    with gzip.open(table_at, "wt", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="|")
        table.writerow(
            ["session_id", "id_", "original_text", "normed_text", "speaker_id", "split", "gender", "is_gold", "vad"]
        )
        for session in range(sessions):
            name = f"20{10 + session % 2}0119-0900-PLENARY-{session}-en_20100119-17:00:10_1"
            number = 0
            for speaker in range(speakers):
                for take in range(utterances):
                    begin = 0.5 * number
                    spans = [(begin, begin + 0.25), (begin + 0.3, begin + 0.5)]
                    part = ("train", "dev", "test")[(speaker + take) % 3]
                    row = [name, f"20100119-{number}", "A b.", "a b", f"{1000 + speaker}", part, "female", "False"]
                    table.writerow([*row, repr(spans)])
                    if not whole_sessions:
                        make(folder / "transcribed_data" / "en" / name[:4] / f"{name}-{row[1]}.ogg", 7_200)
                    number += 1
            table.writerow([name, "20100119-x", "", "", "None", "train", "", "False", "[(0.0, 0.01)]"])
            table.writerow([name, "20100119-y", "", "", "1000", "invalid", "", "False", "[]"])
            if whole_sessions:
                make(folder / "raw_audios" / "original" / name[:4] / f"{name}_original.ogg", 8_000 * number)
    return folder


@dataclass(frozen=True, kw_only=True)
class Small:
    """A data set small enough for a test: two or more recordings of every class in every fold that is there."""

    name: str
    options: dict[str, Any]
    source: Path | None

    @property
    def dataset(self) -> Dataset:
        return DATASETS.make(self.name, self.options)

    def prepare(self, storage: Storage, **how: Any) -> Recordings:
        prepared = prepare(
            self.name, self.options, source=self.source, storage=storage, allow_partial=True, shard_mib=4, **how
        )
        return open_prepared(storage, prepared.prefix)


#: How to write a small source of each data set that needs one, in its official layout.
SOURCES: dict[str, Callable[[Path], Path]] = {
    "esc50": write_esc50,
    "urbansound8k": write_urbansound8k,
    "speech_commands": write_speech_commands,
    "concat_speech_commands": write_speech_commands,
    "librispeech": write_librispeech,
    "voxpopuli": write_voxpopuli,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "tones": {"clips_per_class": 8},
    "concat_speech_commands": {"n": 3, "position": 1},
    "librispeech": {"clip_s": 1},
    "voxpopuli": {"clip_s": 1},
}


@pytest.fixture(scope="session", params=DATASETS.names())
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Each registered data set in turn."""
    name = request.param
    source = None
    if DATASETS.make(name, OPTIONS.get(name)).needs_source:
        if name not in SOURCES:
            pytest.fail(f"data set {name!r} needs a source: say in SOURCES of {__file__} how to write a small one")
        source = SOURCES[name](tmp_path_factory.mktemp(name) / "source")
    return Small(name=name, options=OPTIONS.get(name, {}), source=source)


@pytest.fixture(scope="session")
def small_recordings(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Recordings:
    return small.prepare(FolderStorage(tmp_path_factory.mktemp("prepared")))


@pytest.fixture(scope="session")
def layouts() -> SimpleNamespace:
    """How to write each data set in its official layout."""
    return SimpleNamespace(**SOURCES, sound=sound, touch=touch)


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The real recordings that are at hand, by the name of their pack and of its folder."""
    unpacked = tmp_path_factory.mktemp("recordings")

    def of(pack: str, name: str) -> Path:
        named = os.environ.get("HELIX_TEST_RECORDINGS")
        folder = Path(named) if named else unpacked
        if not named and not (folder / name).is_dir() and (PACKS / "unpack.py").is_file():
            subprocess.run([sys.executable, PACKS / "unpack.py", folder, pack], check=True, capture_output=True)
        if not (folder / name).is_dir():
            pytest.skip(f"no real recordings: there is no {name} in HELIX_TEST_RECORDINGS or ../shared/data")
        return folder / name

    return of


@pytest.fixture
def esc50_layout(tmp_path: Path) -> EscLayout:
    return lambda name="ESC-50-master", **how: write_esc50(tmp_path / "source" / name, **how)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return FolderStorage(tmp_path / "storage")


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Recordings:
    """Prepared tones, 8 clips per class in 4 folds, in several shards."""
    storage = FolderStorage(tmp_path_factory.mktemp("tones"))
    prepared = prepare("tones", {"clips_per_class": 8}, source=None, storage=storage, shard_mib=0.5)
    return open_prepared(storage, prepared.prefix)


@pytest.fixture(scope="session")
def real_esc50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real recordings of ESC-50 that are at hand: the folder that holds ESC-50-master."""
    named = os.environ.get("HELIX_TEST_RECORDINGS")
    if named:
        return Path(named)
    if not (PACKS / "unpack.py").is_file():
        pytest.skip("no real recordings: HELIX_TEST_RECORDINGS names no folder and ../shared/data is not there")
    folder = tmp_path_factory.mktemp("recordings")
    subprocess.run([sys.executable, PACKS / "unpack.py", folder, "esc50"], check=True, capture_output=True)
    return folder
