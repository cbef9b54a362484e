"""Batches: a pure function of (seed, epoch, step), whoever makes them, wherever the samples lie."""

import gc
import pickle
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from helix.data.augment import mixup, pairing
from helix.data.clips import Clips, concat, single, stitch
from helix.data.datasets.tones import Tones
from helix.data.loader import Batch, Batches, Device, Host, in_order, part_of
from helix.data.shards import CorruptShardError, Recordings, open_prepared, prepare
from helix.protocol import Protocol, profile
from helix.storage import FolderStorage

ROWS = np.arange(0, 48, 2)
TENSORS = ("wave_BT", "label_B", "clip_B", "samples_B")


def training(recordings: Recordings, rows: np.ndarray = ROWS, **how: Any) -> Batches:
    given = {"batch_size": 6, "seed": 0, "protocol": Protocol()} | how
    return Batches(recordings, Tones(clips_per_class=8), rows, **given)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS) and one.parts == other.parts


def keys(batches: Batches, epoch: int) -> list[int]:
    return [int(clip) for step in range(batches.steps_per_epoch) for clip in batches.batch(epoch, step).clip_B]


def wave_by_definition(recordings: Recordings, clips: Clips, number: int) -> np.ndarray:
    """The slow twin of every gather: one clip, one piece and one sample after the other."""
    wave_T = np.zeros(clips.clip_samples, np.float32)
    for piece in range(clips.first_piece[number], clips.first_piece[number + 1]):
        heard = recordings.wave(int(clips.row[piece]))
        for offset in range(int(clips.samples[piece])):
            wave_T[clips.place[piece] + offset] = heard[clips.start[piece] + offset] / 32768
    return wave_T


def test_a_batch_depends_on_nothing_but_seed_epoch_and_step(tones):
    batches = training(tones, batch_size=5, seed=3)
    first = batches.batch(7, 2)
    for epoch, step in ((0, 0), (7, 3), (7, 1)):
        batches.batch(epoch, step)
    assert same(first, batches.batch(7, 2))
    assert same(first, training(tones, batch_size=5, seed=3).batch(7, 2))
    assert same(first, pickle.loads(pickle.dumps(batches)).batch(7, 2))


def test_each_clip_comes_once_per_epoch(tones):
    batches = training(tones)
    assert batches.steps_per_epoch == 4
    assert sorted(keys(batches, 0)) == sorted(keys(batches, 1)) == list(ROWS)


def test_what_fills_no_batch_is_dropped_and_another_part_each_epoch(tones):
    batches = training(tones, batch_size=10)
    assert batches.steps_per_epoch == 2
    epochs = [set(keys(batches, epoch)) for epoch in range(8)]
    assert all(len(seen) == 20 for seen in epochs) and set.union(*epochs) == set(ROWS)


def test_epochs_and_seeds_differ(tones):
    batches, other = (training(tones, seed=seed) for seed in (0, 1))
    assert keys(batches, 0) != keys(batches, 1)
    assert keys(batches, 0) != keys(other, 0)


