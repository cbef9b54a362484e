"""VoxPopuli: both official layouts, speakers nobody knows, spans of sessions, the full list of speakers."""

import csv
import gzip
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helix.data.audio import AudioError, to_int16
from helix.data.dataset import DatasetError
from helix.data.datasets.voxpopuli import BASE, TABLES, VoxPopuli
from helix.data.shards import check_source, open_prepared, prepare
from helix.protocol import profile

PARLIAMENT = VoxPopuli(clip_s=1)


def edit(source: Path, line: int, **changes: str) -> None:
    """Change fields of one row (0 is the first) of the packed table."""
    with gzip.open(source / TABLES[0], "rt", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="|"))
    rows[line] |= changes
    with gzip.open(source / TABLES[0], "wt", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="|")
        table.writeheader()
        table.writerows(rows)


def problems(source: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        PARLIAMENT.recordings(source)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize("whole_sessions", [True, False])
def test_both_official_layouts_are_read(layouts, tmp_path, whole_sessions):
    listing = PARLIAMENT.listing(layouts.voxpopuli(tmp_path / "v", whole_sessions=whole_sessions))
    assert len(listing.recordings) == 45 and listing.classes == ("1000", "1001", "1002", "1003", "1004")
    assert all(str(row.path).endswith("_original.ogg") == whole_sessions for row in listing.recordings)
    assert {row.group for row in listing.recordings} == {
        row.recording_id.split("-20100119")[0] for row in listing.recordings
    }
    for row in listing.recordings[::7]:
        assert 7_199 <= len(PARLIAMENT.wave(row, tmp_path / "v")) <= 7_201


def test_an_utterance_is_the_spans_of_its_session_one_after_the_other(layouts, tmp_path):
    source = layouts.voxpopuli(tmp_path / "v")
    recording = PARLIAMENT.recordings(source)[17]
    whole, rate_hz = soundfile.read(source / str(recording.path))
    assert recording.spans is not None and len(recording.spans) == 2
    wanted = np.concatenate([whole[int(low * rate_hz) : int(high * rate_hz)] for low, high in recording.spans])
    assert np.array_equal(PARLIAMENT.wave(recording, source), to_int16(wanted))


def test_a_span_beyond_the_end_of_its_session_is_an_error_with_its_name(layouts, tmp_path):
    source = layouts.voxpopuli(tmp_path / "v", sessions=1)
    edit(source, 3, vad="[(0.0, 0.01), (900.0, 901.5)]")
    late = next(row for row in PARLIAMENT.recordings(source) if row.spans and row.spans[-1][0] == 900)
    with pytest.raises(AudioError, match=r"_original\.ogg: ends after 7\.50 s; wanted 900\.00 to 901\.50 s of it"):
        PARLIAMENT.wave(late, source)


def test_speakers_nobody_knows_are_left_out_and_counted(layouts, tmp_path, storage):
    source = layouts.voxpopuli(tmp_path / "v")
    edit(source, 0, speaker_id="")
    listing = PARLIAMENT.listing(source)
    assert listing.notes == (
        "4 utterances whose speaker nobody knows were left out",
        "3 rows that the table itself calls invalid were left out",
    )
    assert "None" not in listing.classes and "" not in listing.classes
    assert prepare("voxpopuli", source=source, storage=storage, allow_partial=True).manifest["notes"] == [
        *listing.notes
    ]


def test_the_full_list_of_speakers_is_complete_and_one_less_is_not(layouts, tmp_path):
    source = layouts.voxpopuli(tmp_path / "v", speakers=1313, sessions=2, utterances=2, make=layouts.touch)
    assert len(check_source("voxpopuli", source=source).classes) == 1313
    few = layouts.voxpopuli(tmp_path / "w", speakers=1312, sessions=1, utterances=1, make=layouts.touch)
    with pytest.raises(DatasetError, match="1312 classes; wanted 1313"):
        check_source("voxpopuli", source=few)
    assert len(check_source("voxpopuli", source=few, allow_partial=True).classes) == 1312


def test_absent_audio_is_listed_and_keeps_its_class(layouts, tmp_path, storage):
    source = layouts.voxpopuli(tmp_path / "v", whole_sessions=False)
    for path in sorted(source.glob("transcribed_data/en/*/*0119-0.ogg")):
        path.unlink()
    assert "neither transcribed_data/en/2010/" in problems(source) and "_original.ogg is there" in problems(source)
    manifest = prepare("voxpopuli", source=source, storage=storage, allow_partial=True).manifest
    assert len(manifest["missing"]) == 3 and len(manifest["classes"]) == 5 and manifest["partial"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vad": "nothing"}, "vad is 'nothing'; wanted a list of (from, to) in seconds"),
        ({"vad": "[]"}, "vad is '[]'; wanted spans that begin before they end, one after the other"),
        ({"vad": "[(0.0, 1e999)]"}, "wanted spans that begin before they end"),
        ({"vad": "[(0.0, 1.0), (0.5, 2.0)]"}, "one after the other"),
        ({"vad": "[(3.0, 4.0), (1.0, 2.0)]"}, "one after the other"),
        ({"vad": "(" * 500}, "wanted a list of (from, to) in seconds"),
        ({"split": "trian"}, "split is 'trian'; wanted train, dev, test or invalid"),
        ({"split": ""}, "split is ''; wanted train, dev, test or invalid"),
        ({"vad": "[(2.0, 1.0)]"}, "wanted spans that begin before they end"),
        ({"session_id": "../etc"}, "session_id is '../etc'"),
        ({"id_": "a/../b"}, "wanted a session that begins with its year, and an id"),
    ],
)
def test_a_bad_row_is_named_with_its_line(layouts, tmp_path, changes, message):
    source = layouts.voxpopuli(tmp_path / "v")
    edit(source, 2, **changes)
    told = problems(source)
    assert "asr_en.tsv.gz line 4: " in told and message in told


