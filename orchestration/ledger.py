"""What is done, running and missing, read from storage and never from memory.

trials/<trial_id>/spec.json                     the resolved spec, with the data manifest and the science version
trials/<trial_id>/attempts/<attempt_id>.json    one process that ran part of it: when, where, how it ended
trials/<trial_id>/leases/000003.json            who may work on it (orchestration/lease.py)
trials/<trial_id>/heartbeat.json                the attempt under way: its step and the time
trials/<trial_id>/metrics/epoch-0007.json       one row per finished epoch
trials/<trial_id>/checkpoints/step-00000070/    all state at a step (helix/training/checkpoint.py)
trials/<trial_id>/best/                         the weights of the best epoch so far
trials/<trial_id>/result.json                   put last and only once: the trial is done
grids/<grid>/                                   what was asked of a grid, and by whom (orchestration/asked.py)
certificates/<certificate_id>.json              what killing a trial again and again changed in it: nothing, or what
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from helix.storage import CorruptObjectError, CorruptRecordError, Storage

#: Where certificates lie (orchestration/certify.py).
CERTIFICATES = "certificates"

#: An attempt that has not been heard of for this long is taken for dead when the state is shown.
SILENCE_S = 120.0

#: What attempts and rows are read for everywhere: the names that have to be there, and how they are measured.
ATTEMPT = {"attempt_id": str, "started": (int, float)}
ROW = {"epoch": int, "step": int}
BEAT = {"attempt_id": str, "time": (int, float), "step": int}

#: Trials that are read side by side: a bucket answers one request in some 20 ms, and many at once as fast.
READERS = 16

Status = Literal["done", "running", "failed", "partial", "missing"]


@dataclass(frozen=True, kw_only=True)
class TrialState:
    """What storage knows of one trial. Accuracies are fractions, times are Unix seconds.

    `status`: "done" (a result is stored), "running" (an attempt is under way and was heard of lately), "failed" (the
    last attempt ended with an error), "partial" (begun, and nobody works on it), "missing" (nothing yet).
    `step` counts optimiser steps, finished epochs or not. `heard` is when the last attempt was last heard of.
    `best` is the best test accuracy so far where `rows` are only the last ones, None where they are all.
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
    best: float | None = None


def read_all(
    storage: Storage,
    trial_ids: Iterable[str],
    *,
    now: float,
    known: Mapping[str, TrialState] = MappingProxyType({}),
    recent: int | None = None,
) -> dict[str, TrialState]:
    """The states of many trials. Of those that nobody began, nothing is asked but one listing of all that were.

    `known`: what an earlier call gave; what cannot have changed since is not read again. `recent`: see `read`.
    """
    begun, wanted = set(storage.children("trials")), list(trial_ids)
    some = [name for name in wanted if name in begun]
    with ThreadPoolExecutor(READERS) as readers:
        found = readers.map(lambda name: read(storage, name, now=now, known=known.get(name), recent=recent), some)
        states = dict(zip(some, found, strict=True))
    return {name: states.get(name) or TrialState(trial_id=name, status="missing") for name in wanted}


def read(
    storage: Storage, trial_id: str, *, now: float, known: TrialState | None = None, recent: int | None = None
) -> TrialState:
    """The state of one trial at the time `now`: one listing of its folder, and a request for each thing that is needed.

    `known`: an earlier state of it, whose rows and ended attempts are not read again. `recent`: of a trial that is not
    done, only so many of its last rows are read, where the manifest of its best weights tells the best accuracy.

    CorruptRecordError names what was damaged; a damaged heartbeat is none, for nothing is lost with it.
    """
    folder = f"trials/{trial_id}"
    keys = set(storage.keys(folder))
    done = f"{folder}/result.json" in keys
    if done and known is not None and known.status == "done":
        return known
    result = _result(storage, f"{folder}/result.json") if done else None
    attempts = _attempts(storage, keys, folder, known)
    best = None
    if result is not None:
        attempts = _closed(attempts, result)
        rows = result["rows"]
        epochs_done, step = len(rows), rows[-1]["step"]
        status, error, heard = "done", None, result.get("finished")
    else:
        row_keys = sorted(key for key in keys if key.startswith(f"{folder}/metrics/"))
        # A trial that has fewer rows than before was begun anew.
        same = known if known is not None and known.epochs_done <= len(row_keys) else None
        if recent is not None and len(row_keys) > recent:
            unmoved = same is not None and same.best is not None and same.epochs_done == len(row_keys)
            best = same.best if unmoved and same is not None else _best(storage, keys, folder)
        wanted = row_keys if best is None or recent is None else row_keys[-recent:]
        rows = _rows(storage, wanted, same)
        epochs_done = len(row_keys) if best is not None else len(rows)
        heartbeat = heartbeat_of(storage, trial_id) if f"{folder}/heartbeat.json" in keys else {}
        step = max(heartbeat.get("step", 0), rows[-1]["step"] if rows else 0)
        status, error = _status(attempts, heartbeat, begun=bool(rows or step), now=now)
        heard = _heard(attempts[-1], heartbeat) if attempts else None
    return TrialState(
        trial_id=trial_id,
        status=status,
        epochs_done=epochs_done,
        step=step,
        rows=tuple(rows),
        attempts=tuple(attempts),
        result=result,
        error=error,
        heard=heard,
        best=best,
    )