def test_waves_are_the_prepared_samples_between_minus_one_and_one(tones):
    batch = training(tones).batch(0, 0)
    assert batch.wave_BT.dtype == torch.float32 and batch.wave_BT.shape == (6, tones.clip_samples)
    assert batch.label_B.dtype == batch.clip_B.dtype == batch.samples_B.dtype == torch.int64
    for wave_T, label, clip in zip(batch.wave_BT, batch.label_B, batch.clip_B, strict=True):
        assert np.array_equal((wave_T * 32768).numpy(), tones.wave(int(clip)))
        assert label == tones.index.label[clip]
    assert batch.wave_BT.abs().max() <= 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_each_rank_sees_its_contiguous_part_and_the_parts_are_the_batch(tones, ranks):
    batches = training(tones)
    whole = batches.batch(2, 1)
    parts = [batches.batch(2, 1, rank=rank, ranks=ranks) for rank in range(ranks)]
    for name in TENSORS:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    sizes = [len(part.clip_B) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0


@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_a_rank_brings_along_the_clips_that_its_own_are_mixed_with(tones, ranks):
    pairs = partial(pairing, 6, alpha=0.3, seed=0)
    batches, (wanted_B, lam) = training(tones, pairs=pairs), pairs(2, 1)
    whole = batches.batch(2, 1)
    assert whole.partner_B is None
    mixed = mixup(whole.wave_BT, torch.from_numpy(wanted_B), torch.tensor(lam))
    parts = []
    for rank in range(ranks):
        part = batches.batch(2, 1, rank=rank, ranks=ranks).to("cpu")
        first, last = part_of(6, rank, ranks)
        assert part.whole == 6 and part.partner_B is not None
        assert torch.equal(part.clip_B[: last - first], whole.clip_B[first:last])
        assert torch.equal(part.clip_B[part.partner_B], whole.clip_B[wanted_B[first:last]])
        assert len(part.clip_B) == len(set(part.clip_B.tolist())), "each clip once"
        parts.append(mixup(part.wave_BT, part.partner_B, torch.tensor(lam)))
    assert torch.equal(torch.cat(parts), mixed)


def test_ranks_that_cannot_be_are_refused(tones):
    batches = training(tones)
    with pytest.raises(ValueError, match="rank is 2 of 2; wanted 0 to 1"):
        batches.batch(0, 0, rank=2, ranks=2)
    with pytest.raises(ValueError, match="7 workers do not each get a clip of a batch of 6; use fewer"):
        batches.batch(0, 0, rank=0, ranks=7)


def kinds(recordings: Recordings) -> list[Clips]:
    """Clips of each kind over the tones, cut so that pieces begin and end anywhere."""
    index, rows = recordings.index, np.arange(48)
    length = recordings.clip_samples
    return [
        single(index, rows, clip_samples=length),
        single(index, rows, clip_samples=length // 3),
        single(index, rows, clip_samples=length + 77),
        concat(index, rows, n=3, position=1, piece_samples=1_000, seed=0, epoch=0),
        concat(index, rows, n=2, position=0, piece_samples=length + 5, seed=0, epoch=1),
        stitch(index, rows, clip_samples=2 * length + 501, how="reshuffle", seed=0, epoch=0),
        stitch(index, rows, clip_samples=2 * length + 501, how="disjoint", seed=0, epoch=0),
        stitch(index, rows, clip_samples=99 * length, how="disjoint", seed=0, epoch=0),
    ]


@pytest.mark.parametrize("kind", range(8))
def test_every_placement_gives_what_the_definition_gives(tones, kind):
    clips = kinds(tones)[kind]
    host, device = Host(recordings=tones), Device(tones, "cpu")
    chosen = clips.take(np.array([len(clips) - 1, 0, len(clips) // 2]))
    batch = host.gather(chosen)
    assert same(batch, device.gather(chosen))
    for number in range(3):
        assert np.array_equal(batch.wave_BT[number].numpy(), wave_by_definition(tones, chosen, number))


def test_a_batch_stands_for_as_long_as_anything_holds_a_part_of_it(tones):
    host, clips = Host(recordings=tones), kinds(tones)
    held = [host.gather(clips[2]).wave_BT[5, 100:200], host.gather(clips[5]).wave_BT.numpy()[3]]
    before = [torch.as_tensor(part).clone().numpy() for part in held]
    for kind in (*clips, *clips):
        host.gather(kind)
    assert all(np.array_equal(part, was) for part, was in zip(held, before, strict=True))


def test_a_batch_lies_where_one_lay_that_nobody_holds_and_is_the_same(tones):
    host, (whole, cut, padded, *_) = Host(recordings=tones), kinds(tones)
    lay = host.gather(padded).wave_BT.data_ptr()
    for clips in (cut, whole, padded, cut):
        batch = host.gather(clips)
        assert batch.wave_BT.data_ptr() == lay
        assert same(batch, Host(recordings=tones).gather(clips))
        del batch
    held = host.gather(cut)
    assert host.gather(cut).wave_BT.data_ptr() != held.wave_BT.data_ptr() == lay
    assert same(pickle.loads(pickle.dumps(host)).gather(cut), held)


def test_a_gather_on_the_device_in_portions_gives_the_same_bits(tones, monkeypatch):
    clips, device = kinds(tones)[5], Device(tones, "cpu")
    whole = device.gather(clips)
    monkeypatch.setattr("helix.data.loader.GATHERED_AT_ONCE", 1)
    assert same(device.gather(clips), whole)


class Copies(TorchDispatchMode):
    """Whether each copy to another device, of which there is none, is one that nobody waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.unwaited: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten._to_copy.default
        self.unwaited.append(kwargs.get("non_blocking", False))
        return torch.empty(args[0].shape, dtype=args[0].dtype, device=kwargs["device"])


def test_a_batch_that_comes_to_the_host_is_there_and_one_that_leaves_it_is_not_waited_for(tones):
    batch = Host(recordings=tones).gather(kinds(tones)[0])
    with Copies() as leaving:
        away = batch.to("meta")
    with Copies() as coming:
        back = away.to("cpu")
    assert leaving.unwaited == [True] * 4 and coming.unwaited == [False] * 4
    assert back.wave_BT.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", range(8))
def test_on_cuda_the_device_and_pinned_memory_give_the_bits_of_the_host(tones, kind):
    clips = kinds(tones)[kind].take(np.arange(3))
    host = Host(recordings=tones).gather(clips)
    pinned = Host(recordings=tones, pinned=True).gather(clips)
    assert pinned.wave_BT.is_pinned()
    for batch in (pinned.to("cuda"), Device(tones, "cuda").gather(clips)):
        assert batch.wave_BT.is_cuda and same(batch.to("cpu"), host)


@settings(max_examples=25, deadline=None)
@given(ahead=st.integers(0, 3), asked=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=12))
def test_making_batches_ahead_changes_no_bit_in_whatever_order_they_are_asked_for(tones, ahead, asked):
    plain = training(tones)
    with training(tones, ahead=ahead) as batches:
        for epoch, step in asked:
            assert same(batches.batch(epoch, step), plain.batch(epoch, step))


def test_asked_in_turn_batches_are_made_once_and_no_more_than_that_many_ahead(tones):
    made: list[int] = []

    class Counting(Host):
        def gather(self, clips: Clips) -> Batch:
            made.append(int(clips.clip[0]))
            return super().gather(clips)

    with training(tones, ahead=2, placement=Counting(recordings=tones)) as batches:
        seen = [batches.batch(epoch, step) for epoch in range(2) for step in range(4)]
        deadline = time.monotonic() + 10
        while len(made) < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert made[:8] == [int(batch.clip_B[0]) for batch in seen] and len(made) == 10


def test_what_fails_on_the_thread_is_raised_where_its_batch_is_asked_for(tones):
    class Broken(Host):
        def gather(self, clips: Clips) -> Batch:
            if int(clips.clip[0]) == bad:
                raise CorruptShardError("shards/00000.bin", "is broken")
            return super().gather(clips)

    bad = int(training(tones).batch(0, 2).clip_B[0])
    with training(tones, ahead=3, placement=Broken(recordings=tones)) as batches:
        assert same(batches.batch(0, 0), training(tones).batch(0, 0))
        assert same(batches.batch(0, 1), training(tones).batch(0, 1))
        with pytest.raises(CorruptShardError, match="is broken"):
            batches.batch(0, 2)
        assert same(batches.batch(0, 3), training(tones).batch(0, 3))


def ahead_threads() -> int:
    return sum(thread.name.startswith("batches ahead") for thread in threading.enumerate())


def test_the_thread_ends_when_it_is_closed_or_forgotten_or_interrupted(tones):
    batches = training(tones, ahead=2)
    batches.batch(0, 0)
    assert ahead_threads() == 1
    batches.close()
    assert ahead_threads() == 0 and same(batches.batch(0, 1), training(tones).batch(0, 1))

    forgotten = training(tones, ahead=2)
    forgotten.batch(0, 0)
    del forgotten
    deadline = time.monotonic() + 10
    while ahead_threads() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert ahead_threads() == 0

    clips = single(tones.index, ROWS, clip_samples=tones.clip_samples)

    def interrupted() -> None:
        for number, _ in enumerate(in_order(tones, clips, batch_size=4, ahead=2)):
            if number == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    gc.collect()
    assert ahead_threads() == 0


def test_the_thread_is_on_the_cuda_device_of_who_started_it(tones, monkeypatch):
    """As torch has it, each thread has a device of its own, the first one until it is told another."""
    of_thread = threading.local()
    of_thread.device = 3
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(of_thread, "device", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(of_thread, "device", device))
    seen: list[int] = []

    class Told(Host):
        def gather(self, clips):
            seen.append(torch.cuda.current_device())
            return super().gather(clips)

    place = Told(recordings=tones)
    with training(tones, ahead=1, placement=place) as batches:
        batches.batch(0, 0)
    assert list(in_order(tones, batches.clips(0), batch_size=10, placement=place, ahead=1))
    assert len(seen) > 2 and set(seen) == {3}


def test_on_a_cpu_the_thread_asks_nothing_of_cuda(tones, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: pytest.fail("there is no device to set"))
    with training(tones, ahead=1) as batches:
        assert same(batches.batch(0, 0), training(tones).batch(0, 0))


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_in_order_gives_every_clip_as_it_stands(tones, ahead):
    clips = single(tones.index, ROWS, clip_samples=tones.clip_samples)
    batches = list(in_order(tones, clips, batch_size=10, ahead=ahead))
    assert [len(batch.clip_B) for batch in batches] == [10, 10, 4]
    assert torch.cat([batch.clip_B for batch in batches]).tolist() == list(ROWS)
    assert list(in_order(tones, clips.take(np.arange(0)), batch_size=10, ahead=ahead)) == []


@pytest.mark.parametrize("placement", ["host", "device"])
def test_stitched_and_concatenated_training_batches_are_pure_too(small, small_recordings, placement):
    protocol = profile("fair")
    dataset, index = small.dataset, small_recordings.index
    rows = dataset.split(index, fold=dataset.folds[0], protocol=protocol).train
    made = []
    for _ in range(2):
        place = Host(recordings=small_recordings) if placement == "host" else Device(small_recordings, "cpu")
        made.append(
            Batches(small_recordings, dataset, rows, batch_size=2, seed=1, protocol=protocol, placement=place, ahead=1)
        )
    with made[0], made[1]:
        for epoch, step in ((1, 0), (0, 0), (5, made[0].steps_per_epoch - 1)):
            assert same(made[0].batch(epoch, step), made[1].batch(epoch, step))


def test_a_recording_that_changed_is_named_by_every_placement(tones, tmp_path):
    storage = FolderStorage(tmp_path / "copy")
    for key in tones._storage.keys(tones.prepared.prefix):
        storage.put(key, tones._storage.get(key))
    copy = open_prepared(storage, tones.prepared.prefix)
    shard = Path(storage.path(f"{copy.prepared.prefix}/{copy.manifest['shards'][0]['name']}"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    clips = single(copy.index, np.arange(4), clip_samples=copy.clip_samples)
    with pytest.raises(CorruptShardError, match="the bytes of recording"):
        Host(recordings=copy).gather(clips)
    with pytest.raises(CorruptShardError, match="the bytes of recording"):
        Device(open_prepared(storage, tones.prepared.prefix), "cpu")


def test_too_few_clips_for_a_batch_are_refused(tones):
    with pytest.raises(ValueError, match=r"24 training clips do not fill one batch of 25; lower training\.batch_size"):
        training(tones, batch_size=25)


def test_a_step_beyond_the_epoch_is_refused(tones):
    with pytest.raises(ValueError, match="step is 4; an epoch has the steps 0 to 3"):
        training(tones).batch(0, 4)


def test_a_batch_of_nothing_and_fewer_than_none_ahead_are_refused(tones):
    with pytest.raises(ValueError, match="batch_size is 0; wanted 1 or more"):
        training(tones, batch_size=0)
    with pytest.raises(ValueError, match="ahead is -1; wanted 0 or more"):
        training(tones, ahead=-1)


RESIDENT = """
import sys
import numpy as np
from pathlib import Path
from helix.data.clips import single
from helix.data.loader import in_order
from helix.data.shards import open_prepared
from helix.storage import FolderStorage, Storage

def own_kib():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0])

recordings = open_prepared(FolderStorage(Path(sys.argv[1])), sys.argv[2])
clips = single(recordings.index, np.arange(len(recordings)), clip_samples=recordings.clip_samples)
for batch in in_order(recordings, clips.take(np.arange(16)), batch_size=8):
    pass
before = own_kib()
for batch in in_order(recordings, clips, batch_size=8):
    pass
print(own_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="it reads the memory of its process from /proc")
def test_what_reading_keeps_in_memory_does_not_grow_with_the_set(esc50_layout, storage):
    source = esc50_layout(folds=[1], per_cell=8)
    prepared = prepare("esc50", source=source, storage=storage, allow_partial=True, shard_mib=8)
    size_kib = sum(shard["bytes"] for shard in prepared.manifest["shards"]) / 1024
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(storage.root), prepared.prefix],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert size_kib > 60_000 and int(done.stdout) < size_kib / 2  # what is left is the slack of the allocator
