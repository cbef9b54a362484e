"""Recordings -> shards: int16 PCM in .bin files, one Parquet index, and a manifest that is put last.

    data/<name>-<key12>/shards/00000.bin    the samples of its recordings, one after the other
                        shards/00000.json   its receipt: what the shard holds, put once the .bin is whole
                        index.parquet       one row per recording
                        manifest.json       checksums, counts, licence; without it nothing is prepared

The key is a hash of what is prepared, so that two sources, or a part and the whole, never overwrite each other. A shard
is the work of one pure function of one picklable task; the result depends neither on who ran it nor in which order,
and a second run does again only what is not there or does not verify.
"""

import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from helix.data.audio import AudioError
from helix.data.dataset import Dataset, DatasetError, Index, Recording, Scan, recordings_of
from helix.registry import DATASETS
from helix.storage import Storage, json_bytes

#: Raised when the layout changes; part of the key.
FORMAT = 1
FOLDER = "data"

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
        self._storage = storage
        self._maps: dict[int, np.ndarray] = {}
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
        shard = int(self.index.shard[row])
        key = f"{self.prepared.prefix}/{self.manifest['shards'][shard]['name']}"
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._storage.path(key), dtype="<i2", mode="r")
        first = int(self.index.offset[row]) // 2
        wave = self._maps[shard][first : first + int(self.index.samples[row])]
        if not self._checked[row]:
            if zlib.crc32(wave.tobytes()) != int(self.index.crc32[row]):
                raise CorruptShardError(key, f"the bytes of recording {self.index.recording_id[row]} changed")
            self._checked[row] = True
        return wave

    def waves(self, rows: np.ndarray) -> np.ndarray:
        """int16 [len(rows), samples]; the recordings have to be of one length."""
        lengths = np.unique(self.index.samples[rows])
        if len(lengths) > 1:
            raise ValueError(f"recordings of {lengths[0]} to {lengths[-1]} samples do not stack; wanted one length")
        return np.stack([self.wave(int(row)) for row in rows])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}, "_checked": np.zeros(len(self.index), dtype=bool)}


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to write: everything that `write_shard` needs, wherever it runs."""

    storage: Storage
    prefix: str
    number: int
    dataset: str
    options: dict[str, Any]
    source: Path | None
    recordings: tuple[Recording, ...]
    keep_good: bool

    @property
    def name(self) -> str:
        return f"shards/{self.number:05d}.bin"

    @property
    def receipt(self) -> str:
        return f"{self.prefix}/shards/{self.number:05d}.json"


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """One shard as written: its checksum, its rows of the index, and the recordings that could not be read."""

    number: int
    name: str
    bytes: int
    sha256: str
    rows: list[dict[str, Any]]
    unreadable: dict[str, str]


def write_shard(task: ShardTask) -> ShardReport:
    """Write one shard, or leave it alone where it verifies. Unreadable recordings are reported and not raised.

    With `keep_good` the shard is written without them; otherwise it is not written at all.
    """
    standing = _standing(task)
    if standing is not None:
        return standing
    dataset: Dataset = DATASETS.make(task.dataset, task.options)
    rows, waves, unreadable, offset = [], [], {}, 0
    for recording in task.recordings:
        try:
            wave = dataset.wave(recording, task.source)
        except AudioError as error:
            unreadable[recording.recording_id] = f"{recording.path} {error.reason}"
            continue
        assert wave.dtype == np.int16 and wave.ndim == 1 and len(wave) > 0, (recording.recording_id, wave.dtype)
        data = wave.astype("<i2").tobytes()
        rows.append(
            {
                "recording_id": recording.recording_id,
                "shard": task.number,
                "offset": offset,
                "samples": len(wave),
                "label": recording.label,
                "speaker": recording.speaker,
                "fold": recording.fold,
                "group": recording.group,
                "crc32": zlib.crc32(data),
                "source_sha256": _source_sha256(recording, task.source),
                "padded_samples": _silent_tail(wave),
            }
        )
        waves.append(data)
        offset += len(data)
    content = b"".join(waves)
    report = ShardReport(
        number=task.number,
        name=task.name,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        rows=rows,
        unreadable=unreadable,
    )
    if task.keep_good or not unreadable:
        task.storage.put(f"{task.prefix}/{task.name}", content)
        task.storage.put_json(task.receipt, asdict(report))
    return report


def check_source(
    name: str, options: Mapping[str, Any] | None = None, *, source: Path | None, allow_partial: bool = False
) -> Scan:
    """What `source` holds by its metadata, decoding nothing. Raises DatasetError with everything that is wrong."""
    name, options = recordings_of(name, options)
    dataset: Dataset = DATASETS.make(name, options)
    listing = dataset.listing(source, allow_missing=allow_partial)
    if not listing.recordings:
        raise DatasetError(f"{name} from {source}:", [*_listed(listing.missing), "no recording is left to prepare"])
    shortfall = dataset.shortfall(((row.fold, row.label) for row in listing.recordings), listing.classes)
    if shortfall and not allow_partial:
        wanted = dataset.expected_recordings
        count = f"{len(listing.recordings)}{'' if wanted is None else f' of {wanted}'} recordings"
        raise DatasetError(f"{name} is not complete, {count} (--allow-partial accepts a partial set):", shortfall)
    return listing


def prepare(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    source: Path | None,
    storage: Storage,
    allow_partial: bool = False,
    shard_mib: float = 64,
    run: Callable[[Callable[[ShardTask], ShardReport], Iterable[ShardTask]], Iterable[ShardReport]] = map,
) -> Prepared:
    """Prepare the data set `name` from `source` into `storage`; done already, it verifies and repairs.

    `run` maps `write_shard` over the tasks, in any order and anywhere. `allow_partial` accepts a set that is not
    complete and leaves out recordings that are missing or unreadable, with the reason in the manifest. Raises
    DatasetError with everything that is wrong, and publishes nothing then.
    """
    if shard_mib <= 0:
        raise ValueError(f"shard_mib is {shard_mib}; wanted a positive size")
    source = None if source is None else source.resolve()
    name, resolved = recordings_of(name, options)
    dataset: Dataset = DATASETS.make(name, resolved)
    listing = check_source(name, resolved, source=source, allow_partial=allow_partial)
    per_shard = max(1, int(shard_mib * 2**20) // (2 * dataset.recording_samples))
    prefix = f"{FOLDER}/{name}-{_key(name, resolved, listing.recordings, source, per_shard)[:12]}"
    try:
        published = _manifest(storage, prefix)
    except CorruptShardError:  # whatever it was, the shards that verify can be published again
        published = None
    if published is not None and published.manifest["missing"] and not allow_partial:
        raise DatasetError(
            f"{prefix} was prepared without some recordings; --allow-partial accepts that, or delete it first:",
            _listed(published.manifest["missing"]),
        )
    if published is not None and not _damaged(storage, published):
        return published
    tasks = [
        ShardTask(
            storage=storage,
            prefix=prefix,
            number=number,
            dataset=name,
            options=resolved,
            source=source,
            recordings=tuple(listing.recordings[first : first + per_shard]),
            keep_good=allow_partial,
        )
        for number, first in enumerate(range(0, len(listing.recordings), per_shard))
    ]
    reports = sorted(run(write_shard, tasks), key=lambda report: report.number)
    unreadable = {key: reason for report in reports for key, reason in report.unreadable.items()}
    if unreadable and not allow_partial:
        raise DatasetError(f"{name} from {source}: {len(unreadable)} recordings cannot be read:", _listed(unreadable))
    if not any(report.rows for report in reports):
        raise DatasetError(f"{name} from {source}:", [*_listed(unreadable), "no recording is left to prepare"])
    if published is not None:
        return _repaired(storage, published, reports)
    return _publish(storage, prefix, name, resolved, dataset, reports, listing, listing.missing | unreadable)


def find(storage: Storage, name: str, options: Mapping[str, Any] | None = None) -> list[Prepared]:
    """What is prepared for exactly these options, by prefix. Several where it was prepared from several sources."""
    name, resolved = recordings_of(name, options)
    prefixes = [f"{FOLDER}/{child}" for child in storage.children(FOLDER)]
    named = [prefix for prefix in prefixes if re.fullmatch(f"{FOLDER}/{re.escape(name)}-[0-9a-f]{{12}}", prefix)]
    summaries = [_manifest(storage, prefix) for prefix in named]
    return [found for found in summaries if found is not None and found.manifest["options"] == resolved]


def open_prepared(storage: Storage, prefix: str) -> Recordings:
    """The recordings under `prefix`. Verifies the index and the size of every shard."""
    prepared = _manifest(storage, prefix)
    if prepared is None:
        raise FileNotFoundError(
            f"{prefix} in {storage!r} has no manifest.json, so it is not prepared; prepare it first"
        )
    for shard in prepared.manifest["shards"]:
        key = f"{prefix}/{shard['name']}"
        size = storage.path(key).stat().st_size if storage.exists(key) else None
        if size != shard["bytes"]:
            found = "is not there" if size is None else f"has {size} bytes"
            raise CorruptShardError(key, f"the shard {found}; published with {shard['bytes']} bytes")
    key = f"{prefix}/{prepared.manifest['index']['name']}"
    data = storage.get(key) if storage.exists(key) else b""
    if hashlib.sha256(data).hexdigest() != prepared.manifest["index"]["sha256"]:
        raise CorruptShardError(key, "the index is not the one that was published")
    return Recordings(storage, prepared, _read_index(data))


def _publish(
    storage: Storage,
    prefix: str,
    name: str,
    options: dict[str, Any],
    dataset: Dataset,
    reports: list[ShardReport],
    listing: Scan,
    missing: dict[str, str],
) -> Prepared:
    """Put the index, then the manifest."""
    rows = [row for report in reports for row in report.rows]
    shards = [
        {"name": report.name, "bytes": report.bytes, "sha256": report.sha256, "recordings": len(report.rows)}
        for report in reports
    ]
    samples = sum(row["samples"] for row in rows)
    shortfall = dataset.shortfall(((row["fold"], row["label"]) for row in rows), listing.classes)
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
        "partial": bool(shortfall or missing),
        "missing": missing,
        "shortfall": shortfall,
        "recordings_per_class": _counts(listing.classes[row["label"]] for row in rows),
        "recordings_per_fold": _counts(str(row["fold"]) for row in rows),
        "seconds": samples / dataset.rate_hz,
        "padded_fraction": sum(row["padded_samples"] for row in rows) / samples,
        "licence": dataset.licence,
        "url": dataset.url,
        "caveat": dataset.caveat,
        **({"notes": list(listing.notes)} if listing.notes else {}),
        "shards": shards,
        "index": {"name": "index.parquet", "bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
    }
    storage.put(f"{prefix}/index.parquet", index)
    data = json_bytes(manifest)
    storage.put(f"{prefix}/manifest.json", data)
    return Prepared(prefix=prefix, manifest_sha256=hashlib.sha256(data).hexdigest(), manifest=manifest)


def _repaired(storage: Storage, published: Prepared, reports: list[ShardReport]) -> Prepared:
    """The published set, now that what was damaged is there again byte for byte."""
    index = f"{published.prefix}/{published.manifest['index']['name']}"
    if index in _damaged(storage, published):
        storage.put(index, _index_bytes([row for report in reports for row in report.rows]))
    damaged = _damaged(storage, published)
    if damaged:
        raise DatasetError(
            f"{published.prefix} in {storage!r} is damaged, and this source does not give the published bytes again:",
            [*damaged, "delete the folder to prepare the data set anew"],
        )
    return published


def _standing(task: ShardTask) -> ShardReport | None:
    """The report of a shard that is there, whole, and made of these recordings."""
    key = f"{task.prefix}/{task.name}"
    try:
        report = ShardReport(**json.loads(task.storage.get(task.receipt)))
        content = task.storage.get(key)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    rows = [row["recording_id"] for row in report.rows]
    whole = hashlib.sha256(content).hexdigest() == report.sha256 and not report.unreadable
    return report if whole and rows == [recording.recording_id for recording in task.recordings] else None


def _manifest(storage: Storage, prefix: str) -> Prepared | None:
    try:
        data = storage.get(f"{prefix}/manifest.json")
    except FileNotFoundError:
        return None
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise CorruptShardError(f"{prefix}/manifest.json", f"is not JSON: {error}") from error
    return Prepared(prefix=prefix, manifest_sha256=hashlib.sha256(data).hexdigest(), manifest=manifest)


def _damaged(storage: Storage, prepared: Prepared) -> list[str]:
    """The files that a manifest names and that are gone or have other bytes."""
    damaged = []
    for file in [*prepared.manifest["shards"], prepared.manifest["index"]]:
        key = f"{prepared.prefix}/{file['name']}"
        if not storage.exists(key) or hashlib.sha256(storage.get(key)).hexdigest() != file["sha256"]:
            damaged.append(key)
    return damaged


def _key(name: str, options: dict[str, Any], recordings: list[Recording], source: Path | None, per_shard: int) -> str:
    described = []
    for row in recordings:
        size = (source / row.path).stat().st_size if source is not None and row.path is not None else None
        described.append([row.recording_id, row.label, row.fold, row.speaker, row.group, size, *(row.spans or ())])
    return hashlib.sha256(json_bytes([FORMAT, name, options, per_shard, described])).hexdigest()


def _source_sha256(recording: Recording, source: Path | None) -> str | None:
    if source is None or recording.path is None:
        return None
    return hashlib.sha256((source / recording.path).read_bytes()).hexdigest()


def _silent_tail(wave: np.ndarray) -> int:
    """How many samples of digital silence end the wave, whoever padded it."""
    sounding = np.flatnonzero(wave)
    return len(wave) - (int(sounding[-1]) + 1 if len(sounding) else 0)


def _index_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink)
    return sink.getvalue()


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
