"""ESC-50: the official layout, what can be wrong with it, and the real recordings."""

import csv
import hashlib
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helix.data.dataset import DatasetError
from helix.data.datasets import esc50
from helix.data.datasets.esc50 import Esc50
from helix.data.shards import open_prepared, prepare
from helix.data.splits import halves

ESC50 = Esc50()


def edit(layout: Path, line: int, **changes: str) -> None:
    """Change fields of one row (0 is the first) of the table."""
    path = layout / "meta" / "esc50.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[line] |= changes
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def problems(source: Path | None) -> str:
    with pytest.raises(DatasetError) as caught:
        ESC50.recordings(source)
    return str(caught.value)


def test_the_folder_and_its_parent_give_the_same_recordings(esc50_layout):
    layout = esc50_layout()
    inside, outside = ESC50.recordings(layout), ESC50.recordings(layout.parent)
    assert [row.recording_id for row in inside] == [row.recording_id for row in outside]
    assert all((layout.parent / str(row.path)).is_file() for row in outside)
    assert np.array_equal(ESC50.wave(inside[7], layout), ESC50.wave(outside[7], layout.parent))


def test_the_complete_set_lacks_nothing(esc50_layout):
    layout = esc50_layout(folds=range(1, 6), per_cell=8, samples=1)
    recordings = ESC50.recordings(layout)
    assert len(recordings) == ESC50.expected_recordings == 2000
    assert ESC50.shortfall([(row.fold, row.label) for row in recordings], ESC50.classes) == []


def test_any_rate_becomes_five_seconds_at_16_khz(esc50_layout):
    layout = esc50_layout(folds=[1], labels=[0], per_cell=1, rate_hz=44_100, samples=5 * 44_100)
    wave = ESC50.wave(ESC50.recordings(layout)[0], layout)
    assert wave.shape == (80_000,) and np.abs(wave[-1000:]).max() > 0


def test_a_short_clip_ends_in_silence(esc50_layout):
    layout = esc50_layout(folds=[1], labels=[0], per_cell=1, samples=1_600)
    wave = ESC50.wave(ESC50.recordings(layout)[0], layout)
    assert wave.shape == (80_000,) and wave[:1_600].any() and not wave[1_600:].any()


def test_without_a_source_it_says_where_to_get_one():
    assert "get them at https://github.com/karolpiczak/ESC-50" in problems(None)


def test_a_folder_without_the_table_is_named(tmp_path):
    assert f"{tmp_path}" in problems(tmp_path) and "there is no meta/esc50.csv" in problems(tmp_path)
    assert "there is no meta/esc50.csv" in problems(tmp_path / "nowhere")


def test_two_copies_are_ambiguous(esc50_layout):
    source = esc50_layout("one", folds=[1], labels=[0]).parent
    esc50_layout("two", folds=[1], labels=[0])
    assert "holds 2 copies (one, two); name one of them" in problems(source)


def test_a_table_without_its_columns_is_named(esc50_layout):
    layout = esc50_layout(folds=[1], labels=[0])
    (layout / "meta" / "esc50.csv").write_text("filename,fold\na.wav,1\n")
    assert "has no column target, category, src_file" in problems(layout)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "dog"}, "fold is '1' and target 'dog'; wanted two numbers"),
        ({"fold": "-1"}, "fold is '-1' and target '0'; wanted two numbers"),
        ({"target": "50"}, "label 50; wanted 0 to 49"),
        ({"fold": "6"}, "fold 6; wanted one of 1, 2, 3, 4, 5"),
        ({"category": "cat"}, "target 0 is called 'cat'; wanted 'dog'"),
        ({"filename": "../../etc/passwd.wav"}, "wanted the name of a .wav file"),
        ({"filename": "notes.txt"}, "filename is 'notes.txt'; wanted the name of a .wav file"),
        ({"filename": "1-100-Z-0.wav"}, "1-100-Z-0: audio/1-100-Z-0.wav is not there"),
        ({"src_file": ""}, "src_file is empty"),
        ({"filename": "dog.wav"}, "filename is 'dog.wav'; wanted fold-clip-take-target.wav"),
        ({"target": "1", "category": "rooster"}, "fold 1 and target 1 contradict the name of the file"),
        ({"fold": "2"}, "1-1000-B-0.wav: fold 2 and target 0 contradict the name of the file"),
    ],
)
def test_a_bad_row_is_named(esc50_layout, changes, message):
    layout = esc50_layout(folds=[1], labels=[0, 1])
    edit(layout, 1, **changes)
    assert message in problems(layout)


