"""Attempts of a trial, without Ray: what is recorded, what is tried again, and what is given up with its reason."""

from dataclasses import replace

import pytest

from helix.data.shards import Recordings
from helix.spec import trial_id
from helix.storage import Storage
from orchestration import worker
from orchestration.ledger import read
from orchestration.recovery import Budget
from orchestration.worker import run_trial


class Stumbles:
    """Stands before the real loop and raises what it is given, one error per attempt, before it lets it run."""

    def __init__(self, *errors: BaseException):
        self.errors, self.calls = list(errors), 0

    def __call__(self, spec, recordings, how):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.real(spec, recordings, how)

    real = staticmethod(worker.fit)


@pytest.fixture
def attempt(tiny_spec, tiny_data: Recordings, storage: Storage, monkeypatch):
    """Runs the tiny trial with a loop that stumbles; returns (done, state, calls)."""
    spec = replace(tiny_spec, training=replace(tiny_spec.training, epochs=1))
    name = trial_id(spec, tiny_data.manifest_sha256)

    def run(*errors: BaseException, sweep_id: str = "s1", budget: Budget | None = None):
        stumbles = Stumbles(*errors)
        monkeypatch.setattr(worker, "fit", stumbles)
        done = run_trial(spec, tiny_data, storage, sweep_id=sweep_id, budget=budget)
        return done, read(storage, name, now=1e12), stumbles.calls

    return run


def test_a_trial_that_works_is_attempted_once(attempt):
    done, state, calls = attempt()
    assert (done, state.status, calls) == (True, "done", 1)
    assert [record["outcome"] for record in state.attempts] == ["done"]


def test_a_passing_trouble_is_tried_again_and_leaves_its_trace(attempt):
    done, state, calls = attempt(OSError("the disk went away"))
    assert (done, state.status, calls) == (True, "done", 2)
    assert state.attempts[0]["error"] == "OSError: the disk went away"
    assert "Traceback" in state.attempts[0]["traceback"]


def test_a_mistake_in_the_spec_is_not_tried_again(attempt):
    done, state, calls = attempt(ValueError("no such fold"))
    assert (done, state.status, calls) == (False, "failed", 1)
    assert "no such fold" in state.error
    assert "would happen again" in state.error


def test_failures_have_a_budget(attempt):
    errors = [RuntimeError(f"trouble {number}") for number in range(5)]
    done, state, calls = attempt(*errors, budget=Budget(failures=2))
    assert (done, state.status, calls) == (False, "failed", 3)
    assert "3 failures; 2 are allowed" in state.error


def test_a_new_sweep_tries_a_failed_trial_again(attempt):
    assert not attempt(ValueError("once"), sweep_id="s1")[0]
    done, state, _ = attempt(sweep_id="s2")
    assert (done, state.status) == (True, "done")


def test_a_done_trial_is_not_attempted(attempt):
    attempt()
    done, state, calls = attempt(RuntimeError("must not be reached"), sweep_id="s2")
    assert (done, calls, len(state.attempts)) == (True, 0, 1)


def test_a_trial_whose_process_dies_in_place_again_and_again_is_stopped(attempt):
    for _ in range(3):
        with pytest.raises(SystemExit):  # not an Exception: the attempt ends without a word, as a killed process does
            attempt(SystemExit(9), budget=Budget(losses_in_place=3))
    done, state, calls = attempt(budget=Budget(losses_in_place=3))
    assert (done, state.status, calls) == (False, "failed", 0)
    assert "lost 3 times in a row at step 0" in state.error


def test_an_attempt_under_way_shows_as_running_until_it_falls_silent(attempt, storage):
    with pytest.raises(SystemExit):
        attempt(SystemExit(9))
    name = storage.children("trials")[0]
    record = read(storage, name, now=0.0).attempts[0]
    assert read(storage, name, now=record["started"] + 10).status == "running"
    assert read(storage, name, now=record["started"] + 1000).status == "partial"


def test_an_attempt_that_ended_without_a_word_is_closed_by_the_next_one(attempt):
    with pytest.raises(SystemExit):
        attempt(SystemExit(9))
    done, state, _ = attempt(sweep_id="s2")
    assert done
    assert [record["outcome"] for record in state.attempts] == ["lost", "done"]
    assert state.attempts[0]["started"] <= state.attempts[0]["ended"] <= state.attempts[1]["started"]
