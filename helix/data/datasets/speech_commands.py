"""Speech Commands v2: 105829 spoken words of up to 1 s, 35 words. Warden 2018, arXiv:1804.03209.

Licence     CC BY 4.0.
Address     storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz; checksums below.
Counts      84843 to train, 9981 to validate and 11005 to test on; per word as in table 1 of the paper.
Split       The official lists validation_list.txt and testing_list.txt; what stands in neither trains. They keep the
            recordings of one speaker together. It is one split, called fold 1.
Profiles    `validation`: authors and paper leave the validation list unused and report the best epoch of the test list,
            fair selects on the validation list. `shift`: the authors' code shifts by 0.1 s, the paper by 0.5 s.

Files are 16 kHz, mono, 16 bits; anything else is refused by name. A recording keeps its own length; a clip is its first
second, with silence at the end where it is shorter. The speaker is what stands before _nohash_ in a name.
_background_noise_ holds no words and is left out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from helix.data.audio import decode
from helix.data.dataset import Dataset, Download, Index, Recording, Scan, Split, official_root
from helix.data.metadata import read_lines
from helix.data.splits import OFFICIAL, official
from helix.protocol import Protocol
from helix.registry import DATASETS

LISTS = {"validation": Path("validation_list.txt"), "test": Path("testing_list.txt")}
PER_PART = {"train": 84_843, "validation": 9_981, "test": 11_005}
NOT_WORDS = "_background_noise_"
FILE_NAME = re.compile(r"(?P<speaker>[0-9a-f]{8})_nohash_(?P<take>\d+)\.wav")

# fmt: off
PER_WORD = {
    "backward": 1664, "bed": 2014, "bird": 2064, "cat": 2031, "dog": 2128, "down": 3917, "eight": 3787, "five": 4052,
    "follow": 1579, "forward": 1557, "four": 3728, "go": 3880, "happy": 2054, "house": 2113, "learn": 1575,
    "left": 3801, "marvin": 2100, "nine": 3934, "no": 3941, "off": 3745, "on": 3845, "one": 3890, "right": 3778,
    "seven": 3998, "sheila": 2022, "six": 3860, "stop": 3872, "three": 3727, "tree": 1759, "two": 3880, "up": 3723,
    "visual": 1592, "wow": 2123, "yes": 4044, "zero": 4052,
}
# fmt: on
WORDS = tuple(sorted(PER_WORD))
ARCHIVE = Download(
    url="https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    name="speech_commands_v0.02.tar.gz",
    sha256="af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
    md5="6b74f3901214cb2c2934e98196829835",
    bytes=2_428_923_189,
)


@DATASETS.register("speech_commands")
@dataclass(frozen=True, kw_only=True)
class SpeechCommands(Dataset):
    """The official layout, one folder per word beside the two lists."""

    licence: ClassVar[str] = "CC BY 4.0"
    url: ClassVar[str] = "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
    authors_shift_s: ClassVar[float] = 0.1
    needs_source: ClassVar[bool] = True
    caveat: ClassVar[str | None] = (
        "the authors of the paper choose the epoch on the official test list and leave the validation list unused; the "
        "profile fair does not"
    )

    @property
    def class_count(self) -> int:
        return len(WORDS)

    @property
    def downloads(self) -> tuple[Download, ...]:
        return (ARCHIVE,)

    @property
    def clip_samples(self) -> int:
        return self.rate_hz

    @property
    def expected_per_fold(self) -> Mapping[int, int]:
        return {OFFICIAL[part]: count for part, count in PER_PART.items()}

    @property
    def expected_per_class(self) -> Mapping[int, int]:
        return {label: PER_WORD[word] for label, word in enumerate(WORDS)}

    @property
    def folds(self) -> tuple[int, ...]:
        return (OFFICIAL["test"],)

    def split(self, index: Index, *, fold: int, protocol: Protocol) -> Split:
        return official(index, fold=fold, validation=protocol.validation)

    def scan(self, source: Path | None) -> Scan:
        assert source is not None
        root = official_root(source, LISTS["test"], "speech_commands")
        recordings, absent, missing, problems = [], [], {}, []
        folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        strange = set(folders) - set(WORDS) - {NOT_WORDS}
        for word in sorted(strange):
            missing[word] = f"the folder {word} is none of the {len(WORDS)} words"
        part_of: dict[str, str] = {}
        for part, name in LISTS.items():
            if not (root / name).exists():
                problems.append(f"{name} is not there, so nobody can tell what may be trained on")
                continue
            found = read_lines(root / name, name=str(name))
            problems += found.problems
            for number, line in found.lines:
                word, slash, filename = line.strip().partition("/")
                if not line.strip() or word in strange:
                    continue
                if not slash or word not in WORDS or not FILE_NAME.fullmatch(filename):
                    problems.append(f"{name} line {number}: {line!r}; wanted WORD/SPEAKER_nohash_TAKE.wav")
                elif line.strip() in part_of:
                    problems.append(
                        f"{name} line {number}: {line.strip()} is already listed to be for {part_of[line.strip()]}"
                    )
                else:
                    part_of[line.strip()] = part
        there = set()
        for word in WORDS:
            for path in sorted((root / word).glob("*")) if word in folders else ():
                if FILE_NAME.fullmatch(path.name) is None:
                    problems.append(f"{word}/{path.name}: wanted a name SPEAKER_nohash_TAKE.wav")
                    continue
                there.add(f"{word}/{path.name}")
                recordings.append(_recording(path.relative_to(source), part_of.get(f"{word}/{path.name}", "train")))
        for line in sorted(part_of.keys() - there):
            absent.append(_recording(root.relative_to(source) / line, part_of[line]))
            missing[line.removesuffix(".wav")] = f"{line} is listed to be for {part_of[line]} and not there"
        return Scan(recordings=recordings, classes=WORDS, missing=missing, absent=absent, problems=problems)

    def wave(self, recording: Recording, source: Path | None) -> np.ndarray:
        assert source is not None and recording.path is not None
        return decode(source / recording.path, rate_hz=self.rate_hz, source_rate_hz=self.rate_hz, source_channels=1)


def _recording(path: Path, part: str) -> Recording:
    """The recording in the file `path`, relative to the source, whose name is well formed."""
    speaker = path.name.partition("_")[0]
    return Recording(
        recording_id=f"{path.parent.name}/{path.stem}",
        label=WORDS.index(path.parent.name),
        path=path.as_posix(),
        fold=OFFICIAL[part],
        speaker=speaker,
        group=speaker,
    )
