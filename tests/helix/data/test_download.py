"""Downloads: cut off and continued, verified, unpacked without leaving the folder. All over a server on loopback."""

import contextlib
import gzip
import hashlib
import io
import random
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helix.data.dataset import Download
from helix.data.download import ATTEMPTS, DownloadError, fetch, fetch_all, unpack

ROOT = Path(__file__).resolve().parents[3]
CONTENT = random.Random(0).randbytes(300_000)


@dataclass
class Site:
    """What the server has and how it misbehaves. `asked` lists the Range of every request, None where there is none."""

    content: bytes = CONTENT
    etag: str | None = '"one"'
    ranges: bool = True
    cut_after: int | None = None
    status: list[int] = field(default_factory=list)
    says_length: bool = True
    location: str | None = None
    pause_s: float = 0.0
    asked: list[str | None] = field(default_factory=list)
    url: str = ""

    def download(self, name: str = "file.bin", **known: object) -> Download:
        given = {"sha256": hashlib.sha256(CONTENT).hexdigest(), "bytes": len(CONTENT)} | known
        return Download(url=self.url, name=name, **given)  # pyright: ignore[reportArgumentType]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        site, wanted = self.site, self.headers.get("Range")
        site.asked.append(wanted)
        if site.location is not None:
            self.send_response(302)
            self.send_header("Location", site.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if site.status:
            self.send_response(site.status.pop(0))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first = 0
        unchanged = self.headers.get("If-Range") in (None, site.etag)
        if wanted is not None and site.ranges and unchanged:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if first >= len(site.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(site.content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(site.content) - 1}/{len(site.content)}")
        else:
            self.send_response(200)
        if site.etag is not None:
            self.send_header("ETag", site.etag)
        if site.says_length:
            self.send_header("Content-Length", str(len(site.content) - first))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        last = len(site.content) if site.cut_after is None else min(len(site.content), first + site.cut_after)
        with contextlib.suppress(ConnectionError):
            for start in range(first, last, 20_000):
                self.wfile.write(site.content[start : min(start + 20_000, last)])
                time.sleep(site.pause_s)
        if last < len(site.content):
            # A reset, as a proxy that is restarted gives it.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    has = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": has}))
    has.url = f"http://127.0.0.1:{server.server_address[1]}/file"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield has
    server.shutdown()
    server.server_close()
    thread.join()


def no_wait(_seconds: float) -> None:
    pass


def test_a_file_is_fetched_once(site, tmp_path):
    heard = []
    for _ in range(2):
        path = fetch(site.download(), tmp_path, on_bytes=lambda *given: heard.append(given))
        assert path == tmp_path / "file.bin" and path.read_bytes() == CONTENT
    assert site.asked == [None]
    assert heard[-1] == ("file.bin", len(CONTENT), len(CONTENT))
    assert [file.name for file in tmp_path.iterdir()] == ["file.bin"]


def test_a_connection_that_is_cut_is_continued_where_it_was_cut(site, tmp_path):
    site.cut_after = 100_000
    fetch(site.download(), tmp_path, sleep=no_wait)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert len(site.asked) >= 3 and site.asked[0] is None
    assert all(wanted is not None and wanted != "bytes=0-" for wanted in site.asked[1:])


def test_an_end_that_comes_too_early_is_no_end(site, tmp_path):
    """The server closes the connection properly, in the middle."""
    site.says_length, site.cut_after = False, 100_000
    fetch(site.download(), tmp_path, sleep=no_wait)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_killed_process_leaves_what_the_next_one_continues(site, tmp_path):
    site.pause_s = 0.05
    code = (
        "import sys; from pathlib import Path; from helix.data.dataset import Download\n"
        "from helix.data.download import fetch\n"
        "fetch(Download(url=sys.argv[1], name='file.bin'), Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, site.url, str(tmp_path)], cwd=ROOT)
    part = tmp_path / "file.bin.part"
    while not part.is_file() or part.stat().st_size == 0:
        time.sleep(0.01)
    process.kill()
    process.wait()
    have = part.stat().st_size
    assert 0 < have < len(CONTENT) and not (tmp_path / "file.bin").exists()
    fetch(site.download(), tmp_path, sleep=no_wait)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert site.asked == [None, f"bytes={have}-"]


@pytest.mark.parametrize("checked", [True, False])
def test_a_file_that_changed_meanwhile_is_begun_anew(site, tmp_path, checked):
    """If-Range sees it; where the server has no word for the version, a part is only used if a checksum is known."""
    known = {} if checked else {"sha256": None, "bytes": None}
    (tmp_path / "file.bin.part").write_bytes(b"something else" * 1000)
    if checked:
        (tmp_path / "file.bin.part.json").write_text(f'{{"url": "{site.url}", "version": "\\"zero\\""}}')
    fetch(site.download(**known), tmp_path, sleep=no_wait)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_part_that_turns_out_wrong_is_fetched_again_from_the_start(site, tmp_path):
    site.etag = None
    (tmp_path / "file.bin.part").write_bytes(b"something else" * 1000)
    fetch(site.download(), tmp_path, sleep=no_wait)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert site.asked == ["bytes=14000-", None]


def test_a_part_that_is_complete_is_verified_and_used(site, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    fetch(site.download(), tmp_path, sleep=no_wait)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert site.asked == [f"bytes={len(CONTENT)}-"]


def test_a_server_without_ranges_sends_it_all_again(site, tmp_path):
    site.ranges = False
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:5000])
    fetch(site.download(), tmp_path, sleep=no_wait)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_server_in_trouble_is_asked_again_after_a_while(site, tmp_path):
    site.status = [500, 503, 429]
    waited: list[float] = []
    fetch(site.download(), tmp_path, sleep=waited.append)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert waited == [1.0, 2.0, 4.0]


def test_a_server_that_stays_in_trouble_is_given_up(site, tmp_path):
    site.status = [500] * 99
    with pytest.raises(
        DownloadError, match=rf"the server answers 500 .*\({ATTEMPTS} times in a row\); the same command"
    ):
        fetch(site.download(), tmp_path, sleep=no_wait)
    assert len(site.asked) == ATTEMPTS and not (tmp_path / "file.bin").exists()


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_file_that_is_not_there_is_not_asked_for_again(site, tmp_path, status):
    site.status = [status] * 9
    with pytest.raises(DownloadError, match=f"{site.url}: the server answers {status}"):
        fetch(site.download(), tmp_path, sleep=no_wait)
    assert len(site.asked) == 1


def test_a_server_that_is_not_there_is_named(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file"
    with pytest.raises(DownloadError, match="Connection refused"):
        fetch(Download(url=url, name="file.bin"), tmp_path, sleep=no_wait)


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"sha256": "0" * 64}, "has the sha256 [0-9a-f]{64}; wanted 0000"),
        ({"sha256": None, "md5": "0" * 32}, "has the md5 [0-9a-f]{32}; wanted 0000"),
        ({"bytes": 299_999}, "the server has 300000 bytes; wanted 299999"),
    ],
)
def test_wrong_bytes_are_thrown_away(site, tmp_path, known, said):
    with pytest.raises(DownloadError, match=said):
        fetch(site.download(**known), tmp_path, sleep=no_wait)
    assert not (tmp_path / "file.bin").exists() and (tmp_path / "file.bin.part").stat().st_size == 0


