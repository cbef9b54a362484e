"""Preparation: published whole or not at all, the same bytes whatever happened on the way, no wrong byte read."""

import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helix.data.audio import AudioError, decode
from helix.data.dataset import DatasetError
from helix.data.datasets import esc50
from helix.data.shards import (
    CorruptShardError,
    ShardTask,
    SourceNotSharedError,
    find,
    open_prepared,
    prepare,
    verify,
    write_shard,
)
from helix.loopback import Fault
from helix.registry import DATASETS
from helix.storage import CorruptObjectError, FolderStorage, Storage, open_storage

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = {"clips_per_class": 4}
PREFIX = "data/tones-"


#: What a child process runs: prepare the same tones as `prepare_tones`, or the ESC-50 of a folder.
CHILD = """
import sys
from pathlib import Path
from helix.data.shards import prepare
from helix.storage import open_storage
storage, name, source, options = open_storage(sys.argv[1]), sys.argv[2], sys.argv[3], eval(sys.argv[4])
source = Path(source) if source else None
print("started", flush=True)
prepare(name, options, source=source, storage=storage, allow_partial=True, shard_mib=0.2)
"""


def child(root: Path, name: str = "tones", source: str = "", options: object = None) -> subprocess.Popen[str]:
    """A process of its own that prepares into the folder `root`; it has started when this returns."""
    given = [str(root), name, source, repr(OPTIONS if options is None else options)]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *given],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    return process


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end; what it said on stderr."""
    _, said = process.communicate(timeout=120)
    return said


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
    storage = FolderStorage(tmp_path_factory.mktemp("whole"))
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
    storage = FolderStorage(tmp_path_factory.mktemp("damaged"))
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
    prepare("esc50", source=layout, storage=storage, quarantine=1)
    with pytest.raises(DatasetError, match=r"1 recording cannot be read(.|\n)*cannot be decoded"):
        prepare("esc50", source=layout, storage=storage)


def test_damage_that_decoding_cannot_mend_is_an_error(esc50_layout, storage, monkeypatch):
    layout = esc50_layout(folds=[1], labels=[0, 1])
    prepared = prepare("esc50", source=layout, storage=storage, allow_partial=True)
    storage.delete(f"{prepared.prefix}/shards/00000.bin")
    monkeypatch.setattr(esc50.Esc50, "wave", lambda *given: np.ones(5, np.int16))
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
    prepared = prepare("esc50", source=layout, storage=storage, allow_partial=True, quarantine=2)
    assert len(prepared.manifest["missing"]) == 1 and len(prepared.manifest["quarantined"]) == 2
    published = [storage.get(f"{prepared.prefix}/{name}") for name in ("manifest.json", "index.parquet")]
    assert not any(str(Path(place)).encode() in data for data in published for place in (layout, storage.root))


def test_an_unknown_data_set_is_named(storage):
    with pytest.raises(ValueError, match=f"unknown data set 'esc-50'; known: {', '.join(DATASETS.names())}"):
        prepare("esc-50", source=None, storage=storage)


def test_a_task_is_all_that_a_worker_needs(tmp_path, whole):
    tasks: list[ShardTask] = []

    def run(function, given):
        tasks.extend(pickle.loads(pickle.dumps(list(given))))
        return map(function, given)

    prepare_tones(FolderStorage(tmp_path / "a"), run=run)
    assert [task.number for task in tasks] == list(range(6))
    report = write_shard(tasks[2])
    (shard,) = report.shards
    assert whole[f"{tasks[2].prefix}/{shard['name']}"] == tasks[2].storage.get(f"{tasks[2].prefix}/{shard['name']}")


def test_killed_at_any_moment_and_run_again_it_ends_the_same(tmp_path, whole):
    """SIGKILL to a real process, at random moments of its work, again and again on one folder."""
    began = time.monotonic()
    assert finish(child(tmp_path / "clock")) == ""
    work_s = time.monotonic() - began
    draw, killed = random.Random(0), 0
    for round_ in range(6):
        root = tmp_path / f"round-{round_}"
        for _ in range(3):
            process = child(root)
            time.sleep(draw.uniform(0, 0.3 * work_s))
            process.kill()
            finish(process)
            killed += process.returncode == -9
        assert finish(child(root)) == ""
        assert contents(open_storage(str(root))) == whole
    assert killed >= 6


def test_two_processes_at_once_do_not_corrupt_each_other(tmp_path, whole):
    for round_ in range(3):
        root = tmp_path / str(round_)
        processes = [child(root) for _ in range(3)]
        assert [finish(process) for process in processes] == ["", "", ""]
        assert contents(open_storage(str(root))) == whole


def test_the_identity_follows_the_bytes_of_a_source_and_nothing_else(esc50_layout, storage, tmp_path):
    layout = esc50_layout(folds=[1], labels=[0, 1])
    first = prepare("esc50", source=layout, storage=storage, allow_partial=True)
    changed = sorted((layout / "audio").iterdir())[2]
    before, data = changed.stat(), bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = prepare("esc50", source=layout, storage=storage, allow_partial=True)
    assert changed.stat().st_size == before.st_size
    assert first.prefix != second.prefix and first.manifest_sha256 != second.manifest_sha256
    data[-1] ^= 1
    changed.write_bytes(data)
    elsewhere = open_storage(str(tmp_path / "elsewhere"))
    again = prepare("esc50", source=layout.parent, storage=elsewhere, allow_partial=True, run=backwards)
    assert again == first
    assert contents(elsewhere) == {key: storage.get(key) for key in storage.keys(first.prefix)}


def test_everything_that_is_wrong_is_told_at_once_and_nothing_is_published(esc50_layout, storage):
    layout = esc50_layout(folds=[1, 2], labels=range(3))
    gone, empty, cut, page, noise, *_ = sorted((layout / "audio").iterdir())
    gone.unlink()
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-2])
    page.write_text("<html>404</html>" * 100)
    soundfile.write(noise, np.array([0.0, np.nan]), 16_000, subtype="FLOAT")
    table = layout / "meta" / "esc50.csv"
    table.write_text(table.read_text().replace("2-2000-A-0.wav,2,0,dog,2000", "2-2000-A-0.wav,2,0,dog"))
    with pytest.raises(DatasetError) as caught:
        prepare("esc50", source=layout, storage=storage)
    told = "\n".join(caught.value.problems)
    for problem in (
        "meta/esc50.csv line 8: has 4 fields; wanted 5",
        f"{gone.stem}: audio/{gone.name} is not there",
        f"audio/{empty.name} is empty (0 bytes)",
        f"audio/{cut.name} is truncated",
        f"audio/{page.name} cannot be decoded",
        f"audio/{noise.name} holds samples that are NaN or infinite",
        "fold 3: no recordings; wanted 400",
    ):
        assert problem in told
    assert "1 problem in the metadata; 2 recordings are missing; counts differ" in caught.value.subject
    assert "4 recordings cannot be read (--quarantine 4 leaves them out)" in caught.value.subject
    assert list(storage.keys("data")) == []


def test_a_quarantine_takes_so_many_files_and_no_more(esc50_layout, storage, monkeypatch):
    monkeypatch.setattr(esc50, "PER_CLASS_AND_FOLD", 1)
    layout = esc50_layout(folds=range(1, 6), per_cell=1, samples=1)
    bad = sorted((layout / "audio").iterdir())[10:13]
    for file in bad:
        file.write_bytes(b"")
    with pytest.raises(DatasetError, match="3 recordings cannot be read, 2 were accepted") as caught:
        prepare("esc50", source=layout, storage=storage, quarantine=2)
    assert [file.stem for file in bad] == [problem.split(":")[0] for problem in caught.value.problems]
    assert find(storage, "esc50") == []
    prepared = prepare("esc50", source=layout, storage=storage, quarantine=3)
    assert prepared.manifest["quarantined"] == {
        file.stem: {"file": file.name, "reason": "is empty (0 bytes)"} for file in bad
    }
    assert prepared.manifest["recordings"] == 247 and prepared.manifest["partial"] is False
    assert prepare("esc50", source=layout, storage=storage, quarantine=9) == prepared
    assert not {file.stem for file in bad} & set(open_prepared(storage, prepared.prefix).index.recording_id)
    with pytest.raises(ValueError, match="quarantine is -1; wanted the number of bad files to accept"):
        prepare("esc50", source=layout, storage=storage, quarantine=-1)


def test_a_quarantine_is_no_leave_to_lack_files(esc50_layout, storage, monkeypatch):
    monkeypatch.setattr(esc50, "PER_CLASS_AND_FOLD", 1)
    layout = esc50_layout(folds=range(1, 6), per_cell=1, samples=1)
    gone = sorted((layout / "audio").iterdir())[7]
    gone.unlink()
    with pytest.raises(DatasetError, match="1 recording is missing:"):
        prepare("esc50", source=layout, storage=storage, quarantine=5)


def test_a_file_that_changes_on_the_way_is_noticed(esc50_layout, storage):
    layout = esc50_layout(folds=[1], labels=[0, 1])
    changing, vanishing, *_ = sorted((layout / "audio").iterdir())

    def run(function, tasks):
        data = bytearray(changing.read_bytes())
        data[-1] ^= 1
        changing.write_bytes(data)
        vanishing.unlink()
        return map(function, tasks)

    with pytest.raises(DatasetError, match=r"2 files changed while they were prepared \(run it again\)") as caught:
        prepare("esc50", source=layout, storage=storage, allow_partial=True, quarantine=9, run=run)
    assert {f"audio/{changing.name}", f"audio/{vanishing.name}"} <= set(caught.value.problems)
    assert list(storage.keys("data")) == []


def test_a_machine_that_does_not_see_the_source_says_so(esc50_layout, storage):
    layout = esc50_layout(folds=[1], labels=[0, 1])

    def elsewhere(function, tasks):
        layout.rename(layout.with_name("moved"))
        return map(function, tasks)

    with pytest.raises(
        SourceNotSharedError, match=r"does not see the source .* on a cluster the source has to be"
    ) as e:
        prepare("esc50", source=layout, storage=storage, allow_partial=True, run=elsewhere)
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)


def test_no_shard_is_larger_than_asked_for_even_where_recordings_are_padded(esc50_layout, storage):
    """The headers promise 0.1 s, the recordings have 5 s: one task then gives several shards."""
    layout = esc50_layout(folds=[1], labels=range(5), samples=1_600)
    prepared = prepare("esc50", source=layout, storage=storage, allow_partial=True, shard_mib=0.5)
    sizes = [shard["bytes"] for shard in prepared.manifest["shards"]]
    assert sizes == [3 * 160_000] * 3 + [160_000]
    recordings = open_prepared(storage, prepared.prefix)
    for row, recording in enumerate(sorted((layout / "audio").iterdir())):
        pcm, _ = soundfile.read(recording, dtype="int16")
        assert np.array_equal(recordings.wave(row)[:1_600], pcm) and not recordings.wave(row)[1_600:].any()
    stood = contents(storage)
    storage.delete(f"{prepared.prefix}/shards/00000-002.bin")
    prepare("esc50", source=layout, storage=storage, allow_partial=True, shard_mib=0.5)
    assert contents(storage) == stood


def test_memory_is_bounded_by_about_one_shard(esc50_layout, storage):
    layout = esc50_layout(folds=[1], labels=range(50), samples=1_600)
    tracemalloc.start()
    prepare("esc50", source=layout, storage=storage, allow_partial=True, shard_mib=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stored = sum(len(data) for key, data in contents(storage).items() if key.endswith(".bin"))
    assert stored > 15 * 2**20 and peak < 5 * 2**20


def test_into_a_folder_memory_is_bounded_by_a_few_recordings_however_large_the_shards(esc50_layout, storage):
    layout = esc50_layout(folds=[1], labels=range(50), samples=1_600)
    tracemalloc.start()
    prepare("esc50", source=layout, storage=storage, allow_partial=True, shard_mib=64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    (shard,) = (data for key, data in contents(storage).items() if key.endswith(".bin"))
    assert len(shard) > 15 * 2**20 and peak < 5 * 2**20


@pytest.mark.parametrize("error", [AudioError("5.wav", "is bad"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_a_shard_that_ends_before_it_is_whole_leaves_no_trace(esc50_layout, storage, monkeypatch, error):
    layout, calls = esc50_layout(folds=[1], labels=range(10)), itertools.count()

    def failing(*given, **how):
        if next(calls) == 5:
            raise error
        return decode(*given, **how)

    monkeypatch.setattr(esc50, "decode", failing)
    with pytest.raises(DatasetError if isinstance(error, AudioError) else type(error)):
        prepare("esc50", source=layout, storage=storage, allow_partial=True)
    assert next(calls) > 5 and not [path for path in storage.root.rglob("*") if path.is_file()]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_verifying_finds_any_changed_byte(tmp_path_factory, whole, data):
    storage = open_storage(str(tmp_path_factory.mktemp("changed")))
    for key, content in whole.items():
        storage.put(key, content)
    prefix = find(storage, "tones", OPTIONS)[0].prefix
    assert verify(storage, prefix)[1] == []
    key = data.draw(st.sampled_from(sorted(key for key in whole if not key.endswith(("0.json", "5.json")))))
    key = key.replace(".json", ".bin") if "shards/" in key else key
    flip_bit(storage, key, data.draw(st.integers(0, len(whole[key]) - 1)))
    _, damages = verify(storage, prefix)
    assert len(damages) == 1 and damages[0].startswith(f"{key}: ")


def test_a_digit_that_changes_no_number_is_a_changed_byte(esc50_layout, storage):
    layout = esc50_layout(folds=[1], labels=[0], samples=1_111)
    prefix = prepare("esc50", source=layout, storage=storage, allow_partial=True).prefix
    data = storage.get(f"{prefix}/manifest.json")
    storage.put(f"{prefix}/manifest.json", data.replace(b'"seconds":10.0', b'"seconds":10.00'))
    assert verify(storage, prefix) == (None, [f"{prefix}/manifest.json: does not match its own checksum"])


def test_a_set_of_another_format_is_not_seen_and_not_read(prepared):
    storage, prefix = prepared
    manifest = json.loads(storage.get(f"{prefix}/manifest.json")) | {"format": 1}
    storage.put_json(f"{prefix}/manifest.json", manifest)
    assert find(storage, "tones", OPTIONS) == []
    with pytest.raises(CorruptShardError, match="has format 1; this version reads format 2"):
        open_prepared(storage, prefix)


LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))" + CHILD


def test_a_full_disk_is_named_and_nothing_is_published_until_there_is_room(tmp_path, whole, monkeypatch):
    """A limit on the size of a file stands in for the disk: a shard of 200 kB does not fit."""
    monkeypatch.setitem(globals(), "CHILD", LIMITED)
    process = child(tmp_path / "full")
    said = finish(process)
    monkeypatch.undo()
    assert process.returncode == 1
    assert f"to the storage file://{tmp_path}/full: File too large; nothing is published. Free some space" in said
    storage = open_storage(str(tmp_path / "full"))
    assert find(storage, "tones", OPTIONS) == [] and not list((tmp_path / "full").rglob(".partial-*"))
    assert finish(child(tmp_path / "full")) == ""
    assert contents(storage) == whole


def test_a_full_file_system_is_named_and_nothing_is_published_until_there_is_room(tmp_path, whole):
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(mounted)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here; the test before this one limits the size of a file instead")
    try:
        process = child(mounted)
        said = finish(process)
        assert process.returncode == 1 and "No space left on device; nothing is published" in said
        storage = open_storage(str(mounted))
        assert find(storage, "tones", OPTIONS) == [] and list(storage.keys("data"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(mounted)], check=True)
        assert finish(child(mounted)) == ""
        assert contents(storage) == whole
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_what_a_bucket_knows_to_be_damaged_is_listed_and_repaired(s3_address, fault_proxy):
    bucket = open_storage(s3_address)
    how: dict[str, Any] = {"options": {"clips_per_class": 4}, "source": None, "storage": bucket, "shard_mib": 0.5}
    whole = prepare("tones", **how)
    keys = list(bucket.keys(whole.prefix))
    for key in keys:
        fault_proxy.add(Fault(kind="flip_request", method="PUT", times=1))
        bucket.put(key, bucket.get(key))  # the server keeps what came, and the sha256 of what was meant
        with pytest.raises(CorruptObjectError):
            bucket.get(key)
    assert verify(bucket, whole.prefix)[1] == [
        f"{whole.prefix}/manifest.json: its bytes are not those that were put, by their sha256"
    ]
    assert prepare("tones", **how) == whole
    assert verify(bucket, whole.prefix) == (whole, [])


@pytest.mark.parametrize("size", [float("inf"), float("nan"), 0.0, -1.0])
def test_a_shard_of_no_size_is_refused(storage, size):
    with pytest.raises(ValueError, match=f"shard_mib is {size}; wanted a positive and finite size in MiB"):
        prepare("tones", source=None, storage=storage, shard_mib=size)
