"""The daemon in cluster/ hears what a cloud says, here a fake one on loopback, and drains the node in time and once."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster import notice_daemon
from cluster.notice_daemon import Gcp, MetadataError, Notice, NoticeDaemon, Raylet, deadline_s, drain_now, raylets

DAEMON = Path(__file__).resolve().parents[2] / "cluster" / "notice_daemon.py"
ACTION, REBALANCE = "/latest/meta-data/spot/instance-action", "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED, MAINTENANCE = (f"/computeMetadata/v1/instance/{key}" for key in ("preempted", "maintenance-event"))
NODE = "ab" * 28


class FakeMetadata:
    """A metadata service on loopback, as strict as the real ones: AWS's wants its token, Google's its header."""

    def __init__(self, *, cloud: str = "aws", ttl_s: float = 21600, token: str = "secret-token-{}"):
        self.cloud, self.ttl_s, self.token = cloud, ttl_s, token
        self.answers: dict[str, str] = {PREEMPTED: "FALSE", MAINTENANCE: "NONE"} if cloud == "gcp" else {}
        self.tokens: dict[str, float] = {}
        self.issued = 0
        self.asked: list[tuple[str, int]] = []
        self.port = 0
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Again on the same port after it was stopped, knowing no token of before."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, status: int, text: str = "", **headers: str) -> None:
                fake.asked.append((self.path, status))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(text.encode())

            def do_PUT(self) -> None:
                ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
                if fake.cloud != "aws" or self.path != "/latest/api/token":
                    self.answer(404)
                elif not ttl.isdecimal() or not 1 <= int(ttl) <= 21600:
                    self.answer(400)
                else:
                    fake.issued += 1
                    token = fake.token.format(fake.issued)
                    fake.tokens[token] = time.monotonic() + fake.ttl_s
                    self.answer(200, token, X_aws_ec2_metadata_token_ttl_seconds=f"{fake.ttl_s:.0f}")

            def do_GET(self) -> None:
                text = fake.answers.get(self.path)
                if fake.cloud == "proxy":  # that lets everything pass
                    allowed, refusal, extra = True, 403, {}
                elif fake.cloud == "aws":
                    known = fake.tokens.get(self.headers.get("X-aws-ec2-metadata-token", ""), 0.0) > time.monotonic()
                    allowed, refusal, extra = known, 401, {}
                else:
                    allowed, refusal = self.headers.get("Metadata-Flavor") == "Google", 403
                    extra = {"Metadata_Flavor": "Google"}
                if not allowed:
                    self.answer(refusal)
                elif text is None:
                    self.answer(404)
                else:
                    self.answer(200, text, **extra)

            def log_message(self, *_: object) -> None: ...

        self.tokens.clear()
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.handle_error = lambda *_: None  # the daemon was ended in the middle of a request
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def looks(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.asked)

    def wait_for_looks(self, more: int, path: str | None = None) -> None:
        path = path or (PREEMPTED if self.cloud == "gcp" else ACTION)
        enough = self.looks(path) + more
        until(lambda: self.looks(path) >= enough, f"{more} more looks at {path}")


def until(true: Callable[[], bool], what: str, limit_s: float = 20) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, f"no {what} within {limit_s} s"
        time.sleep(0.01)


def at(seconds: float, form: str = "%Y-%m-%dT%H:%M:%SZ") -> str:
    """A time so far from now, in UTC, as AWS writes it."""
    return time.strftime(form, time.gmtime(time.time() + seconds))


def interruption(seconds: float) -> str:
    return json.dumps({"action": "terminate", "time": at(seconds)})


@dataclass
class Daemon:
    process: subprocess.Popen
    log_file: Path
    drains_file: Path
    children: list[int] = field(default_factory=list)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait_for(self, text: str) -> None:
        until(lambda: text in self.log, f"{text!r} in the log")

    @property
    def drains(self) -> list[list[str]]:
        """The arguments of every call of `ray`."""
        lines = self.drains_file.read_text().splitlines() if self.drains_file.exists() else []
        return [line.split("\t")[:-1] for line in lines]

    @property
    def deadlines_s(self) -> list[int]:
        return [int(call[call.index("--deadline-remaining-seconds") + 1]) for call in self.drains]

    def wait_for_drains(self, count: int) -> None:
        until(lambda: len(self.drains) >= count, f"{count} calls of ray")

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)


Start = Callable[..., Daemon]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the daemon as a process, with a `ray` that writes its arguments down and does what `ray` says."""
    started: list[Daemon] = []

    def run(*options: str, ray: str = "exit 0", node_id: str = NODE, **environment: str) -> Daemon:
        folder = tmp_path / f"daemon{len(started)}"
        folder.mkdir()
        command, drains, log = folder / "ray", folder / "drains", folder / "log"
        command.write_text(
            f"#!/bin/sh\nprintf '%s\\t' \"$@\" >>{drains}; echo >>{drains}\ncall=$(wc -l <{drains})\n{ray}\n"
        )
        command.chmod(0o755)
        node = ["--node-id", node_id] if node_id else []
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-E", DAEMON, *node, "--poll", "0.05", *options],
                cwd=folder,
                env={
                    "PATH": f"{folder}:/usr/bin:/bin",
                    "http_proxy": "http://127.0.0.1:9",  # nothing listens there: who asks a proxy hears nothing
                    **environment,
                },
                stderr=stderr,
            )
        started.append(Daemon(process, log, drains))
        return started[-1]

    yield run
    for daemon in started:
        daemon.process.kill()
        daemon.process.wait(10)