def test_a_server_that_does_not_stop_sending_is_stopped(site, tmp_path):
    site.says_length, site.content = False, CONTENT * 3
    with pytest.raises(DownloadError, match="sends more than the 300000 bytes that were announced"):
        fetch(site.download(), tmp_path, sleep=no_wait)


@pytest.mark.parametrize("location", ["file:///etc/hostname", "ftp://127.0.0.1/file"])
def test_a_redirection_out_of_the_web_is_not_followed(site, tmp_path, location):
    site.location = location
    with pytest.raises(DownloadError, match=f"{location}.* is not (followed|allowed)"):
        fetch(site.download(), tmp_path, sleep=no_wait)
    assert len(site.asked) == 1


@pytest.mark.parametrize("name", ["../file", "/file", "a/../../b", "", "a\\b"])
def test_a_name_that_leads_elsewhere_is_refused(site, tmp_path, name):
    with pytest.raises(ValueError, match="wanted a relative path without"):
        fetch(site.download(name), tmp_path)


def test_only_the_web_is_downloaded_from(tmp_path):
    with pytest.raises(ValueError, match="no address of the web; wanted http or https"):
        fetch(Download(url="file:///etc/hostname", name="a"), tmp_path)


# Archives

Members = list[tuple[str, bytes]]
GOOD: Members = [("set/meta.csv", b"a,b\n"), ("set/audio/one.wav", b"RIFF" * 100)]


def make_tar(path: Path, members: Members, *odd: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as packed:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))
        for member in odd:
            packed.addfile(member)
    return path


def make_zip(path: Path, members: Members) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members:
            packed.writestr(name, data)
    return path


def make(path: Path, members: Members) -> Path:
    return make_zip(path, members) if path.suffix == ".zip" else make_tar(path, members)


def odd_member(kind: bytes, name: str = "set/odd", link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "in" / "target").mkdir(parents=True)
    return tmp_path / "in" / "target"


def beside(target: Path) -> list[Path]:
    """What stands beside the folder that was unpacked to."""
    return [path for path in target.parent.iterdir() if path != target]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip"])
def test_an_archive_is_unpacked(tmp_path, target, name):
    unpack(make(tmp_path / name, GOOD), target)
    files = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert files == dict(GOOD)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip"])
