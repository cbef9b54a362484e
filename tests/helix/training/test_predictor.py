"""A trained model and a sound file: what it hears is what it heard in its evaluation."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save

from helix.data.audio import AudioError
from helix.data.shards import Recordings
from helix.models.classifier import build_classifier
from helix.protocol import profile
from helix.spec import TrialSpec, resolve, to_json
from helix.storage import Storage
from helix.training.checkpoint import best_manifest
from helix.training.predictor import Predictor, describe
from helix.training.trainer import Fit, fit, trial_folder
from orchestration.grid import VARIANTS
from tests.conftest import with_training


@pytest.fixture
def finished(tiny_spec: TrialSpec, tiny_data: Recordings, storage: Storage):
    """(predictor, result) of a trial of two epochs."""
    result = fit(with_training(tiny_spec, epochs=2), tiny_data, Fit(storage=storage))
    folder = trial_folder(result["trial_id"])
    body = best_manifest(storage, folder)
    assert body is not None
    weights = storage.get(f"{folder}/best/model.safetensors")
    said = describe(
        storage.get_json(f"{folder}/spec.json")["spec"],
        tiny_data.classes,
        weights_sha256=body["files"]["model.safetensors"]["sha256"],
    )
    return Predictor(json.loads(json.dumps(said)), weights), result


def wav(path: Path, wave_T: np.ndarray, rate_hz: int = 16_000) -> Path:
    soundfile.write(path, wave_T, rate_hz, subtype="PCM_16")
    return path


def test_files_are_taken_for_what_the_evaluation_of_the_chosen_epoch_took_them_for(
    finished, tiny_data: Recordings, tmp_path: Path
):
    predictor, result = finished
    index = tiny_data.index
    rows = np.flatnonzero(index.fold == 1)
    paths = [wav(tmp_path / f"{row}.wav", tiny_data.wave(row)) for row in rows]
    given_BC = predictor.probabilities(paths)
    pairs, counts = np.unique(
        np.stack([index.label[rows], given_BC.argmax(axis=1)], axis=1), axis=0, return_counts=True
    )
    confusion = [[int(a), int(b), int(n)] for (a, b), n in zip(pairs, counts, strict=True)]
    assert confusion == result["selected_confusion"]
    assert sum(n for _, _, n in confusion) == result["test_clips"] == len(rows)
    right = sum(n for label, guess, n in confusion if label == guess)
    assert right / len(rows) == result["accuracy"]["best_test"]
    assert result["rows"][result["selected_epoch"] - 1]["test_accuracy"] == result["accuracy"]["best_test"]
    np.testing.assert_allclose(given_BC.sum(axis=1), 1, rtol=1e-5)


def test_bytes_are_heard_like_the_file_and_alone_like_in_company(finished, tiny_data: Recordings, tmp_path: Path):
    predictor, _ = finished
    paths = [wav(tmp_path / f"{row}.wav", tiny_data.wave(row)) for row in range(3)]
    together = predictor.probabilities(paths)
    assert np.array_equal(predictor.probabilities([path.read_bytes() for path in paths]), together)
    alone = np.concatenate([predictor.probabilities([path]) for path in paths])
    np.testing.assert_allclose(alone, together, atol=1e-5)
    assert predictor.probabilities([]).shape == (0, 6)


def test_other_rates_and_channels_are_mixed_and_resampled_as_in_preparation(
    finished, tiny_data: Recordings, tmp_path: Path
):
    predictor, _ = finished
    wave_T = tiny_data.wave(0)
    stereo = wav(tmp_path / "stereo.wav", np.stack([wave_T, wave_T], axis=1))
    mono = wav(tmp_path / "mono.wav", wave_T)
    assert np.array_equal(predictor.probabilities([stereo]), predictor.probabilities([mono]))
    upsampled = np.repeat(wave_T, 3)  # crude, and yet the same tones
    faster = wav(tmp_path / "48k.wav", upsampled, 48_000)
    np.testing.assert_allclose(predictor.probabilities([faster]), predictor.probabilities([mono]), atol=0.1)


def test_what_is_too_long_is_cut_and_what_is_too_short_ends_in_silence(finished, tiny_data, tmp_path: Path):
    predictor, _ = finished
    wave_T = tiny_data.wave(0)
    whole = predictor.probabilities([wav(tmp_path / "whole.wav", wave_T)])
    longer = predictor.probabilities([wav(tmp_path / "longer.wav", np.concatenate([wave_T, wave_T]))])
    assert np.array_equal(whole, longer)
    short = wav(tmp_path / "short.wav", wave_T[:9_000])
    padded = wav(tmp_path / "padded.wav", np.concatenate([wave_T[:9_000], np.zeros(15_576, np.int16)]))
    assert np.array_equal(predictor.probabilities([short]), predictor.probabilities([padded]))
    assert not np.array_equal(predictor.probabilities([short]), whole)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_predicts_with_padding_masked_as_well(variant, tiny_spec, tiny_data, tmp_path: Path):
    model = replace(tiny_spec.model, frontend=variant.frontend, pattern=variant.pattern[2:4], options={})
    spec = resolve(replace(tiny_spec, model=model, protocol=replace(profile("paper"), pad_mask="clip")))
    weights = save(build_classifier(spec.model, spec.protocol, classes=6).state_dict())
    said = describe(to_json(spec), tiny_data.classes, weights_sha256=hashlib.sha256(weights).hexdigest())
    predictor = Predictor(said, weights)
    wave_T = tiny_data.wave(0)[:12_000]
    short = wav(tmp_path / "short.wav", wave_T)
    given_BC = predictor.probabilities([short])
    assert given_BC.shape == (1, 6) and np.isfinite(given_BC).all()
    noisy = wav(tmp_path / "noisy.wav", np.concatenate([wave_T, tiny_data.wave(1)[12_000:]]))
    assert not np.array_equal(given_BC, predictor.probabilities([noisy]))


def test_weights_that_are_not_those_that_were_described_are_refused(finished, tiny_spec, tiny_data):
    spec = to_json(resolve(tiny_spec))
    weights = save({"other": torch.zeros(3)})
    sha256 = hashlib.sha256(weights).hexdigest()
    with pytest.raises(ValueError, match="wanted 00"):
        Predictor(describe(spec, tiny_data.classes, weights_sha256="00"), weights)
    with pytest.raises(ValueError, match="do not fit the model"):
        Predictor(describe(spec, tiny_data.classes, weights_sha256=sha256), weights)


@pytest.mark.parametrize("data", [b"", b"RIFF", b"no sound at all, and long enough to be looked into"])
def test_what_is_no_sound_is_an_error_and_no_class(finished, data: bytes):
    predictor, _ = finished
    with pytest.raises(AudioError):
        predictor.probabilities([data])


def test_predicting_draws_nothing_from_the_generator_of_others(finished, tiny_spec, tiny_data):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    spec = resolve(tiny_spec)
    weights = finished[0].model.state_dict()
    data = save(weights)
    Predictor(describe(to_json(spec), tiny_data.classes, weights_sha256=hashlib.sha256(data).hexdigest()), data)
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_was_trained_with_tf32_is_asked_on_a_cpu_too(finished, tiny_data: Recordings, tmp_path: Path):
    predictor, _ = finished
    path = wav(tmp_path / "one.wav", tiny_data.wave(0))
    spec = replace(predictor.spec, training=replace(predictor.spec.training, precision="tf32"))
    weights = save({name: value.contiguous() for name, value in predictor.model.state_dict().items()})
    said = describe(to_json(spec), predictor.classes, weights_sha256=hashlib.sha256(weights).hexdigest())
    assert np.array_equal(Predictor(said, weights).probabilities([path]), predictor.probabilities([path]))
