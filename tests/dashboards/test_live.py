"""The live view: what it says, what it expects, and that it never gets in the way of the sweep."""

import threading
from collections.abc import Callable
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from dashboards.live import LiveView, lines, pace, render, sweep_eta, trial_eta
from dashboards.text import GAP
from dashboards.view import CellView, SweepView, TrialView

MakeView = Callable[..., SweepView]
NOW = 1_774_180_900.0


def at(done: int, status: str = "running") -> Callable[[str, int, int], tuple[str, int]]:
    return lambda variant, fold, seed: (status, done)


def one(make_view: MakeView, done: int, status: str = "running") -> SweepView:
    return make_view(folds=(1,), variants=[("mamba", "raw")], status=at(done, status))


def said(previous: SweepView | None, current: SweepView, told: dict[str, float] | None = None, now: float = NOW):
    return lines(previous, current, told or {}, now=now, every_s=30.0)


def shown(view: SweepView, width: int = 100, height: int = 50) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(render(view, now=NOW, began=NOW - 125, height=height))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def retried(view: SweepView, times: int) -> SweepView:
    def again(trial: TrialView) -> TrialView:
        return replace(trial, state=replace(trial.state, attempts=({"started": 0.0},) * times))

    cells = [replace(cell, trials=tuple(again(trial) for trial in cell.trials)) for cell in view.cells]
    return replace(view, cells=tuple(cells))


def test_the_first_line_says_how_the_sweep_stands(make_view: MakeView):
    spoken, _ = said(None, make_view(status=lambda variant, fold, seed: ("done" if fold == 1 else "missing", 0)))
    assert spoken == ["esc50: 18 trials; 6 done, 12 waiting"]


def test_a_beginning_an_epoch_and_an_end_are_told_once_each(make_view: MakeView):
    waiting, begun, risen = one(make_view, 0, "missing"), one(make_view, 0), one(make_view, 1)
    done = one(make_view, 0, "done")
    assert said(waiting, begun)[0] == ["mamba-raw fold 1 seed 0: started"]
    assert said(begun, begun)[0] == []
    assert said(begun, risen)[0][0].startswith("mamba-raw fold 1 seed 0: epoch 1 of 20, test accuracy ")
    spoken, _ = said(risen, done)
    assert spoken[0].startswith("mamba-raw fold 1 seed 0: finished, best test ")
    assert spoken[1] == "esc50: all 1 trial done"


def test_epochs_are_told_at_most_every_so_often(make_view: MakeView):
    spoken, told = said(one(make_view, 1), one(make_view, 2))
    assert len(spoken) == 1
    assert said(one(make_view, 2), one(make_view, 3), told, NOW + 29)[0] == []
    assert len(said(one(make_view, 3), one(make_view, 4), told, NOW + 31)[0]) == 1


def test_a_failure_an_interruption_and_a_new_attempt_are_always_told(make_view: MakeView):
    running = one(make_view, 7)
    assert said(running, one(make_view, 7, "failed"))[0] == [
        "mamba-raw fold 1 seed 0: failed after epoch 7: DivergedError: the loss of step 350 is not finite"
    ]
    paused = one(make_view, 7, "partial")
    assert "interrupted after epoch 7" in said(running, paused)[0][0]
    assert said(paused, retried(running, 2))[0] == ["mamba-raw fold 1 seed 0: started after epoch 7 (attempt 2)"]
    assert said(running, retried(running, 2))[0] == ["mamba-raw fold 1 seed 0: started after epoch 7 (attempt 2)"]


def test_the_time_left_comes_from_measured_epochs(make_view: MakeView):
    cell = one(make_view, 5).cells[0]
    per_epoch = pace(cell)
    assert per_epoch is not None and 30 <= per_epoch <= 31
    assert trial_eta(cell, cell.trials[0]) == pytest.approx(15 * per_epoch)


def test_a_heartbeat_inside_an_epoch_shortens_the_time_left(make_view: MakeView):
    cell = one(make_view, 5).cells[0]
    trial = replace(cell.trials[0], state=replace(cell.trials[0].state, step=275))
    halfway = replace(cell, trials=(trial,))
    assert trial_eta(halfway, trial) == pytest.approx(14.5 * (pace(cell) or 0))


def test_a_trial_that_was_never_measured_borrows_the_pace_of_its_variant(make_view: MakeView):
    view = make_view(
        folds=(1, 2), variants=[("mamba", "raw")], status=lambda v, fold, s: ("running", 4 if fold == 1 else 0)
    )
    cell = view.cells[0]
    assert trial_eta(cell, cell.trials[1]) == pytest.approx(20 * (pace(cell) or 0))


def test_a_variant_that_was_never_measured_makes_the_estimate_a_lower_bound(make_view: MakeView):
    view = make_view(
        folds=(1,), status=lambda variant, *_: ("running", 4) if variant == "mamba-raw" else ("missing", 0)
    )
    eta = sweep_eta(view)
    assert eta.unmeasured == 5
    assert eta.seconds is not None
    assert "at least" in shown(view)


def test_the_sweep_lasts_as_long_as_its_work_divided_by_what_runs(make_view: MakeView):
    def status(variant: str, fold: int, seed: int) -> tuple[str, int]:
        return ("running", 10) if fold <= 2 else ("partial", 10)

    view = make_view(folds=(1, 2, 3, 4), variants=[("mamba", "raw")], status=status)
    total = sum(trial_eta(view.cells[0], trial) or 0 for trial in view.cells[0].trials)
    assert sweep_eta(view).seconds == pytest.approx(total / 2)


