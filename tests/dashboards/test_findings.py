"""The sentences of a report say what the numbers say and no more."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from dashboards.findings import comparison_note, find, parse_question, sweep_cautions
from dashboards.summary import SELECTIONS, summarise
from dashboards.view import SweepView

MakeView = Callable[..., SweepView]


def said(view: SweepView) -> str:
    finding = find(view, "esc50", summarise(view))
    return " ".join([finding.headline, *finding.details])


def test_the_headline_names_the_best_and_the_margin(make_view: MakeView):
    headline = find(make_view(), "esc50", summarise(make_view())).headline
    assert headline.startswith("On esc50, mamba-raw has the highest mean accuracy")
    assert "points above mamba-mel" in headline
    assert "over the 3 folds that all have finished" in headline


@pytest.mark.parametrize("folds", [(1, 2), (1, 2, 3, 4, 5)])
def test_few_folds_are_called_a_direction(make_view: MakeView, folds: tuple[int, ...]):
    text = said(make_view(folds=folds))
    assert f"With {len(folds)} folds no exact sign or rank test can reach p < 0.05" in text
    assert "read the order as a direction" in text
    assert "significant" not in text


def test_seeds_of_a_fold_are_no_further_evidence(make_view: MakeView):
    text = said(make_view(folds=(1, 2), seeds=range(5)))
    assert "over the 2 folds with 10 runs of each that all have finished" in text
    assert "in 2 of 2 folds, the seeds of each averaged" in text
    assert "With 2 folds no exact sign or rank test can reach p < 0.05 (at best 0.5)" in text
    assert "of 10 trials" not in text
    assert "Raw minus mel, in points over 2 folds with 10 runs of each:" in text


def test_seeds_of_one_split_are_counted_as_seeds(make_view: MakeView):
    text = said(make_view(folds=(1,), seeds=(0, 1, 2)))
    assert "With 3 seeds no exact sign or rank test" in text


def test_an_accuracy_that_is_not_finite_is_named_and_never_a_number(make_view: MakeView):
    view = make_view()
    first = view.cells[0]
    state = first.trials[0].state
    broken = replace(state, result={**(state.result or {}), "accuracy": dict.fromkeys(SELECTIONS, math.nan)})
    trials = (replace(first.trials[0], state=broken), *first.trials[1:])
    view = replace(view, cells=(replace(first, trials=trials), *view.cells[1:]))
    text = said(view)
    assert "Trials whose accuracy is not finite, and which are in no mean: 1 of mamba-raw." in text
    assert "nan" not in text
    assert "over the 2 folds that all have finished" in text


def test_one_fold_admits_that_it_shows_no_spread(make_view: MakeView):
    assert "One fold shows no spread" in said(make_view(folds=(1,)))


def test_different_folds_are_not_compared_in_silence(make_view: MakeView):
    def status(variant: str, fold: int, seed: int) -> tuple[str, int]:
        return ("done", 0) if (fold == 1) == (variant == "mamba-raw") else ("missing", 0)

    text = said(make_view(folds=(1, 2), status=status, variants=[("mamba", "raw"), ("helix", "raw")]))
    assert "compares different test sets" in text


def test_equal_means_are_level(make_view: MakeView):
    view = make_view(variants=[("mamba", "raw"), ("helix", "raw")])
    twin = replace(view.cells[1], trials=view.cells[0].trials)
    assert "mamba-raw and helix-raw are level" in said(replace(view, cells=(view.cells[0], twin)))


def test_nothing_finished_is_said_plainly(make_view: MakeView):
    assert "no result yet: none of 18 trials is finished; 18 are running" in said(
        make_view(status=lambda *_: ("running", 1))
    )
    assert "there is no result: all 18 trials failed" in said(make_view(status=lambda *_: ("failed", 1)))


def test_a_variant_without_a_result_is_named(make_view: MakeView):
    for status, words in (("running", "No result yet from helix-mel."), ("failed", "No result from helix-mel: every")):
        text = said(make_view(status=lambda name, *_, now=status: (now, 2) if name == "helix-mel" else ("done", 0)))
        assert words in text


def test_only_one_result_claims_no_order(make_view: MakeView):
    text = said(make_view(status=lambda variant, *_: ("done", 0) if variant == "helix-mel" else ("missing", 0)))
    assert "On esc50, helix-mel reaches" in text
    assert "No other variant has a result" in text
    assert "highest" not in text


def test_raw_minus_mel_is_told_for_each_backbone(make_view: MakeView):
    text = said(make_view())
    assert "Raw minus mel, in points over 3 folds: mamba +" in text
    assert "attention \N{MINUS SIGN}" in text


def test_what_is_not_above_guessing_is_named(make_view: MakeView):
    view = make_view()
    coin = replace(view.data[0], chance=0.48)
    assert "attention-raw and attention-mel are not above guessing (48.0 %)" in said(replace(view, data=(coin,)))


def test_choosing_on_the_test_set_is_called_that(make_view: MakeView):
    assert "chosen on the test set" in said(make_view(profile_name="paper"))
    assert "chosen on the test set" not in said(make_view(profile_name="fair"))


def test_an_unfinished_sweep_and_its_failures_come_first(make_view: MakeView):
    view = make_view(status=lambda variant, *_: ("failed", 2) if variant == "helix-mel" else ("done", 0))
    assert sweep_cautions(view)[0] == "The sweep is not finished: 15 of 18 trials done."
    assert "3 trials failed" in sweep_cautions(view)[1]
    assert sweep_cautions(make_view()) == ()


def test_the_comparison_says_in_what_it_is_unlike(make_view: MakeView):
    view = make_view(epochs=20, profile_name="authors")
    note = comparison_note(view, summarise(view))
    assert (
        note == "Not like for like: these runs have 20 epochs instead of 100, part of the recordings and 3 folds of 5."
    )
    paper = make_view(epochs=20, profile_name="paper")
    assert "protocol switches other than the authors' code" in comparison_note(paper, summarise(paper))


def test_a_faithful_rerun_is_called_alike(make_view: MakeView):
    view = make_view(folds=(1, 2, 3, 4, 5), epochs=100, profile_name="authors", facts=None)
    assert comparison_note(view, summarise(view)) == "As far as we can tell these runs are like the paper's."


def test_a_run_that_was_trained_otherwise_is_not_called_alike(make_view: MakeView):
    view = make_view(
        folds=(1, 2, 3, 4, 5),
        epochs=100,
        profile_name="authors",
        facts=None,
        training={"lr": 1e-6, "precision": "bf16"},
    )
    assert comparison_note(view, summarise(view)) == (
        "Not like for like: these runs have learning rate 1e-06 instead of 0.0003 and precision bf16 instead of fp32."
    )


def test_a_question_is_split_into_title_and_parts():
    question = parse_question(
        "One line?\n\nA paragraph\nof two lines.\n\nPrice.   Two\n         hours.\nCommand. go\n", "g"
    )
    assert question.title == "One line?"
    assert question.paragraphs == ("A paragraph of two lines.",)
    assert question.parts == (("Price", "Two hours."), ("Command", "go"))


def test_a_grid_without_a_question_is_called_by_its_name():
    assert parse_question("  \n", "demo").title == "demo"
