"""What changed in a grid since its last finished run, and which cells a re-run moved. Pure; the storage is only read.

sweeps/<grid>/last.json     the trials of the last finished run of schedule.py and the options that it was asked with
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dashboards.counts import counts_of
from dashboards.findings import FEW_PAIRS
from dashboards.summary import SELECTIONS, fold_mean, paired, summarise_cell
from dashboards.text import percent, plural, points
from dashboards.view import CellView, SweepView, TrialView
from helix.spec import identity
from helix.statistics import sign_flip, smallest_p, t_test, units
from helix.storage import Storage
from orchestration.ledger import TrialState, read_all
from orchestration.plan import Planned


@dataclass(frozen=True, kw_only=True)
class Changes:
    """How a plan differs from the last finished run, in sentences; and the trials that have no result yet."""

    said: tuple[str, ...]
    missing: tuple[str, ...]


def last_key(grid: str) -> str:
    """Where the last finished run of a grid is kept."""
    return f"sweeps/{grid}/last.json"


def described(plan: Sequence[Planned], *, finished: float, command: str) -> dict[str, Any]:
    """What is kept of a finished run. The specs stand with the trials, which are named."""
    return {
        "finished": finished,
        "command": command,
        "trials": [
            {**_where(entry), "trial_id": entry.trial_id}
            for entry in sorted(plan, key=lambda entry: tuple(map(str, _where(entry).values())))
        ],
    }


def compare(
    plan: Sequence[Planned],
    states: Mapping[str, TrialState],
    last: Mapping[str, Any] | None,
    storage: Storage,
    manifest_sha256: str,
) -> Changes:
    """What changed since `last`, and what is missing."""
    said = _since(plan, last, storage, manifest_sha256)
    failed = [entry for entry in plan if states[entry.trial_id].status == "failed"]
    if failed:
        names = ", ".join(entry.trial.label for entry in failed[:3]) + (", ..." if len(failed) > 3 else "")
        said.append(f"{plural(len(failed), 'trial')} failed and will be tried again: {names}")
    missing = tuple(entry.trial_id for entry in plan if states[entry.trial_id].status != "done")
    return Changes(said=tuple(said), missing=missing)


def _since(
    plan: Sequence[Planned], last: Mapping[str, Any] | None, storage: Storage, manifest_sha256: str
) -> list[str]:
    if last is None:
        return ["no finished run of this grid is on record"]
    before = {_label(trial): trial["trial_id"] for trial in last["trials"]}
    now = {_label(_where(entry)): entry for entry in plan}
    said = []
    added = [name for name in now if name not in before]
    gone = [name for name in before if name not in now]
    for names, words in ((added, "new"), (gone, "no longer asked for")):
        if names:
            cells = dict.fromkeys(name[0] for name in names)
            said.append(f"{plural(len(names), 'trial')} {words}, of {', '.join(cells)}")
    differing: dict[str, list[str]] = {}
    for name, entry in now.items():
        if name in before and before[name] != entry.trial_id:
            old = storage.get_json(f"trials/{before[name]}/spec.json")
            for line in _differences(old, identity(entry.trial.spec, manifest_sha256)):
                differing.setdefault(line, []).append(entry.trial.label)
    said += [f"{line} ({plural(len(labels), 'trial')})" for line, labels in differing.items()]
    return said


def _differences(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[str]:
    """The keys in which two identities differ, a line each."""
    if old is None:
        return ["the spec of the last run is not there any more"]
    said = []
    if old["data_manifest"] != new["data_manifest"]:
        said.append(f"the data changed: manifest {old['data_manifest'][:12]} -> {new['data_manifest'][:12]}")
    if old["science_version"] != new["science_version"]:
        said.append(f"the science changed: version {old['science_version']} -> {new['science_version']}")
    before, after = dict(_flat(old["spec"])), dict(_flat(new["spec"]))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            said.append(f"{key}: {before.get(key, 'not there')} -> {after.get(key, 'not there')}")
    return said or ["the identity of the trial"]


def _flat(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


# The difference report


@dataclass(frozen=True, kw_only=True)
class Moved:
    """One cell before and after: mean accuracies over what both have, and what to think of it.

    `pairs`: of how many folds, the seeds of a fold averaged first; of how many seeds where there is one fold.

    `low` and `high`: the 95 % interval of the mean paired difference, by Student's t; None below two pairs. `p`: of the
    two-sided sign-flip test. `verdict`: "unchanged" (the same trials), "same numbers", "within noise",
    "beyond noise", "one pair" (no noise can be told).
    """

    variant: str
    pairs: int
    before: float | None
    after: float | None
    low: float | None
    high: float | None
    p: float | None
    verdict: str


def moved(view: SweepView, last: Mapping[str, Any], storage: Storage, *, now: float) -> list[Moved]:
    """Each cell of the view beside the same cell of the last run, under the selection of the view's protocol."""
    before = {_label(trial): trial["trial_id"] for trial in last["trials"]}
    states = read_all(storage, set(before.values()), now=now)
    found = []
    for cell in view.cells:
        olds = [
            TrialView(fold=trial.fold, seed=trial.seed, state=states[before[name]])
            for trial in cell.trials
            if (name := (cell.variant, trial.fold, trial.seed)) in before
        ]
        if olds:
            found.append(_moved(view, cell, olds))
    return found


