"""The plan: what may be compared, what it costs, how it is dealt over workers, and how it stands."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix.data.index import Recording, listed_index
from helix.models.classifier import Cost
from helix.protocol import PROFILES
from helix.registry import GRIDS
from helix.spec import trial_id
from helix.storage import CorruptRecordError, FolderStorage, Storage, sealed
from orchestration import plan as plan_module
from orchestration.grid import PRESETS, Grid, Trial, Variant, expand, load_grid
from orchestration.plan import (
    BAND,
    Planned,
    Snapshot,
    check_band,
    check_trials,
    data_facts,
    make_plan,
    pack,
    price,
    with_memory,
)

MANIFEST = "5eed" * 16
(TRIAL, *_) = expand(load_grid("demo"), variants=["mamba-raw"])


def prepared(*, clips_per_fold: int = 144, folds: Sequence[int] = (1, 2, 3, 4), **changed: Any) -> Any:
    """Stands for prepared tones: an index that has folds, and a manifest."""
    fold = np.repeat(np.asarray(folds, dtype=np.int32), clips_per_fold)
    manifest = {
        "dataset": "tones",
        "classes": [str(number) for number in range(6)],
        "recordings": len(fold),
        "expected_recordings": 576,
        "recordings_per_class": {"a": len(fold) - 5, "b": 1, "c": 1, "d": 1, "e": 1, "f": 1},
        "partial": False,
        "seconds": 884.7,
        "licence": "CC0-1.0",
        "caveat": None,
        "padded_fraction": 0.25,
        "missing": {},
        "quarantined": {},
    }
    listing = [
        Recording(recording_id=str(row), label=row % 6, path=None, fold=int(of), speaker=None, group=str(row))
        for row, of in enumerate(fold)
    ]
    index = replace(listed_index(listing), samples=np.full(len(fold), 24_576))
    return SimpleNamespace(
        index=index, classes=tuple(manifest["classes"]), manifest=manifest | changed, manifest_sha256=MANIFEST
    )


# What may be compared


def test_within_the_band_sizes_may_differ_on_each_frontend_for_itself():
    check_band({"a": ("raw", 1_000_000), "b": ("raw", 999_000), "c": ("mel", 2_000_000), "d": ("mel", 2_000_000)})


def test_the_band_is_a_thousandth_of_the_larger_one():
    assert BAND == 0.001
    check_band({"a": ("raw", 100_000), "b": ("raw", 99_900)})
    with pytest.raises(ValueError):
        check_band({"a": ("raw", 100_000), "b": ("raw", 99_899)})


def test_sizes_outside_the_band_are_refused_with_every_count():
    with pytest.raises(ValueError) as refused:
        check_band({"a-mel": ("mel", 7), "a-raw": ("raw", 1_234_567), "b-raw": ("raw", 1_230_000)})
    assert str(refused.value) == (
        "this comparison would not be fair: parameter counts on the raw frontend differ by 0.37% and 0.1% is allowed "
        "(a-raw 1,234,567, b-raw 1,230,000); change model.width or a block's options so that the blocks can be matched"
    )


@pytest.mark.parametrize("who", PROFILES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", GRIDS.names())
def test_every_grid_is_a_fair_comparison_in_every_profile_and_size(name: str, preset: str, who: str):
    grid = load_grid(name)
    check_trials(expand(grid, profile_name=who, preset=preset, folds=grid.folds[:1]))


def test_unlike_models_are_refused_before_there_are_data():
    long, short = (Variant(frontend="raw", backbone=f"mamba{n}", pattern=("mamba",) * n) for n in (6, 5))
    trials = expand(Grid(question="", dataset="tones", folds=(1,), variants=(long, short), preset="small"))
    counts = [f"{trial.variant.name} {price(trial).parameters:,}" for trial in trials]
    with pytest.raises(ValueError) as refused:
        check_trials(trials)
    assert f"({', '.join(counts)})" in str(refused.value)


def test_what_cannot_be_built_is_refused_before_there_are_data():
    with pytest.raises(ValueError, match="block 'attention': width 66 does not divide into 4 heads"):
        check_trials(expand(load_grid("demo"), overrides=["model.width=66"]))


@pytest.mark.parametrize(
    "option",
    [
        "mamba.d_state=-3",
        "mamba.d_conv=0",
        "mamba.expand=0",
        "attention.heads=0",
        "attention.heads=-2",
        "raw.samples_per_token=0",
        "mel.hop=0",
        "mel.patch=0",
        "mel.n_fft=0",
    ],
)
def test_an_option_that_makes_no_sense_is_refused_by_name(option: str):
    with pytest.raises(ValueError, match=option.partition("=")[0].partition(".")[2]):
        check_trials(expand(load_grid("demo"), folds=[1], overrides=[f"model.options.{option}"]))


# The plan


def test_a_planned_trial_has_its_name_its_steps_and_its_price():
    (entry,) = make_plan([TRIAL], prepared())
    assert entry.trial_id == trial_id(TRIAL.spec, MANIFEST)
    assert entry.cost == price(TRIAL)
    assert entry.steps_per_epoch == 3 * 144 // TRIAL.spec.training.batch_size
    assert entry.steps == entry.steps_per_epoch * TRIAL.spec.training.epochs
    assert entry.work == entry.steps * TRIAL.spec.training.batch_size * entry.cost.training_flops_per_clip


def test_a_held_out_fold_takes_steps_away():
    trials = expand(load_grid("demo"), variants=["mamba-raw"], folds=[1], overrides=["protocol.validation=held_out"])
    (entry,) = make_plan(trials, prepared())
    assert entry.steps_per_epoch == 2 * 144 // entry.trial.spec.training.batch_size


def test_clips_that_fill_no_batch_are_refused_in_words():
    size = TRIAL.spec.training.batch_size
    with pytest.raises(ValueError) as refused:
        make_plan([TRIAL], prepared(clips_per_fold=size // 4))
    assert str(refused.value) == (
        f"mamba-raw fold 1 seed 0: {size // 4 * 3} training clips do not fill one batch of {size}; "
        "lower training.batch_size"
    )


def test_a_fold_that_was_not_prepared_is_refused_with_those_that_were():
    with pytest.raises(ValueError, match=r"fold 1 is not among the prepared recordings; present: 2, 3"):
        make_plan([TRIAL], prepared(folds=(2, 3)))


# Packs


def planned(*works: int) -> list[Planned]:
    """Trials of so much work each, named by their position."""
    free = Cost(parameters=0, tokens=0, forward_flops_per_clip=0, training_flops_per_clip=0)
    return [
        _Fixed(trial=TRIAL, trial_id=str(number), cost=free, steps_per_epoch=work) for number, work in enumerate(works)
    ]


class _Fixed(Planned):
    """A planned trial whose work is its number of steps."""

    @property
    def work(self) -> float:
        return float(self.steps_per_epoch)


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 12))
def test_every_trial_is_dealt_once_and_the_packs_are_balanced(works: list[int], workers: int):
    packs = pack(planned(*works), workers=workers)
    assert sorted(entry.trial_id for entries in packs for entry in entries) == sorted(map(str, range(len(works))))
    assert len(packs) == min(workers, len(works))
    assert all(packs)
    loads = [sum(entry.work for entry in entries) for entries in packs]
    if loads:
        assert max(loads) - min(loads) <= max(works)


def test_the_longest_trials_come_first():
    packs = pack(planned(1, 5, 3, 9, 2, 4), workers=2)
    assert [[entry.work for entry in entries] for entries in packs] == [[9, 3], [5, 4, 2, 1]]


def test_trials_of_equal_work_keep_their_order():
    packs = pack(planned(1, 1, 1, 1, 1), workers=2)
    assert [[entry.trial_id for entry in entries] for entries in packs] == [["0", "2", "4"], ["1", "3"]]


# How it stands


def snapshot(storage: Storage, trials: Sequence[Trial], recordings: Any) -> Snapshot:
    return Snapshot(
        grid_name="demo",
        grid=load_grid("demo"),
        plan=make_plan(trials, recordings),
        recordings=recordings,
        storage=storage,
        command="python orchestration/sweep.py --grid demo",
    )


def finished(*epochs: int) -> dict[str, Any]:
    """A result, as far as it is read."""
    said = {"test_accuracy": 0.5, "seconds": 1.0, "time": 1.0}
    rows = [{"epoch": epoch, "step": 13 * epoch, **said} for epoch in epochs]
    return sealed({"rows": rows, "accuracy": {"best_test": 0.5}, "finished": 1.0})


def test_what_is_damaged_stops_a_training_and_no_report(tmp_path: Path):
    storage = FolderStorage(tmp_path)
    snap = snapshot(storage, expand(load_grid("demo"), variants=["mamba-raw"]), prepared())
    whole, broken = [entry.trial_id for entry in snap.plan]
    storage.put_json(f"trials/{whole}/result.json", finished(1))
    changed = finished(1) | {"accuracy": {"best_test": 0.99}}
    storage.put_json(f"trials/{broken}/result.json", changed)
    storage.put("certificates/0123.json", b"{")
    with pytest.raises(CorruptRecordError, match=f"{broken}/result.json: does not match its own checksum"):
        snap.states()
    for _ in range(2):
        view = snap()
        states = {trial.trial_id: trial.state for _, trial in view.trials()}
        assert {name: state.status for name, state in states.items()} == {whole: "done", broken: "failed"}
        assert states[broken].result is None and "checksum" in str(states[broken].error)
        assert [line.partition(": ")[0] for line in view.damage] == [
            f"trials/{broken}/result.json",
            "certificates/0123.json",
        ]
    with pytest.raises(CorruptRecordError, match=broken):
        snap.states()
    storage.put_json(f"trials/{broken}/result.json", finished(1))
    assert {state.status for state in snap.states().values()} == {"done"}


def test_a_snapshot_shows_every_trial_as_storage_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr(plan_module.time, "time", lambda: now)
    storage, recordings = FolderStorage(tmp_path), prepared()
    snap = snapshot(storage, expand(load_grid("demo"), variants=["mamba-raw", "helix-mel"]), recordings)
    done, running, failed, missing = [entry.trial_id for entry in snap.plan]
    storage.put_json(f"trials/{done}/result.json", finished(1, 2))
    storage.put_json(f"trials/{running}/attempts/1.json", {"attempt_id": "1", "started": now - 1})
    storage.put_json(
        f"trials/{failed}/attempts/1.json",
        {"attempt_id": "1", "started": 1, "ended": 2, "outcome": "failed", "error": "OSError: no space"},
    )
    view = snap()
    states = {trial.trial_id: trial.state.status for _, trial in view.trials()}
    assert states == {done: "done", running: "running", failed: "failed", missing: "missing"}
    assert [(cell.variant, cell.backbone, cell.frontend) for cell in view.cells] == [
        ("mamba-raw", "mamba", "raw"),
        ("helix-mel", "helix", "mel"),
    ]
    for cell, entry in zip(view.cells, snap.plan, strict=False):
        assert (cell.parameters, cell.tokens) == (entry.cost.parameters, entry.cost.tokens)
        assert cell.epochs == entry.trial.spec.training.epochs
    assert (view.grid, view.profile, view.created) == ("demo", "paper", now)
    assert view.question == load_grid("demo").question


def test_the_papers_first_table_is_predicted_for_the_backbones_of_the_sweep(tmp_path: Path):
    trials = expand(load_grid("demo"), variants=["mamba-raw", "attention-raw"])
    elsewhere = snapshot(FolderStorage(tmp_path), trials, prepared())()
    assert with_memory(elsewhere) is elsewhere, "the paper does not speak of tones"
    view = replace(elsewhere, cells=tuple(replace(cell, dataset="esc50") for cell in elsewhere.cells))
    told = {(one.tokens, one.backbone, one.attn_impl): one for one in with_memory(view).memory}
    assert {backbone for _, backbone, _ in told} == {"mamba", "attention"}
    paper_says_oom = told[30_000, "attention", "weights"]
    assert paper_says_oom.verdict == "no"
    assert paper_says_oom.predicted_bytes > 48e9 > 8 * told[30_000, "attention", "sdpa"].predicted_bytes


class Counting(FolderStorage):
    """A storage that counts how often a result is read."""

    results_read = 0

    def get(self, key: str) -> bytes:
        self.results_read += key.endswith("result.json")
        return super().get(key)


def test_a_finished_trial_is_read_once(tmp_path: Path):
    storage = Counting(tmp_path)
    snap = snapshot(storage, [TRIAL], prepared())
    (entry,) = snap.plan
    assert snap.states()[entry.trial_id].status == "missing"
    assert storage.results_read == 0  # one listing tells that nobody began it
    storage.put_json(f"trials/{entry.trial_id}/spec.json", {})
    assert snap.states()[entry.trial_id].status == "missing"
    assert storage.results_read == 0  # a listing tells that there is none
    storage.put_json(f"trials/{entry.trial_id}/result.json", finished(1))
    for _ in range(3):
        assert snap.states()[entry.trial_id].status == "done"
        assert storage.results_read == 1


def test_guessing_is_naming_the_most_frequent_class():
    assert data_facts(prepared(clips_per_fold=25)).chance == 95 / 100


def test_guessing_is_about_the_clips_that_are_tested():
    found = prepared()
    found.index.label[:100] = 3
    trials = expand(load_grid("demo"), variants=["mamba-raw"], folds=[1, 2])
    label = found.index.label[:288]
    assert data_facts(found, trials).chance == np.bincount(label).max() / 288


def test_what_preparation_left_out_is_told():
    whole = data_facts(prepared())
    part = data_facts(prepared(partial=True, missing={"one": "not there"}, quarantined={"two": {}, "three": {}}))
    assert (whole.partial, part.partial) == (False, True)
    assert whole.notes == ("25.0% of the samples are padding or silence at the end of a recording",)
    assert part.notes[1:] == (
        "1 recordings are missing",
        "2 recordings were left out because their files cannot be used",
    )


def test_the_clips_of_every_fold_that_is_asked_for_are_told():
    trials = expand(load_grid("demo"), variants=["mamba-raw"], folds=[1, 2], overrides=["protocol.validation=held_out"])
    notes = data_facts(prepared(), trials).notes[1:]
    assert [note.partition(":")[0] for note in notes] == [
        f"fold {fold}, {part}" for fold in (1, 2) for part in ("train", "validation", "test")
    ]
    assert notes[0] == (
        "fold 1, train: 288 clips of 288 recordings, 6 of 6 classes with 48 to 48 clips each, 0.0% silence"
    )


def test_the_model_has_as_many_classes_as_were_prepared():
    (entry,) = make_plan([TRIAL], prepared(classes=["a"] * 6))
    fewer = prepared()
    fewer.classes = fewer.classes[:4]
    (other,) = make_plan([TRIAL], fewer)
    assert entry.cost.parameters - other.cost.parameters == 2 * (TRIAL.spec.model.width + 1)
