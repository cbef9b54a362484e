"""Ways that others read clips, each as a function from recordings to a batch, imported where they are installed.

- webdataset: a stream over a tar of FLAC files or of int16 samples.
- litdata: random access to int16 samples in its chunks.
- The path of the paper's authors: soundfile reads one file of 44.1 kHz, a torchaudio resampler is built, and used once.

Each gives float32 [B, T] in [-1, 1) out of one process, so that the work is the same. B batch, T samples.
"""

import importlib
import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from helix.peers import MissingPeerError

#: The wave of each clip that is asked for, by its number, as one batch; a stream takes the next ones instead.
Read = Callable[[Sequence[int]], Tensor]

WEBDATASET = "pip install -c constraints.txt webdataset"
LITDATA = (
    "pip install -c constraints.txt --no-deps --target peers-litdata litdata lightning-utilities obstore tifffile, "
    "then PYTHONPATH=peers-litdata (as a whole it brings torchvision)"
)
TORCHAUDIO = "make .venv/.ready-peers"


def webdataset_stream(folder: Path, waves: Sequence[np.ndarray], *, rate_hz: int, form: str) -> Read:
    """A tar of `waves`, int16 [samples] each, as "flac" or "int16", read round and round."""
    try:
        webdataset: Any = importlib.import_module("webdataset")
    except ImportError as error:
        raise MissingPeerError(f"{WEBDATASET} ({error})") from error
    path = folder / f"{form}.tar"
    with tarfile.open(path, "w") as archive:
        for number, wave in enumerate(waves):
            data = wave.tobytes() if form == "int16" else _flac(wave, rate_hz)
            entry = tarfile.TarInfo(f"{number:06d}.{form}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    decode = _decoded_flac if form == "flac" else _from_bytes

    def stream() -> Iterator[np.ndarray]:
        for sample in webdataset.WebDataset(str(path), shardshuffle=False).repeat():
            yield decode(sample[form])

    items = stream()
    return lambda numbers: _batch([next(items) for _ in numbers])


def litdata_random(folder: Path, waves: Sequence[np.ndarray]) -> Read:
    """Chunks of `waves`, int16 [samples] each."""
    try:
        litdata: Any = importlib.import_module("litdata")
        writing: Any = importlib.import_module("litdata.streaming.writer")
    except ImportError as error:
        raise MissingPeerError(f"{LITDATA} ({error})") from error
    writer = writing.BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, wave in enumerate(waves):
        writer[number] = wave
    writer.done()
    writer.merge(1)
    items = litdata.StreamingDataset(str(folder))
    return lambda numbers: _batch([items[number] for number in numbers])


def authors_path(paths: Sequence[Path], *, rate_hz: int, parts: int = 1) -> Read:
    """Files at another rate, decoded and resampled when they are asked for; `parts` of them one after the other."""
    try:
        resample: Any = importlib.import_module("torchaudio.transforms").Resample
    except (ImportError, OSError) as error:  # a torchaudio of another torch cannot load its libraries
        raise MissingPeerError(f"{TORCHAUDIO} ({str(error).splitlines()[0]})") from error

    def one(number: int) -> Tensor:
        wave_T, found_hz = soundfile.read(paths[number], dtype="float32")
        return resample(found_hz, rate_hz)(torch.from_numpy(wave_T))

    def read(numbers: Sequence[int]) -> Tensor:
        waves = [one(number) for number in numbers]
        return torch.stack([torch.cat(waves[low : low + parts]) for low in range(0, len(waves), parts)])

    return read


def _batch(waves: Sequence[np.ndarray]) -> Tensor:
    """float32 [B, T] from int16 or float32 waves."""
    wave_BT = torch.from_numpy(np.stack(waves))
    return wave_BT if wave_BT.dtype == torch.float32 else wave_BT.to(torch.float32).mul_(1 / 32768)


def _flac(wave: np.ndarray, rate_hz: int) -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, wave, rate_hz, format="FLAC", subtype="PCM_16")
    return sink.getvalue()


def _decoded_flac(data: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(data), dtype="float32")[0]


def _from_bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<i2")
