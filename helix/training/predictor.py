"""What a trained model hears in a sound file: decoded, resampled, cut and batched as in its evaluation.

A model is two files: its weights (safetensors) and what they belong to (JSON: the resolved spec, the names of the
classes, the sha256 of the weights). Nothing that is read here can run code.

Legend: B clips, T samples, C classes.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from helix.data.audio import decode, fit_length, silent_tail
from helix.data.dataset import Dataset
from helix.data.loader import FULL_SCALE
from helix.models.classifier import build_classifier
from helix.registry import DATASETS
from helix.spec import from_json
from helix.training.precision import precision_of
from helix.training.step import logits_of


class Predictor:
    """A trained classifier that is given sound files. `classes` are the names of its C classes."""

    def __init__(self, described: dict[str, Any], weights: bytes, *, device: str = "cpu"):
        """`described` is what `describe` gave. Raises ValueError where the weights are not those that it names."""
        found = hashlib.sha256(weights).hexdigest()
        if found != described["weights_sha256"]:
            raise ValueError(
                f"the weights have the sha256 {found}; wanted {described['weights_sha256']}, so they are damaged or of "
                "another model"
            )
        self.spec, self.classes, self.device = from_json(described["spec"]), tuple(described["classes"]), device
        self.dataset: Dataset = DATASETS.make(self.spec.data.dataset, self.spec.data.options)
        with torch.random.fork_rng(devices=[]):
            self.model = build_classifier(self.spec.model, self.spec.protocol, classes=len(self.classes))
        try:
            self.model.load_state_dict(load(weights))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"the weights do not fit the model of their spec: {error}") from error
        self.model.to(device).eval()
        # A model that was trained with TF32 is asked on any device; where there is none, float32 is the nearest.
        on_cuda = torch.device(device).type == "cuda"
        self.precision = self.spec.training.precision if on_cuda else "fp32"

    @classmethod
    def read(cls, weights: Path, described: Path, *, device: str = "cpu") -> "Predictor":
        """The model in two files."""
        return cls(json.loads(described.read_text(encoding="utf-8")), weights.read_bytes(), device=device)

    @torch.no_grad()
    def probabilities(self, sounds: Sequence[Path | bytes]) -> np.ndarray:
        """float32 [B, C], rows that sum to 1: each sound is the path or the bytes of a WAV, FLAC or Ogg file.

        A sound is one clip of the data set: what is longer is cut, what is shorter ends in silence. Raises AudioError.
        """
        size = self.spec.training.batch_size
        rows = [self._batch([self._wave(one) for one in sounds[at : at + size]]) for at in range(0, len(sounds), size)]
        return np.concatenate(rows) if rows else np.zeros((0, len(self.classes)), np.float32)

    def _wave(self, sound: Path | bytes) -> np.ndarray:
        """int16 [samples] at the rate of the data set, as long as the file."""
        if isinstance(sound, Path):
            return decode(sound, rate_hz=self.dataset.rate_hz)
        with tempfile.TemporaryDirectory() as folder:  # whether a file is whole is told by its size on a disk
            path = Path(folder, "sound")
            path.write_bytes(sound)
            return decode(path, rate_hz=self.dataset.rate_hz)

    def _batch(self, waves: Sequence[np.ndarray]) -> np.ndarray:
        samples = self.dataset.clip_samples
        sounding_B = [max(1, min(len(wave) - silent_tail(wave), samples)) for wave in waves]
        pcm_BT = np.stack([fit_length(wave, samples) for wave in waves]).astype(np.float32)
        wave_BT = torch.from_numpy(pcm_BT).mul_(FULL_SCALE).to(self.device)
        samples_B = torch.tensor(sounding_B, device=self.device)
        with precision_of(self.precision, self.device):
            logits_BC = logits_of(self.model, self.model.features(wave_BT), samples_B, self.spec)
        return logits_BC.softmax(dim=1).cpu().numpy()


def describe(spec: dict[str, Any], classes: Sequence[str], *, weights_sha256: str, **said: Any) -> dict[str, Any]:
    """What a model's weights belong to, as JSON values. `spec` is a resolved one; `said` is kept for readers."""
    return {**said, "spec": spec, "classes": list(classes), "weights_sha256": weights_sha256}
