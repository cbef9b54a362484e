"""Starts a local Ray or joins the cluster there is; the one place that knows which."""

import logging
import os
import socket
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._private.state import state as gcs_state
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated import autoscaler_pb2, gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group

from orchestration.money import Prices, machine_facts
from orchestration.pools import Offer, pools_of, types_of

#: The folder that holds the packages helix, orchestration and dashboards.
ROOT = Path(__file__).resolve().parent.parent

#: How often a Train controller looks at its worker. Its default of 2 s would hold up every report for as long.
POLL_S = "0.2"

OBJECT_STORE_BYTES = 128 * 2**20

#: How long the first task of a Ray that was only just started may take.
REHEARSAL_S = 60


class ClusterError(Exception):
    """The cluster that is to be joined cannot run a sweep."""

    def __init__(self, reason: str):
        super().__init__(reason)


def cpu_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def joins_cluster() -> bool:
    """Whether there is a cluster to join: inside a Ray job, or where RAY_ADDRESS names one."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def connect(*, storage_named: bool) -> None:
    """Make Ray ready: join the cluster of RAY_ADDRESS or of this job, or else start one on this machine, on loopback.

    Raises ConnectionError where RAY_ADDRESS does not answer, and ClusterError where a cluster of several machines would
    work on a folder that the user did not name, which can only be a folder of one of them.
    """
    if ray.is_initialized():
        return
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = POLL_S
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # Workers import this package from where the driver did; the raylet hands its environment on to them.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not joins_cluster():
        # Nobody drains the one machine, so no pack needs a process of Ray's that asks every second whether it is. The
        # raylet hands this on to its workers; a cluster that this process knows later is another matter.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        try:
            ray.init(
                address="local",
                num_cpus=cpu_count(),
                resources={"trial_driver": 1024},
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
        finally:
            del os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"]
        return
    _probe(os.environ.get("RAY_ADDRESS", ""))
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    packages = [str(ROOT / name) for name in ("helix", "orchestration", "dashboards")]
    ray.init(address="auto", runtime_env=None if in_job else {"py_modules": packages}, **quiet)
    machines = sum(node["Alive"] for node in ray.nodes())
    if machines > 1 and not storage_named:
        ray.shutdown()
        raise ClusterError(
            f"this cluster has {machines} machines, and the default storage is a folder of this one; name storage that "
            "all of them share with --storage or HELIX_STORAGE"
        )


def _probe(address: str) -> None:
    """Raise ConnectionError at once where nobody listens; Ray itself tries for minutes."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if not separator or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); start it, correct the address, or unset "
            "RAY_ADDRESS to run on this machine"
        ) from error


def driver_resources() -> dict[str, float]:
    """What a trial's driver asks for: nothing that a worker needs, and a place on the head, no spot machine."""
    if "trial_driver" in ray.cluster_resources():
        return {"trial_driver": 1.0}
    return {"node:__internal_head__": 0.0001}


def offer(prices: Prices) -> Offer:
    """What the cluster has on offer: its machines, and what an autoscaler may start. `prices` knows their GPUs.

    On the head, which is where drivers run, the autoscaler's process names the file that it reads, and that the node
    types. Where there is no such process, as on Kubernetes, only the autoscaler's own word says what can never be.
    """
    known, path = (True, None) if not joins_cluster() else _autoscaler(ray.get_runtime_context().gcs_address)
    types = None if path is None else types_of(yaml.safe_load(path.read_text(encoding="utf-8")))
    pools = pools_of(ray.nodes(), types, gpu_bytes=prices.memory_of_a_gpu)
    return Offer(pools=pools, complete=known, refused=() if known else _refused())


def _autoscaler(gcs_address: str) -> tuple[bool, Path | None]:
    """Whether the autoscaler of a cluster runs on this machine, and the file of its node types, None without one."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        # By the whole name: log_monitor.py runs on every machine, with the same address.
        if any(Path(word).name == "monitor.py" for word in words) and f"--gcs-address={gcs_address}" in words:
            path = next((word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")), "")
            return True, Path(path).expanduser() if path else None
    return False, None


def _refused() -> tuple[dict[str, float], ...]:
    """The requests of which the autoscaler says that nothing it could start would hold them."""
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    reply = autoscaler_pb2.GetClusterStatusReply()  # pyright: ignore[reportAttributeAccessIssue]
    reply.ParseFromString(client.get_cluster_status(timeout_s=10))
    return tuple(dict(one.resources_bundle) for one in reply.autoscaling_state.infeasible_resource_requests)


def free_what_the_dead_hold() -> int:
    """Give back what the actors of this job reserved that are dead by now; how many reservations that were.

    A Train controller reserves the place of its worker, and Ray keeps that while the job lives. Train has a process
    that asks the dashboard whether the controller lives and gives the place back if not: a local Ray has no dashboard,
    so after a controller was killed the next one would wait for that place for ever.
    """
    table = gcs_state._connect_and_get_accessor().get_placement_group_table()
    job, nobody = ray.get_runtime_context().get_job_id(), ray.ActorID.nil().binary()
    reservation = gcs_pb2.PlacementGroupTableData  # pyright: ignore[reportAttributeAccessIssue]
    freed = 0
    for serialised in table or ():
        group = reservation.FromString(serialised)
        held = group.state != reservation.REMOVED and not group.is_detached
        orphaned = group.creator_actor_dead and group.creator_actor_id != nobody
        if held and orphaned and group.creator_job_id.hex() == job:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            freed += 1
    return freed


def this_machine(held: dict[str, float]) -> dict[str, Any]:
    """What the attempts of this worker record of the machine that it runs on, of whose resources it has `held`."""
    here = ray.get_runtime_context().get_node_id()
    node: dict[str, Any] = next((one for one in ray.nodes() if one["NodeID"] == here), {})
    return machine_facts(held=held, resources=node.get("Resources", {}), labels=node.get("Labels"))


def rehearse() -> str:
    """Start a local Ray whatever RAY_ADDRESS names, run a task and stop it. Says so; raises whatever Ray raises."""
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        process = ray.get(ray.remote(_process).remote(), timeout=REHEARSAL_S)
        return f"started, and a task ran in process {process}"
    finally:
        ray.shutdown()


def _process() -> int:
    return os.getpid()
