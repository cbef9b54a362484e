"""The prepared recordings as columns; what splits and clips are computed from, without touching a sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One recording as its metadata describes it.

    `path` is relative to the source, None where the wave is made up. `group` names the longer recording or the session
    that several recordings were cut from: rows of one group never stand on both sides of a comparison of halves.
    `spans`: the parts of its session that make up this recording, as (from, to) in seconds; None where there is none.
    """

    recording_id: str
    label: int
    path: str | None
    fold: int | None
    speaker: str | None
    group: str
    spans: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Index:
    """The prepared recordings as columns; row r of each array is recording r. A fold of -1 stands for none."""

    recording_id: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    samples: np.ndarray
    label: np.ndarray
    speaker: np.ndarray
    fold: np.ndarray
    group: np.ndarray
    crc32: np.ndarray
    source_sha256: np.ndarray
    padded_samples: np.ndarray

    def __len__(self) -> int:
        return len(self.recording_id)


def listed_index(recordings: Sequence[Recording]) -> Index:
    """The index of recordings that are listed and not decoded: enough to split them, with lengths of 0."""
    nothing = np.zeros(len(recordings), np.int64)
    return Index(
        recording_id=np.array([row.recording_id for row in recordings], object),
        shard=nothing,
        offset=nothing,
        samples=nothing,
        label=np.array([row.label for row in recordings], np.int64),
        speaker=np.array([row.speaker for row in recordings], object),
        fold=np.array([-1 if row.fold is None else row.fold for row in recordings], np.int64),
        group=np.array([row.group for row in recordings], object),
        crc32=nothing,
        source_sha256=np.full(len(recordings), None, object),
        padded_samples=nothing,
    )
