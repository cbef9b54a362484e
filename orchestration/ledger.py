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

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from helix.storage import CorruptObjectError, Storage
from orchestration.records import ATTEMPT, BEAT, CERTIFICATE, NUMBER, ROW, TEXT, checked, checked_result, lacking

#: Where certificates lie (orchestration/certify.py).
CERTIFICATES = "certificates"

#: Who has not been heard of for this long is dead: where the state is shown, and where its lease is taken over.
SILENCE_S = 60.0

#: What files of a trial are called; others in its folders are somebody's own and are not read.
TRIAL_ID = r"[0-9a-f]{16}"
ROW_KEY = r".*/metrics/epoch-(\d+)\.json"
ATTEMPT_KEY = r".*/attempts/([^/.][^/]*)\.json"

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
    `damage`: what of it is damaged where it is stored and was left out, key and reason, a line each. A trial whose
    result is damaged has none: it is "failed", and the `error` is why.
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
    damage: tuple[str, ...] = ()


class Records:
    """Reads records. A damaged one raises CorruptObjectError, or with `tolerant` is noted in `damage` and left out."""

    def __init__(self, storage: Storage, *, tolerant: bool):
        self.storage, self.tolerant = storage, tolerant
        self.damage: list[str] = []

    def get(self, key: str, check: Callable[[str, Any], Any]) -> Any:
        """The record at `key` as `check` gives it; None where there is none, or none that can be read."""
        try:
            return check(key, self.storage.get_json(key))
        except CorruptObjectError as error:
            if not self.tolerant:
                raise
            self.damage.append(f"{error.key}: {error.reason}")
            return None


def begun_trials(storage: Storage) -> list[str]:
    """The trials that anything is stored of; what others leave beside them (.DS_Store) is no trial."""
    return [name for name in storage.children("trials") if re.fullmatch(TRIAL_ID, name)]


def read_all(
    storage: Storage,
    trial_ids: Iterable[str],
    *,
    now: float,
    known: Mapping[str, TrialState] = MappingProxyType({}),
    recent: int | None = None,
    tolerant: bool = False,
) -> dict[str, TrialState]:
    """The states of many trials. Of those that nobody began, nothing is asked but one listing of all that were.

    `known`: what an earlier call gave; what cannot have changed since is not read again. `recent`, `tolerant`: see
    `read`.
    """
    begun, wanted = set(storage.children("trials")), list(trial_ids)
    some = [name for name in wanted if name in begun]
    with ThreadPoolExecutor(READERS) as readers:
        how: Any = {"now": now, "recent": recent, "tolerant": tolerant}
        found = readers.map(lambda name: read(storage, name, known=known.get(name), **how), some)
        states = dict(zip(some, found, strict=True))
    return {name: states.get(name) or TrialState(trial_id=name, status="missing") for name in wanted}


def read(
    storage: Storage,
    trial_id: str,
    *,
    now: float,
    known: TrialState | None = None,
    recent: int | None = None,
    tolerant: bool = False,
) -> TrialState:
    """The state of one trial at the time `now`: one listing of its folder, and a request for each thing that is needed.

    `known`: an earlier state of it, whose rows and ended attempts are not read again. `recent`: of a trial that is not
    done, only so many of its last rows are read, where the manifest of its best weights tells the best accuracy.

    CorruptRecordError names what was damaged, or with `tolerant` the state does and tells the rest. A damaged heartbeat
    is none, for nothing is lost with it.
    """
    folder = f"trials/{trial_id}"
    keys = set(storage.keys(folder))
    done = f"{folder}/result.json" in keys
    if done and known is not None and known.status == "done" and not known.damage:
        return known
    records = Records(storage, tolerant=tolerant)
    result = records.get(f"{folder}/result.json", checked_result) if done else None
    broken = records.damage[-1] if records.damage else None
    attempts = _attempts(records, keys, folder, known)
    best = None
    if result is not None:
        attempts = _closed(attempts, result)
        rows = result["rows"]
        epochs_done, step = len(rows), rows[-1]["step"]
        status, error, heard = "done", None, result.get("finished")
    else:
        row_keys = sorted(key for key in keys if re.fullmatch(ROW_KEY, key) and key.startswith(f"{folder}/metrics/"))
        # A trial that has fewer rows than before was begun anew.
        same = known if known is not None and known.epochs_done <= len(row_keys) else None
        if recent is not None and len(row_keys) > recent:
            unmoved = same is not None and same.best is not None and same.epochs_done == len(row_keys)
            best = same.best if unmoved and same is not None else _best(storage, keys, folder)
        wanted = row_keys if best is None or recent is None else row_keys[-recent:]
        rows = _rows(records, wanted, same)
        epochs_done = len(row_keys) if best is not None else len(rows)
        heartbeat = heartbeat_of(storage, trial_id) if f"{folder}/heartbeat.json" in keys else {}
        step = max(heartbeat.get("step", 0), rows[-1]["step"] if rows else 0)
        status, error = _status(attempts, heartbeat, begun=bool(rows or step), now=now)
        if broken is not None:
            status, error = "failed", broken
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
        damage=tuple(records.damage),
    )


