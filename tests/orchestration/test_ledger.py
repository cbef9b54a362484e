"""The ledger says how a trial stands from nothing but what lies in storage."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from helix.storage import CorruptRecordError, FolderStorage, Storage, sealed
from orchestration.lease import EXPIRY_S
from orchestration.ledger import SILENCE_S, TrialState, attempts_at, begun_trials, is_done, read, read_all

TRIAL = "0123456789abcdef"
NOW = 1_000_000.0
LATELY, LONG_AGO = NOW - 1, NOW - 10 * SILENCE_S


def attempt(name: str = "1", *, started: float = LONG_AGO, **ended: Any) -> dict[str, Any]:
    return {f"attempts/{name}.json": {"attempt_id": name, "started": started, **ended}}


def beat(name: str = "1", *, time: float, step: int = 5) -> dict[str, Any]:
    return {"heartbeat.json": {"attempt_id": name, "time": time, "step": step}}


def row(epoch: int, step: int) -> dict[str, Any]:
    return {"epoch": epoch, "step": step, "test_accuracy": 0.5, "seconds": 1.0, "time": LATELY}


def rows(count: int) -> dict[str, Any]:
    return {f"metrics/epoch-{epoch:04d}.json": row(epoch, 10 * epoch) for epoch in range(1, count + 1)}


def result(epochs: int) -> dict[str, Any]:
    told = {"rows": list(rows(epochs).values()), "accuracy": {"last": 0.5}, "finished": LATELY}
    return {"result.json": sealed(told)}


FAILED = {"ended": LATELY, "outcome": "failed", "error": "OSError: no space"}
DONE = {"ended": LATELY, "outcome": "done"}
SPEC = {"spec.json": {"spec": {}}}

TABLE: dict[str, tuple[Mapping[str, Any], str, int, int]] = {
    # what lies in storage -> status, epochs done, step
    "nothing": ({}, "missing", 0, 0),
    "only a spec": (SPEC, "missing", 0, 0),
    "just begun": (attempt(started=LATELY), "running", 0, 0),
    "under way for long": (SPEC | attempt() | beat(time=LATELY) | rows(2), "running", 2, 20),
    "between two epochs": (attempt() | beat(time=LATELY, step=27) | rows(2), "running", 2, 27),
    "silent since it began": (attempt(), "partial", 0, 0),
    "silent since a while": (attempt() | beat(time=LONG_AGO, step=27) | rows(2), "partial", 2, 27),
    "silent just long enough": (attempt() | beat(time=NOW - SILENCE_S), "partial", 0, 5),
    "not yet silent": (attempt() | beat(time=NOW - SILENCE_S + 0.01), "running", 0, 5),
    "only another attempt was heard of": (attempt("2") | beat("1", time=LATELY), "partial", 0, 5),
    "failed": (attempt(**FAILED) | beat(time=LATELY) | rows(1), "failed", 1, 10),
    "failed and tried again": (
        attempt("1", **FAILED) | attempt("2", started=LATELY) | rows(1),
        "running",
        1,
        10,
    ),
    "failed and tried again and lost": (attempt("1", **FAILED) | attempt("2", started=LONG_AGO + 1), "partial", 0, 0),
    "lost and tried again and failed": (attempt("1") | attempt("2", started=LONG_AGO + 1, **FAILED), "failed", 0, 0),
    "the last is the one that started last": (
        attempt("b", started=LONG_AGO, **FAILED) | attempt("a", started=LATELY),
        "running",
        0,
        0,
    ),
    "said to be done without a result": (attempt(**DONE) | rows(3), "partial", 3, 30),
    "just ended without a result": (attempt(**DONE) | beat(time=LATELY, step=30), "partial", 0, 30),
    "records of attempts gone": (rows(2) | beat(time=LATELY, step=27), "partial", 2, 27),
    "done": (SPEC | attempt(**DONE) | rows(3) | result(3), "done", 3, 30),
    "done, rows gone": (attempt(**DONE) | result(3), "done", 3, 30),
    "done, whatever the attempts say": (attempt(**FAILED) | beat(time=LATELY, step=99) | result(2), "done", 2, 20),
}


def write(folder: Path, contents: Mapping[str, Any]) -> Storage:
    storage = FolderStorage(folder)
    for name, value in contents.items():
        storage.put_json(f"trials/{TRIAL}/{name}", value)
    return storage


@pytest.mark.parametrize("case", TABLE)
def test_the_state_of_a_trial(tmp_path: Path, case: str):
    contents, status, epochs_done, step = TABLE[case]
    storage = write(tmp_path, contents)
    state = read(storage, TRIAL, now=NOW)
    assert (state.trial_id, state.status, state.epochs_done, state.step) == (TRIAL, status, epochs_done, step)
    assert [row["epoch"] for row in state.rows] == list(range(1, epochs_done + 1))
    assert (state.error is not None) == (status == "failed")
    assert (state.result is not None) == (status == "done") == is_done(storage, TRIAL)


def test_a_failed_trial_says_why(tmp_path: Path):
    assert read(write(tmp_path, attempt(**FAILED)), TRIAL, now=NOW).error == "OSError: no space"


def test_an_attempt_that_was_killed_after_its_result_was_put_has_ended_then(tmp_path: Path):
    storage = write(tmp_path, attempt("1") | attempt("2", started=LONG_AGO + 1) | result(1))
    found = [(one["outcome"], one["ended"]) for one in read(storage, TRIAL, now=NOW).attempts]
    assert found == [("lost", LATELY), ("done", LATELY)]


def test_attempts_are_told_in_the_order_in_which_they_started(tmp_path: Path):
    storage = write(tmp_path, attempt("c", started=1.0) | attempt("a", started=2.0) | attempt("b", started=3.0))
    assert [attempt["attempt_id"] for attempt in read(storage, TRIAL, now=NOW).attempts] == ["c", "a", "b"]


def test_rows_are_told_in_the_order_of_their_epochs(tmp_path: Path):
    state = read(write(tmp_path, dict(reversed(rows(12).items()))), TRIAL, now=NOW)
    assert [row["epoch"] for row in state.rows] == list(range(1, 13))


def test_time_alone_turns_running_into_partial(tmp_path: Path):
    storage = write(tmp_path, attempt(started=NOW))
    states = [read(storage, TRIAL, now=NOW + after).status for after in (0, SILENCE_S - 1, SILENCE_S, 1e6)]
    assert states == ["running", "running", "partial", "partial"]


def test_a_trial_is_shown_as_running_for_as_long_as_its_lease_holds(tmp_path: Path):
    storage = write(tmp_path, attempt() | beat(time=NOW) | rows(1))
    shown = [read(storage, TRIAL, now=NOW + after).status for after in (EXPIRY_S - 0.01, EXPIRY_S)]
    assert shown == ["running", "partial"] and EXPIRY_S == 60, "the README says: a minute"


def test_other_trials_have_no_say(tmp_path: Path):
    storage = write(tmp_path, attempt(started=LATELY) | result(3))
    assert read(storage, "f" * 16, now=NOW).status == "missing"
    assert not is_done(storage, "f" * 16)


def test_what_is_half_written_is_not_read(tmp_path: Path):
    storage = write(tmp_path, rows(2))
    (storage.root / f"trials/{TRIAL}/metrics/.partial-0123").write_bytes(b'{"epoch":')
    (storage.root / f"trials/{TRIAL}/.partial-0123").write_bytes(b'{"rows":')
    assert read(storage, TRIAL, now=NOW).epochs_done == 2


def test_reading_changes_nothing(tmp_path: Path):
    storage = write(tmp_path, attempt() | beat(time=LATELY) | rows(2))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    read(storage, TRIAL, now=NOW)
    read(storage, "f" * 16, now=NOW)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


class Counting(FolderStorage):
    """A storage that counts what it is asked, by many threads."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.asked: list[str] = []

    def get(self, key: str) -> bytes:
        self.asked.append(key)
        return super().get(key)

    def keys(self, prefix: str) -> Iterator[str]:
        self.asked.append(prefix)
        return super().keys(prefix)

    def children(self, prefix: str) -> list[str]:
        self.asked.append(prefix)
        return super().children(prefix)


