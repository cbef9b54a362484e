"""The live view: what it says, what it expects, and that it never gets in the way of the sweep."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from dashboards.live import (
    LiveView,
    as_json,
    best,
    lines,
    pace,
    render,
    standing,
    steps_per_s,
    sweep_eta,
    trial_eta,
)
from dashboards.text import GAP
from dashboards.view import CellView, Spent, SweepView, TrialView

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
    console.print(render(view, now=NOW, began=NOW - 125, height=height, width=width))
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
    assert text.count("mamba-raw") == 1 + 3  # its row among the cells, and its trials
    assert text.count("▸7/20") == 18
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "18 running" in text
    assert "18 workers active, elapsed 2 min 05 s" in text


def test_a_large_sweep_shows_what_runs_and_fits_the_screen(make_view: MakeView):
    def status(variant: str, fold: int, seed: int) -> tuple[str, int]:
        return ("running", 2) if variant == "helix-mel" else ("missing", 0)

    for height in (22, 24, 30):
        text = shown(make_view(folds=tuple(range(1, 11)), status=status), height=height)
        assert "10 running, 50 waiting" in text
        assert len(text.splitlines()) <= height
        hidden = re.findall(r"and (\d+) running more, not listed", text)
        assert text.count("\nhelix-mel") - 1 + sum(map(int, hidden)) == 10
        assert bool(hidden) == (height < 30)


def test_a_cell_shows_accuracy_epochs_or_a_sign_for_each_fold(make_view: MakeView):
    stands = {1: ("done", 0), 2: ("running", 7), 3: ("failed", 3), 4: ("partial", 5), 5: ("missing", 0)}
    view = make_view(folds=stands, variants=[("mamba", "raw")], status=lambda v, fold, s: stands[fold])
    row = next(line for line in shown(view).splitlines() if line.startswith("mamba-raw"))
    accuracy = 100 * max(one["test_accuracy"] for one in view.cells[0].trials[0].state.rows)
    assert row.split() == ["mamba-raw", f"{accuracy:.1f}", "▸7/20", "✗3/20", "‖5/20", "·"]
    assert "best test accuracy in %, ▸ running, ‖ paused, ✗ failed, · waiting" in shown(view)
    assert "mamba-raw fold 3 seed 0: DivergedError: the loss of step 350 is not finite" in shown(view)


def test_many_folds_and_seeds_are_a_sign_each(make_view: MakeView):
    view = make_view(
        folds=range(1, 11), seeds=range(3), status=lambda v, fold, s: ("done" if fold < 3 else "failed", 1)
    )
    row = next(line for line in shown(view, width=80).splitlines() if line.startswith("helix-mel"))
    assert row.split()[1:3] == [("✓" * 2 + "✗" * 8) * 3, "6/30"]


def test_who_fell_silent_is_shown_and_since_when(make_view: MakeView):
    view = heard(one(make_view, 5, "partial"), ago_s=720.0, host="node-7")
    assert "silent 12 min" in shown(view)
    (line,) = [line for line in standing(view) if "fold 1" in line]
    assert "paused, epoch 5 of 20" in line
    assert line.endswith("silent since 2026-03-22 11:48 UTC on node-7")
    ended = heard(one(make_view, 5, "partial"), ago_s=720.0, ended=1.0)
    assert "silent" not in shown(ended) + "".join(standing(ended))


def heard(view: SweepView, *, ago_s: float, **attempt: object) -> SweepView:
    def told(trial: TrialView) -> TrialView:
        attempts = ({"attempt_id": "first", "started": 0.0, **attempt},)
        return replace(trial, state=replace(trial.state, attempts=attempts, heard=view.created - ago_s))

    cells = [replace(cell, trials=tuple(told(trial) for trial in cell.trials)) for cell in view.cells]
    return replace(view, cells=tuple(cells))


def test_plain_lines_hold_a_line_for_each_trial_with_its_speed(make_view: MakeView):
    view = make_view(folds=(1, 2), variants=[("mamba", "raw")], status=lambda v, fold, s: ("running", 4 * fold))
    pace_s, speed = pace(view.cells[0], view.cells[0].trials[1]), steps_per_s(view.cells[0], view.cells[0].trials[1])
    assert speed is not None and pace_s is not None and speed == pytest.approx(50 / pace_s)
    told = standing(view)
    assert told[0] == "esc50, profile paper: 2 trials; 2 running"
    assert told[1].startswith("12/40 epochs, ETA about ")
    assert f"{pace_s:.1f} s an epoch ({speed:.2f} steps/s)" in told[-1]
    assert told[-1].startswith("mamba-raw fold 2 seed 0: running, epoch 8 of 20, best test accuracy ")


def test_the_best_epoch_may_be_older_than_the_rows_at_hand(make_view: MakeView):
    trial = one(make_view, 5).cells[0].trials[0]
    assert best(replace(trial, state=replace(trial.state, rows=trial.state.rows[-1:], best=0.9))) == 0.9
    assert best(replace(trial, state=replace(trial.state, rows=()))) is None


def test_cost_so_far_stands_in_the_footer(make_view: MakeView):
    view = one(make_view, 3)
    trial = replace(view.cells[0].trials[0], spent=Spent(hours=2.0, gpu_hours=2.0, usd=0.8))
    view = replace(view, cells=(replace(view.cells[0], trials=(trial,)),))
    assert "cost so far: 2.00 GPU-hours, $0.80" in shown(view)
    assert "cost so far: 2.00 GPU-hours, $0.80" in standing(view)


def test_the_json_of_a_view_can_be_written_and_says_the_same(make_view: MakeView):
    view = make_view(
        status=lambda v, fold, s: ("done" if fold == 1 else "running" if fold == 2 else "missing", 3 * (fold == 2))
    )
    value = json.loads(json.dumps(as_json(view), allow_nan=False))
    assert value["statuses"] == {"done": 6, "running": 6, "missing": 6}
    assert [trial["status"] for trial in value["trials"][:3]] == ["done", "running", "missing"]
    assert value["trials"][1]["seconds_per_epoch"] == pace(view.cells[0], view.cells[0].trials[1])
    assert value["trials"][2]["best_test_accuracy"] is None
    assert value["eta_seconds"] == sweep_eta(view).seconds


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
