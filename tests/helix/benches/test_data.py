"""The bench of the data runs at toy sizes on sources that it writes itself. No time is judged."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helix.bench import Conditions, Outcome, Row
from helix.benches.data import AUTHORS, CACHED, CLIP_SAMPLES, FLAC, FRESH, INT16, LITDATA, OURS, PREPARE, DataBench
from helix.data.datasets.esc50 import CLASSES, COLUMNS
from helix.loader_peers import authors_path, litdata_random, webdataset_stream
from helix.peers import MissingPeerError

QUICK = Conditions(repeats=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "ESC-50-master"
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    lines = [",".join(COLUMNS)]
    random = np.random.default_rng(0)
    for label in range(12):
        name = f"1-{100 + label}-A-{label}.wav"
        lines.append(f"{name},1,{label},{CLASSES[label]},{100 + label}")
        wave = random.integers(-9000, 9000, CLIP_SAMPLES).astype(np.int16)
        soundfile.write(folder / "audio" / name, wave, 16_000, subtype="PCM_16")
    (folder / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return folder


def rows(outcome: Outcome, title: str) -> dict[str, Row]:
    return {row.name: row for table in outcome.tables if title in table.title for row in table.rows}


@pytest.mark.service
@pytest.mark.skipif(sys.platform != "linux", reason="memory is told on Linux only")
def test_everything_is_measured_or_says_why_not(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "litdata", None)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    bench = DataBench(source=str(source), recordings=10, prepared=4, memory=(4, 12), clips=40, scratch=str(scratch))
    outcome = bench.run(QUICK)
    clips = rows(outcome, "clips of 5 s")
    assert list(clips) == [OURS, *(name for name in clips if name != OURS)]
    assert set(clips) == {OURS, FLAC, INT16, LITDATA, AUTHORS}
    assert clips[LITDATA].values == (None,) * 4 and "--target peers-litdata" in clips[LITDATA].note
    assert all(rows(outcome, "clips of ten")[name].values[0] for name in (OURS, FRESH))
    preparing = rows(outcome, "preparing")
    assert len(preparing) == 4 and all(row.values[0] for row in preparing.values()), preparing
    assert PREPARE in preparing
    held = rows(outcome, "whole set")
    assert [round(row.values[0] or 0, 1) for row in held.values()] == [0.6, 1.8]
    assert all(row.values[0] for row in rows(outcome, "S3").values()) and CACHED in rows(outcome, "S3")
    verdicts = {target.name: target.verdict for target in outcome.targets}
    assert verdicts[f"clips of 5 s: {LITDATA} / helix"] == "not measured" and len(verdicts) == 10
    assert list(scratch.iterdir()) == [], "the bench clears up"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "source=DIR"),
        ({"source": "here", "clips": 33}, "multiple of 10"),
        ({"source": "here", "memory": (5, 5)}, "sizes of a small and of a larger set"),
        ({"source": "here", "memory": (5, 50)}, "holds no meta/esc50.csv"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        DataBench(**options).run(QUICK)


def test_more_recordings_than_there_are_are_refused(source: Path):
    with pytest.raises(ValueError, match="holds 12 recordings; wanted 400"):
        DataBench(source=str(source), prepared=4, memory=(4, 12)).run(QUICK)


@pytest.mark.parametrize("form", ["flac", "int16"])
def test_a_stream_of_webdataset_gives_the_clips_that_we_give(form, tmp_path):
    waves = list(np.random.default_rng(0).integers(-9000, 9000, (5, 800)).astype(np.int16))
    try:
        read = webdataset_stream(tmp_path, waves, rate_hz=16_000, form=form)
    except MissingPeerError as error:
        pytest.skip(str(error))
    wanted = np.stack(waves).astype(np.float32) / 32768
    assert np.array_equal(read(range(3)).numpy(), wanted[:3])
    assert np.array_equal(read(range(4)).numpy(), wanted[[3, 4, 0, 1]])


def test_litdata_gives_the_clips_that_we_give(tmp_path):
    waves = list(np.random.default_rng(0).integers(-9000, 9000, (5, 800)).astype(np.int16))
    try:
        read = litdata_random(tmp_path, waves)
    except MissingPeerError as error:
        pytest.skip(str(error))
    assert np.array_equal(read([4, 0, 4]).numpy(), np.stack(waves)[[4, 0, 4]].astype(np.float32) / 32768)


def test_the_path_of_the_authors_resamples_and_joins(tmp_path):
    time_T = np.arange(44_100) / 44_100
    paths = []
    for number, hz in enumerate((440, 1000)):
        paths.append(tmp_path / f"{number}.wav")
        soundfile.write(paths[-1], 0.5 * np.sin(2 * np.pi * hz * time_T), 44_100, subtype="PCM_16")
    try:
        wave_BT = authors_path(paths, rate_hz=16_000, parts=2)([0, 1, 1, 0])
    except MissingPeerError as error:
        pytest.skip(str(error))
    assert wave_BT.shape == (2, 32_000)
    spectrum = np.abs(np.fft.rfft(wave_BT[:, :16_000].numpy()))
    assert spectrum.argmax(axis=1).tolist() == [440, 1000]


def test_peers_that_are_not_installed_say_how_to_get_them(tmp_path, monkeypatch):
    for name in ("webdataset", "litdata", "torchaudio.transforms"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPeerError, match=r"pip install -c constraints\.txt webdataset"):
        webdataset_stream(tmp_path, [], rate_hz=16_000, form="flac")
    with pytest.raises(MissingPeerError, match="--target peers-litdata"):
        litdata_random(tmp_path, [])
    with pytest.raises(MissingPeerError, match="ready-peers"):
        authors_path([], rate_hz=16_000)
