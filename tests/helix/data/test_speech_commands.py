"""Speech Commands and its concatenation: official lists, refused formats, shared shards, real words."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from helix.data.audio import AudioError
from helix.data.dataset import DatasetError
from helix.data.datasets.concat_speech_commands import ConcatSpeechCommands
from helix.data.datasets.speech_commands import PER_PART, PER_WORD, WORDS, SpeechCommands
from helix.data.loader import Batches, in_order
from helix.data.shards import find, open_prepared, prepare
from helix.protocol import Protocol, profile

COMMANDS = SpeechCommands()


def problems(source: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        COMMANDS.recordings(source)
    return "\n".join(caught.value.problems)


def test_the_published_counts_agree():
    assert len(WORDS) == 35
    assert sum(PER_WORD.values()) == sum(PER_PART.values()) == COMMANDS.expected_recordings == 105_829


def test_the_complete_set_lacks_nothing(layouts, tmp_path):
    left = dict(PER_PART)

    def per_part(word: str, part: str) -> int:
        share = PER_PART[part] * PER_WORD[word] // 105_829
        if word == WORDS[-1]:
            share = left[part]
        elif part == "train":
            share = PER_WORD[word] - sum(PER_PART[one] * PER_WORD[word] // 105_829 for one in ("validation", "test"))
        left[part] -= share
        return share

    source = layouts.speech_commands(tmp_path / "sc", per_part=per_part, make=layouts.touch)
    listing = COMMANDS.listing(source)
    cells = [(row.fold, row.label) for row in listing.recordings]
    assert len(cells) == 105_829
    assert COMMANDS.shortfall(cells, listing.classes) == []
    lacking = COMMANDS.shortfall(cells[1:], listing.classes)
    assert len(lacking) == 2 and lacking[1] == "backward: 1663 recordings of 1664"


def test_the_lists_are_the_split_and_keep_speakers_together(layouts, tmp_path, storage):
    source = layouts.speech_commands(tmp_path / "sc")
    index = open_prepared(
        storage, prepare("speech_commands", source=source, storage=storage, allow_partial=True).prefix
    ).index
    split = COMMANDS.split(index, fold=1, protocol=profile("fair"))
    listed = {
        part: {line.removesuffix(".wav") for line in (source / f"{name}_list.txt").read_text().split()}
        for part, name in (("test", "testing"), ("validation", "validation"))
    }
    assert {*index.recording_id[split.test]} == listed["test"]
    assert {*index.recording_id[split.validation]} == listed["validation"]
    assert len(split.train) + len(split.test) + len(split.validation) == len(index)
    speakers = [set(index.speaker[rows]) for rows in (split.train, split.validation, split.test)]
    assert sum(map(len, speakers)) == len(set.union(*speakers))


def test_noise_is_no_word_and_a_foreign_folder_has_to_be_allowed(layouts, tmp_path):
    source = layouts.speech_commands(tmp_path / "sc", words=["bed", "cat"])
    layouts.sound(source / "alexa" / "00000000_nohash_0.wav", 100)
    with (source / "testing_list.txt").open("a") as file:
        file.write("alexa/00000000_nohash_0.wav\n")
    assert problems(source) == "alexa: the folder alexa is none of the 35 words"
    listing = COMMANDS.listing(source, allow_missing=True)
    assert {row.label for row in listing.recordings} == {WORDS.index("bed"), WORDS.index("cat")}
    assert listing.classes == WORDS, "a part of the words has the classes of the whole"


def test_everything_that_is_wrong_is_told_at_once(layouts, tmp_path):
    source = layouts.speech_commands(tmp_path / "sc", words=["bed", "cat"])
    with (source / "testing_list.txt").open("a") as file:
        file.write("bed/ffffffff_nohash_0.wav\nbed/one.wav\ncat/" + "10000000_nohash_0.wav\n")
    layouts.sound(source / "cat" / "zz.wav", 10)
    told = problems(source)
    for part in (
        "bed/ffffffff_nohash_0: bed/ffffffff_nohash_0.wav is listed to be for test and not there",
        "'bed/one.wav'; wanted WORD/SPEAKER_nohash_TAKE.wav",
        "cat/10000000_nohash_0.wav is already listed to be for validation",
        "cat/zz.wav: wanted a name SPEAKER_nohash_TAKE.wav",
    ):
        assert part in told
    (source / "validation_list.txt").unlink()
    assert "validation_list.txt is not there, so nobody can tell what may be trained on" in problems(source)


def test_another_rate_or_two_channels_are_refused_by_name(layouts, tmp_path, storage):
    source = layouts.speech_commands(tmp_path / "sc", words=["bed"])
    layouts.sound(source / "bed" / "00000000_nohash_0.wav", 100, rate_hz=8_000)
    layouts.sound(source / "bed" / "00000001_nohash_0.wav", 100, channels=2)
    for recording, message in zip(
        COMMANDS.recordings(source), ("has a rate of 8000 Hz; wanted 16000", "has 2 channels; wanted 1"), strict=False
    ):
        with pytest.raises(AudioError, match=message):
            COMMANDS.wave(recording, source)
    manifest = prepare("speech_commands", source=source, storage=storage, allow_partial=True, quarantine=2).manifest
    assert len(manifest["quarantined"]) == 2
    assert all("wanted" in left_out["reason"] for left_out in manifest["quarantined"].values())


def test_concatenations_read_the_recordings_of_the_words_and_store_nothing(layouts, tmp_path, storage):
    source = layouts.speech_commands(tmp_path / "sc")
    words = prepare("speech_commands", source=source, storage=storage, allow_partial=True)
    before = sorted(storage.keys("data"))
    for options in ({}, {"n": 3}, {"n": 4, "position": 2}):
        same = prepare("concat_speech_commands", options, source=source, storage=storage, allow_partial=True)
        assert same.prefix == words.prefix and same.manifest_sha256 == words.manifest_sha256
        assert [one.prefix for one in find(storage, "concat_speech_commands", options)] == [words.prefix]
    assert sorted(storage.keys("data")) == before


def test_a_concatenation_sounds_like_its_words_at_their_places(layouts, tmp_path, storage):
    source = layouts.speech_commands(tmp_path / "sc")
    recordings = open_prepared(
        storage, prepare("speech_commands", source=source, storage=storage, allow_partial=True).prefix
    )
    dataset, protocol = ConcatSpeechCommands(n=4, position=2), Protocol()
    split = dataset.split(recordings.index, fold=1, protocol=protocol)
    batch = Batches(recordings, dataset, split.train, batch_size=5, seed=0, protocol=protocol).batch(3, 1)
    assert batch.wave_BT.shape == (5, 64_000) and batch.parts == 4
    for wave_T, row in zip(batch.wave_BT, batch.clip_B.tolist(), strict=True):
        word = recordings.wave(row)[:16_000]
        heard = (wave_T[32_000:48_000] * 32768).numpy()
        assert np.array_equal(heard[: len(word)], word) and not heard[len(word) :].any()
    tested = dataset.clips(recordings.index, split.test, protocol=protocol, seed=5, epoch=None)
    for one, other in zip(
        in_order(recordings, tested, batch_size=8), in_order(recordings, tested, batch_size=8), strict=True
    ):
        assert torch.equal(one.wave_BT, other.wave_BT)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n": 0}, "n is 0; wanted 1 or more"), ({"n": 3, "position": 3}, "position is 3; wanted 0 to 2, as n is 3")],
)
def test_a_concatenation_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConcatSpeechCommands(**options)


def test_real_words_keep_the_official_split(real_folder, storage):
    source = real_folder("speech_commands", "speech_commands_v0.02-mini")
    recordings = open_prepared(
        storage, prepare("concat_speech_commands", source=source, storage=storage, allow_partial=True).prefix
    )
    assert len(recordings) == 1_200 and recordings.manifest["dataset"] == "speech_commands"
    assert Counter(recordings.index.label.tolist()) == {WORDS.index(word): 400 for word in ("bed", "cat", "happy")}
    assert set(recordings.manifest["missing"]) == {"alexa", "computer", "jarvis"}
    assert recordings.index.samples.max() <= 16_000
    split = COMMANDS.split(recordings.index, fold=1, protocol=profile("fair"))
    assert [len(rows) for rows in (split.train, split.validation, split.test)] == [968, 123, 109]
    speakers = [set(recordings.index.speaker[rows]) for rows in (split.train, split.validation, split.test)]
    assert sum(map(len, speakers)) == len(set.union(*speakers))


def test_a_list_with_bytes_that_are_no_text_is_named_with_its_lines(layouts, tmp_path):
    source = layouts.speech_commands(tmp_path / "sc", words=["bed"])
    for name in ("testing_list.txt", "validation_list.txt"):
        (source / name).write_bytes((source / name).read_bytes() + b"bed/\xff\n\0\n")
    told = problems(source)
    for name in ("testing_list.txt", "validation_list.txt"):
        assert f"{name} line 3: has bytes that are no UTF-8" in told and f"{name} line 4: has a NUL byte" in told
    (source / "validation_list.txt").unlink()
    (source / "validation_list.txt").mkdir()
    assert "validation_list.txt: cannot be read: Is a directory" in problems(source)