def heartbeat_of(storage: Storage, trial_id: str) -> dict[str, Any]:
    """The last heartbeat of a trial; empty where there is none, or none that can be read: the next one replaces it."""
    try:
        beat = storage.get_json(f"trials/{trial_id}/heartbeat.json")
    except CorruptObjectError:
        return {}
    said = beat if isinstance(beat, dict) else {}
    return {name: value for name, value in said.items() if name not in BEAT or BEAT[name].holds(value)}


def attempts_at(storage: Storage, trial_id: str) -> list[dict[str, Any]]:
    """All attempts at a trial, oldest first.

    By the numbers of their leases, which only grow: the clocks of the machines that they ran on may disagree.
    """
    folder = f"trials/{trial_id}"
    return _attempts(Records(storage, tolerant=False), set(storage.keys(f"{folder}/attempts")), folder, None)


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
    return read_certificates(Records(storage, tolerant=False))


def read_certificates(records: Records) -> list[dict[str, Any]]:
    """The same by way of `records`."""
    names = [name for name in records.storage.children(CERTIFICATES) if re.fullmatch(r"[^.].*\.json", name)]
    values = (records.get(f"{CERTIFICATES}/{name}", partial(checked, fields=CERTIFICATE)) for name in names)
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


def _attempts(records: Records, keys: Set[str], folder: str, known: TrialState | None) -> list[dict[str, Any]]:
    """All attempts, oldest first. One that ended and was followed by another does not change any more."""
    settled = {one["attempt_id"]: one for one in (known.attempts if known else ())[:-1] if "ended" in one}
    found = []
    for key in sorted(key for key in keys if key.startswith(f"{folder}/attempts/")):
        if (named := re.fullmatch(ATTEMPT_KEY, key)) is None:
            continue
        attempt = settled.get(named[1]) or records.get(key, partial(checked, fields=ATTEMPT))
        if attempt is not None:  # deleted meanwhile
            found.append(attempt)
    # Leases are numbered and their numbers only grow; the clocks of the machines may disagree.
    return sorted(found, key=lambda attempt: (attempt.get("lease", 0), attempt["started"]))


def _rows(records: Records, keys: Sequence[str], known: TrialState | None) -> list[dict[str, Any]]:
    """The rows of these keys, by epoch. Those that are known stand."""
    before = {row["epoch"]: row for row in (known.rows if known else ())}
    values = (before.get(int(key[-9:-5])) or records.get(key, partial(checked, fields=ROW)) for key in keys)
    return [value for value in values if value is not None]


def _best(storage: Storage, keys: Set[str], folder: str) -> float | None:
    """The best test accuracy so far, if the manifest of the best weights tells that one; else the rows have to."""
    key = f"{folder}/best/manifest.json"
    try:
        manifest = storage.get_json(key) if key in keys else None
    except CorruptObjectError:
        return None
    body = manifest.get("body", manifest) if isinstance(manifest, dict) else {}  # as they were put before 2026-11-23
    told = lacking(body, {"metric": TEXT, "value": NUMBER}) is None and body["metric"] == "test_accuracy"
    return body["value"] if told else None
