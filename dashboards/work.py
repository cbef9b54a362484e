"""What each cell took: attempts and what ended them, hours, GPU-hours, money, speed, and the work that was lost."""

from collections import Counter
from dataclasses import dataclass
from statistics import median

from dashboards.summary import attempts
from dashboards.tables import Cell, Column, Figure, Table
from dashboards.text import GAP, count, duration
from dashboards.view import CellView, Spent, SweepView

#: How orchestration/worker.py writes that an attempt ended without its trial being done, by what people call it.
OUTCOMES = {"preempted": "lost", "stopped": "stopped", "failed": "failed"}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one cell, or of all together. `clips_per_second` is None before an epoch has ended.

    It is the median over epochs of the clips trained on and tested by the seconds of an epoch.
    """

    done: int
    asked: int
    epochs: int
    attempts: int
    outcomes: Counter[str]
    spent: Spent
    clips_per_second: float | None


def work_of(*cells: CellView) -> Work:
    """What the trials of these cells took so far."""
    trials = [(cell, trial) for cell in cells for trial in cell.trials]
    speeds = []
    for _, trial in trials:
        result = trial.state.result or {}
        clips = (result.get("train_clips") or 0) + (result.get("test_clips") or 0)
        speeds += [clips / row["seconds"] for row in trial.state.rows if clips and row.get("seconds")]
    return Work(
        done=sum(trial.state.result is not None for _, trial in trials),
        asked=len(trials),
        epochs=sum(len(trial.state.rows) for _, trial in trials),
        attempts=sum(attempts(trial) for _, trial in trials),
        outcomes=Counter(
            str(one["outcome"]) for _, trial in trials for one in trial.state.attempts if "outcome" in one
        ),
        spent=sum((cell.spent for cell in cells), Spent()),
        clips_per_second=median(speeds) if speeds else None,
    )


def work_table(view: SweepView) -> Table:
    """One row a cell and one for all of them."""
    rows = [
        _row(f"{cell.dataset} {cell.variant}" if _several(view) else cell.variant, work_of(cell)) for cell in view.cells
    ]
    if len(view.cells) > 1:
        rows.append(_row("all", work_of(*view.cells)))
    return Table(
        name="work",
        caption="What each variant took, all attempts together",
        columns=(
            Column(heading="variant"),
            Column(heading="trials", number=True, unit="done"),
            Column(heading="epochs", number=True),
            Column(heading="clips/s", number=True),
            Column(heading="attempts", number=True),
            *(Column(heading=name, number=True, group="of which") for name in OUTCOMES),
            Column(heading="worked", number=True, group="time", unit="hours"),
            Column(heading="lost", number=True, group="time", unit="hours"),
            Column(heading="GPU-hours", number=True, group="cost"),
            Column(heading="US$", number=True, group="cost"),
            Column(heading="of it lost", number=True, group="cost", unit="US$"),
        ),
        rows=tuple(rows),
        notes=_notes(view),
    )


def _several(view: SweepView) -> bool:
    return len({cell.dataset for cell in view.cells}) > 1


def _row(name: str, work: Work) -> tuple[Cell, ...]:
    spent = work.spent
    seen = work.attempts > 0
    priced = spent.hours > spent.unpriced_hours
    return (
        name,
        Figure(work.done, f"{work.done} of {work.asked}"),
        Figure(work.epochs, count(work.epochs)),
        Figure(work.clips_per_second, GAP if work.clips_per_second is None else f"{work.clips_per_second:,.1f}"),
        Figure(work.attempts, count(work.attempts)) if seen else Figure(None),
        *(
            Figure(work.outcomes[outcome], count(work.outcomes[outcome])) if seen else Figure(None)
            for outcome in OUTCOMES.values()
        ),
        *(
            Figure(hours, duration(3600 * hours)) if spent.hours else Figure(None)
            for hours in (spent.hours, spent.lost_hours)
        ),
        Figure(spent.gpu_hours, f"{spent.gpu_hours:,.2f}") if spent.gpu_hours else Figure(None),
        *(Figure(usd, f"{usd:,.2f}") if priced else Figure(None) for usd in (spent.usd, spent.lost_usd)),
    )


def _notes(view: SweepView) -> tuple[str, ...]:
    said = [
        "Clips/s: clips trained on and tested by the time of an epoch, the median over the epochs of finished trials. "
        "Preempted: the process vanished with its machine or was killed. Stopped: the sweep was asked to end. Neither "
        "is a failure. Lost: steps that had to be trained again, and "
        "not the time of starting again."
    ]
    if not view.spent.hours:
        said.append("What attempts cost is not known here.")
    elif view.spent.unpriced_hours:
        said.append(f"{duration(3600 * view.spent.unpriced_hours)} have no price ({'; '.join(view.spent.unpriced)}).")
    if view.spent.hours and not view.spent.gpu_hours:
        said.append("No GPU was used.")
    return tuple(said)
