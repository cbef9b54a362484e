"""Preparation: published whole or not at all, the same bytes whatever happened on the way, no wrong byte read."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helix.data.dataset import DatasetError
from helix.data.datasets import esc50
from helix.data.shards import CorruptShardError, ShardTask, find, open_prepared, prepare, write_shard
from helix.registry import DATASETS
from helix.storage import Storage

OPTIONS = {"clips_per_class": 4}
PREFIX = "data/tones-"


def prepare_tones(storage: Storage, **how):
    return prepare("tones", OPTIONS, source=None, storage=storage, shard_mib=0.2, **how)


def contents(storage: Storage) -> dict[str, bytes]:
    return {key: storage.get(key) for key in storage.keys("data")}


def flip_bit(storage: Storage, key: str, position: int = 1000) -> None:
    data = bytearray(storage.get(key))
    data[position] ^= 1
    storage.put(key, bytes(data))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of an undisturbed preparation: 24 clips, 4 to a shard."""
    storage = Storage(tmp_path_factory.mktemp("whole"))
    prepare_tones(storage)
    found = contents(storage)
    assert sum(key.endswith(".bin") for key in found) == 6
    return found


@pytest.fixture
def prepared(whole: dict[str, bytes], storage: Storage) -> tuple[Storage, str]:
    for key, data in whole.items():
        storage.put(key, data)
    return storage, find(storage, "tones", OPTIONS)[0].prefix


class KilledError(Exception):
    pass


def killed_after(shards: int):
    """A map that dies after so many shards."""

    def run(function, tasks):
        for number, task in enumerate(tasks):
            if number == shards:
                raise KilledError
            yield function(task)

    return run


def backwards(function, tasks):
    return [function(task) for task in reversed(list(tasks))]


def with_threads(function, tasks):
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(function, tasks))


def through_pickle(function, tasks):
    return [
        pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(function))(pickle.loads(pickle.dumps(task)))))
        for task in tasks
    ]


@pytest.mark.parametrize("run", [backwards, with_threads, through_pickle])
def test_who_writes_the_shards_and_in_which_order_does_not_matter(storage, whole, run):
    prepare_tones(storage, run=run)
    assert contents(storage) == whole


@pytest.mark.parametrize("shards", [0, 1, 5])
def test_a_killed_preparation_is_not_prepared_and_ends_the_same(storage, whole, shards):
    with pytest.raises(KilledError):
        prepare_tones(storage, run=killed_after(shards))
    assert find(storage, "tones", OPTIONS) == []
    prepare_tones(storage)
    assert contents(storage) == whole


