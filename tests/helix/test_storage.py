"""Storage keeps a whole value or none, whoever is killed, whoever races, and however full the disk is."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix.storage import TEMPORARY, FolderStorage, Storage, json_bytes, open_storage

ROOT = Path(__file__).resolve().parents[2]
KEY = "trials/0f3a/result.json"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that knows the package and has `storage` and `arguments` (strings) at hand."""
    head = "import sys; from pathlib import Path; from helix.storage import FolderStorage\n"
    head += "storage, arguments = FolderStorage(Path(sys.argv[1])), sys.argv[2:]\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + script, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def everything(storage: Storage) -> set[str]:
    """All files, also those that are hidden."""
    return {path.relative_to(storage.root).as_posix() for path in storage.root.rglob("*") if path.is_file()}


# Values


def test_what_was_put_is_what_is_got(storage: Storage):
    for data in (b"", b"\0\xff\r\n", bytes(range(256)) * 5000):
        storage.put(KEY, data)
        assert storage.get(KEY) == data
    assert everything(storage) == {KEY}


def test_what_is_written_in_pieces_is_there_once_it_is_kept_and_not_before(storage: Storage):
    storage.put(KEY, b"old")
    writer = storage.writer(KEY)
    for piece in (b"a" * 70_000, memoryview(b"b" * 9), b""):
        writer.write(piece)
        assert storage.get(KEY) == b"old" and list(storage.keys("trials")) == [KEY]
    writer.keep()
    writer.discard()
    assert storage.get(KEY) == b"a" * 70_000 + b"b" * 9
    assert everything(storage) == {KEY}


def test_what_is_discarded_leaves_no_trace(storage: Storage):
    storage.put(KEY, b"old")
    for key in (KEY, "trials/other.json"):
        writer = storage.writer(key)
        writer.write(b"new" * 70_000)
        writer.discard()
    assert storage.get(KEY) == b"old" and everything(storage) == {KEY}


def test_a_missing_key_is_said_to_be_missing(storage: Storage):
    assert not storage.exists(KEY)
    assert storage.get_json(KEY) is None
    with pytest.raises(FileNotFoundError):
        storage.get(KEY)


def test_a_folder_is_no_key(storage: Storage):
    storage.put(KEY, b"x")
    assert not storage.exists("trials")
    assert storage.exists(KEY)


@pytest.mark.parametrize("write", [FolderStorage.put, FolderStorage.put_if_absent], ids=["put", "put_if_absent"])
def test_a_key_that_is_a_folder_is_refused_and_nothing_is_left_behind(
    storage: Storage, write: Callable[[Storage, str, bytes], None]
):
    storage.put(KEY, b"x")
    with pytest.raises(OSError):
        write(storage, "trials", b"y")
    assert everything(storage) == {KEY}


def test_deleting_what_is_not_there_is_fine(storage: Storage):
    storage.delete(KEY)
    storage.put(KEY, b"x")
    storage.delete(KEY)
    storage.delete(KEY)
    assert not storage.exists(KEY)


@pytest.mark.parametrize("key", ["trials/.DS_Store/spec.json", "trials"])
def test_a_key_below_a_file_and_a_folder_are_keys_that_are_not_there(storage: Storage, tmp_path: Path, key: str):
    storage.put("trials/.DS_Store", b"Bud1")
    for read in (
        storage.get,
        lambda key: storage.get_range(key, 0, 1),
        lambda key: storage.download(key, tmp_path / "copy"),
    ):
        with pytest.raises(FileNotFoundError):
            read(key)
    assert storage.get_json(key) is None and storage.size(key) is None and not storage.exists(key)
    if key.endswith(".json"):
        storage.delete(key)
        assert storage.children(key) == list(storage.keys(key)) == []
    assert storage.get("trials/.DS_Store") == b"Bud1" and not (tmp_path / "copy").exists()


def test_folders_go_with_their_last_key_and_not_before(storage: Storage):
    storage.put("a/b/one", b"1")
    storage.put("a/b/c/two", b"2")
    storage.delete("a/b/c/two")
    assert storage.children("a/b") == ["one"]
    storage.delete("a/b/one")
    assert list(storage.root.iterdir()) == []


