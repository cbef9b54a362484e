"""VoxPopuli, English, as speaker identification: who speaks in these 300 s? Wang et al. 2021, arXiv:2101.00390.

Licence     CC0, with the European Parliament's legal notice for the recordings.
Address     dl.fbaipublicfiles.com/voxpopuli: annotations/asr/asr_en.tsv.gz and audios/original_2009.tar to
            original_2020.tar. No checksums are published.
Counts      1313 speakers over train, dev and test (its README). How many utterances there are is not published, so
            the listing counts. The paper names 1313 classes and its authors' code merges train and dev alone.
Split       The official parts are for recognition and are merged. 80/20 within every speaker, by sha256 of
            `split_seed` and the utterance's id. Rows whose speaker is "None" (or empty) have no label: they are left
            out and counted, and so are rows whose split is "invalid".
Clip        A speaker's utterances laid end to end in a drawn order and cut to `clip_s`.
Profiles    `speaker_split`: authors and paper deal utterances, fair deals sessions. `stitch`: authors and paper draw
            an order per clip, fair cuts one order. `shift`: the authors' code does not shift, the paper by 0.5 s.
            `pad_mask`: most speakers have less than 300 s to test on, so silence is a large part of what authors and
            paper average.

Two official layouts are read: whole sessions (raw_audios/original/YEAR/SESSION_original.ogg), of which the spans that
the table calls `vad` are cut, and the utterances that the official script cuts from them
(transcribed_data/en/YEAR/SESSION-ID.ogg). The table, packed or not, stands in transcribed_data/en, in annotations/asr
or beside them. Classes are the speakers of the table in sorted order, whether their audio is there or not.
"""

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from helix.data.audio import AudioError, decode
from helix.data.clips import Clips, stitch
from helix.data.dataset import Dataset, DatasetError, Download, Index, Recording, Scan, Split, unlisted
from helix.data.metadata import read_table
from helix.data.splits import by_speaker
from helix.protocol import Protocol
from helix.registry import DATASETS

BASE = "https://dl.fbaipublicfiles.com/voxpopuli"
TABLES = tuple(
    Path(folder, f"asr_en.tsv{packed}")
    for folder in ("transcribed_data/en", "annotations/asr", ".")
    for packed in (".gz", "")
)
COLUMNS = ("session_id", "id_", "speaker_id", "split", "vad")
PARTS = ("train", "dev", "test")
#: The official table marks some rows so, and the official script passes over them.
INVALID = "invalid"
NOBODY = ("", "None")
SPEAKERS = 1313
#: About 543 h over about 180 000 utterances.
TYPICAL_S = 10.8
#: By how much audio may be shorter than its spans: the last one may end a little after the session does, and the
#: official script cuts it there.
TOLERANCE_S = 0.1
SESSION_ENDING = "_original.ogg"
CUT, SESSIONS = Path("transcribed_data", "en"), Path("raw_audios", "original")


