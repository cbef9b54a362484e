"""What is said to be unlike the paper's: what its own grids ask for is not, and what a user changed is."""

from dataclasses import dataclass, replace

import pytest

from dashboards.unlike import OF_BLOCK, OF_FRONTEND, OF_SPEAKERS, SAME_NUMBERS, Setting, other_settings
from dashboards.view import CellView
from helix.protocol import SWITCHES
from helix.registry import BLOCKS, FRONTENDS
from orchestration.grid import GRIDS, Trial, expand, load_grid


def cell_of(trial: Trial) -> CellView:
    spec = trial.spec
    return CellView(
        dataset=spec.data.dataset,
        variant=trial.variant.name,
        frontend=spec.model.frontend,
        backbone=trial.variant.backbone,
        pattern=tuple(spec.model.pattern),
        epochs=spec.training.epochs,
        options=spec.data.options,
        model=spec.model,
        training=spec.training,
        augment=spec.augment,
    )


def settings_of(trial: Trial, **changed: str) -> tuple[Setting, ...]:
    switches = {name: getattr(trial.spec.protocol, name) for name in SWITCHES}
    return other_settings(cell_of(trial), switches | changed)


@pytest.mark.parametrize("profile", ["paper", "authors"])
@pytest.mark.parametrize("name", sorted(set(GRIDS.names()) - {"demo"}))
def test_what_a_grid_of_the_paper_asks_for_is_like_the_papers(name: str, profile: str):
    for trial in expand(load_grid(name), profile_name=profile):
        assert settings_of(trial) == (), trial.label


@pytest.mark.parametrize("name", sorted(set(GRIDS.names()) - {"demo"}))
def test_the_small_preset_differs_in_the_state_of_mamba_beside_its_size(name: str):
    for trial in expand(load_grid(name), profile_name="authors", preset="small"):
        wanted = ["mamba d_state 6 instead of 32"] if "mamba" in trial.spec.model.pattern else []
        assert [one.phrase for one in settings_of(trial)] == wanted


def test_good_practice_keeps_from_printed_numbers_and_not_from_sentences():
    for trial in expand(load_grid("librispeech"), profile_name="fair"):
        found = settings_of(trial)
        names = {one.phrase.split()[0] for one in found}
        assert {"pad_mask", "stitch", "speaker_split", "validation"} <= names
        assert {one.speaks_of for one in found} == {"sentences"}


def test_switches_of_speakers_concern_no_data_set_without_them():
    for trial in expand(load_grid("esc50"), profile_name="fair"):
        assert not {"stitch", "speaker_split"} & {one.phrase.split()[0] for one in settings_of(trial)}


def test_an_unknown_data_set_block_and_frontend_are_nobodys_defaults():
    trial = expand(load_grid("esc50"))[0]
    cell = replace(cell_of(trial), dataset="mine", frontend="new", backbone="own", pattern=("own",), options={"a": "b"})
    assert cell.model is not None
    cell = replace(cell, model=replace(cell.model, frontend="new", pattern=("own",), options={"own": {"x": 1}}))
    assert other_settings(cell, {}) == ()
    assert other_settings(replace(cell, model=None, training=None, augment=None), {}) == ()


def test_a_variant_of_the_papers_name_with_other_layers_is_not_the_papers():
    trial = next(one for one in expand(load_grid("esc50")) if one.variant.backbone == "helix")
    first = replace(cell_of(trial), pattern=("attention", *("mamba",) * 5))
    assert [one.phrase for one in other_settings(first, {})] == ["other layers than the paper's helix"]


def test_options_that_this_version_does_not_know_are_named_and_stop_no_report():
    cell = cell_of(expand(load_grid("esc50"))[0])
    assert cell.model is not None
    odd = replace(cell, model=replace(cell.model, options={"mamba": {"gone": 1}}))
    assert [one.phrase for one in other_settings(odd, {})] == ["mamba gone 1"]


def test_a_block_of_a_users_own_without_defaults_stops_no_report(monkeypatch: pytest.MonkeyPatch):
    @dataclass(frozen=True)
    class Own:
        rank: int

    monkeypatch.setitem(BLOCKS._members, "own", Own)
    cell = replace(cell_of(expand(load_grid("esc50"))[0]), backbone="mine", pattern=("own",) * 6)
    assert cell.model is not None
    cell = replace(cell, model=replace(cell.model, pattern=("own",) * 6, options={"own": {"rank": 2}}))
    assert other_settings(cell, {}) == ()


def test_what_becomes_of_a_loss_that_is_not_finite_is_named_alone():
    trial = expand(load_grid("esc50"))[0]
    (found,) = settings_of(trial, divergence="rollback")
    assert found == Setting(phrase="divergence rollback instead of stop", speaks_of="all")


def test_as_many_tokens_as_there_are_are_all_of_them():
    cell = cell_of(expand(load_grid("esc50"))[0])
    assert cell.model is not None
    for pooled, wanted in ((500, []), (499, ["the first 499 tokens pooled instead of all tokens"])):
        some = replace(cell, tokens=500, model=replace(cell.model, pool_tokens=pooled))
        assert [one.phrase for one in other_settings(some, {})] == wanted


def test_every_switch_and_member_that_is_named_exists():
    assert {*OF_FRONTEND, *OF_BLOCK, *OF_SPEAKERS, SAME_NUMBERS} <= set(SWITCHES)
    assert set(OF_FRONTEND.values()) <= set(FRONTENDS.names()) and set(OF_BLOCK.values()) <= set(BLOCKS.names())
