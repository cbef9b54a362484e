"""What a sweep is watched for while Ray Tune runs it: its limits, calls to stop, and machines that can never come."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import ray.tune
import ray.tune.stopper

from dashboards.view import Spent
from helix.storage import Storage
from orchestration.asked import DriverRecord
from orchestration.connection import free_what_the_dead_hold, offer
from orchestration.lease import EXPIRY_S, is_held
from orchestration.ledger import TrialState
from orchestration.metrics import SweepMetrics
from orchestration.money import Limits, spent_on_trial
from orchestration.plan import Snapshot
from orchestration.stop import ask

logger = logging.getLogger(__name__)

#: Seconds between two looks at what a sweep waits for and has spent; and how long workers that were asked to stop have.
LOOK_S = 2.0
GRACE_S = 600.0

#: Looks in a row that may fail to read what was spent, before a sweep that has a budget stops.
BLIND_LOOKS = 5

#: The signals that end a sweep as a limit does, and why it stopped then.
CALLS = {signal.SIGTERM: "interrupted (SIGTERM)", signal.SIGINT: "interrupted (SIGINT)"}

#: Set to 1, it keeps Ray Tune from handling SIGINT.
TUNE_LEAVES_SIGINT = "TUNE_DISABLE_SIGINT_HANDLER"


class Guard(ray.tune.Stopper):
    """Watches a sweep while Ray Tune runs it: what it waits for, whether that can ever come, and its limits. What a
    killed process of it still holds, it gives back.

    When a limit is reached, or `call` says so, the workers are asked through the storage to save and leave; once no
    attempt is under way, or after GRACE_S, what has not started by then is cancelled. A budget that cannot be watched
    for BLIND_LOOKS looks in a row is a limit as well.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        limits: Limits,
        *,
        sweep_id: str,
        wanted: Sequence[tuple[dict[str, float], int]],
    ):
        """`wanted`: what workers ask for, and how many that ask so may be waited for at once."""
        self.snapshot, self.limits, self.sweep_id, self.wanted = snapshot, limits, sweep_id, wanted
        self.stopped: str | None = None
        self.impossible: str | None = None
        self._waiting, self._cancel = "", False
        self._called: str | None = None
        self._blind, self._asked, self._stopped_at = 0, False, 0.0
        self._record = DriverRecord(snapshot.storage, snapshot.grid_name, sweep_id)
        self._metrics = SweepMetrics(snapshot.grid_name)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="helix-guard", daemon=True)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002  (Tune's interface)
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard":
        return self  # Tune copies what it is given; what it asks has to be what is told

    def __reduce__(self) -> tuple[Any, ...]:
        return ray.tune.stopper.NoopStopper, ()  # Tune's snapshots of itself, which are never restored

    def stop_all(self) -> bool:
        return self._cancel

    def __enter__(self) -> "Guard":
        self.snapshot.waiting = lambda: self._waiting
        self._record.say()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=10.0)
        self._waiting = ""
        self._record.end()

    def call(self, reason: str) -> bool:
        """Have the sweep stop at the next look; False where that was called for before. Fit for a signal handler."""
        first, self._called = self._called is None, self._called or reason
        return first

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            self._look()
            with self._spared("the record of this driver"):
                self._record.say(waiting=self._waiting, stopped=self.stopped)

    @contextlib.contextmanager
    def _spared(self, what: str) -> Iterator[None]:
        """One part of a look: the storage or Ray may be away for a moment, and the other parts have to go on."""
        try:
            yield
        except Exception as error:
            logger.warning("%s failed just now (%s: %s)", what, type(error).__name__, error)

    def _look(self) -> None:
        # The time and calls come first, since they need neither the storage nor Ray.
        reason = self._called or self.limits.reached(Spent(), now=time.time())
        states: Mapping[str, TrialState] = {}
        attempts = None
        try:
            states = self.snapshot.states()
            every = [one for state in states.values() for one in state.attempts]
            attempts = [one for one in every if one["sweep_id"] == self.sweep_id]
            spent = self._spent(states, sweep_id=self.sweep_id)
            reason, self._blind = reason or self.limits.reached(spent, now=time.time()), 0
        except Exception as error:  # whatever it is, what was spent is not known
            logger.warning("what was spent cannot be read just now (%s: %s)", type(error).__name__, error)
            self._blind += 1
            if self.limits.budget_usd is not None and self._blind >= BLIND_LOOKS:
                reason = reason or f"what was spent cannot be read: {str(error) or repr(error)}"
        self._stop(reason, attempts)
        with self._spared("giving back what dead processes hold"):
            free_what_the_dead_hold()
        if attempts is None:
            return
        with self._spared("asking Ray what there is to wait for"):
            self._wait(states, attempts)
        with self._spared("telling the metrics"):
            self._metrics.tell(states.values(), self._spent(states), waiting=bool(self._waiting))

    def _spent(self, states: Mapping[str, TrialState], *, sweep_id: str | None = None) -> Spent:
        """What all these trials took, or what one sweep spent on them."""
        prices = self.snapshot.prices
        return sum((spent_on_trial(state, prices, sweep_id=sweep_id) for state in states.values()), Spent())

    def _stop(self, reason: str | None, attempts: Sequence[Mapping[str, Any]] | None) -> None:
        """Begin to stop where there is a reason, and go on with it; `attempts`: of this sweep, None where unknown."""
        begun = self.stopped is not None
        if self.stopped is None and reason is not None:
            self.stopped, self._stopped_at = reason, time.monotonic()
        if self.stopped is not None and not self._asked:
            with self._spared("asking the workers to save and leave"):
                ask(self.snapshot.storage, self.sweep_id, self.stopped)
                self._asked = True
        left = attempts is not None and all("ended" in one for one in attempts)
        if begun and (left or time.monotonic() - self._stopped_at > GRACE_S):
            self._cancel = True

    def _wait(self, states: Mapping[str, TrialState], attempts: Sequence[Mapping[str, Any]]) -> None:
        """Find out what the sweep waits for, and whether that can ever come."""
        on_offer = offer(self.snapshot.prices)
        under_way = any("ended" not in one for one in attempts)
        waits = (on_offer.waiting(need, workers=workers) for need, workers in self.wanted)
        waiting = next(filter(None, waits), "") or held_elsewhere(self.snapshot.storage, states.values())
        self._waiting = "" if under_way or self.stopped else waiting
        if self.impossible is None and not attempts:
            self.impossible = next(filter(None, (on_offer.impossible(need) for need, _ in self.wanted)), None)
        if self.impossible:
            self._cancel = True


