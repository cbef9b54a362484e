"""What the files of a source are, byte for byte: their sha256, and how many seconds their headers promise.

A checksum that was computed before is taken over only where nothing gives reason to doubt it: the file has the same
size and the same times of change, and was at rest when it was read.
"""

import hashlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import soundfile

from helix.storage import json_bytes, open_storage

logger = logging.getLogger(__name__)

#: A file that changed this short a time before it was read may change again without a trace: some file systems count
#: time in steps of two seconds.
RESTING_NS = 2_000_000_000

BLOCK_BYTES = 2**17
_OWN = threading.local()
#: Files per turn of a thread.
READ_TOGETHER = 32

Stamp = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Content:
    """One file as it was read. `sha256` is None where it could not be.

    `stamp` (size, times of change in ns) tells whether the file is still the same; None where it cannot tell.
    """

    sha256: str | None
    bytes: int
    seconds: float
    stamp: Stamp | None


def read_content(path: Path) -> Content:
    """Read one file. One that cannot be read is no error here: who decodes it says what is wrong."""
    began_ns = time.time_ns()
    try:
        with path.open("rb", buffering=0) as file:
            before = _stamp(os.fstat(file.fileno()))
            digest = _sha256(file)
            after = _stamp(os.fstat(file.fileno()))
            seconds = _promised_s(file)
    except OSError:
        return Content(sha256=None, bytes=0, seconds=0.0, stamp=None)
    resting = before == after and max(before[1:]) < began_ns - RESTING_NS
    return Content(sha256=digest, bytes=before[0], seconds=seconds, stamp=before if resting else None)


def is_unchanged(path: Path, content: Content) -> bool:
    """Whether the file still is what `content` says: by its stamp where that can tell, else by reading it again."""
    try:
        if content.stamp is not None and _stamp(path.stat()) == content.stamp:
            return True
    except OSError:
        return content.sha256 is None
    return read_content(path).sha256 == content.sha256


def read_contents(
    source: Path,
    paths: Iterable[str],
    *,
    checksums: Path | None = None,
    on_read: Callable[[int, int], None] = lambda _count, _bytes: None,
) -> dict[str, Content]:
    """The content of every file of `source`, by its relative path.

    `checksums` is a folder of this machine that remembers them; nothing is remembered where it is None. `on_read`
    hears of each file and its bytes.
    """
    wanted = sorted(set(paths))
    known = {} if checksums is None else _remembered(checksums, source)

    def read(path: str) -> Content:
        found = known.get(path)
        if found is not None and found.stamp is not None and is_unchanged(source / path, found):
            return found
        return read_content(source / path)

    def read_some(first: int) -> list[Content]:
        return [read(path) for path in wanted[first : first + READ_TOGETHER]]

    contents: dict[str, Content] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4) as pool:
        found_all = itertools.chain.from_iterable(pool.map(read_some, range(0, len(wanted), READ_TOGETHER)))
        for path, content in zip(wanted, found_all, strict=True):
            contents[path] = content
            on_read(1, content.bytes)
    if checksums is not None and contents != known:
        _remember(checksums, source, contents)
    return contents


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _sha256(file: FileIO) -> str:
    """Like hashlib.file_digest, through a buffer that stays in the processor's cache."""
    if not hasattr(_OWN, "buffer"):
        _OWN.buffer = bytearray(BLOCK_BYTES)
    digest, block = hashlib.sha256(), memoryview(_OWN.buffer)
    while count := file.readinto(block):
        digest.update(block[:count])
    return digest.hexdigest()


def _promised_s(file: FileIO) -> float:
    """The duration by the header, 0 where there is none to read: it plans the shards, nothing else."""
    file.seek(0)
    try:
        with soundfile.SoundFile(file.fileno(), closefd=False) as header:
            return max(0, header.frames) / header.samplerate if header.samplerate > 0 else 0.0
    except (soundfile.LibsndfileError, ValueError):
        return 0.0


def _key(source: Path) -> str:
    return f"{hashlib.sha256(str(source).encode()).hexdigest()[:16]}.json"


def _remembered(checksums: Path, source: Path) -> dict[str, Content]:
    """What was remembered of `source`; a file that is damaged remembers nothing."""
    try:
        listed = open_storage(str(checksums)).get_json(_key(source)) or {}
        if listed.get("sha256") != _digest(listed.get("files")):
            return {}
        return {
            path: Content(sha256=sha256, bytes=stamp[0], seconds=seconds, stamp=(stamp[0], stamp[1], stamp[2]))
            for path, (sha256, seconds, stamp) in listed["files"].items()
        }
    except (OSError, ValueError, AttributeError, TypeError, IndexError) as error:
        logger.warning("the checksums in %s are not used: %s", checksums, error)
        return {}


def _remember(checksums: Path, source: Path, contents: Mapping[str, Content]) -> None:
    files = {
        path: [content.sha256, content.seconds, list(content.stamp)]
        for path, content in contents.items()
        if content.stamp is not None
    }
    try:
        open_storage(str(checksums)).put_json(_key(source), {"files": files, "sha256": _digest(files)})
    except OSError as error:  # it only saves time
        logger.warning("the checksums are not kept in %s: %s", checksums, error)


def _digest(files: object) -> str:
    return hashlib.sha256(json_bytes(files)).hexdigest()
