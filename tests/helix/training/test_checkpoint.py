"""A checkpoint is whole or does not exist, and what is restored is the state to the bit."""

import hashlib
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import boto3.session
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from helix.data.shards import Recordings
from helix.protocol import Protocol
from helix.spec import TrainingSpec, TrialSpec, apply_overrides
from helix.storage import TEMPORARY, CorruptObjectError, FolderStorage, Storage, open_storage, sealed
from helix.training.checkpoint import (
    FILES,
    CheckpointError,
    Progress,
    Saver,
    committed,
    load_best,
    load_checkpoint,
    model_bytes,
    prune,
    save_checkpoint,
    save_interval_s,
    weights_sha256,
)
from helix.training.optim import build_optimizer
from helix.training.trainer import Fit, fit

TRIAL = "0123456789abcdef"
PREFIX = f"trials/{TRIAL}/checkpoints"


class Kill(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it."""


@dataclass
class Mind:
    """A small model with its optimiser, as training has them."""

    model: nn.Module
    optimizer: torch.optim.AdamW

    @classmethod
    def new(cls, seed: int = 0) -> "Mind":
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        return cls(model, build_optimizer(model, TrainingSpec(lr=0.01), Protocol(decay="mamba_groups")))

    def step(self, number: int) -> None:
        """An update whose gradients depend on the number alone."""
        generator = torch.Generator().manual_seed(number)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()

    def save(self, storage: Storage, step: int, *, keep: int = 9, trial_id: str = TRIAL) -> None:
        save_checkpoint(
            storage,
            PREFIX,
            model=self.model,
            optimizer=self.optimizer,
            progress=Progress(epoch=step // 10, step=step % 10, losses=(0.5,) * (step % 10), hits=step, seconds=1.5),
            total_step=step,
            identity={"trial_id": trial_id, "torch": torch.__version__},
            keep=keep,
        )

    def load(self, storage: Storage) -> Progress | None:
        return load_checkpoint(storage, PREFIX, model=self.model, optimizer=self.optimizer, trial_id=TRIAL)


def restored(storage: Storage) -> int | None:
    """The step that a fresh process would continue from."""
    progress = Mind.new(seed=1).load(storage)
    return None if progress is None else progress.epoch * 10 + progress.step


def key(step: int, name: str) -> str:
    return f"{PREFIX}/step-{step:08d}/{name}"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Checkpoints of the steps 10, 20 and 30."""
    storage, mind = FolderStorage(tmp_path), Mind.new()
    for step in (10, 20, 30):
        mind.step(step)
        mind.save(storage, step)
    return storage


def damage_bit(storage: Storage, key: str) -> None:
    data = bytearray(storage.get(key))
    data[len(data) // 2] ^= 1
    storage.put(key, bytes(data))


DAMAGE: dict[str, Callable[[Storage, str], None]] = {
    "a flipped bit": damage_bit,
    "a cut end": lambda storage, key: storage.put(key, storage.get(key)[:-1]),
    "an added end": lambda storage, key: storage.put(key, storage.get(key) + b"\0"),
    "an empty file": lambda storage, key: storage.put(key, b""),
    "a missing file": lambda storage, key: storage.delete(key),
}


# What is restored


def test_where_nothing_was_saved_nothing_is_restored(tmp_path: Path):
    mind, before = Mind.new(), weights_sha256(Mind.new().model)
    assert mind.load(FolderStorage(tmp_path)) is None
    assert weights_sha256(mind.model) == before
    assert not mind.optimizer.state


def test_what_was_begun_and_not_committed_is_nothing(storage: Storage):
    for step in (10, 20, 30):
        storage.delete(key(step, "manifest.json"))
    assert restored(storage) is None


def test_the_newest_one_wins(storage: Storage):
    assert restored(storage) == 30


def test_the_step_after_a_restore_is_bit_identical_to_the_step_without(tmp_path: Path):
    storage, whole, tail = FolderStorage(tmp_path), Mind.new(), Mind.new(seed=1)
    for number in range(3):
        whole.step(number)
    whole.save(storage, 3)
    tail.step(7)
    tail.load(storage)
    for number in (3, 4):
        for mind in (whole, tail):
            mind.step(number)
        assert model_bytes(tail.model) == model_bytes(whole.model)
    for one, other in zip(whole.model.parameters(), tail.model.parameters(), strict=True):
        states = [mind.optimizer.state[of] for mind, of in ((whole, one), (tail, other))]
        assert set(states[0]) == set(states[1]) == {"step", "exp_avg", "exp_avg_sq"}
        for what in states[0]:
            assert torch.equal(states[0][what], states[1][what])
            assert states[0][what].dtype == states[1][what].dtype


def test_without_the_state_of_the_optimiser_the_step_would_differ(tmp_path: Path):
    storage, whole, amnesic = FolderStorage(tmp_path), Mind.new(), Mind.new(seed=1)
    whole.step(0)
    whole.save(storage, 1)
    amnesic.load(storage)
    amnesic.optimizer.state.clear()
    for mind in (whole, amnesic):
        mind.step(1)
    assert model_bytes(amnesic.model) != model_bytes(whole.model)


def test_progress_comes_back_as_it_was(tmp_path: Path):
    storage, mind = FolderStorage(tmp_path), Mind.new()
    progress = Progress(
        epoch=3, step=2, losses=(0.1 + 0.2, None), hits=7.25, seconds=12.5, rows=({"epoch": 3, "loss": 2 / 3},)
    )
    save_checkpoint(
        storage,
        PREFIX,
        model=mind.model,
        optimizer=mind.optimizer,
        progress=progress,
        total_step=32,
        identity={"trial_id": TRIAL},
    )
    assert mind.load(storage) == progress


def test_a_loss_that_is_not_finite_is_never_saved(storage: Storage):
    mind = Mind.new()
    with pytest.raises(ValueError, match="a checkpoint with a loss that is not finite would be useless"):
        save_checkpoint(
            storage,
            PREFIX,
            model=mind.model,
            optimizer=mind.optimizer,
            progress=Progress(epoch=4, step=1, losses=(float("nan"),)),
            total_step=41,
            identity={"trial_id": TRIAL},
        )
    assert restored(storage) == 30


def test_equal_weights_are_equal_bytes():
    assert model_bytes(Mind.new().model) == model_bytes(Mind.new().model)
    assert weights_sha256(Mind.new().model) != weights_sha256(Mind.new(seed=1).model)


# What is damaged


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(storage: Storage, damage: str, name: str):
    if (damage, name) == ("an added end", "manifest.json"):
        pytest.skip("white space after JSON means nothing, so nothing is damaged")
    DAMAGE[damage](storage, key(30, name))
    assert restored(storage) == 20


@pytest.mark.service
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_what_a_bucket_itself_finds_damaged_gives_way_to_the_one_before(s3_address: str, name: str):
    """A bucket refuses bytes that are not those that were put, before anybody can hold them against a manifest."""
    bucket, mind = open_storage(s3_address), Mind.new()
    for step in (10, 20):
        mind.step(step)
        mind.save(bucket, step)
    client, where = boto3.session.Session().client("s3"), s3_address.removeprefix("s3://").partition("/")
    place = {"Bucket": where[0], "Key": f"{where[2]}/{key(20, name)}"}
    whole = client.get_object(**place)
    data = bytearray(whole["Body"].read())
    data[len(data) // 2] ^= 1
    client.put_object(**place, Body=bytes(data), Metadata=whole["Metadata"])
    with pytest.raises(CorruptObjectError):
        bucket.get(key(20, name))
    assert restored(bucket) == 10
    assert committed(bucket, PREFIX) == ["step-00000010"]


def test_the_newest_of_those_that_verify_wins(storage: Storage):
    DAMAGE["a flipped bit"](storage, key(30, "model.safetensors"))
    DAMAGE["a missing file"](storage, key(20, "optimizer.safetensors"))
    mind, first = Mind.new(seed=1), Mind.new()
    first.step(10)
    assert mind.load(storage) == Progress(epoch=1, step=0, hits=10, seconds=1.5)
    assert weights_sha256(mind.model) == weights_sha256(first.model)


def test_where_none_verifies_training_does_not_start_again(storage: Storage):
    DAMAGE["a flipped bit"](storage, key(10, "optimizer.safetensors"))
    DAMAGE["a cut end"](storage, key(20, "model.safetensors"))
    DAMAGE["a missing file"](storage, key(30, "optimizer.safetensors"))
    sizes = {(step, name): len(storage.get(key(step, name))) for step, name in ((10, FILES[1]), (20, FILES[0]))}
    mind, before = Mind.new(seed=1), weights_sha256(Mind.new(seed=1).model)
    with pytest.raises(CheckpointError) as refused:
        mind.load(storage)
    problems = [
        "step-00000030: optimizer.safetensors is missing",
        f"step-00000020: model.safetensors does not match its checksum "
        f"({sizes[20, FILES[0]]} bytes, {sizes[20, FILES[0]] + 1} written)",
        f"step-00000010: optimizer.safetensors does not match its checksum "
        f"({sizes[10, FILES[1]]} bytes, {sizes[10, FILES[1]]} written)",
    ]
    assert refused.value.problems == problems
    assert str(refused.value) == (
        f"no checkpoint under {PREFIX} can be trusted: {'; '.join(problems)}. Training does not silently start again "
        f"at step 0: mend the storage, or give these up with `helix restart {PREFIX.split('/')[-2]}`"
    )
    assert weights_sha256(mind.model) == before


def test_the_error_survives_the_way_to_another_process():
    error = CheckpointError(PREFIX, ["step-00000010: model.safetensors is missing"])
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.problems) == (CheckpointError, str(error), error.problems)


def test_a_checkpoint_of_another_trial_is_refused(tmp_path: Path):
    storage = FolderStorage(tmp_path)
    Mind.new().save(storage, 10, trial_id="f" * 16)
    with pytest.raises(CheckpointError, match=f"step-00000010: it belongs to trial {'f' * 16}, not to {TRIAL}"):
        restored(storage)


@pytest.mark.parametrize("manifest", [b"", b"{", b"[]", b"null", b'"text"', b"{}", b'{"identity":{}}', b"\xff\xfe\xfa"])
def test_a_manifest_that_says_nothing_is_damage(storage: Storage, manifest: bytes):
    storage.put(key(30, "manifest.json"), manifest)
    assert restored(storage) == 20


@pytest.mark.parametrize("flipped", [False, True])
def test_a_checkpoint_of_an_older_version_is_read_and_checked_as_ever(storage: Storage, flipped: bool):
    """A trial that is under way while the code is brought up to date goes on."""
    body = storage.get_json(key(30, "manifest.json"))
    sha256 = body.pop("sha256")
    body["progress"]["epoch"] += flipped
    storage.put_json(key(30, "manifest.json"), {"body": body, "sha256": sha256})
    assert restored(storage) == (20 if flipped else 30)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Checkpoints of the steps 10 and 20."""
    storage, mind = FolderStorage(tmp_path_factory.mktemp("pair")), Mind.new()
    for step in (10, 20):
        mind.step(step)
        mind.save(storage, step)
    return storage


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from([*FILES, "manifest.json"]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_is_ever_believed(pair: Storage, name: str, place: float, bit: int):
    manifest, whole = pair.get(key(20, "manifest.json")), pair.get(key(20, name))
    flipped = bytearray(whole)
    flipped[int(place * len(whole))] ^= 1 << bit
    pair.path(key(20, name)).write_bytes(flipped)
    try:
        mind, wanted = Mind.new(seed=1), Mind.new()
        progress = mind.load(pair)
        assert progress is not None
        wanted.step(10)
        if progress.epoch == 2:
            assert name == "manifest.json", "and even there only where the bit means nothing"
            wanted.step(20)
        assert progress == Progress(epoch=progress.epoch, step=0, hits=10 * progress.epoch, seconds=1.5)
        assert weights_sha256(mind.model) == weights_sha256(wanted.model)
    finally:
        pair.put(key(20, name), whole)
        pair.put(key(20, "manifest.json"), manifest)  # a damaged checkpoint loses it when an older one is restored


class Exploit:
    """A pickle that leaves a file where it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("signed", [False, True], ids=["as found", "with a manifest that vouches for it"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str, signed: bool):
    storage, mark = FolderStorage(tmp_path / "runs"), tmp_path / "executed"
    Mind.new().save(storage, 10)
    data = pickle.dumps(Exploit(mark))
    storage.put(key(10, name), data)
    if signed:
        body = storage.get_json(key(10, "manifest.json"))
        del body["sha256"]
        body["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        storage.put_json(key(10, "manifest.json"), sealed(body))
    with pytest.raises(CheckpointError, match="is not a safetensors file" if signed else "checksum"):
        restored(storage)
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists(), "this test could not have failed"


# What is written, and when


class Watched(FolderStorage):
    """A storage that notes what is written and deleted, and dies before operation number `dies_at`."""

    def __init__(self, root: Path, dies_at: int | None = None):
        super().__init__(root)
        self.done: list[tuple[str, str]] = []
        self.dies_at = dies_at

    def _note(self, what: str, key: str) -> None:
        if len(self.done) == self.dies_at:
            raise Kill
        self.done.append((what, key.removeprefix(f"{PREFIX}/")))

    def put(self, key: str, data: bytes) -> None:
        self._note("put", key)
        super().put(key, data)

    def delete(self, key: str) -> None:
        self._note("delete", key)
        super().delete(key)

    def delete_folder(self, prefix: str) -> None:
        self._note("delete folder", prefix)
        super().delete_folder(prefix)


def test_the_manifest_is_put_last(tmp_path: Path):
    storage = Watched(tmp_path)
    Mind.new().save(storage, 10)
    assert storage.done == [("put", f"step-00000010/{name}") for name in (*FILES, "manifest.json")]


def test_the_manifest_is_deleted_first(storage: Storage):
    watched = Watched(storage.root)
    prune(watched, PREFIX, keep=1)
    for step in (10, 20):
        folder = f"step-{step:08d}"
        of_step = [operation for operation in watched.done if operation[1].startswith(folder)]
        assert of_step == [("delete", f"{folder}/manifest.json"), ("delete folder", folder)]


#: Three files are put, and then two old checkpoints are deleted, the manifest and then the folder of each.
FILES_OF_A_SAVE = 3
OPERATIONS_OF_A_SAVE = FILES_OF_A_SAVE + 2 * 2


@pytest.mark.parametrize("moment", range(OPERATIONS_OF_A_SAVE + 1))
def test_killed_at_any_moment_of_saving_there_is_the_old_state_or_the_new(tmp_path: Path, moment: int):
    storage, mind = Watched(tmp_path), Mind.new()
    for step in (10, 20):
        mind.step(step)
        mind.save(storage, step)
    mind.step(30)
    storage.dies_at = len(storage.done) + moment
    if moment < OPERATIONS_OF_A_SAVE:
        with pytest.raises(Kill):
            mind.save(storage, 30, keep=1)
    else:
        mind.save(storage, 30, keep=1)
    assert restored(FolderStorage(tmp_path)) == (20 if moment < FILES_OF_A_SAVE else 30)


def test_a_trial_killed_at_any_write_goes_on_to_the_same_weights(
    tiny_spec: TrialSpec, tiny_data: Recordings, tmp_path: Path
):
    """With a preemption notice at the last step of an epoch: that step is saved twice, with an evaluation between."""
    spec = apply_overrides(tiny_spec, {"model.pattern": ["attention"], "training.epochs": 1, "training.batch_size": 36})

    def run(storage: Storage) -> str:
        steps: list[int] = []
        how = Fit(storage=storage, on_step=steps.append, save_now=lambda: steps[-1] == 2)
        return fit(spec, tiny_data, how)["weights_sha256"]

    whole = Watched(tmp_path / "whole")
    weights = run(whole)
    for moment in range(len(whole.done)):
        with pytest.raises(Kill):
            run(Watched(tmp_path / str(moment), dies_at=moment))
        assert run(FolderStorage(tmp_path / str(moment))) == weights, f"killed before {whole.done[moment]}"


# What is kept


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (3, [10, 20, 30]), (9, [10, 20, 30])])
def test_the_newest_are_kept_and_the_rest_is_gone(storage: Storage, keep: int, left: list[int]):
    prune(storage, PREFIX, keep=keep)
    assert storage.children(PREFIX) == committed(storage, PREFIX) == [f"step-{step:08d}" for step in left]


def test_saving_keeps_two(tmp_path: Path):
    storage, mind = FolderStorage(tmp_path), Mind.new()
    for step in (1, 2, 3, 4):
        save_checkpoint(
            storage,
            PREFIX,
            model=mind.model,
            optimizer=mind.optimizer,
            progress=Progress(epoch=0, step=step),
            total_step=step,
            identity={"trial_id": TRIAL},
        )
    assert committed(storage, PREFIX) == ["step-00000003", "step-00000004"]


def test_leftovers_of_killed_saves_go_once_a_later_checkpoint_stands(storage: Storage):
    storage.delete(key(10, "manifest.json"))
    storage.put(key(40, "model.safetensors"), b"under way")
    prune(storage, PREFIX, keep=1)
    assert storage.children(PREFIX) == ["step-00000030", "step-00000040"]


def test_what_a_killed_put_left_behind_goes_too(storage: Storage):
    """A worker that is killed while it writes leaves a temporary file as large as the model, at every preemption."""
    (storage.path(key(10, FILES[0])).parent / f"{TEMPORARY}0123").write_bytes(b"half")
    prune(storage, PREFIX, keep=1)
    assert [path.name for path in storage.path(PREFIX).iterdir()] == ["step-00000030"]


def test_a_damaged_checkpoint_takes_no_place_among_those_kept(storage: Storage):
    """After a restore from an older checkpoint, the next one is saved at a step before the damaged one."""
    DAMAGE["a flipped bit"](storage, key(30, "model.safetensors"))
    mind = Mind.new(seed=1)
    assert mind.load(storage) == Progress(epoch=2, step=0, hits=20, seconds=1.5)
    mind.save(storage, 25, keep=2)
    assert restored(storage) == 25
    DAMAGE["a cut end"](storage, key(25, "model.safetensors"))
    assert restored(storage) == 20


def test_pruning_where_nothing_is_committed_deletes_nothing(tmp_path: Path):
    storage = FolderStorage(tmp_path)
    storage.put(key(10, "model.safetensors"), b"under way")
    prune(storage, PREFIX, keep=1)
    assert storage.exists(key(10, "model.safetensors"))


# Behind the training


class Slow(FolderStorage):
    """A storage whose puts wait until they are let go, or fail while it is broken."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.go, self.broken = threading.Event(), False

    def put(self, key: str, data: bytes) -> None:
        assert self.go.wait(30)
        if self.broken:
            raise OSError(28, "No space left on device")
        super().put(key, data)


def saver(storage: Storage, **options) -> Saver:
    return Saver(storage, f"trials/{TRIAL}", identity={"trial_id": TRIAL}, **options)


def test_training_goes_on_while_the_state_of_its_step_is_written(tmp_path: Path):
    storage, mind, behind = Slow(tmp_path), Mind.new(), None
    mind.step(1)
    behind, before = saver(storage), weights_sha256(mind.model)
    behind.save(mind.model, mind.optimizer, Progress(epoch=1, step=0), total_step=10)
    assert behind.busy and restored(storage) is None
    mind.step(2)
    storage.go.set()
    behind.wait()
    assert not behind.busy and weights_sha256(mind.model) != before
    other = Mind.new(seed=1)
    assert other.load(storage) == Progress(epoch=1, step=0)
    assert weights_sha256(other.model) == before, "the weights of its own step, not of the one after"


def test_at_most_one_is_behind(tmp_path: Path):
    storage, mind = Slow(tmp_path), Mind.new()
    behind = saver(storage)
    behind.save(mind.model, mind.optimizer, Progress(epoch=1, step=0), total_step=10)
    second = threading.Thread(
        target=lambda: behind.save(mind.model, mind.optimizer, Progress(epoch=2, step=0), total_step=20)
    )
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the second waits for the first"
    storage.go.set()
    second.join(30)
    behind.wait()
    assert restored(storage) == 20


def test_what_follows_a_checkpoint_happens_once_it_is_committed(tmp_path: Path):
    storage, mind, seen = FolderStorage(tmp_path), Mind.new(), []
    behind = saver(storage)
    behind.save(
        mind.model,
        mind.optimizer,
        Progress(epoch=1, step=0),
        total_step=10,
        then=lambda: seen.append(committed(storage, PREFIX)),
    )
    behind.wait()
    assert seen == [["step-00000010"]]


def test_a_storage_that_fails_for_a_while_costs_no_step(tmp_path: Path, caplog):
    storage, mind = Slow(tmp_path), Mind.new()
    storage.go.set()
    behind, storage.broken = saver(storage), True
    behind.save(mind.model, mind.optimizer, Progress(epoch=1, step=0), total_step=10)
    behind.wait()
    assert "could not be written ([Errno 28] No space left on device)" in caplog.text
    storage.broken = False
    behind.save(mind.model, mind.optimizer, Progress(epoch=2, step=0), total_step=20)
    behind.wait(final=True)
    assert restored(storage) == 20


@pytest.mark.parametrize(("final", "patience_s"), [(True, 1e9), (False, 0.0)])
def test_a_storage_that_fails_at_the_end_or_for_too_long_is_an_error(tmp_path: Path, final: bool, patience_s: float):
    storage, mind = Slow(tmp_path), Mind.new()
    storage.go.set()
    behind, storage.broken = saver(storage, patience_s=patience_s), True
    behind.save(mind.model, mind.optimizer, Progress(epoch=1, step=0), total_step=10)
    if not final:
        behind.wait()
        time.sleep(0.01)
        behind.save(mind.model, mind.optimizer, Progress(epoch=1, step=1), total_step=11)
    with pytest.raises(OSError, match="No space left"):
        behind.wait(final=final)


def test_the_best_weights_are_kept_apart_and_checked(tmp_path: Path):
    storage, mind = FolderStorage(tmp_path), Mind.new()
    behind, best = saver(storage), model_bytes(mind.model)
    behind.best(mind.model, epoch=3, metric="test_accuracy", value=0.5)
    mind.step(1)
    for step in (10, 20):
        behind.save(mind.model, mind.optimizer, Progress(epoch=step // 10, step=0), total_step=step)
    behind.wait()
    weights, said = load_best(storage, f"trials/{TRIAL}")
    assert save(weights) == best and (said["epoch"], said["value"]) == (3, 0.5)
    damage_bit(storage, f"trials/{TRIAL}/best/model.safetensors")
    with pytest.raises(ValueError, match="does not match its checksum"):
        load_best(storage, f"trials/{TRIAL}")
    assert load_best(storage, "trials/another") is None


def test_the_interval_weighs_what_is_lost_against_what_saving_costs():
    usual = {"hold_s": 0.02, "write_s": 0.5, "between_losses_s": 3600.0, "most_s": 600.0}
    assert save_interval_s(**usual) == pytest.approx((2 * 0.02 * 3600) ** 0.5)
    assert save_interval_s(**usual | {"between_losses_s": 900.0}) < save_interval_s(**usual)
    assert save_interval_s(**usual | {"hold_s": 5.0}) == 500.0, "the training stands still for 1 % at most"
    assert save_interval_s(**usual | {"write_s": 30.0}) == 300.0, "a tenth of the time is written at most"
    assert save_interval_s(**usual | {"between_losses_s": 1e9}) == 600.0, "the ceiling"
    assert save_interval_s(**usual | {"write_s": 0.0}) == 30.0, "before anything was measured"