def test_the_last_trial_is_not_divided(make_view: MakeView):
    view = make_view(
        folds=(1, 2), variants=[("mamba", "raw")], status=lambda v, fold, s: ("running", 1 if fold == 1 else 19)
    )
    assert sweep_eta(view).seconds == pytest.approx(trial_eta(view.cells[0], view.cells[0].trials[0]))


@pytest.mark.parametrize("status", ["missing", "running"])
def test_before_the_first_epoch_nothing_is_estimated(make_view: MakeView, status: str):
    view = make_view(status=at(0, status))
    assert sweep_eta(view).seconds is None
    assert f"ETA {GAP}" in shown(view)


def test_failed_trials_are_not_waited_for(make_view: MakeView):
    assert sweep_eta(make_view(status=at(3, "failed"))).seconds == 0.0


def test_a_small_sweep_shows_every_trial_in_80_columns(make_view: MakeView):
    text = shown(make_view(folds=(1, 2, 3), status=at(7)), width=80)
    assert text.count("mamba-raw") == 3
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "18 running" in text
    assert "elapsed 2 min 05 s" in text


def test_a_large_sweep_shows_what_runs_and_fits_the_screen(make_view: MakeView):
    def status(variant: str, fold: int, seed: int) -> tuple[str, int]:
        return ("running", 2) if variant == "helix-mel" else ("missing", 0)

    text = shown(make_view(folds=tuple(range(1, 11)), status=status), height=16)
    assert "mamba-raw" not in text
    assert "and 2 more running" in text
    assert "10 running, 50 waiting" in text
    assert len(text.splitlines()) <= 16


def test_an_empty_sweep_can_be_shown(make_view: MakeView):
    assert "none" in shown(make_view(folds=()))


class Film:
    """Snapshots one after the other; the last one stays. `seen` is set when it was asked for."""

    def __init__(self, *frames: SweepView | Exception):
        self.frames, self.position, self.seen = frames, 0, threading.Event()

    def __call__(self) -> SweepView:
        frame = self.frames[min(self.position, len(self.frames) - 1)]
        self.position += 1
        if self.position > len(self.frames):
            self.seen.set()
        if isinstance(frame, Exception):
            raise frame
        return frame


def played(film: Film, *, terminal: bool = False) -> str:
    console = Console(file=StringIO(), width=100, force_terminal=terminal)
    with LiveView(film, console=console, poll_s=0.01):
        assert film.seen.wait(10)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_without_a_terminal_there_is_one_plain_line_per_change(make_view: MakeView):
    text = played(Film(one(make_view, 0, "missing"), one(make_view, 0), one(make_view, 0, "done")))
    assert [line.split(",")[0] for line in text.splitlines()] == [
        "esc50: 1 trial; 1 waiting",
        "mamba-raw fold 1 seed 0: started",
        "mamba-raw fold 1 seed 0: finished",
        "esc50: all 1 trial done",
    ]
    assert "\x1b" not in text


def test_on_a_terminal_there_is_a_table(make_view: MakeView):
    text = played(Film(one(make_view, 3)), terminal=True)
    assert "mamba-raw" in text
    assert "s/epoch" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_storage_that_fails_is_mentioned_once_and_the_view_goes_on(
    make_view: MakeView, caplog: pytest.LogCaptureFixture, terminal: bool
):
    trouble = OSError("the folder is away")
    text = played(Film(trouble, trouble, trouble, one(make_view, 3)), terminal=terminal)
    assert len([record for record in caplog.records if "the folder is away" in record.message]) == 1
    assert "esc50" in text


def test_the_sweep_ends_when_it_ends_whatever_the_view_does(make_view: MakeView):
    film = Film(one(make_view, 3))
    with pytest.raises(KeyboardInterrupt), LiveView(film, console=Console(file=StringIO()), poll_s=60.0):
        raise KeyboardInterrupt
    assert not any(thread.name == "live view" for thread in threading.enumerate())


def test_the_last_state_is_shown_before_the_view_stops(make_view: MakeView):
    running, done = one(make_view, 3), one(make_view, 0, "done")
    console = Console(file=StringIO(), width=100)
    now: list[SweepView] = [running]
    asked = threading.Event()

    def snapshot() -> SweepView:
        view = now[0]
        asked.set()
        return view

    with LiveView(snapshot, console=console, poll_s=60.0):
        assert asked.wait(10)
        now[0] = done
    assert isinstance(console.file, StringIO)
    assert "all 1 trial done" in console.file.getvalue()


def test_pace_is_unknown_before_the_first_epoch():
    cell = CellView(dataset="d", variant="v", frontend="raw", backbone="b", pattern=("mamba",), epochs=3)
    assert pace(cell) is None


def test_what_a_sweep_waits_for_is_said_once_and_shown(make_view: MakeView):
    idle = make_view(status=lambda *_: ("missing", 0))
    waiting = replace(idle, waiting="waiting for a GPU: 0 of 2 nodes started")
    spoken, said = lines(idle, waiting, {}, now=0.0, every_s=30.0)
    assert spoken == ["esc50: waiting for a GPU: 0 of 2 nodes started"]
    assert lines(waiting, waiting, said, now=1.0, every_s=30.0)[0] == []
    assert "waiting for a GPU: 0 of 2 nodes started" in shown(waiting)
