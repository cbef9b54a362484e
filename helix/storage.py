"""Where everything is kept: keys and bytes, in a folder or in a bucket (storage_s3.py). A put is whole or absent.

Keys are relative POSIX paths ("trials/0f3a/result.json"). In a folder, writing to a temporary name and renaming makes a
put atomic; linking instead of renaming makes it put-if-absent.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

from helix.addresses import shown_uri
from helix.registry import STORAGES

TEMPORARY = ".partial-"
#: What nobody has written to for so many seconds, and nobody holds, is what a killed writer left.
LEFTOVER_S = 60.0


class CorruptObjectError(OSError):
    """Stored bytes that are not those that were put."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}; it was damaged where it is stored or on the way, put it again"


class CorruptRecordError(CorruptObjectError, ValueError):
    """Stored bytes that are not the JSON that was put. Reading them again gives the same, hence a ValueError too."""

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}; it was damaged where it is stored: helix verify lists all that is"


class Writer(ABC):
    """Bytes on their way to a key, for one thread: `keep` puts all that was written, atomically and durably.

    Whoever does not keep them discards them; then there is nothing, and the key is what it was before.
    """

    @abstractmethod
    def write(self, data: bytes | memoryview) -> None: ...

    @abstractmethod
    def keep(self) -> None:
        """Write or replace the key with everything that was written."""

    @abstractmethod
    def discard(self) -> None:
        """Forget what was written; after `keep` there is nothing to forget."""