@pytest.fixture
def aws() -> Iterator[FakeMetadata]:
    fake = FakeMetadata()
    yield fake
    fake.stop()


@pytest.fixture
def gcp() -> Iterator[FakeMetadata]:
    fake = FakeMetadata(cloud="gcp")
    yield fake
    fake.stop()


# AWS


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
def test_a_spot_notice_drains_the_node_once_and_before_the_end(aws: FakeMetadata, start: Start, zone: str):
    daemon = start("--cloud", "aws", "--endpoint", aws.endpoint, "--address", "10.0.0.1:6379", TZ=zone)
    aws.wait_for_looks(3)
    assert daemon.drains == []
    aws.answers[ACTION] = interruption(120)
    daemon.wait_for_drains(1)
    aws.wait_for_looks(10)
    assert len(daemon.drains) == 1, "the notice stands, the drain is not repeated"
    call = daemon.drains[0]
    assert call[:5] == ["drain-node", "--node-id", NODE, "--address", "10.0.0.1:6379"]
    assert call[call.index("--reason") + 1] == "DRAIN_NODE_REASON_PREEMPTION"
    message = call[call.index("--reason-message") + 1]
    assert message == f"AWS spot terminate at {json.loads(aws.answers[ACTION])['time']}"
    assert 100 <= daemon.deadlines_s[0] <= 110
    assert 401 not in {status for _, status in aws.asked} and aws.issued == 1


def test_sigterm_ends_it_at_once_and_well(aws: FakeMetadata, start: Start):
    daemon = start("--cloud", "aws", "--endpoint", aws.endpoint, "--poll", "3600")
    aws.wait_for_looks(1, REBALANCE)
    began = time.monotonic()
    assert daemon.end() == 0
    assert time.monotonic() - began < 5
    assert daemon.log.splitlines()[-1].endswith(" INFO ended")


def test_an_end_whose_exception_is_lost_ends_the_loop():
    class Ended(Silent):
        def notices(self) -> Iterator[Notice]:
            with pytest.raises(SystemExit):  # as Python does with what a destructor raises
                daemon.end()
            return iter(())

    daemon = NoticeDaemon(Ended(), list, ray="ray", poll_s=3600, margin_s=10, drain_on_rebalance=False)
    began = time.monotonic()
    daemon.run()
    assert time.monotonic() - began < 60


def test_sigterm_ends_a_drain_that_hangs_too(aws: FakeMetadata, start: Start):
    daemon = start("--cloud", "aws", "--endpoint", aws.endpoint, ray='echo $$ >"$0.pid"; exec sleep 600')
    aws.answers[ACTION] = interruption(120)
    pid_file = daemon.log_file.with_name("ray.pid")
    until(lambda: pid_file.exists() and pid_file.read_text().strip() != "", "call of ray")
    assert daemon.end() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_a_token_is_renewed_before_it_ends(start: Start):
    aws = FakeMetadata(ttl_s=1)
    try:
        start("--cloud", "aws", "--endpoint", aws.endpoint)
        until(lambda: aws.issued >= 3, "third token")
        assert 401 not in {status for _, status in aws.asked}
        assert aws.looks(ACTION) > 2 * aws.issued, "a token is for many looks"
    finally:
        aws.stop()


