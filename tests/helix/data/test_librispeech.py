"""LibriSpeech: readers from SPEAKERS.TXT, splits by hash, 300 s stitched from real speech."""

from pathlib import Path

import numpy as np
import pytest

from helix.data.audio import AudioError
from helix.data.dataset import DatasetError
from helix.data.datasets.librispeech import SPEAKERS, TABLE, UTTERANCES, LibriSpeech
from helix.data.loader import Host, in_order
from helix.data.shards import open_prepared, prepare
from helix.protocol import profile

SPEECH = LibriSpeech()


def problems(source: Path, dataset: LibriSpeech = SPEECH) -> str:
    with pytest.raises(DatasetError) as caught:
        dataset.recordings(source)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize("subset", SPEAKERS)
def test_the_complete_set_lacks_nothing(layouts, tmp_path, subset):
    dataset = LibriSpeech(subset=subset)
    readers, wanted = SPEAKERS[subset], UTTERANCES[subset]
    source = layouts.librispeech(
        tmp_path / "LibriSpeech", subset=subset, speakers=readers, chapters=1, utterances=wanted // readers,
        make=layouts.touch,
    )  # fmt: skip
    extra = next((source / subset).glob("*/*"))
    speaker, chapter = extra.parent.name, extra.name
    for number in range(wanted % readers):
        (extra / f"{speaker}-{chapter}-{5000 + number:04d}.flac").touch()
    (extra / f"{speaker}-{chapter}.trans.txt").unlink()
    listing = dataset.listing(tmp_path)
    assert len(listing.recordings) == wanted and len(listing.classes) == readers == dataset.class_count
    cells = [(row.fold, row.label) for row in listing.recordings]
    assert dataset.shortfall(cells, listing.classes) == []
    assert dataset.shortfall(cells[1:], listing.classes) == [f"{wanted - 1} recordings of {wanted}"]
    assert dataset.shortfall(cells, listing.classes[1:]) == [f"{readers - 1} classes; wanted {readers}"]


def test_a_part_of_the_audio_has_the_classes_of_the_whole_by_number(layouts, tmp_path):
    listing = SPEECH.listing(layouts.librispeech(tmp_path / "LibriSpeech", speakers=2))
    assert len(listing.classes) == 251 and list(listing.classes) == sorted(listing.classes, key=int)
    assert {row.label for row in listing.recordings} == {0, 1}
    assert {row.speaker for row in listing.recordings} == set(listing.classes[:2])


def test_settings_that_decide_no_recording_share_the_shards(layouts, tmp_path, storage):
    source = layouts.librispeech(tmp_path / "LibriSpeech")
    prefixes = {
        prepare("librispeech", options, source=source, storage=storage, allow_partial=True).prefix
        for options in ({}, {"clip_s": 300}, {"split_seed": 7}, {"clip_s": 10, "split_seed": 1})
    }
    assert len(prefixes) == 1


def test_utterances_that_are_listed_and_absent_are_missing_and_others_are_wrong(layouts, tmp_path):
    source = layouts.librispeech(tmp_path / "LibriSpeech", speakers=1)
    first, *_ = sorted((source / "train-clean-100").glob("*/*/*.flac"))
    first.unlink()
    layouts.touch(first.with_name("14-100-0099.flac"), 0)
    layouts.touch(source / "train-clean-100" / "9999" / "1" / "9999-1-0000.flac", 0)
    layouts.touch(source / "train-clean-100" / "14" / "101" / "x.flac", 0)
    (source / "train-clean-100" / "14" / "101" / "14-101.trans.txt").unlink()
    with (source / TABLE).open("a") as file:
        file.write("14 | F | train-clean-100 | 25 | Twice\nnonsense\n")
    told = problems(source)
    for part in (
        "14-100-0000: 14/100/14-100-0000.flac is not there and 14-100.trans.txt lists it",
        "14-100-0099.flac: 14-100.trans.txt does not list it",
        "train-clean-100/9999: SPEAKERS.TXT names no such reader in this subset",
        "train-clean-100/14/101/x.flac: wanted a name 14-101-NUMBER.flac",
        "SPEAKERS.TXT: reader 14 stands 2 times",
        "'nonsense'; wanted ID | SEX | SUBSET | MINUTES | NAME",
    ):
        assert part in told
    assert "train-clean-360: there is no SPEAKER/CHAPTER folder in it" in problems(
        source, LibriSpeech(subset="train-clean-360")
    )


def test_what_is_downloaded_is_the_subset_that_was_asked_for():
    for subset in SPEAKERS:
        (download,) = LibriSpeech(subset=subset).downloads
        assert download.name == f"{subset}.tar.gz" and download.url.endswith(f"/{download.name}")


