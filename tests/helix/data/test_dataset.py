"""What every registered data set keeps to, and how rows are split."""

import pickle
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helix.data.clips import Clips
from helix.data.dataset import Dataset, DatasetError, recordings_of, split_facts
from helix.data.datasets.tones import Tones
from helix.data.index import Index, Recording, listed_index
from helix.data.splits import _about, by_folds, by_speaker, halves, official
from helix.protocol import PROFILES, Protocol, profile
from helix.registry import DATASETS

#: The first rows that test for the seed 0: a change here would change everybody's split.
PINNED = [10, 16, 31, 34, 35, 38]


def index_of(
    *,
    fold: list[int],
    label: list[int] | None = None,
    group: list[str] | None = None,
    samples: list[int] | None = None,
    padded: list[int] | None = None,
) -> Index:
    """An index in which only what is given means anything."""
    listing = [
        Recording(
            recording_id=str(row),
            label=(label or [0] * len(fold))[row],
            path=None,
            fold=fold[row],
            speaker=None,
            group=group[row] if group else str(row),
        )
        for row in range(len(fold))
    ]
    lengths = {"samples": np.array(samples or [1] * len(fold)), "padded_samples": np.array(padded or [0] * len(fold))}
    return replace(listed_index(listing), **lengths)


def switched(**changes: str) -> Protocol:
    return replace(Protocol(), **changes)  # pyright: ignore


def test_a_data_set_says_what_it_is(small):
    dataset = small.dataset
    assert dataset.rate_hz == 16_000
    assert dataset.clip_samples > 0 and dataset.recording_samples > 0
    assert dataset.class_count > 1
    assert dataset.licence and dataset.url and dataset.authors_shift_s >= 0
    assert dataset.folds
    counts = (dataset.expected_cells, dataset.expected_per_fold, dataset.expected_per_class)
    totals = {sum(count.values()) for count in counts if count} | {dataset.expected_recordings} - {None}
    assert len(totals) <= 1, "its published counts disagree"
    assert all(download.url.startswith("https://") and download.name for download in dataset.downloads)


def test_its_options_are_plain_json(small):
    assert DATASETS.resolve(small.name, small.options) == DATASETS.resolve(
        small.name, DATASETS.resolve(small.name, small.options)
    )


def test_its_recordings_belong_to_a_data_set_that_reads_its_own(small):
    owner, options = recordings_of(small.name, small.options)
    assert recordings_of(owner, options) == (owner, options)


def test_recordings_are_sorted_unique_and_in_range(small):
    listing = small.dataset.listing(small.source)
    ids = [row.recording_id for row in listing.recordings]
    assert ids == sorted(set(ids))
    assert len(set(listing.classes)) == len(listing.classes) > 1
    assert all(0 <= row.label < len(listing.classes) for row in listing.recordings)
    assert all(row.group for row in listing.recordings)
    assert all((row.path is None) == (small.source is None) for row in listing.recordings)
    assert listing == small.dataset.listing(small.source)


def test_every_class_that_is_expected_in_a_fold_is_in_it(small):
    recordings = small.dataset.recordings(small.source)
    cells = {(row.fold, row.label) for row in recordings}
    present = {row.fold for row in recordings}
    assert {cell for cell in small.dataset.expected_cells if cell[0] in present} <= cells


def test_a_wave_is_mono_and_always_the_same(small):
    dataset = small.dataset
    for recording in dataset.recordings(small.source)[::37]:
        wave = dataset.wave(recording, small.source)
        assert wave.dtype == np.int16 and wave.ndim == 1 and len(wave) > 0
        assert np.array_equal(wave, dataset.wave(recording, small.source))


def test_preparing_twice_gives_the_same_bytes(small, small_recordings, tmp_path):
    again = small.prepare(type(small_recordings._storage)(tmp_path))
    assert again.manifest_sha256 == small_recordings.manifest_sha256
    assert list(again.index.crc32) == list(small_recordings.index.crc32)


