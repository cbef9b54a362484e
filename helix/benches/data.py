"""Prepared recordings beside the ways of others: random clips, preparation per core, memory, and a pass over S3.

Everything is made of real recordings of ESC-50, which `source` names. Contestants give the same clips as float32 and
run in turns in one process; only what is about memory has a process of its own. B batch, T samples.
"""

import contextlib
import csv
import hashlib
import importlib.util
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3.session
import numpy as np
import soundfile
import soxr

from helix.bench import (
    TIMING_COLUMNS,
    Conditions,
    NotRunError,
    Outcome,
    Row,
    Table,
    Target,
    Timing,
    brief,
    process_clocks,
    race,
    ratio_of,
    timing_row,
)
from helix.data.cache import ShardCache
from helix.data.clips import concat, single
from helix.data.datasets.esc50 import COLUMNS, TABLE
from helix.data.loader import Host
from helix.data.shards import Recordings, open_prepared, prepare
from helix.loader_peers import Read, authors_path, litdata_random, webdataset_stream
from helix.loopback import s3_on_loopback
from helix.peers import MissingPeerError
from helix.process import in_own_process
from helix.registry import BENCHES
from helix.storage import FolderStorage, Storage, open_storage

RATE_HZ, OFFICIAL_HZ = 16_000, 44_100
CLIP_SAMPLES = 5 * RATE_HZ
BATCH = 32
JOINED = 10

OURS = "helix int16, random"
#: The same where nothing that a batch lay in can be used again: what the system takes to give memory is in it.
FRESH = "helix int16, random, every batch in fresh memory"
FLAC, INT16 = "webdataset FLAC, stream", "webdataset int16, stream"
LITDATA = "litdata int16, random"
AUTHORS = "authors: soundfile, a resampler per item"
#: How many times the CPU time of ours it takes others to give random clips.
CLIP_TARGETS = {FLAC: 20.0, INT16: 2.0, LITDATA: 4.0, AUTHORS: 20.0}
JOINED_TARGET = 20.0

PREPARE = "helix prepare, everything"
#: Decoding, the mean of the channels and resampling alone, as who uses the two libraries writes it. float64 is what
#: they do unasked, and gives the samples that we store; the other two are quicker and give others.
ALONE = {dtype: f"soundfile + soxr, {dtype}" for dtype in ("float64", "float32", "int16")}
ASKED = "float64"
PREPARE_TARGET = 0.8
#: Of what a set is larger, so much may be found again in the memory of the process that has read all of it.
MEMORY_TARGET = 0.02
CACHED, FILED, READ = "helix ShardCache", "boto3 download_file, then sha256", "boto3 get_object, sha256 meanwhile"
S3_TARGET = 0.8

#: Files that changed this short a time ago are read twice by a preparation, which is not what is measured.
REST_S = 2.5


