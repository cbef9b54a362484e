"""S3 on this machine, and a proxy before any HTTP server that does to chosen requests what networks and servers do.

with s3_on_loopback(folder) as address, FaultProxy(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy: ...
proxy.add(Fault(kind="status", status=503, code="SlowDown", times=3))     the next three requests
proxy.add(Fault(kind="truncate", method="GET", bytes=100_000))            every such request until proxy.clear()
"""

import contextlib
import io
import os
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal["status", "lost", "reset", "lost_reset", "truncate", "slow", "flip", "flip_request"]


@dataclass(kw_only=True)
class Fault:
    """What happens to requests of `method` whose path (with its query) matches `path`, `times` times (None: always).

    status        answered with `status` and the S3 error `code`, without the server hearing of it
    lost          done by the server, and then answered in the same way
    reset         the connection is reset before the server hears of it
    lost_reset    done by the server, and the connection is reset instead of an answer
    truncate      only the first `bytes` bytes of the body arrive; the headers promise all
    slow          the body arrives at `rate` bytes a second
    flip          one bit of the middle byte of the answer's body is wrong
    flip_request  one bit of the middle byte of the request's body is wrong
    """

    kind: Kind
    method: str = ".*"
    path: str = ""
    times: int | None = None
    status: int = 500
    code: str = "InternalError"
    bytes: int = 0
    rate: float = 1000.0
    #: How often it has happened.
    seen: int = field(default=0, init=False)


class FaultProxy:
    """Forwards every request to `upstream` (http://host:port) unless a fault is due. Faults are taken in order."""

    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream)
        self.faults: list[Fault] = []
        #: (method, path with query) of every request that came.
        self.requests: list[tuple[str, str]] = []
        #: Lower-case names of request headers that are not passed on.
        self.dropped_headers: tuple[str, ...] = ()
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            def handle_request(self) -> None:
                _serve(proxy, self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """No more faults."""
        with self._lock:
            self.faults.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def due(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets."""
        with self._lock:
            self.requests.append((method, path))
            for fault in self.faults:
                spent = fault.times is not None and fault.seen >= fault.times
                if not spent and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.seen += 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 (as in the base class)
        pass

    @abstractmethod
    def handle_request(self) -> None:
        """Answer one request, whatever its method."""

    def do_any(self) -> None:
        self.handle_request()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any  # noqa: N815 (the names that the base class looks for)


def _serve(proxy: FaultProxy, handler: BaseHTTPRequestHandler) -> None:
    body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    fault = proxy.due(handler.command, handler.path)
    kind = fault.kind if fault else None
    try:
        if kind == "reset":
            _reset(handler)
            return
        if fault and kind == "status":
            _refuse(handler, fault)
            return
        status, headers, answer = _forward(proxy, handler, _flipped(body) if kind == "flip_request" else body)
        if kind == "lost_reset":
            _reset(handler)
        elif fault and kind == "lost":
            _refuse(handler, fault)
        else:
            _answer(handler, status, headers, _flipped(answer) if kind == "flip" else answer, fault)
    except (OSError, HTTPException):
        handler.close_connection = True


def _forward(proxy: FaultProxy, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list, bytes]:
    server = HTTPConnection(proxy.upstream.hostname or "", proxy.upstream.port, timeout=60)
    try:
        dropped = ("expect", "connection", *proxy.dropped_headers)
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in dropped}
        server.request(handler.command, handler.path, body=body or None, headers=headers)
        answer = server.getresponse()
        return answer.status, answer.getheaders(), answer.read()
    finally:
        server.close()


def _answer(handler: BaseHTTPRequestHandler, status: int, headers: list, body: bytes, fault: Fault | None) -> None:
    handler.send_response_only(status)
    for name, value in headers:
        if name.lower() not in ("connection", "transfer-encoding", "content-length"):
            handler.send_header(name, value)
    length = next((value for name, value in headers if name.lower() == "content-length"), str(len(body)))
    handler.send_header("Content-Length", length if handler.command == "HEAD" else str(len(body)))
    handler.end_headers()
    if handler.command == "HEAD":
        return
    if fault and fault.kind == "truncate":
        handler.wfile.write(body[: fault.bytes])
        handler.wfile.flush()
        handler.close_connection = True
    elif fault and fault.kind == "slow":
        _trickle(handler, body, fault.rate)
    else:
        handler.wfile.write(body)


def _trickle(handler: BaseHTTPRequestHandler, body: bytes, rate: float) -> None:
    each = max(1, int(rate / 50))
    for first in range(0, len(body), each):
        gone, _, _ = select.select([handler.connection], [], [], 0)
        if gone:  # the reader has given up
            handler.close_connection = True
            return
        handler.wfile.write(body[first : first + each])
        handler.wfile.flush()
        time.sleep(each / rate)


def _refuse(handler: BaseHTTPRequestHandler, fault: Fault) -> None:
    body = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>injected</Message></Error>".encode()
    handler.send_response_only(fault.status)
    handler.send_header("Content-Type", "application/xml")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def _reset(handler: BaseHTTPRequestHandler) -> None:
    """Close so that the other side sees a reset and not an end."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RD)
    handler.rfile.close()
    handler.wfile.close()
    handler.connection.close()
    handler.wfile = io.BytesIO()  # which the base class flushes


def _flipped(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body


@contextlib.contextmanager
def s3_server_on_loopback(folder: Path) -> Iterator[str]:
    """The URL of an S3 server, moto's, which keeps everything in memory; what it says goes into `folder`.

    Raises OSError where it does not answer within a minute.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = folder / "moto.log"
    with output.open("w") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError as error:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise OSError(f"moto did not start: {output.read_text()}") from error
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def environment_of(endpoint: str, folder: Path) -> dict[str, str | None]:
    """What leads boto3, also that of child processes, to this server alone; None is a variable that may not be set."""
    removed = ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_REGION")
    return dict.fromkeys(removed) | {
        "AWS_ACCESS_KEY_ID": "loopback",
        "AWS_SECRET_ACCESS_KEY": "loopback-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(folder / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "no-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL_S3": endpoint,
        "NO_PROXY": "127.0.0.1",
    }


def make_bucket(endpoint: str, name: str) -> None:
    """An empty one; such a server asks for no signature."""
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()


@contextlib.contextmanager
def s3_on_loopback(folder: Path) -> Iterator[str]:
    """The address of an empty bucket of a server; the environment leads there alone until the end of the block."""
    with s3_server_on_loopback(folder) as endpoint:
        make_bucket(endpoint, "loopback")
        changed = environment_of(endpoint, folder)
        before = {name: os.environ.get(name) for name in changed}
        try:
            _set_environment(changed)
            yield "s3://loopback/data"
        finally:
            _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
