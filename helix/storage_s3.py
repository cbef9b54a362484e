"""A bucket as storage: S3, and servers that speak its language, through boto3.

boto3 finds the credentials, the region and the endpoint (AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL) as it always does.
Requests are tried again here and not by boto3: so one deadline holds for all attempts at one thing, a put-if-absent
whose answer was lost is known for what it was, and a broken body is continued where it broke. The sha256 of an object
is kept as its metadata and compared whenever the object is read whole.
"""

import base64
import contextlib
import errno
import hashlib
import io
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import boto3.session
import urllib3.exceptions
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
)
from botocore.exceptions import ConnectionError as UnreachableError
from botocore.parsers import ResponseParserError

from helix.addresses import without_secrets
from helix.registry import STORAGES
from helix.storage import TEMPORARY, CorruptObjectError, Storage, check_range, file_sha256, key_parts

Result = TypeVar("Result")

#: How long one thing is tried, counted from the last progress: longer than an outage of a minute or two.
DEADLINE_S = 180.0
#: The same where a person waits for the answer whether the storage can be used at all.
CHECK_DEADLINE_S = 15.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 20
CONNECTIONS = 16

#: Objects that are larger go in parts of this size; S3 takes up to 10,000 of at least 5 MiB.
PART_BYTES = 32 * 2**20
#: Bodies are read in pieces, small ones where bytes come slowly, so that the deadline is looked at in time.
SMALLEST_PIECE, LARGEST_PIECE, QUICK_S = 2**10, 2**20, 0.05
#: This much more of a body counts as progress.
PROGRESS_BYTES = 2**20

#: Metadata of an object: its checksum, and whose put it was.
SHA256, WRITER = "helix-sha256", "helix-writer"

PERMISSIONS = {
    "get": "s3:GetObject and s3:ListBucket",
    "head": "s3:GetObject and s3:ListBucket",
    "put": "s3:PutObject",
    "delete": "s3:DeleteObject",
    "list": "s3:ListBucket",
    "upload": "s3:PutObject and s3:AbortMultipartUpload",
}

