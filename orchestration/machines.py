"""A Ray cluster of several machines on this one: a head and nodes that can be killed, and programs that join it.

Every machine is a `ray start --block` of its own, as the cluster launcher starts it, or one that Ray's autoscaler
started (`Autoscaled`); what belongs to one is the tree of its processes. The head has no CPUs and the resource
`trial_driver`, as in cluster/. Knows Ray as its commands only.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

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

#: What Ray's fake node provider calls the head: as a node, and its type.
FAKE_HEAD, FAKE_HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"

#: Parts of a file for Ray's cluster launcher that must be there, and that nothing here has a use for.
UNUSED = {
    **{key: {} for key in ("auth", "docker", "file_mounts")},
    **{f"{which}start_ray_commands": [] for which in ("head_", "worker_")},
    **{f"{which}setup_commands": [] for which in ("", "head_", "worker_")},
    **{key: [] for key in ("initialization_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")},
    "file_mounts_sync_continuously": False,
}

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
        return _tree(self.process.pid)

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
        _kill(tree)
        self.process.wait()
        psutil.wait_procs(tree, timeout=10)


class Node(Program):
    """One machine of the cluster."""

    @property
    def node_id(self) -> str:
        """What Ray calls it."""
        raylet = self.find("raylet")
        named = None if raylet is None else _node_id(raylet)
        if named is None:
            raise MachineError(f"no raylet runs on this node: {self.said[-500:]}")
        return named

    def terminate(self) -> None:
        """What a machine does that shuts down in order."""
        self.process.send_signal(signal.SIGTERM)


class Grown:
    """A machine that the autoscaler started: a raylet, and everything below it."""

    def __init__(self, raylet: psutil.Process, node_id: str):
        self.raylet, self.node_id = raylet, node_id

    def tree(self) -> list[psutil.Process]:
        return _tree(self.raylet.pid)

    def kill(self) -> None:
        """SIGKILL to the whole tree."""
        _kill(self.tree())


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
            head += self._head_options()
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

    def _head_options(self) -> list[str]:
        """What else the head is started with."""
        return []

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

    def drain(self, node: "Node | Grown", seconds: int) -> None:
        """Tell Ray that a node goes away in so many seconds, as the daemon in cluster/ does."""
        command = [*RAY, "drain-node", "--address", self.address, "--node-id", node.node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "chaos"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise MachineError(f"ray drain-node: {done.stdout[-500:]}{done.stderr[-500:]}")


class Autoscaled(Machines):
    """A cluster whose machines Ray's autoscaler starts when they are asked for, and ends after `idle_s` idle seconds.

    `node_types`: as a file for the cluster launcher has them, `resources`, `labels`, `max_workers`. The autoscaler is
    the real one; the machines are processes here, by Ray's fake node provider, whose GPUs are numbers alone.
    """

    def __init__(self, node_types: Mapping[str, Mapping[str, Any]], *, idle_s: float):
        super().__init__()
        provider = {
            # By its module, since the autoscaler (v2) looks for a file that is in no wheel where it is named by type.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD,
            "gcs_address": self.address,
        }
        head = {"resources": {"CPU": 0, "trial_driver": 64}, "node_config": {}, "max_workers": 0}
        small = {"object_store_memory": 100_000_000}
        workers = {
            name: {**node_type, "resources": {**node_type["resources"], **small}, "node_config": {}}
            for name, node_type in node_types.items()
        }
        config = {
            "cluster_name": "fake",
            "provider": provider,
            "max_workers": sum(node_type["max_workers"] for node_type in node_types.values()),
            "upscaling_speed": 10.0,
            "idle_timeout_minutes": idle_s / 60,
            "head_node_type": FAKE_HEAD_TYPE,
            "available_node_types": {FAKE_HEAD_TYPE: head, **workers},
            **UNUSED,
        }
        self.config = self.folder / "autoscaling.json"
        self.config.write_text(json.dumps(config))
        self.env |= {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD,
        }

    def _head_options(self) -> list[str]:
        return ["--num-gpus=0", f"--autoscaling-config={self.config}"]

    def node(self) -> Node:
        raise MachineError("the machines of this cluster are started by its autoscaler")

    def grown(self) -> dict[str, Grown]:
        """The machines that run beside the head, by what Ray calls them."""
        found = {}
        for process in self.head.tree():
            node_id = _node_id(process)
            if node_id not in (None, FAKE_HEAD):  # a raylet comes before what it has forked and not yet made a worker
                found.setdefault(node_id, Grown(process, node_id))
        return found


#: The command `ray` of this interpreter.
RAY = (sys.executable, "-m", "ray.scripts.scripts")


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _tree(pid: int) -> list[psutil.Process]:
    try:
        lead = psutil.Process(pid)
        return [lead, *lead.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _node_id(process: psutil.Process) -> str | None:
    """What Ray calls the node of this raylet, in whose own arguments alone it stands; None where this is no raylet."""
    try:
        line = process.cmdline()
    except psutil.Error:
        return None
    if not line or not line[0].endswith("raylet"):
        return None
    return next((part.partition("=")[2] for part in line if part.startswith("--node_id=")), None)
