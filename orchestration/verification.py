"""Reads back everything that is stored and lists what is not as it was written."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from helix.data.shards import prepared_prefixes, verify
from helix.storage import CorruptObjectError, Storage, json_bytes
from helix.training.checkpoint import committed, damage, load_best
from orchestration.asked import GRIDS
from orchestration.ledger import CERTIFICATES, begun_trials
from orchestration.preprocessing import FACTS, summary
from orchestration.records import CERTIFICATE, lacking, unsealed

#: The files of a trial (orchestration/ledger.py) that are JSON by themselves, and those that a manifest vouches for;
#: what `helix restart` moved aside has the same names.
ASIDE = r"(aside/[^/]+/)?"
WEIGHTS = rf"{ASIDE}(checkpoints/[^/]+|best)/[^/]+\.(safetensors|json)"
FILES = rf"spec\.json|result\.json|heartbeat\.json|leases/\d+\.json|attempts/[^/]+\.json|{ASIDE}metrics/epoch-\d+\.json"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was read: `sound` and `unfinished` name what is in order, `damaged` has key and reason, a line each."""

    sound: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def verify_storage(
    storage: Storage, dataset: str | None = None, *, say: Callable[[str], None] = lambda _line: None
) -> Verified:
    """Verify all prepared data, or that of one data set; without `dataset` also the trials with their checkpoints.

    `say` hears of each thing as it is begun.
    """
    found = Verified()
    for prefix in prepared_prefixes(storage, dataset):
        say(prefix)
        prepared, problems = verify(storage, prefix)
        found.damaged.extend(problems)
        if prepared is not None and not problems:
            found.sound.append(f"{prefix}: {summary(prepared)}")
        elif not problems:
            found.unfinished.append(f"{prefix}: its preparation was never finished; helix prepare goes on with it")
    plans = [key for key in storage.keys(GRIDS) if key.endswith("/plan.json")] if dataset is None else []
    for key in [*storage.keys(FACTS), *plans] if dataset is None else []:
        value, unreadable = _read_json(storage, key)
        wrong = None if unreadable else unsealed(value)
        found.damaged.extend(unreadable if wrong is None else [f"{key}: {wrong}"])
    for key in storage.keys(CERTIFICATES) if dataset is None else []:
        if key.endswith(".json"):
            value, unreadable = _read_json(storage, key)
            wrong = None if unreadable else lacking(value, CERTIFICATE)
            found.damaged.extend(unreadable if wrong is None else [f"{key}: {wrong}"])
    for trial_id in begun_trials(storage) if dataset is None else []:
        say(f"trials/{trial_id}")
        problems = _trial_problems(storage, trial_id)
        found.damaged.extend(problems)
        if not problems:
            found.sound.append(f"trials/{trial_id}")
    return found


def _trial_problems(storage: Storage, trial_id: str) -> list[str]:
    """What is damaged of a trial, a line each: every file that it has is read."""
    folder = f"trials/{trial_id}"
    problems: list[str] = []
    values: dict[str, Any] = {}
    keys = list(storage.keys(folder))
    asides = sorted({"/".join(key.split("/")[:4]) for key in keys if key.startswith(f"{folder}/aside/")})
    for key in keys:
        name = key.removeprefix(f"{folder}/")
        if re.fullmatch(WEIGHTS, name):  # a manifest tells whether they are whole
            continue
        if name.rpartition("/")[2].startswith("."):  # what file browsers leave (.DS_Store); nothing reads it
            continue
        if not re.fullmatch(FILES, name):
            problems.append(f"{key}: is none of the files that a trial has")
            continue
        value, unreadable = _read_json(storage, key)
        problems += unreadable
        if not unreadable and (value is not None or storage.exists(key)):  # a trial that runs replaces its leases
            values[name] = value
    for name, value in values.items():
        wrong = _wrong(name, value, trial_id)
        if wrong is not None:
            problems.append(f"{folder}/{name}: {wrong}")
    needing = [name for name in ("result.json", "metrics", "checkpoints", "best") if _has(keys, f"{folder}/{name}")]
    if needing and f"{folder}/spec.json" not in keys:
        problems.append(f"{folder}/spec.json: is not there beside {', '.join(needing)}")
    for root in (folder, *asides):
        for step in committed(storage, f"{root}/checkpoints"):
            problems += _told(f"{root}/checkpoints/{step}", lambda place: damage(storage, place, trial_id))
    # A process that died while it wrote better weights leaves new ones beside the old manifest; going on mends that.
    if f"{folder}/result.json" in keys and storage.exists(f"{folder}/best/manifest.json"):
        problems += _told(f"{folder}/best", lambda place: _best_damage(storage, place))
    return problems


def _read_json(storage: Storage, key: str) -> tuple[Any, list[str]]:
    """The JSON value of `key`, or a line about why there is none."""
    try:
        return storage.get_json(key), []
    except CorruptObjectError as error:
        return None, [f"{key}: {error.reason}"]


def _wrong(name: str, value: Any, trial_id: str) -> str | None:
    """Why `value` is not what the file `name` of a trial holds, None where it may be."""
    if not isinstance(value, dict):
        return "is no JSON object"
    if name == "spec.json":
        return None if _names(trial_id, value) else f"is not the spec that {trial_id} is the hash of"
    if name == "result.json":
        of = value.get("trial_id")
        return unsealed(value) or (None if of == trial_id else f"is of trial {of}")
    place, _, stem = name.removesuffix(".json").rpartition("/")
    if place.endswith("metrics") and stem != f"epoch-{value.get('epoch')!s:0>4}":
        return f"is the row of epoch {value.get('epoch')}"
    if place.endswith("attempts") and stem != value.get("attempt_id"):
        return f"is of attempt {value.get('attempt_id')}"
    return None


def _best_damage(storage: Storage, place: str) -> str | None:
    try:
        load_best(storage, place.removesuffix("/best"))
    except ValueError as error:
        return str(error)
    return None


def _told(place: str, find: Callable[[str], str | None]) -> list[str]:
    """The line about `place`, if `find` knows of a damage."""
    try:
        reason = find(place)
    except CorruptObjectError as error:
        reason = f"{error.key} {error.reason}"
    return [] if reason is None else [f"{place}: {reason}"]


def _has(keys: list[str], place: str) -> bool:
    return any(key == place or key.startswith(f"{place}/") for key in keys)


def _names(trial_id: str, described: object) -> bool:
    """Whether a trial's identity gives its name (helix.spec.trial_id)."""
    if not isinstance(described, dict):
        return False
    identity = {key: value for key, value in described.items() if key != "trial_id"}
    try:
        named = hashlib.sha256(json_bytes(identity)).hexdigest()[:16]
    except ValueError:  # a number that is none
        return False
    return named == trial_id == described.get("trial_id")
