"""One contract for a folder and a bucket; and a bucket on a bad day, through a proxy that injects what goes wrong."""

import contextlib
import hashlib
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3.session
import pytest

from helix import storage_s3
from helix.loopback import Fault, FaultProxy
from helix.storage import CorruptObjectError, FolderStorage, Storage, open_storage
from helix.storage_s3 import SHA256, S3Storage

pytestmark = pytest.mark.service

ROOT = Path(__file__).resolve().parents[2]
KEY = "trials/0f3a/result.json"
BIG = os.urandom(300_000)


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return FolderStorage(tmp_path / "storage")
    return open_storage(request.getfixturevalue("s3_address"))


@pytest.fixture
def bucket(s3_address: str) -> S3Storage:
    storage = open_storage(s3_address)
    assert isinstance(storage, S3Storage)
    return storage


@pytest.fixture
def stormy(fault_proxy: FaultProxy, bucket: S3Storage, monkeypatch: pytest.MonkeyPatch) -> S3Storage:
    """A bucket behind the proxy, with patience for five seconds and short waits."""
    monkeypatch.setattr(storage_s3, "FIRST_WAIT_S", 0.01)
    return S3Storage(bucket.bucket, bucket.prefix, deadline_s=5)


def client():
    return boto3.session.Session().client("s3")


def metadata(storage: S3Storage, key: str) -> dict[str, str]:
    return client().head_object(Bucket=storage.bucket, Key=f"{storage.prefix}/{key}")["Metadata"]


# The contract, of both


def test_what_was_put_is_what_is_got(storage: Storage):
    for data in (b"", b"\0\xff\r\n", BIG):
        storage.put(KEY, data)
        assert storage.get(KEY) == data
        assert storage.size(KEY) == len(data)
        assert storage.exists(KEY)


def test_what_is_written_in_pieces_is_there_once_it_is_kept_and_not_before(storage: Storage):
    storage.put(KEY, b"old")
    writer = storage.writer(KEY)
    for low in range(0, len(BIG), 100_000):
        writer.write(memoryview(BIG)[low : low + 100_000])
        assert storage.get(KEY) == b"old"
    writer.keep()
    writer.discard()
    gone = storage.writer(KEY)
    gone.write(b"never kept")
    gone.discard()
    assert storage.get(KEY) == BIG


def test_a_missing_key_is_said_to_be_missing(storage: Storage, tmp_path: Path):
    assert not storage.exists(KEY)
    assert storage.size(KEY) is None
    assert storage.get_json(KEY) is None
    for use in (
        storage.get,
        lambda key: storage.get_range(key, 0, 3),
        lambda key: storage.get_range(key, 0, 0),
        lambda key: storage.download(key, tmp_path / "file"),
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(KEY)):
            use(KEY)
    assert not list(tmp_path.glob("*file*"))


def test_a_range_is_a_slice(storage: Storage):
    storage.put(KEY, BIG)
    for first, count in [(0, 1), (7, 100_000), (299_999, 5), (300_000, 4), (10**9, 1), (5, 0)]:
        assert storage.get_range(KEY, first, count) == BIG[first : first + count]
    for first, count in [(-1, 5), (5, -1)]:
        with pytest.raises(ValueError, match="wanted neither to be negative"):
            storage.get_range(KEY, first, count)


def test_listing_is_sorted_complete_and_knows_folders(storage: Storage):
    keys = ["trials/b/spec.json", "trials/a/metrics/epoch-0002.json", "trials/a/metrics/epoch-0001.json"]
    odd = ["odd/a b", "odd/a+b", "odd/ä%20&c", "odd/x?y#z"]
    for key in [*keys, *odd, "trialsome/spec.json", "trials-b"]:
        storage.put(key, b"{}")
    assert list(storage.keys("trials")) == sorted(keys)
    assert list(storage.keys("trials/a/metrics")) == sorted(keys)[:2]
    assert list(storage.keys("odd")) == sorted(odd)
    assert storage.children("trials") == ["a", "b"]
    assert storage.children("trials/a/metrics") == ["epoch-0001.json", "epoch-0002.json"]
    assert storage.children("trials/a/metrics/epoch-0001.json") == []
    assert list(storage.keys("nothing")) == storage.children("nothing") == []
    assert [storage.get(key) for key in odd] == [b"{}"] * 4


