"""Batches of prepared recordings: a pure function of (seed, epoch, step). There is no other state to save or restore.

B batch, T samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from helix.data.shards import Recordings
from helix.spec import derive_seed


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Waves in [-1, 1), their labels, how many samples come before the padding, and the rows of the index."""

    wave_BT: torch.Tensor  # noqa: N815
    label_B: torch.Tensor  # noqa: N815
    samples_B: torch.Tensor  # noqa: N815
    clip_B: torch.Tensor  # noqa: N815

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class Batches:
    """The training batches of `rows`: every epoch a new order, each row once, what fills no batch dropped."""

    def __init__(self, recordings: Recordings, rows: np.ndarray, *, batch_size: int, seed: int):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; wanted 1 or more")
        if len(rows) < batch_size:
            raise ValueError(
                f"{len(rows)} training clips do not fill one batch of {batch_size}; lower training.batch_size or "
                "prepare more recordings"
            )
        self.recordings, self.rows, self.batch_size, self.seed = recordings, np.asarray(rows), batch_size, seed

    @property
    def steps_per_epoch(self) -> int:
        return len(self.rows) // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """All rows in the order of this epoch."""
        random = np.random.Generator(np.random.Philox(derive_seed(self.seed, "order", epoch)))
        return self.rows[random.permutation(len(self.rows))]

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of the step `step` (from 0) of an epoch."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step is {step}; an epoch has the steps 0 to {self.steps_per_epoch - 1}")
        first = step * self.batch_size
        return gather(self.recordings, self.order(epoch)[first : first + self.batch_size])


def in_order(recordings: Recordings, rows: np.ndarray, *, batch_size: int) -> Iterator[Batch]:
    """All of `rows` as they stand, for evaluation; the last batch may be smaller."""
    for first in range(0, len(rows), batch_size):
        yield gather(recordings, rows[first : first + batch_size])


def gather(recordings: Recordings, rows: np.ndarray) -> Batch:
    """The rows as one batch on the CPU."""
    wave_BT = torch.from_numpy(recordings.waves(rows)).to(torch.float32).mul_(1 / 32768)
    label_B = torch.from_numpy(recordings.index.label[rows].astype(np.int64))
    samples_B = torch.from_numpy(recordings.index.samples[rows] - recordings.index.padded_samples[rows])
    clip_B = torch.from_numpy(np.asarray(rows, dtype=np.int64))
    return Batch(wave_BT=wave_BT, label_B=label_B, samples_B=samples_B, clip_B=clip_B)