def test_everything_that_is_wrong_is_told_at_once(esc50_layout):
    layout = esc50_layout(folds=[1], labels=[0, 1, 2])
    with (layout / "meta" / "esc50.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    edit(layout, 1, **first)
    edit(layout, 2, target="77")
    edit(layout, 3, fold="x")
    next((layout / "audio").glob("*-2.wav")).unlink()
    told = problems(layout)
    for part in ("stands 2 times in the metadata", "label 77", "fold is 'x'", "is not there"):
        assert part in told


def test_missing_and_unreadable_clips_are_listed_and_nothing_is_published(esc50_layout, storage, monkeypatch):
    monkeypatch.setattr(esc50, "PER_CLASS_AND_FOLD", 1)
    layout = esc50_layout(folds=range(1, 6), per_cell=1, samples=1)
    files = sorted((layout / "audio").iterdir())
    files[0].write_bytes(b"")
    files[249].write_bytes(files[249].read_bytes()[:-1])
    with pytest.raises(DatasetError) as caught:
        prepare("esc50", source=layout, storage=storage)
    assert "2 recordings cannot be read" in str(caught.value)
    assert f"{files[0].stem}: audio/{files[0].name} is empty" in str(caught.value)
    assert f"{files[249].stem}: audio/{files[249].name} is truncated" in str(caught.value)
    assert not [key for key in storage.keys("data") if key.endswith("manifest.json")]


def test_a_partial_set_has_to_be_asked_for_and_says_what_it_lacks(esc50_layout, storage):
    layout = esc50_layout(folds=[1, 2], per_cell=8, samples=1, labels=range(3))
    with pytest.raises(DatasetError, match="48 of 2000 recordings") as caught:
        prepare("esc50", source=layout, storage=storage)
    assert "fold 1: 24 recordings of 400; cow 0 of 8, frog 0 of 8" in str(caught.value)
    assert "fold 3: no recordings; wanted 400" in str(caught.value)

    gone, broken = sorted((layout / "audio").iterdir())[3:5]
    gone.unlink()
    broken.write_bytes(b"RIFF")
    with pytest.raises(DatasetError, match=f"--quarantine 1 leaves them out(.|\n)*{broken.name} cannot be decoded"):
        prepare("esc50", source=layout, storage=storage, allow_partial=True)
    manifest = prepare("esc50", source=layout, storage=storage, allow_partial=True, quarantine=1).manifest
    assert manifest["partial"] and manifest["recordings"] == 46 and manifest["expected_recordings"] == 2000
    assert manifest["missing"] == {gone.stem: f"audio/{gone.name} is not there"}
    assert manifest["quarantined"] == {
        broken.stem: {"file": broken.name, "reason": "cannot be decoded: Format not recognised."}
    }
    assert "dog 6 of 8" in manifest["shortfall"][0]


def test_real_recordings_come_through_sample_for_sample(real_esc50):
    layout = next(real_esc50.glob("**/meta/esc50.csv")).parents[1]
    recordings = ESC50.recordings(real_esc50)
    assert len(recordings) >= 400
    for recording in recordings[::97]:
        pcm, rate_hz = soundfile.read(real_esc50 / str(recording.path), dtype="int16")
        assert rate_hz != 16_000 or np.array_equal(ESC50.wave(recording, real_esc50), pcm)
    listed = layout / "MANIFEST.tsv"
    if listed.is_file():
        with listed.open(newline="") as file:
            sha256 = {row["path"]: row["pcm16_sha256"] for row in csv.DictReader(file, delimiter="\t")}
        for recording in recordings[::53]:
            wave = ESC50.wave(recording, real_esc50)
            assert hashlib.sha256(wave.tobytes()).hexdigest() == sha256[f"audio/{recording.recording_id}.wav"]


def test_real_recordings_share_sources_across_folds_only_where_we_say_so(real_esc50):
    folds, labels = defaultdict(set), defaultdict(set)
    for row in ESC50.recordings(real_esc50):
        folds[row.group].add(row.fold)
        labels[row.group].add(row.label)
    shared = {group for group in folds if len(folds[group]) > 1}
    assert shared <= {"131943", "134049", "209698", "234879"}
    assert ESC50.caveat is not None and "4 source recordings" in ESC50.caveat
    assert all(len(labels[group]) == 2 for group in shared)


def test_one_real_fold_prepares_and_halves(real_esc50, tmp_path, storage):
    layout = next(real_esc50.glob("**/meta/esc50.csv")).parents[1]
    source = tmp_path / "one"
    (source / "meta").mkdir(parents=True)
    (source / "audio").symlink_to(layout / "audio")
    lines = (layout / "meta" / "esc50.csv").read_text().splitlines()
    kept = [line for line in lines if line.split(",")[1] in ("fold", "2")]
    (source / "meta" / "esc50.csv").write_text("\n".join(kept))
    recordings = open_prepared(storage, prepare("esc50", source=source, storage=storage, allow_partial=True).prefix)
    assert len(recordings) == 400 and recordings.manifest["seconds"] == 2000.0
    assert 0.01 < recordings.manifest["padded_fraction"] < 0.3
    rows = np.arange(400)
    selects = halves(recordings.index.label, recordings.index.group)
    per_class = np.bincount(recordings.index.label[rows[selects]], minlength=50)
    assert 190 <= selects.sum() <= 210 and per_class.min() >= 1 and per_class.max() <= 7
    assert np.mean(np.abs(per_class - 4) <= 1) > 0.9


def test_a_file_without_a_row_is_named(esc50_layout):
    layout = esc50_layout(folds=[1], labels=[0])
    table = layout / "meta" / "esc50.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:1] + lines[2:]))
    assert "audio/1-1000-A-0.wav: is there, and meta/esc50.csv has no row for it" in problems(layout)


def test_a_row_whose_file_is_absent_is_checked_like_others(esc50_layout):
    layout = esc50_layout(folds=[1], labels=[0, 1])
    edit(layout, 0, target="77")
    edit(layout, 1, fold="8")
    for path in (layout / "audio").glob("*-0.wav"):
        path.unlink()
    with pytest.raises(
        DatasetError, match=r"1-1000-A-0: label 77; wanted 0 to 49\n.*1-1000-B-0: fold 8; wanted one of"
    ):
        ESC50.listing(layout, allow_missing=True)


def test_the_download_is_of_one_commit_and_claims_no_checksum_that_nobody_publishes():
    (download,) = ESC50.downloads
    assert re.fullmatch(r"https://github\.com/karolpiczak/ESC-50/archive/[0-9a-f]{40}\.zip", download.url)
    assert download.name.endswith(".zip") and (download.sha256, download.md5, download.bytes) == (None, None, None)