class Storage(ABC):
    """Keys and bytes. Several processes on several machines may use one storage at once.

    A key that is not there raises FileNotFoundError, a request without permission PermissionError, storage that does
    not answer ConnectionError, bytes that are not those that were put CorruptObjectError; all are OSErrors. A key that
    is no relative path, or has '..' in it, is a ValueError. Storages are picklable and may be used by many threads.
    """

    @abstractmethod
    def __repr__(self) -> str:
        """The address, which `open_storage` opens again. It holds no secret."""

    @abstractmethod
    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write or replace `key`, atomically and durably."""

    def writer(self, key: str) -> Writer:
        """For a put in pieces. Here they are gathered in memory; a storage that can takes them as they come."""
        key_parts(key)
        return _Gathered(self, key)

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write `key` if nobody has; True for the one writer who did."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """All bytes of `key`."""

    @abstractmethod
    def get_range(self, key: str, first: int, count: int) -> bytes:
        """`count` bytes of `key` from byte `first` on, fewer where it ends before. Only their number is checked."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """How many bytes `key` has, None where there is no such key."""

    @abstractmethod
    def keys(self, prefix: str) -> Iterator[str]:
        """The keys under the folder `prefix`, sorted."""

    @abstractmethod
    def children(self, prefix: str) -> list[str]:
        """The names directly under the folder `prefix`, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove `key`; a key that is gone already is fine."""

    @abstractmethod
    def delete_folder(self, prefix: str) -> None:
        """Remove the folder `prefix` with all that is in it, also what a killed writer left behind."""

    def delete_leftovers(  # noqa: B027 (not every storage has something to do)
        self, prefix: str, *, older_s: float = LEFTOVER_S
    ) -> None:
        """Remove what killed writers left under the folder `prefix`: silent for `older_s` seconds, and held by nobody.

        A storage whose puts leave nothing has nothing to do.
        """

    @abstractmethod
    def download(self, key: str, path: Path) -> str:
        """Write the bytes of `key` to the file `path`, whole or not at all; their sha256."""

    @abstractmethod
    def upload(self, key: str, path: Path) -> None:
        """Put the bytes of the file `path`, which need not fit into memory."""

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def get_json(self, key: str) -> Any:
        """The JSON value of `key`, or None where there is no such key. CorruptRecordError where it is no JSON."""
        try:
            data = self.get(key)
        except FileNotFoundError:
            return None
        try:
            return json.loads(data)
        except ValueError as error:  # also of bytes that are no UTF-8
            raise CorruptRecordError(key, f"is not JSON ({error})") from error

    def put_json(self, key: str, value: Any) -> None:
        self.put(key, json_bytes(value))

    @abstractmethod
    def check_writable(self) -> None:
        """Write and delete a probe; an OSError says why nothing could be kept here, and what to do."""


class FolderStorage(Storage):
    """A folder of keys, also one on a file system that several machines share, if it has rename and link."""

    def __init__(self, root: Path):
        self.root = root

    def __repr__(self) -> str:
        return f"file://{quote(str(self.root))}"

    def path(self, key: str) -> Path:
        """The file behind `key`, for memory maps. Keys that would leave the folder are refused."""
        return self.root.joinpath(*key_parts(key))

    def put(self, key: str, data: bytes | memoryview) -> None:
        target = self.path(key)
        _move(self._write_aside(target, lambda file: file.write(data)), target)

    def writer(self, key: str) -> Writer:
        """The pieces go to the disk at once: a large value takes no memory, whose fresh pages cost more than a copy."""
        return _Aside(self.path(key))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        target = self.path(key)
        aside = self._write_aside(target, lambda file: file.write(data))
        try:
            os.link(aside, target)
        except FileExistsError:
            if target.is_dir():
                raise
            return False
        finally:
            aside.unlink()
        _sync_folder(target.parent)
        return True

    def get(self, key: str) -> bytes:
        with _open_key(self.path(key)) as file:
            return file.read()

    def get_range(self, key: str, first: int, count: int) -> bytes:
        check_range(first, count)
        with _open_key(self.path(key)) as file:
            file.seek(first)
            return file.read(count)

    def size(self, key: str) -> int | None:
        path = self.path(key)
        try:
            return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:  # deleted since
            return None

    def keys(self, prefix: str) -> Iterator[str]:
        found = [
            Path(folder, name).relative_to(self.root).as_posix()
            for folder, _, names in os.walk(self.path(prefix), onerror=_raise_unless_gone)
            for name in names
            if not name.startswith(TEMPORARY)
        ]
        yield from sorted(found)

    def children(self, prefix: str) -> list[str]:
        try:
            names = os.listdir(self.path(prefix))  # noqa: PTH208 (a vanished folder has to raise here, not later)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in names if not name.startswith(TEMPORARY))

    def delete(self, key: str) -> None:
        """Remove `key`; a key that is gone already is fine. Folders that become empty go too."""
        path = self.path(key)
        with contextlib.suppress(NotADirectoryError):  # it would lie below a file
            path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self.root:
                return
            try:
                folder.rmdir()
            except OSError:  # it is not empty, or another process removed it or put a key there just now
                return

    def delete_folder(self, prefix: str) -> None:
        shutil.rmtree(self.path(prefix), ignore_errors=True)

    def delete_leftovers(self, prefix: str, *, older_s: float = LEFTOVER_S) -> None:
        for path in self.path(prefix).rglob(f"{TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):  # its writer renames or removes it just now
                if path.is_file() and time.time() - path.stat().st_mtime > older_s and not _is_held(path):
                    path.unlink()

    def download(self, key: str, path: Path) -> str:
        source = self.path(key)
        aside = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            with _open_key(source) as file:
                wanted = os.fstat(file.fileno()).st_size
                with _open_new(aside) as copy:
                    shutil.copyfileobj(file, copy, 2**20)
            if aside.stat().st_size != wanted:
                raise CorruptObjectError(key, f"{aside.stat().st_size} of {wanted} bytes could be read")
            sha256 = file_sha256(aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        return sha256

    def upload(self, key: str, path: Path) -> None:
        target = self.path(key)
        with path.open("rb") as file:
            aside = self._write_aside(target, lambda copy: shutil.copyfileobj(file, copy, 2**20))
        _move(aside, target)

    def check_writable(self) -> None:
        key = f"probe-{uuid.uuid4().hex}"
        try:
            self.put(key, b"probe")
            self.delete(key)
        except OSError as error:
            raise OSError(
                f"cannot write to the storage {self!r}: {error.strerror or error}; give a folder that can be written "
                "with --storage, or free some space"
            ) from error

    def _write_aside(self, target: Path, write: Callable[[BinaryIO], object]) -> Path:
        aside = _Aside(target)
        try:
            write(aside.file)
            aside.finish()
        except BaseException:
            aside.discard()
            raise
        return aside.path


class _Aside(Writer):
    """A file beside `target` that takes its place when it is kept."""

    def __init__(self, target: Path):
        self.target = target
        self.path = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        self.file = _open_new(self.path)
        with contextlib.suppress(OSError):  # a file system without locks; `delete_leftovers` goes by age alone there
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)

    def finish(self) -> None:
        """Everything is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def keep(self) -> None:
        self.finish()
        _move(self.path, self.target)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # what is still in the buffer may not fit, which its writer has heard
            self.file.close()
        self.path.unlink(missing_ok=True)