def test_what_was_prepared_is_what_the_data_set_plays(small, small_recordings):
    listing = small.dataset.listing(small.source)
    recordings = listing.recordings
    assert small_recordings.classes == listing.classes
    assert [row.recording_id for row in recordings] == list(small_recordings.index.recording_id)
    for row in range(0, len(recordings), 41):
        assert np.array_equal(small_recordings.wave(row), small.dataset.wave(recordings[row], small.source))
        assert small_recordings.index.label[row] == recordings[row].label
        assert small_recordings.index.group[row] == recordings[row].group


@pytest.mark.parametrize("name", PROFILES)
def test_the_parts_of_a_split_are_disjoint(small, small_recordings, name):
    index, protocol = small_recordings.index, profile(name)
    present = set(index.fold.tolist())
    for fold in small.dataset.folds:
        if small.dataset.fold_column and fold not in present:
            continue
        rows = small.dataset.split(index, fold=fold, protocol=protocol)
        together = np.concatenate([rows.train, rows.validation, rows.test])
        assert len(set(together.tolist())) == len(together) <= len(index)
        assert len(rows.train) and len(rows.test)
        assert (len(rows.validation) == 0) == (protocol.validation == "test_halves")
        assert all(np.array_equal(part, np.sort(part)) for part in (rows.train, rows.validation, rows.test))


def test_a_split_knows_names_and_not_the_order_of_rows(small, small_recordings):
    index, protocol = small_recordings.index, profile("fair")
    order = np.random.default_rng(0).permutation(len(index))
    shuffled = Index(**{field.name: getattr(index, field.name)[order] for field in fields(Index)})
    fold = small.dataset.folds[0]
    one, other = (small.dataset.split(rows, fold=fold, protocol=protocol) for rows in (index, shuffled))
    for part in ("train", "validation", "test"):
        assert set(index.recording_id[getattr(one, part)]) == set(shuffled.recording_id[getattr(other, part)])


@pytest.mark.parametrize("name", PROFILES)
def test_clips_are_made_of_their_own_rows_and_labels(small, small_recordings, name):
    index, protocol = small_recordings.index, profile(name)
    split = small.dataset.split(index, fold=small.dataset.folds[0], protocol=protocol)
    for rows, epoch in ((split.train, 0), (split.train, 1), (split.test, None)):
        clips = small.dataset.clips(index, rows, protocol=protocol, seed=3, epoch=epoch)
        assert len(set(clips.clip.tolist())) == len(clips) > 0
        assert clips.clip_samples == small.dataset.clip_samples
        assert set(clips.row.tolist()) <= set(rows.tolist())
        assert set(clips.label.tolist()) <= set(index.label[rows].tolist())
        assert (clips.start >= 0).all() and (clips.start + clips.samples <= index.samples[clips.row]).all()
        assert (clips.place >= 0).all() and (clips.place + clips.samples <= clips.clip_samples).all()
        assert clips.clip_samples % clips.parts == 0
        again = small.dataset.clips(index, rows, protocol=protocol, seed=3, epoch=epoch)
        assert all(np.array_equal(getattr(clips, field.name), getattr(again, field.name)) for field in fields(Clips))


def test_evaluation_hears_the_same_clips_whatever_the_seed(small, small_recordings):
    index, protocol = small_recordings.index, profile("fair")
    rows = small.dataset.split(index, fold=small.dataset.folds[0], protocol=protocol).test
    one, other = (small.dataset.clips(index, rows, protocol=protocol, seed=seed, epoch=None) for seed in (0, 1))
    assert np.array_equal(one.row, other.row) and np.array_equal(one.place, other.place)