def test_finished_shards_are_left_alone(storage):
    with pytest.raises(KilledError):
        prepare_tones(storage, run=killed_after(3))
    stood = {key: storage.path(key).stat().st_mtime_ns for key in storage.keys("data") if key.endswith(".bin")}
    prepare_tones(storage)
    assert len(stood) == 3
    assert all(storage.path(key).stat().st_mtime_ns == changed for key, changed in stood.items())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_damaged_a_second_run_repairs(tmp_path_factory, whole, data):
    storage = Storage(tmp_path_factory.mktemp("damaged"))
    for key, content in whole.items():
        damage = data.draw(st.sampled_from(["whole", "gone", "truncated", "flipped"]), label=key)
        if damage == "truncated" and key.endswith(".bin"):
            storage.put(key, content[: len(content) // 2])
        elif damage == "flipped" and key.endswith((".bin", ".parquet")):
            storage.put(key, content)
            flip_bit(storage, key)
        elif damage != "gone":
            storage.put(key, content)
    prepare_tones(storage)
    assert contents(storage) == whole


def test_without_a_manifest_nothing_is_prepared(prepared):
    storage, prefix = prepared
    storage.delete(f"{prefix}/manifest.json")
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json, so it is not prepared"):
        open_prepared(storage, prefix)
    assert find(storage, "tones", OPTIONS) == []


def test_a_changed_byte_is_caught_where_it_is_read(prepared):
    storage, prefix = prepared
    flip_bit(storage, f"{prefix}/shards/00001.bin", position=2 * 24_576 + 6)
    recordings = open_prepared(storage, prefix)
    recordings.wave(4)
    with pytest.raises(CorruptShardError, match=r"shards/00001\.bin: the bytes of recording .* changed") as caught:
        recordings.wave(5)
    assert str(recordings.index.recording_id[5]) in str(caught.value)
    assert "prepare the data set again" in str(pickle.loads(pickle.dumps(caught.value)))


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_shard_of_the_wrong_size_is_caught_at_opening(prepared, damage):
    storage, prefix = prepared
    key = f"{prefix}/shards/00002.bin"
    if damage == "gone":
        storage.delete(key)
    else:
        storage.put(key, storage.get(key)[:-2])
    with pytest.raises(CorruptShardError, match=r"shards/00002\.bin: the shard (is not there|has 196606 bytes)"):
        open_prepared(storage, prefix)


def test_a_changed_index_is_caught_at_opening(prepared):
    storage, prefix = prepared
    flip_bit(storage, f"{prefix}/index.parquet")
    with pytest.raises(CorruptShardError, match=r"index\.parquet: the index is not the one that was published"):
        open_prepared(storage, prefix)


def test_a_manifest_that_is_no_json_is_caught(prepared):
    storage, prefix = prepared
    storage.put(f"{prefix}/manifest.json", b"{")
    with pytest.raises(CorruptShardError, match=r"manifest\.json: is not JSON"):
        open_prepared(storage, prefix)


def test_other_options_and_other_shards_lie_in_other_folders(prepared):
    storage, prefix = prepared
    other = prepare("tones", {**OPTIONS, "seed": 1}, source=None, storage=storage)
    larger = prepare("tones", OPTIONS, source=None, storage=storage)
    assert len({prefix, other.prefix, larger.prefix}) == 3
    assert len({found.manifest_sha256 for found in find(storage, "tones", OPTIONS)}) == 2
    assert [found.prefix for found in find(storage, "tones", {**OPTIONS, "seed": 1})] == [other.prefix]
    assert find(storage, "tones") == []


def test_a_part_never_overwrites_the_whole(esc50_layout, storage):
    layout = esc50_layout(folds=[1, 2], labels=[0, 1])
    first = prepare("esc50", source=layout, storage=storage, allow_partial=True)
    sorted((layout / "audio").iterdir())[0].unlink()
    second = prepare("esc50", source=layout, storage=storage, allow_partial=True)
    assert first.prefix != second.prefix and first.manifest_sha256 != second.manifest_sha256
    assert (first.manifest["recordings"], second.manifest["recordings"]) == (8, 7)
    assert [found.manifest_sha256 for found in find(storage, "esc50")].count(first.manifest_sha256) == 1


def test_a_set_without_its_bad_clips_is_not_taken_for_a_good_one(esc50_layout, storage, monkeypatch):
    monkeypatch.setattr(esc50, "PER_CLASS_AND_FOLD", 1)
    layout = esc50_layout(folds=range(1, 6), per_cell=1, samples=1)
    bad = sorted((layout / "audio").iterdir())[0]
    bad.write_bytes(b"noise")
    prepare("esc50", source=layout, storage=storage, allow_partial=True)
    with pytest.raises(DatasetError, match=r"was prepared without some recordings(.|\n)*cannot be decoded"):
        prepare("esc50", source=layout, storage=storage)


def test_damage_that_the_source_cannot_mend_is_an_error(esc50_layout, storage):
    layout = esc50_layout(folds=[1], labels=[0, 1])
    prepared = prepare("esc50", source=layout, storage=storage, allow_partial=True)
    storage.delete(f"{prepared.prefix}/shards/00000.bin")
    changed = sorted((layout / "audio").iterdir())[0]
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    with pytest.raises(DatasetError, match="does not give the published bytes again"):
        prepare("esc50", source=layout, storage=storage, allow_partial=True)


def test_the_manifest_says_what_there_is(whole):
    manifest = json.loads(next(data for key, data in whole.items() if key.endswith("manifest.json")))
    assert manifest["recordings"] == manifest["expected_recordings"] == 24
    assert manifest["partial"] is False and manifest["missing"] == {} and manifest["shortfall"] == []
    assert manifest["seconds"] == 24 * 24_576 / 16_000
    assert manifest["recordings_per_class"] == dict.fromkeys(sorted(manifest["classes"]), 4)
    assert manifest["recordings_per_fold"] == {"1": 6, "2": 6, "3": 6, "4": 6}
    assert sum(shard["bytes"] for shard in manifest["shards"]) == 2 * 24 * 24_576


def test_digital_silence_at_the_end_counts_as_padding(esc50_layout, storage):
    layout = esc50_layout(folds=[1], labels=[0], per_cell=2, samples=20_000)
    manifest = prepare("esc50", source=layout, storage=storage, allow_partial=True).manifest
    assert manifest["padded_fraction"] == pytest.approx(0.75, abs=1e-4)


def test_a_reader_crosses_processes(tones):
    again = pickle.loads(pickle.dumps(tones))
    assert np.array_equal(again.wave(3), tones.wave(3))
    assert again.manifest_sha256 == tones.manifest_sha256


def test_the_index_has_the_types_it_promises(tones):
    index = tones.index
    assert index.label.dtype.kind == index.fold.dtype.kind == index.offset.dtype.kind == "i"
    assert all(isinstance(name, str) for name in index.recording_id)
    assert list(index.speaker) == [None] * len(index) == list(index.source_sha256)


def test_a_wave_cannot_be_changed_through_the_reader(tones):
    with pytest.raises(ValueError, match="read-only"):
        tones.wave(0)[0] = 1


def test_nothing_of_where_it_ran_is_published(esc50_layout, storage):
    layout = esc50_layout(folds=[1], labels=[0, 1])
    gone, broken, cut, *_ = sorted((layout / "audio").iterdir())
    gone.unlink()
    broken.write_bytes(b"noise")
    cut.write_bytes(cut.read_bytes()[:-2])
    prepared = prepare("esc50", source=layout, storage=storage, allow_partial=True)
    assert len(prepared.manifest["missing"]) == 3
    published = [storage.get(f"{prepared.prefix}/{name}") for name in ("manifest.json", "index.parquet")]
    assert not any(str(Path(place)).encode() in data for data in published for place in (layout, storage.root))


def test_a_shard_of_no_size_is_refused(storage):
    with pytest.raises(ValueError, match="shard_mib is 0; wanted a positive size"):
        prepare("tones", source=None, storage=storage, shard_mib=0)


def test_an_unknown_data_set_is_named(storage):
    with pytest.raises(ValueError, match=f"unknown data set 'esc-50'; known: {', '.join(DATASETS.names())}"):
        prepare("esc-50", source=None, storage=storage)


def test_a_task_is_all_that_a_worker_needs(tmp_path, whole):
    tasks: list[ShardTask] = []

    def run(function, given):
        tasks.extend(pickle.loads(pickle.dumps(list(given))))
        return map(function, given)

    prepare_tones(Storage(tmp_path / "a"), run=run)
    assert [task.number for task in tasks] == list(range(6))
    report = write_shard(tasks[2])
    assert whole[f"{tasks[2].prefix}/{report.name}"] == tasks[2].storage.get(f"{tasks[2].prefix}/{report.name}")