@DATASETS.register("voxpopuli")
@dataclass(frozen=True, kw_only=True)
class VoxPopuli(Dataset):
    """The official layout, a table of utterances and their audio."""

    clip_s: int = 300
    split_seed: int = 42

    licence: ClassVar[str] = "CC0-1.0; the recordings under the European Parliament's legal notice"
    url: ClassVar[str] = "https://github.com/facebookresearch/voxpopuli"
    authors_shift_s: ClassVar[float] = 0.0
    needs_source: ClassVar[bool] = True
    clip_per_recording: ClassVar[bool] = False
    caveat: ClassVar[str | None] = (
        "there is no official split for speaker identification; 20 % of a speaker are about one clip, many of them "
        "padded, so accuracy rests on about 1300 clips"
    )

    def __post_init__(self) -> None:
        if self.clip_s < 1:
            raise ValueError(f"voxpopuli: clip_s is {self.clip_s}; wanted 1 second or more")

    @property
    def class_count(self) -> int:
        return SPEAKERS

    @property
    def downloads(self) -> tuple[Download, ...]:
        years = range(2009, 2021)
        return (
            Download(url=f"{BASE}/annotations/asr/asr_en.tsv.gz", name="transcribed_data/en/asr_en.tsv.gz"),
            *(
                Download(url=f"{BASE}/audios/original_{year}.tar", name=f"raw_audios/original_{year}.tar")
                for year in years
            ),
        )

    @property
    def clip_samples(self) -> int:
        return self.clip_s * self.rate_hz

    @property
    def recording_samples(self) -> int:
        return round(TYPICAL_S * self.rate_hz)

    @property
    def folds(self) -> tuple[int, ...]:
        return (1,)

    def split(self, index: Index, *, fold: int, protocol: Protocol) -> Split:
        return by_speaker(index, fold=fold, seed=self.split_seed, protocol=protocol)

    def clips(self, index: Index, rows: np.ndarray, *, protocol: Protocol, seed: int, epoch: int | None) -> Clips:
        return stitch(index, rows, clip_samples=self.clip_samples, how=protocol.stitch, seed=seed, epoch=epoch)

    @property
    def recording_options(self) -> dict[str, Any]:
        return {}

    def scan(self, source: Path | None) -> Scan:
        assert source is not None
        root, table = _table(source)
        found = read_table(table, COLUMNS, name=table.name, delimiter="|")
        utterances, problems, listed, nobody, invalid = [], list(found.problems), set(), 0, 0
        for line, row in found.rows:
            listed.add(f"{row['session_id'][:4]}/{row['session_id']}-{row['id_']}.ogg")
            if row["split"] == INVALID:
                invalid += 1
            elif row["split"] not in PARTS:
                problems.append(
                    f"{table.name} line {line}: split is {row['split'][:40]!r}; wanted {', '.join(PARTS)} or {INVALID}"
                )
            elif row["speaker_id"] in NOBODY:
                nobody += 1
            else:
                utterance = _parse(row)
                if isinstance(utterance, str):
                    problems.append(f"{table.name} line {line}: {utterance}")
                else:
                    utterances.append(utterance)
        speakers = tuple(sorted({utterance.speaker for utterance in utterances}))
        label_of = {speaker: label for label, speaker in enumerate(speakers)}
        there = {path for folder in (CUT, SESSIONS) for path in (root / folder).glob("*/[!.]*.ogg")}
        cuts = {path.relative_to(root / CUT).as_posix() for path in there if path.is_relative_to(root / CUT)}
        recordings, absent, missing = [], [], {}
        if found.rows:
            missing |= unlisted((f"{CUT}/{path}" for path in cuts), (f"{CUT}/{path}" for path in listed), table.name)
        for utterance in utterances:
            year = utterance.session[:4]
            cut = root / CUT / year / f"{utterance.recording_id}.ogg"
            session = root / SESSIONS / year / f"{utterance.session}{SESSION_ENDING}"
            path = cut if cut in there else session if session in there else None
            if path is None:
                missing[utterance.recording_id] = (
                    f"neither {cut.relative_to(root)} nor {session.relative_to(root)} is there"
                )
            (absent if path is None else recordings).append(
                Recording(
                    recording_id=utterance.recording_id,
                    label=label_of[utterance.speaker],
                    path=(path or cut).relative_to(source).as_posix(),
                    fold=None,
                    speaker=utterance.speaker,
                    group=utterance.session,
                    spans=utterance.spans,
                )
            )
        notes = [f"{nobody} utterances whose speaker nobody knows were left out"] if nobody else []
        if invalid:
            notes.append(f"{invalid} rows that the table itself calls {INVALID} were left out")
        return Scan(
            recordings=recordings,
            classes=speakers,
            missing=missing,
            absent=absent,
            problems=problems,
            notes=tuple(notes),
        )

    def wave(self, recording: Recording, source: Path | None) -> np.ndarray:
        assert source is not None and recording.path is not None and recording.spans is not None
        path = source / recording.path
        wanted_s = sum(high_s - low_s for low_s, high_s in recording.spans)
        if not recording.path.endswith(SESSION_ENDING):
            wave = decode(path, rate_hz=self.rate_hz)
            if len(wave) / self.rate_hz < wanted_s - TOLERANCE_S:
                raise AudioError(
                    str(path), f"is too short: {len(wave) / self.rate_hz:.2f} s; its spans are {wanted_s:.2f} s"
                )
            return wave
        if not path.is_file():
            raise AudioError(str(path), "is not there")
        session = _session(path, self.rate_hz, path.stat().st_mtime_ns)
        ends_s = len(session) / self.rate_hz
        beyond_s = 0.0
        for low_s, high_s in recording.spans:
            beyond_s += max(0.0, high_s - max(low_s, ends_s))
            if beyond_s > TOLERANCE_S:
                raise AudioError(str(path), f"ends after {ends_s:.2f} s; wanted {low_s:.2f} to {high_s:.2f} s of it")
        wave = np.concatenate(
            [session[int(low_s * self.rate_hz) : int(high_s * self.rate_hz)] for low_s, high_s in recording.spans]
        )
        if len(wave) == 0:
            raise AudioError(
                str(path),
                f"holds no sample of {recording.recording_id}, whose spans are {wanted_s:g} s and end at "
                f"{recording.spans[-1][1]:g} s",
            )
        return wave


@lru_cache(maxsize=1)
def _session(path: Path, rate_hz: int, _modified_ns: int) -> np.ndarray:
    """int16 [samples]: a whole session, kept for the utterances that follow, which come sorted by session.

    It is read from its beginning and not by seeking: libsndfile 1.2.2 finds the wrong place in an Ogg Vorbis file in 1
    to 3 of 100 tries.
    """
    return decode(path, rate_hz=rate_hz)


@dataclass(frozen=True, kw_only=True)
class _Utterance:
    """One row of the table."""

    session: str
    recording_id: str
    speaker: str
    spans: tuple[tuple[float, float], ...]


def _table(source: Path) -> tuple[Path, Path]:
    """The folder of the official layout, and its table."""
    children = sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    for root in (source, *children):
        for name in TABLES:
            if (root / name).is_file():
                return root, root / name
    raise DatasetError(
        f"voxpopuli from {source}:",
        [f"there is no asr_en.tsv.gz in it, in annotations/asr or in transcribed_data/en; it comes from {BASE}"],
    )


def _parse(row: Mapping[str, str]) -> "_Utterance | str":
    """One row of the table, or what is wrong with it."""
    session, number, speaker, _, vad = (row[column] for column in COLUMNS)
    if not session[:4].isdecimal() or not number or "/" in session + number:
        return f"session_id is {session!r} and id_ {number!r}; wanted a session that begins with its year, and an id"
    try:
        spans = tuple((float(span[0]), float(span[1])) for span in ast.literal_eval(vad))
    except (ValueError, TypeError, SyntaxError, IndexError, KeyError, RecursionError, MemoryError):
        return f"{session}-{number}: vad is {vad[:40]!r}; wanted a list of (from, to) in seconds"
    moments = [0.0, *(moment for span in spans for moment in span)]
    if not spans or not all(low < high < math.inf for low, high in spans) or sorted(moments) != moments:
        return f"{session}-{number}: vad is {vad[:40]!r}; wanted spans that begin before they end, one after the other"
    return _Utterance(session=session, recording_id=f"{session}-{number}", speaker=speaker, spans=spans)