def test_a_split_is_told_in_numbers(small, small_recordings):
    index, protocol = small_recordings.index, profile("fair")
    classes = len(small_recordings.classes)
    fold = small.dataset.folds[0]
    facts = split_facts(small.dataset, index, classes=classes, fold=fold, protocol=protocol)
    split = small.dataset.split(index, fold=fold, protocol=protocol)
    for name, told in facts.items():
        rows = getattr(split, name)
        assert told.recordings == len(rows) and told.clips == sum(told.clips_per_class)
        assert len(told.clips_per_class) == classes and 0 <= told.silence < 1
        assert told.speakers == len({one for one in index.speaker[rows] if one is not None})
        assert str(told).startswith(f"{told.clips} clips of {told.recordings} recordings")


def test_the_halves_of_a_test_set_share_no_group_and_balance_every_class(small, small_recordings):
    index, protocol = small_recordings.index, profile("paper")
    rows = small.dataset.split(index, fold=small.dataset.folds[0], protocol=protocol).test
    clips = small.dataset.clips(index, rows, protocol=protocol, seed=0, epoch=None)
    selects = halves(clips.label, clips.group)
    assert not set(clips.group[selects]) & set(clips.group[~selects])
    assert 0.4 <= selects.mean() <= 0.6


def test_a_class_that_does_not_say_what_it_is_cannot_be_registered():
    with pytest.raises(ValueError, match="data set class Nameless does not say its url, authors_shift_s"):

        @DATASETS.register("nameless")
        class Nameless(Dataset):
            licence = "CC0-1.0"
            needs_source = False

    assert "nameless" not in DATASETS.names()


def test_the_next_fold_that_is_present_validates():
    index = index_of(fold=[1, 3, 4, 1, 3, 4])
    validating = {
        fold: set(index.fold[by_folds(index, fold=fold, validation="held_out").validation]) for fold in (1, 3, 4)
    }
    assert validating == {1: {3}, 3: {4}, 4: {1}}


def test_by_folds_nothing_is_left_out():
    index = index_of(fold=[1, 3, 4, 1, 3, 4])
    for validation in ("test_halves", "held_out"):
        rows = by_folds(index, fold=3, validation=validation)
        assert sorted([*rows.train, *rows.validation, *rows.test]) == list(range(6))
        assert set(index.fold[rows.test]) == {3}


def test_a_fold_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match="fold 4 is not among the prepared recordings; present: 1, 2"):
        Tones().split(index_of(fold=[1, 2]), fold=4, protocol=Protocol())


def test_a_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="leaves no fold to train on; present: 1, 2; prepare more folds"):
        Tones().split(index_of(fold=[1, 2]), fold=1, protocol=switched(validation="held_out"))


def test_an_unknown_validation_is_named():
    with pytest.raises(ValueError, match="validation is 'train'; wanted test_halves or held_out"):
        Tones().split(index_of(fold=[1, 2]), fold=1, protocol=switched(validation="train"))


def test_an_official_split_uses_its_validation_part_only_where_it_is_asked_to():
    index = index_of(fold=[3, 1, 2, 3])
    unused, used = (official(index, fold=1, validation=how) for how in ("test_halves", "held_out"))
    assert (list(unused.train), list(unused.validation), list(unused.test)) == ([0, 3], [], [1])
    assert (list(used.train), list(used.validation), list(used.test)) == ([0, 3], [2], [1])
    with pytest.raises(ValueError, match="fold 2 is not there; an official split is fold 1 and no other"):
        official(index, fold=2, validation="held_out")
    with pytest.raises(ValueError, match="no prepared recording is in the official part validation"):
        official(index_of(fold=[3, 1]), fold=1, validation="held_out")


def speech(sessions: dict[int, list[int]]) -> Index:
    """An index of speakers whose sessions hold so many utterances each."""
    rows = [
        (label, f"{label}-{n}")
        for label, sizes in sessions.items()
        for n, size in enumerate(sizes)
        for _ in range(size)
    ]
    return index_of(fold=[-1] * len(rows), label=[label for label, _ in rows], group=[group for _, group in rows])


