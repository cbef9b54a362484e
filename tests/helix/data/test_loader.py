"""Batches: a pure function of (seed, epoch, step), each clip once per epoch."""

import pickle

import numpy as np
import pytest
import torch

from helix.data.loader import Batches, in_order

ROWS = np.arange(0, 48, 2)


def same(one, other) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("wave_BT", "label_B", "clip_B"))


def clips(batches: Batches, epoch: int) -> list[int]:
    return [int(clip) for step in range(batches.steps_per_epoch) for clip in batches.batch(epoch, step).clip_B]


def test_a_batch_depends_on_nothing_but_seed_epoch_and_step(tones):
    batches = Batches(tones, ROWS, batch_size=5, seed=3)
    first = batches.batch(7, 2)
    for epoch, step in ((0, 0), (7, 3), (7, 1)):
        batches.batch(epoch, step)
    assert same(first, batches.batch(7, 2))
    assert same(first, Batches(tones, ROWS, batch_size=5, seed=3).batch(7, 2))
    assert same(first, pickle.loads(pickle.dumps(batches)).batch(7, 2))


def test_each_clip_comes_once_per_epoch(tones):
    batches = Batches(tones, ROWS, batch_size=6, seed=0)
    assert batches.steps_per_epoch == 4
    assert sorted(clips(batches, 0)) == sorted(clips(batches, 1)) == list(ROWS)


def test_what_fills_no_batch_is_dropped_and_another_part_each_epoch(tones):
    batches = Batches(tones, ROWS, batch_size=10, seed=0)
    assert batches.steps_per_epoch == 2
    epochs = [set(clips(batches, epoch)) for epoch in range(8)]
    assert all(len(seen) == 20 for seen in epochs) and set.union(*epochs) == set(ROWS)


def test_epochs_and_seeds_differ(tones):
    batches, other = (Batches(tones, ROWS, batch_size=6, seed=seed) for seed in (0, 1))
    assert clips(batches, 0) != clips(batches, 1)
    assert clips(batches, 0) != clips(other, 0)


def test_waves_are_the_prepared_samples_between_minus_one_and_one(tones):
    batch = Batches(tones, ROWS, batch_size=6, seed=0).batch(0, 0)
    assert batch.wave_BT.dtype == torch.float32 and batch.wave_BT.shape == (6, tones.clip_samples)
    assert batch.label_B.dtype == batch.clip_B.dtype == torch.int64
    for wave_T, label, clip in zip(batch.wave_BT, batch.label_B, batch.clip_B, strict=True):
        assert np.array_equal((wave_T * 32768).numpy(), tones.wave(int(clip)))
        assert label == tones.index.label[clip]
    assert batch.wave_BT.abs().max() <= 1


def test_in_order_gives_every_row_as_it_stands(tones):
    batches = list(in_order(tones, ROWS, batch_size=10))
    assert [len(batch.clip_B) for batch in batches] == [10, 10, 4]
    assert torch.cat([batch.clip_B for batch in batches]).tolist() == list(ROWS)
    assert list(in_order(tones, ROWS[:0], batch_size=10)) == []


def test_too_few_clips_for_a_batch_are_refused(tones):
    with pytest.raises(ValueError, match=r"24 training clips do not fill one batch of 25; lower training\.batch_size"):
        Batches(tones, ROWS, batch_size=25, seed=0)


def test_a_step_beyond_the_epoch_is_refused(tones):
    with pytest.raises(ValueError, match="step is 4; an epoch has the steps 0 to 3"):
        Batches(tones, ROWS, batch_size=6, seed=0).batch(0, 4)


def test_a_batch_of_nothing_is_refused(tones):
    with pytest.raises(ValueError, match="batch_size is 0; wanted 1 or more"):
        Batches(tones, ROWS, batch_size=0, seed=0)
