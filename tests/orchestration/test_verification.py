"""What is stored is read back: a trial's JSON, its spec against its name, and its checkpoints."""

import json

import pytest

from helix.data.shards import Recordings, prepare
from helix.spec import TrialSpec
from helix.storage import Storage, is_sealed, open_storage, sealed
from helix.training.trainer import Fit, fit
from orchestration import cli
from orchestration.ledger import Records, read_certificates
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


def test_a_result_that_nobody_wrote_is_named(storage):
    storage.put_json("trials/0123456789abcdef/result.json", {"accuracy": {"last": 1.0}, "rows": []})
    assert verify_storage(storage).damaged == [
        "trials/0123456789abcdef/result.json: does not match its own checksum",
        "trials/0123456789abcdef/spec.json: is not there beside result.json",
    ]


def test_a_result_with_a_changed_number_is_named(trial, storage):
    result = storage.get_json(f"{trial}/result.json")
    assert is_sealed(result)
    storage.put_json(f"{trial}/result.json", result | {"best_epoch": {}})
    assert verify_storage(storage).damaged == [f"{trial}/result.json: does not match its own checksum"]
    body = {key: value for key, value in result.items() if key != "sha256"}
    storage.put_json(f"{trial}/result.json", sealed(body | {"trial_id": "another"}))
    assert verify_storage(storage).damaged == [f"{trial}/result.json: is of trial another"]


def test_a_trial_without_its_spec_is_named(trial, storage):
    storage.delete(f"{trial}/spec.json")
    (line,) = verify_storage(storage).damaged
    assert line == f"{trial}/spec.json: is not there beside result.json, metrics, checkpoints, best"


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_changed_best_weights_are_named(trial, storage, name):
    data = bytearray(storage.get(f"{trial}/best/{name}"))
    data[-5] ^= 1
    storage.put(f"{trial}/best/{name}", bytes(data))
    (line,) = verify_storage(storage).damaged
    assert line.startswith(f"{trial}/best: ")


def test_rows_and_attempts_under_another_name_and_files_that_no_trial_has_are_named(trial, storage):
    storage.put(f"{trial}/metrics/epoch-0009.json", storage.get(f"{trial}/metrics/epoch-0001.json"))
    storage.put_json(f"{trial}/attempts/a.json", {"attempt_id": "b"})
    storage.put(f"{trial}/leases/000001.json", b"[]")
    storage.put(f"{trial}/notes.txt", b"hello")
    storage.put(f"{trial}/metrics/.DS_Store", b"\0")  # a file browser's own
    storage.put(f"{trial}/heartbeat.json", b"{")
    assert [line.removeprefix(f"{trial}/").partition(" (")[0] for line in verify_storage(storage).damaged] == [
        "heartbeat.json: is not JSON",
        "notes.txt: is none of the files that a trial has",
        "attempts/a.json: is of attempt b",
        "leases/000001.json: is no JSON object",
        "metrics/epoch-0009.json: is the row of epoch 1",
    ]


def test_what_was_moved_aside_is_read_too(trial, storage):
    aside = f"{trial}/aside/20260101-000000-abcdef"
    for name in ("checkpoints", "best", "metrics"):
        for key in list(storage.keys(f"{trial}/{name}")):
            storage.put(f"{aside}/{key.removeprefix(f'{trial}/')}", storage.get(key))
    assert verify_storage(storage).damaged == []
    (step,) = storage.children(f"{aside}/checkpoints")
    storage.put(f"{aside}/checkpoints/{step}/model.safetensors", b"")
    (line,) = verify_storage(storage).damaged
    assert line.startswith(f"{aside}/checkpoints/{step}: ")


@pytest.mark.parametrize("receipt", [b"{", b"[]", b"{}", None])
def test_a_damaged_receipt_is_named_and_mended_by_preparing_again(storage, receipt):
    options = {"clips_per_class": 4}
    prefix = prepare("tones", options, source=None, storage=storage, shard_mib=0.5).prefix
    key = f"{prefix}/shards/00000.json"
    whole = storage.get(key)
    assert verify_storage(storage).damaged == []
    storage.delete(key)
    if receipt is not None:
        storage.put(key, receipt)
    assert verify_storage(storage).damaged == [f"{key}: is gone or has other bytes"]
    prepare("tones", options, source=None, storage=storage, shard_mib=0.5)
    assert storage.get(key) == whole and verify_storage(storage).damaged == []


@pytest.mark.parametrize("name", ["spec.json", "result.json", "metrics/epoch-0001.json"])
def test_a_number_that_is_none_is_a_damage_and_no_traceback(trial, storage, name):
    storage.put(f"{trial}/{name}", b'{"epoch":NaN}')
    (line,) = verify_storage(storage).damaged
    assert line.startswith(f"{trial}/{name}: ")


def test_a_certificate_that_is_cut_is_named(storage):
    storage.put("certificates/0123.json", b'{"verdict"')
    (line,) = verify_storage(storage).damaged
    assert line.startswith("certificates/0123.json: is not JSON")


def test_a_certificate_that_lacks_what_is_read_is_named_everywhere_and_counts_nowhere(storage, make_certificate):
    storage.put_json("certificates/c1.json", make_certificate("c1", "0123456789abcdef"))
    assert verify_storage(storage).damaged == []
    broken = make_certificate("c2", "0123456789abcdef")
    storage.put_json("certificates/c2.json", {name: value for name, value in broken.items() if name != "made"})
    storage.put_json("certificates/c3.json", broken | {"versions": "2.13.0"})
    named = verify_storage(storage).damaged
    assert named[0] == "certificates/c2.json: has no made"
    assert named[1].startswith("certificates/c3.json: has '2.13.0' for versions, wanted an object with torch")
    records = Records(storage, tolerant=True)
    assert [one["certificate_id"] for one in read_certificates(records)] == ["c1"]
    assert records.damage == named


def test_new_best_weights_beside_an_old_manifest_are_no_damage_while_the_trial_is_open(trial, storage):
    storage.put(f"{trial}/best/model.safetensors", b"half")
    assert len(verify_storage(storage).damaged) == 1
    storage.delete(f"{trial}/result.json")
    assert verify_storage(storage).damaged == []