def test_of_two_thousand_trials_only_those_that_were_begun_are_read(tmp_path: Path):
    write(tmp_path, attempt() | beat(time=LATELY) | rows(2))
    storage = Counting(tmp_path)
    names = [f"{number:016x}" for number in range(2000)]
    states = read_all(storage, [*names, TRIAL], now=NOW)
    assert len(states) == 2001
    assert states[TRIAL] == read(FolderStorage(tmp_path), TRIAL, now=NOW)
    assert {states[name].status for name in names} == {"missing"}
    assert all(states[name] == read(FolderStorage(tmp_path), name, now=NOW) for name in names[:3])
    assert len(storage.asked) < 12


# Looking again


def reads(storage: Counting, known: TrialState | None, **how: int) -> tuple[TrialState, list[str]]:
    storage.asked.clear()
    state = read(storage, TRIAL, now=NOW, known=known, **how)
    return state, [key.removeprefix(f"trials/{TRIAL}/") for key in storage.asked if key != f"trials/{TRIAL}"]


@pytest.mark.parametrize("case", TABLE)
def test_what_is_known_changes_nothing_in_what_is_found(tmp_path: Path, case: str):
    storage = write(tmp_path, TABLE[case][0])
    found = read(storage, TRIAL, now=NOW)
    assert read(storage, TRIAL, now=NOW, known=found) == found
    for earlier in TABLE:
        before = read(write(tmp_path / "earlier" / earlier.replace(" ", "-"), TABLE[earlier][0]), TRIAL, now=NOW)
        if before.status != "done" and not before.attempts:
            assert read(storage, TRIAL, now=NOW, known=before) == found


