"""Whole shards of a bucket on local disk: fetched once per node, verified, the longest unused removed.

    <folder>/<sha256>.bin     a shard, named by its contents, so that equal shards of any storage are one file
             incoming/<xx>/   what is being downloaded, whose sha256 begins with xx
             locks/<xx>       held while a shard of that beginning is downloaded, by one process of the node
             locks/room       held while shards are removed

A shard is opened before it gets its name, and a file that is removed stays readable where it is open, so no process
has to wait for another that makes room. Shards of a folder are not copied: they are mapped where they lie.
"""

import contextlib
import errno
import fcntl
import math
import os
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from helix.storage import CorruptObjectError, FolderStorage, Storage

LIMIT_GIB = 50.0
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardCache:
    """At most `limit_gib` of shards under `folder`, or one where one is larger; for any number of processes at once.

    While several processes download at once, each may be one shard over. Picklable, and safe to use from threads.
    """

    def __init__(self, folder: Path, limit_gib: float = LIMIT_GIB):
        if not 0 < limit_gib < math.inf:
            raise ValueError(f"a cache of {limit_gib} GiB; wanted more than 0 and less than infinity")
        self.folder, self.limit_bytes = folder, int(limit_gib * 2**30)
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def of_environment(cls) -> "ShardCache":
        """In HELIX_CACHE, or where the user's caches are; HELIX_CACHE_GIB large."""
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(os.environ.get("HELIX_CACHE") or caches / "helix" / "shards").expanduser().absolute()
        given = os.environ.get("HELIX_CACHE_GIB") or str(LIMIT_GIB)
        try:
            return cls(folder, float(given))
        except ValueError as error:
            raise ValueError(f"HELIX_CACHE_GIB is {given!r}; wanted a finite number of GiB above 0") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit_bytes": self.limit_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._maps, self._lock = OrderedDict(), threading.Lock()

    def path(self, storage: Storage, key: str, size: int, sha256: str) -> Path:
        """A file with the shard `key` of `size` bytes. Raises CorruptObjectError where the storage has other bytes.

        Another process may remove the file before it is opened; `samples` has opened it already.
        """
        if isinstance(storage, FolderStorage):
            return storage.path(key)
        self._open(storage, key, size, sha256).close()
        return self._file(sha256)

    def samples(self, storage: Storage, key: str, size: int, sha256: str) -> np.ndarray:
        """int16 [size // 2], a read-only map of the shard `key`. Raises CorruptObjectError."""
        with self._lock:
            known = self._maps.get(sha256)
            if known is not None:
                self._maps.move_to_end(sha256)
                return known
        if isinstance(storage, FolderStorage):
            mapped = np.memmap(storage.path(key), dtype="<i2", mode="r")
            with self._lock:
                return self._maps.setdefault(sha256, mapped)
        with self._open(storage, key, size, sha256) as file:
            mapped = np.memmap(file, dtype="<i2", mode="r")
        with self._lock:
            mapped = self._maps.setdefault(sha256, mapped)
            # A removed file takes its room on the disk as long as it is mapped.
            while len(self._maps) > 1 and sum(array.nbytes for array in self._maps.values()) > self.limit_bytes:
                self._maps.popitem(last=False)
        return mapped

    def discard(self, sha256: str) -> None:
        """Forget a shard, whose file turned out to be damaged; the next use fetches it again."""
        with self._lock:
            self._maps.pop(sha256, None)
        self._file(sha256).unlink(missing_ok=True)

    def _file(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.bin"

    def _open(self, storage: Storage, key: str, size: int, sha256: str) -> BinaryIO:
        self._make_folders()
        file = self._cached(sha256, size)
        if file is not None:
            return file
        with self._locked(sha256[:2]):
            return self._cached(sha256, size) or self._fetched(storage, key, size, sha256)

    def _make_folders(self) -> None:
        """Raises OSError where nothing can be kept, before anything is fetched."""
        try:
            for name in ("incoming", "locks"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            # Without a number, so that it is not taken for a key that is not there.
            raise OSError(
                f"cannot keep shards in {self.folder} ({error.strerror}); name a folder that can be written with "
                "HELIX_CACHE"
            ) from error

    def _cached(self, sha256: str, size: int) -> BinaryIO | None:
        """The file of a shard if it is there with all its bytes, marked as used just now."""
        try:
            file = self._file(sha256).open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != size:
            file.close()
            return None
        os.utime(file.fileno())
        return file

    def _fetched(self, storage: Storage, key: str, size: int, sha256: str) -> BinaryIO:
        """Download a shard; the caller holds its lock."""
        incoming = self.folder / "incoming" / sha256[:2]
        try:
            for last in (False, True):
                shutil.rmtree(incoming, ignore_errors=True)  # what a killed process left
                incoming.mkdir(parents=True)
                self._make_room(size)
                aside = incoming / uuid.uuid4().hex
                try:
                    found = storage.download(key, aside)
                except OSError as error:
                    if error.errno not in NO_ROOM:
                        raise
                    if last:
                        raise OSError(
                            error.errno,
                            f"the cache has no room for {key} of {size} bytes ({error.strerror}); name a folder on a "
                            "larger disk with HELIX_CACHE",
                            str(self.folder),
                        ) from error
                    self._make_room(self.limit_bytes)
                    continue
                if found == sha256 and aside.stat().st_size == size:
                    file = aside.open("rb")
                    aside.replace(self._file(sha256))
                    self._make_room(0, keep=sha256)
                    return file
            raise CorruptObjectError(key, "its bytes are not those that were published, by their sha256")
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _make_room(self, size: int, *, keep: str = "") -> None:
        """Remove the longest unused shards until `size` bytes more would fit, and what killed downloads left."""
        with self._locked("room"):
            for left in (self.folder / "incoming").iterdir():
                with self._locked(left.name, wait=False) as free:
                    if free:
                        shutil.rmtree(left, ignore_errors=True)
            shards = []
            for path in self.folder.glob("*.bin"):
                with contextlib.suppress(FileNotFoundError):
                    state = path.stat()
                    shards.append((state.st_mtime_ns, state.st_size, path))
            total = sum(held for _, held, _ in shards)
            for _, held, path in sorted(shards):
                if total + size <= self.limit_bytes:
                    return
                if path.stem != keep:
                    path.unlink(missing_ok=True)
                    total -= held

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold a lock, which the system frees if this process dies; without `wait`, False if another holds it."""
        path = self.folder / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