def heartbeat_of(storage: Storage, trial_id: str) -> dict[str, Any]:
    """The last heartbeat of a trial; empty where there is none, or none that can be read: the next one replaces it."""
    try:
        beat = storage.get_json(f"trials/{trial_id}/heartbeat.json")
    except CorruptObjectError:
        return {}
    said = beat if isinstance(beat, dict) else {}
    return {name: value for name, value in said.items() if isinstance(value, BEAT.get(name, object))}


def checked(key: str, value: Any, needed: Mapping[str, Any]) -> Any:
    """`value` as it was read from `key`: None, or an object with what is `needed`, else CorruptRecordError."""
    if value is not None and (lacking := _lacking(value, needed)) is not None:
        raise CorruptRecordError(key, lacking)
    return value


def _lacking(value: Any, needed: Mapping[str, Any]) -> str | None:
    """Why `value` is no JSON object with values of these classes, None where it is one."""
    if not isinstance(value, dict):
        return f"is no JSON object but {type(value).__name__}"
    for name, classes in needed.items():
        if not isinstance(value.get(name), classes):
            return f"has {value.get(name)!r:.60} for {name}" if name in value else f"has no {name}"
    return None


def _result(storage: Storage, key: str) -> dict[str, Any] | None:
    """A result whose rows can be read; None where it was deleted meanwhile."""
    result = checked(key, storage.get_json(key), {"rows": list})
    if result is not None and not result["rows"]:
        raise CorruptRecordError(key, "has no rows")
    for row in result["rows"] if result is not None else ():
        checked(key, row, ROW)
    return result


def attempts_at(storage: Storage, trial_id: str) -> list[dict[str, Any]]:
    """All attempts at a trial, oldest first.

    By the numbers of their leases, which only grow: the clocks of the machines that they ran on may disagree.
    """
    folder = f"trials/{trial_id}"
    return _attempts(storage, set(storage.keys(f"{folder}/attempts")), folder, None)


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
    places = [f"{CERTIFICATES}/{name}" for name in names]
    values = (checked(place, storage.get_json(place), {"certificate_id": str}) for place in places)
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


def _attempts(storage: Storage, keys: Set[str], folder: str, known: TrialState | None) -> list[dict[str, Any]]:
    """All attempts, oldest first. One that ended and was followed by another does not change any more."""
    settled = {one["attempt_id"]: one for one in (known.attempts if known else ())[:-1] if "ended" in one}
    found = []
    for key in sorted(key for key in keys if key.startswith(f"{folder}/attempts/")):
        attempt = settled.get(key.rpartition("/")[2].removesuffix(".json")) or checked(
            key, storage.get_json(key), ATTEMPT
        )
        if attempt is not None:  # deleted meanwhile
            found.append(attempt)
    # Leases are numbered and their numbers only grow; the clocks of the machines may disagree.
    return sorted(found, key=lambda attempt: (attempt.get("lease", 0), attempt["started"]))


def _rows(storage: Storage, keys: Sequence[str], known: TrialState | None) -> list[dict[str, Any]]:
    """The rows of these keys, by epoch. Those that are known stand."""
    before = {row["epoch"]: row for row in (known.rows if known else ())}
    values = (before.get(int(key[-9:-5])) or checked(key, storage.get_json(key), ROW) for key in keys)
    return [value for value in values if value is not None]


def _best(storage: Storage, keys: Set[str], folder: str) -> float | None:
    """The best test accuracy so far, if the manifest of the best weights tells that one; else the rows have to."""
    key = f"{folder}/best/manifest.json"
    try:
        manifest = storage.get_json(key) if key in keys else None
    except CorruptObjectError:
        return None
    body = manifest.get("body", manifest) if isinstance(manifest, dict) else {}  # as they were put before 2026-11-23
    told = _lacking(body, {"metric": str, "value": (int, float)}) is None and body["metric"] == "test_accuracy"
    return body["value"] if told else None
