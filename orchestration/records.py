"""What the records of trials have to hold, in one place: every field that is read anywhere, and of which kind it is.

A record that does not is damaged, and `CorruptRecordError` names its key and the field. So is a result without a
checksum of itself, or with another's: what `helix verify` calls damaged counts nowhere.
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


def list_of(item: Kind) -> Kind:
    """A list of values of this kind."""
    return Kind(f"a list, each {item.what}", lambda value: isinstance(value, list) and all(map(item.holds, value)))


def row_of(*items: Kind) -> Kind:
    """A list of as many values, each of its own kind."""

    def holds(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == len(items)
            and all(item.holds(one) for item, one in zip(items, value, strict=True))
        )

    return Kind(f"[{', '.join(item.what for item in items)}]", holds)


def with_fields(fields: "Fields") -> Kind:
    """An object with these fields."""
    said = ", ".join(f"{name}: {kind.what}" for name, kind in fields.items())
    return Kind(f"an object with {said}", lambda value: lacking(value, fields) is None)


COUNT = Kind("a whole number, 0 or more", _is_count)
NUMBER = Kind("a finite number", _is_number)
FRACTION = Kind("a fraction from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
#: Unix seconds that a date can be made of: up to the year 9999.
TIME = Kind("a time in seconds since 1970", lambda value: _is_number(value) and 0 <= value < 253_402_300_800)
TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
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

#: What killing a trial changed (orchestration/certify.py): what a report shows of it.
CERTIFICATE: Fields = {
    "certificate_id": TEXT,
    "grid": TEXT,
    "trial": TEXT,
    "trial_id": TEXT,
    "science_version": COUNT,
    "scan": TEXT,
    "device": TEXT,
    "device_name": TEXT,
    "threads": COUNT,
    "versions": with_fields({"torch": TEXT}),
    "commit": replace(unknown_or(TEXT), needed=True),
    "made": TIME,
    "steps": COUNT,
    "kills_asked": COUNT,
    "kills": LIST,
    "steps_lost": COUNT,
    "seconds_lost": NUMBER,
    "restarts_at_step_0": COUNT,
    "rows": with_fields({"problems": list_of(TEXT)}),
    "largest_difference": replace(unknown_or(with_fields({"weights": NUMBER, "rows": NUMBER})), needed=True),
    "verdict": TEXT,
}

#: What was asked of a grid (orchestration/asked.py), its data sets (dashboards/view.py), and its variants, whose trials
#: are told by id, fold and seed. The spec is looked at where it is read, but for what stands in its pattern.
PLAN: Fields = {
    "grid": TEXT,
    "question": TEXT,
    "command": TEXT,
    "data": LIST,
    "cells": LIST,
    "prices": list_of(row_of(TEXT, TEXT, NUMBER)),
}
PLAN_DATA: Fields = {
    "name": TEXT,
    "classes": COUNT,
    "recordings": COUNT,
    "chance": FRACTION,
    "expected": unknown_or(COUNT),
    "partial": FLAG,
    "seconds": NUMBER,
    "licence": TEXT,
    "caveat": TEXT,
    "manifest_sha256": TEXT,
    "notes": list_of(TEXT),
    "class_names": list_of(TEXT),
}
PLAN_MODEL: Fields = {"pattern": list_of(TEXT)}
PLAN_CELL: Fields = {
    "variant": TEXT,
    "backbone": TEXT,
    "parameters": replace(unknown_or(COUNT), needed=True),
    "tokens": replace(unknown_or(COUNT), needed=True),
    "spec": OBJECT,
    "trials": list_of(row_of(TEXT, COUNT, COUNT)),
}
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
    """A result as it was read from `key`: its seal, its fields and its rows; None is none."""
    if isinstance(value, dict) and (wrong := unsealed(value)) is not None:
        raise CorruptRecordError(key, wrong)
    return None if value is None else checked_result_fields(key, value)


def unsealed(value: Any) -> str | None:
    """Why `value` is not what was sealed, None where it is."""
    return None if is_sealed(value) else "does not match its own checksum"


def checked_result_fields(key: str, value: Any) -> Any:
    """A result that something else vouches for than its own seal: its fields and its rows."""
    if value is None:
        raise CorruptRecordError(key, "is no JSON object but null")
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