# Names


@pytest.mark.parametrize("key", ["", ".", "..", "/", "/etc/passwd", "a/../b", "../a", "a/..", "a\\b", "..\\a", "C:\\a"])
def test_a_key_that_could_leave_the_folder_is_refused(storage: Storage, key: str):
    for use in (
        storage.path,
        storage.get,
        storage.exists,
        storage.delete,
        storage.children,
        lambda key: storage.put(key, b""),
        lambda key: storage.put_if_absent(key, b""),
        lambda key: list(storage.keys(key)),
    ):
        with pytest.raises(ValueError) as refused:
            use(key)
        assert str(refused.value) == f"{key!r} is not a storage key; wanted a relative path without '..'"


@given(st.text(max_size=12) | st.text("./\\a", max_size=8))
def test_no_key_whatever_leaves_the_folder(key: str):
    root = Path("/storage")
    try:
        path = FolderStorage(root).path(key)
    except ValueError:
        return
    assert Path(os.path.normpath(path)).is_relative_to(root)
    assert path != root


def test_listing_is_sorted_and_complete(storage: Storage):
    keys = ["trials/b/spec.json", "trials/a/metrics/epoch-0002.json", "trials/a/metrics/epoch-0001.json"]
    for key in [*keys, "trialsome/spec.json"]:
        storage.put(key, b"{}")
    assert list(storage.keys("trials")) == sorted(keys)
    assert list(storage.keys("trials/a/metrics")) == sorted(keys)[:2]
    assert storage.children("trials") == ["a", "b"]
    assert storage.children("trials/a/metrics") == ["epoch-0001.json", "epoch-0002.json"]


def test_listing_what_is_not_there_is_empty(storage: Storage):
    assert list(storage.keys("trials")) == []
    assert storage.children("trials") == []


