"""UrbanSound8K: the official layout, mixed rates and channels, folds as they are, and what can be wrong."""

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helix.data.audio import AudioError
from helix.data.dataset import DatasetError
from helix.data.datasets.urbansound8k import PER_CLASS, PER_FOLD, TABLE, UrbanSound8K
from helix.data.shards import open_prepared, prepare
from helix.protocol import Protocol

URBAN = UrbanSound8K()


def edit(layout: Path, line: int, **changes: str) -> None:
    """Change fields of one row (0 is the first) of the table."""
    with (layout / TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[line] |= changes
    with (layout / TABLE).open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def problems(source: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        URBAN.recordings(source)
    return "\n".join(caught.value.problems)


def whole_table() -> dict[tuple[int, int], int]:
    """Some (fold, label) counts with the published sums of folds and of classes."""
    cells, per_class = {}, list(PER_CLASS.values())
    for fold, wanted in PER_FOLD.items():
        for label in range(10):
            cells[fold, label] = min(wanted, per_class[label])
            wanted -= cells[fold, label]
            per_class[label] -= cells[fold, label]
    return {cell: count for cell, count in cells.items() if count}


def test_the_complete_set_lacks_nothing(layouts, tmp_path):
    source = layouts.urbansound8k(tmp_path / "UrbanSound8K", cells=whole_table(), make=layouts.touch)
    listing = URBAN.listing(tmp_path)
    assert len(listing.recordings) == URBAN.expected_recordings == 8732
    assert URBAN.shortfall([(row.fold, row.label) for row in listing.recordings], listing.classes) == []
    assert URBAN.folds == tuple(range(1, 11))
    next(source.glob("audio/fold1/*.wav")).unlink()
    assert "fold 1: 872 recordings of 873" in URBAN.shortfall(
        [(row.fold, row.label) for row in URBAN.listing(source, allow_missing=True).recordings], listing.classes
    )


def test_any_rate_and_any_channels_become_16_khz_mono_of_their_own_length(layouts, tmp_path):
    source = layouts.urbansound8k(tmp_path / "u", folds=[1])
    lengths = set()
    for recording in URBAN.recordings(source):
        info = soundfile.info(source / str(recording.path))
        wave = URBAN.wave(recording, source)
        assert abs(len(wave) - info.frames * 16_000 / info.samplerate) <= 1
        lengths.add((info.samplerate, info.channels, info.subtype))
    assert len({rate for rate, *_ in lengths}) == 3 and len({channels for _, channels, _ in lengths}) == 2
    assert len({subtype for *_, subtype in lengths}) == 2


def test_a_clip_is_four_seconds_with_silence_at_the_end(layouts, tmp_path, storage):
    source = layouts.urbansound8k(tmp_path / "u", folds=[1, 2])
    recordings = open_prepared(
        storage, prepare("urbansound8k", source=source, storage=storage, allow_partial=True).prefix
    )
    rows = URBAN.split(recordings.index, fold=1, protocol=Protocol()).test
    clips = URBAN.clips(recordings.index, rows, protocol=Protocol(), seed=0, epoch=0)
    assert clips.clip_samples == 64_000 and clips.silence > 0.3
    assert np.array_equal(clips.samples, np.minimum(recordings.index.samples[rows], 64_000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classID": "dog"}, "fold is '1' and classID 'dog'; wanted two numbers"),
        ({"fold": "-1"}, "fold is '-1' and classID '0'; wanted two numbers"),
        ({"classID": "10"}, "label 10; wanted 0 to 9"),
        ({"class": "siren"}, "classID 0 is called 'siren'; wanted 'air_conditioner'"),
        ({"fsID": "7"}, "fsID is '7'; wanted '1000', as its name begins"),
        ({"slice_file_name": "../1000-0-0-0.wav"}, "wanted the name of a .wav file"),
        ({"fold": "3"}, "audio/fold3/1000-0-0-1.wav is not there"),
    ],
)
def test_a_bad_row_is_named(layouts, tmp_path, changes, message):
    source = layouts.urbansound8k(tmp_path / "u", folds=[1])
    edit(source, 1, **changes)
    assert message in problems(source)


def test_a_fold_that_does_not_exist_is_named(layouts, tmp_path):
    source = layouts.urbansound8k(tmp_path / "u", folds=[1, 11], make=layouts.touch)
    assert "fold 11; wanted one of 1, 2, 3, 4, 5, 6, 7, 8, 9, 10" in problems(source)


def test_everything_that_is_wrong_is_told_at_once(layouts, tmp_path):
    source = layouts.urbansound8k(tmp_path / "u", folds=[1])
    edit(source, 1, classID="x")
    edit(source, 2, **{"class": "bell"})
    with (source / TABLE).open() as file:
        first = next(iter(csv.DictReader(file)))
    edit(source, 3, **first)
    next(source.glob("audio/fold1/*-9-0-0.wav")).unlink()
    told = problems(source)
    for part in ("classID 'x'", "is called 'bell'", "stands 2 times in the metadata", "is not there"):
        assert part in told
    (source / TABLE).write_text("slice_file_name,fold\n")
    assert "has no column fsID, classID, class" in problems(source)


def test_real_excerpts_of_every_kind_come_through(real_folder):
    source = real_folder("urbansound8k", "urbansound8k-official-tiny")
    recordings = URBAN.recordings(source)
    assert len(recordings) == 26 and {row.label for row in recordings} == set(range(10))
    kinds = Counter()
    for recording in recordings:
        info = soundfile.info(source / str(recording.path))
        wave = URBAN.wave(recording, source)
        kinds[info.samplerate, info.channels, info.subtype] += 1
        assert abs(len(wave) / 16_000 - info.duration) < 1e-3 and wave.any()
    assert {rate for rate, *_ in kinds} == {44_100, 48_000} and {channels for _, channels, _ in kinds} >= {2}
    assert {subtype for *_, subtype in kinds} == {"PCM_16", "PCM_24"}


def test_real_excerpts_prepare_as_a_part_and_their_folds_stay(real_folder, storage):
    source = real_folder("urbansound8k", "urbansound8k-official-tiny")
    with pytest.raises(DatasetError, match="26 of 8732 recordings"):
        prepare("urbansound8k", source=source, storage=storage)
    recordings = open_prepared(
        storage, prepare("urbansound8k", source=source, storage=storage, allow_partial=True).prefix
    )
    assert recordings.manifest["partial"] and len(recordings.classes) == 10
    assert Counter(recordings.index.fold.tolist()) == {1: 6, 2: 4, 3: 1, 5: 7, 7: 4, 10: 4}
    assert len(set(recordings.index.samples.tolist())) > 3


def test_a_truncated_excerpt_is_an_error_with_its_name(layouts, tmp_path):
    source = layouts.urbansound8k(tmp_path / "u", folds=[1])
    recording = URBAN.recordings(source)[3]
    path = source / str(recording.path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AudioError, match=f"{path.name}: is truncated"):
        URBAN.wave(recording, source)


def test_a_row_out_of_range_is_wrong_whether_its_file_is_there_or_not(layouts, tmp_path, storage):
    source = layouts.urbansound8k(tmp_path / "u", folds=[1, 2])
    edit(source, 1, fold="11")
    edit(source, 2, classID="10")
    next(source.glob("audio/fold1/1010-1-0-0.wav")).unlink()
    for row in range(3, 4):
        edit(source, row, classID="12")
    next(source.glob("audio/fold1/1010-1-0-1.wav")).unlink()
    with pytest.raises(DatasetError) as caught:
        prepare("urbansound8k", source=source, storage=storage, allow_partial=True)
    told = "\n".join(caught.value.problems)
    for part in ("1000-0-0-1: fold 11; wanted one of", "1010-1-0-0: label 10; wanted", "1010-1-0-1: label 12; wanted"):
        assert part in told
    assert list(storage.keys("data")) == []


def test_every_damage_of_the_table_is_told_with_its_line(layouts, tmp_path):
    source = layouts.urbansound8k(tmp_path / "u", folds=[1])
    lines = (source / TABLE).read_bytes().splitlines()
    lines[2] += b",more,fields"
    lines[4] = b"\xff" + lines[4]
    lines[6] = b'"' + lines[6]
    lines[8] = lines[8][:20]
    lines[9] += b"\xfe"
    (source / TABLE).write_bytes(b"\r\n".join(lines) + b"\r\n")
    told = problems(source)
    for line, what in ((3, "has 10 fields; wanted 8"), (5, "no UTF-8"), (7, "quote"), (9, "fields"), (10, "no UTF-8")):
        assert re.search(f"UrbanSound8K.csv line {line}: .*{what}", told)
    (source / TABLE).unlink()
    (source / TABLE).mkdir()
    assert problems(source) == "metadata/UrbanSound8K.csv: cannot be read: Is a directory"


def test_a_file_without_a_row_is_named_and_may_be_left_out_of_a_part(layouts, tmp_path, storage):
    source = layouts.urbansound8k(tmp_path / "u", folds=[1])
    lines = (source / TABLE).read_text().splitlines(keepends=True)
    (source / TABLE).write_text("".join(lines[:1] + lines[2:]))
    layouts.sound(source / "audio" / "fold1" / "._1000-0-0-1.wav", 10)  # a Mac leaves such files
    assert problems(source) == "audio/fold1/1000-0-0-0.wav: is there, and metadata/UrbanSound8K.csv has no row for it"
    manifest = prepare("urbansound8k", source=source, storage=storage, allow_partial=True).manifest
    assert manifest["partial"] and list(manifest["missing"]) == ["audio/fold1/1000-0-0-0.wav"]