def test_a_folder_is_no_key(storage: Storage):
    storage.put(KEY, b"x")
    assert not storage.exists("trials")
    assert storage.size("trials/0f3a") is None


def test_deleting_a_key_and_a_folder(storage: Storage):
    for key in ("a/b/one", "a/b/c/two", "a/bb"):
        storage.put(key, b"1")
    storage.delete("a/b/one")
    storage.delete("a/b/one")
    assert storage.children("a/b") == ["c"]
    storage.delete_folder("a/b")
    storage.delete_folder("a/b")
    assert list(storage.keys("a")) == ["a/bb"]


@pytest.mark.parametrize("key", ["", "..", "/etc/passwd", "a/../b", "a//b", "a/", "a\\b", ".partial-1"])
def test_a_key_that_is_no_relative_path_is_refused(storage: Storage, key: str, tmp_path: Path):
    for use in (
        storage.get,
        storage.size,
        storage.exists,
        storage.delete,
        storage.delete_folder,
        storage.children,
        lambda key: storage.put(key, b""),
        lambda key: storage.put_if_absent(key, b""),
        lambda key: storage.get_range(key, 0, 1),
        lambda key: list(storage.keys(key)),
        lambda key: storage.download(key, tmp_path / "file"),
        lambda key: storage.upload(key, Path(__file__)),
    ):
        with pytest.raises(ValueError, match="is not a storage key"):
            use(key)


def test_of_sixteen_threads_that_put_if_absent_one_wins_with_all_it_wrote(storage: Storage):
    for number in range(3):
        start = threading.Barrier(16)

        def race(name: str, number: int = number, start: threading.Barrier = start) -> bool:
            start.wait()
            return storage.put_if_absent(f"race/{number}", name.encode() * 20_000)

        names = "abcdefghijklmnop"
        with ThreadPoolExecutor(16) as pool:
            won = dict(zip(names, pool.map(race, names), strict=True))
        (winner,) = [name for name in names if won[name]]
        assert storage.get(f"race/{number}") == winner.encode() * 20_000


def test_put_if_absent_leaves_what_is_there_even_if_it_is_the_same(storage: Storage):
    assert storage.put_if_absent(KEY, b"first")
    assert not storage.put_if_absent(KEY, b"second")
    assert not storage.put_if_absent(KEY, b"first")
    assert storage.get(KEY) == b"first"


@pytest.mark.parametrize("size", [0, 1, 1_000_000])
def test_a_file_goes_up_and_comes_down_as_it_was(storage: Storage, size: int, tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(data := os.urandom(size))
    storage.upload(KEY, source)
    target.write_bytes(b"old")
    assert storage.download(KEY, target) == hashlib.sha256(data).hexdigest()
    assert target.read_bytes() == storage.get(KEY) == data
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "target", "storage", ".partial"}


def test_a_storage_is_the_same_after_pickle_and_by_its_address(storage: Storage):
    storage.put(KEY, b"x")
    for other in (pickle.loads(pickle.dumps(storage)), open_storage(repr(storage))):
        assert other.get(KEY) == b"x"
        assert repr(other) == repr(storage)
    assert b"secret" not in pickle.dumps(storage)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_child_after_a_fork_has_a_connection_of_its_own(storage: Storage, request: pytest.FixtureRequest):
    if isinstance(storage, S3Storage):
        request.getfixturevalue("fault_proxy")  # keeps connections open, which moto alone does not
    values = {name: name.encode() * 50_000 for name in ("parent", "child")}
    for name, value in values.items():
        storage.put(name, value)
    child = os.fork()
    if child == 0:  # no assertion and no clean-up of pytest's in here
        with contextlib.suppress(BaseException):
            same = all(storage.get("child") == values["child"] for _ in range(40))
            os._exit(0 if same else 1)
        os._exit(2)
    assert all(storage.get("parent") == values["parent"] for _ in range(40))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_checking_a_good_place_leaves_nothing_there(storage: Storage):
    storage.check_writable()
    storage.put("a", b"x")
    assert storage.children("trials") == []
    if isinstance(storage, S3Storage):
        listing = client().list_objects_v2(Bucket=storage.bucket)
        assert [entry["Key"] for entry in listing["Contents"]] == [f"{storage.prefix}/a"]


