"""Concatenated Speech Commands: n words one after the other, the label of the one at a known position.

The paper's long-context task (section 5, Table 4). Licence, address, checksums, counts and split are those of
speech_commands, whose prepared recordings it reads: nothing is stored twice.

Clip        n recordings of the same part of the split, 1 s each (silence completes a shorter one); the labelled one at
            `position` from 0, the others drawn for each epoch. Evaluation always hears the same ones.
Profiles    `concat_shift`: the authors' code turns the whole clip, so that up to a tenth of what is pooled comes from
            the last word; paper and fair turn each second within itself. `shift`: the authors' 0.1 s.

A clip of ten is 1000 tokens of the raw frontend. The paper pools the first 100 of them, which are exactly the labelled
word where position is 0: with model.pool_tokens=100 no memory is needed, with None or model.pool=last it is.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from helix.data.clips import Clips, concat
from helix.data.datasets.speech_commands import SpeechCommands
from helix.data.index import Index
from helix.protocol import Protocol
from helix.registry import DATASETS


@DATASETS.register("concat_speech_commands")
@dataclass(frozen=True, kw_only=True)
class ConcatSpeechCommands(SpeechCommands):
    """Clips of `n` words, labelled by the one at `position`."""

    n: int = 10
    position: int = 0

    shares: ClassVar[str | None] = "speech_commands"
    caveat: ClassVar[str | None] = (
        "where only the tokens of the labelled word are pooled, the task does not test memory; with "
        "model.pool_tokens=null or model.pool=last it does"
    )

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"concat_speech_commands: n is {self.n}; wanted 1 or more")
        if not 0 <= self.position < self.n:
            raise ValueError(
                f"concat_speech_commands: position is {self.position}; wanted 0 to {self.n - 1}, as n is {self.n}"
            )

    @property
    def clip_samples(self) -> int:
        return self.n * self.rate_hz

    def clips(self, index: Index, rows: np.ndarray, *, protocol: Protocol, seed: int, epoch: int | None) -> Clips:
        parts = self.n if protocol.concat_shift == "per_clip" else 1
        return concat(
            index,
            rows,
            n=self.n,
            position=self.position,
            piece_samples=self.rate_hz,
            parts=parts,
            seed=seed,
            epoch=epoch,
        )

    @property
    def recording_options(self) -> dict[str, Any]:
        return {}
