"""Recordings -> shards: int16 PCM in .bin files, one Parquet index, and a manifest that is put last.

    data/<name>-<key12>/shards/00000.bin    the samples of its recordings, one after the other
                        shards/00000.json   the receipt of one task: what it wrote, put once the .bin files are whole
                        index.parquet       one row per recording
                        manifest.json       checksums, counts, licence; without it nothing is prepared

The key is a hash of what is prepared, the bytes of every source file included, so that two sources, or a part and the
whole, never overwrite each other, and whoever prepares the same contents writes the same bytes to the same keys: two at
once do no harm. A shard is the work of one pure function of one picklable task; the result depends neither on who ran
it nor in which order, and a second run does again only what is not there or does not verify.

Two things a complete and sound set has that another may lack. Recordings that are not there: `allow_partial` accepts
that, and any number of them. Files that are there and cannot be used (unreadable, cut, empty, not a number):
`quarantine` accepts that, and so many of them. The manifest lists both, each by itself.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import platform
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from helix.data.audio import AudioError, silent_tail
from helix.data.cache import ShardCache
from helix.data.dataset import Dataset, DatasetError, Index, Recording, Scan, recordings_of
from helix.data.sources import Content, is_unchanged, read_contents
from helix.registry import DATASETS
from helix.storage import CorruptObjectError, Storage, Writer, json_bytes

#: Raised when the layout changes; part of the key. Sets of another format are not seen.
FORMAT = 2
FOLDER = "data"
#: How many files are read back at once to verify them; each is in memory then, up to a shard.
VERIFIED_AT_ONCE = 4

SCHEMA = pa.schema(
    [
        ("recording_id", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("samples", pa.int64()),
        ("label", pa.int32()),
        ("speaker", pa.string()),
        ("fold", pa.int32()),
        ("group", pa.string()),
        ("crc32", pa.uint32()),
        ("source_sha256", pa.string()),
        ("padded_samples", pa.int64()),
    ]
)


class CorruptShardError(Exception):
    """Prepared data whose bytes are not those that were published."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}; prepare the data set again, which repairs what does not verify"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What one manifest says. `manifest_sha256` is the identity of the data."""

    prefix: str
    manifest_sha256: str
    manifest: dict[str, Any]


class Recordings:
    """Prepared recordings, read through memory maps. Bytes are checked when a recording is first read."""

    def __init__(self, storage: Storage, prepared: Prepared, index: Index):
        self.prepared, self.index = prepared, index
        self._storage, self._cache = storage, ShardCache.of_environment()
        self._checked = np.zeros(len(index), dtype=bool)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def manifest(self) -> dict[str, Any]:
        return self.prepared.manifest

    @property
    def manifest_sha256(self) -> str:
        return self.prepared.manifest_sha256

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest["classes"])

    @property
    def clip_samples(self) -> int:
        return self.manifest["clip_samples"]

    def wave(self, row: int) -> np.ndarray:
        """int16 [samples], a read-only view of the shard. Raises CorruptShardError."""
        shard = self.manifest["shards"][int(self.index.shard[row])]
        wave = self._view(shard, row)
        if not self._checked[row]:
            if zlib.crc32(wave.tobytes()) != int(self.index.crc32[row]):
                self._cache.discard(shard["sha256"])  # if it is the copy that is damaged, another one helps
                wave = self._view(shard, row)
                if zlib.crc32(wave.tobytes()) != int(self.index.crc32[row]):
                    key = f"{self.prepared.prefix}/{shard['name']}"
                    raise CorruptShardError(key, f"the bytes of recording {self.index.recording_id[row]} changed")
            self._checked[row] = True
        return wave

    def _view(self, shard: dict[str, Any], row: int) -> np.ndarray:
        key = f"{self.prepared.prefix}/{shard['name']}"
        try:
            samples = self._cache.samples(self._storage, key, shard["bytes"], shard["sha256"])
        except CorruptObjectError as error:
            raise CorruptShardError(key, error.reason) from error
        first = int(self.index.offset[row]) // 2
        return samples[first : first + int(self.index.samples[row])]

    def waves(self, rows: np.ndarray) -> np.ndarray:
        """int16 [len(rows), samples]; the recordings have to be of one length."""
        lengths = np.unique(self.index.samples[rows])
        if len(lengths) > 1:
            raise ValueError(f"recordings of {lengths[0]} to {lengths[-1]} samples do not stack; wanted one length")
        return np.stack([self.wave(int(row)) for row in rows])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_checked": np.zeros(len(self.index), dtype=bool)}


class FormatError(CorruptShardError):
    """A set that another version prepared."""


class SourceNotSharedError(ValueError):
    """A machine that is to read a source does not see it."""

    def __init__(self, machine: str, source: str):
        super().__init__(machine, source)
        self.machine, self.source = machine, source

    def __str__(self) -> str:
        return (
            f"the machine {self.machine} does not see the source {self.source}; on a cluster the source has to be on a "
            "file system that all machines share, at the same path; or run this without RAY_ADDRESS on this machine"
        )


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """About one shard to write: everything that `write_shard` needs, wherever it runs.

    `contents` has what is known of each recording's file, None where it is made up. `keep`: "whole" writes the shard
    if every recording is good, "good" writes it without the bad ones, "nothing" only looks for bad ones.
    """

    storage: Storage
    prefix: str
    number: int
    dataset: str
    options: dict[str, Any]
    source: Path | None
    recordings: tuple[Recording, ...]
    contents: tuple[Content | None, ...]
    shard_bytes: int
    keep: Literal["whole", "good", "nothing"]

    @property
    def receipt(self) -> str:
        return f"{self.prefix}/shards/{self.number:05d}.json"

    def shard_name(self, part: int) -> str:
        return f"shards/{self.number:05d}.bin" if part == 0 else f"shards/{self.number:05d}-{part:03d}.bin"


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """One task as done: its shards with their checksums, its rows of the index, and what could not be used.

    A row's `shard` counts within this report. `unreadable` is recording id -> [file, reason]; `changed` lists the files
    that are not what they were when the preparation began. `source_bytes` were read.
    """

    number: int
    shards: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    unreadable: dict[str, list[str]]
    changed: list[str]
    source_bytes: int


#: What hears how far a preparation is: what it is doing, then recordings (or files) and source bytes done and in all.
Watch = Callable[[str, int, int, int, int], None]


def write_shard(task: ShardTask) -> ShardReport:
    """Write the shards of one task, or leave them alone where they verify. Bad recordings are reported and not raised.

    One recording is in memory at a time, and one shard where the storage cannot take it in pieces. A task whose
    recordings turn out longer than their files' headers promise gives more than one shard. Raises OSError where the
    storage cannot be written, and SourceNotSharedError.
    """
    standing = None if task.keep == "nothing" else _standing(task)
    if standing is not None:
        return standing
    if task.source is not None and not task.source.is_dir():
        raise SourceNotSharedError(platform.node(), str(task.source))
    dataset: Dataset = DATASETS.make(task.dataset, task.options)
    shard: _OpenShard | None = None
    shards: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    unreadable: dict[str, list[str]] = {}
    changed: list[str] = []
    files: dict[str, Content] = {}
    source = task.source or Path()

    def is_wanted() -> bool:
        """Whether what this task writes may still be published."""
        return not (changed or task.keep == "nothing" or (unreadable and task.keep == "whole"))

    def check_files() -> None:
        """That the files decoded since the last time are those whose checksums are in the index and in the key."""
        changed.extend(path for path, content in files.items() if not is_unchanged(source / path, content))
        files.clear()

    def close_shard(shard: _OpenShard) -> None:
        check_files()
        shards.append(shard.described())
        if is_wanted():
            shard.keep()

    try:
        for recording, content in zip(task.recordings, task.contents, strict=True):
            try:
                wave = dataset.wave(recording, task.source)
            except AudioError as error:
                wave = None
                unreadable[recording.recording_id] = [str(recording.path), error.reason]
            if content is not None and recording.path is not None:
                files[recording.path] = content
            if wave is None:
                continue
            assert wave.dtype == np.int16 and wave.ndim == 1 and len(wave) > 0, (recording.recording_id, wave.dtype)
            data = wave.astype("<i2", copy=False).view(np.uint8).data
            if shard is not None and shard.bytes + len(data) > task.shard_bytes:
                close_shard(shard)
                shard.discard()
                shard = None
            if shard is None:
                shard = _OpenShard(task, part=len(shards))
            rows.append(
                {
                    "recording_id": recording.recording_id,
                    "shard": len(shards),
                    "offset": shard.bytes,
                    "samples": len(wave),
                    "label": recording.label,
                    "speaker": recording.speaker,
                    "fold": recording.fold,
                    "group": recording.group,
                    "crc32": zlib.crc32(data),
                    "source_sha256": None if content is None else content.sha256,
                    "padded_samples": silent_tail(wave),
                }
            )
            shard.add(data, write=is_wanted())
        if shard is not None:
            close_shard(shard)
    finally:
        if shard is not None:
            shard.discard()
    check_files()
    report = ShardReport(
        number=task.number,
        shards=shards,
        rows=rows,
        unreadable=unreadable,
        changed=changed,
        source_bytes=_source_bytes(task),
    )
    if is_wanted():
        _put(task.storage, task.receipt, json_bytes(vars(report)))
    return report


class _OpenShard:
    """The shard that a task is at: its checksum runs along, and storage gets it whole or not at all."""

    def __init__(self, task: ShardTask, *, part: int):
        self.name, self.bytes, self.recordings = task.shard_name(part), 0, 0
        self._storage, self._key = task.storage, f"{task.prefix}/{self.name}"
        self._digest = hashlib.sha256()
        self._writer: Writer | None = None

    def add(self, data: memoryview, *, write: bool) -> None:
        """One more recording. Once something was not written, the shard is not to be kept."""
        if write:
            with _explained(self._storage, self._key):
                self._writer = self._writer or self._storage.writer(self._key)
                self._writer.write(data)
        else:
            self.discard()
        self._digest.update(data)
        self.bytes, self.recordings = self.bytes + len(data), self.recordings + 1

    def described(self) -> dict[str, Any]:
        sha256 = self._digest.hexdigest()
        return {"name": self.name, "bytes": self.bytes, "sha256": sha256, "recordings": self.recordings}

    def keep(self) -> None:
        assert self._writer is not None, self.name
        with _explained(self._storage, self._key):
            self._writer.keep()

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.discard()
            self._writer = None


def check_source(
    name: str, options: Mapping[str, Any] | None = None, *, source: Path | None, allow_partial: bool = False
) -> Scan:
    """What `source` holds by its metadata, decoding nothing. Raises DatasetError with everything that is wrong."""
    name, options = recordings_of(name, options)
    listing, problems = _looked_at(DATASETS.make(name, options), source, allow_partial=allow_partial)
    if problems:
        raise _refusal(name, source, problems)
    return listing


def prepare(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    source: Path | None,
    storage: Storage,
    allow_partial: bool = False,
    quarantine: int = 0,
    shard_mib: float = 64,
    checksums: Path | None = None,
    run: Callable[[Callable[[ShardTask], ShardReport], Iterable[ShardTask]], Iterable[ShardReport]] = map,
    watch: Watch = lambda _what, _done, _all, _done_bytes, _all_bytes: None,
) -> Prepared:
    """Prepare the data set `name` from `source` into `storage`; done already, it verifies and repairs.

    `run` maps `write_shard` over the tasks, in any order and anywhere. `allow_partial` accepts a set that is not
    complete, `quarantine` is the number of files that may be there and unusable; both are left out with their reason in
    the manifest. `checksums` is a folder of this machine that remembers what the source's files are. Raises
    DatasetError with everything that is wrong with metadata, files and counts at once, and publishes nothing then.
    """
    if not 0 < shard_mib < math.inf:
        raise ValueError(f"shard_mib is {shard_mib}; wanted a positive and finite size in MiB")
    if quarantine < 0:
        raise ValueError(f"quarantine is {quarantine}; wanted the number of bad files to accept, 0 or more")
    source = None if source is None else source.resolve()
    shard_bytes = max(2, int(shard_mib * 2**20))
    name, resolved = recordings_of(name, options)
    dataset: Dataset = DATASETS.make(name, resolved)
    listing, problems = _looked_at(dataset, source, allow_partial=allow_partial)
    if not listing.recordings:
        raise _refusal(name, source, problems)
    contents = _contents(listing.recordings, source, checksums, watch)
    prefix = f"{FOLDER}/{name}-{_key(name, resolved, listing, contents, shard_bytes)[:12]}"
    published = None if problems else _published(storage, prefix)
    if published is not None:
        left_out = published.manifest["quarantined"]
        if len(left_out) > quarantine:
            raise _refusal(name, source, _quarantine_problems(left_out, quarantine))
        if not damaged(storage, published):
            return published
    tasks = [
        ShardTask(
            storage=storage,
            prefix=prefix,
            number=number,
            dataset=name,
            options=resolved,
            source=source,
            recordings=recordings,
            contents=tuple(contents.get(str(row.path)) for row in recordings),
            shard_bytes=shard_bytes,
            keep="nothing" if problems else "good" if quarantine else "whole",
        )
        for number, recordings in enumerate(_planned(listing.recordings, contents, dataset, shard_bytes))
    ]
    what = "looking for bad audio too; nothing will be published" if problems else "decoding"
    reports = sorted(_watched(run(write_shard, tasks), tasks, what, watch), key=lambda report: report.number)
    unreadable = {key: found for report in reports for key, found in report.unreadable.items()}
    changed = [path for report in reports for path in report.changed]
    problems += [("files changed while they were prepared (run it again)", path) for path in sorted(set(changed))]
    if len(unreadable) > quarantine:
        left_out = {key: {"file": path, "reason": reason} for key, (path, reason) in unreadable.items()}
        problems += _quarantine_problems(left_out, quarantine)
    if not problems and not any(report.rows for report in reports):
        problems.append(("no recording is left to prepare", "no file can be used"))
    if problems:
        raise _refusal(name, source, problems)
    root = _common_folder(listing.recordings)
    quarantined = {
        key: {"file": str(PurePosixPath(path).relative_to(root)), "reason": reason}
        for key, (path, reason) in unreadable.items()
    }
    index, manifest = _described(dataset, name, resolved, reports, listing, contents, quarantined)
    if published is not None:
        return _repaired(storage, published, index, manifest)
    _put(storage, f"{prefix}/index.parquet", index)
    data = json_bytes(manifest)
    _put(storage, f"{prefix}/manifest.json", data)
    return Prepared(prefix=prefix, manifest_sha256=_sha256(data), manifest=manifest)


def find(storage: Storage, name: str, options: Mapping[str, Any] | None = None) -> list[Prepared]:
    """What is prepared for exactly these options, by prefix. Several where it was prepared from several sources."""
    name, resolved = recordings_of(name, options)
    summaries = []
    for prefix in prepared_prefixes(storage, name):
        with contextlib.suppress(FormatError):
            summaries.append(_manifest(storage, prefix))
    return [found for found in summaries if found is not None and found.manifest["options"] == resolved]


def open_prepared(storage: Storage, prefix: str) -> Recordings:
    """The recordings under `prefix`. Verifies the index and the size of every shard."""
    prepared = _manifest(storage, prefix)
    if prepared is None:
        raise FileNotFoundError(
            f"{prefix} in {storage!r} has no manifest.json, so it is not prepared; prepare it first"
        )
    shards = {f"{prefix}/{shard['name']}": shard["bytes"] for shard in prepared.manifest["shards"]}
    with ThreadPoolExecutor(16) as pool:  # in a bucket every size is a request
        sizes = list(pool.map(storage.size, shards))
    for (key, published), size in zip(shards.items(), sizes, strict=True):
        if size != published:
            found = "is not there" if size is None else f"has {size} bytes"
            raise CorruptShardError(key, f"the shard {found}; published with {published} bytes")
    key = f"{prefix}/{prepared.manifest['index']['name']}"
    try:
        data = storage.get(key) if storage.exists(key) else b""
    except CorruptObjectError as error:
        raise CorruptShardError(key, error.reason) from error
    if hashlib.sha256(data).hexdigest() != prepared.manifest["index"]["sha256"]:
        raise CorruptShardError(key, "the index is not the one that was published")
    return Recordings(storage, prepared, _read_index(data))


def damaged(storage: Storage, prepared: Prepared) -> list[str]:
    """The keys that a manifest names, and their receipts, that are gone or have other bytes; every byte is read."""
    files = {f"{prepared.prefix}/{file['name']}": file["sha256"] for file in _files(prepared.manifest)}

    def is_damaged(key: str) -> bool:
        try:
            return _sha256(storage.get(key)) != files[key]
        except (FileNotFoundError, CorruptObjectError):
            return True

    with ThreadPoolExecutor(VERIFIED_AT_ONCE) as pool:
        bad = [key for key, bad in zip(files, pool.map(is_damaged, files), strict=True) if bad]
    return bad + _damaged_receipts(storage, prepared)


def prepared_prefixes(storage: Storage, name: str | None = None) -> list[str]:
    """The folders of prepared or half prepared sets, of the data set `name` or of all."""
    wanted = ".+" if name is None else re.escape(name)
    return [
        f"{FOLDER}/{child}" for child in storage.children(FOLDER) if re.fullmatch(f"{wanted}-[0-9a-f]{{12}}", child)
    ]


def verify(storage: Storage, prefix: str) -> tuple[Prepared | None, list[str]]:
    """What is prepared under `prefix` (None where nothing is published) and every damage, a line each."""
    try:
        prepared = _manifest(storage, prefix)
    except CorruptShardError as error:
        return None, [f"{error.key}: {error.reason}"]
    if prepared is None:
        return None, []
    return prepared, [f"{key}: is gone or has other bytes" for key in damaged(storage, prepared)]


def _looked_at(dataset: Dataset, source: Path | None, *, allow_partial: bool) -> tuple[Scan, list[tuple[str, str]]]:
    """The listing of a source and what is wrong by its metadata, each as (kind of problem, problem)."""
    kind = "problems in the metadata"
    try:
        listing, problems = dataset.listing(source, allow_missing=True), []
    except DatasetError as error:
        problems = [(kind, problem) for problem in error.problems]
        try:
            listing = Scan(recordings=[]) if source is None else dataset.scan(source)
        except DatasetError:  # there is no metadata at all
            return Scan(recordings=[]), problems
    if not allow_partial:
        problems += [("recordings are missing", line) for line in _listed(listing.missing)]
        # What is said to be missing need not be counted again.
        explained = listing.missing and len(listing.recordings) + len(listing.missing) == dataset.expected_recordings
        if listing.recordings and not explained:
            shortfall = dataset.shortfall(((row.fold, row.label) for row in listing.recordings), listing.classes)
            wanted = dataset.expected_recordings
            count = f"{len(listing.recordings)}{'' if wanted is None else f' of {wanted}'} recordings"
            problems += [
                (f"counts differ: it is not complete, {count} (--allow-partial accepts a partial set)", line)
                for line in shortfall
            ]
    if not listing.recordings and not any(of == kind for of, _ in problems):
        problems += [("recordings are missing", line) for line in _listed(listing.missing) if allow_partial]
        problems.append(("recordings are missing", "no recording is left to prepare"))
    return listing, problems


def _refusal(name: str, source: Path | None, problems: Sequence[tuple[str, str]]) -> DatasetError:
    """All problems as one error, which counts each kind of them first."""
    kinds = Counter(kind for kind, _ in problems)
    counted = "; ".join(
        kind if kind.startswith(("counts", "no ")) else _of(count, kind) for kind, count in kinds.items()
    )
    return DatasetError(f"{name} from {source or 'no source'}: {counted}:", [problem for _, problem in problems])


def _of(count: int, kind: str) -> str:
    if count == 1:
        for several, one in (("problems", "problem"), ("recordings are", "recording is"), ("recordings", "recording")):
            if kind.startswith(several):
                return f"1 {one}{kind.removeprefix(several)}"
    return f"{count} {kind}"


def _quarantine_problems(left_out: Mapping[str, Mapping[str, str]], quarantine: int) -> list[tuple[str, str]]:
    allowed = f", {quarantine} were accepted" if quarantine else ""
    kind = f"recordings cannot be read{allowed} (--quarantine {len(left_out)} leaves them out)"
    return [(kind, f"{key}: {bad['file']} {bad['reason']}") for key, bad in sorted(left_out.items())]


def _contents(
    recordings: Sequence[Recording], source: Path | None, checksums: Path | None, watch: Watch
) -> dict[str, Content]:
    """What every file that a recording names is, by its path."""
    if source is None:
        return {}
    paths = {row.path for row in recordings if row.path is not None}
    done = [0, 0]

    def on_read(count: int, size: int) -> None:
        done[0], done[1] = done[0] + count, done[1] + size
        watch("checking the source", done[0], len(paths), done[1], 0)

    return read_contents(source, paths, checksums=checksums, on_read=on_read)


def _planned(
    recordings: Sequence[Recording], contents: Mapping[str, Content], dataset: Dataset, shard_bytes: int
) -> Iterator[tuple[Recording, ...]]:
    """The recordings of each task, in order: about one shard by what the headers of their files promise."""
    sharing = Counter(row.path for row in recordings)
    batch: list[Recording] = []
    total = 0
    for row in recordings:
        content = contents.get(str(row.path))
        seconds = (
            dataset.recording_samples / dataset.rate_hz if content is None else content.seconds / sharing[row.path]
        )
        size = 2 * round(seconds * dataset.rate_hz)
        if batch and total + size > shard_bytes:
            yield tuple(batch)
            batch, total = [], 0
        batch.append(row)
        total += size
    yield tuple(batch)


def _source_bytes(task: ShardTask) -> int:
    files = {row.path: content.bytes for row, content in zip(task.recordings, task.contents, strict=True) if content}
    return sum(files.values())


def _watched(
    reports: Iterable[ShardReport], tasks: Sequence[ShardTask], what: str, watch: Watch
) -> Iterator[ShardReport]:
    total = sum(len(task.recordings) for task in tasks)
    total_bytes = sum(_source_bytes(task) for task in tasks)
    done = done_bytes = 0
    watch(what, 0, total, 0, total_bytes)
    for report in reports:
        done, done_bytes = done + len(report.rows) + len(report.unreadable), done_bytes + report.source_bytes
        watch(what, done, total, done_bytes, total_bytes)
        yield report


def _described(
    dataset: Dataset,
    name: str,
    options: dict[str, Any],
    reports: Sequence[ShardReport],
    listing: Scan,
    contents: Mapping[str, Content],
    quarantined: dict[str, dict[str, str]],
) -> tuple[bytes, dict[str, Any]]:
    """The index and the manifest: functions of the contents, and of nothing that happened on the way."""
    shards: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for report in reports:
        rows += [row | {"shard": len(shards) + row["shard"]} for row in report.rows]
        shards += report.shards
    samples = sum(row["samples"] for row in rows)
    speakers: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["speaker"] is not None:
            speakers[str(row["fold"])].add(row["speaker"])
    index = _index_bytes(rows)
    manifest = {
        "format": FORMAT,
        "dataset": name,
        "options": options,
        "classes": list(listing.classes),
        "rate_hz": dataset.rate_hz,
        "clip_samples": dataset.clip_samples,
        "recordings": len(rows),
        "expected_recordings": dataset.expected_recordings,
        # A recording in quarantine was accepted by number, so the set counts as complete without it.
        "partial": bool(
            listing.missing or dataset.shortfall(((row.fold, row.label) for row in listing.recordings), listing.classes)
        ),
        "missing": listing.missing,
        "quarantined": quarantined,
        "shortfall": dataset.shortfall(((row["fold"], row["label"]) for row in rows), listing.classes),
        "recordings_per_class": _counts(listing.classes[row["label"]] for row in rows),
        "recordings_per_fold": _counts(str(row["fold"]) for row in rows),
        "speakers_per_fold": {fold: len(names) for fold, names in sorted(speakers.items())},
        "seconds": samples / dataset.rate_hz,
        "padded_fraction": sum(row["padded_samples"] for row in rows) / samples,
        "licence": dataset.licence,
        "url": dataset.url,
        "caveat": dataset.caveat,
        "sources": {
            "files": len(contents),
            "bytes": sum(content.bytes for content in contents.values()),
            "sha256": _sha256(json_bytes(_sources(listing.recordings, contents))),
        },
        **({"notes": list(listing.notes)} if listing.notes else {}),
        "shards": shards,
        "index": {"name": "index.parquet", "bytes": len(index), "sha256": _sha256(index)},
    }
    return index, manifest | {"sha256": _sha256(json_bytes(manifest))}


def _repaired(storage: Storage, published: Prepared, index: bytes, manifest: dict[str, Any]) -> Prepared:
    """The published set, now that what was damaged is there again byte for byte."""
    if _files(manifest) == _files(published.manifest):
        _put(storage, f"{published.prefix}/{published.manifest['index']['name']}", index)
    still = damaged(storage, published)
    if still:
        raise DatasetError(
            f"{published.prefix} in {storage!r} is damaged, and this source does not give the published bytes again:",
            [*still, "delete the folder to prepare the data set anew"],
        )
    return published


def _damaged_receipts(storage: Storage, prepared: Prepared) -> list[str]:
    """The keys of receipts that are gone, cannot be read, or tell of other shards than the manifest."""
    told: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for shard in prepared.manifest["shards"]:
        number = PurePosixPath(shard["name"]).stem.partition("-")[0]
        told[f"{prepared.prefix}/shards/{number}.json"].append(shard)
    there = {key for key in storage.keys(f"{prepared.prefix}/shards") if key.endswith(".json")}
    bad = []
    for key in sorted(told.keys() | there):
        try:
            report = ShardReport(**json.loads(storage.get(key)))
            whole = report.shards == told[key] and len(report.rows) == sum(one["recordings"] for one in told[key])
        except (FileNotFoundError, CorruptObjectError, ValueError, TypeError):
            whole = False
        if not whole:
            bad.append(key)
    return bad


def _standing(task: ShardTask) -> ShardReport | None:
    """The report of a task that is done: its shards are there, whole, and made of these recordings."""
    try:
        report = ShardReport(**json.loads(task.storage.get(task.receipt)))
        if report.unreadable and task.keep != "good":
            return None
        ids = [row["recording_id"] for row in report.rows]
        wanted = [row.recording_id for row in task.recordings if row.recording_id not in report.unreadable]
        whole = all(
            _sha256(task.storage.get(f"{task.prefix}/{shard['name']}")) == shard["sha256"] for shard in report.shards
        )
    except (FileNotFoundError, CorruptObjectError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return report if whole and ids == wanted else None


def _published(storage: Storage, prefix: str) -> Prepared | None:
    try:
        return _manifest(storage, prefix)
    except CorruptShardError:  # whatever it was, the shards that verify can be published again
        return None


def _manifest(storage: Storage, prefix: str) -> Prepared | None:
    """What is published under `prefix`, None where nothing is. The manifest's own checksum is verified."""
    key = f"{prefix}/manifest.json"
    try:
        data = storage.get(key)
    except FileNotFoundError:
        return None
    except CorruptObjectError as error:
        raise CorruptShardError(key, error.reason) from error
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise CorruptShardError(key, f"is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise FormatError(key, f"has format {found}; this version reads format {FORMAT}")
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    # A changed digit far behind the point may leave a number what it was, and the identity is a hash of the bytes.
    if manifest.get("sha256") != _sha256(json_bytes(body)) or json_bytes(manifest) != data:
        raise CorruptShardError(key, "does not match its own checksum")
    return Prepared(prefix=prefix, manifest_sha256=_sha256(data), manifest=manifest)


def _files(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*manifest["shards"], manifest["index"]]


def _put(storage: Storage, key: str, data: bytes) -> None:
    with _explained(storage, key):
        storage.put(key, data)


@contextlib.contextmanager
def _explained(storage: Storage, key: str) -> Iterator[None]:
    """Where writing fails, say where to and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a bucket's: it says itself what is wrong, where, and what to do
            raise
        raise OSError(
            error.errno,
            f"cannot write {key} to the storage {storage!r}: {error.strerror or error}; nothing is published. Free "
            "some space or name another storage; the same command goes on with what is written",
        ) from error


def _key(name: str, options: dict[str, Any], listing: Scan, contents: Mapping[str, Content], shard_bytes: int) -> str:
    described_by = [field.name for field in fields(Recording) if field.name != "path"]
    described = [
        [*(getattr(row, name) for name in described_by), sha256]
        for row, sha256 in zip(listing.recordings, _sources(listing.recordings, contents), strict=True)
    ]
    return _sha256(json_bytes([FORMAT, name, options, shard_bytes, described, sorted(listing.missing)]))


def _sources(recordings: Sequence[Recording], contents: Mapping[str, Content]) -> list[str | None]:
    """The sha256 of every recording's file, in order."""
    return [None if row.path is None else contents[row.path].sha256 for row in recordings]


def _common_folder(recordings: Sequence[Recording]) -> PurePosixPath:
    """The folder that holds all files of a source: where it lies in what the user named is nobody's business."""
    folders = [PurePosixPath(row.path).parent for row in recordings if row.path is not None]
    return PurePosixPath(os.path.commonpath(folders)) if folders else PurePosixPath()


def _index_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink)
    return sink.getvalue()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_index(data: bytes) -> Index:
    table = parquet.read_table(io.BytesIO(data))
    columns = {}
    for column in fields(Index):
        values = table[column.name]
        if pa.types.is_string(values.type):
            columns[column.name] = np.array(values.to_pylist(), dtype=object)
        else:
            columns[column.name] = values.fill_null(-1).to_numpy() if column.name == "fold" else values.to_numpy()
    return Index(**columns)


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _listed(reasons: Mapping[str, str]) -> list[str]:
    return [f"{recording_id}: {reason}" for recording_id, reason in sorted(reasons.items())]
