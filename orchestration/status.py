"""How sweeps stand, from anywhere: nothing is asked but the storage, and nothing is written to it.

    helix status --storage s3://bucket/prefix --grid esc50 --watch
    python -m orchestration.status ...       the same, without importing Ray, torch or MLflow

Exit code: 0 every trial is done, 1 some are not, 2 there is nothing to show, 3 something that is stored is damaged: it
is named, and the rest is shown.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dashboards.live import LiveView, as_json, render, standing
from dashboards.summary import progress
from dashboards.text import duration, listing
from dashboards.view import SweepView
from helix.storage import CorruptObjectError, Storage, open_storage
from orchestration.asked import Asked, asked_grids, drives, lost_plans, read_asked, read_drivers
from orchestration.ledger import TrialState, begun_trials, read_all
from orchestration.money import Prices, read_prices

#: The last rows of a trial that are read: what its pace is measured on.
RECENT_ROWS = 5

UNFINISHED = 1
REFUSED = 2
DAMAGED = 3
INTERRUPTED = 130

#: Columns where the output is no terminal.
PLAIN_WIDTH = 120


class Standing:
    """How a grid stands by what storage alone knows: called, it returns a view. It never writes.

    What was asked may change while one looks, so it is read at every look; of trials only what is new is.
    """

    def __init__(
        self,
        storage: Storage,
        grid: str,
        *,
        prices: Prices | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.storage, self.grid, self.prices, self.clock = storage, grid, prices, clock
        self._known: dict[str, TrialState] = {}
        self._driven = False

    def under_way(self, view: SweepView) -> bool:
        """Whether a sweep runs, by the last look: its driver was heard of, or a trial of the `view` was."""
        return self._driven or any(trial.state.status == "running" for _, trial in view.trials())

    def __call__(self) -> SweepView:
        asked, now = read_asked(self.storage, self.grid), self.clock()
        if asked is None:
            raise ValueError(unknown(self.storage, self.grid, asked_grids(self.storage)))
        names = [one.trial_id for one in asked.trials]
        known = self._known
        left = [name for name in names if name not in known or known[name].status != "done" or known[name].damage]
        if left:
            self._known |= read_all(self.storage, left, now=now, known=known, recent=RECENT_ROWS, tolerant=True)
        states = {name: self._known[name] for name in names}
        drivers = read_drivers(self.storage, self.grid)
        self._driven = any(drives(driver, now=now) for driver in drivers)
        waiting = why_waiting(asked, states, drivers, now=now)
        return asked.view(states, storage=repr(self.storage), now=now, waiting=waiting, prices=self.prices)


def why_waiting(
    asked: Asked, states: Mapping[str, TrialState], drivers: Sequence[Mapping[str, Any]], *, now: float
) -> str:
    """Why trials that are neither done nor running are not: what the drivers say, or that there is none."""
    # A trial whose result is damaged waits for nothing: no sweep goes on with it.
    broken = {name for name, state in states.items() if state.error in state.damage}
    idle = [one for name, one in states.items() if one.status not in ("done", "running") and name not in broken]
    if not idle:
        return ""
    active = [driver for driver in drivers if drives(driver, now=now)]
    if active:
        said = [driver["waiting"] for driver in active if driver["waiting"]]
        said += [f"it stops: {driver['stopped']}" for driver in active if driver["stopped"]]
        queued = [state for state in idle if state.status != "failed"]
        return "; ".join(dict.fromkeys(said)) or ("waiting for a free worker" if queued else "")
    how = f"no sweep of {asked.grid} runs"
    if drivers:
        last = drivers[-1]
        ended = "ended" in last
        ago = duration(max(now - (last["ended"] if ended else last["time"]), 0.0))
        how += f"; the last one ended {ago} ago" if ended else f"; the last one is silent since {ago}"
        how += f" ({last['stopped']})" if last["stopped"] else ""
    return f"{how}. The same command goes on: {asked.command}"


def unknown(storage: Storage, grid: str, known: Sequence[str]) -> str:
    """What to say of a grid that nothing was asked of."""
    if known:
        return f"no sweep of {grid!r} is stored in {storage!r}; stored: {listing(list(known))}"
    if begun_trials(storage):
        return (
            f"{storage!r} holds trials, but not what was asked for, which earlier versions did not store; run the same "
            "sweep again with this one (what is done is not trained again)"
        )
    return f"nothing of a sweep is stored in {storage!r}; name the right place with --storage, or start a sweep there"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="helix status",
        description="How sweeps stand, from what is stored alone: needs no Ray and no data, and writes nothing.",
    )
    parser.add_argument("--grid", nargs="+", metavar="G", help="these grids (default: all that are stored)")
    parser.add_argument("--storage", help="the folder or s3://bucket/prefix (default: HELIX_STORAGE or ./runs)")
    parser.add_argument("--prices", type=Path, metavar="PATH", help="a price table in place of the sweep's own")
    parser.add_argument("--watch", action="store_true", help="look again while a sweep runs")
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between looks (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON, one value for all grids")
    given = parser.parse_args(arguments)
    wide = None if sys.stdout.isatty() else PLAIN_WIDTH
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, width=wide)
    try:
        if not 0 < given.every < float("inf"):
            raise ValueError(f"--every is {given.every}; wanted a positive number of seconds")
        if given.watch and given.json:
            raise ValueError("--json prints once; leave out --watch")
        storage = open_storage(given.storage or os.environ.get("HELIX_STORAGE") or "runs")
        prices = read_prices(given.prices) if given.prices else None
        known = asked_grids(storage)
        lost = [] if given.grid else lost_plans(storage)
        for grid in given.grid or ([] if known or lost else [""]):
            if grid not in known:
                raise ValueError(unknown(storage, grid, known))
        standings, views, damage = _first_looks(storage, given.grid or known, prices)
        damage += [f"{key} is not there, though drivers of its grid are; a sweep writes it again" for key in lost]
        if given.json:
            print(json.dumps([as_json(view) for view in views], indent=2))  # noqa: T201
        elif given.watch:
            views = watch(standings, console, every_s=given.every)
            damage += [line for view in views for line in view.damage]
        else:
            for number, view in enumerate(views):
                show(view, console, first=number == 0)
        errors = Console(stderr=True, highlight=False, soft_wrap=True)
        for line in damage:  # what is damaged of a grid that is shown is told with it
            errors.print(f"damaged: {line}", markup=False)
        if damage or any(view.damage for view in views):
            errors.print("helix verify lists all that is damaged, and says what to do", markup=False)
            return DAMAGED
    except (ValueError, OSError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"refused: {error}", markup=False)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0 if all(progress(view).finished for view in views) else UNFINISHED


def _first_looks(
    storage: Storage, grids: Sequence[str], prices: Prices | None
) -> tuple[list[Standing], list[SweepView], list[str]]:
    """Of each grid whose plan can be read how it stands, and a view; of the others what is damaged, a line each."""
    standings, views, damage = [], [], []
    for grid in grids:
        try:
            standing = Standing(storage, grid, prices=prices)
            views.append(standing())
            standings.append(standing)
        except CorruptObjectError as error:
            damage.append(f"{error.key}: {error.reason}")
        except ValueError as error:
            damage.append(str(error))
    return standings, views, damage


def show(view: SweepView, console: Console, *, first: bool = True) -> None:
    """One view: tables on a terminal, plain lines elsewhere."""
    if not first:
        console.print()
    if console.is_terminal:
        console.print(render(view, now=view.created, width=console.width))
        return
    for line in standing(view):
        console.print(line, markup=False)


def watch(standings: Sequence[Standing], console: Console, *, every_s: float) -> list[SweepView]:
    """Show the grids, one after the other, each while a sweep of it runs. Returns the last views."""
    views = []
    for one in standings:
        with LiveView(one, console=console, poll_s=every_s) as live:
            live.wait(lambda view, one=one: progress(view).finished or not one.under_way(view))
        views.append(one())
    return views


if __name__ == "__main__":
    sys.exit(main())