def test_rows_and_attempts_that_are_over_are_not_read_again(tmp_path: Path):
    lost, now = attempt("1", ended=LATELY, outcome="lost"), attempt("2", started=LATELY)
    storage = Counting(write(tmp_path, lost | now | beat("2", time=LATELY) | rows(2)).root)
    first, asked = reads(storage, None)
    assert len(asked) == 5
    write(tmp_path, rows(3))
    second, asked = reads(storage, first)
    assert sorted(asked) == ["attempts/2.json", "heartbeat.json", "metrics/epoch-0003.json"]
    assert second == read(storage, TRIAL, now=NOW) and second.epochs_done == 3


def test_the_last_attempt_is_read_again_for_its_end_may_be_rewritten(tmp_path: Path):
    storage = Counting(write(tmp_path, attempt(ended=LATELY, outcome="lost") | rows(1)).root)
    first, _ = reads(storage, None)
    write(tmp_path, attempt(**FAILED))
    assert reads(storage, first)[0].status == "failed"


def test_a_trial_that_was_begun_anew_is_read_as_a_whole(tmp_path: Path):
    storage = Counting(write(tmp_path, rows(3)).root)
    first, _ = reads(storage, None)
    for epoch in (1, 2, 3):
        storage.delete(f"trials/{TRIAL}/metrics/epoch-{epoch:04d}.json")
    write(tmp_path, {"metrics/epoch-0001.json": row(1, 99)})
    assert reads(storage, first)[0].rows == (row(1, 99),)


BEST = {"best/manifest.json": {"body": {"metric": "test_accuracy", "value": 0.75}}}


def test_the_last_rows_are_enough_where_the_best_weights_tell_the_best(tmp_path: Path):
    storage = Counting(write(tmp_path, BEST | rows(9) | beat(time=LATELY) | attempt()).root)
    state, asked = reads(storage, None, recent=2)
    assert [key for key in asked if "metrics" in key] == ["metrics/epoch-0008.json", "metrics/epoch-0009.json"]
    assert (state.best, state.epochs_done, state.step, state.status) == (0.75, 9, 90, "running")
    again, asked = reads(storage, state, recent=2)
    assert again == state and sorted(asked) == ["attempts/1.json", "heartbeat.json"]
    whole, _ = reads(storage, None)
    assert (whole.best, whole.epochs_done, whole.step) == (None, 9, 90)


@pytest.mark.parametrize(
    "manifest", [{}, {"best/manifest.json": {"body": {"metric": "validation_accuracy", "value": 1}}}]
)
def test_all_rows_are_read_where_nothing_tells_the_best(tmp_path: Path, manifest: dict[str, Any]):
    storage = write(tmp_path, rows(9) | manifest)
    state = read(storage, TRIAL, now=NOW, recent=2)
    assert len(state.rows) == 9 and state.best is None


def damaged(storage: Storage, **how: Any) -> tuple[TrialState, list[str]]:
    """The state as far as it can be read, and the records that are named."""
    state = read(storage, TRIAL, now=NOW, tolerant=True, **how)
    return state, [line.partition(": ")[0].removeprefix(f"trials/{TRIAL}/") for line in state.damage]


