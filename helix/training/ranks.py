"""Ranks: processes of one machine that train one trial together, each on its part of every batch.

All ranks hold the same weights and take the same decisions. They meet in roll calls, at the same places of the loop and
each before anything larger is exchanged. A rank that fails between two of them tells its error at the next one, and
every rank raises it: none waits for another that went another way. Roll calls stay on the CPU (gloo) also where the
tensors are on GPUs (NCCL), since a flag on a GPU would have to be waited for at every step.

Sums are one all-reduce of flat tensors in a fixed order: for one number of ranks the same bits every time, for
different ones the same up to the order of floating-point additions. A single rank exchanges nothing.
"""

import contextlib
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from helix.data.loader import part_of
from helix.errors import first_line

T = TypeVar("T")

#: The backends of torch.distributed that this needs, by the kind of device that trains.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

#: What a roll call has room for.
MOST_VALUES = 4


class RankLostError(Exception):
    """Another rank is gone, or silent for longer than the process group waits; nothing can be exchanged any more."""

    def __init__(self, rank: int, reason: str):
        super().__init__(rank, reason)
        self.rank, self.reason = rank, reason

    def __str__(self) -> str:
        return f"rank {self.rank} lost the others: {self.reason}"


class Ranks:
    """This process as the rank `rank` of `count`; for more than one, torch's default process group has to be there.

    `now`: the clock of the first rank at the last roll call, in seconds; what goes by it goes alike on every rank.
    """

    def __init__(self, rank: int = 0, count: int = 1):
        if not 0 <= rank < count:
            raise ValueError(f"rank is {rank} of {count}; wanted 0 to {count - 1}")
        self.rank, self.count, self.now = rank, count, 0.0
        self._told: BaseException | None = None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that reads and writes what is stored of a trial."""
        return self.rank == 0

    def part(self, total: int) -> tuple[int, int]:
        """[first, last) of `total` things, as this rank's own."""
        return part_of(total, self.rank, self.count)

    def largest_part(self, total: int) -> int:
        """The most of `total` things that a rank has."""
        return -(-total // self.count)

    def agree(self, *values: float) -> tuple[float, ...]:
        """A roll call: the sum over the ranks of each value. Raises what another rank failed with since the last."""
        return values if self.count == 1 else self._call(values)

    def add(self, *groups: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks; the tensors of a group are alike in dtype and device."""
        if self.count == 1:
            return
        flat = [torch.cat([tensor.reshape(-1) for tensor in group]) for group in groups]
        self.agree()
        for group, sums in zip(groups, flat, strict=True):
            self._exchange(distributed.all_reduce, sums)
            for tensor, part in zip(group, sums.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def share(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank, on every rank; it runs there alone."""
        if self.count == 1:
            return make()
        box: list[Any] = [make() if self.first else None]
        self.agree()
        self._exchange(distributed.broadcast_object_list, box, 0)
        return box[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What fails in here on one rank fails on all of them, at their next roll call."""
        try:
            yield
        except RankLostError:
            raise
        except Exception as error:
            if self.count > 1 and error is not self._told:
                self._call((), error)
            raise

    def _call(self, values: Sequence[float], error: Exception | None = None) -> tuple[float, ...]:
        """A roll call in which this rank may tell an error. Raises the first one that another rank tells."""
        assert len(values) <= MOST_VALUES
        said = torch.zeros(MOST_VALUES + 1 + self.count, dtype=torch.float64)
        said[: len(values)] = torch.tensor(values, dtype=torch.float64)
        said[MOST_VALUES] = time.monotonic() if self.first else 0.0
        said[MOST_VALUES + 1 + self.rank] = error is not None
        self._exchange(distributed.all_reduce, said)
        sums = said.tolist()
        self.now = sums[MOST_VALUES]
        failed = [rank for rank, many in enumerate(sums[MOST_VALUES + 1 :]) if many]
        if failed:
            box: list[Any] = [_portable(error, self.rank) if error and self.rank == failed[0] else None]
            self._exchange(distributed.broadcast_object_list, box, failed[0])
            self._told = error or pickle.loads(box[0])
            if error is None:
                assert self._told is not None
                raise self._told
        return tuple(sums[: len(values)])

    def _exchange(self, collective: Callable[..., Any], *arguments: Any) -> None:
        try:
            collective(*arguments)
        except RuntimeError as error:  # what torch.distributed raises is one
            raise RankLostError(self.rank, first_line(error)) from error


def _portable(error: Exception, rank: int) -> bytes:
    """The error for another process, with where it came from; one that does not survive the way becomes its text."""
    said = f"on rank {rank}:\n" + "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of errors does with its arguments
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(said)
    return pickle.dumps(error)
