"""What the summary says of finished, half-finished, failed and empty sweeps."""

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards.report import report_tables
from dashboards.summary import (
    Statistic,
    attempts,
    averaged_over,
    changed_switches,
    fold_mean,
    overhead_seconds,
    paired,
    progress,
    rank,
    sampling_word,
    statistic,
    summarise,
)
from dashboards.tables import shown
from dashboards.text import GAP
from dashboards.unlike import unlike_authors
from dashboards.view import SweepView, TrialView
from helix.published import published
from helix.statistics import t_test

MakeView = Callable[..., SweepView]


def with_accuracy(view: SweepView, accuracy: Callable[[TrialView], float]) -> SweepView:
    """The view with that accuracy of its finished trials under every rule."""
    cells = []
    for cell in view.cells:
        trials = []
        for trial in cell.trials:
            result = trial.state.result
            if result is not None:
                result = {**result, "accuracy": dict.fromkeys(result["accuracy"], accuracy(trial))}
            trials.append(replace(trial, state=replace(trial.state, result=result)))
        cells.append(replace(cell, trials=tuple(trials)))
    return replace(view, cells=tuple(cells))


def first_fold_only(variant: str, fold: int, seed: int) -> tuple[str, int]:
    return ("done", 0) if fold == 1 else ("running", 3)


def test_the_two_standard_deviations_differ_by_their_divisor():
    values = {(fold, 0): value for fold, value in enumerate((0.5225, 0.5150, 0.5650, 0.6075, 0.5450), 1)}
    population, sample = statistic(values, "population"), statistic(values, "sample")
    assert population.mean == pytest.approx(0.5510)
    assert population.std == pytest.approx(0.0333, abs=5e-5)
    assert sample.std == pytest.approx(0.0372, abs=5e-5)


def test_one_value_has_a_mean_and_no_spread():
    assert statistic({(1, 0): 0.4}, "sample") == Statistic(n=1, mean=0.4, std=None, units=1, unit="seed")


def test_no_value_has_neither():
    assert statistic({}, "population") == Statistic(n=0, mean=None, std=None)


UNBALANCED = {(1, 0): 0.4, (2, 0): 0.5, (2, 1): 0.6, (2, 2): 0.7}


def test_a_fold_with_more_seeds_weighs_as_much_as_any_other():
    found = statistic(UNBALANCED, "sample")
    assert found.mean == fold_mean(UNBALANCED) == pytest.approx((0.4 + 0.6) / 2)
    assert found.std == pytest.approx(math.sqrt(2) * 0.1)
    assert (found.n, found.units, found.counted) == (4, 2, "4 runs in 2 folds")


@given(
    st.dictionaries(st.tuples(st.integers(1, 5), st.integers(0, 3)), st.floats(0, 1), min_size=2),
    st.floats(0, 1),
)
def test_the_number_of_a_cell_is_that_of_its_fold_means(values: dict[tuple[int, int], float], ratio: float):
    found = statistic(values, "sample", ratio=ratio)
    folds = {fold for fold, _ in values}
    means = [fmean(value for (one, _), value in values.items() if one == fold) for fold in folds]
    sample = means if len(folds) > 1 else list(values.values())
    wanted = t_test(sample, ratio=ratio if len(folds) > 1 else 0.0)
    assert found.mean == pytest.approx(fmean(sample))
    assert found.units == len(sample)
    assert (found.low, found.high) == (pytest.approx(wanted.low), pytest.approx(wanted.high))