class _Gathered(Writer):
    """In memory until it is kept, and then one put."""

    def __init__(self, storage: Storage, key: str):
        self.storage, self.key, self.data = storage, key, bytearray()

    def write(self, data: bytes | memoryview) -> None:
        self.data += data

    def keep(self) -> None:
        self.storage.put(self.key, memoryview(self.data))
        self.discard()

    def discard(self) -> None:
        self.data = bytearray()


def json_bytes(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, no NaN. Equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """`value` with the sha256 of its canonical JSON in it, so that whoever reads it can tell that it is whole."""
    return value | {"sha256": hashlib.sha256(json_bytes(value)).hexdigest()}


def is_sealed(value: object) -> bool:
    """Whether `value` is what `sealed` gave, unchanged."""
    try:
        return isinstance(value, dict) and value == sealed(
            {key: item for key, item in value.items() if key != "sha256"}
        )
    except ValueError:  # a number that is none; json reads what json_bytes would not write
        return False


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_parts(key: str) -> list[str]:
    """The names that a key is made of. Raises ValueError where it would leave the storage."""
    parts = key.split("/")
    if "\\" in key or any(part in ("", ".", "..") or part.startswith(TEMPORARY) for part in parts):
        raise ValueError(f"{key!r} is not a storage key; wanted a relative path without '..'")
    return parts


def check_range(first: int, count: int) -> None:
    if first < 0 or count < 0:
        raise ValueError(f"a range of {count} bytes from byte {first}; wanted neither to be negative")


def open_storage(address: str) -> Storage:
    """The storage at `address`: a folder, as a path or as file:///path, or s3://bucket/prefix."""
    scheme, separator, rest = address.partition("://")
    folder = rest.removeprefix("localhost")
    if scheme == "file" and folder.startswith("/") and folder != "/":
        return FolderStorage(Path(unquote(folder)).resolve())
    if address and not separator:
        return FolderStorage(Path(address).expanduser().resolve())
    if separator and scheme in STORAGES.names():
        return STORAGES[scheme].at(rest)
    known = "".join(f", or as {name}://bucket/prefix" for name in STORAGES.names())
    raise ValueError(
        f"storage {shown_uri(address)!r} is not supported; wanted a folder, as a path or as file:///path{known}"
    )


def _raise_unless_gone(error: OSError) -> None:
    """A folder that vanishes while it is listed was empty; one that cannot be read is no empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _is_held(path: Path) -> bool:
    """Whether a process that lives has this file open for writing, however long ago it wrote: it may be suspended."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


def _open_key(path: Path) -> BinaryIO:
    """The file of a key; FileNotFoundError also where it would lie below a file, or is a folder: that is no key."""
    try:
        return path.open("rb")
    except (NotADirectoryError, IsADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error


def _open_new(path: Path) -> BinaryIO:
    """Open a file for writing in a folder that a concurrent delete may be removing for being empty."""
    for _ in range(99):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("wb")
        except (FileNotFoundError, FileExistsError):
            continue
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")


def _move(aside: Path, target: Path) -> None:
    try:
        aside.replace(target)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: the folder that holds the name is synced too."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # another process deleted the key and its folder since
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
