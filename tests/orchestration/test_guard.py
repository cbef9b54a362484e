"""A sweep is watched while it runs: limits hold whatever is away, and a call to stop is answered."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

import orchestration.guard
from dashboards.view import Spent
from helix.storage import FolderStorage
from orchestration import scale, sweep
from orchestration.guard import BLIND_LOOKS, CALLS, TUNE_LEAVES_SIGINT, Guard, calls_answered, held_elsewhere
from orchestration.lease import EXPIRY_S
from orchestration.ledger import TrialState
from orchestration.money import Limits
from orchestration.stop import asked


def guarded(root: Path, monkeypatch: pytest.MonkeyPatch, limits: Limits) -> Guard:
    """The guard of a sweep of one trial, which a worker of it has begun; there is no Ray, and asking it fails."""

    def away(*_: object) -> None:
        raise ConnectionError("Ray is away")

    monkeypatch.setattr(orchestration.guard, "offer", away)
    monkeypatch.setattr(orchestration.guard, "free_what_the_dead_hold", away)
    planned = scale.planned(FolderStorage(root), 1)
    begun = {"attempt_id": "one", "sweep_id": "s", "started": time.time() - 3600, "lease": 1, "share": 1.0}
    folder = f"trials/{planned.plan[0].trial_id}"
    planned.storage.put_json(f"{folder}/attempts/one.json", begun)
    planned.storage.put_json(f"{folder}/heartbeat.json", {"attempt_id": "one", "step": 1, "time": time.time()})
    return Guard(planned.snapshot, limits, sweep_id="s", wanted=[])


def cut(guard: Guard) -> tuple[str, bytes]:
    """Cut the file of the attempt short; gives its key and what it held."""
    storage = guard.snapshot.storage
    key = f"trials/{guard.snapshot.plan[0].trial_id}/attempts/one.json"
    whole = storage.get(key)
    storage.put(key, whole[: len(whole) // 2])
    return key, whole


def test_a_limit_holds_though_ray_is_away_and_a_file_cannot_be_read(tmp_path, monkeypatch):
    guard = guarded(tmp_path, monkeypatch, Limits(budget_usd=5.0, ends=time.time() + 3600))
    guard._look()
    assert guard.stopped is not None and guard.stopped.startswith("the budget cannot be held: no price"), guard.stopped
    late = Guard(guard.snapshot, Limits(ends=time.time() - 1), sweep_id="late", wanted=[])
    cut(late)
    late._look()
    assert late.stopped is not None and late.stopped.startswith("the time is over")
    assert asked(late.snapshot.storage, "late") == late.stopped
    assert not late.stop_all()
    monkeypatch.setattr(orchestration.guard, "GRACE_S", 0.0)  # whether a worker is left cannot be read either
    late._look()
    assert late.stop_all()


def test_a_budget_that_cannot_be_watched_stops_the_sweep_and_one_bad_look_does_not(tmp_path, monkeypatch):
    guard = guarded(tmp_path, monkeypatch, Limits(budget_usd=5.0))
    monkeypatch.setattr(orchestration.guard, "spent_on_trial", lambda *_, **__: Spent())
    key, whole = cut(guard)
    for _ in range(BLIND_LOOKS - 1):
        guard._look()
    guard.snapshot.storage.put(key, whole)
    guard._look()
    cut(guard)
    for _ in range(BLIND_LOOKS - 1):
        guard._look()
    assert guard.stopped is None and asked(guard.snapshot.storage, "s") is None
    guard._look()
    assert guard.stopped is not None and guard.stopped.startswith("what was spent cannot be read: ")
    assert asked(guard.snapshot.storage, "s") == guard.stopped
    assert sweep.unfinished(guard.stopped) == sweep.STOPPED

    free = Guard(guard.snapshot, Limits(), sweep_id="free", wanted=[])
    for _ in range(2 * BLIND_LOOKS):
        free._look()
    assert free.stopped is None


def test_workers_are_asked_again_where_the_storage_was_away_when_the_sweep_had_to_stop(tmp_path, monkeypatch):
    guard = guarded(tmp_path, monkeypatch, Limits(ends=time.time() - 1))
    with monkeypatch.context() as away:
        away.setattr(guard.snapshot.storage, "put_if_absent", _raises)
        guard._look()
    assert guard.stopped is not None and asked(guard.snapshot.storage, "s") is None
    guard._look()
    assert asked(guard.snapshot.storage, "s") == guard.stopped


def _raises(*_: object) -> None:
    raise OSError("the storage is away")


def test_the_first_signal_stops_a_sweep_the_second_interrupts_it_and_the_handlers_are_as_before(tmp_path, monkeypatch):
    guard = guarded(tmp_path, monkeypatch, Limits())
    before = [signal.getsignal(number) for number in CALLS]
    with pytest.raises(KeyboardInterrupt), calls_answered(guard):
        os.kill(os.getpid(), signal.SIGINT)
        guard._look()
        assert guard.stopped == asked(guard.snapshot.storage, "s") == "interrupted (SIGINT)"
        assert sweep.unfinished(guard.stopped) == sweep.INTERRUPTED
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert [signal.getsignal(number) for number in CALLS] == before
    assert TUNE_LEAVES_SIGINT not in os.environ


def test_a_sweep_whose_trials_are_all_in_other_hands_says_what_it_waits_for(storage):
    """What a process of this machine held that is dead by now is in nobody's hands."""
    running, partial = (TrialState(trial_id="a" * 16, status=status) for status in ("running", "partial"))
    there = {"attempt_id": "a", "sweep_id": "other", "host": "elsewhere", "pid": 1, "born": 0.0}
    assert held_elsewhere(storage, [running]) == ""
    storage.put_json(f"trials/{running.trial_id}/leases/000001.json", there)
    assert held_elsewhere(storage, [partial]) == ""
    said = held_elsewhere(storage, [running, partial])
    assert said.startswith("1 of the trials is worked on by another sweep") and f"after {EXPIRY_S:.0f} s" in said
    storage.put_json(f"trials/{running.trial_id}/leases/000001.json", there | {"host": socket.gethostname()})
    assert held_elsewhere(storage, [running]) == ""
    storage.put_json(f"trials/{running.trial_id}/leases/000001.json", there | {"released": True})
    assert held_elsewhere(storage, [running]) == ""