def test_a_token_that_is_refused_is_replaced_at_once(aws: FakeMetadata, start: Start):
    daemon = start("--cloud", "aws", "--endpoint", aws.endpoint)
    aws.wait_for_looks(2)
    aws.tokens.clear()
    until(lambda: aws.issued == 2, "second token")
    aws.wait_for_looks(3)
    assert [status for _, status in aws.asked].count(401) == 1
    assert "no answer" not in daemon.log


@pytest.mark.parametrize("token", ["secret-token-{}", "secret-token\u00e9-{}", "secret-token\n{}"])
def test_no_token_is_ever_in_the_log(start: Start, token: str):
    aws = FakeMetadata(token=token)
    try:
        daemon = start("--cloud", "aws", "--endpoint", aws.endpoint)
        until(lambda: aws.issued >= 2 or aws.looks(ACTION) >= 2, "use of the token")
        aws.answers[ACTION] = "no JSON"
        daemon.wait_for("no answer")
        assert daemon.process.poll() is None and "secret" not in daemon.log
    finally:
        aws.stop()


def test_a_drain_that_fails_is_tried_until_it_succeeds(aws: FakeMetadata, start: Start):
    daemon = start(
        "--cloud", "aws", "--endpoint", aws.endpoint, ray='[ "$call" -gt 2 ] || { echo no GCS; echo here >&2; exit 7; }'
    )
    aws.answers[ACTION] = interruption(120)
    daemon.wait_for_drains(3)
    daemon.wait_for("drained node")
    aws.wait_for_looks(10)
    assert len(daemon.drains) == 3
    assert daemon.deadlines_s[0] > daemon.deadlines_s[2], "the machine's end does not wait for us"
    assert daemon.log.count(f"could not drain, next try in 1 s: node {NODE}: exit 7: no GCS here\n") == 1
    assert daemon.log.count("could not drain, next try in 2 s") == 1


def test_without_a_ray_command_it_says_so_and_lives(aws: FakeMetadata, start: Start):
    daemon = start("--cloud", "aws", "--endpoint", aws.endpoint, "--ray", "no-such-ray")
    aws.answers[ACTION] = interruption(120)
    daemon.wait_for("no-such-ray")
    aws.wait_for_looks(2)
    assert daemon.process.poll() is None


@pytest.mark.parametrize("remaining_s", [-3600, -1, 3, 10])
def test_an_end_that_is_near_or_over_leaves_the_shortest_deadline(aws: FakeMetadata, start: Start, remaining_s: float):
    aws.answers[ACTION] = interruption(remaining_s)
    daemon = start("--cloud", "aws", "--endpoint", aws.endpoint)
    daemon.wait_for_drains(1)
    assert daemon.deadlines_s == [1]


@pytest.mark.parametrize(
    ("at_s", "now_s", "margin_s", "named_s"),
    [(220, 100, 10, 110), (220, 100, 0, 120), (220.9, 100, 10, 110), (111.5, 100, 10, 1), (100, 100, 10, 1)],
)
def test_the_deadline_is_what_remains_without_the_margin(at_s: float, now_s: float, margin_s: float, named_s: int):
    assert deadline_s(Notice("end", at_s), now_s, margin_s) == named_s


def test_a_new_time_is_a_new_notice_and_only_an_earlier_one_drains_again(aws: FakeMetadata, start: Start):
    daemon = start("--cloud", "aws", "--endpoint", aws.endpoint)
    aws.answers[ACTION] = interruption(120)
    daemon.wait_for("drained node")
    aws.answers[ACTION] = interruption(240)
    daemon.wait_for("is drained already")
    assert len(daemon.drains) == 1, "a later drain would put the deadline off"
    aws.answers[ACTION] = interruption(60)
    daemon.wait_for_drains(2)
    assert 45 <= daemon.deadlines_s[1] <= 50


