"""From a sound file to int16 samples: decode, mix to mono, resample, round. Nothing that is wrong passes in silence."""

import os
import struct
import threading
import zlib
from io import FileIO
from pathlib import Path

import numpy as np
import soundfile
import soxr

#: Floating-point files may overshoot full scale a little; far beyond it they were written in some other unit.
PEAK_LIMIT = 8.0
RATES_HZ = (1_000, 768_000)
#: What is decoded, by libsndfile's names: what the data sets use, and of each it can be told whether its end is there.
#: Of AIFF, AU, W64, RF64, MP3 and others libsndfile reads what is there of a cut file without a word.
FORMATS = ("WAV", "WAVEX", "FLAC", "OGG")
#: Of a page of Ogg (RFC 3533): the flag of the first and of the last page of a stream.
OGG_FIRST, OGG_LAST = 2, 4

#: zlib's CRC takes the bits of a byte in the other order.
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

#: A thread keeps the memory of what it decodes for its next file, up to so many samples: fresh pages are what costs.
KEPT_SAMPLES = 2**21
#: What is resampled at once, so that it stays in the processor's cache from the conversion to the rounding.
PIECE_SAMPLES = 2**15
_OWN = threading.local()


class AudioError(Exception):
    """A sound file that cannot be used."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode(
    path: Path,
    *,
    rate_hz: int,
    source_rate_hz: int | None = None,
    source_channels: int | None = None,
) -> np.ndarray:
    """int16 [samples]: the file as mono at `rate_hz`. A 16-bit mono file of that rate comes through sample for sample.

    Channels are averaged, soxr resamples at its HQ setting, rounding is to nearest without dither, and what then lies
    beyond full scale is clipped. Raises AudioError: not there, unreadable, a format other than `FORMATS`, truncated,
    empty, NaN or infinite, a rate or a level that no recording has, a rate or number of channels other than
    `source_rate_hz` and `source_channels`.
    """
    try:
        with path.open("rb", buffering=0) as opened:
            _check_length(path, opened)
            opened.seek(0)
            with soundfile.SoundFile(opened.fileno(), closefd=False) as file:
                found_rate_hz, channels = file.samplerate, file.channels
                promised, subtype = file.frames, file.subtype
                if file.format not in FORMATS:
                    raise AudioError(str(path), f"is {file.format}; wanted WAV, FLAC or Ogg, convert it to one of them")
                if source_rate_hz is not None and found_rate_hz != source_rate_hz:
                    raise AudioError(str(path), f"has a rate of {found_rate_hz} Hz; wanted {source_rate_hz}")
                if source_channels is not None and channels != source_channels:
                    raise AudioError(str(path), f"has {channels} channels; wanted {source_channels}")
                if subtype == "PCM_16" and channels == 1 and found_rate_hz != rate_hz and promised <= KEPT_SAMPLES:
                    wave_TC = file.read(out=_kept("pcm", promised, np.int16))[:, None]
                else:
                    wave_TC = file.read(dtype="int16" if subtype == "PCM_16" else "float64", always_2d=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise AudioError(str(path), "is not there") from error
    except soundfile.LibsndfileError as error:
        raise AudioError(str(path), f"cannot be decoded: {error.error_string}") from error
    except OSError as error:
        raise AudioError(str(path), f"cannot be read: {error.strerror}") from error
    except (ValueError, MemoryError) as error:
        raise AudioError(str(path), "has a header that cannot be true of it") from error
    if len(wave_TC) == 0:
        raise AudioError(str(path), "holds no samples")
    if len(wave_TC) < promised:
        raise AudioError(str(path), f"is truncated: {len(wave_TC)} of {promised} samples are there")
    if not RATES_HZ[0] <= found_rate_hz <= RATES_HZ[1]:
        raise AudioError(str(path), f"claims a rate of {found_rate_hz} Hz; wanted {RATES_HZ[0]} to {RATES_HZ[1]}")
    if subtype == "PCM_16" and wave_TC.shape[1] == 1:
        return _resampled_int16(path, wave_TC[:, 0], found_rate_hz, rate_hz)
    wave_T = wave_TC.mean(axis=1) / 32768.0 if subtype == "PCM_16" else _mono_float(path, wave_TC)
    if found_rate_hz != rate_hz:
        wave_T = soxr.resample(wave_T, found_rate_hz, rate_hz, quality="HQ")
    if len(wave_T) == 0:
        raise _too_short(path, rate_hz)
    return to_int16(wave_T)


def to_int16(wave_T: np.ndarray) -> np.ndarray:
    """int16 from samples in [-1, 1): nearest, clipped, no dither."""
    return _rounded(wave_T * 32768.0)


def fit_length(wave_T: np.ndarray, samples: int) -> np.ndarray:
    """The first `samples` samples, with silence at the end where there are fewer."""
    return wave_T[:samples] if len(wave_T) >= samples else np.pad(wave_T, (0, samples - len(wave_T)))


def silent_tail(wave: np.ndarray) -> int:
    """How many samples of digital silence end the wave, whoever padded it."""
    if wave[-1]:
        return 0
    sounding = wave[::-1] != 0
    return int(np.argmax(sounding)) if sounding.any() else len(wave)


def _resampled_int16(path: Path, wave_T: np.ndarray, source_rate_hz: int, rate_hz: int) -> np.ndarray:
    """int16 samples at another rate, sample for sample what the general path gives.

    Nothing is scaled, since scaling by a power of two changes no bit of a mantissa; float32 holds 16 bits exactly, and
    soxr computes in float32 at HQ whatever it is given, and the same in pieces as at once.
    """
    if source_rate_hz == rate_hz:
        return wave_T
    stream, float_T = _stream(source_rate_hz, rate_hz), _kept("float", PIECE_SAMPLES, np.float32)
    resampled: list[np.ndarray] = []
    try:
        for low in range(0, len(wave_T), PIECE_SAMPLES):
            piece_T = wave_T[low : low + PIECE_SAMPLES]
            float_T[: len(piece_T)] = piece_T
            last = low + PIECE_SAMPLES >= len(wave_T)
            resampled.append(_rounded(stream.resample_chunk(float_T[: len(piece_T)], last=last)))
    finally:
        stream.clear()
    resampled_T = np.concatenate(resampled)
    if len(resampled_T) == 0:
        raise _too_short(path, rate_hz)
    return resampled_T


def ogg_checksum(page: bytes) -> bytes:
    """The four bytes that a page of Ogg has from byte 22 on: a CRC-32 of the page with zeros there.

    Its polynomial is zlib's, but it takes the highest bit of a byte first and inverts nothing (RFC 3533, section 6).
    """
    head = zlib.crc32((page[:22] + bytes(4)).translate(_REVERSED), 0xFFFFFFFF)
    inverted = zlib.crc32(page[26:].translate(_REVERSED), head)
    return int(f"{inverted ^ 0xFFFFFFFF:032b}"[::-1], 2).to_bytes(4, "little")


def _stream(source_rate_hz: int, rate_hz: int) -> soxr.ResampleStream:
    """This thread's resampler between two rates; one that was used for the last file needs no filters anew."""
    rates = source_rate_hz, rate_hz
    if getattr(_OWN, "rates", None) != rates:
        _OWN.rates, _OWN.stream = rates, soxr.ResampleStream(*rates, 1, dtype="float32", quality="HQ")
    return _OWN.stream


