"""A frontend turns a clip into tokens: how many, in which order, and exactly which numbers."""

import importlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helix.models.frontend import RATE_HZ, MelSpectrogram, MelTokenizer, RawWaveform, Tokenizer, mel_filters
from helix.protocol import Protocol, profile
from helix.registry import FRONTENDS

#: Seconds -> tokens: raw; mel as the authors' code cuts patches; mel by the paper's formula.
TOKENS = {
    1: (100, 16, 16),
    4: (400, 56, 64),
    5: (500, 72, 80),
    10: (1000, 152, 160),
    30: (3000, 464, 472),
    300: (30000, 4688, 4688),
}


def noise(samples: int = 24_000, batch: int = 2) -> Tensor:
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(3))


def build(name: str, *, width: int = 8, protocol: Protocol | None = None) -> Tokenizer:
    return FRONTENDS.make(name).build(width=width, protocol=protocol or Protocol())


def mel(**switches: str) -> MelTokenizer:
    tokenizer = build("mel", protocol=Protocol(**switches))  # type: ignore[arg-type]
    assert isinstance(tokenizer, MelTokenizer)
    return tokenizer


@pytest.mark.parametrize("seconds", TOKENS)
def test_a_clip_has_the_tokens_of_the_table(seconds):
    raw, floor, ceil = TOKENS[seconds]
    samples = seconds * RATE_HZ
    assert RawWaveform().tokens(samples, protocol=profile("paper")) == raw
    assert MelSpectrogram().tokens(samples, protocol=profile("authors")) == floor
    assert MelSpectrogram().tokens(samples, protocol=profile("paper")) == ceil


@pytest.mark.parametrize("name", FRONTENDS.names())
@pytest.mark.parametrize("protocol", ["authors", "paper"])
@pytest.mark.parametrize("samples", [7680, 8191, 8192, 16_000, 24_576, 80_000])
def test_the_planned_tokens_are_those_that_come_out(samples, protocol, name):
    x_BLD = build(name, protocol=profile(protocol))(noise(samples, batch=1))
    assert x_BLD.shape == (1, FRONTENDS.make(name).tokens(samples, protocol=profile(protocol)), 8)


@pytest.mark.parametrize("name", FRONTENDS.names())
def test_features_have_no_parameters_and_treat_each_clip_for_itself(name):
    frontend, wave_BT = build(name), noise()
    features = frontend.features(wave_BT)
    assert not features.requires_grad
    assert torch.equal(frontend.features(torch.stack([wave_BT[0], 9 * wave_BT[1]]))[0], features[0])
    assert not any(name.startswith(("window", "filters")) for name in frontend.state_dict())


@pytest.mark.parametrize("name", FRONTENDS.names())
def test_autocast_does_not_reach_the_features(name):
    frontend, wave_BT = build(name), noise()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = frontend.features(wave_BT)
    assert torch.equal(features, frontend.features(wave_BT))


@pytest.mark.parametrize("name", FRONTENDS.names())
def test_silence_is_finite(name):
    for protocol in (Protocol(), Protocol(raw_norm="rms", mel_norm="none")):
        assert torch.isfinite(build(name, protocol=protocol)(torch.zeros(1, RATE_HZ))).all()


def test_raw_embedding_is_the_convolution_of_the_paper():
    frontend, wave_BT = build("raw"), noise(1000)
    convolution, norm = frontend.get_submodule("patch_embed"), frontend.get_submodule("input_norm")
    assert isinstance(convolution, nn.Conv1d)
    torch.testing.assert_close(frontend(wave_BT), norm(convolution(wave_BT[:, None]).mT))


def test_rms_makes_loudness_invisible_and_none_does_not():
    wave_BT = noise()
    for protocol, same in ((Protocol(raw_norm="rms"), True), (Protocol(raw_norm="none"), False)):
        frontend = build("raw", protocol=protocol)
        quiet, loud = frontend.features(wave_BT), frontend.features(10 * wave_BT)
        assert torch.allclose(quiet, loud, rtol=1e-4) is same