def _moved(view: SweepView, cell: CellView, olds: Sequence[TrialView]) -> Moved:
    old_cell = CellView(**{**vars(cell), "trials": tuple(olds)})
    counts = counts_of(view)[cell.dataset]
    old, new = (summarise_cell(view, one, counts=counts) for one in (old_cell, cell))
    pairs = paired(new, old, view.select)
    differences = units(pairs).values
    means = [
        fold_mean({(s.fold, s.seed): s.accuracy[view.select] for s in summary.samples if (s.fold, s.seed) in pairs})
        for summary in (old, new)
    ]
    low = high = p = None
    if len(differences) > 1 and any(differences):
        found, p = t_test(differences), sign_flip(differences).p
        # Differences that are all the same, and not 0, are no noise.
        low, high = (found.mean, found.mean) if found.std == 0 else (found.low, found.high)
    same = {trial.trial_id for trial in olds} == {trial.trial_id for trial in cell.trials}
    if same:
        verdict = "unchanged"
    elif not differences:
        verdict = "no pair"
    elif not any(differences):
        verdict = "same numbers"
    elif low is None or high is None:
        verdict = "one pair"
    else:
        verdict = "within noise" if low <= 0 <= high else "beyond noise"
    return Moved(
        variant=cell.variant,
        pairs=len(differences),
        before=means[0],
        after=means[1],
        low=low,
        high=high,
        p=p,
        verdict=verdict,
    )


def as_markdown(grid: str, changes: Sequence[str], cells: Sequence[Moved], *, select: str, command: str) -> str:
    """The difference report for people; accuracies in %, differences in points."""
    lines = [f"# {grid}: what changed, and what that moved", "", f"Command: `{command}`", ""]
    lines += [f"- {line}" for line in changes]
    lines += ["", f"Accuracy in % ({select}), over the folds and seeds that both runs have:", ""]
    lines += [
        "| variant | before | after | difference | 95 % interval | p | pairs | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in cells:
        difference = None if one.before is None or one.after is None else one.after - one.before
        interval = "" if one.low is None else f"{points(one.low)} to {points(one.high)}"
        p = "" if one.p is None else f"{one.p:.2g}"
        row = (one.variant, percent(one.before), percent(one.after), points(difference), interval, p, one.pairs)
        lines.append(f"| {' | '.join(map(str, (*row, one.verdict)))} |")
    few = [one.pairs for one in cells if one.p is not None and one.pairs <= FEW_PAIRS]
    if few:
        lines += [
            "",
            f"With {plural(min(few), 'pair')} the exact sign-flip test cannot reach p < 0.05 (at best "
            f"{smallest_p(min(few)):.2g}); the verdict is that of the t interval and asks more of the reader.",
        ]
    return "\n".join(lines) + "\n"


def as_json(
    grid: str, changes: Sequence[str], cells: Sequence[Moved], *, select: str, command: str, now: float
) -> dict[str, Any]:
    """The same for machines; accuracies are fractions."""
    assert select in SELECTIONS
    rows = [vars(one) for one in cells]
    return {"grid": grid, "time": now, "command": command, "select": select, "changes": list(changes), "cells": rows}


def _where(entry: Planned) -> dict[str, Any]:
    spec = entry.trial.spec
    return {"variant": entry.trial.variant.name, "fold": spec.data.fold, "seed": spec.seed}


def _label(trial: Mapping[str, Any]) -> tuple[str, int, int]:
    return trial["variant"], trial["fold"], trial["seed"]
