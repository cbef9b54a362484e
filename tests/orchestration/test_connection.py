"""How a cluster is found, and what a local Ray gives back of processes that were killed."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from orchestration import connection
from orchestration.connection import free_what_the_dead_hold

GCS = "10.0.0.1:6379"


def processes(*lines: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(info={"cmdline": line.split() or None}) for line in lines]


@pytest.mark.parametrize("version", ["autoscaler/_private", "autoscaler/v2"])
def test_the_autoscaler_is_told_from_what_else_watches(version: str, monkeypatch: pytest.MonkeyPatch):
    """Ray's log monitor has a like name and the same address; which of the two comes first is up to their ids."""
    others = [f"python ray/_private/log_monitor.py --gcs-address={GCS}", "", "python train.py"]
    monitor = f"python ray/{version}/monitor.py --gcs-address={GCS} --autoscaling-config=/etc/cluster.yaml"
    for lines in ([*others, monitor], [monitor, *others]):
        monkeypatch.setattr(connection.psutil, "process_iter", lambda _names, lines=lines: processes(*lines))
        assert connection._autoscaler(GCS) == (True, Path("/etc/cluster.yaml"))
        assert connection._autoscaler("10.0.0.2:6379") == (False, None)
    monkeypatch.setattr(connection.psutil, "process_iter", lambda _names: processes(*others))
    assert connection._autoscaler(GCS) == (False, None)


@pytest.fixture
def three_cpus() -> Iterator[None]:
    """A local Ray as a sweep starts it, without a dashboard."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Reserving:
    """Reserves a CPU, as a Train controller does for its worker."""

    def reserve(self) -> int:
        self.group = placement_group([{"CPU": 1}])
        ray.get(self.group.ready())
        return os.getpid()


@pytest.mark.ray
@pytest.mark.usefixtures("three_cpus")
def test_what_a_killed_actor_reserved_is_free_again_and_what_the_living_hold_is_not():
    own = placement_group([{"CPU": 1}])
    ray.get(own.ready())
    living, doomed = (ray.remote(num_cpus=0)(Reserving).remote() for _ in range(2))
    _, pid = ray.get([actor.reserve.remote() for actor in (living, doomed)])
    assert free_what_the_dead_hold() == 0
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(doomed.reserve.remote())
    wanted = placement_group([{"CPU": 1}])
    assert not wanted.wait(2), "Ray frees it by itself now; free_what_the_dead_hold is not needed any more"

    deadline, freed = time.monotonic() + 20, 0
    while not freed and time.monotonic() < deadline:
        freed = free_what_the_dead_hold()
    assert freed == 1
    assert wanted.wait(20)
    assert free_what_the_dead_hold() == 0
    states = [group["state"] for group in placement_group_table().values()]
    assert sorted(states) == ["CREATED", "CREATED", "CREATED", "REMOVED"]
