"""The loop: stopping it anywhere changes nothing, it learns, and it never hides a loss that is not a number."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helix.data.shards import Recordings
from helix.protocol import profile
from helix.spec import TrialSpec, trial_id
from helix.storage import FolderStorage
from helix.training.checkpoint import committed
from helix.training.trainer import DivergedError, Fit, fit, row_key
from orchestration.grid import VARIANTS

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
    timed = {"rows": rows, "train_seconds": None, "finished": None}
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


def test_how_often_it_saves_is_not_science(tiny_spec, tiny_data, storage, undisturbed):
    assert science(fit(tiny_spec, tiny_data, Fit(storage=storage, save_every_s=0.0))) == undisturbed(tiny_spec)


def test_a_row_lost_between_checkpoint_and_row_comes_back(tiny_spec, tiny_data, storage, undisturbed):
    with pytest.raises(Killed):
        fit(tiny_spec, tiny_data, Fit(storage=storage, on_step=kill_at(4)))
    name = trial_id(tiny_spec, tiny_data.manifest_sha256)
    before = storage.get(row_key(name, 1))
    storage.delete(row_key(name, 1))
    result = fit(tiny_spec, tiny_data, Fit(storage=storage))
    assert storage.get(row_key(name, 1)) == before
    assert [row["epoch"] for row in result["rows"]] == [1, 2, 3]


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
