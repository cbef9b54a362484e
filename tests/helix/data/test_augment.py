"""Augmentation: what is drawn for a clip depends on (seed, epoch, clip) alone and has the right distribution."""

import numpy as np
import pytest
import torch
from scipy import stats

from helix.data.augment import augment, gaussian, mixup, pairing, roll
from helix.data.datasets.tones import Tones
from helix.data.loader import Batches
from helix.protocol import Protocol
from helix.spec import AugmentSpec

RATE_HZ = 16_000
SPEC = AugmentSpec(shift_s=0.5)
NOTHING = AugmentSpec(shift_s=0.0, gain_low=1.0, gain_high=1.0, noise=0.0)


def waves(count: int, samples: int = 2_000) -> torch.Tensor:
    return torch.randn(count, samples, generator=torch.Generator().manual_seed(0))


def test_a_clip_is_augmented_alike_in_any_company():
    wave_BT, clip_B = waves(16, 4_001), torch.arange(100, 116)
    whole = augment(wave_BT, clip_B, SPEC, seed=1, epoch=2)
    for company in ([3], [9, 3, 0], list(range(15, -1, -1))):
        assert torch.equal(augment(wave_BT[company], clip_B[company], SPEC, seed=1, epoch=2), whole[company])


def test_the_loader_and_the_augmentation_together_carry_no_state(tones):
    def clip_in_epoch(batch_size: int, clip: int) -> torch.Tensor:
        how = {"batch_size": batch_size, "seed": 0, "protocol": Protocol()}
        batches = Batches(tones, Tones(clips_per_class=8), np.arange(48), **how)
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(4, step)
            wave_BT = augment(batch.wave_BT, batch.clip_B, SPEC, seed=0, epoch=4)
            if clip in batch.clip_B:
                return wave_BT[batch.clip_B.tolist().index(clip)]
        raise AssertionError

    assert torch.equal(clip_in_epoch(4, 17), clip_in_epoch(16, 17))


