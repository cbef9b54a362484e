"""Who works on a trial: a lease, put if absent, kept alive by a heartbeat, taken over when that falls silent.

    trials/<trial_id>/leases/000003.json    the third holder; the highest number holds, and numbers only grow
    trials/<trial_id>/heartbeat.json        what the holder last said

Whoever wants a trial and finds it held watches the heartbeat with its own clock: one that did not change for EXPIRY_S
is dead. No two clocks are ever compared. To take over is to put the next number, which one process can do; the one
before sees it at its next beat and stops. A holder on this machine whose process is gone is dead at once.
"""

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil

from helix.storage import CorruptObjectError, Storage, json_bytes
from helix.training.trainer import trial_folder
from orchestration.ledger import SILENCE_S, heartbeat_of
from orchestration.stop import asked

logger = logging.getLogger(__name__)

#: A heartbeat this often is enough for people to see steps pass, and little enough for object storage.
BEAT_S = 2.0

#: A holder whose heartbeat did not change for so long is dead.
EXPIRY_S = SILENCE_S

#: What a lease has to say of its holder.
HOLDER = {"host": str, "pid": int, "born": (int, float), "sweep_id": str}

#: A process that finished no step for this long, and for so many times its slowest step, hangs; and how long the first
#: step may take, which loads data and compiles.
STALL_S = 300.0
STALL_STEPS = 20
FIRST_STEP_S = 1800.0


class LeaseLostError(Exception):
    """Another process took the trial over: this one was silent for too long."""

    def __init__(self, trial_id: str, number: int):
        super().__init__(trial_id, number)
        self.trial_id, self.number = trial_id, number

    def __str__(self) -> str:
        return f"trial {self.trial_id} was taken over by another process (lease {self.number}); this one leaves it"


class Watch:
    """What one process has seen of other holders, by its own clock."""

    def __init__(self, *, expiry_s: float = EXPIRY_S, clock: Callable[[], float] = time.monotonic):
        self.expiry_s, self.clock = expiry_s, clock
        self._seen: dict[str, tuple[Any, float]] = {}

    def silent(self, trial_id: str, said: Any) -> bool:
        """Whether what is said of a trial is what was said `expiry_s` ago, as far as this process was looking."""
        before, since = self._seen.get(trial_id, (None, 0.0))
        if trial_id not in self._seen or said != before:
            self._seen[trial_id] = (said, self.clock())
            return False
        return self.clock() - since >= self.expiry_s


