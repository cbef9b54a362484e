"""A Ray cluster of several machines on this one: a head and nodes that can be killed, and programs that join it.

Every machine is a `ray start --block` of its own, as the cluster launcher starts it; what belongs to one is the tree of
its processes. The head has no CPUs and the resource `trial_driver`, as in cluster/. Knows Ray as its commands only.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

ROOT = Path(__file__).resolve().parents[1]

#: What is waited for comes within this time, or does not come.
LIMIT_S = 240.0

#: Seconds between two looks.
LOOK_S = 0.02

#: How long a node that was sent SIGTERM drains (Ray's default is 30).
GRACE_S = 12

#: How long a node waits for a head that is gone, before it ends (Ray's default is 60).
HEADLESS_S = 15

Seen = TypeVar("Seen")


class MachineError(Exception):
    """Something on the machines did not come about."""


def until(look: Callable[[], Seen | None], what: str, *, limit_s: float = LIMIT_S) -> Seen:
    """What `look` returns once it is not None. Raises MachineError after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        seen = look()
        if seen is not None:
            return seen
        time.sleep(LOOK_S)
    raise MachineError(f"{what}: waited {limit_s:.0f} s in vain")


class Program:
    """A process with the file that it writes to, and everything below it."""

    def __init__(self, command: Sequence[str], env: dict[str, str], log: Path):
        self.command, self.log = list(command), log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                self.command, env=env, cwd=log.parent, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """The process and its descendants, those that lead first."""
        try:
            lead = psutil.Process(self.process.pid)
            return [lead, *lead.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def find(self, title: str) -> psutil.Process | None:
        """The first of the tree whose command line begins so: Ray names its workers by what they run."""
        for process in self.tree():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if line and (line[0].startswith(title) or line[0].endswith(f"/{title}")):
                return process
        return None

    def kill(self) -> None:
        """SIGKILL to the whole tree."""
        tree = self.tree()
        for process in tree:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        psutil.wait_procs(tree, timeout=10)


class Node(Program):
    """One machine of the cluster."""

    @property
    def node_id(self) -> str:
        """What Ray calls it: it stands in the raylet's own arguments alone."""
        raylet = self.find("raylet")
        named = [] if raylet is None else [part for part in raylet.cmdline() if part.startswith("--node_id=")]
        if not named:
            raise MachineError(f"no raylet runs on this node: {self.said[-500:]}")
        return named[0].partition("=")[2]

    def terminate(self) -> None:
        """What a machine does that shuts down in order."""
        self.process.send_signal(signal.SIGTERM)


class Machines:
    """A cluster: a context manager after which none of its processes is left."""

    def __init__(self) -> None:
        # Ray's sockets lie below this folder, and a socket's path has room for a hundred characters.
        self.folder = Path(tempfile.mkdtemp(prefix="hx-"))
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        self.env = {
            **kept,
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(GRACE_S),
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEADLESS_S),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        self.programs: list[Program] = []

    def __enter__(self) -> "Machines":
        try:
            client = ["--ray-client-server-port", str(free_port())]
            head = ["--head", "--port", str(self.port), "--num-cpus=0", '--resources={"trial_driver": 64}', *client]
            # Ray Train asks the dashboard whether a controller lives, and frees what a dead one held only then.
            self.head = self._start([*head, "--dashboard-host=127.0.0.1", "--dashboard-port", str(free_port())])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for program in reversed(self.programs):
            program.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def node(self) -> Node:
        """Another machine with one CPU joins."""
        return self._start(["--address", self.address, "--num-cpus=1"])

    def _start(self, options: Sequence[str]) -> Node:
        shared = ["--block", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        shared += ["--dashboard-agent-listen-port=0", "--disable-usage-stats"]
        command = [*RAY, "start", *options, *shared]
        node = Node(command, self.env, self.folder / f"node-{len(self.programs)}.log")
        self.programs.append(node)

        def ready() -> bool | None:
            if node.process.poll() is not None:
                raise MachineError(f"a Ray node did not start: {node.said[-1000:]}")
            return True if "Ray runtime started" in node.said else None

        until(ready, "a Ray node starts")
        return node

    def run(self, arguments: Sequence[str], **env: str) -> Program:
        """A program that joins the cluster, such as a sweep's driver."""
        joined = {**self.env, "RAY_ADDRESS": self.address, **env}
        program = Program([sys.executable, *arguments], joined, self.folder / f"program-{len(self.programs)}.log")
        self.programs.append(program)
        return program

    def logged(self, text: str) -> bool:
        """Whether a process of Ray has said this, as far as its log holds it."""
        logs = self.folder.glob("ray/session_2*/logs/worker-*")
        return any(text in log.read_text(errors="replace") for log in logs)

    def drain(self, node: Node, seconds: int) -> None:
        """Tell Ray that a node goes away in so many seconds, as the daemon in cluster/ does."""
        command = [*RAY, "drain-node", "--address", self.address, "--node-id", node.node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "chaos"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise MachineError(f"ray drain-node: {done.stdout[-500:]}{done.stderr[-500:]}")


#: The command `ray` of this interpreter.
RAY = (sys.executable, "-m", "ray.scripts.scripts")


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
