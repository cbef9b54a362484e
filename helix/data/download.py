"""Official downloads: fetched resumably, verified, and unpacked so that no member of an archive leaves its folder.

<folder>/<name>                  the file as published, once it is whole and verifies
         <name>.part             what is there of it so far
         <name>.part.json        which version of the file that is, by the server's words
         <data set>-<key8>/      all of it, archives unpacked where their name says; it appears whole, by a rename
"""

import fcntl
import hashlib
import http.client
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO
from urllib.parse import urlsplit

from helix.data.dataset import Download
from helix.storage import json_bytes

#: How often a download that breaks off is continued without a byte of progress before it is given up.
ATTEMPTS = 6
TIMEOUT_S = 60.0
BLOCK_BYTES = 2**20
#: Archives of audio unpack to less than this many times their size; one that claims more is refused.
MOST_EXPANSION = 30
SMALL_BYTES = 64 * 2**20
MOST_MEMBERS = 2_000_000
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
GONE_FOR_GOOD = {400, 401, 403, 404, 405, 410, 451}

#: Hears the bytes of a file that are there, and how many there will be (None: the server does not say).
OnBytes = Callable[[str, int, int | None], None]


class DownloadError(Exception):
    """A download that cannot be had, or is not what was announced."""

    def __init__(self, what: str, reason: str):
        super().__init__(what, reason)
        self.what, self.reason = what, reason

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