def test_a_recommendation_is_logged_once_and_drains_nothing(aws: FakeMetadata, start: Start):
    daemon = start("--cloud", "aws", "--endpoint", aws.endpoint)
    aws.answers[REBALANCE] = json.dumps({"noticeTime": at(-5)})
    daemon.wait_for("notice: AWS rebalance recommendation")
    aws.wait_for_looks(5)
    assert daemon.log.count("rebalance recommendation") == 1 and daemon.drains == []
    aws.answers[ACTION] = interruption(120)
    daemon.wait_for_drains(1)


def test_a_recommendation_drains_with_a_long_deadline_where_asked_and_a_notice_shortens_it(
    aws: FakeMetadata, start: Start
):
    daemon = start("--cloud", "aws", "--endpoint", aws.endpoint, "--drain-on-rebalance", "--rebalance-deadline", "900")
    aws.answers[REBALANCE] = json.dumps({"noticeTime": at(-5)})
    daemon.wait_for_drains(1)
    aws.answers[ACTION] = interruption(120)
    daemon.wait_for_drains(2)
    aws.wait_for_looks(5)
    first, second = daemon.deadlines_s
    assert 870 <= first <= 890 and 100 <= second <= 110


def test_a_recommendation_after_the_notice_does_not_put_it_off(aws: FakeMetadata, start: Start):
    aws.answers[ACTION] = interruption(120)
    aws.answers[REBALANCE] = json.dumps({"noticeTime": at(-5)})
    daemon = start("--cloud", "aws", "--endpoint", aws.endpoint, "--drain-on-rebalance")
    daemon.wait_for_drains(1)
    aws.wait_for_looks(5)
    assert len(daemon.drains) == 1 and daemon.deadlines_s[0] <= 110


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>",
        "[]",
        "null",
        "7",
        '{"action": "terminate"}',
        '{"action": "terminate", "time": 7}',
        '{"action": "terminate", "time": "soon"}',
        "[" * 50000,
        '{"action": "termi',
    ],
)
def test_nonsense_is_logged_once_and_the_next_sense_is_heard(aws: FakeMetadata, start: Start, text: str):
    aws.answers[ACTION] = text
    daemon = start("--cloud", "aws", "--endpoint", aws.endpoint)
    aws.wait_for_looks(4)
    assert daemon.process.poll() is None and daemon.drains == []
    assert daemon.log.count("no answer from the metadata service") == 1
    assert len(daemon.log.splitlines()) == 2, "one line for one event"
    aws.answers[ACTION] = interruption(120)
    daemon.wait_for_drains(1)


def test_a_service_that_dies_and_comes_back_is_told_twice_and_asked_on(aws: FakeMetadata, start: Start):
    daemon = start("--cloud", "aws", "--endpoint", aws.endpoint)
    aws.wait_for_looks(2)
    aws.stop()
    daemon.wait_for("no answer")
    time.sleep(0.5)
    assert daemon.log.count("no answer") == 1 and daemon.process.poll() is None
    aws.answers[ACTION] = interruption(120)
    aws.start()
    daemon.wait_for_drains(1)
    daemon.wait_for("drained node")
    assert daemon.log.count("answers again") == 1


class Silent:
    """A cloud that answers nothing as long as it is away."""

    endpoint, away = "http://nowhere", True

    def check(self) -> None: ...

    def notices(self) -> Iterator[Notice]:
        if self.away:
            raise MetadataError("nobody there")
        return iter(())


@pytest.mark.parametrize(("poll_s", "waits_s"), [(2, [2, 4, 8, 10, 10]), (0.5, [0.5, 1, 2, 4, 8]), (30, [30] * 5)])
def test_a_service_that_is_away_is_asked_less_often_up_to_a_limit(poll_s: float, waits_s: list[float]):
    cloud = Silent()
    daemon = NoticeDaemon(cloud, list, ray="ray", poll_s=poll_s, margin_s=10, drain_on_rebalance=False)
    waited = []
    for _ in waits_s:
        daemon.listen()
        waited.append(daemon.wait_s())
    assert waited == waits_s
    cloud.away = False
    daemon.listen()
    assert daemon.wait_s() == poll_s


# GCP


