"""The loop: stopping it anywhere changes nothing, it learns, and it never hides a loss that is not a number."""

import hashlib
import io
import pickle
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from helix.data.shards import Recordings
from helix.protocol import profile
from helix.spec import TrialSpec, trial_id
from helix.storage import FolderStorage, sealed
from helix.training import step as step_module
from helix.training import trainer
from helix.training.checkpoint import CheckpointError, committed, load_best
from helix.training.trainer import DivergedError, Fit, StoppedError, fit, row_key
from orchestration.grid import VARIANTS
from tests.conftest import with_training

STEPS = 9  # three epochs of three


class Killed(BaseException):
    """The end of a process, as far as a loop in this process can meet it."""


def kill_at(step: int) -> Callable[[int], None]:
    def on_step(total_step: int) -> None:
        if total_step == step:
            raise Killed

    return on_step


def science(result: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on how a trial was run: everything but the clock."""
    rows = [{key: value for key, value in row.items() if key not in ("seconds", "time")} for row in result["rows"]]
    timed = {"rows": rows, "train_seconds": None, "finished": None, "sha256": None}
    return {**result, **timed}


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Recordings, tmp_path_factory) -> Callable[[TrialSpec], dict[str, Any]]:
    """The result of a spec that was trained in one go, once per spec."""
    results: dict[str, dict[str, Any]] = {}

    def run(spec: TrialSpec) -> dict[str, Any]:
        name = trial_id(spec, tiny_data.manifest_sha256)
        if name not in results:
            results[name] = science(fit(spec, tiny_data, Fit(storage=FolderStorage(tmp_path_factory.mktemp("whole")))))
        return results[name]

    return run


@pytest.mark.parametrize(("device", "current"), [("cuda:1", [1]), ("cuda", []), ("cpu", [])])
def test_a_trial_on_a_numbered_gpu_has_it_as_the_current_one(
    device, current, tiny_spec, tiny_data, storage, monkeypatch
):
    """Libraries launch and pin on the current device, which is the first one until somebody says otherwise."""
    entered: list[int | None] = []

    class Current:
        def __init__(self, device: torch.device):
            self.index = device.index

        def __enter__(self) -> None:
            entered.append(self.index)

        def __exit__(self, *_error: object) -> None:
            entered.pop()

    class Trial:
        def __init__(self, *_given: object):
            self.batches = self.saver = io.BytesIO()  # something to close
            self.seen = list(entered)

        def run(self) -> dict[str, Any]:
            return {"built": self.seen, "ran": list(entered)}

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(trainer, "_Trial", Trial)
    found = fit(tiny_spec, tiny_data, Fit(storage=storage, device=device))
    assert found == {"built": current, "ran": current} and entered == []


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_trial_killed_at_any_step_ends_bit_identical(step, tiny_spec, tiny_data, storage, undisturbed):
    # every step is saved, so the resumed run starts in the middle of epochs too
    with pytest.raises(Killed):
        fit(tiny_spec, tiny_data, Fit(storage=storage, on_step=kill_at(step), save_now=lambda: True))
    assert science(fit(tiny_spec, tiny_data, Fit(storage=storage))) == undisturbed(tiny_spec)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_resume_is_invisible_for_every_variant(variant, tiny_spec, tiny_data, storage, undisturbed):
    model = replace(tiny_spec.model, frontend=variant.frontend, pattern=variant.pattern)
    spec = replace(tiny_spec, model=model, training=replace(tiny_spec.training, epochs=2))
    with pytest.raises(Killed):
        fit(spec, tiny_data, Fit(storage=storage, on_step=kill_at(5)))
    assert science(fit(spec, tiny_data, Fit(storage=storage))) == undisturbed(spec)


def test_a_trial_killed_again_and_again_ends_bit_identical(tiny_spec, tiny_data, storage, undisturbed):
    for step in (2, 3, 5, 6, 8):
        with pytest.raises(Killed):
            fit(tiny_spec, tiny_data, Fit(storage=storage, on_step=kill_at(step), save_now=lambda: True))
    assert science(fit(tiny_spec, tiny_data, Fit(storage=storage))) == undisturbed(tiny_spec)


@pytest.mark.parametrize("step", [1, 3, 5, STEPS])
def test_a_trial_that_is_asked_to_stop_saves_leaves_and_ends_bit_identical(
    step, tiny_spec, tiny_data, storage, undisturbed
):
    seen = [0]

    def on_step(total_step: int) -> None:
        seen[0] = total_step

    how = Fit(storage=storage, save_every_s=1e9, on_step=on_step, stop_now=lambda: seen[0] >= step)
    with pytest.raises(StoppedError) as stopped:
        fit(tiny_spec, tiny_data, how)
    assert stopped.value.step == step
    assert pickle.loads(pickle.dumps(stopped.value)).step == step
    name = trial_id(tiny_spec, tiny_data.manifest_sha256)
    assert committed(storage, f"trials/{name}/checkpoints")[-1] == f"step-{step:08d}"
    assert science(fit(tiny_spec, tiny_data, Fit(storage=storage))) == undisturbed(tiny_spec)


def test_how_often_it_saves_is_not_science(tiny_spec, tiny_data, storage, undisturbed):
    assert science(fit(tiny_spec, tiny_data, Fit(storage=storage, save_every_s=0.0))) == undisturbed(tiny_spec)


class Distant(FolderStorage):
    """A storage whose every put takes a tenth of a second."""

    def put(self, key: str, data: bytes) -> None:
        time.sleep(0.1)
        super().put(key, data)


def test_saving_holds_up_the_training_by_a_hundredth_at_most(tiny_spec, tiny_data, tmp_path, monkeypatch):
    """Measured around every save but the last one, which waits for the end of its writing as the trial ends with it."""
    held: list[float] = []
    real = trainer._Trial._save

    def timed(trial, progress) -> None:
        began = time.perf_counter()
        real(trial, progress)
        held.append(time.perf_counter() - began)

    monkeypatch.setattr(trainer._Trial, "_save", timed)
    began = time.perf_counter()
    fit(with_training(tiny_spec, epochs=60), tiny_data, Fit(storage=Distant(tmp_path)))
    took = time.perf_counter() - began
    *while_training, _ = held
    assert len(while_training) >= 4
    # A busy machine may hold up a single one, for which there is no time left to make up.
    assert sum(while_training) - max(while_training) <= 0.01 * took, held


@pytest.mark.parametrize("pending", [[], [{"epoch": 1}]])
@pytest.mark.parametrize(("save_every_s", "due"), [(0.5, True), (300.0, False)])
def test_rows_that_wait_for_a_checkpoint_wait_no_longer_than_was_asked_for(pending, save_every_s, due, storage):
    """A second after the last save, where one holds up the training for a twentieth of that."""
    trial: Any = SimpleNamespace(
        how=Fit(storage=storage, save_every_s=save_every_s, clock=lambda: 11.0, between_losses_s=1e9),
        saver=SimpleNamespace(busy=False, hold_s=0.05, write_s=0.0),
        ranks=SimpleNamespace(first=True),
        pending=pending,
        saved=10.0,
    )
    assert trainer._Trial._due(trial) == due


def test_a_row_lost_between_checkpoint_and_row_comes_back(tiny_spec, tiny_data, storage, undisturbed):
    with pytest.raises(Killed):
        fit(tiny_spec, tiny_data, Fit(storage=storage, on_step=kill_at(4)))
    name = trial_id(tiny_spec, tiny_data.manifest_sha256)
    before = storage.get(row_key(name, 1))
    storage.delete(row_key(name, 1))
    result = fit(tiny_spec, tiny_data, Fit(storage=storage))
    assert storage.get(row_key(name, 1)) == before
    assert [row["epoch"] for row in result["rows"]] == [1, 2, 3]


@pytest.mark.parametrize("lost", ["manifests", "folder"])
def test_a_trial_whose_checkpoints_are_gone_does_not_silently_start_again(lost, tiny_spec, tiny_data, storage):
    """Rows are put after the checkpoint that holds them: where there are some, there was one."""
    with pytest.raises(Killed):
        fit(tiny_spec, tiny_data, Fit(storage=storage, save_now=lambda: True, on_step=kill_at(8)))
    folder = f"trials/{trial_id(tiny_spec, tiny_data.manifest_sha256)}"
    kept = committed(storage, f"{folder}/checkpoints")
    assert kept
    for name in kept:
        storage.delete(f"{folder}/checkpoints/{name}/manifest.json")
    if lost == "folder":
        storage.delete_folder(f"{folder}/checkpoints")
    with pytest.raises(CheckpointError, match=r"none has a manifest, though the rows of \d epochs.*helix restart"):
        fit(tiny_spec, tiny_data, Fit(storage=storage))


def test_a_finished_trial_is_not_trained_again(tiny_spec, tiny_data, storage):
    first = fit(tiny_spec, tiny_data, Fit(storage=storage))
    steps: list[int] = []
    assert fit(tiny_spec, tiny_data, Fit(storage=storage, on_step=steps.append)) == first
    assert steps == []


def test_only_the_last_checkpoint_of_a_finished_trial_is_kept(tiny_spec, tiny_data, storage):
    fit(tiny_spec, tiny_data, Fit(storage=storage))
    name = trial_id(tiny_spec, tiny_data.manifest_sha256)
    assert committed(storage, f"trials/{name}/checkpoints") == [f"step-{STEPS:08d}"]


def test_a_loss_that_is_no_number_stops_the_trial_and_names_the_step(tiny_spec, tiny_data, storage):
    spec = replace(tiny_spec, training=replace(tiny_spec.training, lr=1e30))
    with pytest.raises(DivergedError) as caught:
        fit(spec, tiny_data, Fit(storage=storage))
    assert 1 < caught.value.step <= STEPS
    name = trial_id(spec, tiny_data.manifest_sha256)
    assert not list(storage.keys(f"trials/{name}/metrics"))


def test_three_accuracies_and_their_epochs_are_always_there(tiny_spec, tiny_data, storage):
    result = fit(tiny_spec, tiny_data, Fit(storage=storage))
    rows = result["rows"]
    assert result["accuracy"]["best_test"] == max(row["test_accuracy"] for row in rows)
    assert result["accuracy"]["last"] == rows[-1]["test_accuracy"]
    assert 0 <= result["accuracy"]["validation"] <= 1
    assert len(result["best_epoch"]["validation"]) == 2  # one chosen on each half of the test clips
    correct, total = (sum(pair) for pair in zip(rows[0]["test_half_a"], rows[0]["test_half_b"], strict=True))
    assert total == result["test_clips"] == 24
    assert correct / total == rows[0]["test_accuracy"]


def test_fair_holds_a_fold_out_for_validation_and_does_not_train_on_it(tiny_spec, tiny_data, storage):
    spec = replace(tiny_spec, protocol=profile("fair"))
    result = fit(spec, tiny_data, Fit(storage=storage))
    assert result["train_clips"] == 48
    assert all("validation_accuracy" in row for row in result["rows"])


def test_the_confusion_matrix_counts_every_test_clip(tiny_spec, tiny_data, storage):
    result = fit(tiny_spec, tiny_data, Fit(storage=storage))
    assert sum(count for _, _, count in result["confusion"]) == result["test_clips"]
    right = sum(count for label, guess, count in result["confusion"] if label == guess)
    assert right / result["test_clips"] == result["accuracy"]["last"]


def test_every_profile_trains_every_variant(tiny_data, tiny_spec, storage):
    for name in ("authors", "paper", "fair"):
        for variant in VARIANTS:
            model = replace(tiny_spec.model, frontend=variant.frontend, pattern=variant.pattern[2:4])
            training = replace(tiny_spec.training, epochs=1, batch_size=48)
            spec = replace(tiny_spec, model=model, training=training, protocol=profile(name))
            result = fit(spec, tiny_data, Fit(storage=storage))
            assert len(result["rows"][0]["train_losses"]) == 1, (name, variant)


def test_the_authors_profile_leaves_the_waves_of_mel_variants_alone_and_no_others(tiny_spec, tiny_data, storage):
    still = replace(tiny_spec.augment, gain_low=1.0, gain_high=1.0, noise=0.0, shift_s=0.0)
    for frontend, same in (("mel", True), ("raw", False)):
        weights = set()
        for augment in (tiny_spec.augment, still):
            model = replace(tiny_spec.model, frontend=frontend)
            training = replace(tiny_spec.training, epochs=1)
            spec = replace(tiny_spec, model=model, training=training, augment=augment, protocol=profile("authors"))
            weights.add(fit(spec, tiny_data, Fit(storage=storage))["weights_sha256"])
        assert (len(weights) == 1) == same, frontend


def test_seeds_differ_and_one_seed_repeats(tiny_spec, tiny_data, storage, undisturbed):
    other = fit(replace(tiny_spec, seed=1), tiny_data, Fit(storage=storage))
    assert other["weights_sha256"] != undisturbed(tiny_spec)["weights_sha256"]
    again = fit(tiny_spec, tiny_data, Fit(storage=storage))
    assert again["weights_sha256"] == undisturbed(tiny_spec)["weights_sha256"]


def test_it_learns(tiny_spec, tiny_data, storage):
    training = replace(tiny_spec.training, epochs=25, lr=1e-2)
    augment = replace(tiny_spec.augment, mixup_alpha=0.0)
    result = fit(replace(tiny_spec, training=training, augment=augment), tiny_data, Fit(storage=storage))
    rows = result["rows"]
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]


def test_results_of_a_moved_storage_are_still_whole(tiny_spec, tiny_data, storage, tmp_path: Path):
    with pytest.raises(Killed):
        fit(tiny_spec, tiny_data, Fit(storage=storage, on_step=kill_at(7)))
    moved = FolderStorage(tmp_path / "moved")
    shutil.copytree(storage.root, moved.root)
    assert fit(tiny_spec, tiny_data, Fit(storage=moved))["rows"][-1]["step"] == STEPS


@pytest.mark.parametrize("pad_mask", ["none", "clip"])
def test_micro_batches_add_up_to_the_batch(pad_mask, tiny_spec, tiny_data, storage, tmp_path):
    """24 clips in parts of 7, 7, 7 and 3: the same losses as in one go, but for rounding."""
    spec = replace(tiny_spec, protocol=replace(tiny_spec.protocol, pad_mask=pad_mask))
    whole = fit(spec, tiny_data, Fit(storage=storage))
    parts = fit(spec, tiny_data, Fit(storage=FolderStorage(tmp_path / "parts"), micro_batch=7))
    assert parts["trial_id"] == whole["trial_id"] and (parts["micro_batch"], whole["micro_batch"]) == (7, 24)
    for a, b in zip(whole["rows"], parts["rows"], strict=True):
        assert b["train_losses"] == pytest.approx(a["train_losses"], rel=2e-4)
        assert b["train_accuracy"] == pytest.approx(a["train_accuracy"], abs=0.05)


def test_recomputing_changes_no_bit_of_a_trial(tiny_spec, tiny_data, storage, undisturbed):
    result = science(fit(tiny_spec, tiny_data, Fit(storage=storage, recompute=True)))
    assert result.pop("recompute") and not undisturbed(tiny_spec)["recompute"]
    assert result == {key: value for key, value in undisturbed(tiny_spec).items() if key != "recompute"}


def test_half_precision_is_another_trial_and_nearly_the_same_numbers(tiny_spec, tiny_data, storage, undisturbed):
    half = replace(tiny_spec, training=replace(tiny_spec.training, precision="bf16"))
    result = fit(half, tiny_data, Fit(storage=storage))
    assert result["trial_id"] != undisturbed(tiny_spec)["trial_id"]
    given, wanted = (r["rows"][0]["train_losses"] for r in (result, undisturbed(tiny_spec)))
    assert given != wanted and given == pytest.approx(wanted, rel=0.05)


class Spoiled:
    """A trial whose gradient, or loss, is spoiled at one step, as an overflow would."""

    def __init__(self, monkeypatch, step: int, what: str):
        self.met = 0
        real_logits, real_step = step_module.logits_of, trainer.train_step
        at = 0

        def logits(*arguments: Any) -> torch.Tensor:
            logits_BC = real_logits(*arguments)
            if torch.is_grad_enabled() and at == step:
                self.met += 1
                if what == "loss":
                    return logits_BC * torch.inf
                logits_BC.register_hook(lambda gradient: gradient * torch.nan)
            return logits_BC

        def one_step(*arguments: Any, **options: Any):
            nonlocal at
            position: trainer.Position = arguments[-1]
            at = position.epoch * position.steps_per_epoch + position.step + 1
            return real_step(*arguments, **options)

        monkeypatch.setattr(step_module, "logits_of", logits)
        monkeypatch.setattr(trainer, "train_step", one_step)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_trial_at_its_step(what, tiny_spec, tiny_data, storage, monkeypatch):
    Spoiled(monkeypatch, 5, what)
    with pytest.raises(DivergedError, match=f"the {what} of step 5 is not finite") as caught:
        fit(tiny_spec, tiny_data, Fit(storage=storage))
    assert (caught.value.step, caught.value.what) == (5, what)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    name = trial_id(tiny_spec, tiny_data.manifest_sha256)
    assert len(list(storage.keys(f"trials/{name}/metrics"))) == 1, "the epoch before it stays"


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("step", [2, 5])
def test_a_rollback_leaves_out_the_one_step_wherever_it_was_saved(
    what, step, tiny_spec, tiny_data, storage, tmp_path, monkeypatch
):
    """Saved at every step or only at the ends of epochs, and before the first of them: one and the same result."""
    spec = replace(tiny_spec, protocol=replace(tiny_spec.protocol, divergence="rollback"))
    spoiled = Spoiled(monkeypatch, step, what)
    often = fit(spec, tiny_data, Fit(storage=storage, save_now=lambda: True))
    seldom = fit(spec, tiny_data, Fit(storage=FolderStorage(tmp_path / "seldom")))
    assert science(often) == science(seldom)
    assert spoiled.met == 2, "once in each run: the step is left out and not tried again"
    assert often["skipped_steps"] == [step]
    losses = [loss for row in often["rows"] for loss in row["train_losses"]]
    assert [number for number, loss in enumerate(losses, 1) if loss is None] == [step]


def test_a_trial_killed_after_its_rollback_ends_as_if_it_had_not_been(
    tiny_spec, tiny_data, storage, tmp_path, monkeypatch
):
    spec = replace(tiny_spec, protocol=replace(tiny_spec.protocol, divergence="rollback"))
    Spoiled(monkeypatch, 5, "gradient")
    wanted = fit(spec, tiny_data, Fit(storage=FolderStorage(tmp_path / "whole")))
    with pytest.raises(Killed):
        fit(spec, tiny_data, Fit(storage=storage, on_step=kill_at(8), save_now=lambda: True))
    assert science(fit(spec, tiny_data, Fit(storage=storage))) == science(wanted)


def test_a_second_divergence_is_not_rolled_back(tiny_spec, tiny_data, storage, monkeypatch):
    spec = replace(tiny_spec, protocol=replace(tiny_spec.protocol, divergence="rollback"))
    Spoiled(monkeypatch, 5, "gradient")
    Spoiled(monkeypatch, 7, "gradient")
    with pytest.raises(DivergedError, match="the gradient of step 7"):
        fit(spec, tiny_data, Fit(storage=storage))


def test_a_notice_during_the_evaluation_saves_what_waits_for_it(tiny_spec, tiny_data, storage, undisturbed):
    """The third step of three is done and its epoch is being evaluated; after a kill no step is trained again."""
    seen: list[int] = []

    def on_step(total_step: int) -> None:
        seen.append(total_step)
        if seen.count(3) == 3:  # after its own step and two batches of the evaluation
            raise Killed

    with pytest.raises(Killed):
        fit(
            tiny_spec,
            tiny_data,
            Fit(storage=storage, micro_batch=8, on_step=on_step, save_now=lambda: seen.count(3) == 2),
        )
    name = trial_id(tiny_spec, tiny_data.manifest_sha256)
    assert committed(storage, f"trials/{name}/checkpoints")[-1] == "step-00000003"
    assert not list(storage.keys(f"trials/{name}/metrics"))
    trained: list[int] = []
    fit(tiny_spec, tiny_data, Fit(storage=storage, micro_batch=8, on_step=trained.append))
    assert trained[0] == 3 and trained.count(3) == 3, "evaluated, not trained"


def test_the_best_weights_are_those_of_the_best_epoch(tiny_spec, tiny_data, storage, tmp_path):
    result = fit(tiny_spec, tiny_data, Fit(storage=storage))
    folder = f"trials/{result['trial_id']}"
    weights, said = load_best(storage, folder)
    assert said["epoch"] == result["best_epoch"]["best_test"] and said["value"] == result["accuracy"]["best_test"]
    if said["epoch"] == tiny_spec.training.epochs:
        assert hashlib.sha256(save(weights)).hexdigest() == result["weights_sha256"]
    killed = FolderStorage(tmp_path / "killed")
    for step in (2, 5, 8):
        with pytest.raises(Killed):
            fit(tiny_spec, tiny_data, Fit(storage=killed, on_step=kill_at(step), save_now=lambda: True))
    fit(tiny_spec, tiny_data, Fit(storage=killed))
    assert save(load_best(killed, folder)[0]) == save(weights)


def test_a_result_tells_what_the_selected_epoch_took_for_what(tiny_spec, tiny_data, storage):
    result = fit(tiny_spec, tiny_data, Fit(storage=storage))
    assert result["selected_epoch"] == result["best_epoch"]["best_test"]
    right, clips = (sum(n for a, b, n in result["selected_confusion"] if a == b or every) for every in (False, True))
    assert clips == result["test_clips"] and right / clips == result["accuracy"]["best_test"]
    last = sum(n for a, b, n in result["confusion"] if a == b)
    assert last / clips == result["accuracy"]["last"]


def test_a_confusion_that_is_missing_damaged_or_of_other_rows_is_left_out_and_the_trial_ends(
    tiny_spec, tiny_data, tmp_path
):
    def spoilt(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        storage = FolderStorage(tmp_path / uuid.uuid4().hex)
        name = trial_id(tiny_spec, tiny_data.manifest_sha256)
        with pytest.raises(Killed):
            fit(tiny_spec, tiny_data, Fit(storage=storage, on_step=kill_at(STEPS), save_now=lambda: True))
        key = f"trials/{name}/best/manifest.json"
        body = {name: value for name, value in storage.get_json(key).items() if name != "sha256"}
        storage.put_json(key, sealed(change(body)))
        return fit(tiny_spec, tiny_data, Fit(storage=storage))

    whole = fit(tiny_spec, tiny_data, Fit(storage=FolderStorage(tmp_path / "whole")))
    if whole["selected_epoch"] == tiny_spec.training.epochs:
        pytest.skip("the last epoch is the best one here, and writes the manifest anew")
    assert spoilt(lambda body: body)["selected_confusion"] == whole["selected_confusion"]
    changes = (
        lambda body: {key: value for key, value in body.items() if key != "confusion"},  # an earlier version
        lambda body: body | {"value": 0.123},
    )
    for change in changes:
        result = spoilt(change)
        assert "selected_confusion" not in result and "selected_epoch" not in result
        assert result["weights_sha256"] == whole["weights_sha256"]


def test_what_the_machine_did_stands_in_the_row_and_changes_nothing_else(tiny_spec, tiny_data, storage, tmp_path):
    plain = fit(tiny_spec, tiny_data, Fit(storage=storage))
    measured = fit(tiny_spec, tiny_data, Fit(storage=FolderStorage(tmp_path / "m"), measured=lambda: {"cpu": 7.0}))
    assert [row["system"] for row in measured["rows"]] == [{"cpu": 7.0}] * 3
    assert not any("system" in row for row in plain["rows"])
    for row in measured["rows"]:
        del row["system"]
    assert science(measured) == science(plain)


def test_a_change_of_environment_is_told_and_recorded(tiny_spec, tiny_data, storage, monkeypatch, caplog):
    with pytest.raises(Killed):
        fit(tiny_spec, tiny_data, Fit(storage=storage, on_step=kill_at(4), save_now=lambda: True))
    monkeypatch.setenv("HELIX_SCAN", "reference")
    result = fit(tiny_spec, tiny_data, Fit(storage=storage))
    assert [name.split(", ")[1] for name in result["environments"]] == ["scan numba", "scan reference"]
    assert result["scan"] == "reference"
    assert "goes on in another environment" in caplog.text


@pytest.mark.parametrize("how", [{"placement": "device"}, {"ahead": 3}, {"placement": "device", "ahead": 1}])
def test_where_samples_lie_and_who_makes_batches_changes_no_bit(tiny_spec, tiny_data, storage, undisturbed, how):
    assert science(fit(tiny_spec, tiny_data, Fit(storage=storage, **how))) == undisturbed(tiny_spec)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches ahead")]


def test_a_validation_loss_that_is_not_finite_is_a_divergence(tiny_spec, tiny_data, storage, monkeypatch):
    spec = replace(tiny_spec, protocol=replace(profile("fair"), divergence="rollback"))
    real, calls = trainer._Trial._evaluate, []

    def evaluate(trial, clips, on_batch):
        calls.append(len(clips))
        evaluation = real(trial, clips, on_batch)
        return replace(evaluation, loss=float("nan")) if len(calls) == 4 else evaluation

    monkeypatch.setattr(trainer._Trial, "_evaluate", evaluate)
    with pytest.raises(DivergedError, match="the validation loss of step 4 is not finite"):
        fit(spec, tiny_data, Fit(storage=storage))


def test_every_checkpoint_is_told_with_what_it_cost_and_costs_no_number(
    tiny_data: Recordings, tiny_spec: TrialSpec, storage: FolderStorage, tmp_path: Path
):
    told: list[tuple[float, float]] = []
    how = Fit(storage=storage, save_now=lambda: True, on_save=lambda hold_s, write_s: told.append((hold_s, write_s)))
    watched = fit(tiny_spec, tiny_data, how)
    assert len(told) >= STEPS  # each step, and the ends of epochs
    assert all(hold_s > 0 and write_s > 0 for hold_s, write_s in told)
    assert science(fit(tiny_spec, tiny_data, Fit(storage=FolderStorage(tmp_path / "alone")))) == science(watched)