def test_another_rate_is_refused_by_name(layouts, tmp_path):
    source = layouts.librispeech(tmp_path / "LibriSpeech", speakers=1)
    recording = SPEECH.recordings(source)[0]
    layouts.sound(source / str(recording.path), 100, rate_hz=8_000)
    with pytest.raises(AudioError, match=r"0000\.flac: has a rate of 8000 Hz; wanted 16000"):
        SPEECH.wave(recording, source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset": "dev-clean"}, "subset is 'dev-clean'; wanted train-clean-100 or train-clean-360"),
        ({"clip_s": 0}, "clip_s is 0; wanted 1 second or more"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LibriSpeech(**options)


def test_a_split_by_chapter_leaks_none_and_one_by_utterance_does(layouts, tmp_path, storage):
    source = layouts.librispeech(tmp_path / "LibriSpeech", utterances=8)
    index = open_prepared(
        storage, prepare("librispeech", source=source, storage=storage, allow_partial=True).prefix
    ).index
    for name, leaks in (("authors", True), ("paper", True), ("fair", False)):
        split = SPEECH.split(index, fold=1, protocol=profile(name))
        assert bool(set(index.group[split.train]) & set(index.group[split.test])) == leaks


def test_300_seconds_are_stitched_from_real_speech(real_folder, storage):
    source = real_folder("librispeech", "librispeech-mini")
    dataset, protocol = LibriSpeech(clip_s=300), profile("paper")
    recordings = open_prepared(
        storage, prepare("librispeech", {"clip_s": 300}, source=source, storage=storage, allow_partial=True).prefix
    )
    index = recordings.index
    assert len(index) == 129 and len(recordings.classes) == 251
    assert [recordings.classes[label] for label in sorted(set(index.label.tolist()))] == ["19", "26", "27"]
    rows = np.arange(len(index))
    clips = dataset.clips(index, rows, protocol=protocol, seed=0, epoch=4)
    assert len(clips) == 3 and clips.clip_samples == 4_800_000 and clips.silence == pytest.approx(0, abs=0.001)
    for number, batch in enumerate(in_order(recordings, clips, batch_size=1)):
        assert batch.wave_BT.shape == (1, 4_800_000)
        at = 0
        for piece in range(clips.first_piece[number], clips.first_piece[number + 1]):
            heard = recordings.wave(int(clips.row[piece]))[: clips.samples[piece]]
            place = int(clips.place[piece])
            assert place == at
            assert np.array_equal((batch.wave_BT[0, at : at + len(heard)] * 32768).numpy(), heard)
            at += len(heard)
        assert at == 4_800_000
        assert {index.speaker[row] for row in clips.row[clips.first_piece[number] : clips.first_piece[number + 1]]} == {
            recordings.classes[batch.label_B[0]]
        }


def test_real_speech_splits_within_every_speaker(real_folder, storage):
    source = real_folder("librispeech", "librispeech-mini")
    recordings = open_prepared(
        storage, prepare("librispeech", source=source, storage=storage, allow_partial=True).prefix
    )
    split = SPEECH.split(recordings.index, fold=1, protocol=profile("paper"))
    shares = np.bincount(recordings.index.label[split.test]) / np.maximum(np.bincount(recordings.index.label), 1)
    assert all(abs(share - 0.2) < 0.03 for share in shares[shares > 0])
    clips = SPEECH.clips(recordings.index, split.train, protocol=profile("fair"), seed=0, epoch=0)
    batch = Host(recordings=recordings).gather(clips.take(np.arange(2)))
    assert batch.wave_BT.shape == (2, 480_000) and batch.wave_BT.abs().max() > 0.05
    with pytest.raises(ValueError, match="no speaker has two sessions"):
        SPEECH.split(recordings.index, fold=1, protocol=profile("fair"))


def test_lists_with_bytes_that_are_no_text_are_named_with_file_and_line_all_at_once(layouts, tmp_path):
    source = layouts.librispeech(tmp_path / "LibriSpeech", speakers=2)
    for chapter in ("14/100/14-100", "17/101/17-101"):
        path = source / "train-clean-100" / f"{chapter}.trans.txt"
        path.write_bytes(path.read_bytes().replace(b"0001 WORDS", b"0001 W\xffRDS"))
    path = source / "train-clean-100" / "14" / "101" / "14-101.trans.txt"
    path.write_text(path.read_text() * 2 + "somebody\n")
    (source / TABLE).write_bytes((source / TABLE).read_bytes() + b"\xfe\n")
    told = problems(source)
    for part in (
        r"train-clean-100/14/100/14-100.trans.txt line 2: has bytes that are no UTF-8 (b'\xff')",
        r"train-clean-100/17/101/17-101.trans.txt line 2: has bytes that are no UTF-8 (b'\xff')",
        "14-101-0000: stands 2 times in 14-101.trans.txt",
        "14-101.trans.txt: 'somebody': wanted a name 14-101-NUMBER.flac",
        "SPEAKERS.TXT line 255: has bytes that are no UTF-8",
    ):
        assert part in told