def test_mel_embedding_is_the_convolution_of_the_paper_in_either_order():
    wave_BT = noise()
    in_order = {}
    for mel_order in ("freq_major", "time_major"):
        torch.manual_seed(0)
        frontend = mel(mel_order=mel_order)
        image = frontend.features(wave_BT)
        grid_BDHW = frontend.patch_embed(image)
        if mel_order == "time_major":
            grid_BDHW = grid_BDHW.mT
        in_order[mel_order] = frontend.embed(image)
        torch.testing.assert_close(in_order[mel_order], frontend.input_norm(grid_BDHW.flatten(2).mT))
    # The second token is the next in time, or the next mel band: 8 bands of 3 patches.
    assert torch.equal(in_order["freq_major"][:, 1], in_order["time_major"][:, 8])


def triangles() -> np.ndarray:
    """The mel filters [M, N] from their definition, in double precision."""
    edges_mel = np.linspace(0, 2595 * math.log10(1 + 8000 / 700), 130)
    edges_hz = 700 * (10 ** (edges_mel / 2595) - 1)
    bins_hz = np.arange(513) * 16_000 / 1024
    return np.stack([np.interp(bins_hz, edges_hz[m : m + 3], [0, 1, 0]) for m in range(128)])


def dft_levels(wave: np.ndarray, filters_MN: np.ndarray) -> np.ndarray:
    """The log-mel image [M, F] of one clip in decibels, from the definitions, in double precision."""
    padded = np.pad(wave, 512, mode="reflect")
    frames = np.stack([padded[start : start + 1024] for start in range(0, len(wave) + 1, 512)])
    n = np.arange(1024)
    windowed = frames * (0.5 - 0.5 * np.cos(2 * np.pi * n / 1024))
    power = np.abs(windowed @ np.exp(-2j * np.pi * np.outer(n, np.arange(513)) / 1024)) ** 2
    level = 10 * np.log10(np.maximum(filters_MN @ power.T, 1e-10))
    return np.maximum(level, level.max() - 80)


def distance(given: Tensor, wanted: np.ndarray) -> float:
    """Relative, in the Euclidean norm."""
    return float(np.linalg.norm(given.double().numpy() - wanted) / np.linalg.norm(wanted))


def test_mel_equals_a_plain_fourier_transform_in_double_precision():
    """To 1e-5 relative in the Euclidean norm over the clip, in decibels and normalised."""
    wave_BT = noise()
    for wave_T, level_MF, normal_MF in zip(
        wave_BT,
        mel(mel_norm="none", mel_pad="floor").features(wave_BT).squeeze(1),
        mel(mel_pad="floor").features(wave_BT).squeeze(1),
        strict=True,
    ):
        wanted = dft_levels(wave_T.double().numpy(), triangles())
        assert distance(level_MF, wanted) < 1e-5
        assert distance(normal_MF, (wanted - wanted.mean()) / (wanted.std(ddof=1) + 1e-6)) < 1e-5


def test_all_that_mel_loses_in_single_precision_are_digits_of_its_filters():
    """Given the float32 filters, which are torchaudio's, every single number is right to 1e-5."""
    wave_BT, filters_NM = noise(), mel_filters(128, 1024)
    level_BMF = mel(mel_norm="none", mel_pad="floor").features(wave_BT).squeeze(1)
    wanted = np.stack([dft_levels(wave, filters_NM.double().numpy().T) for wave in wave_BT.double().numpy()])
    np.testing.assert_allclose(level_BMF, wanted, rtol=1e-5, atol=1e-5)
    assert distance(filters_NM.T, triangles()) < 1e-5


