"""What to do after an attempt ended: error and history in, decision out. Knows no Ray and touches nothing.

Two budgets. A failure is an error that the attempt itself raised; few are allowed. A loss is an attempt that ended
without a word (its process was killed, its machine is gone); losses cost nothing while the trial moves forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: Errors that the same spec on the same data raises again: trying again would only spend.
PERMANENT = ("ValueError", "TypeError", "KeyError", "DivergedError", "CheckpointError", "CorruptShardError")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`failures`: errors allowed per trial in one sweep. `losses_in_place`: losses in a row at one step."""

    failures: int = 2
    losses_in_place: int = 3


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one attempt ended. `error` is the class name of what it raised, None where it was lost.

    `step` is the optimiser step of the newest checkpoint that the attempt started from.
    """

    error: str | None
    step: int


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`retry` continues from the newest checkpoint; `stop` leaves the trial failed with `reason`."""

    action: Literal["retry", "stop"]
    reason: str


def kind(error: BaseException) -> str:
    """What `Ended.error` calls an error: its class, or the permanent one that it is a kind of."""
    names = [cls.__name__ for cls in type(error).__mro__]
    return next((name for name in names if name in PERMANENT), names[0])


def decide(history: Sequence[Ended], budget: Budget) -> Decision:
    """The decision after the last of `history`, the attempts of one trial in one sweep, oldest first."""
    if not history:
        return Decision(action="retry", reason="first attempt")
    last = history[-1]
    if last.error in PERMANENT:
        return Decision(action="stop", reason=f"{last.error} would happen again")
    failures = sum(ended.error is not None for ended in history)
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
