"""What a local Ray gives back of processes that were killed."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from orchestration.connection import free_what_the_dead_hold

pytestmark = pytest.mark.ray


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
