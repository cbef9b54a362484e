"""A grid is a written question; expanding it gives exactly the trials it asks for, and planning needs no machinery."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from helix.protocol import PROFILES, profile
from helix.registry import DATASETS
from helix.spec import TrialSpec, trial_id
from orchestration.grid import (
    BACKBONES,
    GRIDS,
    PRESETS,
    SET_BY_THE_GRID,
    VARIANTS,
    Grid,
    Trial,
    expand,
    load_grid,
)

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = "5eed" * 16
NAMES = ["mamba-raw", "mamba-mel", "helix-raw", "helix-mel", "attention-raw", "attention-mel"]


@cache
def trials_of(name: str) -> tuple[Trial, ...]:
    """The trials of a grid as it is written."""
    return tuple(expand(load_grid(name)))


ONE = Grid(question="Is one enough?", dataset="tones", folds=(1,), seeds=(3,), overrides={"training.epochs": 7})


# The written questions


@pytest.mark.parametrize("name", GRIDS.names())
def test_a_grid_states_question_command_trials_price_and_expectation(name: str):
    question = load_grid(name).question
    first, rest = question.split("\n", 1)
    assert "?" in first
    headings = ["Question.", "Command.", "Trials.", "Price.", "Expectation."]
    found = [line.split()[0] for line in rest.splitlines() if re.match(r"[A-Z]\w+\. ", line)]
    assert found == headings
    for heading, text in zip(headings, re.split("|".join(map(re.escape, headings)), rest)[1:], strict=True):
        assert len(text.split()) >= 3, f"{heading} says nothing"


@pytest.mark.parametrize("name", GRIDS.names())
def test_the_number_of_trials_that_a_grid_states_is_the_number_it_expands_to(name: str):
    stated = re.search(r"^Trials\. .*= (\d+)\b", load_grid(name).question, re.MULTILINE)
    assert stated is not None
    assert int(stated[1]) == len(trials_of(name))


@pytest.mark.parametrize("name", GRIDS.names())
def test_the_command_that_a_grid_states_runs_that_grid(name: str):
    command = re.search(r"^Command\. (.*)$", load_grid(name).question, re.MULTILINE)
    assert command is not None
    assert re.search(rf"orchestration/sweep\.py --grid {name}\b", command[1])


@pytest.mark.parametrize("name", GRIDS.names())
def test_a_grid_asks_for_folds_that_its_data_set_has(name: str):
    grid = load_grid(name)
    assert set(grid.folds) <= set(DATASETS.make(grid.dataset).folds)


@pytest.mark.parametrize("name", GRIDS.names())
def test_no_two_trials_of_a_grid_are_the_same(name: str):
    trials = trials_of(name)
    assert len({trial_id(trial.spec, MANIFEST) for trial in trials}) == len(trials)
    assert len({trial.label for trial in trials}) == len(trials)


# Expanding


def test_the_demo_has_twelve_trials_by_fold_then_seed_then_variant():
    trials = trials_of("demo")
    assert [trial.label for trial in trials] == [f"{name} fold {fold} seed 0" for fold in (1, 2) for name in NAMES]
    assert {trial.spec.data.dataset for trial in trials} == {"tones"}
    assert {trial.spec.model.width for trial in trials} == {64}


def test_esc50_has_thirty_trials_of_the_papers_size():
    trials = trials_of("esc50")
    assert [trial.label for trial in trials] == [
        f"{name} fold {fold} seed 0" for fold in (1, 2, 3, 4, 5) for name in NAMES
    ]
    assert {trial.spec.data.dataset for trial in trials} == {"esc50"}
    assert {(trial.spec.model.width, trial.spec.training.epochs) for trial in trials} == {(256, 100)}


def test_the_variants_are_the_papers_six():
    assert [variant.name for variant in VARIANTS] == NAMES
    assert {name: pattern.count("attention") for name, pattern in BACKBONES.items()} == {
        "mamba": 0,
        "helix": 1,
        "attention": 6,
    }
    assert BACKBONES["helix"].index("attention") == 3
    assert {len(pattern) for pattern in BACKBONES.values()} == {6}


def test_a_trial_is_its_variant_fold_and_seed():
    for trial in expand(load_grid("demo"), folds=[2, 4], seeds=[5]):
        model = trial.spec.model
        assert (model.frontend, model.pattern) == (trial.variant.frontend, trial.variant.pattern)
        assert trial.label == f"{trial.variant.name} fold {trial.spec.data.fold} seed {trial.spec.seed}"


def test_variants_of_one_fold_differ_in_nothing_but_frontend_and_pattern():
    plain = []
    for trial in expand(load_grid("demo"), folds=[1]):
        value: dict[str, Any] = {**vars(trial.spec), "model": {**vars(trial.spec.model)}}
        del value["model"]["frontend"], value["model"]["pattern"]
        plain.append(value)
    assert all(value == plain[0] for value in plain)


@pytest.mark.parametrize("who", PROFILES)
def test_a_profile_holds_for_every_trial(who: str):
    trials = expand(load_grid("demo"), profile_name=who, folds=[1])
    assert len(trials) == 6
    assert {trial.spec.protocol for trial in trials} == {profile(who)}


def test_without_a_word_the_profile_is_the_papers():
    assert {trial.spec.protocol.profile for trial in trials_of("demo")} == {"paper"}


def test_folds_seeds_and_variants_replace_those_of_the_grid():
    trials = expand(load_grid("esc50"), folds=[4, 2], seeds=[7, 8], variants=["helix-mel", "mamba-raw"])
    assert [trial.label for trial in trials] == [
        f"{name} fold {fold} seed {seed}" for fold in (4, 2) for seed in (7, 8) for name in ("helix-mel", "mamba-raw")
    ]


def test_adding_seeds_keeps_the_trials_that_there_were():
    before = {trial_id(trial.spec, MANIFEST) for trial in expand(ONE)}
    after = {trial_id(trial.spec, MANIFEST) for trial in expand(ONE, seeds=[3, 4])}
    assert before < after


# What wins over what


def test_the_grid_wins_over_the_preset_and_the_user_over_both():
    grid = Grid(question="", dataset="tones", folds=(1,), preset="small", overrides={"model.width": 96})
    (plain, *_) = expand(grid)
    d_state = PRESETS["small"]["model.options.mamba.d_state"]
    assert (plain.spec.model.width, plain.spec.model.options) == (96, {"mamba": {"d_state": d_state}})
    (given, *_) = expand(grid, overrides=["model.width=128", f"model.options.mamba.d_state={d_state + 1}"])
    assert (given.spec.model.width, given.spec.model.options) == (128, {"mamba": {"d_state": d_state + 1}})


def test_a_preset_replaces_the_grids():
    assert {trial.spec.model.width for trial in expand(load_grid("demo"), preset="paper", folds=[1])} == {256}
    assert {trial.spec.model.width for trial in expand(load_grid("esc50"), preset="small", folds=[1])} == {64}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_understood(name: str):
    assert len(expand(ONE, preset=name)) == 6


def test_a_single_switch_may_differ_from_the_profile():
    (trial, *_) = expand(ONE, profile_name="fair", overrides=["protocol.decay=all"])
    assert (trial.spec.protocol.profile, trial.spec.protocol.decay) == ("fair", "all")


def test_what_nobody_set_is_the_default():
    (trial, *_) = expand(ONE)
    assert trial.spec.training.epochs == 7
    assert trial.spec.seed == 3
    assert trial.spec.training.lr == TrialSpec().training.lr


# What is refused


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"preset": "tiny"}, "unknown preset 'tiny'; known: paper, small"),
        ({"profile_name": "mine"}, "unknown profile 'mine'; known: authors, paper, fair"),
        ({"variants": ["mamba"]}, f"unknown variant 'mamba'; this grid has {', '.join(NAMES)}"),
        ({"variants": ["mamba-raw", "mamba-raw"]}, "each variant may be named once; given mamba-raw, mamba-raw"),
        ({"folds": [1, 2, 1]}, "each fold may be named once; given 1, 2, 1"),
        ({"seeds": [4, 4]}, "each seed may be named once; given 4, 4"),
        ({"seeds": [-1]}, "seed is -1; wanted 0 or more"),
        (
            {"overrides": ["training.epochs"]},
            "'training.epochs' is not an override; wanted key=value, as in training.epochs=3",
        ),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(asked: dict[str, Any], complaint: str):
    with pytest.raises(ValueError) as refused:
        expand(load_grid("demo"), **asked)
    assert str(refused.value) == complaint


def test_an_unknown_grid_is_answered_with_the_known_ones():
    with pytest.raises(ValueError) as refused:
        load_grid("esc51")
    assert str(refused.value) == f"unknown grid 'esc51'; known: {', '.join(GRIDS.names())}"


@pytest.mark.parametrize("key", SET_BY_THE_GRID)
def test_a_key_that_the_grid_sets_is_refused_with_what_sets_it(key: str):
    with pytest.raises(ValueError) as refused:
        expand(ONE, overrides=[f"{key}=1"])
    assert str(refused.value) == f"{key} is set by the grid for each trial; use {SET_BY_THE_GRID[key]}"


def test_every_key_that_tells_the_trials_apart_is_set_by_the_grid():
    trials = expand(load_grid("demo"), seeds=[0, 1], variants=["mamba-raw", "helix-mel"])
    told = {
        "data.dataset": {trial.spec.data.dataset for trial in trials},
        "data.fold": {trial.spec.data.fold for trial in trials},
        "seed": {trial.spec.seed for trial in trials},
        "model.frontend": {trial.spec.model.frontend for trial in trials},
        "model.pattern": {trial.spec.model.pattern for trial in trials},
    }
    assert set(told) == set(SET_BY_THE_GRID)
    assert {key for key, values in told.items() if len(values) > 1} == set(told) - {"data.dataset"}


@pytest.mark.parametrize(
    "override",
    ["data={fold: 3}", "data[fold]=3", "data={dataset: esc50}", "model={frontend: mel}", "model[frontend]=mel"],
)
def test_no_spelling_of_a_key_that_the_grid_sets_is_swallowed(override: str):
    with pytest.raises(ValueError):
        expand(ONE, overrides=[override])


# What planning costs

PLAN = """
import sys, time
from pathlib import Path
from helix.storage import FolderStorage
from orchestration.grid import GRIDS, expand, load_grid
from orchestration.ledger import read
from orchestration.recovery import Budget, decide
for name in GRIDS.names():
    for trial in expand(load_grid(name), profile_name="fair", overrides=["training.epochs=3"]):
        read(FolderStorage(Path(sys.argv[1])), "0123456789abcdef", now=time.time())
decide([], Budget())
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "ray", "mlflow", "numba", "pyarrow"}))
"""


def test_planning_needs_no_torch_and_no_ray(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", PLAN, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"
