"""The two frontends of the paper (section 3.1): a clip of 16 kHz samples to tokens, raw or by way of a mel spectrogram.

A frontend has two stages. `features` is fixed: it is what mixup may mix and what a normalisation applies to. `embed` is
learned: patches, a linear map of each to the width of the model, and a LayerNorm.

Legend: B batch, T samples, L tokens, D width, M mel bins, F frames.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol as Interface

import torch
from torch import Tensor, nn

from helix.protocol import Protocol
from helix.registry import FRONTENDS

RATE_HZ = 16_000

#: Added to a divisor that is a clip's own standard deviation or root mean square, so that silence stays silence.
EPSILON = 1e-6

#: The least power that has a logarithm: -100 dB.
POWER_FLOOR = 1e-10


class Frontend(Interface):
    """A member of FRONTENDS: a frozen dataclass whose fields are its options."""

    def build(self, *, width: int, protocol: Protocol) -> "Tokenizer": ...

    def tokens(self, samples: int, *, protocol: Protocol) -> int:
        """L for a clip of so many samples. ValueError where the clip is too short for one token."""
        ...


class Tokenizer(nn.Module, ABC):
    """What a frontend builds. `augmented`: whether shift, gain and noise act on the waves that it is given."""

    augmented = True

    def __init__(self, frontend: Frontend, patch_embed: nn.Conv1d | nn.Conv2d, protocol: Protocol):
        super().__init__()
        self.frontend, self.protocol = frontend, protocol
        self.patch_embed = patch_embed
        self.input_norm = nn.LayerNorm(patch_embed.out_channels)

    @abstractmethod
    def features(self, wave_BT: Tensor) -> Tensor:
        """The input of `embed`, without parameters and clip by clip. ValueError where a clip is too short."""

    @abstractmethod
    def patches(self, features: Tensor) -> Tensor:
        """The patches [B, L, P] of `features`, in the order of the tokens; P numbers each, as in the convolution."""

    @abstractmethod
    def sounding(self, samples_B: Tensor, tokens: int) -> Tensor:
        """bool [B, L]: which of so many tokens hold any of the first samples_B samples of their clip; at least one."""

    def embed(self, features: Tensor) -> Tensor:
        """x_BLD. Where kernel and stride of a convolution are equal, it is one linear map of each patch."""
        weight_DP = self.patch_embed.weight.flatten(1)
        return self.input_norm(nn.functional.linear(self.patches(features), weight_DP, self.patch_embed.bias))

    def forward(self, wave_BT: Tensor) -> Tensor:
        return self.embed(self.features(wave_BT))

    def flops(self, samples: int) -> int:
        """Floating-point operations of `embed` for one clip."""
        return 2 * self.frontend.tokens(samples, protocol=self.protocol) * self.patch_embed.weight.numel()


@FRONTENDS.register("raw")
@dataclass(frozen=True, kw_only=True)
class RawWaveform:
    """Frames of the waveform itself, 10 ms each; samples that do not fill the last one are left out (eq. 1)."""

    samples_per_token: int = 160

    def build(self, *, width: int, protocol: Protocol) -> Tokenizer:
        return RawTokenizer(self, width, protocol)

    def tokens(self, samples: int, *, protocol: Protocol) -> int:  # noqa: ARG002  (the contract's)
        if samples < self.samples_per_token:
            raise ValueError(
                f"frontend 'raw': a clip of {samples} samples is too short; a token is {self.samples_per_token}"
            )
        return samples // self.samples_per_token


class RawTokenizer(Tokenizer):
    def __init__(self, frontend: RawWaveform, width: int, protocol: Protocol):
        size = frontend.samples_per_token
        super().__init__(frontend, nn.Conv1d(1, width, size, stride=size), protocol)
        self.size = size

    def features(self, wave_BT: Tensor) -> Tensor:
        self.frontend.tokens(wave_BT.shape[-1], protocol=self.protocol)
        if self.protocol.raw_norm == "rms":
            return wave_BT / (wave_BT.square().mean(-1, keepdim=True).sqrt() + EPSILON)
        return wave_BT

    def patches(self, features: Tensor) -> Tensor:
        return features.unfold(-1, self.size, self.size)

    def sounding(self, samples_B: Tensor, tokens: int) -> Tensor:
        return _begins_before(samples_B, tokens, self.size)


@FRONTENDS.register("mel")
@dataclass(frozen=True, kw_only=True)
class MelSpectrogram:
    """Patches of a log-mel spectrogram (eq. 2): Hann window, power, HTK mel scale, decibels of at most `top_db` range.

    `protocol.mel_pad`: "floor" leaves out the frames that do not fill a patch; "ceil" completes the last patch with
    silence, which is the lowest value that the clip's own range of `top_db` lets any number have.
    """

    n_mels: int = 128
    n_fft: int = 1024
    hop: int = 512
    patch: int = 16
    top_db: float = 80.0

    def __post_init__(self) -> None:
        if self.patch > 0 and self.n_mels % self.patch:
            raise ValueError(f"frontend 'mel': {self.n_mels} mel bins do not divide into patches of {self.patch}")

    def build(self, *, width: int, protocol: Protocol) -> Tokenizer:
        return MelTokenizer(self, width, protocol)

    def tokens(self, samples: int, *, protocol: Protocol) -> int:
        return self.n_mels // self.patch * self.patches(samples, protocol=protocol)

    def frames(self, samples: int) -> int:
        """Frames of a clip, the first centred on its first sample. Both ends are reflected by half a window."""
        if samples <= self.n_fft // 2:
            raise ValueError(
                f"frontend 'mel': a clip of {samples} samples is too short; reflecting half a window of {self.n_fft} "
                f"needs {self.n_fft // 2 + 1}"
            )
        return 1 + samples // self.hop

    def patches(self, samples: int, *, protocol: Protocol) -> int:
        """Patches along time."""
        frames = self.frames(samples)
        if protocol.mel_pad == "ceil":
            return math.ceil(frames / self.patch)
        if frames < self.patch:
            raise ValueError(
                f"frontend 'mel': a clip of {samples} samples has {frames} frames, too short for one patch of "
                f"{self.patch}; protocol.mel_pad=ceil would complete it with silence"
            )
        return frames // self.patch


class MelTokenizer(Tokenizer):
    window: Tensor
    filters: Tensor

    def __init__(self, frontend: MelSpectrogram, width: int, protocol: Protocol):
        super().__init__(frontend, nn.Conv2d(1, width, frontend.patch, stride=frontend.patch), protocol)
        self.options = frontend
        self.augmented = protocol.augment_mel == "waveform"
        self.register_buffer("window", torch.hann_window(frontend.n_fft), persistent=False)
        self.register_buffer("filters", mel_filters(frontend.n_mels, frontend.n_fft), persistent=False)

    def features(self, wave_BT: Tensor) -> Tensor:
        """The image [B, 1, M, F]."""
        frames = self.options.patch * self.options.patches(wave_BT.shape[-1], protocol=self.protocol)
        with torch.autocast(wave_BT.device.type, enabled=False):
            power_BMF = self.filters.mT @ self._power(wave_BT)
        level_BMF = 10 * torch.log10(power_BMF.clamp_min(POWER_FLOOR))
        loudest_B11 = level_BMF.amax((1, 2), keepdim=True)
        silence_B11 = (loudest_B11 - self.options.top_db).clamp_min(10 * math.log10(POWER_FLOOR))
        level_BMF = level_BMF.maximum(silence_B11)
        if self.protocol.mel_norm == "clip":
            std_B11, mean_B11 = torch.std_mean(level_BMF, dim=(1, 2), keepdim=True)
            level_BMF, silence_B11 = ((x - mean_B11) / (std_B11 + EPSILON) for x in (level_BMF, silence_B11))
        missing = frames - level_BMF.shape[-1]
        if missing > 0:
            level_BMF = torch.cat([level_BMF, silence_B11.expand(-1, self.options.n_mels, missing)], dim=-1)
        return level_BMF.unsqueeze(1)

    def patches(self, features: Tensor) -> Tensor:
        patch = self.options.patch
        grid = features.squeeze(1).unfold(1, patch, patch).unfold(2, patch, patch)
        if self.protocol.mel_order == "time_major":
            grid = grid.transpose(1, 2)
        return grid.flatten(3).flatten(1, 2)

    def sounding(self, samples_B: Tensor, tokens: int) -> Tensor:
        """A patch begins where its first frame is centred; every row of patches has the same ones."""
        rows = self.options.n_mels // self.options.patch
        mask_BP = _begins_before(samples_B, tokens // rows, self.options.patch * self.options.hop)
        if self.protocol.mel_order == "time_major":
            return mask_BP.repeat_interleave(rows, dim=1)
        return mask_BP.repeat(1, rows)

    def _power(self, wave_BT: Tensor) -> Tensor:
        """The power of each frequency in each frame."""
        n_fft, hop = self.options.n_fft, self.options.hop
        spectrum = torch.stft(wave_BT, n_fft, hop, window=self.window, pad_mode="reflect", return_complex=True)
        return spectrum.real.square() + spectrum.imag.square()


def _begins_before(samples_B: Tensor, pieces: int, size: int) -> Tensor:
    """bool [B, pieces]: whether a piece of `size` samples begins before the end; the first always does."""
    begin_P = torch.arange(pieces, device=samples_B.device) * size
    return begin_P < samples_B.clamp_min(1)[:, None]


def mel_filters(n_mels: int, n_fft: int) -> Tensor:
    """Triangles [n_fft / 2 + 1, n_mels] of height one, their corners equally spaced in HTK mel up to half the rate."""
    bins_hz = torch.linspace(0, RATE_HZ / 2, n_fft // 2 + 1, dtype=torch.float64)
    top_mel = 2595 * math.log10(1 + RATE_HZ / 2 / 700)
    corners_hz = 700 * (10 ** (torch.linspace(0, top_mel, n_mels + 2, dtype=torch.float64) / 2595) - 1)
    width_hz = corners_hz.diff()
    distance = corners_hz - bins_hz[:, None]
    rising = -distance[:, :-2] / width_hz[:-1]
    falling = distance[:, 2:] / width_hz[1:]
    return torch.minimum(rising, falling).clamp_min(0).float()
