"""What follows from how the attempts of a trial ended: a table, and two promises that hold for every history."""

import importlib
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestration.recovery import (
    BETWEEN_LOSSES_S,
    OUT_OF_MEMORY,
    PERMANENT,
    Budget,
    Decision,
    Ended,
    decide,
    kind,
    mean_between_losses_s,
    smaller,
)

TABLE = [
    # how the attempts ended, oldest first: (error or None where lost, step it started from) -> decision
    ([], "retry", "first attempt"),
    # losses
    ([(None, 0)], "retry", "lost at step 0; 1 in a row without progress"),
    ([(None, 0), (None, 0)], "retry", "lost at step 0; 2 in a row without progress"),
    ([(None, 0), (None, 0), (None, 0)], "stop", "lost 3 times in a row at step 0 without progress"),
    ([(None, 0), (None, 0), (None, 70)], "retry", "lost at step 70; 1 in a row without progress"),
    ([(None, 0), (None, 70), (None, 70), (None, 70)], "stop", "lost 3 times in a row at step 70 without progress"),
    ([(None, 70), (None, 70), (None, 40)], "retry", "lost at step 40; 1 in a row without progress"),
    # failures
    ([("OSError", 0)], "retry", "OSError; failure 1 of 2 allowed"),
    ([("OSError", 0), ("RuntimeError", 70)], "retry", "RuntimeError; failure 2 of 2 allowed"),
    ([("OSError", 0), ("OSError", 70), ("OSError", 140)], "stop", "3 failures; 2 are allowed"),
    # one after the other
    ([("OSError", 0), (None, 0), (None, 0)], "retry", "lost at step 0; 2 in a row without progress"),
    ([(None, 0), (None, 0), ("OSError", 0)], "retry", "OSError; failure 1 of 2 allowed"),
    ([(None, 0), (None, 0), ("OSError", 0), (None, 0)], "retry", "lost at step 0; 1 in a row without progress"),
    ([("OSError", 0), (None, 9), ("OSError", 9), (None, 12), ("OSError", 12)], "stop", "3 failures; 2 are allowed"),
    # errors that would happen again
    *[([(error, 70)], "stop", f"{error} would happen again") for error in PERMANENT],
    ([(None, 0), (None, 70), ("DivergedError", 70)], "stop", "DivergedError would happen again"),
]


@pytest.mark.parametrize(("history", "action", "reason"), TABLE)
def test_the_decision_after(history: list[tuple[str | None, int]], action: str, reason: str):
    ended = [Ended(error=error, step=step) for error, step in history]
    assert decide(ended, Budget()) == Decision(action=action, reason=reason)


@pytest.mark.parametrize("failures", [0, 1, 5])
def test_the_budget_of_failures_is_how_many_are_allowed(failures: int):
    history = [Ended(error="OSError", step=0)] * failures
    assert decide(history, Budget(failures=failures)).action == "retry"
    assert decide([*history, Ended(error="OSError", step=0)], Budget(failures=failures)).action == "stop"


@pytest.mark.parametrize("losses", [1, 2, 5])
def test_the_budget_of_losses_is_how_many_may_happen_in_one_place(losses: int):
    history = [Ended(error=None, step=7)] * losses
    assert decide(history[1:], Budget(losses_in_place=losses)).action == "retry"
    assert decide(history, Budget(losses_in_place=losses)).action == "stop"


@given(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 100)), max_size=60))
def test_a_lost_machine_is_not_a_failed_trial(losses: list[tuple[int, int]]):
    """As long as every third loss finds a newer checkpoint, a trial goes on for ever."""
    history: list[Ended] = []
    step = 0
    for times, progress in losses:
        for _ in range(times):
            history.append(Ended(error=None, step=step))
            assert decide(history, Budget()).action == "retry"
        step += progress


@given(st.lists(st.sampled_from([None, "OSError"]), min_size=9, max_size=20))
def test_a_trial_that_stands_still_is_stopped_at_last(errors: list[str | None]):
    """With 2 failures allowed and 3 losses in a row, nine attempts at one step are never all followed by another."""
    history = [Ended(error=error, step=0) for error in errors]
    assert "stop" in {decide(history[:count], Budget()).action for count in range(1, 10)}


HOMES = {
    "ValueError": "builtins",
    "TypeError": "builtins",
    "KeyError": "builtins",
    "DivergedError": "helix.training.trainer",
    "CheckpointError": "helix.training.checkpoint",
    "CorruptShardError": "helix.data.shards",
    "UnusableScanError": "helix.models.scan_error",
}
ARGUMENTS = {
    "DivergedError": ("0123456789abcdef", 70),
    "CheckpointError": ("trials/x/checkpoints", ["step-00000070: it is missing"]),
    "CorruptShardError": ("data/x/shards/00000.bin", "its bytes changed"),
    "UnusableScanError": ("triton", "no C compiler", "install one"),
}


@pytest.mark.parametrize("name", PERMANENT)
def test_the_permanent_errors_are_errors_that_exist(name: str):
    error = getattr(importlib.import_module(HOMES[name]), name)
    assert issubclass(error, Exception)
    assert error.__name__ == name


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_error_that_crosses_a_process_is_the_same_on_the_other_side(name: str):
    error = getattr(importlib.import_module(HOMES[name]), name)(*ARGUMENTS[name])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.args, again.__dict__) == (str(error), error.args, error.__dict__)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), OUT_OF_MEMORY),
        (MemoryError(), OUT_OF_MEMORY),
        (torch.AcceleratorError("CUDA error: out of memory"), OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OUT_OF_MEMORY),
        (RuntimeError("Triton Error [CUDA]: out of memory"), OUT_OF_MEMORY),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "RuntimeError"),
        (OSError(12, "Cannot allocate memory"), "OSError"),
    ],
)
def test_out_of_memory_is_told_from_other_trouble(error: Exception, name: str):
    assert kind(error) == name


def test_out_of_memory_costs_no_failure_until_nothing_smaller_is_left():
    history = [Ended(error=OUT_OF_MEMORY, step=0)] * 9
    assert decide(history, Budget(failures=0)).action == "shrink"
    assert decide([*history, Ended(error=OUT_OF_MEMORY, step=0, smallest=True)], Budget()).action == "stop"


def test_parts_become_smaller_until_they_cannot():
    parts, seen = (32, False), []
    while parts is not None:
        seen.append(parts)
        parts = smaller(parts[0], recompute=parts[1])
    assert seen == [(32, False), (16, False), (8, False), (4, False), (2, False), (1, False), (1, True)]
    assert smaller(24, recompute=True) == (12, True) and smaller(1, recompute=True) is None


def test_the_time_between_losses_is_learned_from_what_happened():
    hour = 3600.0
    lost = {"started": 0.0, "ended": hour, "outcome": "lost"}
    assert mean_between_losses_s([], now=0) == BETWEEN_LOSSES_S
    assert mean_between_losses_s([lost] * 36, now=0) == pytest.approx(40 * hour / 37)
    assert mean_between_losses_s([{"started": 0.0}], now=36 * hour) == 40 * hour, "one that still runs counts"
