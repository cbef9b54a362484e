"""Shards of a bucket on local disk: fetched once, verified, bounded, whoever else is at it and whoever dies of it."""

import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helix.data.cache import ShardCache
from helix.data.shards import CorruptShardError, open_prepared, prepare
from helix.loopback import Fault, FaultProxy
from helix.storage import CorruptObjectError, FolderStorage, Storage, open_storage
from helix.storage_s3 import S3Storage

ROOT = Path(__file__).resolve().parents[3]
SIZE = 200_000
GIB = 2**30


class Shards:
    """Shards of SIZE bytes in a storage: number -> what the cache is asked with."""

    def __init__(self, storage: Storage, count: int):
        self.storage = storage
        self.data = [np.random.default_rng(number).bytes(SIZE) for number in range(count)]
        for number, data in enumerate(self.data):
            storage.put(f"shards/{number:05d}.bin", data)

    def __getitem__(self, number: int) -> tuple[Storage, str, int, str]:
        sha256 = hashlib.sha256(self.data[number]).hexdigest()
        return self.storage, f"shards/{number:05d}.bin", SIZE, sha256


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache")


@pytest.fixture
def shards(fault_proxy: FaultProxy, s3_address: str) -> Shards:
    """Six shards in a bucket behind the proxy."""
    shards = Shards(open_storage(s3_address), 6)
    fault_proxy.requests.clear()
    return shards


def held(cache: ShardCache) -> int:
    """The bytes of all files, those that are still coming too."""
    return sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file())


def downloads(proxy: FaultProxy) -> list[str]:
    return [path for method, path in proxy.requests if method == "GET"]


def start(script: str, cache: ShardCache, shards: Shards, *arguments: object) -> subprocess.Popen[str]:
    """A Python process with `cache`, `storage`, `shards` (their keys, sizes and checksums) and `arguments` at hand."""
    head = f"""
import sys, time, os
from pathlib import Path
from helix.data.cache import ShardCache
from helix.storage import open_storage
cache = ShardCache(Path({str(cache.folder)!r}), {cache.limit_bytes / GIB!r})
storage = open_storage({repr(shards.storage)!r})
shards = {[shards[number][1:] for number in range(len(shards.data))]!r}
arguments = sys.argv[1:]
"""
    command = [sys.executable, "-c", head + script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


# One process


def test_shards_of_a_folder_are_read_where_they_lie(tmp_path: Path, cache: ShardCache):
    shards = Shards(FolderStorage(tmp_path / "storage"), 1)
    assert cache.path(*shards[0]) == tmp_path / "storage" / "shards" / "00000.bin"
    assert cache.samples(*shards[0]).tobytes() == shards.data[0]
    assert not cache.folder.exists()


@pytest.mark.service
def test_a_shard_is_fetched_once_and_read_from_then_on(cache: ShardCache, shards: Shards, fault_proxy: FaultProxy):
    for _ in range(3):
        assert cache.path(*shards[0]).read_bytes() == shards.data[0]
        samples = cache.samples(*shards[0])
        assert samples.tobytes() == shards.data[0]
        assert samples.dtype == np.int16
        assert not samples.flags.writeable
    assert ShardCache(cache.folder).path(*shards[0]).read_bytes() == shards.data[0]
    assert len(downloads(fault_proxy)) == 1
    assert held(cache) == SIZE


@pytest.mark.service
def test_the_longest_unused_go_and_a_set_larger_than_the_cache_is_read_through(
    tmp_path: Path, shards: Shards, fault_proxy: FaultProxy
):
    cache = ShardCache(tmp_path / "cache", 2.5 * SIZE / GIB)
    for _ in range(2):
        for number in range(6):
            assert cache.samples(*shards[number]).tobytes() == shards.data[number]
            assert held(cache) <= 2 * SIZE
    assert len(downloads(fault_proxy)) == 12
    cache.path(*shards[4])  # used just now: 5 goes before it
    cache.path(*shards[0])
    fault_proxy.requests.clear()
    cache.path(*shards[4])
    assert downloads(fault_proxy) == []
    cache.path(*shards[5])
    assert len(downloads(fault_proxy)) == 1


@pytest.mark.service
def test_a_shard_larger_than_the_cache_is_read_all_the_same(tmp_path: Path, shards: Shards):
    cache = ShardCache(tmp_path / "cache", SIZE / 2 / GIB)
    for number in (0, 1, 0):
        assert cache.samples(*shards[number]).tobytes() == shards.data[number]
        assert held(cache) == SIZE


@pytest.mark.service
def test_samples_in_use_stay_as_they_are_when_their_file_goes(tmp_path: Path, shards: Shards):
    cache = ShardCache(tmp_path / "cache", 1.5 * SIZE / GIB)
    first = cache.samples(*shards[0])
    for number in range(1, 6):
        cache.samples(*shards[number])
    assert not (cache.folder / f"{shards[0][3]}.bin").exists()
    assert first.tobytes() == shards.data[0]


@pytest.mark.service
def test_only_so_many_removed_files_are_kept_alive_by_their_maps(tmp_path: Path, shards: Shards):
    cache = ShardCache(tmp_path / "cache", 2.5 * SIZE / GIB)
    for number in range(6):
        cache.samples(*shards[number])
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(cache.folder) in line]
    assert len(mapped) == 2


