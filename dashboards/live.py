"""How a sweep stands, for the terminal: tables where stdout is a terminal, plain lines where it is not.

`render`, `standing` and `lines` are pure functions of snapshots; `LiveView` is the thread that asks for snapshots and
shows them. It only looks: whatever goes wrong in it, the sweep goes on. `helix status` shows the same from storage.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dashboards.summary import attempts, progress, sampling_word
from dashboards.text import GAP, cost_line, duration, moment, percent, plural, printable
from dashboards.view import CellView, SweepView, TrialView

logger = logging.getLogger(__name__)

#: Epochs that the pace of a trial is measured on: recent ones, so that a change of machine shows.
RECENT_EPOCHS = 5

#: Lines of the terminal that are neither cells nor trials: headings, notes and the footer.
FRAME_LINES = 14

STATUS_WORDS = {"missing": "waiting", "partial": "paused"}
STATUS_STYLES = {"done": "green", "running": "bold cyan", "failed": "bold red", "partial": "yellow", "missing": "dim"}

#: Why trials failed is told of so many; the rest is in the report.
FAILURES = 3

#: What stands for a trial where there is room for one character, and before its epochs where there is room for them.
MARKS = {"done": "✓", "running": "▸", "failed": "✗", "partial": "‖", "missing": "·"}


@dataclass(frozen=True, kw_only=True)
class Eta:
    """Seconds until the end, as far as they can be known. `unmeasured`: trials whose variant has no epoch yet."""

    seconds: float | None
    unmeasured: int = 0


def pace(cell: CellView, trial: TrialView | None = None) -> float | None:
    """Seconds per epoch over the recent epochs of one trial, or of all trials of the cell; None before the first."""
    trials = cell.trials if trial is None else (trial,)
    seconds = [row["seconds"] for one in trials for row in one.state.rows[-RECENT_EPOCHS:]]
    return sum(seconds) / len(seconds) if seconds else None


def trial_eta(cell: CellView, trial: TrialView) -> float | None:
    """Seconds that a trial still needs once it runs, at its own pace or else its cell's; None before any epoch."""
    if trial.state.status == "done":
        return 0.0
    per_epoch = pace(cell, trial) or pace(cell)
    if per_epoch is None:
        return None
    return max(cell.epochs - _epochs_behind(cell, trial), 0.0) * per_epoch


def sweep_eta(view: SweepView) -> Eta:
    """Seconds until the last trial ends, if as many go on running side by side as do now. Failed trials do not count.

    Trials of a variant that was not yet measured add nothing to `seconds`, which is then a lower bound.
    """
    unfinished = [(cell, trial) for cell, trial in view.trials() if trial.state.status not in ("done", "failed")]
    if not unfinished:
        return Eta(seconds=0.0)
    known = [trial_eta(cell, trial) for cell, trial in unfinished]
    measured = [seconds for seconds in known if seconds is not None]
    side_by_side = sum(trial.state.status == "running" for _, trial in unfinished)
    if not measured or not side_by_side:
        return Eta(seconds=None, unmeasured=len(known) - len(measured))
    return Eta(seconds=max(sum(measured) / side_by_side, *measured), unmeasured=len(known) - len(measured))


def best(trial: TrialView) -> float | None:
    """The best test accuracy of any epoch so far."""
    told = [row["test_accuracy"] for row in trial.state.rows if "test_accuracy" in row]
    return max([*told, *([] if trial.state.best is None else [trial.state.best])], default=None)


def steps_per_s(cell: CellView, trial: TrialView) -> float | None:
    """Optimiser steps a second over the recent epochs, evaluation included; None before the first epoch."""
    per_epoch, row = pace(cell, trial), trial.state.rows[-1] if trial.state.rows else {}
    return row["step"] / row["epoch"] / per_epoch if per_epoch and row.get("step") else None


