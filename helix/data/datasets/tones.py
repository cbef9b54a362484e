"""Tones: a synthetic task that only a model which hears temporal order can solve. Made on the fly, nothing to download.

A clip holds three short bursts of pitches A, B, C, one in each of three slots of a circle. A class is a triple of
pitches ("low", "high", "wide") and one of its two cyclic orders: forward A B C or backward A C B. The triples differ in
spectrum; the two orders of one triple differ in nothing else but order. The clip starts anywhere on the circle, so a
circular shift, the augmentation of the protocol, turns no class into another.

Why a bag of tokens cannot tell the two orders, so that its accuracy is bounded by 50 %:

- One event per token. A burst lasts at most 0.3 s of a 0.512 s slot. The silence between two bursts is longer than a
  raw token (10 ms) and an STFT window (64 ms), and A, B and C lie in different rows of 16 mel bins out of 128. So no
  raw token and no mel patch holds two events.
- Place says nothing. Exchange the bursts of the two slots that the ends of the clip do not cut, and the order is the
  opposite one. Each burst moves by one slot, which is one mel patch (16 frames of 512 samples = 8192), so mel tokens
  move as they are. Below 2.56 s nothing is a multiple of both 8192 and the raw token of 160 samples; for raw tokens,
  therefore, the start of a burst is drawn uniformly from a whole number of token lengths. Its phase against their grid
  is then uniform in any slot, and every forward clip has one equally likely backward clip whose raw tokens are the same
  multiset: `mirrored` finds it.

For raw tokens the claim is exact. For mel it holds up to the two frames whose windows reach over the ends of the clip,
and up to the side lobes of the Hann window, which lie below the noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from helix.data.audio import to_int16
from helix.data.dataset import Dataset, Recording, Scan
from helix.registry import DATASETS
from helix.spec import derive_seed

SLOT_SAMPLES = 8192
SLOTS = 3
CLIP_SAMPLES = SLOTS * SLOT_SAMPLES
TOKEN_SAMPLES = 160
#: The starts of bursts spread over four raw tokens (40 ms): whole tokens, so that their phase is uniform.
JITTER_SAMPLES = 4 * TOKEN_SAMPLES
BURST_SAMPLES = (3200, 4800)
EDGE_SAMPLES = 320
DETUNE = 0.03
AMPLITUDE = (0.1, 0.3)
NOISE = 0.05

#: The middle of each row of 16 HTK mel bins out of 128 up to 8 kHz, in hertz; rows 1 to 7.
ROW_HZ = {1: 430.0, 2: 844.0, 3: 1411.0, 4: 2186.0, 5: 3245.0, 6: 4692.0, 7: 6671.0}
TRIPLES = {"low": (1, 2, 3), "high": (5, 6, 7), "wide": (1, 4, 7)}
ORDERS = {"forward": (0, 1, 2), "backward": (0, 2, 1)}


@dataclass(frozen=True, kw_only=True)
class Burst:
    """One tone with raised-cosine edges. `jitter` moves its start, in samples, from the earliest start in its slot."""

    pitch_hz: float
    jitter: int
    samples: int
    amplitude: float
    phase: float


@dataclass(frozen=True, kw_only=True)
class Score:
    """What is played: the burst of each slot, and how far the circle is turned (samples, to the right)."""

    bursts: tuple[Burst, ...]
    turn: int

    def earliest(self, slot: int) -> int:
        """Where on the clip a burst in this slot may start at the earliest, in samples."""
        margin = (SLOT_SAMPLES - BURST_SAMPLES[1] - JITTER_SAMPLES) // 2
        return (slot * SLOT_SAMPLES + margin + self.turn) % CLIP_SAMPLES


def mirrored(score: Score) -> Score:
    """The score in the opposite order whose clip has the same raw tokens: one to one, so both are equally likely.

    Exchanged are the two slots that the ends of the clip do not cut. Their jitter is chosen anew, so that each burst
    moves by whole tokens.
    """
    cut = -score.turn % CLIP_SAMPLES // SLOT_SAMPLES
    one, other = (slot for slot in range(SLOTS) if slot != cut)
    bursts = list(score.bursts)
    for here, there in ((one, other), (other, one)):
        moved = score.earliest(there) - score.earliest(here)
        burst = score.bursts[here]
        bursts[there] = replace(burst, jitter=(burst.jitter - moved) % JITTER_SAMPLES)
    return replace(score, bursts=tuple(bursts))


def render(score: Score, rate_hz: int) -> np.ndarray:
    """float64 [CLIP_SAMPLES]: the bursts without noise; one that crosses the end of the clip goes on at its start."""
    wave = np.zeros(CLIP_SAMPLES)
    for slot, burst in enumerate(score.bursts):
        start = score.earliest(slot) + burst.jitter
        time = np.arange(burst.samples)
        edge = np.minimum(1.0, (np.minimum(time, time[::-1]) + 0.5) / EDGE_SAMPLES)
        tone = np.sin(2 * np.pi * burst.pitch_hz * time / rate_hz + burst.phase)
        wave[(start + time) % CLIP_SAMPLES] += burst.amplitude * 0.5 * (1 - np.cos(np.pi * edge)) * tone
    return wave


@DATASETS.register("tones")
@dataclass(frozen=True, kw_only=True)
class Tones(Dataset):
    """The data set for demonstrations and tests: 6 classes, 1.536 s, 576 clips in 4 folds."""

    seed: int = 0
    clips_per_class: int = 96
    fold_count: int = 4

    licence: ClassVar[str] = "CC0-1.0"
    url: ClassVar[str] = "synthetic"
    authors_shift_s: ClassVar[float] = 0.5
    needs_source: ClassVar[bool] = False
    caveat: ClassVar[str | None] = "synthetic: it tells who hears temporal order and nothing about real sound"

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"tones: seed is {self.seed}; wanted 0 or more")
        if self.fold_count < 2:
            raise ValueError(f"tones: fold_count is {self.fold_count}; wanted 2 or more, one is tested on")
        if self.clips_per_class < self.fold_count:
            raise ValueError(
                f"tones: clips_per_class is {self.clips_per_class}; wanted at least one clip for each of the "
                f"{self.fold_count} folds"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(f"{triple}-{order}" for triple in TRIPLES for order in ORDERS)

    @property
    def class_count(self) -> int:
        return len(self.classes)

    @property
    def clip_samples(self) -> int:
        return CLIP_SAMPLES

    @property
    def expected_cells(self) -> Mapping[tuple[int, int], int]:
        folds = range(1, self.fold_count + 1)
        of_fold = {fold: len(range(fold - 1, self.clips_per_class, self.fold_count)) for fold in folds}
        return {(fold, label): of_fold[fold] for fold in folds for label in range(len(self.classes))}

    def scan(self, source: Path | None) -> Scan:
        if source is not None:
            return Scan(recordings=[], problems=[f"tones are made up and read no files; given {source}, leave it out"])
        recordings = []
        for label, name in enumerate(self.classes):
            for number in range(self.clips_per_class):
                recording_id, fold = f"{name}-{number:05d}", number % self.fold_count + 1
                recordings.append(
                    Recording(
                        recording_id=recording_id, label=label, path=None, fold=fold, speaker=None, group=recording_id
                    )
                )
        return Scan(recordings=recordings, classes=self.classes)

    def score(self, recording: Recording) -> Score:
        """What the recording plays; the first of its random draws."""
        return self._draw(recording)[0]

    def wave(self, recording: Recording, source: Path | None) -> np.ndarray:
        assert source is None, source
        score, random = self._draw(recording)
        wave = render(score, self.rate_hz) + NOISE * random.standard_normal(CLIP_SAMPLES)
        return to_int16(wave)

    def _draw(self, recording: Recording) -> tuple[Score, np.random.Generator]:
        random = np.random.Generator(np.random.Philox(derive_seed(self.seed, "tones", recording.recording_id)))
        triple, order = self.classes[recording.label].split("-")
        bursts = tuple(
            Burst(
                pitch_hz=ROW_HZ[TRIPLES[triple][letter]] * random.uniform(1 - DETUNE, 1 + DETUNE),
                jitter=int(random.integers(JITTER_SAMPLES)),
                samples=int(random.integers(BURST_SAMPLES[0], BURST_SAMPLES[1], endpoint=True)),
                amplitude=float(np.exp(random.uniform(*np.log(AMPLITUDE)))),
                phase=random.uniform(0, 2 * np.pi),
            )
            for letter in ORDERS[order]
        )
        return Score(bursts=bursts, turn=int(random.integers(CLIP_SAMPLES))), random
