"""Batches of clips: a pure function of (spec, seed, epoch, step), whoever makes them. There is no state to save.

Where the samples lie is a placement and not science: `Host` copies them out of memory maps, `Device` holds the whole
set on the accelerator and gathers there. Both give the same bits, and so does making a batch ahead of time.

B batch, T samples, P pieces, S samples of a whole data set.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import helix.protocol
from helix.data.clips import Clips
from helix.data.dataset import Dataset
from helix.data.shards import Recordings
from helix.spec import derive_seed

#: int16 to [-1, 1); a power of two, so that it is exact wherever it is computed.
FULL_SCALE = 1 / 32768

#: So many samples are gathered at once on a device. That holds three int64 for each while it runs, 400 MB; under
#: torch.use_deterministic_algorithms, where torch sorts the places before it writes to them, eight, 1.1 GB (counted in
#: its source, not measured).
GATHERED_AT_ONCE = 1 << 24


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Waves in [-1, 1), their labels, keys and sounding samples (before the silence that ends a clip).

    `parts`: into how many equal parts each wave falls that shift on their own, as augment takes it. One rank's part of
    a batch of `whole` clips has `partner_B`: its own clips come first, as many as that is long, and those that they are
    mixed with after them; it says where.
    """

    wave_BT: Tensor  # noqa: N815
    label_B: Tensor  # noqa: N815
    clip_B: Tensor  # noqa: N815
    samples_B: Tensor  # noqa: N815
    parts: int = 1
    whole: int | None = None
    partner_B: Tensor | None = None  # noqa: N815

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device; from pinned memory the copy does not wait, to the host it is done on return."""
        # A copy from a GPU that nobody waits for is one whose bits may be read before they are there.
        non_blocking = torch.device(device).type != "cpu"
        tensors = ["wave_BT", "label_B", "clip_B", "samples_B", *(["partner_B"] if self.partner_B is not None else [])]
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in tensors})


class Placement(Protocol):
    """Where samples lie and are gathered."""

    def gather(self, clips: Clips) -> Batch:
        """These clips as one batch."""
        ...


class Reused:
    """Memory for waves: that of the last ones which nobody holds any more, or fresh one.

    Fresh memory costs: the system clears it, and a virtual machine may have to get it back from its host first, which
    can take several times as long as filling it with samples.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=1)

    def take(self, clips: int, samples: int) -> Tensor:
        """float32 [clips, samples] with whatever the memory held before."""
        try:
            memory_S = self._free.pop()
        except IndexError:
            memory_S = np.empty(0, np.float32)
        if len(memory_S) < clips * samples:
            # numpy asks the system for huge pages; the small ones of a fresh batch would take longer than its samples.
            memory_S = np.empty(clips * samples, np.float32)
        wave_BT = memory_S[: clips * samples].reshape(clips, samples)
        # The tensor holds this view, and whatever is made of the tensor without a copy holds its storage.
        weakref.finalize(wave_BT, self._free.append, memory_S).atexit = False
        return torch.from_numpy(wave_BT)

    def __reduce__(self) -> tuple[type["Reused"], tuple[()]]:
        return Reused, ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Host:
    """Copies pieces out of the memory maps of the shards. `pinned` memory is what a CUDA device copies from best.

    A batch lies in memory of its own for as long as anything holds it.
    """

    recordings: Recordings
    pinned: bool = False
    _memory: Reused = field(default_factory=Reused, init=False, repr=False)

    def gather(self, clips: Clips) -> Batch:
        shape = (len(clips), clips.clip_samples)
        # torch itself uses pinned memory again.
        wave_BT = torch.empty(shape, pin_memory=True) if self.pinned else self._memory.take(*shape)
        flat_S = wave_BT.numpy().reshape(-1)
        pieces = np.diff(clips.first_piece)
        sounding = np.bincount(np.repeat(np.arange(len(clips)), pieces), clips.samples, len(clips))
        flat_S.reshape(shape)[sounding < clips.clip_samples] = 0.0
        to = np.repeat(np.arange(len(clips)), pieces) * clips.clip_samples + clips.place
        for row, start, samples, first in zip(
            clips.row.tolist(), clips.start.tolist(), clips.samples.tolist(), to.tolist(), strict=True
        ):
            piece_S = flat_S[first : first + samples]
            piece_S[:] = self.recordings.wave(row)[start : start + samples]
            piece_S *= FULL_SCALE  # while the piece is in the processor's cache
        return _batch(wave_BT, clips, "cpu", pinned=self.pinned)


