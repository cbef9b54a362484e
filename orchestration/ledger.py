"""What is done, running and missing, read from storage and never from memory.

trials/<trial_id>/spec.json                     the resolved spec, with the data manifest and the science version
trials/<trial_id>/attempts/<attempt_id>.json    one process that ran part of it: when, where, how it ended
trials/<trial_id>/leases/000003.json            who may work on it (orchestration/lease.py)
trials/<trial_id>/heartbeat.json                the attempt under way: its step and the time
trials/<trial_id>/metrics/epoch-0007.json       one row per finished epoch
trials/<trial_id>/checkpoints/step-00000070/    all state at a step (helix/training/checkpoint.py)
trials/<trial_id>/best/                         the weights of the best epoch so far
trials/<trial_id>/result.json                   put last and only once: the trial is done
certificates/<certificate_id>.json              what killing a trial again and again changed in it: nothing, or what
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from helix.storage import Storage

#: Where certificates lie (orchestration/certify.py).
CERTIFICATES = "certificates"

#: An attempt that has not been heard of for this long is taken for dead when the state is shown.
SILENCE_S = 120.0

#: Trials that are read side by side: a bucket answers one request in some 20 ms, and many at once as fast.
READERS = 16

Status = Literal["done", "running", "failed", "partial", "missing"]


@dataclass(frozen=True, kw_only=True)
class TrialState:
    """What storage knows of one trial. Accuracies are fractions, times are Unix seconds.

    `status`: "done" (a result is stored), "running" (an attempt is under way and was heard of lately), "failed" (the
    last attempt ended with an error), "partial" (begun, and nobody works on it), "missing" (nothing yet).
    `step` counts optimiser steps, finished epochs or not. `heard` is when the last attempt was last heard of.
    """

    trial_id: str
    status: Status
    epochs_done: int = 0
    step: int = 0
    rows: tuple[dict[str, Any], ...] = ()
    attempts: tuple[dict[str, Any], ...] = ()
    result: dict[str, Any] | None = field(default=None, repr=False)
    error: str | None = None
    heard: float | None = None


def read_all(storage: Storage, trial_ids: Iterable[str], *, now: float) -> dict[str, TrialState]:
    """The states of many trials. Of those that nobody began, nothing is asked but one listing of all that were."""
    begun, wanted = set(storage.children("trials")), list(trial_ids)
    some = [name for name in wanted if name in begun]
    with ThreadPoolExecutor(READERS) as readers:
        states = dict(zip(some, readers.map(lambda name: read(storage, name, now=now), some), strict=True))
    return {name: states.get(name) or TrialState(trial_id=name, status="missing") for name in wanted}


def read(storage: Storage, trial_id: str, *, now: float) -> TrialState:
    """The state of one trial at the time `now`."""
    folder = f"trials/{trial_id}"
    result = storage.get_json(f"{folder}/result.json")
    attempts = attempts_at(storage, trial_id)
    if result is not None:
        rows = result["rows"]
        attempts = _closed(attempts, result)
        step = rows[-1]["step"]
        status, error, heard = "done", None, result.get("finished")
    else:
        rows = _all(storage, f"{folder}/metrics")
        heartbeat = storage.get_json(f"{folder}/heartbeat.json") or {}
        step = max(heartbeat.get("step", 0), rows[-1]["step"] if rows else 0)
        status, error = _status(attempts, heartbeat, begun=bool(rows or step), now=now)
        heard = _heard(attempts[-1], heartbeat) if attempts else None
    return TrialState(
        trial_id=trial_id,
        status=status,
        epochs_done=len(rows),
        step=step,
        rows=tuple(rows),
        attempts=tuple(attempts),
        result=result,
        error=error,
        heard=heard,
    )


def attempts_at(storage: Storage, trial_id: str) -> list[dict[str, Any]]:
    """All attempts at a trial, oldest first.

    By the numbers of their leases, which only grow: the clocks of the machines that they ran on may disagree.
    """
    found = _all(storage, f"trials/{trial_id}/attempts")
    return sorted(found, key=lambda attempt: (attempt.get("lease", 0), attempt["started"]))


def _closed(attempts: list[dict[str, Any]], result: dict[str, Any]) -> list[dict[str, Any]]:
    """The attempts at a trial that is done, those with an end that nobody lived to write down.

    A process that is killed right after it put the result leaves an attempt without an end, which no later one closes.
    """
    closed, found = [], any(attempt.get("outcome") == "done" for attempt in attempts)
    for attempt in reversed(attempts):
        if "ended" not in attempt:
            ended = max(attempt["started"], result.get("finished", 0.0))
            attempt, found = attempt | {"ended": ended, "outcome": "lost" if found else "done"}, True
        closed.append(attempt)
    return closed[::-1]


def certificates(storage: Storage) -> list[dict[str, Any]]:
    """The certificates in storage, oldest first."""
    names = [name for name in storage.children(CERTIFICATES) if name.endswith(".json")]
    values = (storage.get_json(f"{CERTIFICATES}/{name}") for name in names)
    return [value for value in values if value is not None]


def is_done(storage: Storage, trial_id: str) -> bool:
    """Whether a result is stored."""
    return storage.exists(f"trials/{trial_id}/result.json")


def _status(
    attempts: list[dict[str, Any]], heartbeat: dict[str, Any], *, begun: bool, now: float
) -> tuple[Status, str | None]:
    if not attempts:
        return ("partial" if begun else "missing"), None
    last = attempts[-1]
    if last.get("outcome") == "failed":
        return "failed", last.get("error")
    if "ended" not in last and now - _heard(last, heartbeat) < SILENCE_S:
        return "running", None
    return "partial", None


def _heard(last: dict[str, Any], heartbeat: dict[str, Any]) -> float:
    """When the last attempt was last heard of."""
    beat = heartbeat.get("time", 0.0) if heartbeat.get("attempt_id") == last["attempt_id"] else 0.0
    return max(last["started"], beat)


def _all(storage: Storage, prefix: str) -> list[dict[str, Any]]:
    """The JSON values under a folder, by name; a key that is deleted meanwhile is left out."""
    values = (storage.get_json(key) for key in storage.keys(prefix))
    return [value for value in values if value is not None]
