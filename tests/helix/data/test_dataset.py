"""What every registered data set keeps to, and how rows are split."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helix.data.dataset import DatasetError, Index, halves
from helix.data.datasets.tones import Tones
from helix.registry import DATASETS


def index_of(*, fold: list[int], label: list[int] | None = None, group: list[str] | None = None) -> Index:
    """An index in which only folds, labels and groups mean anything."""
    count = len(fold)
    nothing = np.zeros(count, np.int64)
    return Index(
        recording_id=np.arange(count).astype(str).astype(object),
        shard=nothing,
        offset=nothing,
        samples=nothing,
        label=np.array(label or [0] * count, np.int64),
        speaker=np.full(count, None, object),
        fold=np.array(fold, np.int64),
        group=np.array(group or [str(row) for row in range(count)], object),
        crc32=nothing,
        source_sha256=np.full(count, None, object),
        padded_samples=nothing,
    )


def test_a_data_set_says_what_it_is(small):
    dataset = small.dataset
    assert dataset.rate_hz == 16_000
    assert dataset.clip_samples > 0
    assert len(set(dataset.classes)) == len(dataset.classes) > 1
    assert dataset.licence and dataset.url and dataset.authors_shift_s >= 0
    assert dataset.expected_recordings == sum(dataset.expected_cells.values()) > 0
    assert set(dataset.expected_cells) == {(f, c) for f in dataset.folds for c in range(len(dataset.classes))}


def test_its_options_are_plain_json(small):
    assert DATASETS.resolve(small.name, small.options) == DATASETS.resolve(
        small.name, DATASETS.resolve(small.name, small.options)
    )


def test_recordings_are_sorted_unique_and_in_range(small):
    recordings = small.dataset.recordings(small.source)
    ids = [row.recording_id for row in recordings]
    assert ids == sorted(set(ids))
    assert all(0 <= row.label < len(small.dataset.classes) for row in recordings)
    assert all(row.group for row in recordings)
    assert all((row.path is None) == (small.source is None) for row in recordings)
    assert recordings == small.dataset.recordings(small.source)


def test_every_class_is_in_every_fold(small):
    recordings = small.dataset.recordings(small.source)
    cells = {(row.fold, row.label) for row in recordings}
    present = {row.fold for row in recordings}
    assert cells == {(fold, label) for fold in present for label in range(len(small.dataset.classes))}


def test_a_wave_is_one_clip_and_always_the_same(small):
    dataset = small.dataset
    for recording in dataset.recordings(small.source)[::37]:
        wave = dataset.wave(recording, small.source)
        assert wave.dtype == np.int16 and wave.shape == (dataset.clip_samples,)
        assert np.array_equal(wave, dataset.wave(recording, small.source))


def test_preparing_twice_gives_the_same_bytes(small, small_recordings, tmp_path):
    again = small.prepare(type(small_recordings._storage)(tmp_path))
    assert again.manifest_sha256 == small_recordings.manifest_sha256
    assert list(again.index.crc32) == list(small_recordings.index.crc32)


def test_what_was_prepared_is_what_the_data_set_plays(small, small_recordings):
    recordings = small.dataset.recordings(small.source)
    assert [row.recording_id for row in recordings] == list(small_recordings.index.recording_id)
    for row in range(0, len(recordings), 41):
        assert np.array_equal(small_recordings.wave(row), small.dataset.wave(recordings[row], small.source))
        assert small_recordings.index.label[row] == recordings[row].label
        assert small_recordings.index.group[row] == recordings[row].group


@pytest.mark.parametrize("validation", ["test_halves", "held_out"])
def test_splits_are_disjoint_and_leave_nothing_out(small, small_recordings, validation):
    index = small_recordings.index
    for fold in np.unique(index.fold):
        rows = small.dataset.split(index, fold=int(fold), validation=validation)
        together = np.concatenate([rows.train, rows.validation, rows.test])
        assert sorted(together) == list(range(len(index)))
        assert set(index.fold[rows.test]) == {fold}
        assert fold not in index.fold[rows.train]
        assert not set(index.fold[rows.validation]) & set(index.fold[rows.train])
        assert (len(rows.validation) == 0) == (validation == "test_halves")


def test_the_halves_of_a_test_set_share_no_group_and_balance_every_class(small, small_recordings):
    index = small_recordings.index
    for fold in np.unique(index.fold):
        rows = np.flatnonzero(index.fold == fold)
        selects = halves(index, rows)
        assert not set(index.group[rows[selects]]) & set(index.group[rows[~selects]])
        assert 0.4 <= selects.mean() <= 0.6


def test_the_next_fold_that_is_present_validates():
    index = index_of(fold=[1, 3, 4, 1, 3, 4])
    validating = {
        fold: set(index.fold[Tones().split(index, fold=fold, validation="held_out").validation]) for fold in (1, 3, 4)
    }
    assert validating == {1: {3}, 3: {4}, 4: {1}}


def test_a_fold_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match="fold 4 is not among the prepared recordings; present: 1, 2"):
        Tones().split(index_of(fold=[1, 2]), fold=4, validation="test_halves")


def test_a_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="leaves no fold to train on; present: 1, 2; prepare more folds"):
        Tones().split(index_of(fold=[1, 2]), fold=1, validation="held_out")


def test_an_unknown_validation_is_named():
    with pytest.raises(ValueError, match="validation is 'train'; wanted test_halves or held_out"):
        Tones().split(index_of(fold=[1, 2]), fold=1, validation="train")  # pyright: ignore


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3)), min_size=1, max_size=60), st.randoms())
def test_halves_never_split_a_group_whatever_the_order_of_rows(rows, shuffle):
    index = index_of(fold=[1] * len(rows), group=[str(group) for group, _ in rows], label=[label for _, label in rows])
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    straight, shuffled = halves(index, np.arange(len(rows))), halves(index, np.array(order))
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
