"""The contract of a fault: it is caused for real on a site, and says what it cost. Its members are in faults/."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from helix.data.shards import Recordings
from helix.registry import Registry
from helix.spec import to_json, trial_id
from helix.storage import Storage, open_storage
from orchestration.certify import BIT_EXACT, Pace, compare, finished, lost_steps, seconds_to_next_step
from orchestration.grid import Trial
from orchestration.twin import Attempt, Order, Twins

#: How long a storage answers wrongly, in seconds.
OUTAGE_S = 60.0

#: Where a fault happens: to the plain loop in a process, or to a sweep on Ray.
Where = Literal["plain", "ray"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What faults of one kind cost: `count` of them, on `trial`.

    `steps_lost`: steps that were trained again. `seconds_to_next_step`: from the fault to the next finished step, the
    worst one of several. `verdict`: how the trial ended beside the undisturbed one, and `passed` whether as it must;
    None where the fault could not be caused here, which the verdict explains.
    """

    fault: str
    trial: str
    verdict: str
    passed: bool | None
    count: int = 1
    steps_lost: int | None = None
    seconds_to_next_step: float | None = None


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where faults are caused: trials of one grid on prepared data, in a storage that is thrown away afterwards.

    `trials` has one for each variant. `kills` is how many processes the fault that is about killing kills, over all
    variants; `seed` draws whatever is drawn. `grid` is the name of the grid, `overrides` what it was expanded with.
    `outage_s`: how long a storage that answers wrongly does so.
    """

    grid: str
    trials: tuple[Trial, ...]
    recordings: Recordings
    storage: Storage
    kills: int
    seed: int
    twins: Twins
    say: Callable[[str], None]
    overrides: tuple[str, ...] = ()
    outage_s: float = OUTAGE_S
    _undisturbed: dict[str, tuple[Storage, Attempt]] = field(default_factory=dict)

    def bench(self, name: str, trial: Trial | None = None, *, most_s: float | None = None) -> "Bench":
        """A fresh place called `name` for one trial, by default the last, beside its undisturbed run.

        `most_s`: the most seconds between checkpoints, by default so that the trial makes about twenty.
        """
        trial = trial or self.trials[-1]
        order = Order(
            spec=to_json(trial.spec),
            source=repr(self.storage),
            data=self.recordings.prepared.prefix,
            storage=f"{self.storage!r}/undisturbed",
        )
        name_of_trial = trial_id(trial.spec, self.recordings.manifest_sha256)
        if name_of_trial not in self._undisturbed:
            self._undisturbed[name_of_trial] = open_storage(order.storage), finished(self.twins.run(order))
        whole, attempt = self._undisturbed[name_of_trial]
        pace = Pace.of(attempt)
        order = replace(
            order,
            storage=f"{self.storage!r}/faults/{name.replace(' ', '-')}",
            steps=attempt.steps[-1][0],
            save_every_s=pace.step_s * attempt.steps[-1][0] / 20 if most_s is None else most_s,
        )
        return Bench(
            fault=name,
            trial=trial,
            trial_id=name_of_trial,
            order=order,
            storage=open_storage(order.storage),
            whole=whole,
            pace=pace,
            twins=self.twins,
        )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A trial to which a fault is done: its `order` and `storage`; of its undisturbed run the storage and the pace."""

    fault: str
    trial: Trial
    trial_id: str
    order: Order
    storage: Storage
    whole: Storage
    pace: Pace
    twins: Twins

    @property
    def steps(self) -> int:
        return self.order.steps

    def row(
        self, attempts: list[Attempt], *, problem: str = "", aside: str = "", seconds: float | None = None, **said: int
    ) -> Row:
        """The row of these attempts, the last of which finished the trial.

        `problem`: what went otherwise than it must, which fails the fault; `aside`: what to say with the verdict.
        """
        verdict = compare(self.whole, self.storage, self.trial_id)["verdict"]
        waits = [wait for wait in seconds_to_next_step(attempts) if wait is not None]
        return Row(
            fault=self.fault,
            trial=self.trial.label,
            verdict="; ".join(filter(None, (problem, verdict, aside))),
            passed=verdict == BIT_EXACT and not problem,
            steps_lost=said.get("steps_lost", sum(lost_steps(attempts))),
            seconds_to_next_step=max(waits, default=None) if seconds is None else seconds,
        )

    def skipped(self, reason: str) -> Row:
        """The row of a fault that cannot be caused here."""
        return Row(fault=self.fault, trial=self.trial.label, verdict=f"not caused here: {reason}", passed=None, count=0)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault and where it happens. `cause` does it, and returns its rows."""

    where: Where
    cause: Callable[[Site], Iterable[Row]]


FAULTS: Registry[Fault] = Registry("fault", "orchestration.faults")


def fault(name: str, *, where: Where = "plain") -> Callable[[Callable[[Site], Iterable[Row]]], Fault]:
    """Decorator: makes a function the fault `name`."""

    def add(cause: Callable[[Site], Iterable[Row]]) -> Fault:
        return FAULTS.register(name)(Fault(where=where, cause=cause))

    return add