@pytest.mark.service
@pytest.mark.parametrize("damage", [b"", b"short", b"x" * (SIZE + 1)])
def test_a_cached_file_of_another_size_is_fetched_again(cache: ShardCache, shards: Shards, damage: bytes):
    cache.path(*shards[0]).write_bytes(damage)
    assert cache.path(*shards[0]).read_bytes() == shards.data[0]


@pytest.mark.service
def test_wrong_bytes_on_the_way_are_fetched_again_and_wrong_bytes_in_the_bucket_are_an_error(
    cache: ShardCache, shards: Shards, fault_proxy: FaultProxy
):
    fault_proxy.add(Fault(kind="flip", method="GET", times=1))
    assert cache.path(*shards[0]).read_bytes() == shards.data[0]
    shards.storage.put(shards[1][1], b"other" * (SIZE // 5))
    with pytest.raises(CorruptObjectError, match=re.escape(shards[1][1])):
        cache.path(*shards[1])
    with pytest.raises(FileNotFoundError):
        cache.path(shards.storage, "shards/none.bin", SIZE, "ab" * 32)
    assert held(cache) == SIZE
    shards.storage.put(shards[1][1], shards.data[1])
    assert cache.path(*shards[1]).read_bytes() == shards.data[1]


@pytest.mark.service
def test_a_cache_travels_without_its_maps(cache: ShardCache, shards: Shards):
    cache.samples(*shards[0])
    assert len(pickle.dumps(cache)) < 1000
    assert pickle.loads(pickle.dumps(cache)).samples(*shards[0]).tobytes() == shards.data[0]


def test_where_the_cache_is_and_how_large_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("HELIX_CACHE", "HELIX_CACHE_GIB", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShardCache.of_environment().folder == tmp_path / ".cache" / "helix" / "shards"
    assert ShardCache.of_environment().limit_bytes == 50 * GIB
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ShardCache.of_environment().folder == tmp_path / "xdg" / "helix" / "shards"
    monkeypatch.setenv("HELIX_CACHE", "~/mine")
    monkeypatch.setenv("HELIX_CACHE_GIB", "0.5")
    assert ShardCache.of_environment().folder == tmp_path / "mine"
    assert ShardCache.of_environment().limit_bytes == GIB // 2
    for wrong in ("much", "0", "-1", "nan"):
        monkeypatch.setenv("HELIX_CACHE_GIB", wrong)
        with pytest.raises(ValueError, match="wanted a finite number of GiB above 0"):
            ShardCache.of_environment()


# Several processes

READ_ALL = """
import contextlib, random
order = list(range(len(shards))) * int(arguments[1])
random.Random(int(arguments[0])).shuffle(order)
import hashlib
largest = 0
for number in order:
    samples = cache.samples(storage, *shards[number])
    assert hashlib.sha256(samples.tobytes()).hexdigest() == shards[number][2]
    held = 0
    for path in cache.folder.glob("*.bin"):
        with contextlib.suppress(FileNotFoundError):  # another process has just taken its room
            held += path.stat().st_size
    largest = max(largest, held)
print(largest)
"""


@pytest.mark.service
def test_processes_of_one_node_fetch_every_shard_once(cache: ShardCache, shards: Shards, fault_proxy: FaultProxy):
    fault_proxy.add(Fault(kind="slow", method="GET", rate=2_000_000))  # so that they meet
    readers = [start(READ_ALL, cache, shards, seed, 1) for seed in range(4)]
    assert [(reader.communicate()[0] != "", reader.returncode) for reader in readers] == [(True, 0)] * 4
    assert len(downloads(fault_proxy)) == 6
    assert held(cache) == 6 * SIZE


@pytest.mark.service
def test_processes_that_take_each_others_room_all_read_what_is_right(tmp_path: Path, shards: Shards):
    cache = ShardCache(tmp_path / "cache", 2.5 * SIZE / GIB)
    readers = [start(READ_ALL, cache, shards, seed, 4) for seed in range(4)]
    largest = [int(reader.communicate()[0]) for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * 4
    assert max(largest) <= 2.5 * SIZE + 4 * SIZE, "no more than one shard over for each that downloads"
    assert held(cache) <= 2.5 * SIZE
    assert list((cache.folder / "incoming").iterdir()) == []


@pytest.mark.service
def test_threads_share_a_cache_too(tmp_path: Path, shards: Shards):
    cache = ShardCache(tmp_path / "cache", 2.5 * SIZE / GIB)

    def read(number: int) -> bool:
        return cache.samples(*shards[number % 6]).tobytes() == shards.data[number % 6]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(60)))


@pytest.mark.service
def test_a_process_killed_while_it_downloads_leaves_no_trace_and_holds_up_nobody(
    cache: ShardCache, shards: Shards, fault_proxy: FaultProxy
):
    fault_proxy.add(Fault(kind="slow", method="GET", rate=20_000))
    victim = start("cache.path(storage, *shards[0])", cache, shards)
    deadline = time.monotonic() + 60
    while held(cache) == 0:
        assert victim.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert held(cache) > 0
    assert not list(cache.folder.glob("*.bin"))
    fault_proxy.clear()
    assert cache.path(*shards[1]).read_bytes() == shards.data[1]
    assert held(cache) == SIZE, "what the killed process left is removed when room is made for another shard"
    assert cache.path(*shards[0]).read_bytes() == shards.data[0]


# A full disk

FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    cache.path(storage, *shards[0])
except OSError as error:
    print(error)
"""


@pytest.mark.service
def test_a_disk_without_room_is_an_error_that_says_what_to_do(cache: ShardCache, shards: Shards):
    said, _ = start(FULL, cache, shards).communicate()
    assert "the cache has no room for shards/00000.bin" in said
    assert "HELIX_CACHE" in said
    assert str(cache.folder) in said
    assert held(cache) == 0


@pytest.mark.service
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_smaller_than_the_limit_is_used_as_far_as_it_goes(tmp_path: Path, shards: Shards):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.6 * SIZE)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        cache = ShardCache(disk, 1)
        for number in range(6):
            assert cache.path(*shards[number]).read_bytes() == shards.data[number]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Recordings


@pytest.mark.service
def test_recordings_of_a_bucket_are_those_of_a_folder(s3_address: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    places = [FolderStorage(tmp_path / "storage"), open_storage(s3_address)]
    both = []
    for storage in places:
        prepared = prepare("tones", {"clips_per_class": 16}, source=None, storage=storage, shard_mib=0.5)
        both.append(open_prepared(storage, prepared.prefix))
    here, there = both
    assert here.manifest == there.manifest
    assert len(here.manifest["shards"]) > 3
    assert all(np.array_equal(here.wave(row), there.wave(row)) for row in range(len(here)))
    assert held(ShardCache(tmp_path / "cache")) == sum(shard["bytes"] for shard in here.manifest["shards"])


@pytest.mark.service
def test_a_recording_damaged_in_the_cache_is_fetched_again_and_one_damaged_in_the_bucket_is_an_error(
    s3_address: str, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    storage = open_storage(s3_address)
    prepared = prepare("tones", {"clips_per_class": 16}, source=None, storage=storage)
    right = open_prepared(storage, prepared.prefix).wave(0).copy()
    (file,) = (tmp_path / "cache").glob("*.bin")
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert np.array_equal(open_prepared(storage, prepared.prefix).wave(0), right)

    key = f"{prepared.prefix}/{prepared.manifest['shards'][0]['name']}"
    storage.put(key, bytes(data))
    file.unlink()
    with pytest.raises(CorruptShardError, match=re.escape(key)):
        open_prepared(storage, prepared.prefix).wave(0)


@pytest.mark.parametrize("wrong", ["inf", "-inf", "nan", "1e999", "0"])
def test_a_cache_without_a_bound_is_refused_by_the_name_of_its_variable(monkeypatch: pytest.MonkeyPatch, wrong: str):
    monkeypatch.setenv("HELIX_CACHE_GIB", wrong)
    with pytest.raises(ValueError, match=f"HELIX_CACHE_GIB is '{wrong}'; wanted a finite number of GiB above 0"):
        ShardCache.of_environment()


def test_a_cache_that_cannot_be_written_says_so_before_anything_is_fetched(tmp_path: Path):
    (tmp_path / "file").touch()
    storage = StorageOfNothing()
    for place in (tmp_path / "file" / "cache", tmp_path / "file"):
        with pytest.raises(OSError, match=re.escape(f"cannot keep shards in {place} (")) as caught:
            ShardCache(place).samples(storage, "shards/00000.bin", 2, "0" * 64)
        assert "with HELIX_CACHE" in str(caught.value) and not isinstance(caught.value, FileNotFoundError)


class StorageOfNothing(S3Storage):
    """A bucket that nobody may ask."""

    def __init__(self) -> None:
        pass
