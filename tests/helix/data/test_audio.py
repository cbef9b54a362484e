"""Decoding: exact where it can be, loud where a file is not what it claims."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helix.data.audio import PIECE_SAMPLES, AudioError, decode, fit_length, ogg_checksum, to_int16

RATE_HZ = 16_000


def write(path: Path, wave: np.ndarray, rate_hz: int = RATE_HZ, subtype: str | None = None) -> Path:
    soundfile.write(path, wave, rate_hz, subtype=subtype)
    return path


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_16_bit_mono_at_our_rate_comes_through_sample_for_sample(tmp_path, suffix):
    wave = np.random.default_rng(0).integers(-32768, 32767, 5000, endpoint=True).astype(np.int16)
    wave[:2] = (-32768, 32767)
    decoded = decode(write(tmp_path / f"clip.{suffix}", wave, subtype="PCM_16"), rate_hz=RATE_HZ)
    assert decoded.dtype == np.int16
    assert np.array_equal(decoded, wave)


def test_channels_are_averaged(tmp_path):
    left, right = np.full(100, 1000, np.int16), np.full(100, -3000, np.int16)
    assert set(decode(write(tmp_path / "two.wav", np.stack([left, right], 1)), rate_hz=RATE_HZ)) == {-1000}


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 48_000])
def test_a_tone_keeps_its_pitch_and_length_through_resampling(tmp_path, rate_hz):
    time = np.arange(rate_hz) / rate_hz
    decoded = decode(write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 1000 * time), rate_hz), rate_hz=RATE_HZ)
    assert len(decoded) == RATE_HZ
    wanted = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(RATE_HZ) / RATE_HZ)
    assert np.abs(decoded / 32768 - wanted)[500:-500].max() < 1e-3


def decode_plainly(path: Path, rate_hz: int) -> np.ndarray:
    """The slow twin of `decode`: everything in float64."""
    wave_TC, source_rate_hz = soundfile.read(path, dtype="float64", always_2d=True)
    wave_T = wave_TC.mean(axis=1)
    if source_rate_hz != rate_hz:
        wave_T = soxr.resample(wave_T, source_rate_hz, rate_hz, quality="HQ")
    return np.clip(np.rint(wave_T * 32768.0), -32768, 32767).astype(np.int16)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_decoding_fast_gives_the_same_samples_as_decoding_plainly(tmp_path, suffix, subtype, channels, rate_hz):
    random = np.random.default_rng(rate_hz)
    wave = np.clip(random.normal(0, 0.4, (rate_hz, channels)), -1, 0.999)  # loud enough to overshoot full scale
    path = write(tmp_path / f"clip.{suffix}", wave, rate_hz, subtype)
    assert np.array_equal(decode(path, rate_hz=RATE_HZ), decode_plainly(path, RATE_HZ))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rate_hz=st.one_of(st.sampled_from([8_000, 11_025, 22_050, 32_000, 44_100, 48_000]), st.integers(1_000, 200_000)),
    samples=st.one_of(
        st.integers(-2, 2).map(lambda more: PIECE_SAMPLES + more),
        st.sampled_from([2 * PIECE_SAMPLES, 2 * PIECE_SAMPLES + 1]),
        st.integers(200, 5 * PIECE_SAMPLES),
    ),
    seed=st.integers(0, 99),
)
def test_a_wave_resampled_in_pieces_is_the_wave_resampled_at_once(tmp_path, rate_hz, samples, seed):
    wave = np.random.default_rng(seed).integers(-32768, 32767, samples, endpoint=True).astype(np.int16)
    path = write(tmp_path / "clip.wav", wave, rate_hz, "PCM_16")
    assert np.array_equal(decode(path, rate_hz=RATE_HZ), decode_plainly(path, RATE_HZ))


def test_what_was_resampled_before_leaves_no_trace(tmp_path):
    waves = np.random.default_rng(0).integers(-32768, 32767, (3, 50_000), endpoint=True).astype(np.int16)
    paths = [write(tmp_path / f"{number}.wav", wave, 44_100, "PCM_16") for number, wave in enumerate(waves)]
    tiny = write(tmp_path / "tiny.wav", waves[0][:1], 44_100, "PCM_16")
    for path in (paths[0], paths[1], paths[0], paths[2]):
        with pytest.raises(AudioError, match="no sample is left at 16000 Hz"):
            decode(tiny, rate_hz=RATE_HZ)
        assert np.array_equal(decode(path, rate_hz=RATE_HZ), decode_plainly(path, RATE_HZ))


def test_real_recordings_at_44_khz_decode_alike_fast_and_plainly(real_esc50, tmp_path):
    for source in sorted(real_esc50.glob("**/audio/*.wav"))[::150]:
        wave, rate_hz = soundfile.read(source)
        path = write(tmp_path / source.name, soxr.resample(wave, rate_hz, 44_100), 44_100, "PCM_16")
        assert np.array_equal(decode(path, rate_hz=RATE_HZ), decode_plainly(path, RATE_HZ))


def test_24_bit_is_rounded_to_the_nearest(tmp_path):
    wave = np.array([0.4, 0.6, -0.6, 100.0, 12.5]) / 32768
    decoded = decode(write(tmp_path / "deep.wav", wave, subtype="PCM_24"), rate_hz=RATE_HZ)
    assert decoded.tolist() == [0, 1, -1, 100, 12]


def test_what_overshoots_full_scale_is_clipped_and_does_not_wrap(tmp_path):
    decoded = decode(write(tmp_path / "hot.wav", np.array([1.5, -1.5, 1.0]), subtype="FLOAT"), rate_hz=RATE_HZ)
    assert decoded.tolist() == [32767, -32768, 32767]
    assert to_int16(np.array([0.99999])).tolist() == [32767]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(AudioError, match=r"gone\.wav: is not there"):
        decode(tmp_path / "gone.wav", rate_hz=RATE_HZ)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.wav").touch()
    with pytest.raises(AudioError, match=r"empty\.wav: is empty"):
        decode(tmp_path / "empty.wav", rate_hz=RATE_HZ)


def test_a_file_without_samples_is_named(tmp_path):
    with pytest.raises(AudioError, match="holds no samples"):
        decode(write(tmp_path / "none.wav", np.zeros(0)), rate_hz=RATE_HZ)


def test_what_is_no_sound_is_named(tmp_path):
    (tmp_path / "page.wav").write_text("<html>404</html>" * 100)
    with pytest.raises(AudioError, match=r"page\.wav: cannot be decoded"):
        decode(tmp_path / "page.wav", rate_hz=RATE_HZ)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_truncated_file_is_not_taken_for_a_short_one(tmp_path, suffix):
    path = write(tmp_path / f"cut.{suffix}", np.random.default_rng(0).uniform(-0.5, 0.5, 50_000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(AudioError, match=r"truncated|cannot be decoded"):
        decode(path, rate_hz=RATE_HZ)


@pytest.fixture(scope="module")
def ogg(tmp_path_factory) -> bytes:
    """Ten seconds of Ogg Vorbis in several pages."""
    path = tmp_path_factory.mktemp("ogg") / "whole.ogg"
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 160_000)
    soundfile.write(path, wave, RATE_HZ)
    assert len(decode(path, rate_hz=RATE_HZ)) == 160_000
    return path.read_bytes()


def pages(data: bytes) -> list[int]:
    """Where the pages of an Ogg file begin."""
    starts, position = [], 0
    while position < len(data):
        starts.append(position)
        segments = data[position + 26]
        position += 27 + segments + sum(data[position + 27 : position + 27 + segments])
    return starts


def test_ogg_cut_at_any_place_is_truncated(ogg, tmp_path):
    path, starts = tmp_path / "cut.ogg", pages(ogg)
    assert len(starts) > 5
    random = np.random.default_rng(1)
    anywhere = random.integers(1, len(ogg), 100).tolist()
    for at in [*starts[1:], *(start + 20 for start in starts), *(start + 27 for start in starts), *anywhere]:
        path.write_bytes(ogg[:at])
        with pytest.raises(AudioError, match=r"cut\.ogg: (is truncated|cannot be decoded)"):
            decode(path, rate_hz=RATE_HZ)


def test_ogg_that_lost_a_page_within_or_has_something_behind_is_damaged(ogg, tmp_path):
    path, starts = tmp_path / "hole.ogg", pages(ogg)
    path.write_bytes(ogg[: starts[4]] + ogg[starts[5] :])
    with pytest.raises(AudioError, match=f"pages of Ogg are missing before byte {starts[4]}"):
        decode(path, rate_hz=RATE_HZ)
    path.write_bytes(ogg[starts[1] :])
    with pytest.raises(AudioError, match="pages of Ogg are missing before byte 0"):
        decode(path, rate_hz=RATE_HZ)
    path.write_bytes(ogg + b"<html>")
    with pytest.raises(AudioError, match=f"no page of Ogg at byte {len(ogg)}"):
        decode(path, rate_hz=RATE_HZ)


@pytest.mark.parametrize("container", ["AIFF", "AU", "RF64", "W64", "MP3", "CAF"])
def test_a_format_whose_end_cannot_be_told_is_refused_whole_or_cut(tmp_path, container):
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 16_000), RATE_HZ, format=container)
    with pytest.raises(AudioError, match=rf"clip\.wav: is {container}\w*; wanted WAV, FLAC or Ogg, convert it"):
        decode(path, rate_hz=RATE_HZ)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"wanted WAV, FLAC or Ogg|cannot be decoded"):
        decode(path, rate_hz=RATE_HZ)


def test_a_big_endian_wav_file_that_is_cut_is_truncated(tmp_path):
    path = tmp_path / "big.wav"
    soundfile.write(path, np.zeros(1_000, np.int16), RATE_HZ, endian="BIG", subtype="PCM_16")
    assert path.read_bytes()[:4] == b"RIFX" and len(decode(path, rate_hz=RATE_HZ)) == 1_000
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(AudioError, match="is truncated"):
        decode(path, rate_hz=RATE_HZ)


def test_a_chunk_of_odd_length_is_followed_by_a_byte_that_it_does_not_count(tmp_path):
    path = write(tmp_path / "odd.wav", np.arange(1_000, dtype=np.int16))
    whole = path.read_bytes()
    assert whole[36:40] == b"data"
    # Without the byte between, the next chunk would be taken to begin with a zero, and to be ever so long.
    data = bytearray(whole[:36] + b"note" + struct.pack("<I", 3) + b"abc\0" + whole[36:])
    data[4:8] = struct.pack("<I", len(data) - 8)
    path.write_bytes(data)
    assert np.array_equal(decode(path, rate_hz=RATE_HZ), np.arange(1_000))
    path.write_bytes(data[:-1])
    with pytest.raises(AudioError, match=f"its header tells of {len(data)} bytes, the file has {len(data) - 1}"):
        decode(path, rate_hz=RATE_HZ)


def test_ogg_with_any_changed_byte_is_refused_also_in_its_last_page(ogg, tmp_path):
    path, starts = tmp_path / "bit.ogg", pages(ogg)
    anywhere = np.random.default_rng(2).integers(0, len(ogg), 200).tolist()
    for at in [*anywhere, *(start + 26 for start in starts), *range(starts[-1], len(ogg), 97), len(ogg) - 1]:
        data = bytearray(ogg)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises(AudioError, match=r"bit\.ogg: (is damaged|is truncated)"):
            decode(path, rate_hz=RATE_HZ)
    data = bytearray(ogg)
    data[starts[-1] + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(AudioError, match=f"the page of Ogg at byte {starts[-1]} does not match its checksum"):
        decode(path, rate_hz=RATE_HZ)


@given(st.binary(min_size=27, max_size=300))
def test_the_checksum_of_ogg_is_that_of_its_definition(page):
    register = 0
    for byte in page[:22] + bytes(4) + page[26:]:
        register ^= byte << 24
        for _ in range(8):
            register = (register << 1 ^ (0x04C11DB7 if register >> 31 else 0)) & 0xFFFFFFFF
    assert ogg_checksum(page) == struct.pack("<I", register)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_is_named(tmp_path, bad):
    wave = np.zeros(100)
    wave[50] = bad
    with pytest.raises(AudioError, match="NaN or infinite"):
        decode(write(tmp_path / "nan.wav", wave, subtype="FLOAT"), rate_hz=RATE_HZ)


def test_samples_in_some_other_unit_are_named(tmp_path):
    with pytest.raises(AudioError, match="peaks at 20000 where full scale is 1"):
        decode(write(tmp_path / "unit.wav", np.full(100, 20_000.0), subtype="FLOAT"), rate_hz=RATE_HZ)


def test_a_rate_that_no_recording_has_is_named(tmp_path):
    path = write(tmp_path / "rate.wav", np.zeros(100, np.int16))
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", 16)
    path.write_bytes(data)
    with pytest.raises(AudioError, match="claims a rate of 16 Hz; wanted 1000 to 768000"):
        decode(path, rate_hz=RATE_HZ)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_broken_header_is_an_audio_error_and_nothing_else(tmp_path, suffix):
    random = np.random.default_rng(0)
    path = write(tmp_path / f"clip.{suffix}", random.integers(-9000, 9000, 400).astype(np.int16))
    whole = path.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        data[int(random.integers(60))] = int(random.integers(256))
        path.write_bytes(data)
        try:
            decode(path, rate_hz=RATE_HZ)
        except AudioError as error:
            assert error.path == str(path) and str(tmp_path) not in error.reason


def test_a_wave_is_padded_with_silence_and_cropped():
    assert fit_length(np.array([1, 2, 3], np.int16), 5).tolist() == [1, 2, 3, 0, 0]
    assert fit_length(np.array([1, 2, 3], np.int16), 2).tolist() == [1, 2]
    assert fit_length(np.zeros(1, np.int16), 3).dtype == np.int16


def test_an_audio_error_crosses_processes():
    error = pickle.loads(pickle.dumps(AudioError("a.wav", "is empty")))
    assert (error.path, error.reason, str(error)) == ("a.wav", "is empty", "a.wav: is empty")


def test_only_the_rate_and_channels_that_were_asked_for_pass(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros((80, 2)), 8_000, subtype="PCM_16")
    with pytest.raises(AudioError, match=r"a\.wav: has a rate of 8000 Hz; wanted 16000"):
        decode(path, rate_hz=16_000, source_rate_hz=16_000)
    with pytest.raises(AudioError, match=r"a\.wav: has 2 channels; wanted 1"):
        decode(path, rate_hz=16_000, source_channels=1)
    assert len(decode(path, rate_hz=16_000, source_rate_hz=8_000, source_channels=2)) == 160