# A bucket


def test_an_empty_prefix_is_the_whole_bucket(bucket: S3Storage):
    whole = open_storage(f"s3://{bucket.bucket}/")
    whole.put("a/b", b"x")
    assert list(whole.keys("a")) == ["a/b"]
    assert whole.children("a") == ["b"]
    assert repr(whole) == f"s3://{bucket.bucket}"


@pytest.mark.parametrize(
    "address", ["s3://", "s3:///prefix", "s3://UPPER/x", "s3://b", "s3://key:secret@bucket/x", "s3://bucket/a?b=c"]
)
def test_an_address_without_a_bucket_is_refused_and_no_secret_is_repeated(address: str):
    with pytest.raises(ValueError, match="wanted s3://bucket/prefix") as refused:
        open_storage(address)
    assert "secret" not in str(refused.value)


def test_more_keys_than_one_answer_holds_are_all_listed(bucket: S3Storage):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: bucket.put(f"many/{number:04d}/x", b""), range(1003)))
    assert list(bucket.keys("many")) == [f"many/{number:04d}/x" for number in range(1003)]
    assert bucket.children("many") == [f"{number:04d}" for number in range(1003)]


def test_a_big_object_goes_in_parts_and_is_one(bucket: S3Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage_s3, "PART_BYTES", 5 * 2**20)
    data = os.urandom(11 * 2**20)
    (tmp_path / "file").write_bytes(data)
    bucket.upload(KEY, tmp_path / "file")
    bucket.put("other", data)
    for key in (KEY, "other"):
        assert client().head_object(Bucket=bucket.bucket, Key=f"{bucket.prefix}/{key}")["ETag"].endswith('-3"')
        assert bucket.download(key, tmp_path / "back") == hashlib.sha256(data).hexdigest()
        assert (tmp_path / "back").read_bytes() == data


def test_what_another_tool_put_is_read_too(bucket: S3Storage):
    client().put_object(Bucket=bucket.bucket, Key=f"{bucket.prefix}/foreign", Body=b"theirs")
    assert bucket.get("foreign") == b"theirs"


def test_the_folder_markers_of_other_tools_are_no_keys_and_go_with_their_folder(bucket: S3Storage):
    bucket.put("a/b/one", b"1")
    for marker in ("a/", "a/b/", "a/empty/"):
        client().put_object(Bucket=bucket.bucket, Key=f"{bucket.prefix}/{marker}", Body=b"")
    assert list(bucket.keys("a")) == ["a/b/one"]
    assert bucket.children("a/b") == ["one"]
    bucket.delete_folder("a")
    assert client().list_objects_v2(Bucket=bucket.bucket)["KeyCount"] == 0


def test_bytes_that_changed_where_they_are_stored_are_an_error_that_names_the_key(bucket: S3Storage, tmp_path: Path):
    bucket.put(KEY, BIG)
    client().put_object(
        Bucket=bucket.bucket,
        Key=f"{bucket.prefix}/{KEY}",
        Body=BIG[:-1] + b"?",
        Metadata={SHA256: metadata(bucket, KEY)[SHA256]},
    )
    for read in (bucket.get, lambda key: bucket.download(key, tmp_path / "file")):
        with pytest.raises(CorruptObjectError, match=re.escape(f"{bucket!r}/{KEY}")) as caught:
            read(KEY)
    assert not list(tmp_path.glob("*file*"))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.key) == (str(caught.value), caught.value.key)


# Refused


