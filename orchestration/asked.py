"""What was asked of a grid last and who drives it, as storage keeps it: enough to show how it stands from anywhere.

grids/<grid>/plan.json                 what the last sweep of the grid asked for: its trials, data, prices; sealed
grids/<grid>/drivers/<sweep_id>.json   what the driver of a sweep said last: that it lives, what it waits for, its end

Neither holds a secret: no environment, and addresses as `repr(storage)` writes them.
"""

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dashboards.counts import official
from dashboards.view import DataFacts, SweepView, TrialEntry
from helix.registry import DATASETS
from helix.spec import TrialSpec, from_json, to_json
from helix.storage import CorruptObjectError, Storage, is_sealed, json_bytes, sealed
from orchestration.ledger import SILENCE_S, Records, TrialState, read_all, read_certificates
from orchestration.money import Prices, spent_on_trial
from orchestration.records import DRIVER, PLAN, PLAN_CELL, PLAN_DATA, PLAN_MODEL, Fields, checked, lacking

logger = logging.getLogger(__name__)

#: Where it all lies.
GRIDS = "grids"

#: Raised when what a plan says changes so that an older reader would misunderstand it.
FORMAT = 1

#: A driver says that it lives this often, and at once when what it says changes.
DRIVER_S = 15.0

#: Drivers that are looked at: several sweeps may share a grid, and those before the last few are over.
DRIVERS = 4


@dataclass(frozen=True, kw_only=True)
class AskedTrial:
    """One trial that was asked for. `variant` and `backbone` are the grid's words; `tokens` are per clip."""

    trial_id: str
    variant: str
    backbone: str
    spec: TrialSpec
    parameters: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A grid as it was asked for last: what is shown of a sweep beside the states of its trials."""

    grid: str
    question: str
    command: str
    data: tuple[DataFacts, ...]
    trials: tuple[AskedTrial, ...]
    prices: Prices = field(default_factory=Prices)

    def view(
        self,
        states: Mapping[str, TrialState],
        *,
        storage: str,
        now: float,
        certificates: Iterable[dict[str, Any]] = (),
        waiting: str = "",
        prices: Prices | None = None,
        damage: Iterable[str] = (),
    ) -> SweepView:
        """The view of these trials in these `states`, by their ids. `prices`: in place of those of the sweep.

        `damage`: what is damaged beside the trials, a line each.
        """
        prices = prices or self.prices
        view = SweepView.build(
            grid=self.grid,
            question=self.question,
            protocol=self.trials[0].spec.protocol,
            command=self.command,
            created=now,
            storage=storage,
            data=self.data,
            trials=[
                TrialEntry(
                    variant=one.variant,
                    backbone=one.backbone,
                    spec=one.spec,
                    state=states[one.trial_id],
                    parameters=one.parameters,
                    tokens=one.tokens,
                    spent=spent_on_trial(states[one.trial_id], prices),
                )
                for one in self.trials
            ],
            certificates=certificates,
            waiting=waiting,
        )
        of_trials = [line for one in self.trials for line in states[one.trial_id].damage]
        return replace(view, damage=tuple(dict.fromkeys([*of_trials, *damage])))

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, sealed. What trials share stands once for each variant, so that thousands stay small."""
        cells: dict[bytes, dict[str, Any]] = {}
        for one in self.trials:
            shared = replace(one.spec, data=replace(one.spec.data, fold=0), seed=0)
            said = {name: getattr(one, name) for name in ("variant", "backbone", "parameters", "tokens")}
            said["spec"] = to_json(shared)
            cell = cells.setdefault(json_bytes(said), said | {"trials": []})
            cell["trials"].append([one.trial_id, one.spec.data.fold, one.spec.seed])
        return sealed(
            {
                "format": FORMAT,
                "grid": self.grid,
                "question": self.question,
                "command": self.command,
                "data": [asdict(facts) for facts in self.data],
                "cells": list(cells.values()),
                "prices": [[*key, usd] for key, usd in sorted(self.prices.usd.items())],
            }
        )


def put_asked(storage: Storage, asked: Asked) -> None:
    """Keep what is asked of a grid, in place of what was asked before."""
    storage.put_json(plan_key(asked.grid), asked.as_json())


def stored_view(storage: Storage, asked: Asked, *, now: float, prices: Prices | None = None) -> SweepView:
    """The view of what was asked, from storage alone and whole: what a report is made of."""
    states = read_all(storage, [one.trial_id for one in asked.trials], now=now, tolerant=True)
    records = Records(storage, tolerant=True)
    found = read_certificates(records)
    return asked.view(states, storage=repr(storage), now=now, certificates=found, prices=prices, damage=records.damage)


def asked_grids(storage: Storage) -> list[str]:
    """The names of the grids that anything was asked of."""
    return [key.split("/")[1] for key in storage.keys(GRIDS) if re.fullmatch(rf"{GRIDS}/[^/]+/plan\.json", key)]