def test_a_table_that_is_cut_off_or_not_there_is_named(layouts, tmp_path):
    source = layouts.voxpopuli(tmp_path / "v")
    packed = (source / TABLES[0]).read_bytes()
    (source / TABLES[0]).write_bytes(packed[: len(packed) // 2])
    assert "asr_en.tsv.gz: cannot be read to its end" in problems(source)
    (source / TABLES[0]).unlink()
    assert (
        f"there is no asr_en.tsv.gz in it, in annotations/asr or in transcribed_data/en; it comes from {BASE}"
        in problems(source)
    )


def test_sessions_stay_on_one_side_under_fair(layouts, tmp_path, storage):
    source = layouts.voxpopuli(tmp_path / "v")
    index = open_prepared(
        storage, prepare("voxpopuli", source=source, storage=storage, allow_partial=True).prefix
    ).index
    split = PARLIAMENT.split(index, fold=1, protocol=profile("fair"))
    sides = [
        {(label, group) for label, group in zip(index.label[rows].tolist(), index.group[rows].tolist(), strict=True)}
        for rows in (split.train, split.validation, split.test)
    ]
    assert all(sides) and sum(map(len, sides)) == len(set.union(*sides))
    for rows in (split.train, split.test):
        assert set(index.label[rows].tolist()) == set(range(5))


def rewrite(source: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Change the lines of the packed table (0 is the header)."""
    lines = gzip.decompress((source / TABLES[0]).read_bytes()).decode().splitlines(keepends=True)
    (source / TABLES[0]).write_bytes(gzip.compress("".join(change(lines)).encode()))


def test_an_unclosed_quote_a_garbage_row_and_a_cut_row_are_told_with_their_lines(layouts, tmp_path):
    source = layouts.voxpopuli(tmp_path / "v")

    def damage(lines: list[str]) -> list[str]:
        lines[3] = lines[3].replace("|A b.|", '|"Yes he said|')
        lines[5] = "garbage\n"
        lines[7] = lines[7][: len(lines[7]) // 2] + "\n"
        return lines

    rewrite(source, damage)
    told = problems(source)
    for line in (4, 6, 8):
        assert f"asr_en.tsv.gz line {line}: " in told
    with pytest.raises(DatasetError):
        check_source("voxpopuli", source=source, allow_partial=True)


def test_an_utterance_without_a_row_is_named_with_its_file(layouts, tmp_path):
    source = layouts.voxpopuli(tmp_path / "v", whole_sessions=False, make=layouts.touch)
    rewrite(source, lambda lines: lines[:2] + lines[3:])
    told = problems(source)
    assert re.fullmatch(
        r"transcribed_data/en/2010/\S+-20100119-1\.ogg: is there, and asr_en\.tsv\.gz has no row for it", told
    )


@pytest.mark.parametrize("share", [0.33, 0.74])
@pytest.mark.parametrize("whole_sessions", [True, False])
def test_cut_audio_is_an_error_of_every_utterance_in_it(layouts, tmp_path, whole_sessions, share):
    source = layouts.voxpopuli(tmp_path / "v", whole_sessions=whole_sessions, sessions=1)
    path = sorted(source.glob("**/*.ogg"))[0]
    path.write_bytes(path.read_bytes()[: round(share * path.stat().st_size)])
    touched = [row for row in PARLIAMENT.recordings(source) if source / str(row.path) == path]
    assert len(touched) == (15 if whole_sessions else 1)
    for row in touched:
        with pytest.raises(AudioError, match=r"is truncated|cannot be decoded"):
            PARLIAMENT.wave(row, source)


@pytest.mark.parametrize("whole_sessions", [True, False])
def test_audio_that_is_whole_and_shorter_than_its_spans_is_an_error(layouts, tmp_path, whole_sessions):
    source = layouts.voxpopuli(tmp_path / "v", whole_sessions=whole_sessions, sessions=1)
    row = PARLIAMENT.recordings(source)[-1]
    path = source / str(row.path)
    wave, rate_hz = soundfile.read(path)
    last = next(one for one in PARLIAMENT.recordings(source) if one.spans and one.spans[-1][1] == 7.5)
    for short_s, refused in ((0.08, False), (0.12, True)):
        soundfile.write(path, wave[: len(wave) - int(short_s * rate_hz)], rate_hz)
        one = last if whole_sessions else row
        if not refused:
            assert abs(len(PARLIAMENT.wave(one, source)) / 16_000 - (0.45 - short_s)) < 0.001
            continue
        with pytest.raises(
            AudioError, match=r"ends after 7\.38 s; wanted|is too short: 0\.33 s; its spans are 0\.45 s"
        ):
            PARLIAMENT.wave(one, source)


def test_spans_without_a_sample_are_told_as_what_they_are(layouts, tmp_path):
    source = layouts.voxpopuli(tmp_path / "v", sessions=1)
    edit(source, 3, vad="[(1.0, 1.00001)]")
    (row,) = [one for one in PARLIAMENT.recordings(source) if one.spans == ((1.0, 1.00001),)]
    with pytest.raises(AudioError, match=r"holds no sample of .*, whose spans are 1e-05 s and end at 1.00001 s"):
        PARLIAMENT.wave(row, source)


def test_rows_whose_audio_is_absent_are_checked_like_others(layouts, tmp_path):
    source = layouts.voxpopuli(tmp_path / "v", whole_sessions=False)
    next(source.glob("transcribed_data/en/*/*-20100119-0.ogg")).unlink()
    rewrite(source, lambda lines: [*lines, lines[1]])
    with pytest.raises(DatasetError, match="-20100119-0: stands 2 times in the metadata"):
        PARLIAMENT.listing(source, allow_missing=True)
