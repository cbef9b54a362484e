"""Which rows train, validate and test: by folds, by an official list, or 80/20 within every speaker.

Whatever is drawn here is drawn by a hash of names (sha256 of the recording's id or its session), never by the order of
a directory and never by a generator, so one seed is one split on every machine.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from helix.data.index import Index
from helix.protocol import Protocol

Validation = Literal["test_halves", "held_out"]

#: The share of every speaker's recordings that tests (and, under "held_out", as much again that validates).
TEST_SHARE = 0.2


@dataclass(frozen=True, eq=False, kw_only=True)
class Split:
    """Row numbers of an index, ascending and disjoint."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def by_folds(index: Index, *, fold: int, validation: Validation) -> Split:
    """The rows for testing on `fold`, under the switch `protocol.validation`.

    "held_out": the next fold that is present (cyclic) selects and is not trained on. "test_halves": every other fold
    trains and nothing is held out; who selects does it on one half of the test clips (see `halves`).
    """
    present = tuple(int(number) for number in np.unique(index.fold) if number >= 0)
    if fold not in present:
        raise ValueError(f"fold {fold} is not among the prepared recordings; present: {listed(present)}")
    if validation not in ("test_halves", "held_out"):
        raise ValueError(f"validation is {validation!r}; wanted test_halves or held_out")
    held_out = [fold]
    if validation == "held_out":
        held_out.append(present[(present.index(fold) + 1) % len(present)])
    trained = [number for number in present if number not in held_out]
    if not trained:
        raise ValueError(
            f"testing on fold {fold} with validation={validation} leaves no fold to train on; present: "
            f"{listed(present)}; prepare more folds"
        )
    return Split(
        train=np.flatnonzero(np.isin(index.fold, trained)),
        validation=np.flatnonzero(np.isin(index.fold, held_out[1:])),
        test=np.flatnonzero(index.fold == fold),
    )


#: What the fold column of a data set with an official split says.
OFFICIAL = {"test": 1, "validation": 2, "train": 3}


def official(index: Index, *, fold: int, validation: Validation) -> Split:
    """The one split that the data set itself prescribes; its parts stand in the fold column, see `OFFICIAL`.

    Under "test_halves" the official validation part is left unused, as the paper's authors leave it.
    """
    if fold != OFFICIAL["test"]:
        raise ValueError(f"fold {fold} is not there; an official split is fold {OFFICIAL['test']} and no other")
    rows = {part: np.flatnonzero(index.fold == number) for part, number in OFFICIAL.items()}
    wanted = ("train", "test") if validation == "test_halves" else ("train", "test", "validation")
    absent = [part for part in wanted if len(rows[part]) == 0]
    if absent:
        raise ValueError(f"no prepared recording is in the official part {listed(absent)}; prepare more of them")
    if validation == "test_halves":
        rows["validation"] = rows["validation"][:0]
    return Split(**rows)


def by_speaker(index: Index, *, fold: int, seed: int, protocol: Protocol) -> Split:
    """About 80 % of every speaker's recordings to train on and 20 % to test on; "held_out" takes 20 % more from the 80.

    Under `protocol.speaker_split` = "utterance" single recordings are dealt, under "session" whole sessions (`group`),
    so that no session stands on two sides. A speaker with one recording (or session) is trained on only, one with two
    is not validated on.
    """
    if fold != 1:
        raise ValueError(f"fold {fold} is not there; a split within speakers is fold 1 and no other (see split_seed)")
    whole = protocol.speaker_split == "session"
    units: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, (label, recording_id, group) in enumerate(
        zip(index.label.tolist(), index.recording_id.tolist(), index.group.tolist(), strict=True)
    ):
        units[label][group if whole else recording_id].append(row)
    side = np.zeros(len(index), np.int8)
    for label in sorted(units):
        sizes = {name: len(rows) for name, rows in units[label].items()}
        order = sorted(sizes, key=lambda name: (hashlib.sha256(f"{seed}/{name}".encode()).digest(), name))
        goal = TEST_SHARE * sum(sizes.values())
        for number in (1, 2) if protocol.validation == "held_out" else (1,):
            for name in _about(order, sizes, goal):
                side[units[label][name]] = number
                order.remove(name)
    train, test, validation = (np.flatnonzero(side == number) for number in (0, 1, 2))
    if len(test) == 0:
        raise ValueError(
            f"no speaker has two {'sessions' if whole else 'recordings'}, so nothing can be tested on; prepare more or "
            "set protocol.speaker_split=utterance"
        )
    return Split(train=train, validation=validation, test=test)


def _about(order: Sequence[str], sizes: dict[str, int], goal: float) -> list[str]:
    """Units in their order whose sizes add up to about `goal`: at least one, and never the last one that is left."""
    taken: list[str] = []
    total = 0
    for name in order:
        if len(taken) == len(order) - 1:
            break
        if abs(total + sizes[name] - goal) < abs(total - goal):
            taken.append(name)
            total += sizes[name]
    if not taken and len(order) > 1:
        taken = [min(order, key=lambda name: (sizes[name], order.index(name)))]
    return taken


def halves(label: np.ndarray, group: np.ndarray) -> np.ndarray:
    """bool [n]: True for the half of n clips that selects, False for the half that is reported.

    A group is never split. Groups are taken by size, then by a hash of their name, and each goes where fewer clips of
    its classes are, so that both halves hold about half of every class.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(group):
        members[str(name)].append(position)
    loads = (Counter[int](), Counter[int]())
    totals = [0, 0]
    selects = np.zeros(len(label), dtype=bool)
    for name in sorted(members, key=lambda name: (-len(members[name]), hashlib.sha256(name.encode()).digest())):
        labels = [int(label[position]) for position in members[name]]
        cost = [(sum(load[one] for one in labels), total) for load, total in zip(loads, totals, strict=True)]
        side = int(cost[1] < cost[0])
        loads[side].update(labels)
        totals[side] += len(labels)
        selects[members[name]] = bool(side)
    return selects


def listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values)) or "none"
