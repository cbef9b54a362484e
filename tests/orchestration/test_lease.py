"""One process works on a trial; who falls silent is taken over, and no two clocks are compared."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from helix.storage import FolderStorage, Storage
from orchestration.lease import Lease, LeaseLostError, Watch, acquire, is_held, this_process

TRIAL = "0123456789abcdef"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return FolderStorage(tmp_path)


def ask(storage: Storage, *, sweep_id: str = "s1", watch: Watch | None = None) -> Lease | None:
    return acquire(storage, TRIAL, attempt_id=f"by-{sweep_id}", sweep_id=sweep_id, watch=watch or Watch())


def elsewhere(storage: Storage, *, number: int = 1, sweep_id: str = "other") -> None:
    """A holder on another machine."""
    holder = {"attempt_id": "theirs", "sweep_id": sweep_id, "host": "elsewhere", "pid": 1, "born": 0.0}
    storage.put_json(f"trials/{TRIAL}/leases/{number:06d}.json", holder)


def beat(storage: Storage, number: int) -> None:
    storage.put_json(f"trials/{TRIAL}/heartbeat.json", {"attempt_id": "theirs", "beat": number, "time": -1e9})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_trial_that_nobody_holds_is_given(storage: Storage):
    lease = ask(storage)
    assert lease is not None and lease.number == 1


def test_what_is_released_is_given_again_under_the_next_number(storage: Storage):
    for number in (1, 2, 3):
        lease = ask(storage)
        assert lease is not None and lease.number == number
        with lease:
            pass
    assert len(storage.children(f"trials/{TRIAL}/leases")) == 2, "older ones are gone"


def test_a_holder_elsewhere_is_left_alone_as_long_as_its_heart_beats(storage: Storage):
    elsewhere(storage)
    watch, clock = Watch(expiry_s=60, clock=(clock := Clock())), clock
    for second in range(0, 600, 20):
        clock.now = second
        beat(storage, second // 40)
        assert ask(storage, watch=watch) is None, second


def test_a_silent_one_is_taken_over_by_the_clock_of_who_watches(storage: Storage):
    """What the heartbeat says of the time is a thousand million seconds off, and nobody looks."""
    elsewhere(storage)
    beat(storage, 1)
    clock = Clock()
    watch = Watch(expiry_s=60, clock=clock)
    for second in (0, 30, 59):
        clock.now = second
        assert ask(storage, watch=watch) is None
    clock.now = 60
    lease = ask(storage, watch=watch)
    assert lease is not None and lease.number == 2


def test_a_new_driver_does_not_take_over_before_it_has_watched(storage: Storage):
    elsewhere(storage)
    beat(storage, 1)
    assert ask(storage, watch=Watch(expiry_s=60)) is None


def test_the_worker_that_ray_starts_in_place_of_a_dead_one_need_not_wait(storage: Storage):
    elsewhere(storage, sweep_id="s1")
    assert ask(storage, sweep_id="s1") is not None


def hold_and_sleep(root: str) -> None:
    lease = ask(FolderStorage(Path(root)))
    assert lease is not None
    with lease:
        time.sleep(60)


def test_a_process_killed_on_this_machine_is_taken_over_at_once_and_a_living_one_never(storage: Storage):
    process = multiprocessing.get_context("spawn").Process(target=hold_and_sleep, args=(str(storage.root),))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not storage.exists(f"trials/{TRIAL}/heartbeat.json"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        clock = Clock()
        watch = Watch(expiry_s=60, clock=clock)
        for second in (0, 100, 200):
            clock.now = second
            assert ask(storage, sweep_id="s2", watch=watch) is None
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        assert ask(storage, sweep_id="s2", watch=watch) is not None
    finally:
        process.kill()
        process.join(10)


def test_of_many_who_see_a_silent_holder_one_takes_over(storage: Storage):
    elsewhere(storage)
    clock = Clock()
    watches = [Watch(expiry_s=60, clock=clock) for _ in range(16)]
    assert [ask(storage, watch=watch) for watch in watches] == [None] * 16
    clock.now = 61
    start, won = threading.Barrier(16), []

    def rush(watch: Watch) -> None:
        start.wait()
        lease = ask(storage, watch=watch)
        if lease is not None:
            won.append(lease.number)

    threads = [threading.Thread(target=rush, args=(watch,)) for watch in watches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Late ones may find that the winner is this very process and take its lease in turn; never two get one number.
    assert won and len(set(won)) == len(won)


def test_who_was_taken_over_stops_at_its_next_step(storage: Storage):
    lease = Lease(storage, TRIAL, 1, {"attempt_id": "mine"}, beat_s=0.02)
    with pytest.raises(LeaseLostError, match=f"trial {TRIAL} was taken over by another process"), lease:
        lease.moved(1)
        elsewhere(storage, number=2)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            lease.moved(2)
            time.sleep(0.01)
    assert storage.get_json(f"trials/{TRIAL}/leases/000002.json")["attempt_id"] == "theirs"
    assert not storage.exists(f"trials/{TRIAL}/leases/000001.json"), "what was lost is not released"


def test_it_beats_while_a_long_step_is_under_way_and_says_which_step_was_the_last(storage: Storage):
    with Lease(storage, TRIAL, 1, {"attempt_id": "mine"}, beat_s=0.02) as lease:
        lease.moved(7)
        beats = set()
        deadline = time.monotonic() + 20
        while len(beats) < 3 and time.monotonic() < deadline:
            said = storage.get_json(f"trials/{TRIAL}/heartbeat.json")
            if said["step"] == 7:
                beats.add(said["beat"])
        assert len(beats) == 3


def test_standing_still_for_longer_than_steps_take_is_a_stall(storage: Storage):
    seen: list[float] = []
    lease = Lease(storage, TRIAL, 1, {"attempt_id": "mine"}, beat_s=0.02, first_s=60, stall_s=0.3, stalled=seen.append)
    with lease:
        for step in range(5):
            lease.moved(step)
            time.sleep(0.02)
        assert not seen
        time.sleep(0.8)
    assert seen and 0.3 < seen[0] < 0.8


def test_a_slow_model_is_given_twenty_of_its_steps(storage: Storage):
    seen: list[float] = []
    lease = Lease(storage, TRIAL, 1, {"attempt_id": "mine"}, beat_s=0.02, first_s=60, stall_s=0.01, stalled=seen.append)
    with lease:
        lease.moved(1)
        time.sleep(0.2)
        lease.moved(2)
        time.sleep(0.5)
    assert not seen


def test_a_storage_that_is_away_for_a_while_ends_nothing(storage: Storage, monkeypatch):
    lease = Lease(storage, TRIAL, 1, {"attempt_id": "mine"}, beat_s=0.02)
    with lease:
        real = storage.put_json
        monkeypatch.setattr(storage, "put_json", lambda *_: (_ for _ in ()).throw(OSError("away")))
        time.sleep(0.1)
        monkeypatch.setattr(storage, "put_json", real)
        storage.delete(f"trials/{TRIAL}/heartbeat.json")
        time.sleep(0.2)
        assert storage.exists(f"trials/{TRIAL}/heartbeat.json")


def test_a_process_is_told_from_a_later_one_with_its_number():
    assert this_process()["pid"] == os.getpid() and this_process()["born"] > 0


@pytest.mark.parametrize("said", [b"", b"{", b"[]", b"{}", b'{"host": 1, "pid": "x"}'])
def test_a_damaged_lease_is_held_for_as_long_as_its_holder_may_live(storage: Storage, said: bytes):
    storage.put(f"trials/{TRIAL}/leases/000001.json", said)
    storage.put(f"trials/{TRIAL}/leases/notes.txt", b"no lease")
    watch = Watch(expiry_s=60, clock=(clock := Clock()))
    assert is_held(storage, TRIAL)
    assert ask(storage, watch=watch) is None
    clock.now = 61.0
    lease = ask(storage, watch=watch)
    assert lease is not None and lease.number == 2
