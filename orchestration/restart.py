"""Restart a trial at step 0 by hand: what it has is moved aside, and the next sweep trains it from the start."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from helix.storage import Storage
from helix.training.trainer import trial_folder
from orchestration.lease import EXPIRY_S, Lease, Watch, acquire
from orchestration.ledger import is_done

#: What a restarted trial must not find. Its attempts stay: they say what it cost.
MOVED = ("checkpoints", "metrics", "best")

#: Seconds between two looks at a holder: no shorter than its heart beats.
LOOK_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Aside:
    """What was moved, and where to."""

    keys: tuple[str, ...]
    folder: str


def restart(
    storage: Storage,
    trial_id: str,
    *,
    say: Callable[[str], None],
    expiry_s: float = EXPIRY_S,
    look_s: float = LOOK_S,
) -> Aside:
    """Move the checkpoints, rows and best weights of a trial aside, saying what it does before it does it.

    Raises ValueError where there is no such trial, where it is done, or where a process works on it.
    """
    folder = trial_folder(trial_id)
    if not storage.children(folder):
        raise ValueError(f"there is no trial {trial_id} in {storage!r}")
    if is_done(storage, trial_id):
        raise ValueError(f"trial {trial_id} is done; a result is never trained again, use another --storage for that")
    with _held(storage, trial_id, say=say, expiry_s=expiry_s, look_s=look_s):
        keys = [key for name in MOVED for key in storage.keys(f"{folder}/{name}")]
        aside = f"{folder}/aside/{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        say(f"moving {len(keys)} files of trial {trial_id} to {aside}; the next sweep trains it from step 0")
        # Manifests go first: a checkpoint without one does not exist, so half of this is no half checkpoint.
        for key in sorted(keys, key=lambda key: not key.endswith("manifest.json")):
            storage.put(f"{aside}/{key.removeprefix(f'{folder}/')}", storage.get(key))
            storage.delete(key)
        for name in MOVED:  # what killed writers left
            storage.delete_folder(f"{folder}/{name}")
        storage.delete(f"{folder}/heartbeat.json")
    return Aside(keys=tuple(keys), folder=aside)


def _held(storage: Storage, trial_id: str, *, say: Callable[[str], None], expiry_s: float, look_s: float) -> Lease:
    """The lease of the trial, so that nobody works on it meanwhile. Raises ValueError while another one lives."""
    watch, heartbeat = Watch(expiry_s=expiry_s), f"{trial_folder(trial_id)}/heartbeat.json"
    first, deadline = storage.get_json(heartbeat), time.monotonic() + 2 * expiry_s + 2 * look_s
    named = f"restart-{uuid.uuid4().hex[:8]}"
    told = False
    while time.monotonic() < deadline:
        lease = acquire(storage, trial_id, attempt_id=named, sweep_id=named, watch=watch)
        if lease is not None:
            return lease
        if not told:
            say(f"another process holds trial {trial_id}; looking for up to {expiry_s:.0f} s whether it lives")
            told = True
        time.sleep(look_s)
        if storage.get_json(heartbeat) != first:
            break
    raise ValueError(f"a living process works on trial {trial_id}; stop its sweep first, then restart it")
