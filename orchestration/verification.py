"""Reads back everything that is stored and lists what is not as it was written."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from helix.data.shards import prepared_prefixes, verify
from helix.storage import CorruptObjectError, Storage, json_bytes
from helix.training.checkpoint import committed, damage
from orchestration.preprocessing import summary


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
    for trial_id in storage.children("trials") if dataset is None else []:
        say(f"trials/{trial_id}")
        problems = _trial_problems(storage, trial_id)
        found.damaged.extend(problems)
        if not problems:
            found.sound.append(f"trials/{trial_id}")
    return found


def _trial_problems(storage: Storage, trial_id: str) -> list[str]:
    folder = f"trials/{trial_id}"
    problems = []
    for key in storage.keys(folder):
        if not key.endswith(".json") or key.startswith(f"{folder}/checkpoints/"):
            continue
        try:
            value = storage.get_json(key)
        except CorruptObjectError as error:
            problems.append(f"{key}: {error.reason}")
            continue
        except ValueError as error:
            problems.append(f"{key}: is not JSON ({error})")
            continue
        if key == f"{folder}/spec.json" and not _names(trial_id, value):
            problems.append(f"{key}: is not the spec that {trial_id} is the hash of")
    for step in committed(storage, f"{folder}/checkpoints"):
        reason = damage(storage, f"{folder}/checkpoints/{step}", trial_id)
        if reason is not None:
            problems.append(f"{folder}/checkpoints/{step}: {reason}")
    return problems


def _names(trial_id: str, described: object) -> bool:
    """Whether a trial's identity gives its name (helix.spec.trial_id)."""
    if not isinstance(described, dict):
        return False
    identity = {key: value for key, value in described.items() if key != "trial_id"}
    return hashlib.sha256(json_bytes(identity)).hexdigest()[:16] == trial_id == described.get("trial_id")