UNREACHABLE = (
    HTTPClientError,
    UnreachableError,
    IncompleteReadError,
    ResponseParserError,
    urllib3.exceptions.HTTPError,
)
CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)
#: Answers that another attempt may not get, besides 408, 429 and 5xx.
PASSING = (
    *("InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException"),
    *("ConditionalRequestConflict", "OperationAborted", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"),
)
NOT_ALLOWED = ("AccessDenied", "ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch")

_making = threading.Lock()


def _renew_lock() -> None:
    """A lock that another thread held at the moment of a fork would stay held for ever in the child."""
    global _making
    _making = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


class Deadline:
    """The time that is left for one thing, and the waits between the attempts at it."""

    def __init__(self, seconds: float):
        self.seconds, self.attempts = seconds, 0
        self._chance = random.SystemRandom()
        self.progress()

    def progress(self) -> None:
        self._end, self._wait_s = time.monotonic() + self.seconds, FIRST_WAIT_S

    def is_over(self) -> bool:
        return time.monotonic() >= self._end

    def wait(self) -> bool:
        """Wait before another attempt, longer every time; False where none is left."""
        wait_s = self._chance.uniform(self._wait_s / 2, self._wait_s)
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        if time.monotonic() + wait_s >= self._end:
            return False
        time.sleep(wait_s)
        self.attempts += 1
        return True


@STORAGES.register("s3")
class S3Storage(Storage):
    """The keys under s3://bucket/prefix. Every process has a client of its own, made when it is first needed."""

    def __init__(self, bucket: str, prefix: str = "", *, deadline_s: float = DEADLINE_S):
        self.bucket, self.prefix, self.deadline_s = bucket, prefix, deadline_s
        self._clients: dict[int, Any] = {}

    @classmethod
    def at(cls, place: str) -> "S3Storage":
        """The storage at `place`, bucket/prefix. The prefix may be empty."""
        bucket, _, prefix = place.partition("/")
        prefix = prefix.rstrip("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            # The name is not repeated: it may be a key and a secret in front of an @.
            raise ValueError("an s3 address without a valid bucket name; wanted s3://bucket/prefix")
        if "?" in prefix or "#" in prefix:
            raise ValueError(
                f"s3://{bucket} with options behind ? or #; wanted s3://bucket/prefix, and another server is named by "
                "AWS_ENDPOINT_URL_S3"
            )
        if prefix:
            key_parts(prefix)
        return cls(bucket, prefix)

    def __repr__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_clients": {}}

    def put(self, key: str, data: bytes | memoryview) -> None:
        sha256 = hashlib.sha256(data).hexdigest()
        if len(data) > PART_BYTES:
            self._put_parts(key, io.BytesIO(data), sha256)
        else:
            self._put_whole(key, bytes(data), sha256)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        name, writer = self._name(key), uuid.uuid4().hex
        what = self._described(data, hashlib.sha256(data).hexdigest(), writer)

        def attempt(client: Any, _: Deadline) -> bool:
            try:
                client.put_object(Bucket=self.bucket, Key=name, IfNoneMatch="*", **what)
            except ClientError as error:
                if _code(error) not in ("PreconditionFailed", "412"):
                    raise
            else:
                return True
            # Somebody has put it; it was this writer if an earlier attempt succeeded and only its answer was lost.
            return self._writer(client, name) == writer

        return self._try("put", key, attempt)

    def get(self, key: str) -> bytes:
        def read() -> bytes:
            sink = io.BytesIO()
            self._read(key, sink)
            return sink.getvalue()

        return _twice(read)

    def get_range(self, key: str, first: int, count: int) -> bytes:
        check_range(first, count)
        name = self._name(key)
        if count == 0:
            if self.size(key) is None:
                raise self._missing(key)
            return b""

        def attempt(client: Any, deadline: Deadline) -> bytes:
            span = f"bytes={first}-{first + count - 1}"
            try:
                answer = client.get_object(Bucket=self.bucket, Key=name, Range=span)
            except ClientError as error:
                if _code(error) not in ("InvalidRange", "416"):
                    raise
                return b""
            sink = io.BytesIO()
            for piece in _pieces(answer["Body"], deadline):
                sink.write(piece)
            if not answer.get("ContentRange", "").startswith(f"bytes {first}-"):
                raise OSError(f"{self._where(key)}: the server does not answer requests for a range of bytes")
            return sink.getvalue()

        return self._try("get", key, attempt)

    def size(self, key: str) -> int | None:
        name = self._name(key)
        try:
            answer = self._try("head", key, lambda client, _: client.head_object(Bucket=self.bucket, Key=name))
        except FileNotFoundError:
            return None
        return answer["ContentLength"]

    def keys(self, prefix: str) -> Iterator[str]:
        found = [entry["Key"] for page in self._pages(prefix) for entry in page.get("Contents", ())]
        start = len(self.prefix) + 1 if self.prefix else 0
        # A name that ends in a slash is the marker of an empty folder, which some tools make.
        yield from sorted(name[start:] for name in found if not name.endswith("/"))

    def children(self, prefix: str) -> list[str]:
        start, names = len(self._name(prefix)) + 1, set()
        for page in self._pages(prefix, Delimiter="/"):
            names |= {entry["Key"][start:] for entry in page.get("Contents", ())}
            names |= {entry["Prefix"][start:-1] for entry in page.get("CommonPrefixes", ())}
        return sorted(names - {""})

    def delete(self, key: str) -> None:
        name = self._name(key)
        self._try("delete", key, lambda client, _: client.delete_object(Bucket=self.bucket, Key=name))

    def delete_folder(self, prefix: str) -> None:
        for name in [entry["Key"] for page in self._pages(prefix) for entry in page.get("Contents", ())]:
            self._try("delete", prefix, lambda client, _, name=name: client.delete_object(Bucket=self.bucket, Key=name))
        name = f"{self._name(prefix)}/"
        with contextlib.suppress(OSError):  # what stays of an upload is no key, and not every server can list it
            listing = self._try(
                "list", prefix, lambda client, _: client.list_multipart_uploads(Bucket=self.bucket, Prefix=name)
            )
            for upload in listing.get("Uploads", ()):
                self._abort(upload["Key"], upload["UploadId"])

    def download(self, key: str, path: Path) -> str:
        aside = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")

        def read() -> str:
            with aside.open("wb") as file:
                return self._read(key, file)

        try:
            sha256 = _twice(read)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        return sha256

    def upload(self, key: str, path: Path) -> None:
        if path.stat().st_size <= PART_BYTES:
            self.put(key, path.read_bytes())
            return
        with path.open("rb") as file:
            self._put_parts(key, file, file_sha256(path))

    def check_writable(self) -> None:
        """Try every kind of request on a probe, with less patience than later."""
        probing = S3Storage(self.bucket, self.prefix, deadline_s=min(self.deadline_s, CHECK_DEADLINE_S))
        probing._clients = self._clients
        folder = f"probe-{uuid.uuid4().hex}"
        key = f"{folder}/probe"
        try:
            first, second = probing.put_if_absent(key, b"probe"), probing.put_if_absent(key, b"again")
            if not first or second:
                raise OSError(
                    f"the server of {self!r} does not keep the promise of If-None-Match, on which it depends that no "
                    "trial has two results; use a server that does"
                )
            if probing.get(key) != b"probe" or probing.children(folder) != ["probe"]:
                raise OSError(f"{self!r} does not give back what was just put there")
        except OSError:
            self._clear(key)
            raise
        probing.delete(key)

    def _clear(self, key: str) -> None:
        """Delete in one attempt, whatever becomes of it."""
        with contextlib.suppress(ClientError, BotoCoreError):
            self._client().delete_object(Bucket=self.bucket, Key=self._name(key))

    def _name(self, key: str) -> str:
        """The name of a key in the bucket."""
        key_parts(key)
        return f"{self.prefix}/{key}" if self.prefix else key

    def _where(self, key: str) -> str:
        return f"{self!r}/{key}"

    def _missing(self, key: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, "there is no such key", self._where(key))

    def _put_whole(self, key: str, data: bytes, sha256: str) -> None:
        what = {"Bucket": self.bucket, "Key": self._name(key), **self._described(data, sha256, uuid.uuid4().hex)}
        self._try("put", key, lambda client, _: client.put_object(**what))

    def _described(self, data: bytes, sha256: str, writer: str) -> dict[str, Any]:
        """What a put sends: the body, its checksums for the server and for later, and the mark of the writer."""
        return {"Body": data, "ContentMD5": _md5(data), "Metadata": {SHA256: sha256, WRITER: writer}}

    def _put_parts(self, key: str, file: BinaryIO, sha256: str) -> None:
        name, writer = self._name(key), uuid.uuid4().hex
        target = {"Bucket": self.bucket, "Key": name}
        described = {"Metadata": {SHA256: sha256, WRITER: writer}}
        begun = self._try("upload", key, lambda client, _: client.create_multipart_upload(**target, **described))
        target["UploadId"] = begun["UploadId"]
        try:
            parts = []
            while data := file.read(PART_BYTES):
                parts.append(self._put_part(key, target, len(parts) + 1, data))
            self._complete(key, target, parts, writer)
        except BaseException:
            self._abort(name, target["UploadId"])
            raise

    def _put_part(self, key: str, target: dict[str, str], number: int, data: bytes) -> dict[str, Any]:
        part = {**target, "PartNumber": number, "Body": data, "ContentMD5": _md5(data)}
        answer = self._try("upload", key, lambda client, _: client.upload_part(**part))
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _complete(self, key: str, target: dict[str, str], parts: list[dict[str, Any]], writer: str) -> None:
        def attempt(client: Any, _: Deadline) -> None:
            try:
                client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts})
            except ClientError as error:
                # An upload that is not known any more was completed by an attempt whose answer was lost, or aborted.
                if _code(error) != "NoSuchUpload":
                    raise
                if self._writer(client, target["Key"]) != writer:
                    raise

        self._try("upload", key, attempt)

    def _abort(self, name: str, upload: str) -> None:
        """Free the parts of an upload, in one attempt; `delete_folder` or a rule of the bucket frees what stays."""
        with contextlib.suppress(ClientError, BotoCoreError):
            self._client().abort_multipart_upload(Bucket=self.bucket, Key=name, UploadId=upload)

    def _writer(self, client: Any, name: str) -> str | None:
        """The mark of who put what is there now, None where nothing is or it has none."""
        try:
            return client.head_object(Bucket=self.bucket, Key=name)["Metadata"].get(WRITER)
        except ClientError as error:
            if _status(error) != 404:
                raise
            return None

    def _read(self, key: str, sink: BinaryIO) -> str:
        """Fill `sink` with an object from its start; its sha256. A body that breaks off is continued where it broke."""
        name, digest, first = self._name(key), hashlib.sha256(), {}

        def attempt(client: Any, deadline: Deadline) -> str:
            nonlocal digest
            answer = self._rest(client, name, first, sink.tell()) if first else None
            if answer is None:
                sink.seek(0)
                sink.truncate()
                digest = hashlib.sha256()
                answer = client.get_object(Bucket=self.bucket, Key=name)
                first.update({what: answer[what] for what in ("ContentLength", "ETag", "Metadata")})
            seen = sink.tell()
            for piece in _pieces(answer["Body"], deadline):
                sink.write(piece)
                digest.update(piece)
                if sink.tell() - seen >= PROGRESS_BYTES:
                    seen = sink.tell()
                    deadline.progress()
            if sink.tell() != first["ContentLength"]:
                raise CorruptObjectError(self._where(key), f"{sink.tell()} of {first['ContentLength']} bytes came")
            if first["Metadata"].get(SHA256, digest.hexdigest()) != digest.hexdigest():
                raise CorruptObjectError(self._where(key), "its bytes are not those that were put, by their sha256")
            return digest.hexdigest()

        return self._try("get", key, attempt)

    def _rest(self, client: Any, name: str, first: dict[str, Any], start: int) -> dict[str, Any] | None:
        """The answer with the bytes from `start` on of the same object; None where it has to be read from its start."""
        if not 0 < start < first["ContentLength"]:
            return None
        try:
            answer = client.get_object(Bucket=self.bucket, Key=name, Range=f"bytes={start}-", IfMatch=first["ETag"])
        except ClientError as error:
            if _code(error) not in ("PreconditionFailed", "412"):
                raise
            return None  # it is another object by now
        if answer.get("ContentRange", "").startswith(f"bytes {start}-"):
            return answer
        answer["Body"].close()
        return None

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        asked = {"Bucket": self.bucket, "Prefix": f"{self._name(prefix)}/", **options}
        while True:
            request = dict(asked)
            page = self._try("list", prefix, lambda client, _, request=request: client.list_objects_v2(**request))
            yield page
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def _try(self, action: str, key: str, attempt: Callable[[Any, Deadline], Result]) -> Result:
        """What `attempt` returns, tried again while that may help; OSErrors say why it did not."""
        deadline = Deadline(self.deadline_s)
        while True:
            try:
                return attempt(self._client(), deadline)
            except (ClientError, BotoCoreError, *UNREACHABLE) as error:
                final = self._refusal(action, key, error)
                if final is not None:
                    raise final from error
                if not deadline.wait():
                    raise ConnectionError(
                        f"{self._where(key)}: {action} failed for {self.deadline_s:g} s, {deadline.attempts + 1} "
                        f"attempts; the last one: {_plain(error)}"
                    ) from error

    def _refusal(self, action: str, key: str, error: Exception) -> OSError | None:
        """What an error means for good; None where another attempt may go better."""
        where = self._where(key)
        if isinstance(error, CREDENTIALS):
            return PermissionError(
                f"{where}: {action} without credentials ({_plain(error)}); set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role"
            )
        if isinstance(error, UNREACHABLE):
            return None
        if not isinstance(error, ClientError):
            return OSError(f"{where}: {action} could not be asked for ({_plain(error)})")
        code, status = _code(error), _status(error)
        if code == "NoSuchBucket":
            return OSError(f"{where}: there is no bucket {self.bucket}; create it, or correct --storage")
        if code in ("NoSuchKey", "NotFound", "404"):
            return self._missing(key)
        if status in (401, 403) or code in NOT_ALLOWED:
            return PermissionError(
                f"{where}: {action} is not allowed ({_plain(error)}); the credentials need {PERMISSIONS[action]} on "
                f"the bucket {self.bucket}"
            )
        if code in PASSING or status in (408, 429) or (status >= 500 and status != 501):
            return None
        return OSError(f"{where}: {action} was refused ({_plain(error)})")

    def _client(self) -> Any:
        process = os.getpid()
        if process not in self._clients:
            with _making:
                if process not in self._clients:
                    self._clients[process] = _new_client()
        return self._clients[process]