@pytest.fixture
def torchaudio_levels() -> Callable[[Tensor], Tensor]:
    """[B, T] -> [B, M, F] in decibels, by torchaudio."""
    try:
        transforms = importlib.import_module("torchaudio.transforms")
    except (ImportError, OSError) as error:  # its libraries may want a CUDA that is not there
        pytest.skip(f"torchaudio cannot be imported ({str(error).splitlines()[0]}); the Fourier transform test stands")
    spectrogram = transforms.MelSpectrogram(sample_rate=RATE_HZ, n_fft=1024, hop_length=512, n_mels=128)
    decibels = transforms.AmplitudeToDB(top_db=80)
    return lambda wave_BT: decibels(spectrogram(wave_BT[:, None])).squeeze(1)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("seconds", [1, 5, 30])
def test_mel_equals_torchaudio_to_the_bit(seconds, batch, torchaudio_levels):
    wave_BT = noise(seconds * RATE_HZ, batch)
    wave_BT[0, : RATE_HZ // 2] = 0
    wave_BT[1:2] = 0
    level_BMF = mel(mel_norm="none", mel_pad="floor").features(wave_BT).squeeze(1)
    assert torch.equal(level_BMF, torchaudio_levels(wave_BT))
    for clip, wave_T in zip(level_BMF, wave_BT, strict=True):
        assert torch.equal(clip, torchaudio_levels(wave_T[None]).squeeze(0))


def test_mel_filters_are_triangles_that_add_up_to_one_between_their_ends():
    filters_FM = mel_filters(40, 1024)
    assert filters_FM.shape == (513, 40)
    assert float(filters_FM.min()) == 0
    corners = slice(10, 470)  # beyond the first peak and before the last
    torch.testing.assert_close(filters_FM[corners].sum(1), torch.ones(460))


def test_a_clip_spans_at_most_top_db():
    frontend = mel(mel_norm="none")
    wave_BT = torch.cat([noise(RATE_HZ, batch=1), torch.zeros(1, RATE_HZ)], dim=1)
    image = frontend.features(wave_BT)
    assert float(image.amax() - image.amin()) == pytest.approx(80, abs=1e-3)


@pytest.mark.parametrize("gain", [1, 1e-4])
@pytest.mark.parametrize("mel_norm", ["clip", "none"])
def test_ceil_completes_the_last_patch_with_what_silence_is_in_that_clip(mel_norm, gain):
    """Of a loud clip, 80 dB below its loudest; of a clip that quiet, the least power there is."""
    wave_BT = torch.cat([gain * noise(40_000), torch.zeros(2, 40_000)], dim=1)
    kept = mel(mel_pad="floor", mel_norm=mel_norm).features(wave_BT)
    padded = mel(mel_pad="ceil", mel_norm=mel_norm).features(wave_BT)
    assert (kept.shape[-1], padded.shape[-1]) == (157, 160)
    assert torch.equal(padded[..., :157], kept)
    silent_frame = kept[..., 150:151]
    torch.testing.assert_close(padded[..., 157:], silent_frame.expand(-1, -1, -1, 3))


def test_a_normalised_clip_has_mean_zero_and_deviation_one():
    std, mean = torch.std_mean(mel(mel_pad="floor").features(noise()), dim=(1, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "samples", "switches", "message"),
    [
        ("raw", 159, {}, "159 samples is too short; a token is 160"),
        ("mel", 512, {}, "512 samples is too short; reflecting half a window of 1024 needs 513"),
        ("mel", 7679, {"mel_pad": "floor"}, "has 15 frames, too short for one patch of 16; protocol.mel_pad=ceil"),
    ],
)
def test_a_clip_too_short_for_one_token_is_refused(name, samples, switches, message):
    protocol = Protocol(**switches)
    with pytest.raises(ValueError, match=message):
        FRONTENDS.make(name).tokens(samples, protocol=protocol)
    with pytest.raises(ValueError, match=message):
        build(name, protocol=protocol).features(torch.zeros(1, samples))


def test_mel_bins_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(ValueError, match="100 mel bins do not divide into patches of 16"):
        FRONTENDS.make("mel", {"n_mels": 100})
