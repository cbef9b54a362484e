"""Asking a running sweep to stop, through the storage: workers save at their next step and leave; nothing is lost.

sweeps/<sweep_id>/stop.json     why, and since when
"""

import time
from typing import Any

from helix.storage import Storage, json_bytes


def ask(storage: Storage, sweep_id: str, reason: str) -> None:
    """Ask the workers of one sweep to save and leave. The first reason stands."""
    storage.put_if_absent(_key(sweep_id), json_bytes({"reason": reason, "time": time.time()}))


def asked(storage: Storage, sweep_id: str) -> str | None:
    """Why the sweep was asked to stop, None where nobody asked."""
    said: Any = storage.get_json(_key(sweep_id))
    return None if said is None else said["reason"]


def _key(sweep_id: str) -> str:
    return f"sweeps/{sweep_id}/stop.json"