def _new_client() -> Any:
    common = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "max_pool_connections": CONNECTIONS,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        # The checksums of newer boto3 are sent as trailers, which many servers do not know; Content-MD5 all know.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    session = boto3.session.Session()
    client = session.client("s3", config=Config(**common))
    if re.search(r"\.amazonaws\.com(\.cn)?$", client.meta.endpoint_url):
        return client
    # Behind a name of its own, a server seldom has a name for every bucket.
    return session.client("s3", config=Config(**common, s3={"addressing_style": "path"}))


def _pieces(body: Any, deadline: Deadline) -> Iterator[bytes]:
    """A body, piece by piece. ReadTimeoutError where the deadline passes before it ends."""
    size = SMALLEST_PIECE
    with contextlib.closing(body):
        while True:
            begun = time.monotonic()
            piece = body.read(size)
            if not piece:
                return
            if deadline.is_over():
                raise ReadTimeoutError(endpoint_url="the server, whose answer came too slowly")
            yield piece
            size = min(2 * size, LARGEST_PIECE) if time.monotonic() - begun < QUICK_S else SMALLEST_PIECE


def _twice(read: Callable[[], Result]) -> Result:
    """Wrong bytes may have become so on the way; those that are stored are wrong twice."""
    try:
        return read()
    except CorruptObjectError:
        return read()


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _plain(error: Exception) -> str:
    """An error in one line, without what may stand before the @ of an address."""
    return without_secrets(" ".join(str(error).split()))