def test_a_preempted_flag_drains_once_with_less_than_its_thirty_seconds(gcp: FakeMetadata, start: Start):
    daemon = start("--cloud", "gcp", "--endpoint", gcp.endpoint)
    gcp.wait_for_looks(3)
    assert daemon.drains == []
    gcp.answers[PREEMPTED] = "TRUE"
    daemon.wait_for_drains(1)
    gcp.wait_for_looks(5)
    assert len(daemon.drains) == 1 and 15 <= daemon.deadlines_s[0] <= 20
    assert "GCP preemption" in " ".join(daemon.drains[0])


def test_maintenance_that_terminates_drains_and_one_that_migrates_does_not(gcp: FakeMetadata, start: Start):
    gcp.answers[MAINTENANCE] = "MIGRATE_ON_HOST_MAINTENANCE"
    daemon = start("--cloud", "gcp", "--endpoint", gcp.endpoint)
    gcp.wait_for_looks(3)
    assert daemon.drains == [] and "no answer" not in daemon.log
    gcp.answers[MAINTENANCE] = "TERMINATE_ON_HOST_MAINTENANCE"
    daemon.wait_for_drains(1)
    assert 45 <= daemon.deadlines_s[0] <= 50


def test_the_time_runs_from_the_last_no(gcp: FakeMetadata):
    now = [1000.0]
    cloud = Gcp(gcp.endpoint, clock=lambda: now[0])
    assert list(cloud.notices()) == []
    gcp.answers[PREEMPTED] = "TRUE"
    now[0] = 1007.0  # seven seconds of silence: the flag may be that old
    assert [notice.at_s for notice in cloud.notices()] == [1030.0]
    now[0] = 1009.0
    assert [notice.at_s for notice in cloud.notices()] == [1030.0], "the same notice"
    gcp.answers[PREEMPTED] = "FALSE"
    now[0] = 1100.0
    assert list(cloud.notices()) == []
    gcp.answers[PREEMPTED] = "TRUE"
    assert [notice.at_s for notice in cloud.notices()] == [1130.0], "another one"


def test_what_does_not_answer_as_google_does_is_not_believed(aws: FakeMetadata, gcp: FakeMetadata):
    with pytest.raises(MetadataError, match="401"):
        Gcp(aws.endpoint).check()
    aws.cloud, aws.answers[PREEMPTED] = "proxy", "TRUE"
    with pytest.raises(MetadataError, match="not as Google's"):
        Gcp(aws.endpoint).check()
    gcp.answers[PREEMPTED] = "PERHAPS"
    with pytest.raises(MetadataError, match="PERHAPS"):
        list(Gcp(gcp.endpoint).notices())


# Either, and the machine


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_auto_finds_the_cloud_that_it_runs_on(cloud: str, start: Start):
    fake = FakeMetadata(cloud=cloud)
    try:
        daemon = start("--endpoint", fake.endpoint)
        fake.answers[ACTION], fake.answers[PREEMPTED] = interruption(30), "TRUE"
        daemon.wait_for_drains(1)
        assert f"found {cloud.capitalize()}" in daemon.log
    finally:
        fake.stop()