def _kept(name: str, samples: int, dtype: type[np.generic]) -> np.ndarray:
    """This thread's own memory for `samples` samples, with whatever it held before; valid until the next call."""
    if not hasattr(_OWN, name):
        setattr(_OWN, name, np.empty(KEPT_SAMPLES, dtype))
    return getattr(_OWN, name)[:samples]


def _rounded(scaled_T: np.ndarray) -> np.ndarray:
    """int16 from samples in [-32768, 32768); `scaled_T` is overwritten."""
    np.rint(scaled_T, out=scaled_T)
    np.clip(scaled_T, -32768, 32767, out=scaled_T)
    return scaled_T.astype(np.int16)


def _too_short(path: Path, rate_hz: int) -> AudioError:
    return AudioError(str(path), f"is too short: no sample is left at {rate_hz} Hz")


def _mono_float(path: Path, wave_TC: np.ndarray) -> np.ndarray:
    """The channels' mean of samples that may be anything that a float can be."""
    if not np.isfinite(wave_TC).all():
        raise AudioError(str(path), "holds samples that are NaN or infinite")
    peak = float(np.abs(wave_TC).max())
    if peak > PEAK_LIMIT:
        raise AudioError(str(path), f"peaks at {peak:.6g} where full scale is 1; its samples have some other unit")
    return wave_TC.mean(axis=1)


def _check_length(path: Path, file: FileIO) -> None:
    """A WAV or Ogg file says where it ends; libsndfile reads what is there of a cut one without a word."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise AudioError(str(path), "is empty (0 bytes)")
    head = file.read(12)
    if head[:4] in (b"RIFF", b"RIFX") and head[8:] == b"WAVE":
        _check_riff_length(path, file, size, order="<" if head[:4] == b"RIFF" else ">")
    elif head[:4] == b"OggS":
        _check_ogg_pages(path, file, size)


def _check_riff_length(path: Path, file: FileIO, size: int, *, order: str) -> None:
    position = 12
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack(f"{order}4sI", file.read(8))
        position += 8 + length
        if name == b"data":
            break
        position += length % 2
    if position > size:
        raise AudioError(str(path), f"is truncated: its header tells of {position} bytes, the file has {size}")


def _check_ogg_pages(path: Path, file: FileIO, size: int) -> None:
    """That the pages follow one another without a gap and match their checksums, and that every stream has its last one
    (RFC 3533, section 6). libogg leaves out a page that does not match: were it the last one, nobody would miss it.
    """
    position = 0
    next_page: dict[int, int] = {}  # of every stream that is open, by its serial number
    while position < size:
        file.seek(position)
        head = file.read(27 + 255)
        if len(head) < 27 or head[:4] != b"OggS":
            raise AudioError(str(path), f"is truncated or damaged: there is no page of Ogg at byte {position}")
        flags, serial, number, segments = head[5], *struct.unpack("<II", head[14:22]), head[26]
        if number != next_page.get(serial, 0 if flags & OGG_FIRST else -1):
            raise AudioError(str(path), f"is damaged: pages of Ogg are missing before byte {position}")
        length = 27 + segments + sum(head[27 : 27 + segments])
        page = (head + file.read(max(0, length - len(head))))[:length]
        if len(page) == length and ogg_checksum(page) != page[22:26]:
            raise AudioError(str(path), f"is damaged: the page of Ogg at byte {position} does not match its checksum")
        position += length
        if flags & OGG_LAST:
            next_page.pop(serial, None)
        else:
            next_page[serial] = number + 1
    if position > size:
        raise AudioError(str(path), f"is truncated: its last page tells of {position} bytes, the file has {size}")
    if next_page:
        raise AudioError(str(path), "is truncated: the page that ends an Ogg stream is not there")
