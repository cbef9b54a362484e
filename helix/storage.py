"""Where everything is kept: keys and bytes, over a local folder. A put is whole or absent, never half.

Keys are relative POSIX paths ("trials/0f3a/result.json"). Writing to a temporary name and renaming makes a put atomic;
linking instead of renaming makes it put-if-absent.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

TEMPORARY = ".partial-"


class Storage:
    """A folder of keys. Several processes may use one folder at once, also over a shared file system with rename."""

    def __init__(self, root: Path):
        self.root = root

    def __repr__(self) -> str:
        return f"file://{quote(str(self.root))}"

    def path(self, key: str) -> Path:
        """The file behind `key`, for memory maps. Keys that would leave the folder are refused."""
        parts = key.split("/")
        if "\\" in key or any(part in ("", ".", "..") or part.startswith(TEMPORARY) for part in parts):
            raise ValueError(f"{key!r} is not a storage key; wanted a relative path without '..'")
        return self.root.joinpath(*parts)

    def put(self, key: str, data: bytes) -> None:
        """Write or replace `key`, atomically and durably."""
        target = self.path(key)
        aside = self._write_aside(target, data)
        try:
            aside.replace(target)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write `key` if nobody has; True for the one writer who did."""
        target = self.path(key)
        aside = self._write_aside(target, data)
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
        """All bytes of `key`. Raises FileNotFoundError."""
        return self.path(key).read_bytes()

    def exists(self, key: str) -> bool:
        return self.path(key).is_file()

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys under the folder `prefix`, sorted."""
        found = [
            Path(folder, name).relative_to(self.root).as_posix()
            for folder, _, names in os.walk(self.path(prefix), onerror=_raise_unless_gone)
            for name in names
            if not name.startswith(TEMPORARY)
        ]
        yield from sorted(found)

    def children(self, prefix: str) -> list[str]:
        """The names directly under the folder `prefix`, sorted."""
        try:
            names = os.listdir(self.path(prefix))  # noqa: PTH208 (a vanished folder has to raise here, not later)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in names if not name.startswith(TEMPORARY))

    def delete(self, key: str) -> None:
        """Remove `key`; a key that is gone already is fine. Folders that become empty go too."""
        path = self.path(key)
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self.root:
                return
            try:
                folder.rmdir()
            except OSError:  # it is not empty, or another process removed it or put a key there just now
                return

    def delete_folder(self, prefix: str) -> None:
        """Remove the folder `prefix` with all that is in it, also what a killed writer left behind."""
        shutil.rmtree(self.path(prefix), ignore_errors=True)

    def get_json(self, key: str) -> Any:
        """The JSON value of `key`, or None where there is no such key."""
        try:
            data = self.get(key)
        except FileNotFoundError:
            return None
        return json.loads(data)

    def put_json(self, key: str, value: Any) -> None:
        self.put(key, json_bytes(value))

    def check_writable(self) -> None:
        """Write, read and delete a probe; a PermissionError or OSError says that nothing could be kept here."""
        key = f"probe-{uuid.uuid4().hex}"
        try:
            self.put(key, b"probe")
            self.delete(key)
        except OSError as error:
            raise OSError(
                f"cannot write to the storage {self!r}: {error.strerror or error}; give a folder that can be written "
                "with --storage, or free some space"
            ) from error

    def _write_aside(self, target: Path, data: bytes) -> Path:
        aside = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            with _open_new(aside) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        return aside


def json_bytes(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, no NaN. Equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def open_storage(address: str) -> Storage:
    """The storage at `address`: a folder, as a path or as file:///path."""
    scheme, separator, rest = address.partition("://")
    rest = rest.removeprefix("localhost")
    if scheme == "file" and rest.startswith("/") and rest != "/":
        return Storage(Path(unquote(rest)).resolve())
    if address and not separator:
        return Storage(Path(address).expanduser().resolve())
    raise ValueError(f"storage {address!r} is not supported; wanted a folder, as a path or as file:///path")


def _raise_unless_gone(error: OSError) -> None:
    """A folder that vanishes while it is listed was empty; one that cannot be read is no empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


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
