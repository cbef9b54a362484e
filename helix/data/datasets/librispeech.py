"""LibriSpeech as speaker identification: who reads these 30 s? Panayotov et al. 2015, doi 10.1109/ICASSP.2015.7178964.

Licence     CC BY 4.0.
Address     https://www.openslr.org/12, train-clean-100.tar.gz (checksums below) and train-clean-360.tar.gz.
Counts      train-clean-100: 251 speakers, 28539 utterances, 100.6 h. train-clean-360: 921 speakers, 104014 utterances.
            The paper names 921 speakers and its authors' code reads the subset that has 251.
Split       There is no official one. 80/20 within every speaker, by sha256 of `split_seed` and the utterance's id.
Clip        A speaker's utterances laid end to end in a drawn order and cut to `clip_s`.
Profiles    `speaker_split`: authors and paper deal utterances, so a chapter stands on both sides and its room and
            microphone help; fair deals chapters. `stitch`: authors and paper draw an order per clip, so clips
            overlap; fair cuts one order into clips. `shift`: the authors' code shifts by 1.0 s, the paper by 0.5 s.

The classes are the readers that SPEAKERS.TXT names for the subset, sorted by number, whether their audio is there or
not. Files are 16 kHz, mono; anything else is refused by name. The group of an utterance is its chapter.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from helix.data.audio import decode
from helix.data.clips import Clips, stitch
from helix.data.dataset import Dataset, Download, Index, Recording, Scan, Split, official_root
from helix.data.metadata import Lines, read_lines
from helix.data.splits import by_speaker
from helix.protocol import Protocol
from helix.registry import DATASETS

TABLE = Path("SPEAKERS.TXT")
SPEAKERS = {"train-clean-100": 251, "train-clean-360": 921}
UTTERANCES = {"train-clean-100": 28_539, "train-clean-360": 104_014}
#: No checksum of train-clean-360 is at hand.
ARCHIVES = {
    "train-clean-100": Download(
        url="https://www.openslr.org/resources/12/train-clean-100.tar.gz",
        name="train-clean-100.tar.gz",
        sha256="d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2",
        md5="2a93770f6d5c6c964bc36631d331a522",
        bytes=6_387_309_499,
    ),
    "train-clean-360": Download(
        url="https://www.openslr.org/resources/12/train-clean-360.tar.gz", name="train-clean-360.tar.gz"
    ),
}
#: 100.6 h over 28539 utterances.
TYPICAL_S = 12.7
NAME = re.compile(r"(?P<speaker>\d+)-(?P<chapter>\d+)-(?P<number>\d{4})")


@DATASETS.register("librispeech")
@dataclass(frozen=True, kw_only=True)
class LibriSpeech(Dataset):
    """The official layout, LibriSpeech/SPEAKERS.TXT beside SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac."""

    subset: str = "train-clean-100"
    clip_s: int = 30
    split_seed: int = 42

    licence: ClassVar[str] = "CC BY 4.0"
    url: ClassVar[str] = "https://www.openslr.org/12"
    authors_shift_s: ClassVar[float] = 1.0
    needs_source: ClassVar[bool] = True
    clip_per_recording: ClassVar[bool] = False
    caveat: ClassVar[str | None] = (
        "there is no official split for speaker identification; utterances of one chapter share a room and a "
        "microphone, and only speaker_split=session keeps them on one side"
    )

    def __post_init__(self) -> None:
        if self.subset not in SPEAKERS:
            raise ValueError(f"librispeech: subset is {self.subset!r}; wanted {' or '.join(SPEAKERS)}")
        if self.clip_s < 1:
            raise ValueError(f"librispeech: clip_s is {self.clip_s}; wanted 1 second or more")

    @property
    def class_count(self) -> int:
        return SPEAKERS[self.subset]

    @property
    def downloads(self) -> tuple[Download, ...]:
        return (ARCHIVES[self.subset],)

    @property
    def clip_samples(self) -> int:
        return self.clip_s * self.rate_hz

    @property
    def recording_samples(self) -> int:
        return round(TYPICAL_S * self.rate_hz)

    @property
    def expected_recordings(self) -> int | None:
        return UTTERANCES[self.subset]

    @property
    def folds(self) -> tuple[int, ...]:
        return (1,)

    def split(self, index: Index, *, fold: int, protocol: Protocol) -> Split:
        return by_speaker(index, fold=fold, seed=self.split_seed, protocol=protocol)

    def clips(self, index: Index, rows: np.ndarray, *, protocol: Protocol, seed: int, epoch: int | None) -> Clips:
        return stitch(index, rows, clip_samples=self.clip_samples, how=protocol.stitch, seed=seed, epoch=epoch)

    @property
    def recording_options(self) -> dict[str, Any]:
        return {"subset": self.subset}

    def scan(self, source: Path | None) -> Scan:
        assert source is not None
        root = official_root(source, TABLE, "librispeech")
        readers, problems = self._readers(root)
        label_of = {reader: label for label, reader in enumerate(readers)}
        recordings, absent, missing = [], [], {}
        folders = sorted((root / self.subset).glob("*/*"), key=lambda path: path.relative_to(root).as_posix())
        if not folders:
            problems.append(f"{self.subset}: there is no SPEAKER/CHAPTER folder in it")
        for folder in folders:
            if not folder.is_dir():
                continue
            speaker, chapter = folder.parent.name, folder.name
            if speaker not in label_of:
                problems.append(f"{self.subset}/{speaker}: {TABLE} names no such reader in this subset")
                continue
            there = {path.stem: path for path in sorted(folder.glob("*.flac"))}
            table = folder / f"{speaker}-{chapter}.trans.txt"
            found = read_lines(table, name=table.relative_to(root).as_posix()) if table.exists() else Lines()
            problems += found.problems
            told = Counter(line.partition(" ")[0] for _, line in found.lines if line.strip())
            problems += [
                f"{utterance}: stands {told[utterance]} times in {table.name}"
                for utterance in told
                if told[utterance] > 1
            ]
            for utterance in sorted(told.keys() - there.keys()):
                missing[utterance] = f"{speaker}/{chapter}/{utterance}.flac is not there and {table.name} lists it"
            if told:
                problems += [
                    f"{utterance}.flac: {table.name} does not list it"
                    for utterance in sorted(there.keys() - told.keys())
                ]
            for utterance in sorted(there.keys() | told.keys()):
                path = there.get(utterance, folder / f"{utterance}.flac")
                matched = NAME.fullmatch(utterance)
                if matched is None or (matched["speaker"], matched["chapter"]) != (speaker, chapter):
                    where = path.relative_to(root).as_posix() if utterance in there else f"{table.name}: {utterance!r}"
                    problems.append(f"{where}: wanted a name {speaker}-{chapter}-NUMBER.flac")
                    continue
                recording = Recording(
                    recording_id=utterance,
                    label=label_of[speaker],
                    path=path.relative_to(source).as_posix(),
                    fold=None,
                    speaker=speaker,
                    group=f"{speaker}-{chapter}",
                )
                (recordings if utterance in there else absent).append(recording)
        return Scan(recordings=recordings, classes=readers, missing=missing, absent=absent, problems=problems)

    def wave(self, recording: Recording, source: Path | None) -> np.ndarray:
        assert source is not None and recording.path is not None
        return decode(source / recording.path, rate_hz=self.rate_hz, source_rate_hz=self.rate_hz, source_channels=1)

    def _readers(self, root: Path) -> tuple[tuple[str, ...], list[str]]:
        """The readers of the subset by SPEAKERS.TXT, by number, and what is wrong with its lines."""
        found = read_lines(root / TABLE, name=str(TABLE))
        readers, problems = [], list(found.problems)
        for number, line in found.lines:
            if not line.strip() or line.startswith(";"):
                continue
            # The name is the last field and may hold the sign that parts them.
            cells = [cell.strip() for cell in line.split("|", 4)]
            if len(cells) < 5 or not cells[0].isdecimal():
                problems.append(f"{TABLE} line {number}: {line[:60]!r}; wanted ID | SEX | SUBSET | MINUTES | NAME")
            elif cells[2] == self.subset:
                readers.append(cells[0])
        problems += [
            f"{TABLE}: reader {one} stands {readers.count(one)} times"
            for one in sorted({r for r in readers if readers.count(r) > 1})
        ]
        return tuple(sorted(set(readers), key=int)), problems
