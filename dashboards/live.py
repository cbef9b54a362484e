"""The terminal while a sweep runs: a table where stdout is a terminal, one plain line per change where it is not.

`render` and `lines` are pure functions of snapshots; `LiveView` is the thread that asks for snapshots and shows them.
It only looks: whatever goes wrong in it, the sweep goes on.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dashboards.summary import attempts, progress
from dashboards.text import GAP, duration, percent, plural
from dashboards.view import CellView, SweepView, TrialView

logger = logging.getLogger(__name__)

#: Epochs that the pace of a trial is measured on: recent ones, so that a change of machine shows.
RECENT_EPOCHS = 5

#: More trials than this are shown as those that run and a count of the rest.
ALL_TRIALS = 24

#: Lines of the terminal that are not trials: headings, notes and the footer.
FRAME_LINES = 8

STATUS_WORDS = {"missing": "waiting", "partial": "paused"}
STATUS_STYLES = {"done": "green", "running": "bold cyan", "failed": "bold red", "partial": "yellow", "missing": "dim"}


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


def render(view: SweepView, *, now: float, began: float, height: int = 50) -> RenderableType:
    """The table and its footer; at most `height` lines."""
    trials = view.trials()
    room = max(height - FRAME_LINES - bool(view.waiting), 3)
    shown = (
        trials if len(trials) <= min(ALL_TRIALS, room) else [one for one in trials if one[1].state.status == "running"]
    )
    hidden = max(len(shown) - room, 0)
    shown = shown[:room]
    many = len({cell.dataset for cell in view.cells}) > 1
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("variant", no_wrap=True)
    for heading in ("fold", "seed"):
        table.add_column(heading, justify="right")
    table.add_column("status", no_wrap=True)
    for heading in ("epoch", "test %", "best %", "s/epoch", "ETA"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell, trial in shown:
        table.add_row(*_row(cell, trial, many))
    notes = []
    if hidden:
        notes.append(Text(f"and {hidden} more running", style="dim"))
    elif len(shown) < len(trials):
        notes.append(Text(f"{plural(len(trials) - len(shown), 'trial')} not running and not listed", style="dim"))
    if view.waiting:
        notes.append(Text(view.waiting, style="yellow"))
    title = Text.assemble((view.grid, "bold"), (f"  profile {view.profile}", "dim"))
    return Group(title, *([table] if shown else []), *notes, _footer(view, now, began))


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
        spoken.append(f"{current.grid}: {current.waiting}")
    if progress(current).finished and not progress(previous).finished:
        spoken.append(f"{current.grid}: all {plural(progress(current).asked, 'trial')} done")
    return spoken, told


def label(cell: CellView, trial: TrialView) -> str:
    """How people tell the trials apart."""
    return f"{cell.variant} fold {trial.fold} seed {trial.seed}"


def counts(view: SweepView) -> str:
    """ "3 done, 2 running, 1 failed, 12 waiting", without the zeros."""
    statuses = progress(view).statuses
    order = ("done", "running", "failed", "partial", "missing")
    said = [f"{statuses[name]} {STATUS_WORDS.get(name, name)}" for name in order if statuses.get(name)]
    return ", ".join(said) or "none"


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
            self._show(self.snapshot())
        except Exception as error:
            complaint = f"{type(error).__name__}: {error}"
            if complaint not in self._complaints:
                self._complaints.add(complaint)
                logger.warning("the live view cannot be shown just now (%s); the sweep goes on", complaint)

    def _show(self, view: SweepView) -> None:
        now = self.clock()
        if self._live is not None:
            self._live.update(render(view, now=now, began=self._began, height=self.console.height), refresh=True)
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


def _row(cell: CellView, trial: TrialView, many: bool) -> list[Text]:
    state = trial.state
    accuracies = [row["test_accuracy"] for row in state.rows]
    own_pace = pace(cell, trial)
    left = trial_eta(cell, trial) if state.status == "running" else None
    status = STATUS_WORDS.get(state.status, state.status)
    if state.status == "running" and attempts(trial) > 1:
        status = f"attempt {attempts(trial)}"
    words = [
        f"{cell.dataset} {cell.variant}" if many else cell.variant,
        str(trial.fold),
        str(trial.seed),
        status,
        f"{state.epochs_done}/{cell.epochs}",
        percent(accuracies[-1] if accuracies else None, 1),
        percent(max(accuracies, default=None), 1),
        GAP if own_pace is None else f"{own_pace:.1f}",
        duration(left if left is None else round(left)),
    ]
    style = STATUS_STYLES.get(state.status, "")
    return [Text(word, style=style if index == 3 else "") for index, word in enumerate(words)]


def _footer(view: SweepView, now: float, began: float) -> Text:
    state, eta = progress(view), sweep_eta(view)
    if state.finished:
        left = "all done"
    elif eta.seconds is None:
        left = f"ETA {GAP}"
    elif eta.unmeasured:
        left = f"ETA at least {duration(eta.seconds)} ({plural(eta.unmeasured, 'trial')} not measured yet)"
    else:
        left = f"ETA about {duration(eta.seconds)}"
    done = f"{state.epochs_done}/{state.epochs_asked} epochs"
    return Text.assemble((counts(view), "bold"), f"\n{done}, {left}, elapsed {duration(now - began)}")


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
        reason = (trial.state.error or "no error was recorded").strip().splitlines()
        return f"failed after epoch {trial.state.epochs_done}: {reason[0] if reason else ''}"
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
        best = max(one["test_accuracy"] for one in trial.state.rows)
        said.append(f"test accuracy {percent(row['test_accuracy'], 1)} % (best {percent(best, 1)})")
    if "seconds" in row:
        said.append(f"{row['seconds']:.1f} s")
    left = trial_eta(cell, trial)
    if left:
        said.append(f"{duration(round(left))} left")
    return ", ".join(said)