@pytest.mark.parametrize("member", ["../evil", "set/../../evil", "/evil", "C:/evil", "set\\..\\evil"])
def test_a_member_that_would_leave_the_folder_is_refused_by_name(tmp_path, target, name, member):
    archive = make(tmp_path / name, GOOD)
    if name == "a.zip":
        member = member.replace("\\", "/../../") if "\\" in member else member
    archive = make(tmp_path / name, [*GOOD, (member, b"evil")])
    with pytest.raises(DownloadError, match="would be written outside of the folder") as caught:
        unpack(archive, target)
    assert repr(member) in str(caught.value)
    assert beside(target) == [] and not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (odd_member(tarfile.SYMTYPE, link="/etc"), "'set/odd' is a link"),
        (odd_member(tarfile.SYMTYPE, link="meta.csv"), "'set/odd' is a link"),
        (odd_member(tarfile.LNKTYPE, link="../../outside"), "'set/odd' is a link"),
        (odd_member(tarfile.CHRTYPE), "'set/odd' is a device or a pipe"),
        (odd_member(tarfile.FIFOTYPE), "'set/odd' is a device or a pipe"),
        (odd_member(tarfile.REGTYPE, "set/meta.csv"), "'set/meta.csv' is there twice"),
        (odd_member(tarfile.REGTYPE, "set/meta.csv/below"), "has two members in one place"),
    ],
)
def test_an_odd_member_of_a_tar_is_refused_by_name(tmp_path, target, member, said):
    with pytest.raises(DownloadError, match=said):
        unpack(make_tar(tmp_path / "a.tar.gz", GOOD, member), target)


def test_a_link_in_a_zip_is_refused_by_name(tmp_path, target):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        link = zipfile.ZipInfo("set/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(link, "/etc")
    with pytest.raises(DownloadError, match="'set/link' is a link"):
        unpack(tmp_path / "a.zip", target)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip"])
def test_a_bomb_is_not_unpacked(tmp_path, target, name):
    archive = make(tmp_path / name, [("set/zeros", bytes(65 * 2**20))])
    assert archive.stat().st_size < 2**20
    with pytest.raises(DownloadError, match=r"'set/zeros' makes 1 files of 68157440 bytes in all; not unpacked beyond"):
        unpack(archive, target)
    assert not list(target.rglob("zeros"))


def test_a_zip_that_lies_about_the_size_of_a_member_gives_no_more_than_it_said(tmp_path, target):
    archive = make_zip(tmp_path / "a.zip", [("zeros", bytes(10**6))])
    data = archive.read_bytes().replace(struct.pack("<I", 10**6), struct.pack("<I", 1000))
    archive.write_bytes(data)
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        unpack(archive, target)
    assert sum(path.stat().st_size for path in target.iterdir()) <= 1000


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "no archive"])
def test_a_damaged_archive_is_named(tmp_path, target, name, damage):
    archive = make(tmp_path / name, [("big", CONTENT)])
    data = bytearray(archive.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 255
    else:
        data = bytearray(b"<html>" * 100)
    archive.write_bytes(data)
    with pytest.raises(DownloadError, match=rf"{name}: cannot be unpacked"):
        unpack(archive, target)


def test_a_source_appears_whole_and_is_made_once(site, tmp_path):
    archive = make_tar(tmp_path / "set.tar.gz", GOOD)
    site.content = archive.read_bytes()
    known = {"sha256": hashlib.sha256(site.content).hexdigest(), "bytes": None}
    files = [site.download("audio/set.tar.gz", **known), site.download("lists/set.tsv.gz", **known)]
    folder = tmp_path / "downloads"
    source = fetch_all("some", files, folder)
    assert (source / "audio" / "set" / "meta.csv").read_bytes() == b"a,b\n"
    assert gzip.decompress((source / "lists" / "set.tsv.gz").read_bytes())
    assert fetch_all("some", files, folder) == source and len(site.asked) == 2
    other = fetch_all("some", [replace(files[0], md5=hashlib.md5(site.content).hexdigest())], folder)
    assert other != source


def test_an_archive_that_is_refused_leaves_no_source_behind(site, tmp_path):
    archive = make_tar(tmp_path / "set.tar.gz", [*GOOD, ("../evil", b"")])
    site.content = archive.read_bytes()
    folder = tmp_path / "downloads"
    (folder / ".unpacking-some-00000000").mkdir(parents=True)
    with pytest.raises(DownloadError, match="would be written outside"):
        fetch_all("some", [site.download("set.tar.gz", sha256=None, bytes=None)], folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [".unpacking-some-00000000"]


def test_two_processes_that_download_at_once_fetch_once(site, tmp_path):
    archive = make_tar(tmp_path / "set.tar.gz", [*GOOD, ("noise", CONTENT)])
    site.content, site.pause_s = archive.read_bytes(), 0.02
    code = (
        "import sys; from pathlib import Path; from helix.data.dataset import Download\n"
        "from helix.data.download import fetch_all\n"
        "fetch_all('some', [Download(url=sys.argv[1], name='set.tar.gz')], Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, site.url, str(tmp_path / "downloads")]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(site.asked) == 1


def test_a_folder_that_cannot_be_written_is_named(site, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write to .*/file/downloads: Not a directory; free some space or name"):
        fetch_all("some", [site.download()], tmp_path / "file" / "downloads")
