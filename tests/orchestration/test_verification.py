"""What is stored is read back: a trial's JSON, its spec against its name, and its checkpoints."""

import json

import pytest

from helix.data.shards import Recordings
from helix.spec import TrialSpec
from helix.storage import Storage
from helix.training.trainer import Fit, fit
from orchestration.verification import verify_storage


@pytest.fixture
def trial(tiny_spec: TrialSpec, tiny_data: Recordings, storage: Storage) -> str:
    """The folder of a trained trial."""
    fit(tiny_spec, tiny_data, Fit(storage=storage))
    (name,) = storage.children("trials")
    return f"trials/{name}"


def test_a_sound_trial_is_sound(trial, storage):
    found = verify_storage(storage)
    assert found.sound == [trial] and found.damaged == [] == found.unfinished
    assert verify_storage(storage, "tones").sound == []


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_changed_checkpoint_is_named(trial, storage, name):
    (step,) = storage.children(f"{trial}/checkpoints")
    key = f"{trial}/checkpoints/{step}/{name}"
    data = bytearray(storage.get(key))
    data[-5] ^= 1
    storage.put(key, bytes(data))
    (line,) = verify_storage(storage).damaged
    assert line.startswith(f"{trial}/checkpoints/{step}: ") and ("does not match" in line or "manifest" in line)


def test_a_spec_that_is_not_the_trials_is_named(trial, storage):
    spec = json.loads(storage.get(f"{trial}/spec.json"))
    spec["spec"]["seed"] += 1
    storage.put_json(f"{trial}/spec.json", spec)
    (line,) = verify_storage(storage).damaged
    assert line.startswith(f"{trial}/spec.json: is not the spec that")


def test_json_that_is_none_is_named(trial, storage):
    storage.put(f"{trial}/result.json", storage.get(f"{trial}/result.json")[:-5])
    (line,) = verify_storage(storage).damaged
    assert line.startswith(f"{trial}/result.json: is not JSON")