class Lease:
    """A trial held by this process. A thread says every `beat_s` that it lives, and watches whether it still moves.

    `stop_asked`: whether the sweep that the process works for was asked to stop, as `stop` said at the last beat.

    `stalled` is called, in that thread, with the seconds since the last step once they are more than a step can take: a
    process that hangs in a driver or a collective says nothing by itself.
    """

    def __init__(
        self,
        storage: Storage,
        trial_id: str,
        number: int,
        holder: dict[str, Any],
        *,
        beat_s: float = BEAT_S,
        first_s: float = FIRST_STEP_S,
        stall_s: float = STALL_S,
        stalled: Callable[[float], None] = lambda _seconds: None,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.storage, self.trial_id, self.number, self.holder = storage, trial_id, number, holder
        self.beat_s, self.first_s, self.stall_s, self.stalled = beat_s, first_s, stall_s, stalled
        self.stop = stop
        self.step, self.lost_to, self.stop_asked = 0, 0, False
        self._moved, self._slowest_s, self._moves = time.monotonic(), 0.0, 0
        self._stop, self._beats = threading.Event(), 0
        self._thread = threading.Thread(target=self._live, name=f"helix-lease-{trial_id}", daemon=True)

    def __enter__(self) -> "Lease":
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self.lost_to:
            self.storage.put_json(_key(self.trial_id, self.number), self.holder | {"released": True})

    def moved(self, total_step: int) -> None:
        """Say that `total_step` is finished. Raises LeaseLostError."""
        now = time.monotonic()
        if self._moves:  # the first one also loaded data, restored a checkpoint and compiled
            self._slowest_s = max(self._slowest_s, now - self._moved)
        self.step, self._moved, self._moves = total_step, now, self._moves + 1
        if self.lost_to:
            raise LeaseLostError(self.trial_id, self.lost_to)

    def _live(self) -> None:
        while not self._stop.wait(self.beat_s):
            still_s = time.monotonic() - self._moved
            if still_s > (max(self.stall_s, STALL_STEPS * self._slowest_s) if self._moves > 1 else self.first_s):
                self.stalled(still_s)
            try:
                self._beat()
                newest = _newest(self.storage, self.trial_id)
                self.stop_asked = self.stop_asked or self.stop()
            except OSError as error:  # the storage is away; whether the lease is still held shows when it is back
                logger.warning("trial %s: no heartbeat (%s)", self.trial_id, error)
                continue
            if newest > self.number:
                self.lost_to = newest
                return

    def _beat(self) -> None:
        self._beats += 1
        said = {"attempt_id": self.holder["attempt_id"], "step": self.step, "time": time.time(), "beat": self._beats}
        self.storage.put_json(f"{trial_folder(self.trial_id)}/heartbeat.json", said)


def acquire(
    storage: Storage,
    trial_id: str,
    *,
    attempt_id: str,
    sweep_id: str,
    watch: Watch,
    stalled: Callable[[float], None] = lambda _seconds: None,
) -> Lease | None:
    """The lease of a trial, or None while another process that may be alive holds it."""
    number = _newest(storage, trial_id)
    if number:
        standing = _standing(storage, trial_id, number)
        if not _is_free(storage, trial_id, number, standing, sweep_id=sweep_id, watch=watch):
            return None
    holder = {"attempt_id": attempt_id, "sweep_id": sweep_id, **this_process()}
    if not storage.put_if_absent(_key(trial_id, number + 1), json_bytes(holder)):
        return None
    if _newest(storage, trial_id) > number + 1:  # others were quicker by more than one, and removed this number
        storage.delete(_key(trial_id, number + 1))
        return None
    if number > 1:  # the one that was taken over stays, for its holder to see that it is not the newest
        storage.delete(_key(trial_id, number - 1))
    stop = partial(_stop_asked, storage, sweep_id)
    return Lease(storage, trial_id, number + 1, holder, stalled=stalled, stop=stop)


def _stop_asked(storage: Storage, sweep_id: str) -> bool:
    return asked(storage, sweep_id) is not None


def this_process() -> dict[str, Any]:
    """What tells this process from all others on this machine, also from a later one with its number."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": psutil.Process().create_time()}


def is_held(storage: Storage, trial_id: str) -> bool:
    """Whether somebody may work on a trial: its lease is not released, and its holder is not a dead process of here."""
    number = _newest(storage, trial_id)
    standing = _standing(storage, trial_id, number) if number else None
    if standing is None or standing.get("released"):
        return False
    return not standing or standing["host"] != socket.gethostname() or _lives(standing)


def _is_free(storage: Storage, trial_id: str, number: int, standing: Any, *, sweep_id: str, watch: Watch) -> bool:
    if standing is None or standing.get("released"):
        return True
    here = this_process()
    if standing and standing["host"] == here["host"]:
        return standing["pid"] == here["pid"] or not _lives(standing)
    # Ray starts another worker for a pack only once the one before is gone.
    if standing and standing["sweep_id"] == sweep_id:
        return True
    return watch.silent(trial_id, (number, heartbeat_of(storage, trial_id)))


def _standing(storage: Storage, trial_id: str, number: int) -> dict[str, Any] | None:
    """What a lease says; None where it is gone, nothing where it is damaged: its holder is then known by its beats."""
    try:
        said = storage.get_json(_key(trial_id, number))
    except CorruptObjectError:
        return {}
    if said is None:
        return None
    whole = isinstance(said, dict) and all(isinstance(said.get(name), classes) for name, classes in HOLDER.items())
    return said if whole else {}


def _lives(standing: dict[str, Any]) -> bool:
    """Whether the process that a lease of this machine names is still there."""
    try:
        process = psutil.Process(standing["pid"])
        # One that was killed and that nobody has buried yet has a number and a birthday too.
        return abs(process.create_time() - standing["born"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _newest(storage: Storage, trial_id: str) -> int:
    names = storage.children(f"{trial_folder(trial_id)}/leases")
    return max((int(name[:-5]) for name in names if re.fullmatch(r"\d+\.json", name)), default=0)


def _key(trial_id: str, number: int) -> str:
    return f"{trial_folder(trial_id)}/leases/{number:06d}.json"