class Device:
    """Holds every recording on `device` as one int16 tensor; a batch is one gather by index arithmetic."""

    def __init__(self, recordings: Recordings, device: torch.device | str):
        index = recordings.index
        self.device = torch.device(device)
        self.first_row = np.concatenate([[0], np.cumsum(index.samples, dtype=np.int64)])
        self.pcm_S = torch.empty(int(self.first_row[-1]), dtype=torch.int16, device=self.device)
        edges = np.flatnonzero(np.diff(index.shard, prepend=-1, append=-1))
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            shard = torch.from_numpy(np.concatenate([recordings.wave(row) for row in range(low, high)]))
            self.pcm_S[int(self.first_row[low]) : int(self.first_row[high])] = shard.to(self.device)

    def gather(self, clips: Clips) -> Batch:
        wave_BT = torch.zeros(len(clips), clips.clip_samples, dtype=torch.float32, device=self.device)
        at_once = max(1, GATHERED_AT_ONCE // clips.clip_samples)
        for low in range(0, len(clips), at_once):
            high = min(low + at_once, len(clips))
            self._gather(clips.take(np.arange(low, high)), wave_BT[low:high].view(-1))
        return _batch(wave_BT, clips, self.device)

    def _gather(self, clips: Clips, wave_S: Tensor) -> None:
        """Pieces into the clips that lie one after the other in `wave_S`."""
        of_piece = np.repeat(np.arange(len(clips)), np.diff(clips.first_piece))
        before = np.cumsum(clips.samples) - clips.samples
        columns = (clips.samples, self.first_row[clips.row] + clips.start - before)
        samples_P, source_P = (uploaded(column, self.device) for column in columns)
        place_P = uploaded(of_piece * clips.clip_samples + clips.place - before, self.device)
        total = int(clips.samples.sum())
        place_S = torch.arange(total, device=self.device)
        source_S = place_S + torch.repeat_interleave(source_P, samples_P, output_size=total)
        place_S += torch.repeat_interleave(place_P, samples_P, output_size=total)
        wave_S[place_S] = self.pcm_S[source_S].to(torch.float32).mul_(FULL_SCALE)


def _batch(wave_BT: Tensor, clips: Clips, device: torch.device | str, *, pinned: bool = False) -> Batch:
    columns = (clips.label, clips.clip, clips.sounding)
    label_B, clip_B, samples_B = (uploaded(column, device, pinned=pinned) for column in columns)
    return Batch(wave_BT=wave_BT, label_B=label_B, clip_B=clip_B, samples_B=samples_B, parts=clips.parts)


def uploaded(column: np.ndarray, device: torch.device | str, *, pinned: bool = False) -> Tensor:
    """A column of the host on `device`. To a CUDA device it goes through pinned memory, so that nobody waits for it.

    On the host it is pinned where that is asked for, and shares its memory with `column` where not.
    """
    tensor, on_cuda = torch.from_numpy(column), torch.device(device).type == "cuda"
    return (tensor.pin_memory() if pinned or on_cuda else tensor).to(device, non_blocking=True)


def part_of(total: int, rank: int, ranks: int) -> tuple[int, int]:
    """[first, last) of `total` things for one of `ranks` equal workers: contiguous, sizes differ by one at most."""
    return total * rank // ranks, total * (rank + 1) // ranks


class Batches:
    """The training batches of `rows`: every epoch a new order, each clip once, what fills no batch dropped.

    `pairs`: of an epoch and a step, first the place in the batch of the clip that each clip is mixed with, as from
    helix.data.augment.pairing. The part of one of several ranks then brings along those that are other ranks' own.
    `ahead`: how many batches a thread makes before they are asked for. The thread changes no bit; what fails in it is
    raised where its batch is asked for, and it ends with `close`, with the object or with the process.
    """

    def __init__(
        self,
        recordings: Recordings,
        dataset: Dataset,
        rows: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        protocol: helix.protocol.Protocol,
        placement: Placement | None = None,
        ahead: int = 0,
        pairs: Callable[[int, int], tuple[np.ndarray, float]] | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; wanted 1 or more")
        if ahead < 0:
            raise ValueError(f"ahead is {ahead}; wanted 0 or more")
        self.recordings, self.dataset, self.rows = recordings, dataset, np.asarray(rows, np.int64)
        self.batch_size, self.seed, self.protocol, self.pairs = batch_size, seed, protocol, pairs
        self.placement: Placement = placement or Host(recordings=recordings)
        self._epochs: dict[int, Clips] = {}
        self._lock = threading.Lock()
        self._ahead: _Ahead | None = None
        self.clips_per_epoch = len(self._drawn(0))
        if self.clips_per_epoch < batch_size:
            raise ValueError(
                f"{self.clips_per_epoch} training clips do not fill one batch of {batch_size}; lower "
                "training.batch_size or prepare more recordings"
            )
        if ahead:
            self._ahead = _Ahead(self._make, self._next, ahead)

    @property
    def steps_per_epoch(self) -> int:
        return self.clips_per_epoch // self.batch_size

    def clips(self, epoch: int) -> Clips:
        """All clips of this epoch in the order in which it takes them."""
        clips = self._drawn(epoch)
        random = np.random.Generator(np.random.Philox(derive_seed(self.seed, "order", epoch)))
        return clips.take(random.permutation(len(clips)))

    def batch(self, epoch: int, step: int, *, rank: int = 0, ranks: int = 1) -> Batch:
        """The batch of the step `step` (from 0) of an epoch; of `ranks` equal workers, the part of `rank`.

        The parts are contiguous, differ by at most one clip, and one after the other are the batch.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step is {step}; an epoch has the steps 0 to {self.steps_per_epoch - 1}")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank} of {ranks}; wanted 0 to {ranks - 1}")
        if ranks > self.batch_size:
            raise ValueError(f"{ranks} workers do not each get a clip of a batch of {self.batch_size}; use fewer")
        place = (epoch, step, rank, ranks)
        return self._ahead(place) if self._ahead else self._make(place)

    def settle(self) -> None:
        """Wait until the thread has made what it was told to make; it rests then, until a batch is asked for."""
        if self._ahead:
            self._ahead.settle()

    def close(self) -> None:
        """End the thread; batches can still be asked for and are made then."""
        if self._ahead:
            self._ahead.close()
            self._ahead = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": None, "_lock": None, "_epochs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_lock": threading.Lock()})

    def _make(self, place: tuple[int, ...]) -> Batch:
        epoch, step, rank, ranks = place
        own_B = np.arange(*part_of(self.batch_size, rank, ranks))
        if ranks == 1 or self.pairs is None:
            return self.placement.gather(self._ordered(epoch).take(step * self.batch_size + own_B))
        with_B = self.pairs(epoch, step)[0][own_B]
        taken_B = np.concatenate([own_B, np.setdiff1d(with_B, own_B)])
        place_B = np.zeros(self.batch_size, np.int64)
        place_B[taken_B] = np.arange(len(taken_B))
        batch = self.placement.gather(self._ordered(epoch).take(step * self.batch_size + taken_B))
        partner_B = uploaded(place_B[with_B], batch.label_B.device, pinned=batch.label_B.is_pinned())
        return replace(batch, whole=self.batch_size, partner_B=partner_B)

    def _next(self, place: tuple[int, ...]) -> tuple[int, ...]:
        epoch, step, rank, ranks = place
        return (epoch, step + 1, rank, ranks) if step + 1 < self.steps_per_epoch else (epoch + 1, 0, rank, ranks)

    def _drawn(self, epoch: int) -> Clips:
        return self.dataset.clips(self.recordings.index, self.rows, protocol=self.protocol, seed=self.seed, epoch=epoch)

    def _ordered(self, epoch: int) -> Clips:
        """`clips(epoch)`, kept for the batches that follow; two epochs, as the next one may be made ahead."""
        with self._lock:
            if epoch not in self._epochs:
                while len(self._epochs) > 1:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[epoch] = self.clips(epoch)
            return self._epochs[epoch]


class _Ahead:
    """Makes what is likely asked for next on one thread: `make` of a place, then of the places that follow it."""

    def __init__(self, make: Callable[[tuple[int, ...]], Batch], follow: Callable[..., tuple[int, ...]], depth: int):
        self.make, self.follow, self.depth = make, follow, depth
        self.waiting: deque[tuple[tuple[int, ...], Future[Batch]]] = deque()
        self.process = os.getpid()
        self.thread = _one_thread()

    def __call__(self, place: tuple[int, ...]) -> Batch:
        if os.getpid() != self.process:  # a thread does not come along when a process forks
            return self.make(place)
        while self.waiting and self.waiting[0][0] != place:
            self.waiting.popleft()[1].cancel()
        if not self.waiting:
            self._order(place)
        batch = self.waiting.popleft()[1]
        after = self.waiting[-1][0] if self.waiting else place
        while len(self.waiting) < self.depth:
            after = self.follow(after)
            self._order(after)
        return batch.result()

    def _order(self, place: tuple[int, ...]) -> None:
        self.waiting.append((place, self.thread.submit(self.make, place)))

    def settle(self) -> None:
        wait([future for _, future in self.waiting])

    def close(self) -> None:
        self.thread.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> ThreadPoolExecutor:
    """A thread that makes batches, on the CUDA device that is current here where CUDA is in use.

    A new thread is on the first device, and to pin memory there takes some of that device for this process.
    """
    name = "batches ahead"
    if not torch.cuda.is_initialized():
        return ThreadPoolExecutor(1, thread_name_prefix=name)
    here = (torch.cuda.current_device(),)
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=torch.cuda.set_device, initargs=here)


def in_order(
    recordings: Recordings, clips: Clips, *, batch_size: int, placement: Placement | None = None, ahead: int = 0
) -> Iterator[Batch]:
    """All clips as they stand, for evaluation; the last batch may be smaller. `ahead` as in Batches."""
    place = placement or Host(recordings=recordings)
    parts = [np.arange(low, min(low + batch_size, len(clips))) for low in range(0, len(clips), batch_size)]
    if ahead == 0:
        for part in parts:
            yield place.gather(clips.take(part))
        return
    thread = _one_thread()
    try:
        waiting: deque[Future[Batch]] = deque()
        for part in parts:
            waiting.append(thread.submit(place.gather, clips.take(part)))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(wait=True, cancel_futures=True)