def quickly(use: Callable[[], object], error: type[BaseException], said: str) -> str:
    """The message of an error that is raised without trying for long."""
    begun = time.monotonic()
    with pytest.raises(error, match=re.escape(said)) as caught:
        use()
    assert time.monotonic() - begun < 5
    assert "loopback-secret" not in str(caught.value)
    return str(caught.value)


def test_no_credentials_are_said_to_be_missing(bucket: S3Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    quickly(bucket.check_writable, PermissionError, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


def test_a_profile_that_is_not_there_is_named(bucket: S3Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    quickly(bucket.check_writable, OSError, "nobody")


def test_a_bucket_that_is_not_there_is_named(bucket: S3Storage):
    missing = S3Storage("no-such-bucket-here", "x")
    quickly(missing.check_writable, OSError, "there is no bucket no-such-bucket-here")
    quickly(lambda: missing.get_json(KEY), OSError, "there is no bucket no-such-bucket-here")
    quickly(lambda: missing.children("trials"), OSError, "there is no bucket no-such-bucket-here")


@pytest.mark.parametrize(
    ("method", "permission"), [("PUT", "s3:PutObject"), ("GET", "s3:GetObject"), ("DELETE", "s3:DeleteObject")]
)
def test_what_is_forbidden_is_said_with_the_permission_that_is_needed(
    fault_proxy: FaultProxy, stormy: S3Storage, method: str, permission: str
):
    fault_proxy.add(Fault(kind="status", method=method, status=403, code="AccessDenied"))
    said = quickly(stormy.check_writable, PermissionError, permission)
    assert stormy.bucket in said


def test_a_server_that_ignores_if_none_match_is_not_used(
    stormy: S3Storage, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fault_proxy, "dropped_headers", ("if-none-match",))
    quickly(stormy.check_writable, OSError, "does not keep the promise of If-None-Match")


# A bad day

PASSING = {
    "a burst of 500": {"kind": "status", "times": 4},
    "slow down": {"kind": "status", "status": 503, "code": "SlowDown", "times": 3},
    "a reset": {"kind": "reset", "times": 3},
    "done and answered with 500": {"kind": "lost", "times": 2},
    "done and reset": {"kind": "lost_reset", "times": 2},
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_is_ridden_out_by_every_operation(
    fault_proxy: FaultProxy, stormy: S3Storage, fault: dict, tmp_path: Path
):
    def doing(use: Callable[[], object]) -> object:
        fault_proxy.clear()
        injected = fault_proxy.add(Fault(**fault))
        result = use()
        assert injected.seen == injected.times
        return result

    (tmp_path / "file").write_bytes(BIG)
    doing(lambda: stormy.put(KEY, b"old"))
    doing(lambda: stormy.upload(KEY, tmp_path / "file"))
    assert doing(lambda: stormy.get(KEY)) == BIG
    assert doing(lambda: stormy.get_range(KEY, 5, 50)) == BIG[5:55]
    assert doing(lambda: stormy.size(KEY)) == len(BIG)
    assert doing(lambda: stormy.size("absent")) is None
    assert doing(lambda: list(stormy.keys("trials"))) == [KEY]
    assert doing(lambda: stormy.download(KEY, tmp_path / "back")) == hashlib.sha256(BIG).hexdigest()
    assert doing(lambda: stormy.put_if_absent("mine", b"1")) is True
    assert doing(lambda: stormy.put_if_absent("mine", b"1")) is False
    doing(lambda: stormy.delete(KEY))
    assert not stormy.exists(KEY)


def test_a_winner_whose_answer_was_lost_has_won_and_the_next_has_not(fault_proxy: FaultProxy, stormy: S3Storage):
    fault_proxy.add(Fault(kind="lost_reset", method="PUT", times=1))
    assert stormy.put_if_absent(KEY, b"same") is True
    assert [method for method, _ in fault_proxy.requests] == ["PUT", "PUT", "HEAD"]
    assert stormy.put_if_absent(KEY, b"same") is False


@pytest.mark.parametrize("kind", ["lost", "lost_reset"])
@pytest.mark.parametrize("asked", ["POST .*uploads", "PUT .*partNumber=2", "POST .*uploadId="])
def test_an_upload_in_parts_survives_a_lost_answer_to_any_of_its_requests(
    fault_proxy: FaultProxy, stormy: S3Storage, kind, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage_s3, "PART_BYTES", 5 * 2**20)
    method, path = asked.split()
    fault = fault_proxy.add(Fault(kind=kind, method=method, path=path, times=1))
    (tmp_path / "file").write_bytes(data := os.urandom(6 * 2**20))
    stormy.upload(KEY, tmp_path / "file")
    assert fault.seen == 1
    assert stormy.get(KEY) == data


def test_an_upload_that_is_not_known_any_more_because_it_was_completed_is_complete(
    fault_proxy: FaultProxy, stormy: S3Storage, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage_s3, "PART_BYTES", 5 * 2**20)
    forgotten = Fault(kind="status", method="POST", path="uploadId=", status=404, code="NoSuchUpload")
    fault_proxy.add(Fault(kind="lost_reset", method="POST", path="uploadId=", times=1))
    fault_proxy.add(forgotten)
    stormy.put(KEY, data := os.urandom(6 * 2**20))
    assert forgotten.seen == 1
    assert stormy.get(KEY) == data
    with pytest.raises(OSError, match="NoSuchUpload"):
        stormy.put("other", data)
    stormy.put(KEY, b"somebody else's")
    with pytest.raises(OSError, match="NoSuchUpload"):
        stormy.put(KEY, data)


def uploads_open(storage: S3Storage) -> int:
    return len(client().list_multipart_uploads(Bucket=storage.bucket).get("Uploads", ()))


def test_an_upload_that_fails_leaves_neither_a_key_nor_parts(
    fault_proxy: FaultProxy, stormy: S3Storage, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage_s3, "PART_BYTES", 5 * 2**20)
    fault_proxy.add(Fault(kind="status", path="partNumber=2", status=400, code="EntityTooLarge"))
    with pytest.raises(OSError, match="EntityTooLarge"):
        stormy.put(KEY, os.urandom(6 * 2**20))
    assert not stormy.exists(KEY)
    assert uploads_open(stormy) == 0


def test_deleting_a_folder_frees_what_a_killed_upload_left(bucket: S3Storage):
    client().create_multipart_upload(Bucket=bucket.bucket, Key=f"{bucket.prefix}/{KEY}")
    assert uploads_open(bucket) == 1
    bucket.delete_folder("trials")
    assert uploads_open(bucket) == 0


@pytest.mark.parametrize("kept", [0, 1, 150_000, 299_999])
def test_a_body_that_breaks_off_is_continued_and_never_taken_for_whole(
    fault_proxy: FaultProxy, stormy: S3Storage, kept: int, tmp_path: Path
):
    stormy.put(KEY, BIG)
    for read in (stormy.get, lambda key: stormy.download(key, tmp_path / "file") and (tmp_path / "file").read_bytes()):
        fault_proxy.clear()
        fault = fault_proxy.add(Fault(kind="truncate", method="GET", bytes=kept, times=2))
        assert read(KEY) == BIG
        assert fault.seen >= 1
    fault_proxy.clear()
    fault_proxy.add(Fault(kind="truncate", method="GET", bytes=min(kept, 1000), times=1))
    assert stormy.get_range(KEY, 1000, 2000) == BIG[1000:3000]


def test_a_body_whose_object_is_replaced_while_it_is_read_is_all_old_or_all_new(
    fault_proxy: FaultProxy, stormy: S3Storage
):
    name = f"{stormy.prefix}/{KEY}"
    # Put by another tool, so that no checksum is there to tell.
    client().put_object(Bucket=stormy.bucket, Key=name, Body=b"old" * 100_000)
    fault_proxy.requests.clear()
    fault_proxy.add(Fault(kind="truncate", method="GET", bytes=100_000, times=1))
    fault_proxy.add(Fault(kind="status", method="GET"))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(stormy.get, KEY)
        while len(fault_proxy.requests) < 3:
            time.sleep(0.01)
        client().put_object(Bucket=stormy.bucket, Key=name, Body=b"new" * 10_000)
        fault_proxy.clear()
        assert reading.result() == b"new" * 10_000


def test_a_body_that_always_breaks_off_is_an_error_and_no_file(
    fault_proxy: FaultProxy, bucket: S3Storage, tmp_path: Path
):
    patient = S3Storage(bucket.bucket, bucket.prefix, deadline_s=1)
    patient.put(KEY, BIG)
    fault_proxy.add(Fault(kind="truncate", method="GET", bytes=0))
    with pytest.raises(ConnectionError, match=re.escape(f"{bucket!r}/{KEY}: get failed for 1 s")):
        patient.download(KEY, tmp_path / "file")
    assert not list(tmp_path.glob("*file*"))


def test_a_wrong_byte_on_the_way_is_noticed_and_asked_for_again(
    fault_proxy: FaultProxy, stormy: S3Storage, tmp_path: Path
):
    stormy.put(KEY, BIG)
    for read in (stormy.get, lambda key: stormy.download(key, tmp_path / "file") and (tmp_path / "file").read_bytes()):
        fault_proxy.clear()
        fault = fault_proxy.add(Fault(kind="flip", method="GET", times=1))
        assert read(KEY) == BIG
        assert fault.seen == 1
    fault_proxy.clear()
    (tmp_path / "file").unlink()
    fault = fault_proxy.add(Fault(kind="flip", method="GET"))
    for read in (stormy.get, lambda key: stormy.download(key, tmp_path / "file")):
        with pytest.raises(CorruptObjectError, match=re.escape(KEY)):
            read(KEY)
    assert fault.seen == 4
    assert not list(tmp_path.glob("*file*"))


def test_a_wrong_byte_on_the_way_up_is_noticed_at_the_latest_when_it_is_read(
    fault_proxy: FaultProxy, stormy: S3Storage
):
    fault_proxy.add(Fault(kind="flip_request", method="PUT", times=1))
    stormy.put(KEY, BIG)  # S3 itself refuses it by Content-MD5 and is asked again; this server does not look
    with pytest.raises(CorruptObjectError, match=re.escape(KEY)):
        stormy.get(KEY)


def test_a_slow_body_is_waited_for_and_one_that_is_too_slow_is_not(fault_proxy: FaultProxy, bucket: S3Storage):
    patient = S3Storage(bucket.bucket, bucket.prefix, deadline_s=2)
    patient.put(KEY, BIG)
    fault_proxy.add(Fault(kind="slow", method="GET", rate=400_000, times=1))
    assert patient.get(KEY) == BIG
    fault_proxy.add(Fault(kind="slow", method="GET", rate=5_000))
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match="too slowly"):
        patient.get(KEY)
    assert time.monotonic() - begun < 8


def test_an_outage_ends_at_the_deadline_with_bucket_and_key(fault_proxy: FaultProxy, bucket: S3Storage):
    patient = S3Storage(bucket.bucket, bucket.prefix, deadline_s=3.0)
    for fault in (Fault(kind="status", status=503, code="ServiceUnavailable"), Fault(kind="reset")):
        fault_proxy.clear()
        fault_proxy.add(fault)
        begun = time.monotonic()
        with pytest.raises(ConnectionError, match=re.escape(f"{bucket!r}/{KEY}: put failed for 3 s")) as caught:
            patient.put(KEY, b"x")
        assert 0.5 < time.monotonic() - begun < 6
        assert fault.seen >= 2
        assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    fault_proxy.clear()
    assert not patient.exists(KEY)


def test_a_server_that_is_not_there_is_named_without_the_password_of_its_address(
    bucket: S3Storage, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:hidden@127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9") as caught:
        S3Storage(bucket.bucket, "x", deadline_s=0.5).put(KEY, b"x")
    assert "hidden" not in str(caught.value)


def test_naming_storage_does_not_load_boto3():
    code = "import sys, helix.storage; helix.storage.open_storage('runs'); print('boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
