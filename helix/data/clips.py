"""Clips as index arithmetic over recordings: one recording, several one after the other, a speaker's cut to length.

A clip is a list of pieces, each a span of a recording with its place in the clip; everywhere else the clip is silent.
So a set of clips is a handful of integer columns, an epoch of a hundred thousand clips is made in a fraction of a
second, and no sample is touched before it is read. What is drawn (fillers, orders) is a pure function of (seed, epoch).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from helix.data.index import Index
from helix.spec import derive_seed

#: A stitched clip is known by its speaker and its number among the speaker's clips; so many a speaker may have.
CLIPS_PER_SPEAKER = 1 << 20


@dataclass(frozen=True, eq=False, kw_only=True)
class Clips:
    """Clips as columns, pieces in compressed rows: those of clip c are first_piece[c] to first_piece[c + 1] - 1.

    Per clip: `clip` a key that stays with it (augmentation is drawn by it), `label`, `group` (clips of one group share
    audio or a source), `sounding` the samples before the silence that ends it, at least 1. Per piece: samples `start`
    to `start + samples` of the recording `row` stand at the sample `place` of the clip; the pieces of a clip do not
    overlap and every clip has one. All clips are `clip_samples` long. `parts`: into how many equal parts a clip falls
    that shift on their own (see augment).
    """

    clip: np.ndarray
    label: np.ndarray
    group: np.ndarray
    sounding: np.ndarray
    first_piece: np.ndarray
    row: np.ndarray
    start: np.ndarray
    samples: np.ndarray
    place: np.ndarray
    clip_samples: int
    parts: int = 1

    def __len__(self) -> int:
        return len(self.clip)

    def take(self, positions: np.ndarray) -> "Clips":
        """The clips at `positions`, in that order."""
        count = np.diff(self.first_piece)[positions]
        piece = np.repeat(self.first_piece[positions], count) + _within(count)
        return Clips(
            clip=self.clip[positions],
            label=self.label[positions],
            group=self.group[positions],
            sounding=self.sounding[positions],
            first_piece=_starts(count),
            row=self.row[piece],
            start=self.start[piece],
            samples=self.samples[piece],
            place=self.place[piece],
            clip_samples=self.clip_samples,
            parts=self.parts,
        )

    @property
    def silence(self) -> float:
        """The share of all samples that are silence at the end of a clip, whoever padded it."""
        return 1.0 - float(self.sounding.sum()) / (len(self) * self.clip_samples) if len(self) else 0.0


def single(index: Index, rows: np.ndarray, *, clip_samples: int) -> Clips:
    """One clip per row: the recording, cut at `clip_samples`."""
    rows = np.asarray(rows, np.int64)
    return _clips(
        index,
        clip=rows,
        label=index.label[rows],
        group=index.group[rows],
        count=np.ones(len(rows), np.int64),
        row=rows,
        start=np.zeros(len(rows), np.int64),
        samples=np.minimum(index.samples[rows].astype(np.int64), clip_samples),
        place=np.zeros(len(rows), np.int64),
        clip_samples=clip_samples,
    )


def concat(
    index: Index,
    rows: np.ndarray,
    *,
    n: int,
    position: int,
    piece_samples: int,
    parts: int = 1,
    seed: int,
    epoch: int | None,
) -> Clips:
    """One clip of n * piece_samples per row: the recording at `position` (from 0) and n - 1 others of `rows` around it.

    Each is cut or followed by silence to `piece_samples`, so a label's recording has a place that is known. The others
    are drawn anew for each epoch, uniformly from all the rest; None draws what evaluation hears, whatever the seed.
    """
    if not 0 <= position < n:
        raise ValueError(f"position is {position}; wanted 0 to {n - 1}, the places among n={n}")
    rows = np.asarray(rows, np.int64)
    if n > 1 and len(rows) == 1:
        raise ValueError("one recording alone has no others to stand beside it; prepare more recordings")
    filler = _random(seed, "fillers", epoch).integers(0, max(1, len(rows) - 1), (len(rows), n - 1))
    filler += filler >= np.arange(len(rows))[:, None]
    row = np.insert(rows[filler], position, rows, axis=1).ravel()
    return _clips(
        index,
        clip=rows,
        label=index.label[rows],
        group=index.group[rows],
        count=np.full(len(rows), n, np.int64),
        row=row,
        start=np.zeros(len(row), np.int64),
        samples=np.minimum(index.samples[row].astype(np.int64), piece_samples),
        place=np.tile(np.arange(n, dtype=np.int64) * piece_samples, len(rows)),
        clip_samples=n * piece_samples,
        parts=parts,
    )


def stitch(
    index: Index,
    rows: np.ndarray,
    *,
    clip_samples: int,
    how: Literal["reshuffle", "disjoint"],
    seed: int,
    epoch: int | None,
) -> Clips:
    """A speaker's recordings laid end to end in a drawn order and cut; max(1, total // clip_samples) clips each.

    A speaker is a label. "reshuffle": every clip draws its own order of all of them, so that clips of one speaker
    overlap and are one group. "disjoint": one order per speaker is cut into clips, so that no sample stands in two and
    less than one clip is left over, another part for each epoch. None as epoch draws what evaluation hears, whatever
    the seed.
    """
    if how not in ("reshuffle", "disjoint"):
        raise ValueError(f"stitch is {how!r}; wanted reshuffle or disjoint")
    rows = np.asarray(rows, np.int64)
    rows = rows[np.argsort(index.label[rows], kind="stable")]
    length = index.samples[rows].astype(np.int64)
    speaker, first, members = np.unique(index.label[rows], return_index=True, return_counts=True)
    total = np.add.reduceat(length, first) if len(rows) else length
    clips = np.maximum(1, total // clip_samples)
    number = _within(clips)
    random = _random(seed, "stitch", epoch)
    if how == "reshuffle":
        of_clip = np.repeat(np.arange(len(speaker)), clips)
        count = members[of_clip]
        chosen = np.repeat(first[of_clip], count) + _within(count)
        chosen = chosen[_shuffled(random, count)]
        place = _before(length[chosen], count)
        kept = place < clip_samples
        clip_of = np.repeat(np.arange(len(of_clip)), count)[kept]
        row, place = rows[chosen[kept]], place[kept]
        start = np.zeros(len(row), np.int64)
        samples = np.minimum(length[chosen[kept]], clip_samples - place)
    else:
        chosen = (np.repeat(first, members) + _within(members))[_shuffled(random, members)]
        begin = _before(length[chosen], members)
        end = begin + length[chosen]
        most = np.repeat(clips, members)
        reach = np.clip(-(-end // clip_samples), None, most) - np.clip(begin // clip_samples, None, most)
        piece = np.repeat(np.arange(len(chosen)), reach)
        nth = begin[piece] // clip_samples + _within(reach)
        clip_of = np.repeat(np.repeat(_starts(clips)[:-1], members), reach) + nth
        row = rows[chosen[piece]]
        low, high = nth * clip_samples, (nth + 1) * clip_samples
        start = np.maximum(low - begin[piece], 0)
        samples = np.minimum(end[piece], high) - (begin[piece] + start)
        place = begin[piece] + start - low
    label = np.repeat(speaker.astype(np.int64), clips)
    clip = label * CLIPS_PER_SPEAKER + number
    group = np.char.add("speaker ", label.astype(str)) if how == "reshuffle" else np.char.add("clip ", clip.astype(str))
    return _clips(
        index,
        clip=clip,
        label=label,
        group=group.astype(object),
        count=np.bincount(clip_of, minlength=len(clip)),
        row=row,
        start=start,
        samples=samples,
        place=place,
        clip_samples=clip_samples,
    )


def _clips(
    index: Index,
    *,
    clip: np.ndarray,
    label: np.ndarray,
    count: np.ndarray,
    clip_samples: int,
    parts: int = 1,
    **columns: np.ndarray,
) -> Clips:
    """The clips, with where each one falls silent: after the last sample that sounds in any of its pieces."""
    row, start, place = columns["row"], columns["start"], columns["place"]
    heard = np.minimum(index.samples[row] - index.padded_samples[row] - start, columns["samples"])
    last = np.where(heard > 0, place + heard, 0)
    first_piece = _starts(count)
    sounding = np.maximum.reduceat(last, first_piece[:-1]) if len(clip) else last
    return Clips(
        clip=clip.astype(np.int64),
        label=label.astype(np.int64),
        sounding=np.maximum(sounding, 1).astype(np.int64),
        first_piece=first_piece,
        clip_samples=clip_samples,
        parts=parts,
        **columns,
    )


def _random(seed: int, purpose: str, epoch: int | None) -> np.random.Generator:
    path = (seed, purpose, epoch) if epoch is not None else (0, purpose, "evaluation")
    return np.random.Generator(np.random.Philox(derive_seed(*path)))


def _shuffled(random: np.random.Generator, count: np.ndarray) -> np.ndarray:
    """A permutation of sum(count) places that stays within each of the runs of `count` places."""
    run = np.repeat(np.arange(len(count), dtype=np.int64), count)
    bits = 62 - max(1, len(count)).bit_length()
    return np.argsort((run << bits) | random.integers(0, 1 << bits, len(run)), kind="stable")


def _within(count: np.ndarray) -> np.ndarray:
    """0, 1, ... within each run of `count` places."""
    return np.arange(int(count.sum()), dtype=np.int64) - np.repeat(_starts(count)[:-1], count)


def _starts(count: np.ndarray) -> np.ndarray:
    """int64 [len(count) + 1]: where each run begins, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(count, dtype=np.int64)])


def _before(length: np.ndarray, count: np.ndarray) -> np.ndarray:
    """How many samples stand before each recording in its run of `count` recordings."""
    begin = np.cumsum(length) - length
    runs = _starts(count)[:-1]
    return begin - np.repeat(begin[np.minimum(runs, max(0, len(begin) - 1))], count) if len(begin) else begin