def test_the_spread_of_seeds_stands_nowhere_among_spreads_over_folds(make_view: MakeView):
    def status(variant: str, fold: int, seed: int) -> tuple[str, int]:
        return ("done" if variant == "helix-raw" or fold == 1 else "missing"), 0

    view = make_view(folds=(1, 2), seeds=(0, 1), status=status)
    by_name = {one.cell.variant: one for one in summarise(view)}
    whole, half = by_name["helix-raw"], by_name["mamba-mel"]
    assert whole.selected.std is not None and whole.selected.counted == "4 runs in 2 folds"
    assert half.selected.mean is not None and half.selected.counted == "2 runs in 1 fold"
    assert (half.selected.std, half.selected.low, half.optimism.std) == (None, None, None)
    assert averaged_over(view, "esc50") == ("fold", "folds, the seeds of a fold averaged first")
    (table,) = [one for one in report_tables(view) if one.name == "accuracy-esc50"]
    stds = {row[0]: row[4] for row in table.rows}
    assert shown(stds["mamba-mel"]) == GAP != shown(stds["helix-raw"])


def test_a_single_split_has_its_spread_over_seeds(make_view: MakeView):
    view = make_view(dataset="speech_commands", folds=(1,), seeds=(0, 1, 2), facts=None)
    found = summarise(view)[0].selected
    assert found.std is not None and found.low is not None and found.counted == "3 seeds"
    assert averaged_over(view, "speech_commands") == ("seed", "seeds")
    (table,) = [one for one in report_tables(view) if one.name == "accuracy-speech_commands"]
    assert table.caption.endswith("over seeds")


def test_the_interval_of_folds_is_corrected_and_that_of_seeds_is_not():
    folds, seeds = {(1, 0): 0.4, (2, 0): 0.5}, {(1, 0): 0.4, (1, 1): 0.5}
    plain, corrected = t_test((0.4, 0.5)), t_test((0.4, 0.5), ratio=0.25)
    assert statistic(folds, "sample", ratio=0.25).low == pytest.approx(corrected.low)
    assert statistic(seeds, "sample", ratio=0.25).low == pytest.approx(plain.low)
    assert statistic(seeds, "sample").counted == "2 seeds"


def test_what_is_not_finite_is_left_out_and_counted():
    found = statistic({(1, 0): math.nan, (2, 0): 0.5, (3, 0): math.inf, (4, 0): 0.6}, "sample")
    assert (found.n, found.not_finite, found.mean) == (2, 2, pytest.approx(0.55))
    assert statistic({(1, 0): math.nan}, "sample") == Statistic(n=0, not_finite=1)


def test_a_cell_counts_finished_trials_only(make_view: MakeView):
    summary = summarise(make_view(folds=(1, 2), status=first_fold_only))[0]
    assert (summary.done, summary.asked) == (1, 2)
    assert summary.selected.n == 1
    assert summary.statuses == {"done": 1, "running": 1}


def test_the_selected_accuracy_follows_the_protocol(make_view: MakeView):
    best = summarise(make_view(profile_name="paper"))[0]
    chosen = summarise(make_view(profile_name="fair"))[0]
    assert best.selected == best.accuracy["best_test"]
    assert chosen.selected == chosen.accuracy["validation"]


def test_optimism_is_best_test_minus_validation(make_view: MakeView):
    summary = summarise(make_view())[0]
    assert summary.optimism.mean == pytest.approx(0.0125)


def test_a_result_without_validation_has_no_optimism(make_view: MakeView):
    view = make_view(folds=(1,), variants=[("mamba", "raw")])
    trial = view.cells[0].trials[0]
    assert trial.state.result is not None
    accuracy = {**trial.state.result["accuracy"], "validation": None}
    state = replace(trial.state, result={**trial.state.result, "accuracy": accuracy})
    cell = replace(view.cells[0], trials=(replace(trial, state=state),))
    summary = summarise(replace(view, cells=(cell,)))[0]
    assert summary.optimism.n == 0
    assert summary.accuracy["validation"].mean is None
    assert summary.selected.n == 1


def test_the_paper_is_compared_on_the_folds_that_we_have(make_view: MakeView):
    summary = summarise(make_view(folds=(2, 4), variants=[("mamba", "raw")]))[0]
    target = published("esc50", "raw", "mamba")
    assert summary.comparison is not None and target is not None and target.per_fold is not None
    theirs = (target.per_fold[1] + target.per_fold[3]) / 2
    assert summary.comparison.theirs == pytest.approx(theirs)
    assert summary.comparison.difference == pytest.approx((summary.accuracy["best_test"].mean or math.nan) - theirs)


