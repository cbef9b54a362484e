"""What to do after an attempt ended: error and history in, decision out. Knows no Ray and touches nothing.

Two budgets. A failure is an error that the attempt itself raised; few are allowed. A loss is an attempt that ended
without a word (its process was killed, its machine is gone, or it hung) or because Ray around it was gone; losses cost
nothing while the trial moves forward. Running out of memory is neither: the trial is tried again in smaller parts, as
long as there are any.
"""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from helix.out_of_memory import is_out_of_memory

#: Errors that the same spec on the same data raises again: trying again would only spend.
PERMANENT = (
    *("ValueError", "TypeError", "KeyError", "DivergedError", "CheckpointError", "CorruptShardError"),
    "UnusableScanError",
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`failures`: errors allowed per trial in one sweep. `losses_in_place`: losses in a row at one step."""

    failures: int = 2
    losses_in_place: int = 3


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one attempt ended. `error` is what `kind` calls what it raised, None where it was lost.

    `step` is the optimiser step of the newest checkpoint that the attempt started from. `smallest`: no smaller part of
    a batch is left to try.
    """

    error: str | None
    step: int
    smallest: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`retry` goes on from the newest checkpoint, `shrink` does so in smaller parts; `stop` leaves the trial failed."""

    action: Literal["retry", "shrink", "stop"]
    reason: str


#: What `kind` calls an error that says that memory ran out, and one that says that nothing can be written any more.
OUT_OF_MEMORY = "OutOfMemory"
UNWRITABLE = "Unwritable"

#: Of a disk: it is full, one's share of it is, or it can only be read, as after a fault of it.
UNWRITABLE_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def kind(error: BaseException) -> str:
    """What `Ended.error` calls an error: its class, or the permanent one that it is a kind of."""
    names = [cls.__name__ for cls in type(error).__mro__]
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno in UNWRITABLE_NUMBERS:
        return UNWRITABLE
    return next((name for name in names if name in PERMANENT), names[0])


def is_loss(error: BaseException) -> bool:
    """Whether an error says that what runs the attempt is gone: a dead controller, head or store of Ray, another rank.

    Or a disk that takes no more. The trial did nothing wrong then, and its process can do nothing more for it: asked
    again, Ray and the disk say the same.
    """
    return kind(error) == UNWRITABLE or not {"RayError", "RankLostError"}.isdisjoint(
        cls.__name__ for cls in type(error).__mro__
    )


def smaller(micro_batch: int, *, recompute: bool) -> tuple[int, bool] | None:
    """The (micro_batch, recompute) to try after memory ran out: halves first, recomputing last; None at the end."""
    if micro_batch > 1:
        return (micro_batch + 1) // 2, recompute
    return None if recompute else (1, True)


def mean_between_losses_s(attempts: Sequence[Mapping[str, Any]], *, now: float) -> float:
    """The mean time after which a machine was lost, over attempts as they are recorded, in seconds.

    One loss in BETWEEN_LOSSES_S is taken for granted, so that few attempts say little.
    """
    # A clock that was set back meanwhile gives no time, and not a negative one.
    worked_s = sum(max(0.0, attempt.get("ended", now) - attempt["started"]) for attempt in attempts)
    losses = sum(attempt.get("outcome") == "lost" for attempt in attempts)
    return (BETWEEN_LOSSES_S + worked_s) / (1 + losses)


#: What is expected of a machine before anything is known of it.
BETWEEN_LOSSES_S = 4 * 3600.0


def decide(history: Sequence[Ended], budget: Budget) -> Decision:
    """The decision after the last of `history`, the attempts of one trial in one sweep, oldest first."""
    if not history:
        return Decision(action="retry", reason="first attempt")
    last = history[-1]
    if last.error in PERMANENT:
        return Decision(action="stop", reason=f"{last.error} would happen again")
    if last.error == OUT_OF_MEMORY:
        if last.smallest:
            return Decision(action="stop", reason="out of memory with one clip at a time and every block recomputed")
        return Decision(action="shrink", reason="out of memory; the next attempt runs the batch in smaller parts")
    failures = sum(ended.error not in (None, OUT_OF_MEMORY) for ended in history)
    if failures > budget.failures:
        return Decision(action="stop", reason=f"{failures} failures; {budget.failures} are allowed")
    in_place = 0
    for ended in reversed(history):
        if ended.error is not None or ended.step != last.step:
            break
        in_place += 1
    if in_place >= budget.losses_in_place:
        return Decision(action="stop", reason=f"lost {in_place} times in a row at step {last.step} without progress")
    if last.error is None:
        return Decision(action="retry", reason=f"lost at step {last.step}; {in_place} in a row without progress")
    return Decision(action="retry", reason=f"{last.error}; failure {failures} of {budget.failures} allowed")