def fetch_all(
    name: str,
    downloads: Sequence[Download],
    folder: Path,
    *,
    on_bytes: OnBytes = lambda _name, _done, _all: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Fetch and unpack all downloads of the data set `name` into `folder`; the source folder that they make.

    What is there already is not fetched and not unpacked again. Raises DownloadError, and OSError where the folder
    cannot be written.
    """
    for download in downloads:
        _check_address(download)
    key = hashlib.sha256(json_bytes([asdict(download) for download in downloads])).hexdigest()[:8]
    source = folder / f"{name}-{key}"
    if source.is_dir():
        return source
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process that downloads to this folder is waited for
            if not source.is_dir():
                _unpack_all(downloads, folder, source, on_bytes, sleep)
    except OSError as error:
        raise _full(folder, error) from error
    return source


def fetch(
    download: Download,
    folder: Path,
    *,
    on_bytes: OnBytes = lambda _name, _done, _all: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Fetch one file into `folder`, going on where an earlier attempt was cut off; the path of the verified file.

    Not to be run twice at once for one folder; `fetch_all` sees to that. Raises DownloadError where the server refuses,
    breaks off again and again, or sends what was not announced.
    """
    _check_address(download)
    target = folder / download.name
    if target.is_file() and _wrong(download, target) is None:
        return target
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab+") as file:
        resumed = os.fstat(file.fileno()).st_size > 0
        _fetch_part(download, part, file, on_bytes, sleep)
        wrong = _wrong(download, part)
        if wrong is not None and resumed:  # the file may have changed since it was begun
            file.truncate(0)
            _fetch_part(download, part, file, on_bytes, sleep)
            wrong = _wrong(download, part)
        if wrong is not None:
            file.truncate(0)
            raise DownloadError(
                download.url, f"{wrong}; what came was thrown away. Try again, or fetch it by hand and compare"
            )
        os.fsync(file.fileno())
    part.replace(target)
    _version_file(part).unlink(missing_ok=True)
    return target


def unpack(archive: Path, target: Path) -> None:
    """Unpack a tar or zip file into the folder `target`. Files and folders only, none of them outside of it.

    Raises DownloadError with the member's name for a path that is absolute or has '..', a link, a device, two members
    of one name, and for an archive that unpacks to far more than its own size.
    """
    limit = max(SMALL_BYTES, MOST_EXPANSION * archive.stat().st_size)
    try:
        if archive.name.endswith(".zip"):
            _unpack_zip(archive, target, limit)
        else:
            _unpack_tar(archive, target, limit)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise DownloadError(archive.name, f"has two members in one place: {error.filename}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise DownloadError(archive.name, f"cannot be unpacked: {error}") from error  # it is the unpacker's own
    except (
        tarfile.TarError,
        lzma.LZMAError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        raise DownloadError(archive.name, f"cannot be unpacked: {error or type(error).__name__}") from error


def _fetch_part(
    download: Download, part: Path, file: BinaryIO, on_bytes: OnBytes, sleep: Callable[[float], None]
) -> None:
    """Fill `file` until the server has no more, asking again where it breaks off."""
    failures = 0
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            if _continue(download, part, file, on_bytes):
                return
            problem = "the connection was closed before the end"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in GONE_FOR_GOOD or error.code < 400:  # a redirection that is not followed
                raise DownloadError(download.url, f"the server answers {error.code} {error.reason}") from error
            problem = f"the server answers {error.code} {error.reason}"
        except (http.client.HTTPException, urllib.error.URLError, ConnectionError, TimeoutError) as error:
            problem = str(error) or type(error).__name__
        failures = 0 if file.seek(0, os.SEEK_END) > before else failures + 1
        if failures == ATTEMPTS:
            raise DownloadError(
                download.url, f"{problem} ({failures} times in a row); the same command goes on from what is there"
            )
        sleep(min(30.0, 0.5 * 2**failures))


def _check_address(download: Download) -> None:
    path = PurePosixPath(download.name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in download.name:
        raise ValueError(f"the name of a download is {download.name!r}; wanted a relative path without '..'")
    if urlsplit(download.url).scheme not in ("http", "https"):
        raise ValueError(f"{download.url!r} is no address of the web; wanted http or https")


def _unpack_all(
    downloads: Sequence[Download], folder: Path, source: Path, on_bytes: OnBytes, sleep: Callable[[float], None]
) -> None:
    files = [fetch(download, folder, on_bytes=on_bytes, sleep=sleep) for download in downloads]
    aside = folder / f".unpacking-{source.name}"
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    try:
        aside.mkdir()
        for download, file in zip(downloads, files, strict=True):
            place = aside / download.name
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.name.endswith(ARCHIVES):
                unpack(file, place.parent)
            else:
                shutil.copyfile(file, place)
        aside.rename(source)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _continue(download: Download, part: Path, file: BinaryIO, on_bytes: OnBytes) -> bool:
    """Ask once for what is missing and write it; whether the file is whole then, by what the server says."""
    have = file.seek(0, os.SEEK_END)
    version = _read_version(part, download) if have else None
    # Without a word from the server about its version, only a checksum could tell a file put together from two.
    if have and version is None and download.sha256 is None and download.md5 is None:
        have = 0
        file.truncate(0)
    headers = {"Accept-Encoding": "identity", "User-Agent": "helix"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if version is not None:
            headers["If-Range"] = version
    try:
        response = _OPENER.open(urllib.request.Request(download.url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if total is not None and int(total[1]) == have:
            return True
        file.truncate(0)  # there is more here than there is there: another file
        return False
    with response:
        first, total = _extent(response, have)
        if first != have:
            file.truncate(0)
            if first:
                return False
        if download.bytes is not None and total is not None and total != download.bytes:
            file.truncate(0)
            raise DownloadError(download.url, f"the server has {total} bytes; wanted {download.bytes}")
        _write_version(part, download, response)
        limit = download.bytes if download.bytes is not None else total
        position = first
        on_bytes(download.name, position, limit)
        while block := _read(response):
            if limit is not None and position + len(block) > limit:
                file.truncate(0)
                raise DownloadError(download.url, f"the server sends more than the {limit} bytes that were announced")
            file.write(block)
            position += len(block)
            on_bytes(download.name, position, limit)
        file.flush()
        return limit is None or position == limit


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(BLOCK_BYTES)
    except OSError as error:  # of whatever kind: it is the network's and not the disk's
        raise ConnectionError(str(error) or type(error).__name__) from error


def _extent(response: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """Where in the file an answer begins, and how long the file is (None: not said)."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None:
            return (-1 if have else 0), None
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_version(part: Path, download: Download) -> str | None:
    """What names the version of the file that was begun; a weak ETag names none."""
    try:
        noted = json.loads(_version_file(part).read_bytes())
        return noted["version"] if noted["url"] == download.url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_version(part: Path, download: Download, response: http.client.HTTPResponse) -> None:
    etag = response.headers.get("ETag", "")
    version = etag if etag.startswith('"') else response.headers.get("Last-Modified")
    _version_file(part).write_bytes(json_bytes({"url": download.url, "version": version}))


def _wrong(download: Download, path: Path) -> str | None:
    """How a file differs from what was announced, None where it does not."""
    size = path.stat().st_size
    if download.bytes is not None and size != download.bytes:
        return f"has {size} bytes; wanted {download.bytes}"
    for algorithm, wanted in (("sha256", download.sha256), ("md5", download.md5)):
        if wanted is None:
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if found != wanted.lower():
            return f"has the {algorithm} {found}; wanted {wanted}"
    return None


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows a redirection to another web server, never from https to what anybody on the way could change."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        allowed = ("https",) if urlsplit(req.full_url).scheme == "https" else ("http", "https")
        if urlsplit(newurl).scheme not in allowed:
            raise DownloadError(req.full_url, f"is redirected to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_WebOnly)


def _unpack_tar(archive: Path, target: Path, limit: int) -> None:
    seen: set[PurePosixPath] = set()
    total = 0
    with tarfile.open(archive, "r:*") as packed:
        for member in packed:
            if member.isdir():
                (target / _safe(archive, member.name)).mkdir(parents=True, exist_ok=True)
                continue
            if not member.isfile():
                kind = "a link" if member.issym() or member.islnk() else "a device or a pipe"
                raise DownloadError(archive.name, f"its member {member.name!r} is {kind}; wanted files and folders")
            path = _checked(archive, member.name, seen)
            total = _bounded(archive, member.name, total + member.size, limit, len(seen))
            # What Python's own filter for data refuses, it refuses too.
            tarfile.data_filter(member, str(target))
            content = packed.extractfile(member)
            assert content is not None
            _write_member(archive, content, target / path, member.name, member.size)
        assert packed.fileobj is not None
        while block := packed.fileobj.read(BLOCK_BYTES):  # the checksum of a compressed file is read at its end
            total = _bounded(archive, "(behind the last one)", total + len(block), limit, len(seen))


def _unpack_zip(archive: Path, target: Path, limit: int) -> None:
    seen: set[PurePosixPath] = set()
    total = 0
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            if member.is_dir():
                (target / _safe(archive, member.filename)).mkdir(parents=True, exist_ok=True)
                continue
            mode = stat.S_IFMT(member.external_attr >> 16)
            if mode not in (0, stat.S_IFREG):
                kind = "a link" if mode == stat.S_IFLNK else "no regular file"
                raise DownloadError(archive.name, f"its member {member.filename!r} is {kind}; wanted files and folders")
            path = _checked(archive, member.filename, seen)
            total = _bounded(archive, member.filename, total + member.file_size, limit, len(seen))
            with packed.open(member) as content:
                _write_member(archive, content, target / path, member.filename, member.file_size)


def _safe(archive: Path, name: str) -> PurePosixPath:
    """The path of a member inside the folder it is unpacked to."""
    path = PurePosixPath(name)
    odd = "\\" in name or "\0" in name or re.match(r"[A-Za-z]:", name)
    if path.is_absolute() or ".." in path.parts or odd:
        raise DownloadError(archive.name, f"its member {name!r} would be written outside of the folder")
    return path


def _checked(archive: Path, name: str, seen: set[PurePosixPath]) -> PurePosixPath:
    path = _safe(archive, name)
    if not path.parts:
        raise DownloadError(archive.name, f"its member {name!r} has no name")
    if path in seen:
        raise DownloadError(archive.name, f"its member {name!r} is there twice")
    seen.add(path)
    return path


def _bounded(archive: Path, name: str, total: int, limit: int, members: int) -> int:
    if total > limit or members > MOST_MEMBERS:
        raise DownloadError(
            archive.name,
            f"its member {name!r} makes {members} files of {total} bytes in all; not unpacked beyond {limit} bytes",
        )
    return total


def _write_member(archive: Path, content: IO[bytes], path: Path, name: str, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        shutil.copyfileobj(content, file, BLOCK_BYTES)
        written = file.tell()
    if written != size:
        raise DownloadError(archive.name, f"its member {name!r} has {written} bytes; {size} were announced")


def _full(folder: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"cannot write to {folder}: {error.strerror or error}; free some space or name another")
