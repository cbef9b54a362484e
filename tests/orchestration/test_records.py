"""What a record has to hold: each field that is read is looked at, and a wrong one is named with its key."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from helix.storage import CorruptRecordError, is_sealed, sealed
from orchestration.records import (
    ATTEMPT,
    CERTIFICATE,
    OBJECT,
    RESULT,
    ROW,
    Fields,
    checked,
    checked_result,
    checked_result_fields,
    lacking,
    unknown_or,
)

ROW_OF_NOW = {
    "epoch": 1,
    "step": 13,
    "test_accuracy": 0.5,
    "seconds": 10.0,
    "time": 1.0,
    "train_loss": 0.7,
    "train_accuracy": 0.25,
    "test_loss": 1.5,
    "validation_accuracy": 0.5,
    "validation_loss": 1.5,
    "lr": 3e-4,
    "test_half_a": [3, 6],
    "test_half_b": [2, 6],
    "system": {"gpu_0_utilization_percentage": 99.0},
}
ATTEMPT_OF_NOW = {
    "attempt_id": "a",
    "started": 1.0,
    "ended": 2.0,
    "outcome": "lost",
    "error": "its process was lost",
    "error_kind": "RankLostError",
    "sweep_id": "s",
    "lease": 0,
    "host": "node-7",
    "device": "cuda",
    "device_name": "NVIDIA L40S",
    "device_bytes": 47_700_000_000,
    "peak_bytes": 12_300_000_000,
    "threads": 4,
    "ranks": 2,
    "step": 9,
    "from_step": 0,
    "kept_step": 8,
    "micro_batch": 8,
    "instance_type": "g5.xlarge",
    "market": "spot",
    "gpus": 2.0,
    "share": 0.5,
    "code": {"commit": "0123"},
}
RESULT_OF_NOW = {
    "rows": [ROW_OF_NOW],
    "accuracy": {"best_test": 0.5, "last": 0.5, "validation": None},
    "finished": 3.0,
    "best_epoch": {"best_test": 1, "validation": [1]},
    "classes": 2,
    "parameters": 6_000_000,
    "tokens": 500,
    "train_clips": 12,
    "test_clips": 12,
    "train_seconds": 10.0,
    "confusion": [[0, 1, 3], [1, 1, 9]],
    "selected_confusion": [[0, 0, 12]],
    "selected_epoch": 1,
    "weights_sha256": "ab",
    "device": "cpu",
    "scan": "numba",
    "ranks": 1,
    "versions": {"torch": "2.13.0"},
}
RECORDS: dict[str, tuple[Fields, dict[str, Any]]] = {
    "row": (ROW, ROW_OF_NOW),
    "attempt": (ATTEMPT, ATTEMPT_OF_NOW),
    "result": (RESULT, RESULT_OF_NOW),
}
#: Objects whose values are only shown, whatever they are.
OBJECTS = (OBJECT.what, unknown_or(OBJECT).what)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_now_is_whole_and_every_field_is_looked_at(name: str):
    fields, record = RECORDS[name]
    assert record.keys() == fields.keys()
    assert checked("trials/a/record.json", record, fields) == record
    assert checked("trials/a/record.json", None, fields) is None
    for field in fields:
        another = 12 if isinstance(record[field], str) else "12"
        for value in (True, float("nan"), another, {"a": {"b": []}}, [["a"]]):
            if field == "rows" and isinstance(value, list):  # each row is looked at by itself
                continue
            if fields[field].what in OBJECTS and isinstance(value, dict):
                continue
            with pytest.raises(CorruptRecordError, match=rf"^trials/a/record.json: has .* for {field}, wanted "):
                checked("trials/a/record.json", record | {field: value}, fields)


@pytest.mark.parametrize("name", RECORDS)
def test_only_what_every_reader_needs_has_to_be_there(name: str):
    fields, record = RECORDS[name]
    for field, kind in fields.items():
        less = {key: value for key, value in record.items() if key != field}
        assert lacking(less, fields) == (f"has no {field}" if kind.needed else None)
    needed = {key: value for key, value in record.items() if fields[key].needed}
    assert lacking(needed, fields) is None
    unknown = {field: None for field, kind in fields.items() if kind.what.endswith(" or null")}
    assert lacking(record | unknown, fields) is None
    for field in fields.keys() - unknown.keys():
        assert str(lacking(record | {field: None}, fields)).startswith(f"has None for {field}, wanted ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("test_accuracy", 1.01),
        ("test_accuracy", -0.1),
        ("seconds", None),
        ("seconds", "x"),
        ("epoch", 1.5),
        ("step", -1),
        ("test_half_a", [3]),
        ("test_half_b", [3, 2.5]),
        ("system", {"load": "high"}),
    ],
)
def test_a_wrong_row_of_a_result_is_named_by_its_number_and_field(field: str, value: Any):
    wrong = RESULT_OF_NOW | {"rows": [ROW_OF_NOW, ROW_OF_NOW | {field: value}]}
    with pytest.raises(CorruptRecordError, match=rf"^trials/a/result.json: row 2 has .* for {field}, wanted "):
        checked_result("trials/a/result.json", sealed(wrong))


def test_a_result_without_a_seal_or_with_a_broken_one_is_damaged():
    assert checked_result_fields("k", RESULT_OF_NOW) == RESULT_OF_NOW, "where a sealed state has it"
    whole = json.loads(json.dumps(sealed(RESULT_OF_NOW)))
    assert checked_result("k", whole) == whole and is_sealed(whole)
    better = whole | {"accuracy": {"best_test": 0.99}}
    for broken in (better, RESULT_OF_NOW, whole | {"sha256": None}, whole | {"sha256": "ab" * 32}):
        with pytest.raises(CorruptRecordError, match=r"^k: does not match its own checksum"):
            checked_result("k", broken)
    assert checked_result("k", None) is None


def test_a_certificate_has_all_that_a_report_shows_of_it(make_certificate: Callable[..., dict[str, Any]]):
    whole = make_certificate("c1", "0123456789abcdef")
    assert lacking(whole, CERTIFICATE) is None
    drift = whole | {"largest_difference": {"weights": 1e-6, "rows": 0.0}, "commit": None}
    assert lacking(drift, CERTIFICATE) is None
    for name in CERTIFICATE:
        less = {key: value for key, value in whole.items() if key != name}
        assert lacking(less, CERTIFICATE) == f"has no {name}"
        assert str(lacking(whole | {name: [{}]}, CERTIFICATE)).startswith(f"has [{{}}] for {name}, ") == (
            name != "kills"
        )
    for name, value in {
        "made": 1e308,
        "rows": {"problems": [1]},
        "versions": {"torch": None},
        "largest_difference": {"weights": "0"},
    }.items():
        assert str(lacking(whole | {name: value}, CERTIFICATE)).startswith(f"has {value!r} for {name}, wanted ")


@pytest.mark.parametrize("accuracy", [{"best_test": float("nan")}, {"last": 55.1}, {"last": "0.5"}, [0.5], None])
def test_an_accuracy_that_is_no_fraction_is_named(accuracy: Any):
    with pytest.raises(CorruptRecordError, match=r"^k: has .* for accuracy, wanted fractions from 0 to 1"):
        checked_result_fields("k", RESULT_OF_NOW | {"accuracy": accuracy})