def lost_plans(storage: Storage) -> list[str]:
    """The keys of plans that are not there, though drivers of their grids are; sorted."""
    keys = set(storage.keys(GRIDS))
    driven = {key.split("/")[1] for key in keys if re.fullmatch(rf"{GRIDS}/[^/]+/drivers/[^/.]+\.json", key)}
    return sorted(plan_key(grid) for grid in driven if plan_key(grid) not in keys)


def read_asked(storage: Storage, grid: str) -> Asked | None:
    """What was asked of a grid last; None where nothing was. ValueError where that cannot be read."""
    key = plan_key(grid)
    value = storage.get_json(key)
    asked = None if value is None else asked_from_json(value, key)
    if asked is not None and asked.grid != grid:
        raise ValueError(f"{key} is the plan of {asked.grid!r}; wanted that of {grid!r}")
    return asked


def asked_from_json(value: Any, place: str) -> Asked:
    """What `Asked.as_json` gave, as it was read at `place`. ValueError where it is not that any more."""
    if not is_sealed(value):
        raise ValueError(f"{place} does not match its own checksum; a sweep of the grid writes it again")
    if value.get("format") != FORMAT:
        raise ValueError(
            f"{place} is of format {value.get('format')}, and this version reads {FORMAT}; use the version of "
            "this project that ran the sweep, or run it with this one"
        )
    try:
        return _asked(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{place} is no plan: {error}; a sweep of the grid writes it again") from error


def _asked(value: dict[str, Any]) -> Asked:
    """What a plan says, whose seal is whole. ValueError says what it should have and has not."""
    _require("it", value, PLAN)
    for number, facts in enumerate(value["data"], 1):
        _require(f"its data set {number}", facts, PLAN_DATA)
    trials = []
    for number, cell in enumerate(value["cells"], 1):
        _require(f"its cell {number}", cell, PLAN_CELL)
        shared = from_json(cell["spec"])
        _require(f"the model of its cell {number}", to_json(shared)["model"], PLAN_MODEL)
        if shared.data.dataset in DATASETS.names():
            official(shared.data.dataset, shared.data.options)
        said = {name: cell[name] for name in ("variant", "backbone", "parameters", "tokens")}
        for trial_id, fold, seed in cell["trials"]:
            spec = replace(shared, data=replace(shared.data, fold=fold), seed=seed)
            trials.append(AskedTrial(trial_id=trial_id, spec=spec, **said))
    if not trials:
        raise ValueError("it has no trials")
    return Asked(
        grid=value["grid"],
        question=value["question"],
        command=value["command"],
        data=tuple(
            DataFacts(**{**facts, "notes": tuple(facts["notes"]), "class_names": tuple(facts["class_names"])})
            for facts in value["data"]
        ),
        trials=tuple(trials),
        prices=Prices(usd={(name, market): usd for name, market, usd in value["prices"]}),
    )


def _require(what: str, value: Any, fields: Fields) -> None:
    """ValueError where `value` has not these `fields`."""
    if (wrong := lacking(value, fields)) is not None:
        raise ValueError(f"{what} {wrong}")


class DriverRecord:
    """What the driver of one sweep says of itself in the storage. A storage that is away holds nothing up."""

    def __init__(self, storage: Storage, grid: str, sweep_id: str, *, clock: Callable[[], float] = time.time):
        self.storage, self.key, self.clock = storage, f"{GRIDS}/{grid}/drivers/{sweep_id}.json", clock
        self._said: dict[str, Any] = {"sweep_id": sweep_id, "began": clock(), "waiting": "", "stopped": None}
        self._told = 0.0
        self._one = threading.Lock()

    def say(self, **said: Any) -> None:
        """`waiting`: what trials wait for, "" where nothing holds them up. `stopped`: why the sweep ends early."""
        with self._one:
            new = self._said | said
            if new == self._said and self.clock() - self._told < DRIVER_S:
                return
            self._said = new
            with contextlib.suppress(OSError):
                self.storage.put_json(self.key, new | {"time": self.clock()})
                self._told = self.clock()

    def end(self) -> None:
        """Say that the driver leaves."""
        self.say(waiting="", ended=self.clock())


def read_drivers(storage: Storage, grid: str) -> list[dict[str, Any]]:
    """What the last few drivers of a grid said, oldest first; what cannot be read was said by none."""
    folder, found = f"{GRIDS}/{grid}/drivers", []
    names = [name for name in storage.children(folder) if re.fullmatch(r"[^.]+\.json", name)]
    for name in names[-DRIVERS:]:
        with contextlib.suppress(CorruptObjectError):
            key = f"{folder}/{name}"
            value = checked(key, storage.get_json(key), DRIVER)
            found += [] if value is None else [{"stopped": None} | value]
    return found


def drives(driver: Mapping[str, Any], *, now: float) -> bool:
    """Whether a driver is still there, as far as it was heard of."""
    return "ended" not in driver and now - driver["time"] < SILENCE_S


def plan_key(grid: str) -> str:
    """Where it is kept what was asked of a grid."""
    return f"{GRIDS}/{grid}/plan.json"
