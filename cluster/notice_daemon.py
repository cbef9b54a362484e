#!/usr/bin/env python3
"""A daemon beside Ray: hears from the cloud that this machine will be taken away, and drains its Ray node before that.

Ray reads no cloud's notices; `ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION` tells it. Ray Train then tells its
workers, which save a checkpoint at once, and restarts them elsewhere at the deadline without charging a failure, if the
deadline comes before the machine's death: so it is named `--margin` seconds early. Standard library only: it runs on
every node and has nothing but python3 and the `ray` command.

Sources: AWS EC2 User Guide, "Spot Instance interruption notices", "EC2 instance rebalance recommendations" and "Use
IMDSv2"; Google Compute Engine, "Create and use Spot VMs" and "Query metadata server for maintenance event notices".
"""

import argparse
import calendar
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

logger = logging.getLogger("notice_daemon")

AWS_ENDPOINT = "http://169.254.169.254"
GCP_ENDPOINT = "http://metadata.google.internal"

#: The longest life that AWS grants a token. A tenth of the life that was granted is left when it is renewed.
TOKEN_TTL_S = 21600
TOKEN_TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
#: What Google promises at most between the flag and the end, for a preemption and for host maintenance.
PREEMPTED_S, MAINTENANCE_S = 30.0, 60.0

ASK_TIMEOUT_S = 2.0
ANSWER_LIMIT_BYTES = 65536
#: A preemption on GCP leaves 30 s: so often at least is a server asked that is away, and a drain tried that failed.
LONGEST_AWAY_S, LONGEST_RETRY_S = 10.0, 5.0
DRAIN_TIMEOUT_S = 20.0
#: A deadline of 0 s would be over before Ray has told anybody.
SHORTEST_DEADLINE_S = 1


class MetadataError(Exception):
    """The metadata service does not answer, or not as documented."""


@dataclass(frozen=True)
class Notice:
    """What the cloud said: the machine is taken at `at_s` (Unix time, s), surely or (a recommendation) perhaps."""

    kind: str
    at_s: float
    recommended: bool = False


class Cloud(Protocol):
    endpoint: str

    def check(self) -> None:
        """Ask anything; MetadataError if this cloud is not here."""
        ...

    def notices(self) -> Iterator[Notice]:
        """The notices that stand now, the same ones at every call; MetadataError if it cannot be told."""
        ...


def ask(endpoint: str, path: str, headers: Mapping[str, str], *, method: str = "GET") -> tuple[int, Message, str]:
    """One request: status, headers and text of its answer. No proxy and no redirect: a token is for this host only."""
    url = urlsplit(endpoint)
    connection = HTTPConnection(url.hostname or "", url.port or 80, timeout=ASK_TIMEOUT_S)
    try:
        connection.request(method, url.path.rstrip("/") + path, headers=dict(headers))
        answer = connection.getresponse()
        text = answer.read(ANSWER_LIMIT_BYTES).decode("utf-8", "replace").strip()
        return answer.status, answer.headers, text
    except (OSError, HTTPException) as error:
        raise MetadataError(f"{method} {endpoint}{path}: {error!r}") from error
    finally:
        connection.close()


class Aws:
    """Spot interruption notices and rebalance recommendations of the EC2 instance metadata service, version 2."""

    def __init__(self, endpoint: str, *, rebalance_s: float, clock: Callable[[], float] = time.time):
        self.endpoint, self.rebalance_s, self.clock = endpoint, rebalance_s, clock
        self._token = ""
        self._renew_at = 0.0
        self._rebalances: dict[str, float] = {}

    def token(self) -> str:
        if not self._token or time.monotonic() >= self._renew_at:
            path = "/latest/api/token"
            status, headers, token = ask(self.endpoint, path, {TOKEN_TTL_HEADER: str(TOKEN_TTL_S)}, method="PUT")
            # Checked here because http.client would quote a bad header value, and so the token, in its error.
            if status != 200 or not re.fullmatch(r"[\x21-\x7e]+", token):
                raise MetadataError(f"PUT {self.endpoint}{path}: answered {status} without a token")
            granted = headers.get(TOKEN_TTL_HEADER, "")
            ttl_s = int(granted) if re.fullmatch("[0-9]{1,9}", granted) else TOKEN_TTL_S
            self._renew_at = time.monotonic() + 0.9 * ttl_s
            self._token = token
        return self._token

    def check(self) -> None:
        self.token()

    def get(self, path: str, field: str) -> dict[str, str] | None:
        """The JSON object at a path, with its time read in `field`; None where AWS has nothing to say (404)."""
        status, text = 401, ""
        for _ in range(2):
            status, _, text = ask(self.endpoint, path, {"X-aws-ec2-metadata-token": self.token()})
            if status != 401:
                break
            self._token = ""  # it ended early, as after the service restarted
        if status == 404:
            return None
        if status != 200:
            raise MetadataError(f"GET {self.endpoint}{path}: answered {status}")
        try:
            said = json.loads(text)
            unix_s(said[field])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise MetadataError(f"GET {self.endpoint}{path}: no JSON with a {field!r}: {text[:200]!r}") from error
        return {str(key): str(value) for key, value in said.items()}

    def notices(self) -> Iterator[Notice]:
        action = self.get("/latest/meta-data/spot/instance-action", "time")
        if action:
            yield Notice(f"AWS spot {action.get('action', 'interruption')}", unix_s(action["time"]))
        recommendation = self.get("/latest/meta-data/events/recommendations/rebalance", "noticeTime")
        if recommendation:
            at_s = self._rebalances.setdefault(recommendation["noticeTime"], self.clock() + self.rebalance_s)
            yield Notice("AWS rebalance recommendation", at_s, recommended=True)


