"""What each trial asks for, a GPU or a share of one, told from what its step takes; and packs of trials that ask alike.

A trial asks for 1/n of a GPU where n like it are worth having side by side: as many as fit into the memory of the
smallest GPU on offer (by the prediction with its error bound, and each with a process of its own), as fill the device
together and no more, and as there are cores for beside the GPU; MOST_SIDE_BY_SIDE at most. Workers on one GPU take
turns in time, so beyond that each only makes the others slower.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from helix.training.memory import Device, Placement
from helix.training.step import FILLED_TOKENS
from orchestration.grid import Trial
from orchestration.plan import Planned, pack, place
from orchestration.pools import Offer

#: More workers than this never share a GPU: each holds a CUDA context and a gigabyte of its machine, whose small kinds
#: have 4 cores and 16 GiB; and what starves on the GPU's scheduler beyond that was not measured.
MOST_SIDE_BY_SIDE = 4

#: Ray counts shares in ten thousandths.
PARTS = 10_000

#: A trial of so many seconds is long: the 20 to 35 s that its worker takes to start are then nothing, and nothing is
#: to wait behind it in a pack.
LONG_S = 1800.0

#: What a worker does of the FLOPs of a plan in a second, for telling long from short: the order of magnitude.
FLOPS_PER_S: dict[Device, float] = {"cpu": 2e10, "cuda": 1e13}


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the workers of a sweep may have.

    `ranks`: the processes of each, with a whole GPU apiece where there are several; what follows is of one of them.
    `gpus`: what it has of GPUs; None is for each trial to say. `gpu_bytes`: what the smallest GPU on offer holds,
    None where nobody knows. `limit_bytes`: what it may hold at most, None for no limit. `most`: how many workers find
    cores beside one GPU.
    """

    device: Device = "cpu"
    ranks: int = 1
    gpus: float | None = None
    gpu_bytes: int | None = None
    limit_bytes: int | None = None
    most: int = MOST_SIDE_BY_SIDE

    def on(self, offer: Offer, *, threads: int) -> "Room":
        """The same on a cluster, whose machines know their GPUs better than this one."""
        if self.device == "cpu":
            return self
        return replace(self, gpu_bytes=self.gpu_bytes or offer.gpu_bytes, most=offer.workers_beside_a_gpu(threads))

    def limit(self, gpus: float) -> int | None:
        """The bytes of its device that a worker with so much of GPUs may hold, the process itself with them."""
        of_gpu = None if self.gpu_bytes is None else int(self.gpu_bytes * min(gpus, 1.0))
        return min((limit for limit in (self.limit_bytes, of_gpu) if limit is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class Need:
    """What each rank of the worker of a trial asks for, of GPUs, and how the trial's step fits into that."""

    gpus: float
    placement: Placement

    def __str__(self) -> str:
        parts = round(1 / self.gpus) if 0 < self.gpus < 1 else 1
        exact = parts > 1 and share(parts) == self.gpus
        return f"1/{parts} GPU" if exact else f"{self.gpus:g} GPU" if self.gpus else "no GPU"


def need_of(trial: Trial, room: Room, *, tokens: int) -> Need:
    """What a trial asks for whose clips are so many tokens. ValueError says what would fit where its step does not."""

    def placed(limit_bytes: int | None) -> Placement:
        return place(trial, limit_bytes=limit_bytes, device=room.device, ranks=room.ranks)

    if room.device == "cpu":
        return Need(gpus=0.0, placement=placed(room.limit_bytes))
    if room.gpus is not None:
        return Need(gpus=room.gpus, placement=placed(room.limit(room.gpus)))
    alone = placed(room.limit(1.0))
    if room.gpu_bytes is None or room.ranks > 1:
        return Need(gpus=1.0, placement=alone)
    clips = alone.micro_batch or trial.spec.training.batch_size
    return Need(
        gpus=share(
            side_by_side(
                needed_bytes=alone.needed_bytes, gpu_bytes=room.gpu_bytes, tokens=clips * tokens, most=room.most
            )
        ),
        placement=alone,
    )


def side_by_side(*, needed_bytes: int, gpu_bytes: int, tokens: int, most: int) -> int:
    """How many workers one GPU is for that need so many bytes and have so many tokens in flight; 1 or more."""
    by_memory, by_work = gpu_bytes // needed_bytes, FILLED_TOKENS["cuda"] // tokens
    return max(1, min(by_memory, by_work, most, MOST_SIDE_BY_SIDE))


def share(workers: int) -> float:
    """The share of a GPU that each of so many workers asks for, rounded down so that all of them fit."""
    return PARTS // workers / PARTS


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Trials that one worker runs in turn, and what it asks for of GPUs."""

    gpus: float
    entries: tuple[Planned, ...]

    @property
    def work(self) -> float:
        return sum(entry.work for entry in self.entries)


@dataclass(frozen=True, kw_only=True)
class Deal:
    """The packs of a sweep, the longest first, and how many of them are to run at once."""

    packs: tuple[Pack, ...]
    at_once: int

    def waiting(self, gpus: float) -> int:
        """How many workers that ask for so much are wanted at once, at most."""
        return min(self.at_once, sum(pack.gpus == gpus for pack in self.packs))


def deal(
    trials: Sequence[tuple[Planned, float]],
    *,
    slots: Callable[[float], int],
    device: Device,
    workers: int | None = None,
) -> Deal:
    """Deal trials, each with what it asks for of GPUs, over packs whose trials ask alike.

    `slots`: how many workers that ask for so much there can be at once. `workers`: at most so many in all, for which
    trials that ask for little may have to go with those that ask for more. Each kind of need gets workers by the time
    that its trials would take with all machines to themselves. What is long gets a pack of its own, the rest is dealt
    so that the packs are of about equal work.
    """
    groups: dict[float, list[Planned]] = {}
    for entry, gpus in trials:
        groups.setdefault(gpus, []).append(entry)
    while workers is not None and len(groups) > workers:
        little, more = sorted(groups)[:2]
        groups[more] += groups.pop(little)
    most = {gpus: workers or slots(gpus) for gpus in groups}
    times = {gpus: sum(entry.work for entry in entries) / most[gpus] for gpus, entries in groups.items()}
    whole = sum(times.values()) or 1.0
    given = {
        gpus: max(1, min(round(most[gpus] * times[gpus] / whole), len(entries))) for gpus, entries in groups.items()
    }
    while workers is not None and sum(given.values()) > workers:
        given[max(given, key=lambda gpus: given[gpus])] -= 1
    packs = []
    for gpus, entries in groups.items():
        long = [entry for entry in entries if entry.work / FLOPS_PER_S[device] >= LONG_S]
        short = [entry for entry in entries if entry.work / FLOPS_PER_S[device] < LONG_S]
        packs += [Pack(gpus=gpus, entries=(entry,)) for entry in long]
        packs += [Pack(gpus=gpus, entries=tuple(dealt)) for dealt in pack(short, workers=given[gpus])]
    return Deal(packs=tuple(sorted(packs, key=lambda one: -one.work)), at_once=sum(given.values()))
