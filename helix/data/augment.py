"""Circular shift, gain, noise and mixup of a batch, on the device where it is; the paper's section 3.4.

Random numbers come from a counter and not from a generator: splitmix64 (Steele et al. 2014, OOPSLA) over a key made of
(seed, epoch, clip). So what is drawn for a clip depends neither on its batch nor on what was drawn before.

B batch, T samples, P pairs of samples.
"""

import math

import numpy as np
import torch
from torch import Tensor

from helix.data.dataset import Dataset
from helix.spec import AugmentSpec, derive_seed

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def augment(
    wave_BT: Tensor,
    clip_B: Tensor,
    spec: AugmentSpec,
    *,
    seed: int,
    epoch: int,
    rate_hz: int = Dataset.rate_hz,
    samples_B: Tensor | None = None,
    parts: int = 1,
) -> Tensor:
    """A shifted, scaled and noisy copy of `wave_BT`. `spec` is resolved: its shift is a number of seconds.

    With `samples_B` the shift turns the first samples_B[b] samples of a wave and leaves the silence after them where
    it is. With `parts` each of so many equal parts of a wave is shifted by a number of its own, within itself.
    """
    if spec.shift_s is None:
        raise ValueError("augment.shift_s is None; wanted seconds, as helix.spec.resolve writes them")
    shift_key_B, gain_key_B, noise_key_B = (
        _key(clip_B, derive_seed(seed, name, epoch)) for name in ("shift", "gain", "noise")
    )
    most = round(spec.shift_s * rate_hz)
    if most > 0:
        batch, samples = wave_BT.shape
        if samples % parts:
            raise ValueError(f"waves of {samples} samples do not fall into {parts} equal parts")
        if parts > 1:
            shift_key_B = _key(shift_key_B[:, None] + torch.arange(parts, device=wave_BT.device), 0).view(-1)
        if samples_B is not None:
            before_P = torch.arange(parts, device=wave_BT.device) * (samples // parts)
            samples_B = (samples_B[:, None] - before_P).clamp(1, samples // parts).view(-1)
        shift_B = _logical_shift(shift_key_B, 1).remainder_(2 * most + 1).sub_(most)
        wave_BT = roll(wave_BT.reshape(batch * parts, -1), shift_B, samples_B).view(batch, samples)
    if (spec.gain_low, spec.gain_high) != (1.0, 1.0):
        gain_B = spec.gain_low + (spec.gain_high - spec.gain_low) * _unit(_logical_shift(gain_key_B, 40))
        wave_BT = wave_BT * gain_B[:, None].to(wave_BT.dtype)
    if spec.noise > 0:
        noise_BT = gaussian(noise_key_B, wave_BT.shape[1]).to(wave_BT.dtype)
        wave_BT = torch.add(wave_BT, noise_BT, alpha=spec.noise)
    return wave_BT


def roll(wave_BT: Tensor, shift_B: Tensor, samples_B: Tensor | None = None) -> Tensor:
    """Each wave moved to the right by its own number of samples, the end coming in again at the start.

    With `samples_B` only the first samples_B[b] samples are turned and the rest stays.
    """
    at_T = torch.arange(wave_BT.shape[1], device=wave_BT.device)
    from_BT = at_T[None, :] - shift_B[:, None]
    if samples_B is None:
        from_BT = from_BT.remainder_(wave_BT.shape[1])
    else:
        from_BT = torch.where(at_T < samples_B[:, None], from_BT.remainder_(samples_B[:, None]), at_T)
    return wave_BT.gather(1, from_BT)


def gaussian(key_B: Tensor, samples: int) -> Tensor:
    """float32 [B, samples] of the normal distribution; row b is a pure function of key_B[b] (Box and Muller 1958)."""
    pairs = (samples + 1) // 2
    bits_BP = _mix(key_B[:, None] + torch.arange(1, pairs + 1, device=key_B.device).mul_(GOLDEN))
    angle_BP = _unit(bits_BP & 0xFFFFFF).mul_(2 * math.pi)
    radius_BP = _unit(_logical_shift(bits_BP, 40)).log_().mul_(-2).sqrt_()
    noise_BT = torch.empty(len(key_B), 2 * pairs, device=key_B.device)
    torch.mul(radius_BP, angle_BP.cos(), out=noise_BT[:, :pairs])
    torch.mul(radius_BP, angle_BP.sin_(), out=noise_BT[:, pairs:])
    return noise_BT[:, :samples]


def pairing(clips: int, epoch: int, step: int, *, alpha: float, seed: int) -> tuple[np.ndarray, float]:
    """(partner_B, lam) of a batch of so many clips: the place of each clip's partner in mixup, and the weight of the
    clip itself, drawn from Beta(alpha, alpha) once for the batch. alpha 0 pairs each clip with itself.
    """
    if alpha == 0:
        return np.arange(clips), 1.0
    random = np.random.Generator(np.random.Philox(derive_seed(seed, "mixup", epoch, step)))
    lam = float(random.beta(alpha, alpha))
    return random.permutation(clips), lam


def mixup(features: Tensor, partner_B: Tensor, lam: Tensor) -> Tensor:
    """lam * features + (1 - lam) * features[partner_B], with `partner_B` and the scalar `lam` as `pairing` draws them.

    Zhang et al. 2018, arXiv:1710.09412. Of a part of a batch (helix.data.loader) as many clips as `partner_B` is long
    are mixed, the first ones, each with the one that it names: as in the whole batch.
    """
    return torch.lerp(features[partner_B], features[: len(partner_B)], lam)


def _key(clip_B: Tensor, seed: int) -> Tensor:
    """One int64 per clip; neighbouring clips and seeds share nothing."""
    return _mix(_mix(clip_B * GOLDEN + seed))


def _mix(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64, in place on a fresh int64 tensor; products wrap as 64-bit integers do."""
    bits ^= _logical_shift(bits.clone(), 30)
    bits *= MIX_1
    bits ^= _logical_shift(bits.clone(), 27)
    bits *= MIX_2
    bits ^= _logical_shift(bits.clone(), 31)
    return bits


def _logical_shift(bits: Tensor, places: int) -> Tensor:
    """`bits` >> `places` without the sign, in place."""
    bits >>= places
    bits &= (1 << (64 - places)) - 1
    return bits


def _unit(bits: Tensor) -> Tensor:
    """float32 in (0, 1] from integers of 24 bits."""
    return bits.to(torch.float32).add_(0.5).mul_(2.0**-24)