@contextlib.contextmanager
def calls_answered(guard: Guard) -> Iterator[None]:
    """While this lasts, the first of CALLS has the guard stop the sweep, and the second interrupts it at once.

    Ray and Ray Tune have handlers of their own, which ask no worker to save. Outside the main thread nothing is done,
    since signals are handled only there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def answer(number: int, _: FrameType | None) -> None:
        if not guard.call(CALLS[signal.Signals(number)]):
            raise KeyboardInterrupt

    tunes = os.environ.get(TUNE_LEAVES_SIGINT)
    os.environ[TUNE_LEAVES_SIGINT] = "1"
    before = {number: signal.signal(number, answer) for number in CALLS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if tunes is None:
            del os.environ[TUNE_LEAVES_SIGINT]
        else:
            os.environ[TUNE_LEAVES_SIGINT] = tunes


def held_elsewhere(storage: Storage, states: Iterable[TrialState]) -> str:
    """What to say of trials that others work on, to a sweep that works on none: "" where there are none."""
    others = sum(state.status == "running" and is_held(storage, state.trial_id) for state in states)
    return (
        f"{others} of the trials {'are' if others > 1 else 'is'} worked on by another sweep; where that was killed on "
        f"another machine, this one takes over after {EXPIRY_S:.0f} s of silence"
        if others
        else ""
    )