@BENCHES.register("data")
@dataclass(frozen=True, kw_only=True)
class DataBench:
    """`source`: the folder of ESC-50. `recordings` of it are read, `prepared` of them prepared and `memory` of them in
    the sets of which one is larger; a run reads `clips` clips, of which a tenth as many are ten recordings long. All
    files lie in a folder that is removed, inside `scratch` or where the system has such."""

    source: str = ""
    recordings: int = 400
    prepared: int = 400
    memory: tuple[int, int] = (200, 1000)
    clips: int = 320
    scratch: str = ""

    def run(self, how: Conditions) -> Outcome:
        if not self.source:
            raise ValueError("the bench data needs real recordings: source=DIR, the folder of ESC-50")
        if self.clips < BATCH or self.clips % JOINED:
            raise ValueError(f"clips is {self.clips}; wanted a multiple of {JOINED} and at least {BATCH}")
        if len(self.memory) != 2 or self.memory[0] >= self.memory[1]:
            raise ValueError(f"memory is {self.memory}; wanted the sizes of a small and of a larger set")
        with tempfile.TemporaryDirectory(prefix="helix-bench-", dir=self.scratch or None) as folder:
            return self._run(Path(folder), how)

    def _run(self, folder: Path, how: Conditions) -> Outcome:
        rows = _rows(Path(self.source), max(self.recordings, self.prepared, self.memory[1]))
        how.say("writing the sources")
        whole = _source(folder / "whole", rows[: self.recordings])
        official = _source(folder / "official", rows[: max(self.recordings, self.prepared)], rate_hz=OFFICIAL_HZ)
        part = _source(folder / "part", [(row, official / "audio" / row[0]) for row, _ in rows[: self.prepared]])
        time.sleep(REST_S)
        recordings = _prepared(whole, FolderStorage(folder / "storage"))
        clips, missing = self._clips(recordings, folder, official, how)
        joined = self._joined(recordings, official, how)
        preparing = self._preparing(part, folder, how)
        memory = self._memory(rows, folder, how)
        passes = self._passes(recordings, folder, how)
        per_clip, per_joined = 1e-3 * self.clips, 1e-3 * (self.clips // JOINED)
        mib = sum(shard["bytes"] for shard in recordings.manifest["shards"]) / 2**20
        tables = (
            _times(f"{self.clips} clips of 5 s as float32", clips | missing, OURS, per_clip, "ms per clip"),
            _times(f"{self.clips // JOINED} clips of ten recordings", joined, OURS, per_joined, "ms per clip"),
            _times(
                f"preparing {self.prepared} recordings of 5 s and 44.1 kHz on one core",
                preparing,
                PREPARE,
                1e-3 * self.prepared,
                "ms per recording",
            ),
            _memory_table(memory),
            _times(f"a pass over {mib:.0f} MiB in S3 on loopback", passes, CACHED, 1e-3 * mib, "ms per MiB"),
        )
        return Outcome(tables=tables, targets=tuple(_targets(clips, joined, preparing, memory, passes)))

    def _clips(
        self, recordings: Recordings, folder: Path, official: Path, how: Conditions
    ) -> tuple[dict[str, Timing | Exception], dict[str, Timing | Exception]]:
        """The race for clips of one recording, and why the peers that are not in it are not."""
        waves = [recordings.wave(row) for row in range(len(recordings))]
        paths = [official / "audio" / f"{name}.wav" for name in recordings.index.recording_id]
        (folder / "litdata").mkdir()
        loads: dict[str, Callable[[], Read]] = {
            FLAC: lambda: webdataset_stream(folder, waves, rate_hz=RATE_HZ, form="flac"),
            INT16: lambda: webdataset_stream(folder, waves, rate_hz=RATE_HZ, form="int16"),
            LITDATA: lambda: litdata_random(folder / "litdata", waves),
            AUTHORS: lambda: authors_path(paths, rate_hz=RATE_HZ),
        }
        ours = Host(recordings=recordings)
        numbers = np.random.default_rng(0).integers(0, len(recordings), self.clips)

        def gathered() -> None:
            for low in range(0, len(numbers), BATCH):
                ours.gather(single(recordings.index, numbers[low : low + BATCH], clip_samples=CLIP_SAMPLES))

        contestants: dict[str, Callable[[], object]] = {OURS: gathered}
        missing: dict[str, Timing | Exception] = {}
        for name, load in loads.items():
            try:
                contestants[name] = _in_batches(load(), numbers.tolist(), BATCH)
            except Exception as error:  # a peer may raise anything; that is its result
                missing[name] = NotRunError(str(error)) if isinstance(error, MissingPeerError) else error
        return race(contestants, how, clocks=process_clocks), missing

    def _joined(self, recordings: Recordings, official: Path, how: Conditions) -> dict[str, Timing | Exception]:
        paths = [official / "audio" / f"{name}.wav" for name in recordings.index.recording_id]
        count = self.clips // JOINED
        rows = np.resize(np.arange(len(recordings)), count)
        clips = concat(
            recordings.index, rows, n=JOINED, position=0, piece_samples=CLIP_SAMPLES, parts=JOINED, seed=0, epoch=0
        )
        ours = Host(recordings=recordings)

        def gathered() -> None:
            for low in range(0, count, BATCH):
                ours.gather(clips.take(np.arange(low, min(low + BATCH, count))))

        def gathered_fresh() -> None:
            for low in range(0, count, BATCH):
                Host(recordings=recordings).gather(clips.take(np.arange(low, min(low + BATCH, count))))

        contestants: dict[str, Callable[[], object]] = {OURS: gathered, FRESH: gathered_fresh}
        try:
            read = authors_path(paths, rate_hz=RATE_HZ, parts=JOINED)
        except MissingPeerError as error:
            return race(contestants, how, clocks=process_clocks) | {AUTHORS: NotRunError(str(error))}
        contestants[AUTHORS] = _in_batches(read, clips.row.tolist(), JOINED * BATCH)
        return race(contestants, how, clocks=process_clocks)

    def _preparing(self, source: Path, folder: Path, how: Conditions) -> dict[str, Timing | Exception]:
        paths = sorted((source / "audio").glob("*.wav"))
        numbers = itertools.count()

        def everything() -> None:
            prepare(
                "esc50", source=source, storage=FolderStorage(folder / f"prepared-{next(numbers)}"), allow_partial=True
            )

        def alone(dtype: Any) -> None:
            for path in paths:
                wave, found_hz = soundfile.read(path, dtype=dtype)
                soxr.resample(wave.mean(axis=1) if wave.ndim > 1 else wave, found_hz, RATE_HZ, quality="HQ")

        contestants: dict[str, Callable[[], object]] = {PREPARE: everything}
        contestants |= {name: lambda dtype=dtype: alone(dtype) for dtype, name in ALONE.items()}
        with _one_core():
            found = race(contestants, how, clocks=process_clocks)
        for made in folder.glob("prepared-*"):
            shutil.rmtree(made)
        return found

    def _memory(
        self, rows: Sequence[tuple[tuple[str, ...], Path]], folder: Path, how: Conditions
    ) -> dict[int, tuple[float, float, float] | Exception]:
        """Per size of a set: MiB of the set, and of the process when it has read it: its own, and mapped files."""
        found: dict[int, tuple[float, float, float] | Exception] = {}
        for count in self.memory:
            how.say(f"memory, {count} recordings")
            storage = FolderStorage(folder / f"memory-{count}")
            try:
                prepared = _prepared(_source(folder / f"source-{count}", rows[:count]), storage).prepared
                mib = sum(shard["bytes"] for shard in prepared.manifest["shards"]) / 2**20
                own, mapped = in_own_process(memory_after_all, str(storage.root), prepared.prefix, threads=how.threads)
                found[count] = mib, own, mapped
            except (OSError, RuntimeError) as error:
                found[count] = error
        return found

    def _passes(self, recordings: Recordings, folder: Path, how: Conditions) -> dict[str, Timing | Exception]:
        """All shards of a bucket once into an empty cache, and by the plain calls that do the same."""
        if importlib.util.find_spec("moto") is None:
            return {CACHED: NotRunError("pip install -c constraints.txt 'moto[server]'")}
        with s3_on_loopback(folder) as address:
            bucket = open_storage(address)
            shards = recordings.manifest["shards"]
            keys = [f"{recordings.prepared.prefix}/{shard['name']}" for shard in shards]
            local = FolderStorage(folder / "storage")
            for key in keys:
                bucket.upload(key, local.path(key))
            client = boto3.session.Session().client("s3")
            name, _, prefix = address.removeprefix("s3://").partition("/")
            numbers = itertools.count()

            def fresh() -> Path:
                path = folder / f"pass-{next(numbers)}"
                path.mkdir()
                return path

            def cached() -> None:
                cache = ShardCache(fresh())
                for key, shard in zip(keys, shards, strict=True):
                    cache.samples(bucket, key, shard["bytes"], shard["sha256"])

            def filed() -> None:
                to = fresh()
                for number, key in enumerate(keys):
                    client.download_file(name, f"{prefix}/{key}", str(to / str(number)))
                    with (to / str(number)).open("rb") as file:
                        assert hashlib.file_digest(file, "sha256").hexdigest() == shards[number]["sha256"]

            def read() -> None:
                to = fresh()
                for number, key in enumerate(keys):
                    digest = hashlib.sha256()
                    body = client.get_object(Bucket=name, Key=f"{prefix}/{key}")["Body"]
                    with (to / str(number)).open("wb") as file:
                        for piece in body.iter_chunks(2**20):
                            digest.update(piece)
                            file.write(piece)
                    assert digest.hexdigest() == shards[number]["sha256"]

            found = race({CACHED: cached, FILED: filed, READ: read}, how, clocks=process_clocks)
        for made in folder.glob("pass-*"):
            shutil.rmtree(made)
        return found


def memory_after_all(folder: str, prefix: str) -> tuple[float, float]:
    """MiB of this process after an epoch over a prepared set: its own, and of mapped files, which the system may take.

    Raises OSError where the system (any but Linux) does not say.
    """
    recordings = open_prepared(FolderStorage(Path(folder)), prefix)
    host = Host(recordings=recordings)
    order = np.random.default_rng(0).permutation(len(recordings))
    for low in range(0, len(order), BATCH):
        host.gather(single(recordings.index, order[low : low + BATCH], clip_samples=CLIP_SAMPLES))
    held = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if ":" in line
    )
    own, mapped = (int(held[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Keep this thread, and what it starts, on one core where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _rows(source: Path, count: int) -> list[tuple[tuple[str, ...], Path]]:
    """Rows of the table of ESC-50, each with its file, spread over all that are there."""
    table = next((path for path in sorted(source.rglob(TABLE.name)) if path.parent.name == TABLE.parent.name), None)
    if table is None:
        raise ValueError(f"{source} holds no {TABLE}; wanted the folder of ESC-50")
    audio = table.parent.parent / "audio"
    with table.open(newline="", encoding="utf-8") as file:
        rows = [tuple(row[column] for column in COLUMNS) for row in csv.DictReader(file)]
    found = [(row, audio / row[0]) for row in rows if (audio / row[0]).is_file()]
    if len(found) < count:
        raise ValueError(f"{source} holds {len(found)} recordings; wanted {count}, ask for fewer")
    order = np.random.default_rng(0).permutation(len(found))[:count]
    return [found[number] for number in order]


def _source(folder: Path, rows: Sequence[tuple[tuple[str, ...], Path]], *, rate_hz: int | None = None) -> Path:
    """A part of ESC-50 in its official layout; at `rate_hz` if one is given."""
    (folder / TABLE.parent).mkdir(parents=True)
    (folder / "audio").mkdir()
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *(row for row, _ in rows)])
    for row, path in rows:
        to = folder / "audio" / row[0]
        if rate_hz is None:
            to.symlink_to(path.resolve())
        else:
            wave_T, found_hz = soundfile.read(path, dtype="float32")
            soundfile.write(to, soxr.resample(wave_T, found_hz, rate_hz, quality="HQ"), rate_hz, subtype="PCM_16")
    return folder


def _prepared(source: Path, storage: Storage) -> Recordings:
    prepared = prepare("esc50", source=source, storage=storage, allow_partial=True)
    return open_prepared(storage, prepared.prefix)


def _in_batches(read: Read, numbers: Sequence[int], size: int) -> Callable[[], None]:
    def run() -> None:
        for low in range(0, len(numbers), size):
            read(numbers[low : low + size])

    return run


def _times(title: str, results: Mapping[str, Timing | Exception], ours: str, each_s: float, each: str) -> Table:
    rows = tuple(timing_row(name, result, results[ours], each_s=each_s) for name, result in results.items())
    return Table(title=title, columns=(*TIMING_COLUMNS, each), rows=rows)


def _memory_table(memory: Mapping[int, tuple[float, float, float] | Exception]) -> Table:
    rows = []
    for count, found in memory.items():
        bad = isinstance(found, Exception)
        note = brief(found) if isinstance(found, Exception) else "mapped files are the system's to take back"
        rows.append(Row(name=f"{count:,} recordings", values=(None,) * 3 if bad else found, note=note))
    columns = ("MiB of the set", "MiB of its own", "MiB of mapped files")
    return Table(title="a process that has read a whole set", columns=columns, rows=tuple(rows))


def _targets(
    clips: Mapping[str, Timing | Exception],
    joined: Mapping[str, Timing | Exception],
    preparing: Mapping[str, Timing | Exception],
    memory: Mapping[int, tuple[float, float, float] | Exception],
    passes: Mapping[str, Timing | Exception],
) -> Iterator[Target]:
    for name, wanted in CLIP_TARGETS.items():
        yield Target(
            name=f"clips of 5 s: {name} / helix", wanted=wanted, found=ratio_of(clips, name, OURS), unit="times"
        )
    found = ratio_of(joined, AUTHORS, OURS)
    yield Target(name=f"clips of ten: {AUTHORS} / helix", wanted=JOINED_TARGET, found=found, unit="times")
    for dtype, alone in ALONE.items():
        found = ratio_of(preparing, alone, PREPARE)
        name = f"{'' if dtype == ASKED else 'stretch: '}preparation per core: speed of helix / {alone}"
        yield Target(name=name, wanted=PREPARE_TARGET, found=found, unit="times")
    found = None
    (small, large) = memory.values()
    if not isinstance(small, Exception) and not isinstance(large, Exception):
        found = max(0.0, large[1] - small[1]) / (large[0] - small[0])
    name = "memory of its own that a larger set adds"
    yield Target(name=name, wanted=MEMORY_TARGET, found=found, unit="MiB per MiB", at_most=True)
    walls = {name: result.wall_s for name, result in passes.items() if isinstance(result, Timing)}
    plain = [wall_s for name, wall_s in walls.items() if name != CACHED]
    found = min(plain) / walls[CACHED] if plain and CACHED in walls else None
    name = "a pass over S3: speed of helix / the faster plain download with sha256, on the wall"
    yield Target(name=name, wanted=S3_TARGET, found=found, unit="times")