def test_seed_epoch_and_clip_each_change_the_draw():
    wave_BT = waves(1)
    draws = [
        augment(wave_BT, torch.tensor([clip]), SPEC, seed=seed, epoch=epoch)
        for seed, epoch, clip in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert all(not torch.allclose(one, other) for n, one in enumerate(draws) for other in draws[:n])


def test_the_batch_that_came_in_is_not_changed():
    wave_BT = waves(4)
    before = wave_BT.clone()
    augment(wave_BT, torch.arange(4), SPEC, seed=0, epoch=0)
    assert torch.equal(wave_BT, before)


def test_augmentation_set_to_nothing_does_nothing():
    wave_BT = waves(4)
    assert torch.equal(augment(wave_BT, torch.arange(4), NOTHING, seed=0, epoch=0), wave_BT)


def test_an_unresolved_shift_is_refused():
    with pytest.raises(ValueError, match=r"augment\.shift_s is None; wanted seconds"):
        augment(waves(1), torch.arange(1), AugmentSpec(), seed=0, epoch=0)


def test_a_roll_is_circular_and_to_the_right():
    wave_BT = waves(5, 100)
    shift_B = torch.tensor([0, 1, -1, 99, -250])
    for wave_T, rolled_T, shift in zip(wave_BT, roll(wave_BT, shift_B), shift_B.tolist(), strict=True):
        assert torch.equal(rolled_T, torch.roll(wave_T, shift))


def test_shifts_are_uniform_between_minus_and_plus_the_limit():
    spec = AugmentSpec(shift_s=10 / RATE_HZ, gain_low=1.0, gain_high=1.0, noise=0.0)
    click_BT = torch.zeros(8_400, 64)
    click_BT[:, 32] = 1
    shifts = augment(click_BT, torch.arange(8_400), spec, seed=0, epoch=0).argmax(dim=1).numpy() - 32
    counts = np.bincount(shifts + 10, minlength=21)
    assert len(counts) == 21
    assert stats.chisquare(counts).pvalue > 1e-3


def test_gains_are_uniform_between_their_limits():
    spec = AugmentSpec(shift_s=0.0, noise=0.0)
    gains = augment(torch.ones(5_000, 1), torch.arange(5_000), spec, seed=0, epoch=0)[:, 0].numpy()
    assert stats.kstest(gains, "uniform", args=(0.8, 0.4)).pvalue > 1e-3
    assert gains.min() >= 0.8 and gains.max() <= 1.2


def test_noise_has_the_normal_distribution_that_was_asked_for():
    spec = AugmentSpec(shift_s=0.0, gain_low=1.0, gain_high=1.0, noise=0.005)
    noise = augment(torch.zeros(4, 50_001), torch.arange(4), spec, seed=0, epoch=0).numpy() / 0.005
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert abs(noise.std() - 1) < 0.01 and np.abs(noise).max() > 4


def test_noise_is_white_and_clips_share_none_of_it():
    noise = gaussian(torch.arange(6) * 12_345, 40_000).numpy()
    limit = 5 / np.sqrt(40_000)
    for lag in (1, 2, 160, 512, 20_000):
        assert np.abs((noise * np.roll(noise, lag, axis=1)).mean(axis=1)).max() < limit
        assert np.abs((noise**2 * np.roll(noise, lag, axis=1) ** 2).mean(axis=1) - 1).max() < 4 * limit
    assert np.abs(np.corrcoef(noise) - np.eye(6)).max() < limit


def test_shift_gain_and_noise_of_a_clip_are_drawn_apart():
    spec = AugmentSpec(shift_s=1000 / RATE_HZ, noise=0.0)
    click_BT = torch.zeros(2_000, 2_001)
    click_BT[:, 1000] = 1
    peak_B, place_B = augment(click_BT, torch.arange(2_000), spec, seed=0, epoch=0).max(dim=1)
    assert abs(np.corrcoef(peak_B, place_B)[0, 1]) < 0.1


def test_mixup_mixes_each_clip_with_its_partner():
    wave_BT = waves(8)
    partner_B, lam = pairing(8, 1, 2, alpha=0.3, seed=0)
    assert sorted(partner_B.tolist()) == list(range(8)) and 0 <= lam <= 1
    mixed = mixup(wave_BT, torch.from_numpy(partner_B), torch.tensor(lam))
    assert torch.allclose(mixed, lam * wave_BT + (1 - lam) * wave_BT[partner_B], atol=1e-6)


def test_a_pairing_is_a_pure_function_of_its_position():
    def at(seed: int, epoch: int, step: int) -> tuple[list[int], float]:
        partner_B, lam = pairing(8, epoch, step, alpha=0.3, seed=seed)
        return partner_B.tolist(), lam

    assert at(0, 1, 2) == at(0, 1, 2)
    assert len({at(*position)[1] for position in ((0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3))}) == 4


def test_mixup_weights_have_the_beta_distribution():
    weights = [pairing(2, 0, step, alpha=0.3, seed=0)[1] for step in range(1_000)]
    assert stats.kstest(weights, "beta", args=(0.3, 0.3)).pvalue > 1e-3


def test_mixup_of_alpha_0_is_none():
    wave_BT = waves(4)
    partner_B, lam = pairing(4, 0, 0, alpha=0.0, seed=0)
    assert partner_B.tolist() == [0, 1, 2, 3] and lam == 1.0
    assert torch.equal(mixup(wave_BT, torch.from_numpy(partner_B), torch.tensor(lam)), wave_BT)


SHIFT_ONLY = AugmentSpec(shift_s=0.5, gain_low=1.0, gain_high=1.0, noise=0.0)


def test_with_the_silence_masked_the_shift_turns_the_sounding_part_alone():
    wave_BT = waves(6, 1_000)
    samples_B = torch.tensor([1_000, 700, 1, 999, 50, 333])
    for row, samples in enumerate(samples_B.tolist()):
        wave_BT[row, samples:] = 0
    rolled_BT = augment(wave_BT, torch.arange(6), SHIFT_ONLY, seed=0, epoch=0, samples_B=samples_B)
    for wave_T, rolled_T, samples in zip(wave_BT, rolled_BT, samples_B.tolist(), strict=True):
        assert not rolled_T[samples:].any()
        turned = [torch.equal(torch.roll(wave_T[:samples], shift), rolled_T[:samples]) for shift in range(samples)]
        assert any(turned)
    assert not torch.equal(rolled_BT, wave_BT)
    plain = augment(wave_BT, torch.arange(6), SHIFT_ONLY, seed=0, epoch=0)
    assert torch.equal(plain[0], rolled_BT[0]), "a clip that sounds to its end is turned as without a mask"


def test_each_part_of_a_concatenation_is_turned_within_itself_by_a_number_of_its_own():
    wave_BT = waves(3, 4_000)
    rolled_BT = augment(wave_BT, torch.arange(3), SHIFT_ONLY, seed=0, epoch=0, parts=4)
    shifts = []
    for before, after in zip(wave_BT.reshape(12, 1_000), rolled_BT.reshape(12, 1_000), strict=True):
        found = [shift for shift in range(1_000) if torch.equal(torch.roll(before, shift), after)]
        assert len(found) == 1
        shifts += found
    assert len(set(shifts)) > 9


def test_in_a_concatenation_the_last_part_keeps_its_silence():
    wave_BT = waves(2, 3_000)
    wave_BT[:, 2_300:] = 0
    rolled_BT = augment(
        wave_BT, torch.arange(2), SHIFT_ONLY, seed=0, epoch=0, parts=3, samples_B=torch.tensor([2_300, 2_300])
    )
    assert not rolled_BT[:, 2_300:].any() and not torch.equal(rolled_BT, wave_BT)
    for part in (slice(0, 1_000), slice(1_000, 2_000), slice(2_000, 2_300)):
        assert torch.equal(rolled_BT[:, part].sort(dim=1).values, wave_BT[:, part].sort(dim=1).values)


def test_parts_that_do_not_divide_the_wave_are_refused():
    with pytest.raises(ValueError, match="waves of 1000 samples do not fall into 3 equal parts"):
        augment(waves(1, 1_000), torch.arange(1), SHIFT_ONLY, seed=0, epoch=0, parts=3)


@pytest.mark.parametrize("drawn", ["shift", "gain", "noise"])
def test_shift_gain_and_noise_each_follow_a_seed_of_their_own(monkeypatch, drawn):
    wave_BT, one = waves(64), {"shift": {"shift_s": 0.01}, "gain": {"gain_low": 0.5, "gain_high": 2.0}}
    off = {"shift_s": 0.0, "gain_low": 1.0, "gain_high": 1.0, "noise": 0.0}
    seeds = {"shift": 1, "gain": 2, "noise": 3}
    monkeypatch.setattr("helix.data.augment.derive_seed", lambda _seed, name, _epoch: seeds[name])
    for changed in seeds:
        spec = AugmentSpec(**off | one.get(drawn, {"noise": 0.1}))
        before = augment(wave_BT, torch.arange(64), spec, seed=0, epoch=0)
        seeds[changed] += 10
        after = augment(wave_BT, torch.arange(64), spec, seed=0, epoch=0)
        assert torch.equal(before, after) == (changed != drawn)