def test_a_fifth_of_every_speaker_tests():
    index = speech({0: [50, 50], 1: [5], 2: [2], 3: [1]})
    rows = by_speaker(index, fold=1, seed=0, protocol=switched(speaker_split="utterance"))
    assert np.bincount(index.label[rows.test], minlength=4).tolist() == [20, 1, 1, 0]
    assert np.bincount(index.label[rows.train], minlength=4).tolist() == [80, 4, 1, 1]
    rows = by_speaker(index, fold=1, seed=0, protocol=switched(speaker_split="utterance", validation="held_out"))
    assert np.bincount(index.label[rows.test], minlength=4).tolist() == [20, 1, 1, 0]
    assert np.bincount(index.label[rows.validation], minlength=4).tolist() == [20, 1, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=6), st.integers(0, 9))
def test_no_session_stands_on_two_sides_and_every_speaker_is_trained_on(sizes, seed):
    index = speech({7: [1, 1], **dict(enumerate(sizes[:6]))})
    protocol = switched(speaker_split="session", validation="held_out")
    rows = by_speaker(index, fold=1, seed=seed, protocol=protocol)
    sides = [set(index.group[part]) for part in (rows.train, rows.validation, rows.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == len(set(index.group))
    assert set(index.label[rows.train]) == set(index.label)
    several = {label for label in index.label.tolist() if len(set(index.group[index.label == label])) > 1}
    assert set(index.label[rows.test].tolist()) == several


def test_one_seed_is_one_split_and_another_is_another():
    index = speech({0: [100]})
    tested = [
        by_speaker(index, fold=1, seed=seed, protocol=switched(speaker_split="utterance")).test for seed in (0, 0, 1)
    ]
    assert np.array_equal(tested[0], tested[1]) and not np.array_equal(tested[0], tested[2])
    assert tested[0][:6].tolist() == PINNED


@pytest.mark.parametrize(
    ("sizes", "taken"), [([1], []), ([1, 1], ["0"]), ([1, 1, 1], ["0", "1"]), ([5, 1, 1], ["0", "1"])]
)
def test_the_last_session_of_a_speaker_is_never_taken_from_training(sizes, taken):
    named = {str(number): size for number, size in enumerate(sizes)}
    assert _about(list(named), named, goal=sum(sizes)) == taken


def test_a_speaker_with_one_session_alone_cannot_be_tested_on():
    with pytest.raises(ValueError, match=r"no speaker has two sessions.*set protocol\.speaker_split=utterance"):
        by_speaker(speech({0: [9], 1: [9]}), fold=1, seed=0, protocol=switched(speaker_split="session"))
    with pytest.raises(ValueError, match="fold 2 is not there; a split within speakers is fold 1"):
        by_speaker(speech({0: [9]}), fold=2, seed=0, protocol=Protocol())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3)), min_size=1, max_size=60), st.randoms())
def test_halves_never_split_a_group_whatever_the_order_of_rows(rows, shuffle):
    index = index_of(fold=[1] * len(rows), group=[str(group) for group, _ in rows], label=[label for _, label in rows])
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    straight, shuffled = halves(index.label, index.group), halves(index.label[order], index.group[order])
    assert np.array_equal(straight[order], shuffled)
    sides = {group: {bool(straight[row]) for row in range(len(rows)) if rows[row][0] == group} for group, _ in rows}
    assert all(len(side) == 1 for side in sides.values())
    largest = max(Counter(group for group, _ in rows).values())
    assert abs(2 * int(straight.sum()) - len(rows)) <= 4 * largest


def test_an_error_tells_twenty_problems_and_counts_the_rest():
    error = DatasetError("esc50 from here:", [f"problem {number}" for number in range(23)])
    assert str(error).splitlines()[-2:] == ["  problem 19", "  +3 more"]
    assert "more" not in str(DatasetError("x:", ["one"]))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.problems == error.problems


def test_made_up_sounds_take_no_source(tmp_path):
    with pytest.raises(DatasetError, match=r"tones are made up and read no files; given .*, leave it out"):
        Tones().recordings(tmp_path)