def test_all_five_folds_give_the_number_that_the_paper_prints(make_view: MakeView):
    comparison = summarise(make_view(folds=(1, 2, 3, 4, 5), variants=[("helix", "mel")]))[0].comparison
    assert comparison is not None
    assert comparison.theirs == pytest.approx(0.5185)
    assert comparison.theirs_std == pytest.approx(0.0241, abs=5e-5)


def test_the_comparison_is_with_our_best_test_accuracy_whatever_is_selected(make_view: MakeView):
    summary = summarise(make_view(profile_name="fair", variants=[("mamba", "raw")]))[0]
    assert summary.comparison is not None
    assert summary.comparison.ours == pytest.approx(summary.accuracy["best_test"].mean)


def test_what_is_unlike_the_paper_is_said(make_view: MakeView):
    comparison = summarise(make_view(folds=(1,), epochs=20))[0].comparison
    assert comparison is not None
    assert comparison.unlike == ("20 epochs instead of 100", "part of the recordings", "1 fold of 5")


def test_a_smaller_model_is_not_held_against_the_paper_unsaid(make_view: MakeView):
    view = make_view(folds=(1,), variants=[("mamba", "raw")])
    small = replace(view, cells=(replace(view.cells[0], parameters=600_000),))
    comparison = summarise(small)[0].comparison
    assert comparison is not None
    assert any(phrase.endswith("the size") for phrase in comparison.unlike)


