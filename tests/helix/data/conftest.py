"""What the tests of helix.data stand on: small sources in official layouts, prepared tones, and real recordings."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from helix.data.dataset import Dataset
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
SOURCES: dict[str, Callable[[Path], Path]] = {"esc50": write_esc50}
OPTIONS: dict[str, dict[str, Any]] = {"tones": {"clips_per_class": 8}}


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
