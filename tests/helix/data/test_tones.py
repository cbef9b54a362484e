"""Tones: order is the only difference between the two classes of a triple, and no bag of tokens can hear it."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from helix.data.datasets.tones import (
    BURST_SAMPLES,
    CLIP_SAMPLES,
    JITTER_SAMPLES,
    NOISE,
    ORDERS,
    ROW_HZ,
    SLOT_SAMPLES,
    SLOTS,
    TOKEN_SAMPLES,
    TRIPLES,
    Score,
    Tones,
    mirrored,
    render,
)
from helix.registry import DATASETS

RATE_HZ = Tones.rate_hz
FFT_SAMPLES, HOP_SAMPLES, MELS, PATCH = 1024, 512, 128, 16
DATA = Tones(clips_per_class=40)
RECORDINGS = DATA.recordings(None)
SCORES = [DATA.score(recording) for recording in RECORDINGS]


def raw_tokens(wave: np.ndarray) -> np.ndarray:
    """[tokens, 160], whole tokens only."""
    return wave[: len(wave) // TOKEN_SAMPLES * TOKEN_SAMPLES].reshape(-1, TOKEN_SAMPLES)


def as_multiset(tokens: np.ndarray) -> np.ndarray:
    return tokens[np.lexsort(tokens.T)]


def mel_patches(wave: np.ndarray) -> np.ndarray:
    """[rows, columns, 16, 16] of mel power: an STFT with a Hann window of 64 ms, 128 HTK mel bins, patches of 16 x 16.

    The first frame, the only one in a whole patch whose window reaches over an end of the clip, is left silent.
    """
    padded = np.pad(wave, FFT_SAMPLES // 2, mode="reflect")
    frames = sliding_window_view(padded, FFT_SAMPLES)[::HOP_SAMPLES] * np.hanning(FFT_SAMPLES + 1)[:-1]
    frames[0] = 0
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges_hz = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE_HZ / 2 / 700), MELS + 2) / 2595) - 1)
    bins_hz = np.linspace(0, RATE_HZ / 2, FFT_SAMPLES // 2 + 1)[:, None]
    rising = (bins_hz - edges_hz[:-2]) / np.diff(edges_hz)[:-1]
    falling = (edges_hz[2:] - bins_hz) / np.diff(edges_hz)[1:]
    mel = (power @ np.maximum(0, np.minimum(rising, falling))).T
    columns = mel.shape[1] // PATCH
    patches = mel[:, : columns * PATCH].reshape(MELS // PATCH, PATCH, columns, PATCH)
    return patches.transpose(0, 2, 1, 3)


def heard(wave: np.ndarray) -> str:
    """The class of a clip, by ear: where on the circle each pitch has its energy, and which way round they stand."""
    position = np.exp(2j * np.pi * np.arange(CLIP_SAMPLES // HOP_SAMPLES) / (CLIP_SAMPLES // HOP_SAMPLES))
    frames = np.abs(np.fft.rfft(wave.reshape(-1, HOP_SAMPLES) * np.hanning(HOP_SAMPLES))) ** 2
    bins_hz = np.fft.rfftfreq(HOP_SAMPLES, 1 / RATE_HZ)
    energy, angle = {}, {}
    for row, pitch_hz in ROW_HZ.items():
        track = frames[:, np.abs(bins_hz / pitch_hz - 1) < 0.06].sum(axis=1)
        energy[row], angle[row] = track.max(), np.angle((track**2 * position).sum())
    triple = max(TRIPLES, key=lambda name: min(energy[row] for row in TRIPLES[name]))
    a, b, c = (angle[row] for row in TRIPLES[triple])
    forward = (b - a) % (2 * np.pi) < (c - a) % (2 * np.pi)
    return f"{triple}-{'forward' if forward else 'backward'}"


def cyclic(bursts: tuple) -> list:
    """The pitches in order, from the lowest on."""
    pitches = [burst.pitch_hz for burst in bursts]
    lowest = pitches.index(min(pitches))
    return pitches[lowest:] + pitches[:lowest]


def one_by_one(score: Score) -> list[np.ndarray]:
    """The clip without noise, with one burst at a time."""
    waves = []
    for slot in range(SLOTS):
        bursts = (burst if here == slot else replace(burst, amplitude=0.0) for here, burst in enumerate(score.bursts))
        waves.append(render(Score(bursts=tuple(bursts), turn=score.turn), RATE_HZ))
    return waves


def test_the_task_can_be_solved():
    heard_right = [heard(DATA.wave(row, None)) == DATA.classes[row.label] for row in RECORDINGS]
    assert np.mean(heard_right) > 0.99


def test_a_circular_shift_turns_no_class_into_another():
    random = np.random.default_rng(0)
    for score in SCORES[::7]:
        shift = int(random.integers(CLIP_SAMPLES))
        turned = Score(bursts=score.bursts, turn=(score.turn + shift) % CLIP_SAMPLES)
        assert np.array_equal(np.roll(render(score, RATE_HZ), shift), render(turned, RATE_HZ))
        assert cyclic(turned.bursts) == cyclic(score.bursts)
    for row in RECORDINGS[::7]:
        wave = np.roll(DATA.wave(row, None), int(random.integers(CLIP_SAMPLES)))
        assert heard(wave) == DATA.classes[row.label]


def test_both_orders_of_a_triple_play_the_same_pitches():
    for triple, rows in TRIPLES.items():
        for order, letters in ORDERS.items():
            score = SCORES[[DATA.classes[row.label] for row in RECORDINGS].index(f"{triple}-{order}")]
            for burst, letter in zip(score.bursts, letters, strict=True):
                assert burst.pitch_hz == pytest.approx(ROW_HZ[rows[letter]], rel=0.031)


def test_no_raw_token_and_no_window_holds_two_events():
    shortest_gap = SLOT_SAMPLES - BURST_SAMPLES[1] - (JITTER_SAMPLES - 1)
    assert shortest_gap > FFT_SAMPLES > TOKEN_SAMPLES
    for score in SCORES[::5]:
        sounding = np.stack([np.abs(raw_tokens(wave)).max(axis=1) > 0 for wave in one_by_one(score)])
        assert sounding.sum(axis=0).max() == 1


def test_no_mel_patch_holds_two_events_above_the_noise():
    noise = mel_patches(NOISE * np.random.default_rng(0).standard_normal(CLIP_SAMPLES)).mean(axis=(1, 2, 3))
    for score in SCORES[::5]:
        alone = [mel_patches(wave) for wave in one_by_one(score)]
        second = np.sort(np.stack([patches.max(axis=(2, 3)) for patches in alone]), axis=0)[-2]
        assert (second < 0.05 * noise[:, None]).all()


def test_exchanging_two_slots_permutes_the_raw_tokens_exactly():
    for score in SCORES:
        other = mirrored(score)
        assert cyclic(other.bursts) == [cyclic(score.bursts)[letter] for letter in (0, 2, 1)]
        ours, theirs = (as_multiset(raw_tokens(render(one, RATE_HZ))) for one in (score, other))
        assert np.array_equal(ours, theirs)


def test_the_exchange_is_one_to_one_and_keeps_the_odds():
    for score in SCORES:
        assert mirrored(mirrored(score)) == score
        assert all(0 <= burst.jitter < JITTER_SAMPLES for burst in mirrored(score).bursts)
    assert JITTER_SAMPLES % TOKEN_SAMPLES == 0


def test_exchanging_two_slots_permutes_the_mel_patches():
    noise = mel_patches(NOISE * np.random.default_rng(0).standard_normal(CLIP_SAMPLES)).mean()
    for score in SCORES[::5]:
        cut = -score.turn % CLIP_SAMPLES // SLOT_SAMPLES
        one, other = (slot for slot in range(SLOTS) if slot != cut)
        bursts = list(score.bursts)
        bursts[one], bursts[other] = bursts[other], bursts[one]
        ours, theirs = (
            mel_patches(render(Score(bursts=tuple(order), turn=score.turn), RATE_HZ))
            for order in (score.bursts, bursts)
        )
        for row_ours, row_theirs in zip(ours, theirs, strict=True):
            ranked = [np.sort(row.reshape(len(row), -1).sum(axis=1)) for row in (row_ours, row_theirs)]
            assert np.allclose(ranked[0], ranked[1], rtol=1e-6, atol=noise)
            for patch in row_ours:
                assert np.abs(row_theirs - patch).max(axis=(1, 2)).min() < 0.01 * noise


def test_a_bag_of_tokens_hears_the_triple_and_not_the_order():
    """Logistic regression's cheaper cousin on the mean over tokens of many random features of each token."""
    random = np.random.default_rng(0)
    labels = np.array([row.label for row in RECORDINGS])
    weights = random.standard_normal((TOKEN_SAMPLES // 2 + 1, 100))
    bags = []
    for row in RECORDINGS:
        spectrum = np.log(np.abs(np.fft.rfft(raw_tokens(DATA.wave(row, None) / 32768.0))) + 1e-3)
        bags.append(np.concatenate([spectrum.mean(axis=0), np.maximum(0, spectrum @ weights).mean(axis=0)]))
    features = np.array(bags)
    features = np.column_stack([(features - features.mean(axis=0)) / features.std(axis=0), np.ones(len(features))])
    train = np.array([row.fold in (1, 2, 3) for row in RECORDINGS])
    targets = np.eye(len(DATA.classes))[labels]
    ridge = features[train].T @ features[train] + 30 * np.eye(features.shape[1])
    guess = (features[~train] @ np.linalg.solve(ridge, features[train].T @ targets[train])).argmax(axis=1)
    assert np.mean(guess // 2 == labels[~train] // 2) > 0.95
    assert 0.3 < np.mean(guess == labels[~train]) < 0.7


def test_options_are_part_of_the_sound():
    other = Tones(seed=1, clips_per_class=40)
    assert not np.array_equal(DATA.wave(RECORDINGS[0], None), other.wave(RECORDINGS[0], None))
    more = Tones(clips_per_class=80)
    assert np.array_equal(DATA.wave(RECORDINGS[0], None), more.wave(RECORDINGS[0], None))


def test_the_sound_is_loud_enough_and_never_clips():
    for row in RECORDINGS[::10]:
        peak = np.abs(DATA.wave(row, None).astype(int)).max()
        assert 3000 < peak < 32767


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is -1; wanted 0 or more"),
        ({"fold_count": 1}, "fold_count is 1; wanted 2 or more"),
        ({"clips_per_class": 3}, "clips_per_class is 3; wanted at least one clip for each of the 4 folds"),
        ({"clips": 3}, "has no option 'clips'; it has seed, clips_per_class, fold_count"),
        ({"seed": "a"}, "option seed is 'a'; wanted int"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        DATASETS.make("tones", options)