def test_the_difference_to_the_paper_is_not_that_of_the_fold_with_most_seeds(make_view: MakeView):
    done = {(1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (4, 2), (5, 0)}
    view = make_view(
        folds=(1, 2, 3, 4, 5),
        seeds=(0, 1, 2),
        variants=[("mamba", "raw")],
        status=lambda _, fold, seed: ("done" if (fold, seed) in done else "missing", 0),
    )
    target = published("esc50", "raw", "mamba")
    assert target is not None and target.per_fold is not None
    exact = with_accuracy(view, lambda trial: target.per_fold[trial.fold - 1] if target.per_fold else 0.0)
    (summary,) = summarise(exact)
    assert summary.comparison is not None
    assert summary.comparison.difference == pytest.approx(0.0, abs=1e-12)
    assert summary.accuracy["best_test"].std == pytest.approx(summary.comparison.theirs_std)


def test_without_a_published_number_there_is_no_comparison(make_view: MakeView):
    assert all(summary.comparison is None for summary in summarise(make_view(dataset="tones", facts=None)))


def test_before_any_result_everything_is_unknown_and_nothing_is_zero(make_view: MakeView):
    for summary in summarise(make_view(status=lambda *_: ("missing", 0))):
        assert summary.selected == Statistic(n=0)
        assert summary.train_seconds is None
        assert summary.at_chance is None
        assert summary.comparison is not None and summary.comparison.difference is None


def test_noise_is_at_chance_and_a_trained_model_is_not(make_view: MakeView):
    view = make_view(variants=[("mamba", "raw")])
    assert view.facts("esc50") is not None
    assert summarise(view)[0].at_chance is False
    coin = replace(view.data[0], chance=0.55)
    assert summarise(replace(view, data=(coin,)))[0].at_chance is True


def test_the_ranking_uses_only_what_all_have_finished(make_view: MakeView):
    def status(variant: str, fold: int, seed: int) -> tuple[str, int]:
        return ("done", 0) if fold == 1 or variant == "mamba-raw" else ("missing", 0)

    view = make_view(folds=(1, 2), status=status)
    ranking = rank(summarise(view), view.select)
    assert ranking.shared == ((1, 0),)
    assert [mean for _, mean in ranking.order] == sorted((mean for _, mean in ranking.order), reverse=True)
    mamba = next(mean for summary, mean in ranking.order if summary.cell.variant == "mamba-raw")
    assert mamba == summarise(view)[0].samples[0].accuracy["best_test"]


def test_an_unmeasured_cell_is_not_ranked(make_view: MakeView):
    view = make_view(status=lambda variant, *_: ("failed", 2) if variant == "helix-mel" else ("done", 0))
    names = [summary.cell.variant for summary, _ in rank(summarise(view), view.select).order]
    assert len(names) == 5
    assert "helix-mel" not in names


def test_the_ranking_counts_a_fold_once_however_many_seeds_it_has(make_view: MakeView):
    done = {(1, 0), (2, 0), (2, 1)}
    view = make_view(
        folds=(1, 2),
        seeds=(0, 1),
        variants=[("mamba", "raw"), ("helix", "raw")],
        status=lambda _, fold, seed: ("done" if (fold, seed) in done else "missing", 0),
    )
    ranking = rank(summarise(view), view.select)
    assert len(ranking.shared) == 3
    for summary, value in ranking.order:
        assert value == pytest.approx(summary.selected.mean)


def test_pairs_are_matched_by_fold_and_seed(make_view: MakeView):
    raw, mel = summarise(make_view(folds=(1, 2), seeds=(0, 1), variants=[("mamba", "raw"), ("mamba", "mel")]))
    differences = paired(raw, mel, "last")
    assert len(differences) == 4
    mean = (raw.accuracy["last"].mean or 0) - (mel.accuracy["last"].mean or 0)
    assert fold_mean(differences) == pytest.approx(mean)


def test_progress_counts_trials_and_epochs(make_view: MakeView):
    state = progress(make_view(folds=(1, 2), epochs=20, status=first_fold_only))
    assert state.statuses == {"done": 6, "running": 6}
    assert (state.epochs_done, state.epochs_asked) == (6 * 20 + 6 * 3, 240)
    assert not state.finished


def test_an_empty_sweep_has_no_progress_and_no_division_by_zero(make_view: MakeView):
    assert progress(make_view(folds=())).epochs_asked == 0
    assert summarise(make_view(folds=())) == ()


def test_a_trial_in_one_go_lost_nothing_and_a_resumed_one_what_its_training_does_not_explain(make_view: MakeView):
    trial = make_view(folds=(1,), variants=[("mamba", "raw")]).cells[0].trials[0]
    assert trial.state.result is not None
    finished, trained = trial.state.result["finished"], trial.state.result["train_seconds"]
    assert attempts(trial) == 1
    assert overhead_seconds(trial) == 0.0
    # the first one worked for as long as all of the training takes; a night later, the second one for 20 s more
    first = {"started": finished - 90_000.0, "ended": finished - 90_000.0 + trained}
    again = (first, {"started": finished - 20.0, "ended": finished})
    resumed = replace(trial, state=replace(trial.state, attempts=again))
    assert attempts(resumed) == 2
    assert overhead_seconds(resumed) == pytest.approx(20.0)


def test_samples_are_called_what_they_are(make_view: MakeView):
    assert sampling_word(make_view(folds=(1, 2))) == "fold"
    assert sampling_word(make_view(folds=(1,), seeds=(0, 1))) == "seed"
    assert sampling_word(make_view(folds=(1, 2), seeds=(0, 1))) == "trial"


def test_switches_off_the_profile_are_found(make_view: MakeView):
    view = make_view(profile_name="paper")
    assert changed_switches(view) == {}
    view = replace(view, switches={**view.switches, "raw_norm": "rms"})
    assert changed_switches(view) == {"raw_norm": "none"}
    assert "raw_norm" in unlike_authors(view)
    assert unlike_authors(make_view(profile_name="authors")) == []


def test_trials_are_grouped_by_variant_in_order_of_appearance(make_view: MakeView):
    view = make_view(folds=(2, 1), seeds=(1, 0))
    assert [cell.variant for cell in view.cells][:2] == ["mamba-raw", "mamba-mel"]
    assert [(trial.seed, trial.fold) for trial in view.cells[0].trials] == [(0, 1), (0, 2), (1, 1), (1, 2)]