def silence(view: SweepView, trial: TrialView) -> float | None:
    """Seconds since a trial was last heard of, where somebody began it and left without a word."""
    last = trial.state.attempts[-1] if trial.state.attempts else {}
    if trial.state.status != "partial" or trial.state.heard is None or "ended" in last:
        return None
    return max(view.created - trial.state.heard, 0.0)


def render(
    view: SweepView, *, now: float, began: float | None = None, height: int | None = None, width: int = 100
) -> RenderableType:
    """Cells x folds, the trials that people have to know of, and a footer; at most `height` lines, None for all.

    `began`: when the watching began, None where nobody watches.
    """
    shown = [one for one in view.trials() if one[1].state.status not in ("done", "missing")]
    shown.sort(key=lambda one: ("running", "failed", "partial").index(one[1].state.status))
    failures = min(sum(trial.state.status == "failed" for _, trial in shown), FAILURES)
    waiting = -(-len(view.waiting) // width)
    damage = min(len(view.damage), FAILURES + 1)
    frame = FRAME_LINES + failures + waiting + damage
    room = len(view.cells) + len(shown) if height is None else max(height - frame, 4)
    cells = view.cells[: max(room - min(len(shown), 3), 1)]
    listed = shown[: max(room - len(cells), 0)]
    parts: list[RenderableType] = [
        Text.assemble((view.grid, "bold"), (f"  profile {view.profile}, {view.storage}", "dim"))
    ]
    if cells:
        parts += [Text(), _cells_table(view, cells, width), Text(_legend(view, cells, width), style="dim")]
    if len(cells) < len(view.cells):
        parts.append(Text(f"and {plural(len(view.cells) - len(cells), 'more variant')}", style="dim"))
    if listed:
        parts += [Text(), _trials_table(view, listed)]
    if len(listed) < len(shown):
        parts.append(Text(f"and {_counted(shown[len(listed) :])} more, not listed", style="dim"))
    parts += [Text(), *(Text(line, style="red") for line in _failures(listed, width))]
    if view.waiting:
        parts.append(Text(printable(view.waiting), style="yellow"))
    parts += [Text(f"damaged: {printable(line)}", style="bold red") for line in view.damage[:FAILURES]]
    if len(view.damage) > FAILURES:
        more = plural(len(view.damage) - FAILURES, "more record")
        parts.append(Text(f"and {more} damaged: helix verify lists them", style="bold red"))
    parts.append(Text(counts(view), style="bold"))
    parts += [Text(line) for line in _footer(view, None if began is None else now - began)]
    return Group(*parts)


def standing(view: SweepView) -> list[str]:
    """How the sweep stands in plain lines, one for each trial: for pipes and logs."""
    footer = _footer(view, None)
    said = [f"{view.grid}, profile {view.profile}: {plural(progress(view).asked, 'trial')}; {counts(view)}", *footer]
    if view.waiting:
        said.append(printable(view.waiting))
    said += [f"{label(cell, trial)}: {_stands(view, cell, trial)}" for cell, trial in view.trials()]
    return said + [f"damaged: {printable(line)}" for line in view.damage]


def as_json(view: SweepView) -> dict[str, Any]:
    """The same as plain JSON values; times are Unix seconds, and None is what is not known.

    `usd` is of the hours that have a price: None where none has, and a part of the cost beside `unpriced_hours`.
    """
    state, eta, spent = progress(view), sweep_eta(view), view.spent
    return {
        "grid": view.grid,
        "profile": view.profile,
        "storage": view.storage,
        "time": view.created,
        "statuses": state.statuses,
        "epochs_done": state.epochs_done,
        "epochs_asked": state.epochs_asked,
        "eta_seconds": eta.seconds,
        "unmeasured_trials": eta.unmeasured,
        "waiting": view.waiting,
        "damaged": list(view.damage),
        "cost": asdict(spent)
        | {"unpriced": list(spent.unpriced), "usd": spent.known_usd, "lost_usd": spent.known_lost_usd},
        "trials": [
            {
                "trial_id": trial.trial_id,
                "variant": cell.variant,
                "fold": trial.fold,
                "seed": trial.seed,
                "status": trial.state.status,
                "epochs_done": trial.state.epochs_done,
                "epochs_asked": cell.epochs,
                "best_test_accuracy": best(trial),
                "seconds_per_epoch": pace(cell, trial),
                "steps_per_second": steps_per_s(cell, trial),
                "eta_seconds": trial_eta(cell, trial) if trial.state.status == "running" else None,
                "attempts": attempts(trial),
                "host": (trial.state.attempts[-1] if trial.state.attempts else {}).get("host"),
                "heard": trial.state.heard,
                "error": trial.state.error,
                "usd": trial.spent.known_usd,
                "hours": trial.spent.hours,
                "unpriced_hours": trial.spent.unpriced_hours,
            }
            for cell, trial in view.trials()
        ],
    }


def lines(
    previous: SweepView | None, current: SweepView, said: Mapping[str, float], *, now: float, every_s: float
) -> tuple[list[str], dict[str, float]]:
    """What changed between two snapshots, one sentence each, and when each trial's last epoch was told.

    `said` is the second value of the call before. Epochs of one trial are told at most every `every_s` seconds;
    beginnings, ends and failures always.
    """
    if previous is None:
        return [f"{current.grid}: {plural(progress(current).asked, 'trial')}; {counts(current)}"], dict(said)
    before = {trial.trial_id: trial for _, trial in previous.trials()}
    told, spoken = dict(said), []
    for cell, trial in current.trials():
        old = before.get(trial.trial_id)
        line = _change(current, old, trial)
        if line is None and trial.state.epochs_done > (old.state.epochs_done if old else 0):
            if now - told.get(trial.trial_id, -every_s) < every_s:
                continue
            told[trial.trial_id] = now
            line = _epoch(cell, trial)
        if line is not None:
            spoken.append(f"{label(cell, trial)}: {line}")
    if current.waiting and current.waiting != previous.waiting:
        spoken.append(f"{current.grid}: {printable(current.waiting)}")
    if progress(current).finished and not progress(previous).finished:
        spoken.append(f"{current.grid}: all {plural(progress(current).asked, 'trial')} done")
    return spoken, told


def label(cell: CellView, trial: TrialView) -> str:
    """How people tell the trials apart."""
    return f"{cell.variant} fold {trial.fold} seed {trial.seed}"


def counts(view: SweepView) -> str:
    """ "3 done, 2 running, 1 failed, 12 waiting", without the zeros."""
    return _counted(view.trials()) or "none"


class LiveView:
    """Shows a sweep while it runs: `with LiveView(snapshot): ...`. `snapshot` is called in a thread of its own.

    `poll_s`: seconds between snapshots. `every_s`: the least seconds between two epoch lines of one trial where the
    output is not a terminal.
    """

    def __init__(
        self,
        snapshot: Callable[[], SweepView],
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.time,
        poll_s: float = 1.0,
        every_s: float = 30.0,
    ):
        self.snapshot, self.clock, self.poll_s, self.every_s = snapshot, clock, poll_s, every_s
        self.console = console or Console()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="live view", daemon=True)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._began = clock()
        self._previous: SweepView | None = None
        self._said: dict[str, float] = {}
        self._complaints: set[str] = set()
        self._shown = threading.Condition()
        self._last: SweepView | None = None

    def wait(self, until: Callable[[SweepView], bool]) -> None:
        """Until a view of which `until` is true was shown."""
        with self._shown:
            self._shown.wait_for(lambda: self._last is not None and until(self._last))

    def __enter__(self) -> "LiveView":
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Show the last state and stop. A snapshot that hangs is left behind after ten seconds."""
        self._stop.set()
        self._thread.join(timeout=10.0)
        if self._live is not None:
            self._live.stop()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._look()
            self._stop.wait(self.poll_s)
        self._look()

    def _look(self) -> None:
        try:
            view = self.snapshot()
            self._show(view)
            with self._shown:
                self._last = view
                self._shown.notify_all()
        except Exception as error:
            complaint = f"{type(error).__name__}: {error}"
            if complaint not in self._complaints:
                self._complaints.add(complaint)
                logger.warning("the sweep cannot be shown just now (%s); it goes on", complaint)

    def _show(self, view: SweepView) -> None:
        now = self.clock()
        if self._live is not None:
            size = {"height": self.console.height, "width": self.console.width}
            self._live.update(render(view, now=now, began=self._began, **size), refresh=True)
            return
        spoken, self._said = lines(self._previous, view, self._said, now=now, every_s=self.every_s)
        self._previous = view
        for line in spoken:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _epochs_behind(cell: CellView, trial: TrialView) -> float:
    """Epochs that a trial has behind it, with the part of the one under way that its heartbeat tells of."""
    rows = trial.state.rows or next((one.state.rows for one in cell.trials if one.state.rows), ())
    if not rows:
        return float(trial.state.epochs_done)
    return max(float(trial.state.epochs_done), trial.state.step * rows[-1]["epoch"] / rows[-1]["step"])


def _cells_table(view: SweepView, cells: Sequence[CellView], width: int) -> Table:
    """A row for each cell and a column for each of its folds and seeds, or a character where they are too many."""
    many = len({cell.dataset for cell in view.cells}) > 1
    columns = _columns(view)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("variant", no_wrap=True)
    if _wide(view, width):
        for fold, seed in columns:
            table.add_column(f"fold {fold}" + (f" seed {seed}" if _seeds(view) else ""), justify="right", no_wrap=True)
    else:
        table.add_column(f"{sampling_word(view)}s", overflow="fold")
        table.add_column("done", justify="right", no_wrap=True)
        table.add_column("mean best %", justify="right", no_wrap=True)
    for cell in cells:
        by_column = {(trial.fold, trial.seed): trial for trial in cell.trials}
        name = Text(f"{cell.dataset} {cell.variant}" if many else cell.variant)
        if _wide(view, width):
            table.add_row(name, *(_cell(cell, by_column.get(column)) for column in columns))
            continue
        marks = Text()
        for trial in cell.trials:
            marks.append(MARKS[trial.state.status], style=STATUS_STYLES[trial.state.status])
        done = [trial for trial in cell.trials if trial.state.status == "done"]
        known = [value for trial in done if (value := best(trial)) is not None]
        mean = sum(known) / len(known) if known else None
        table.add_row(name, marks, Text(f"{len(done)}/{len(cell.trials)}"), Text(percent(mean, 1)))
    return table


def _columns(view: SweepView) -> list[tuple[int, int]]:
    """Fold and seed of every column."""
    pairs = {(trial.fold, trial.seed) for _, trial in view.trials()}
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))


def _seeds(view: SweepView) -> bool:
    """Whether trials differ in their seeds."""
    return len({trial.seed for _, trial in view.trials()}) > 1


def _wide(view: SweepView, width: int) -> bool:
    """Whether every trial has room for its epochs beside the names of the variants."""
    names = max((len(cell.variant) + len(cell.dataset) + 2 for cell in view.cells), default=0)
    room = max((len(f"{MARKS['running']}{cell.epochs}/{cell.epochs}") for cell in view.cells), default=0)
    return names + len(_columns(view)) * (max(room, 14 if _seeds(view) else 7) + 1) <= width


def _cell(cell: CellView, trial: TrialView | None) -> Text:
    """One trial in a few characters: its best accuracy where it is done, else how far it is; never by colour alone."""
    if trial is None:
        return Text()
    state = trial.state
    words = {"done": percent(best(trial), 1), "missing": MARKS["missing"]}
    word = words.get(state.status, f"{MARKS.get(state.status)}{state.epochs_done}/{cell.epochs}")
    return Text(word, style=STATUS_STYLES[state.status])


def _legend(view: SweepView, cells: Sequence[CellView], width: int) -> str:
    """What the signs mean that are there."""
    there = {trial.state.status for cell in cells for trial in cell.trials}
    said = ["best test accuracy in %"] if _wide(view, width) and "done" in there else []
    if not _wide(view, width) and "done" in there:
        said.append(f"{MARKS['done']} done")
    others = [status for status in ("running", "partial", "failed", "missing") if status in there]
    return ", ".join([*said, *(f"{MARKS[status]} {STATUS_WORDS.get(status, status)}" for status in others)])


def _trials_table(view: SweepView, shown: Sequence[tuple[CellView, TrialView]]) -> Table:
    many = len({cell.dataset for cell in view.cells}) > 1
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("variant", no_wrap=True)
    for heading in ("fold", "seed") if _seeds(view) else ("fold",):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for heading in ("epoch", "test %", "best %", "s/epoch", "ETA"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell, trial in shown:
        table.add_row(*_row(view, cell, trial, many))
    return table


def _row(view: SweepView, cell: CellView, trial: TrialView, many: bool) -> list[Text]:
    state = trial.state
    accuracies = [row["test_accuracy"] for row in state.rows]
    own_pace = pace(cell, trial)
    left = trial_eta(cell, trial) if state.status == "running" else None
    status, silent_s = STATUS_WORDS.get(state.status, state.status), silence(view, trial)
    if state.status == "running" and attempts(trial) > 1:
        status = f"attempt {attempts(trial)}"
    elif silent_s is not None:
        status = f"silent {duration(60 * round(silent_s / 60)).removesuffix(' 00 s')}"
    words = [
        f"{cell.dataset} {cell.variant}" if many else cell.variant,
        str(trial.fold),
        *([str(trial.seed)] if _seeds(view) else []),
        status,
        f"{state.epochs_done}/{cell.epochs}",
        percent(accuracies[-1] if accuracies else None, 1),
        percent(best(trial), 1),
        GAP if own_pace is None else f"{own_pace:.1f}",
        duration(left if left is None else round(left)),
    ]
    style = STATUS_STYLES[state.status]
    return [Text(word, style=style if word is status else "") for word in words]


def _failures(shown: Sequence[tuple[CellView, TrialView]], width: int) -> list[str]:
    """Why trials failed, a line each, for as many as are worth the room."""
    failed = [one for one in shown if one[1].state.status == "failed"]
    said = [f"{label(cell, trial)}: {_reason(trial)}" for cell, trial in failed[:FAILURES]]
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in said]


def _reason(trial: TrialView) -> str:
    """The first line of why a trial failed."""
    return next(iter(printable(trial.state.error or "no error was recorded").strip().splitlines()), "")


def _counted(shown: Sequence[tuple[CellView, TrialView]]) -> str:
    """ "3 running, 1 failed": of these trials, without the zeros."""
    statuses = Counter(trial.state.status for _, trial in shown)
    order = ("done", "running", "failed", "partial", "missing")
    return ", ".join(f"{statuses[name]} {STATUS_WORDS.get(name, name)}" for name in order if statuses[name])


def _footer(view: SweepView, elapsed_s: float | None) -> list[str]:
    """Epochs, the time left and by how many at once, and what it cost so far."""
    state, eta = progress(view), sweep_eta(view)
    running = state.statuses.get("running", 0)
    over = state.statuses.get("done", 0) + state.statuses.get("failed", 0) == state.asked
    if state.finished:
        left = "all done"
    elif over:
        left = "nothing left but what failed"
    elif eta.seconds is None:
        left = f"ETA {GAP}"
    elif eta.unmeasured:
        left = f"ETA at least {duration(eta.seconds)} ({plural(eta.unmeasured, 'trial')} not measured yet)"
    else:
        left = f"ETA about {duration(eta.seconds)} ({moment(view.created + eta.seconds)})"
    said = [f"{state.epochs_done}/{state.epochs_asked} epochs, {left}"]
    watched = [f"{plural(running, 'worker')} active"] if running else []
    watched += [] if elapsed_s is None else [f"elapsed {duration(elapsed_s)}"]
    said += [", ".join(watched)] if watched else []
    if view.spent.hours:
        said.append(f"cost so far: {cost_line(view.spent)}")
    return said


def _stands(view: SweepView, cell: CellView, trial: TrialView) -> str:
    """One trial in a sentence: status, epochs, accuracy, speed, time left, attempts and who works on it."""
    state, silent_s = trial.state, silence(view, trial)
    last = state.attempts[-1] if state.attempts else {}
    if state.status == "missing":
        return STATUS_WORDS["missing"]
    said = [STATUS_WORDS.get(state.status, state.status), f"epoch {state.epochs_done} of {cell.epochs}"]
    if (found := best(trial)) is not None:
        said.append(f"best test accuracy {percent(found, 1)} %")
    own_pace, speed = pace(cell, trial), steps_per_s(cell, trial)
    if own_pace is not None:
        said.append(f"{own_pace:.1f} s an epoch" + (f" ({speed:.2f} steps/s)" if speed else ""))
    if state.status == "running":
        if (left := trial_eta(cell, trial)) is not None:
            said.append(f"{duration(round(left))} left")
        if last.get("host"):
            said.append(f"on {printable(last['host'])}")
    if attempts(trial) > 1:
        said.append(f"attempt {attempts(trial)}" if state.status == "running" else f"{attempts(trial)} attempts")
    if silent_s is not None:
        where = f" on {printable(last['host'])}" if last.get("host") else ""
        said.append(f"silent since {moment(view.created - silent_s)}{where}")
    if state.status == "failed":
        said.append(_reason(trial))
    return ", ".join(said)


def _change(view: SweepView, old: TrialView | None, trial: TrialView) -> str | None:
    """A beginning, an end, a failure or an interruption in words; None where the trial just goes on."""
    was, status = old.state.status if old else "missing", trial.state.status
    began_again = old is not None and attempts(trial) > attempts(old)
    if status == "running" and (was != "running" or began_again):
        after = f" after epoch {trial.state.epochs_done}" if trial.state.epochs_done else ""
        again = f" (attempt {attempts(trial)})" if attempts(trial) > 1 else ""
        return f"started{after}{again}"
    if status == was and not began_again:
        return None
    if status == "done":
        return f"finished, {_outcome(trial)}; {counts(view)}"
    if status == "failed":
        return f"failed after epoch {trial.state.epochs_done}: {_reason(trial)}"
    if status == "partial":
        return f"interrupted after epoch {trial.state.epochs_done}, waiting to go on"
    return None


def _outcome(trial: TrialView) -> str:
    result = trial.state.result or {}
    accuracy = result.get("accuracy") or {}
    said = [
        f"{word} {percent(accuracy[rule], 1)} %"
        for rule, word in (("best_test", "best test"), ("last", "last"), ("validation", "validation"))
        if accuracy.get(rule) is not None
    ]
    if result.get("train_seconds") is not None:
        said.append(f"trained {duration(result['train_seconds'])}")
    return ", ".join(said) or "without an accuracy"


def _epoch(cell: CellView, trial: TrialView) -> str:
    row = trial.state.rows[-1] if trial.state.rows else {}
    said = [f"epoch {trial.state.epochs_done} of {cell.epochs}"]
    if "test_accuracy" in row:
        said.append(f"test accuracy {percent(row['test_accuracy'], 1)} % (best {percent(best(trial), 1)})")
    if "seconds" in row:
        said.append(f"{row['seconds']:.1f} s")
    left = trial_eta(cell, trial)
    if left:
        said.append(f"{duration(round(left))} left")
    return ", ".join(said)