def test_a_folder_that_cannot_be_read_is_an_error_and_not_an_empty_one(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    storage.put(KEY, b"x")
    monkeypatch.setattr(os, "scandir", broken)
    monkeypatch.setattr(os, "listdir", broken)
    with pytest.raises(OSError, match="Input/output error"):
        list(storage.keys("trials"))
    with pytest.raises(OSError, match="Input/output error"):
        storage.children("trials")


def test_listing_does_not_show_what_is_still_being_written(storage: Storage):
    storage.put(KEY, b"x")
    (storage.path(KEY).parent / f"{TEMPORARY}0123").write_bytes(b"half")
    assert list(storage.keys("trials")) == [KEY]
    assert storage.children("trials/0f3a") == ["result.json"]


# JSON


def test_equal_values_are_equal_bytes():
    assert json_bytes({"b": [1.0, None], "a": "ü"}) == json_bytes({"a": "ü", "b": [1.0, None]})
    assert json_bytes({"b": 1, "a": [True]}) == b'{"a":[true],"b":1}'


def test_a_value_that_is_no_number_is_not_written_as_one(storage: Storage):
    storage.put_json(KEY, {"loss": 1.5})
    with pytest.raises(ValueError):
        storage.put_json(KEY, {"loss": float("nan")})
    assert storage.get_json(KEY) == {"loss": 1.5}


def test_json_comes_back_as_it_was(storage: Storage):
    value = {"rows": [{"epoch": 1, "loss": 0.1 + 0.2}], "none": None, "text": "ü\n"}
    storage.put_json(KEY, value)
    assert storage.get_json(KEY) == value


# Addresses


def test_a_folder_is_named_by_a_path_or_by_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path.resolve() / "my runs"
    for address in (str(folder), "my runs", "./my runs", "~/my runs", folder.as_uri(), f"file://localhost{folder}"):
        assert open_storage(address).root == folder


@pytest.mark.parametrize("name", ["50%20of", "run#1", "what?", "a b"])
def test_a_folder_with_an_odd_name_is_found_by_path_and_by_url(tmp_path: Path, name: str):
    folder = tmp_path.resolve() / name
    assert open_storage(str(folder)).root == folder
    assert open_storage(folder.as_uri()).root == folder


@pytest.mark.parametrize("address", ["gs://bucket", "http://host/runs", "file://host/runs", ""])
def test_an_address_of_another_kind_is_refused_in_words(address: str):
    with pytest.raises(ValueError) as refused:
        open_storage(address)
    assert str(refused.value) == (
        f"storage {address!r} is not supported; wanted a folder, as a path or as file:///path, or as s3://bucket/prefix"
    )


# Killed writers

OLD, NEW = b"old" * 50_000, b"new" * 70_000

KILLED_AT = """
import os, signal
function, count = getattr(os, arguments[1]), int(arguments[2])
def dying(*given, **options):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*given, **options)
setattr(os, arguments[1], dying)
getattr(storage, arguments[3])(arguments[0], b"new" * 70_000)
"""
WHOLE = KILLED_AT.splitlines()[-1]
IN_PIECES = """writer = storage.writer(arguments[0])
for _ in range(70):
    writer.write(b"new" * 1_000)
writer.keep()"""


@pytest.mark.parametrize(
    ("function", "calls_survived", "left"),
    [("fsync", 0, OLD), ("replace", 0, OLD), ("fsync", 1, NEW), ("fsync", 2, NEW)],
    ids=["written", "synced", "renamed", "returned"],
)
@pytest.mark.parametrize("how", ["put", "writer"])
def test_a_put_that_is_killed_leaves_the_old_value_or_the_new(
    storage: Storage, function: str, calls_survived: int, left: bytes, how: str
):
    storage.put(KEY, OLD)
    script = KILLED_AT if how == "put" else KILLED_AT.replace(WHOLE, IN_PIECES)
    writer = start(script, storage.root, KEY, function, calls_survived, "put")
    assert writer.wait() == (0 if calls_survived == 2 else -signal.SIGKILL)
    assert storage.get(KEY) == left
    assert list(storage.keys("trials")) == [KEY]


@pytest.mark.parametrize(
    ("function", "calls_survived", "left"),
    [("fsync", 0, None), ("link", 0, None), ("fsync", 1, NEW), ("fsync", 2, NEW)],
    ids=["written", "synced", "linked", "returned"],
)
def test_a_put_if_absent_that_is_killed_leaves_nothing_or_everything(
    storage: Storage, function: str, calls_survived: int, left: bytes | None
):
    writer = start(KILLED_AT, storage.root, KEY, function, calls_survived, "put_if_absent")
    assert writer.wait() == (0 if calls_survived == 2 else -signal.SIGKILL)
    assert list(storage.keys("trials")) == ([KEY] if left else [])
    if left is None:
        assert storage.put_if_absent(KEY, NEW), "the next one has to be able to finish what was begun"
    assert storage.get(KEY) == NEW


WRITE_FOR_EVER = """
values = [bytes([letter]) * 4_000_000 for letter in b"ab"]
while True:
    for value in values:
        storage.put(arguments[0], value)
"""


@pytest.mark.parametrize("after_s", [0.0, 0.003, 0.01, 0.02])
def test_a_writer_killed_at_any_moment_leaves_a_whole_value(storage: Storage, after_s: float):
    writer = start(WRITE_FOR_EVER, storage.root, KEY)
    try:
        while not storage.exists(KEY):
            assert writer.poll() is None
            time.sleep(0.001)
        time.sleep(after_s)
        assert set(storage.get(KEY)) < set(b"ab"), "a reader saw parts of two values"
    finally:
        writer.kill()
        writer.wait()
    value = storage.get(KEY)
    assert len(value) == 4_000_000
    assert len(set(value)) == 1
    assert list(storage.keys("trials")) == [KEY]


# Races

RACE = """
import time
go = Path(arguments[0])
print("ready", flush=True)
while not go.exists():
    time.sleep(0.0005)
mine = arguments[1].encode() * 20_000
print("".join(str(int(storage.put_if_absent(f"race/{number}", mine))) for number in range(20)))
"""


def test_of_sixteen_processes_that_put_if_absent_one_wins_with_all_it_wrote(storage: Storage, tmp_path: Path):
    names = "abcdefghijklmnop"
    racers = {name: start(RACE, storage.root, tmp_path / "go", name) for name in names}
    for racer in racers.values():
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    won = {name: racer.communicate()[0].strip() for name, racer in racers.items()}
    for number in range(20):
        (winner,) = [name for name in names if won[name][number] == "1"]
        assert storage.get(f"race/{number}") == winner.encode() * 20_000
    assert len(everything(storage)) == 20


def test_put_if_absent_leaves_what_is_there(storage: Storage):
    assert storage.put_if_absent(KEY, b"first")
    assert not storage.put_if_absent(KEY, b"second")
    assert storage.get(KEY) == b"first"
    assert everything(storage) == {KEY}


def at_once(*jobs: Callable[[], None], times: int) -> list[BaseException]:
    """What the jobs raised, each done `times` times in a thread of its own."""
    raised: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            for _ in range(times):
                job()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def come_and_go(storage: Storage, key: str) -> Callable[[], None]:
    def work() -> None:
        storage.put(key, b"x")
        assert storage.get(key) == b"x"
        storage.delete(key)

    return work


def test_a_folder_that_another_process_empties_is_no_obstacle_to_writing(storage: Storage, quick: None):
    assert at_once(*[come_and_go(storage, f"trials/0f3a/{name}") for name in "abcd"], times=300) == []


def test_a_listing_while_keys_go_is_a_listing(storage: Storage, quick: None):
    keys = {f"trials/0f3a/checkpoints/step-{number}/model" for number in (1, 2)}

    def look() -> None:
        assert {KEY} <= set(storage.keys("trials")) <= {KEY, *keys}
        assert set(storage.children("trials/0f3a/checkpoints")) <= {"step-1", "step-2"}

    storage.put(KEY, b"x")
    assert at_once(*[come_and_go(storage, key) for key in keys], look, look, times=300) == []


# A place that cannot be written, a disk that is full

FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    getattr(storage, arguments[1])(arguments[0], b"new" * 70_000)
except OSError as error:
    print("refused:", error.strerror)
"""


@pytest.mark.parametrize("write", ["put", "put_if_absent"])
def test_a_full_disk_is_an_error_that_leaves_no_trace(storage: Storage, write: str):
    storage.put(KEY, OLD[:1000])
    key = KEY if write == "put" else "trials/0f3a/other.json"
    said, _ = start(FULL, storage.root, key, write).communicate()
    assert said == "refused: File too large\n"
    assert storage.get(KEY) == OLD[:1000]
    assert everything(storage) == {KEY}


FULL_IN_PIECES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
writer = storage.writer(arguments[0])
try:
    for _ in range(30):
        writer.write(b"new" * 1_500)
    writer.keep()
except OSError as error:
    print("refused:", error.strerror)
finally:
    writer.discard()
"""


def test_a_disk_that_is_full_in_the_midst_of_the_pieces_is_an_error_that_leaves_no_trace(storage: Storage):
    storage.put(KEY, OLD[:1000])
    said, _ = start(FULL_IN_PIECES, storage.root, KEY).communicate()
    assert said == "refused: File too large\n"
    assert storage.get(KEY) == OLD[:1000]
    assert everything(storage) == {KEY}


@pytest.fixture(params=["at", "below"])
def blocked(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """A storage where a file is in the way: nobody can write there, not even root."""
    (tmp_path / "file").write_bytes(b"here already")
    yield FolderStorage(tmp_path / "file" if request.param == "at" else tmp_path / "file" / "runs")
    assert (tmp_path / "file").read_bytes() == b"here already"


def test_a_place_that_cannot_be_written_is_told_with_the_way_out(blocked: Storage):
    with pytest.raises(OSError) as refused:
        blocked.check_writable()
    said = str(refused.value)
    assert said.startswith(f"cannot write to the storage {blocked!r}: ")
    assert said.endswith("; give a folder that can be written with --storage, or free some space")


def test_checking_a_good_place_leaves_nothing_there(storage: Storage):
    storage.check_writable()
    assert list(storage.root.iterdir()) == []