class Gcp:
    """The preempted flag and the terminating host maintenance of the Compute Engine metadata server.

    They say that the end is near, not when: the time runs from the last answer that said no.
    """

    def __init__(self, endpoint: str, *, clock: Callable[[], float] = time.time):
        self.endpoint, self.clock = endpoint, clock
        self._last_no: dict[str, float] = {}
        self._ends_at: dict[str, float] = {}

    def get(self, key: str) -> str:
        path = f"/computeMetadata/v1/instance/{key}"
        status, headers, text = ask(self.endpoint, path, {"Metadata-Flavor": "Google"})
        if status != 200 or headers.get("Metadata-Flavor") != "Google":
            raise MetadataError(f"GET {self.endpoint}{path}: answered {status}, not as Google's metadata server does")
        return text

    def check(self) -> None:
        self.get("preempted")

    def notices(self) -> Iterator[Notice]:
        for key, yes, kind, notice_s in (
            ("preempted", "TRUE", "GCP preemption", PREEMPTED_S),
            ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "GCP host maintenance", MAINTENANCE_S),
        ):
            text = self.get(key)
            now = self.clock()
            if text == yes:
                yield Notice(kind, self._ends_at.setdefault(key, self._last_no.get(key, now) + notice_s))
            elif text in ("FALSE", "NONE", "MIGRATE_ON_HOST_MAINTENANCE"):
                self._last_no[key] = now
                self._ends_at.pop(key, None)
            else:
                raise MetadataError(f"{key} of {self.endpoint} is {text[:200]!r}")


class Either:
    """The first of several clouds that answers; from then on it alone."""

    def __init__(self, clouds: Sequence[Cloud]):
        self.clouds = clouds
        self.endpoint = " or ".join(cloud.endpoint for cloud in clouds)
        self._found: Cloud | None = None

    def check(self) -> None:
        errors = []
        for cloud in self.clouds:
            try:
                cloud.check()
            except MetadataError as error:
                errors.append(str(error))
            else:
                logger.info("found %s at %s", type(cloud).__name__, cloud.endpoint)
                self._found = cloud
                return
        raise MetadataError("; ".join(errors))

    def notices(self) -> Iterator[Notice]:
        if self._found is None:
            self.check()
        assert self._found
        yield from self._found.notices()


def unix_s(text: str) -> float:
    """'2026-01-02T03:04:05Z', which is UTC whatever the machine's zone, as Unix time in seconds."""
    return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))


@dataclass(frozen=True)
class Raylet:
    """A Ray node and where its cluster answers; an empty address leaves finding it to the `ray` command."""

    node_id: str
    gcs_address: str


def raylets(proc: Path = Path("/proc")) -> list[Raylet]:
    """Those of this machine. Ray writes its node id into no file; the raylet's own arguments hold it."""
    found = set()
    for file in proc.glob("[0-9]*/cmdline"):
        try:
            program, *arguments = file.read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:  # ended meanwhile, or not ours to see
            continue
        if program.rpartition("/")[2] == "raylet":
            named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
            if "--node_id" in named and "--gcs-address" in named:
                found.add(Raylet(named["--node_id"], named["--gcs-address"]))
    return sorted(found, key=lambda raylet: raylet.node_id)