def test_of_a_trial_with_damaged_records_the_rest_is_told(tmp_path: Path):
    storage = write(tmp_path, attempt("1", **FAILED) | attempt("2") | beat("2", time=LATELY, step=35) | rows(3))
    whole = read(storage, TRIAL, now=NOW)
    assert damaged(storage) == (whole, [])
    storage.put(f"trials/{TRIAL}/metrics/epoch-0002.json", b"{")
    storage.put(f"trials/{TRIAL}/attempts/1.json", b"[]")
    state, named = damaged(storage)
    assert named == ["attempts/1.json", "metrics/epoch-0002.json"]
    assert (state.status, state.step, [row["epoch"] for row in state.rows]) == ("running", 35, [1, 3])
    assert damaged(storage, known=state) == (state, named)
    storage.put_json(f"trials/{TRIAL}/metrics/epoch-0002.json", row(2, 20))
    storage.put_json(f"trials/{TRIAL}/attempts/1.json", attempt("1", **FAILED)["attempts/1.json"])
    assert damaged(storage, known=state) == (whole, [])


def test_a_trial_with_a_damaged_result_is_not_done_and_says_why(tmp_path: Path):
    contents = attempt("1", **DONE) | rows(3) | result(3)
    storage = write(tmp_path, contents)
    assert read(storage, TRIAL, now=NOW).status == "done"
    changed = contents["result.json"] | {"accuracy": {"last": 0.99}}
    for broken in (changed, {name: value for name, value in changed.items() if name != "sha256"}):
        storage.put_json(f"trials/{TRIAL}/result.json", broken)
        with pytest.raises(CorruptRecordError, match=f"trials/{TRIAL}/result.json: does not match its own checksum"):
            read(storage, TRIAL, now=NOW)
        state, named = damaged(storage)
        assert (state.status, state.result, state.epochs_done, named) == ("failed", None, 3, ["result.json"])
        assert state.error == state.damage[0] == f"trials/{TRIAL}/result.json: does not match its own checksum"


def test_a_damaged_attempt_of_a_trial_that_is_done_is_looked_at_again(tmp_path: Path):
    storage = write(tmp_path, attempt("1", **DONE) | result(2))
    whole = read(storage, TRIAL, now=NOW)
    storage.put(f"trials/{TRIAL}/attempts/1.json", b"{")
    state, named = damaged(storage)
    assert (state.status, state.attempts, named) == ("done", (), ["attempts/1.json"])
    write(tmp_path, attempt("1", **DONE))
    assert damaged(storage, known=state) == (whole, [])


def test_files_that_are_not_ours_are_not_read(tmp_path: Path):
    storage = write(tmp_path, attempt() | beat(time=LATELY) | rows(2))
    whole = read(storage, TRIAL, now=NOW)
    for folder in ("", f"{TRIAL}/", f"{TRIAL}/attempts/", f"{TRIAL}/metrics/"):
        for name in (".DS_Store", "._1.json", "Thumbs.db", "desktop.ini"):
            (storage.root / f"trials/{folder}{name}").write_bytes(b"\x00\x01Bud1")
    assert read(storage, TRIAL, now=NOW) == whole
    assert attempts_at(storage, TRIAL) == list(whole.attempts)
    assert begun_trials(storage) == [TRIAL]
    assert read_all(storage, [TRIAL], now=NOW) == {TRIAL: whole}


@pytest.mark.parametrize("data", [b"{oh", b"\xff\xfe", b"[]", b"7", b'{"time": "noon", "step": null, "attempt_id": 3}'])
def test_a_damaged_heartbeat_is_as_good_as_none(tmp_path: Path, data: bytes):
    storage = write(tmp_path, attempt() | rows(2))
    wanted = read(storage, TRIAL, now=NOW)
    storage.put(f"trials/{TRIAL}/heartbeat.json", data)
    assert read(storage, TRIAL, now=NOW) == wanted


@pytest.mark.parametrize(
    "data", [b"{oh", b"\xff\xfe", b"[]", b"7", b"{}", b'{"rows": [], "step": "x", "started": null}']
)
@pytest.mark.parametrize("name", ["attempts/1.json", "metrics/epoch-0001.json", "result.json"])
def test_a_damaged_record_is_told_by_its_name(tmp_path: Path, name: str, data: bytes):
    storage = write(tmp_path, attempt() | rows(2))
    storage.put(f"trials/{TRIAL}/{name}", data)
    with pytest.raises(CorruptRecordError, match=f"trials/{TRIAL}/{name}: .*helix verify"):
        read(storage, TRIAL, now=NOW)
