"""What the records of trials have to hold, in one place: every field that is read anywhere, and of which kind it is.

A record that does not is damaged, and `CorruptRecordError` names its key and the field. So is one whose checksum is
not its own; results from before they had one stay readable.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from helix.storage import CorruptRecordError, is_sealed


@dataclass(frozen=True)
class Kind:
    """A kind of values: in words, and whether one is of it. `needed`: whether a record has to have it."""

    what: str
    holds: Callable[[Any], bool]
    needed: bool = True


def optional(kind: Kind) -> Kind:
    """It may be left out; where it stands it is of this kind."""
    return replace(kind, needed=False)


def unknown_or(kind: Kind) -> Kind:
    """It may be left out, and null says that it is not known."""
    return Kind(f"{kind.what} or null", lambda value: value is None or kind.holds(value), needed=False)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tuples_of(length: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == length and all(map(_is_count, value))


def _all(item: Kind) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(item.holds, value.values()))


COUNT = Kind("a whole number, 0 or more", _is_count)
NUMBER = Kind("a finite number", _is_number)
FRACTION = Kind("a fraction from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
HITS = Kind("two whole numbers: clips that were right, and clips", _tuples_of(2))
CONFUSION = Kind(
    "a list of [label, predicted, clips]",
    lambda value: isinstance(value, list) and all(map(_tuples_of(3), value)),
)
FRACTIONS = Kind("fractions from 0 to 1 by their names", _all(unknown_or(FRACTION)))
NUMBERS = Kind("finite numbers by their names", _all(NUMBER))

Fields = Mapping[str, Kind]

#: An epoch that is finished (helix/training/trainer.py).
ROW: Fields = {
    "epoch": COUNT,
    "step": COUNT,
    "test_accuracy": FRACTION,
    "seconds": NUMBER,
    "time": NUMBER,
    "train_loss": optional(NUMBER),
    "train_accuracy": optional(NUMBER),
    "test_loss": optional(NUMBER),
    "validation_accuracy": optional(FRACTION),
    "validation_loss": optional(NUMBER),
    "lr": optional(NUMBER),
    "test_half_a": optional(HITS),
    "test_half_b": optional(HITS),
    "system": optional(NUMBERS),
}

#: One process that worked on a trial (orchestration/worker.py). Without an end it is under way, or was lost.
ATTEMPT: Fields = {
    "attempt_id": TEXT,
    "started": NUMBER,
    "ended": optional(NUMBER),
    "outcome": optional(TEXT),
    "error": optional(TEXT),
    "error_kind": optional(TEXT),
    "sweep_id": optional(TEXT),
    "lease": optional(COUNT),
    "host": optional(TEXT),
    "device": optional(TEXT),
    "device_name": optional(TEXT),
    "device_bytes": optional(COUNT),
    "peak_bytes": optional(COUNT),
    "threads": optional(COUNT),
    "ranks": optional(COUNT),
    "step": optional(COUNT),
    "from_step": optional(COUNT),
    "kept_step": optional(COUNT),
    "micro_batch": unknown_or(COUNT),
    "instance_type": unknown_or(TEXT),
    "market": unknown_or(TEXT),
    "gpus": optional(NUMBER),
    "share": optional(NUMBER),
    "code": optional(OBJECT),
}

#: A trial that is done (helix/training/trainer.py). Its rows are looked at one by one.
RESULT: Fields = {
    "rows": LIST,
    "accuracy": FRACTIONS,
    "finished": NUMBER,
    "best_epoch": optional(OBJECT),
    "classes": optional(COUNT),
    "parameters": unknown_or(COUNT),
    "tokens": unknown_or(COUNT),
    "train_clips": unknown_or(COUNT),
    "test_clips": unknown_or(COUNT),
    "train_seconds": unknown_or(NUMBER),
    "confusion": optional(CONFUSION),
    "selected_confusion": optional(CONFUSION),
    "selected_epoch": optional(COUNT),
    "weights_sha256": optional(TEXT),
    "device": unknown_or(TEXT),
    "scan": unknown_or(TEXT),
    "ranks": unknown_or(COUNT),
    "versions": unknown_or(OBJECT),
}

BEAT: Fields = {"attempt_id": TEXT, "time": NUMBER, "step": COUNT}
CERTIFICATE: Fields = {"certificate_id": TEXT}
DRIVER: Fields = {
    "time": NUMBER,
    "waiting": TEXT,
    "began": optional(NUMBER),
    "ended": optional(NUMBER),
    "stopped": unknown_or(TEXT),
}


def checked(key: str, value: Any, fields: Fields) -> Any:
    """`value` as it was read from `key`: None, or an object with these `fields`, else CorruptRecordError."""
    if value is not None and (wrong := lacking(value, fields)) is not None:
        raise CorruptRecordError(key, wrong)
    return value


def checked_result(key: str, value: Any) -> Any:
    """A result as it was read from `key`, its seal where it has one, its fields and its rows; None is none."""
    if value is None:
        return None
    if isinstance(value, dict) and "sha256" in value and not is_sealed(value):
        raise CorruptRecordError(key, "does not match its own checksum")
    checked(key, value, RESULT)
    if not value["rows"]:
        raise CorruptRecordError(key, "has no rows")
    for number, row in enumerate(value["rows"], 1):
        if (wrong := lacking(row, ROW)) is not None:
            raise CorruptRecordError(key, f"row {number} {wrong}")
    return value


def lacking(value: Any, fields: Fields) -> str | None:
    """Why `value` is no JSON object with these `fields`, None where it is one."""
    if not isinstance(value, dict):
        return f"is no JSON object but {type(value).__name__}"
    for name, kind in fields.items():
        if name not in value and kind.needed:
            return f"has no {name}"
        if name in value and not kind.holds(value[name]):
            return f"has {value[name]!r:.60} for {name}, wanted {kind.what}"
    return None
