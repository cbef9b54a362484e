"""What is stored is read back: a trial's JSON, its spec against its name, and its checkpoints."""

import json

import pytest

from helix.data.shards import Recordings, prepare
from helix.spec import TrialSpec
from helix.storage import Storage, open_storage
from helix.training.trainer import Fit, fit
from orchestration import cli
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


@pytest.mark.service
def test_what_is_in_a_bucket_is_verified_and_its_damage_is_named(s3_address, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    storage = open_storage(s3_address)
    prefix = prepare("tones", {"clips_per_class": 4}, source=None, storage=storage, shard_mib=0.25).prefix
    assert cli.main(["verify", "--storage", s3_address]) == 0
    assert f"whole    {prefix}: tones, 24 recordings" in capsys.readouterr().out
    data = bytearray(storage.get(f"{prefix}/shards/00001.bin"))
    data[7] ^= 1
    storage.put(f"{prefix}/shards/00001.bin", bytes(data))
    storage.delete(f"{prefix}/shards/00000.bin")
    assert cli.main(["verify", "--storage", s3_address]) == 1
    said = capsys.readouterr().out
    assert [f"damaged  {prefix}/shards/0000{number}.bin" in said for number in (0, 1, 2)] == [True, True, False]