def deadline_s(notice: Notice, now_s: float, margin_s: float) -> int:
    """Whole seconds to name to Ray: what remains without the margin, and never less than the shortest."""
    return max(SHORTEST_DEADLINE_S, int(notice.at_s - now_s - margin_s))


def drain(ray: str, raylet: Raylet, notice: Notice, seconds: int) -> str:
    """Ask Ray to drain a node. Returns what went wrong, or nothing."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(notice.at_s))
    command = [ray, "drain-node", "--node-id", raylet.node_id]
    command += ["--address", raylet.gcs_address] if raylet.gcs_address else []
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", f"{notice.kind} at {at}"]
    command += ["--deadline-remaining-seconds", str(seconds)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=DRAIN_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        return f"exit {done.returncode}: {done.stdout.decode('utf-8', 'replace').strip()[-300:]}"
    return ""


class NoticeDaemon:
    """Polls a cloud and drains this machine's Ray nodes, each once for a notice.

    A later drain overwrites the deadline of an earlier one in Ray, so a notice that leaves more time than one before it
    (a recommendation after an interruption) is only logged.
    """

    def __init__(
        self,
        cloud: Cloud,
        nodes: Callable[[], Sequence[Raylet]],
        *,
        ray: str,
        poll_s: float,
        margin_s: float,
        drain_on_rebalance: bool,
    ):
        self.cloud, self.nodes, self.ray = cloud, nodes, ray
        self.poll_s, self.margin_s, self.drain_on_rebalance = poll_s, margin_s, drain_on_rebalance
        self._heard: set[Notice] = set()
        self._due: Notice | None = None
        self._drained: dict[Raylet, Notice] = {}
        self._away_s = 0.0
        self._retry_s = 0.0
        self._ended = False

    def listen(self) -> None:
        try:
            for notice in self.cloud.notices():
                self.hear(notice)
        except MetadataError as error:
            if not self._away_s:
                logger.warning("no answer from the metadata service; asking on: %s", error)
            self._away_s = max(self.poll_s, min(LONGEST_AWAY_S, 2 * self._away_s))
        else:
            if self._away_s:
                logger.info("the metadata service answers again")
            self._away_s = 0.0

    def hear(self, notice: Notice) -> None:
        if notice in self._heard:
            return
        self._heard.add(notice)
        logger.warning("notice: %s, in %.0f s", notice.kind, notice.at_s - time.time())
        if notice.recommended and not self.drain_on_rebalance:
            logger.info("nothing is drained on a recommendation (--drain-on-rebalance would)")
        elif self._due is None or notice.at_s < self._due.at_s:
            self._due, self._retry_s = notice, 0.0

    def act(self) -> None:
        """Drain what a notice asks for and is not drained yet."""
        notice = self._due
        if notice is None:
            return
        nodes = self.nodes()
        if not nodes:
            self.retry("no raylet runs on this machine")
            return
        failures = []
        for node in nodes:
            if node in self._drained and self._drained[node].at_s <= notice.at_s:
                if self._drained[node] != notice:
                    logger.info("node %s is drained already, for no later an end", node.node_id)
                continue
            seconds = deadline_s(notice, time.time(), self.margin_s)
            failure = drain(self.ray, node, notice, seconds)
            if failure:
                failures.append(f"node {node.node_id}: {failure}")
                continue
            self._drained[node] = notice
            logger.warning("drained node %s with a deadline of %d s: %s", node.node_id, seconds, notice.kind)
        if failures:
            self.retry("; ".join(failures))
        else:
            self._due, self._retry_s = None, 0.0

    def retry(self, failure: str) -> None:
        self._retry_s = min(LONGEST_RETRY_S, max(1.0, 2 * self._retry_s))
        logger.error("could not drain, next try in %.0f s: %s", self._retry_s, failure)

    def wait_s(self) -> float:
        """Until the next look."""
        return self._retry_s or self._away_s or self.poll_s

    def run(self) -> None:
        """Until `end`."""
        while not self._ended:
            self.listen()
            self.act()
            if not self._ended:
                time.sleep(self.wait_s())

    def end(self, *_: object) -> None:
        """For signals. SystemExit ends a sleep, a request and a running `ray` at once.

        Python drops an exception that a signal raises inside a destructor; then the loop ends by itself.
        """
        self._ended = True
        sys.exit(0)


def drain_now(nodes: Sequence[Raylet], *, ray: str, ends_in_s: float, margin_s: float) -> int:
    """Drain nodes whose machine or pod ends in so many seconds, and wait until they are gone or it is time.

    For the preStop hook of a pod, which Kubernetes waits for. An idle node is gone at once. Where draining fails, as
    when the whole cluster is taken down, nothing is waited for. Returns the exit code.
    """
    notice = Notice("the end of the pod", time.time() + ends_in_s)
    failures = [
        f"node {node.node_id}: {failure}"
        for node in nodes
        if (failure := drain(ray, node, notice, deadline_s(notice, time.time(), margin_s)))
    ]
    if failures or not nodes:
        logger.error("could not drain: %s", "; ".join(failures) or "no raylet runs on this machine")
        return 1
    logger.warning("draining, until in %g s at most: %s", ends_in_s, ", ".join(node.node_id for node in nodes))
    drained = {node.node_id for node in nodes}
    while time.time() < notice.at_s and drained & {raylet.node_id for raylet in raylets()}:
        time.sleep(0.5)
    return 0


class OneLine(logging.Formatter):
    """One event is one line, whatever a server or a command answered."""

    converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(super().format(record).split())


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} s is no length of time; 0 or more is wanted")
    return value


def endpoint(text: str) -> str:
    try:
        url = urlsplit(text)
        known = url.scheme == "http" and bool(url.hostname) and url.port != 0
    except ValueError:  # of a port that is no number
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"{text!r} is no address of a metadata service; http://HOST[:PORT] is wanted")
    return text.rstrip("/")


def arguments(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--cloud", choices=("aws", "gcp", "auto"), default="auto", help="auto asks which one answers")
    parser.add_argument("--endpoint", type=endpoint, help="the metadata service, instead of the cloud's own")
    parser.add_argument("--poll", type=seconds, default=2.0, metavar="S", help="seconds between two looks (2)")
    parser.add_argument(
        "--margin",
        type=seconds,
        default=10.0,
        metavar="S",
        help="how much earlier than the machine's end Ray's deadline is (10); it has to cover the start of the `ray` "
        "command (2 s) and Ray Train's own polling",
    )
    parser.add_argument("--drain-on-rebalance", action="store_true", help="drain on AWS's recommendation to rebalance")
    parser.add_argument(
        "--rebalance-deadline", type=seconds, default=600.0, metavar="S", help="time left after a recommendation (600)"
    )
    parser.add_argument(
        "--drain-now",
        type=seconds,
        metavar="S",
        help="watch nothing: drain this machine's nodes, which end in so many seconds, and wait until they did; for a "
        "preStop hook",
    )
    parser.add_argument("--ray", default="ray", help="the `ray` command (ray)")
    parser.add_argument("--node-id", default="", help="the Ray node to drain, instead of all of this machine")
    parser.add_argument("--address", default="", help="HOST:PORT of the cluster: drain nodes of no other one")
    parser.set_defaults(
        aws=environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or AWS_ENDPOINT,
        gcp="http://" + environment["GCE_METADATA_HOST"] if environment.get("GCE_METADATA_HOST") else GCP_ENDPOINT,
    )
    return parser


def chosen_nodes(options: argparse.Namespace) -> list[Raylet]:
    if options.node_id:
        return [Raylet(options.node_id, options.address)]
    return [raylet for raylet in raylets() if options.address in ("", raylet.gcs_address)]


def daemon(options: argparse.Namespace) -> NoticeDaemon:
    aws = Aws(options.endpoint or endpoint(options.aws), rebalance_s=options.rebalance_deadline)
    gcp = Gcp(options.endpoint or endpoint(options.gcp))
    cloud: Cloud = {"aws": aws, "gcp": gcp, "auto": Either([aws, gcp])}[options.cloud]

    return NoticeDaemon(
        cloud,
        partial(chosen_nodes, options),
        ray=options.ray,
        poll_s=options.poll,
        margin_s=options.margin,
        drain_on_rebalance=options.drain_on_rebalance,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(os.environ)
    options = parser.parse_args(argv)
    if not options.poll:
        parser.error("--poll 0 would ask without a pause; more than 0 s is wanted")
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if options.drain_now is not None:
        nodes = chosen_nodes(options)
        return drain_now(nodes, ray=options.ray, ends_in_s=options.drain_now, margin_s=options.margin)
    try:
        watcher = daemon(options)
    except argparse.ArgumentTypeError as error:  # of an address in the environment
        parser.error(str(error))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, watcher.end)
    logger.info("watching %s every %g s, deadlines %g s early", watcher.cloud.endpoint, options.poll, options.margin)
    try:
        watcher.run()
    finally:
        logger.info("ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
