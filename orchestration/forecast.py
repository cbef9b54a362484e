"""What a grid will take, in hours and dollars, from steps that were measured: there is no number without a measurement.

Measured are the epochs in storage of trials of the same shape (all of the spec but seed, fold, epochs and rates), on
the machines that their attempts recorded, evaluation and saving included; or, by `calibrate`, a few steps on this
machine, without evaluation. What a machine needs to start, idles or loses is in no forecast.
"""

import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from helix.data.shards import Recordings
from helix.spec import identity
from helix.storage import CorruptObjectError, FolderStorage, Storage
from helix.training.memory import Placement
from helix.training.trainer import Fit, StoppedError, fit
from orchestration.grid import Trial
from orchestration.ledger import TrialState, begun_trials, read_all
from orchestration.money import MARKETS, Prices
from orchestration.plan import Planned

#: Steps that a calibration times, after a first one that also loads and compiles.
CALIBRATED_STEPS = 3

#: Parts of a spec that change how well a model trains and not how long a step takes.
TIMELESS = ("epochs", "lr", "lr_min", "weight_decay", "clip_norm")


@dataclass(frozen=True, kw_only=True, order=True)
class Machine:
    """What a measurement was taken on, or a worker's share of it; `instance_type` is empty where nobody said."""

    instance_type: str
    device: str
    threads: int
    gpus: float
    share: float
    calibrated: bool = False
    ranks: int = 1

    def __str__(self) -> str:
        worker = f"{self.gpus:g} GPU" if self.gpus else f"{self.device} x {self.threads}"
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.instance_type or 'unknown type'}, {worker}{ranks}{', calibrated' if self.calibrated else ''}"


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A grid on one kind of machine: worker-hours of all its trials and of what is left of them.

    They are of the `measured` trials alone (of `asked`), `left_measured` and `left_asked` those with steps left. `usd`
    is of what is left, by market, where the table has a price.
    """

    machine: Machine
    asked: int
    measured: int
    hours: float
    left_asked: int
    left_measured: int
    left_hours: float
    usd: Mapping[str, float] = field(default_factory=dict)


#: Seconds of a step, by shape, by machine.
Measured = dict[Machine, dict[str, float]]


def shape(value: Mapping[str, Any]) -> str:
    """What the time of a step depends on, of a spec as `helix.spec.identity` writes it."""
    data = {key: part for key, part in value["data"].items() if key != "fold"}
    training = {key: part for key, part in value["training"].items() if key not in TIMELESS}
    rest = {key: part for key, part in value.items() if key not in ("seed", "data", "training")}
    return json.dumps({**rest, "data": data, "training": training}, sort_keys=True)


def measured(storage: Storage, wanted: Iterable[str], *, now: float) -> Measured:
    """The median seconds of a step of each of the `wanted` shapes, over all finished epochs in storage."""
    shapes, wanted = {}, set(wanted)
    for name in begun_trials(storage):
        # Of a trial whose spec cannot be read nothing is measured; helix verify tells of it.
        with contextlib.suppress(CorruptObjectError, KeyError, TypeError, AttributeError):
            described = storage.get_json(f"trials/{name}/spec.json")
            if described is not None and (of := shape(described["spec"])) in wanted:
                shapes[name] = of
    seconds: dict[Machine, dict[str, list[float]]] = {}
    for name, state in read_all(storage, shapes, now=now, tolerant=True).items():
        for machine, per_step in _steps(state):
            seconds.setdefault(machine, {}).setdefault(shapes[name], []).append(per_step)
    return {
        machine: {of: statistics.median(values) for of, values in by_shape.items()}
        for machine, by_shape in seconds.items()
    }


def _steps(state: TrialState) -> Iterable[tuple[Machine, float]]:
    """Of each finished epoch, where it was finished and the seconds of one of its steps."""
    before = 0
    for row in state.rows:
        taken, before = row["step"] - before, row["step"]
        attempt = next(
            (a for a in state.attempts if a["started"] <= row["time"] <= a.get("ended", row["time"])),
            None,
        )
        if attempt is not None and taken > 0:
            yield _machine(attempt), row["seconds"] / taken


def _machine(said: Mapping[str, Any]) -> Machine:
    return Machine(
        instance_type=said.get("instance_type") or "",
        device=said.get("device", "cpu"),
        threads=said.get("threads", 1),
        gpus=said.get("gpus", 0.0),
        share=round(said.get("share", 1.0), 4),
        ranks=said.get("ranks", 1),
    )


def calibrate(
    plan: Sequence[Planned],
    recordings: Recordings,
    said: Mapping[str, Any],
    *,
    placement: Callable[[Trial], Placement],
    say: Callable[[str], None],
) -> Measured:
    """A few training steps of one trial of each shape, in this process. `said`: what an attempt here would record."""
    found: dict[str, float] = {}
    for entry in plan:
        of = shape(identity(entry.trial.spec, "")["spec"])
        if of not in found:
            found[of] = _timed(entry.trial, recordings, device=said["device"], placement=placement(entry.trial))
            say(f"{entry.trial.variant.name}: {found[of]:.3f} s a step")
    machine = _machine(said)
    return {Machine(**{**vars(machine), "calibrated": True}): found}


def _timed(trial: Trial, recordings: Recordings, *, device: str, placement: Placement) -> float:
    """The median seconds of a step, evaluation left out."""
    ends: list[float] = []

    def on_step(_step: int) -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()  # so far the step was only launched
        ends.append(time.monotonic())

    with tempfile.TemporaryDirectory(prefix="helix-calibrate-") as folder:
        how = Fit(
            storage=FolderStorage(Path(folder)),
            device=device,
            micro_batch=placement.micro_batch,
            recompute=placement.recompute,
            save_every_s=1e9,
            on_step=on_step,
            stop_now=lambda: len(ends) > CALIBRATED_STEPS,
        )
        with contextlib.suppress(StoppedError):
            fit(trial.spec, recordings, how)
    return statistics.median(after - before for before, after in itertools.pairwise(ends))


def forecasts(
    plan: Sequence[Planned], states: Mapping[str, TrialState], found: Measured, prices: Prices
) -> list[Forecast]:
    """The grid on every kind of machine that some of its shapes were measured on, most of them first."""
    shapes = {entry.trial_id: shape(identity(entry.trial.spec, "")["spec"]) for entry in plan}
    made = []
    for machine, per_step in found.items():
        known = [entry for entry in plan if shapes[entry.trial_id] in per_step]
        if not known:
            continue
        left = {entry.trial_id: _left(entry, states[entry.trial_id]) for entry in plan}
        hours = sum(per_step[shapes[entry.trial_id]] * entry.steps for entry in known) / 3600
        left_hours = sum(per_step[shapes[entry.trial_id]] * left[entry.trial_id] for entry in known) / 3600
        per_hour = {market: prices.per_hour(machine.instance_type, market) for market in MARKETS}
        usd = {market: left_hours * machine.share * price for market, price in per_hour.items() if price is not None}
        made.append(
            Forecast(
                machine=machine,
                asked=len(plan),
                measured=len(known),
                hours=hours,
                left_asked=sum(map(bool, left.values())),
                left_measured=sum(bool(left[entry.trial_id]) for entry in known),
                left_hours=left_hours,
                usd=usd,
            )
        )
    return sorted(made, key=lambda one: (-one.measured, one.machine))


def _left(entry: Planned, state: TrialState) -> int:
    """Optimiser steps that a trial still needs, by its finished epochs: what is after them may be done again."""
    if state.status == "done":
        return 0
    return max(entry.steps - entry.steps_per_epoch * state.epochs_done, 0)