def test_the_endpoints_of_the_environment_are_those_that_the_clouds_own_tools_read(
    aws: FakeMetadata, gcp: FakeMetadata, start: Start
):
    heard = start("--cloud", "aws", AWS_EC2_METADATA_SERVICE_ENDPOINT=aws.endpoint + "/")
    aws.wait_for_looks(1)
    assert heard.end() == 0
    start("--cloud", "gcp", GCE_METADATA_HOST=f"127.0.0.1:{gcp.port}")
    gcp.wait_for_looks(1)


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        (["--endpoint", "https://x"], {}, "http://HOST[:PORT] is wanted"),
        (["--endpoint", "http://x:port"], {}, "http://HOST[:PORT] is wanted"),
        ([], {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "x"}, "http://HOST[:PORT] is wanted"),
        (["--poll", "0"], {}, "more than 0 s is wanted"),
        (["--margin", "-1"], {}, "0 or more is wanted"),
        (["--cloud", "moon"], {}, "invalid choice: 'moon'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(start: Start, options: list[str], environment: dict[str, str], said: str):
    daemon = start(*options, **environment)
    assert daemon.process.wait(10) == 2
    assert said in " ".join(daemon.log.split()) and "Traceback" not in daemon.log


def test_the_nodes_of_a_machine_are_read_from_the_arguments_of_its_raylets(tmp_path: Path):
    for pid, arguments in {
        "7": ["/ray/core/raylet", f"--node_id={NODE}", "--gcs-address=10.0.0.1:6379", "--labels={}"],
        "8": ["python", "agent.py", "--node_id=no", "--gcs-address=10.0.0.1:6379"],
        "9": ["/bin/raylet", "--version"],
        "10": [],
    }.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes(b"".join(argument.encode() + b"\0" for argument in arguments))
    (tmp_path / "11").mkdir()
    (tmp_path / "self").symlink_to("7")
    assert raylets(tmp_path) == [Raylet(NODE, "10.0.0.1:6379")]


def test_a_machine_without_ray_is_told_and_asked_on(aws: FakeMetadata, start: Start):
    aws.answers[ACTION] = interruption(120)
    daemon = start("--cloud", "aws", "--endpoint", aws.endpoint, "--address", "192.0.2.1:1", node_id="")
    daemon.wait_for("no raylet runs on this machine")
    aws.wait_for_looks(2)
    assert daemon.process.poll() is None and daemon.drains == []


class Preempted(Silent):
    """A cloud that takes the machine in two minutes."""

    def __init__(self):
        self.notice = Notice("preemption", time.time() + 120)

    def notices(self) -> Iterator[Notice]:
        yield self.notice


def test_every_node_of_the_machine_is_drained_and_only_the_one_that_failed_is_tried_again(tmp_path: Path):
    calls, command = tmp_path / "calls", tmp_path / "ray"
    command.write_text(f"#!/bin/sh\necho $3 >>{calls}\n[ $3 != two ] || [ $(grep -c two {calls}) = 2 ]\n")
    command.chmod(0o755)
    nodes = [Raylet(name, "10.0.0.1:6379") for name in ("one", "two", "three")]
    daemon = NoticeDaemon(Preempted(), lambda: nodes, ray=str(command), poll_s=2, margin_s=10, drain_on_rebalance=False)
    waits = []
    for _ in range(4):
        daemon.listen()
        daemon.act()
        waits.append(daemon.wait_s())
    assert calls.read_text().split() == ["one", "two", "three", "two"]
    assert waits == [1, 2, 2, 2], "a failure is tried again before the next look"


# The hook of a pod


def test_a_pod_that_ends_drains_its_node_with_less_than_it_has(start: Start):
    daemon = start("--drain-now", "90", "--address", "10.0.0.1:6379")
    assert daemon.process.wait(10) == 0, "no such raylet runs here, so there is nothing to wait for"
    assert len(daemon.drains) == 1 and 75 <= daemon.deadlines_s[0] <= 80
    assert daemon.drains[0][1:3] == ["--node-id", NODE]
    assert "DRAIN_NODE_REASON_PREEMPTION" in daemon.drains[0]


@pytest.mark.parametrize(("looks_until_gone", "waited_s"), [(3, 1.0), (1000, 2.5)])
def test_the_hook_waits_until_the_node_is_gone_or_it_is_time(
    looks_until_gone: int, waited_s: float, monkeypatch: pytest.MonkeyPatch
):
    node, now, looks = Raylet(NODE, "10.0.0.1:6379"), [1000.0], []

    def still_there() -> list[Raylet]:
        looks.append(now[0])
        return [node] if len(looks) < looks_until_gone else [Raylet("another", "10.0.0.1:6379")]

    monkeypatch.setattr(notice_daemon, "raylets", still_there)
    # Its own clock and not everybody's: other threads of this process sleep, too.
    clock = SimpleNamespace(time=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    clock.strftime, clock.gmtime = time.strftime, time.gmtime
    monkeypatch.setattr(notice_daemon, "time", clock)
    assert drain_now([node], ray="true", ends_in_s=2.5, margin_s=1) == 0
    assert now[0] - 1000 == waited_s


def test_where_draining_fails_the_hook_waits_for_nothing_and_says_why(start: Start):
    daemon = start("--drain-now", "90", ray="echo no GCS here; exit 7")
    assert daemon.process.wait(10) == 1
    assert "exit 7: no GCS here" in daemon.log
    daemon = start("--drain-now", "90", "--address", "192.0.2.1:1", node_id="")
    assert daemon.process.wait(10) == 1
    assert "no raylet runs on this machine" in daemon.log and daemon.drains == []


def test_the_unit_and_the_readme_are_about_this_daemon():
    readme, unit = (DAEMON.with_name(name).read_text() for name in ("README.md", "helix-notice.service"))
    known = subprocess.run([sys.executable, "-E", DAEMON, "--help"], check=True, capture_output=True, text=True).stdout
    section = readme.partition("## Notices that a machine goes away")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(--[a-z-]+)", section))
    assert named and all(option in known for option in named)
    for path in re.findall(r"(/opt/helix/\S+|/etc/\S+\.env)", unit):
        assert path in readme, "what the unit names is installed"
    for path in re.findall(r"cluster/[\w.-]+", readme):
        assert (DAEMON.parents[1] / path).exists() or (DAEMON.parents[1] / "tests" / path).exists()


def test_it_starts_in_milliseconds():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-E", DAEMON, "--help"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.6


# A real Ray


@ray.remote(num_cpus=1)
class Busy:
    """Work that keeps a node alive while it is drained."""

    def node_id(self) -> str:
        return ray.get_runtime_context().get_node_id()


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs and a node with one, on this machine, and this process as the driver."""
    folder = tempfile.mkdtemp(prefix="ray")  # a socket's path has to be short
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ends: list[Callable[[], None]] = [lambda: shutil.rmtree(folder, ignore_errors=True)]
    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        ends.append(cluster.shutdown)
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        ends.append(ray.shutdown)
        yield cluster
    finally:
        for end in reversed(ends):
            end()


@pytest.mark.ray
def test_a_real_idle_node_is_gone_when_the_hook_returns(two_nodes: Cluster, start: Start):
    (node_id,) = [row["NodeID"] for row in ray.nodes() if row["Resources"].get("CPU")]
    daemon = start(
        *("--drain-now", "60", "--address", two_nodes.address, "--ray", str(Path(sys.executable).with_name("ray"))),
        node_id=node_id,
        HOME=os.environ.get("HOME", "/"),
    )
    assert daemon.process.wait(150) == 0, daemon.log
    assert node_id not in {raylet.node_id for raylet in raylets()}
    until(lambda: not [row for row in ray.nodes() if row["NodeID"] == node_id and row["Alive"]], "end of the node", 60)


@pytest.mark.ray
def test_a_real_node_is_drained_and_takes_no_more_work(two_nodes: Cluster, aws: FakeMetadata, start: Start):
    busy = Busy.remote()
    node_id = ray.get(busy.node_id.remote())
    (node,) = [found for found in raylets() if found.node_id == node_id]
    assert node.gcs_address == two_nodes.address, "the raylet's arguments name its node and its cluster"
    daemon = start(
        *("--cloud", "aws", "--endpoint", aws.endpoint, "--address", node.gcs_address, "--drain-on-rebalance"),
        *("--ray", str(Path(sys.executable).with_name("ray"))),
        node_id=node_id,
        HOME=os.environ.get("HOME", "/"),
    )
    draining = two_nodes.global_state.get_draining_nodes
    assert draining() == {}
    aws.answers[REBALANCE] = json.dumps({"noticeTime": at(0)})
    until(lambda: node_id in draining(), "drain in Ray", 90)
    assert 540 < draining()[node_id] / 1000 - time.time() <= 600
    aws.answers[ACTION] = interruption(90)
    ends_at = time.time() + 90
    until(lambda: draining()[node_id] / 1000 < ends_at, "earlier deadline in Ray", 90)
    # The `ray` command counts from when it has started, some seconds after the daemon's count: the margin's first use.
    assert ends_at - 11 < draining()[node_id] / 1000 < ends_at
    assert set(draining()) == {node_id}, "the head is left alone"
    assert ray.get(busy.node_id.remote()) == node_id, "what runs there goes on"
    ray.kill(busy)
    until(lambda: not [row for row in ray.nodes() if row["NodeID"] == node_id and row["Alive"]], "end of the node", 60)
    drained = re.compile(rf"drained node {node_id} with a deadline of (7\d|80) s: AWS spot terminate")
    until(lambda: drained.search(daemon.log) is not None, "line in the log")
    assert daemon.end() == 0
