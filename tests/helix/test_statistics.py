"""Statistics agree with scipy, with statsmodels and with what the authors' folds give; few numbers are no numbers."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from helix.published import published
from helix.statistics import (
    ALPHA,
    MOST,
    bootstrap,
    components,
    contrast,
    deviation,
    effect,
    equal_spreads,
    hedges,
    holm,
    joined,
    mean,
    outlook,
    power,
    sign_flip,
    smallest_p,
    t_test,
    two_shares,
    units,
)

#: ESC-50: 400 test clips, 1,600 training clips.
RATIO = 0.25

differences = st.lists(
    st.integers(min_value=-4000, max_value=4000).map(lambda hundredths: hundredths / 10_000), min_size=2, max_size=10
)
varied = differences.filter(lambda values: len(set(values)) > 1)


def folds(first: tuple[str, str], second: tuple[str, str]) -> dict[tuple[int, int], float]:
    one, other = (published("esc50", *variant) for variant in (first, second))
    assert one is not None and one.per_fold is not None
    assert other is not None and other.per_fold is not None
    return {
        (fold, 0): here - there for fold, (here, there) in enumerate(zip(one.per_fold, other.per_fold, strict=True), 1)
    }


# What the authors' folds give. Mean difference, p of the paired and of the corrected t test, 95 % interval; in points.


@pytest.mark.parametrize(
    ("first", "second", "gap", "plain", "corrected", "low", "high"),
    [
        (("raw", "mamba"), ("mel", "mamba"), 1.35, 0.103, 0.233, -0.43, 3.13),
        (("raw", "attention"), ("mel", "attention"), -1.50, 0.260, 0.431, -4.67, 1.67),
        (("raw", "helix"), ("mel", "helix"), -1.65, 0.402, 0.566, -6.54, 3.24),
        (("raw", "mamba"), ("raw", "helix"), 4.90, 0.006, 0.025, 2.31, 7.49),
        (("raw", "mamba"), ("raw", "attention"), 10.50, 0.001, 0.003, 7.50, 13.50),
        (("mel", "mamba"), ("mel", "helix"), 1.90, 0.043, 0.123, 0.10, 3.70),
        (("mel", "mamba"), ("mel", "attention"), 7.65, 0.008, 0.030, 3.35, 11.95),
        (("raw", "helix"), ("raw", "attention"), 5.60, 0.018, 0.062, 1.57, 9.63),
    ],
)
def test_the_authors_folds_give_what_was_computed_from_them_by_hand(
    first: tuple[str, str],
    second: tuple[str, str],
    gap: float,
    plain: float,
    corrected: float,
    low: float,
    high: float,
):
    values = units(folds(first, second)).values
    found = t_test(values)
    assert found.mean is not None and found.low is not None and found.high is not None and found.p is not None
    assert round(100 * found.mean, 2) == gap
    assert round(found.p, 3) == plain
    assert round(t_test(values, ratio=RATIO).p or 0, 3) == corrected
    assert (round(100 * found.low, 2), round(100 * found.high, 2)) == (low, high)
    assert (sign_flip(values).p or 0) >= sign_flip(values).smallest == 0.0625


@pytest.mark.parametrize(
    ("variant", "population", "sample"),
    [
        (("raw", "mamba"), 3.33, 3.72),
        (("mel", "mamba"), 2.92, 3.26),
        (("raw", "helix"), 3.71, 4.14),
        (("mel", "helix"), 2.41, 2.70),
        (("raw", "attention"), 3.16, 3.53),
        (("mel", "attention"), 2.97, 3.32),
    ],
)
def test_the_papers_spread_divides_by_n(variant: tuple[str, str], population: float, sample: float):
    cell = published("esc50", *variant)
    assert cell is not None and cell.per_fold is not None
    assert round(100 * (deviation(cell.per_fold, ddof=0) or 0), 2) == population
    assert round(100 * (deviation(cell.per_fold, ddof=1) or 0), 2) == sample


# Against other implementations


@given(varied)
def test_without_a_ratio_the_t_test_is_that_of_scipy(values: list[float]):
    found, wanted = t_test(values), stats.ttest_1samp(values, 0.0)
    interval = wanted.confidence_interval(0.95)
    assert found.t == pytest.approx(wanted.statistic, rel=1e-6)
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-12)


@given(varied, st.floats(min_value=0.01, max_value=2))
def test_the_correction_widens_by_the_root_of_one_plus_n_times_the_ratio(values: list[float], ratio: float):
    plain, corrected = t_test(values), t_test(values, ratio=ratio)
    assert plain.t is not None and plain.p is not None
    assert corrected.t == pytest.approx(plain.t / math.sqrt(1 + len(values) * ratio))
    assert corrected.p is not None and corrected.p >= plain.p - 1e-12


@settings(max_examples=25)  # the other one collects garbage in every call
@given(st.lists(st.floats(min_value=0, max_value=1), min_size=1, max_size=20))
def test_holm_is_that_of_statsmodels(ps: list[float]):
    assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1])


@given(st.lists(st.floats(min_value=0, max_value=1), min_size=1, max_size=20))
def test_holm_never_helps_and_keeps_the_order(ps: list[float]):
    adjusted = [p or 0.0 for p in holm(ps)]
    assert all(after >= before for before, after in zip(ps, adjusted, strict=True))
    assert [one for _, one in sorted(zip(ps, adjusted, strict=True))] == sorted(adjusted)


def test_a_test_that_was_not_made_is_no_member_of_the_family():
    assert holm([0.01, None, 0.04]) == (0.02, None, 0.04)
    assert holm([]) == ()


@pytest.mark.parametrize("n", [2, 5, 12])
@pytest.mark.parametrize("size", [0.2, 0.8, 2.5])
def test_power_is_that_of_statsmodels(n: int, size: float):
    wanted = TTestPower().power(size, n, ALPHA, alternative="two-sided")
    assert power(size, 1.0, n) == pytest.approx(wanted, rel=1e-4)


def test_power_is_what_a_simulation_finds():
    rng = np.random.default_rng(0)
    drawn = rng.normal(1.0, 1.0, size=(4000, 6))
    found = np.mean([(t_test(row).p or 1) < ALPHA for row in drawn.tolist()])
    assert power(1.0, 1.0, 6) == pytest.approx(found, abs=0.03)


def test_power_far_out_is_one_and_of_one_unit_nothing():
    assert power(1.0, 1e-9, 5) == pytest.approx(1.0)
    assert power(1.0, 0.0, 5) == 1.0
    assert power(1.0, 1.0, 1) == 0.0


@given(st.lists(st.integers(min_value=-30, max_value=30).map(float), min_size=1, max_size=8))
def test_the_sign_flip_test_counts_all_choices_of_signs(values: list[float]):
    seen = abs(sum(values))
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    assert sign_flip(values).p == pytest.approx(sum(one >= seen - 1e-9 for one in sums) / len(sums))


def test_the_sign_flip_test_is_the_permutation_test_of_scipy():
    values = [0.9, -0.2, 1.4, 0.3, 0.7, -0.1, 0.8]
    wanted = stats.permutation_test(
        (values,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip(values).p == pytest.approx(wanted.pvalue)


@given(differences)
def test_the_sign_flip_test_does_not_care_who_is_first(values: list[float]):
    assert sign_flip(values).p == pytest.approx(sign_flip([-value for value in values]).p)


def test_the_drawn_sign_flip_test_agrees_with_the_counted_one():
    values = [0.3, -0.2, 0.5, 0.1, 0.4, -0.1, 0.2, 0.3, -0.4, 0.6]
    counted, drawn = sign_flip(values), sign_flip(values, exact_units=5)
    assert (counted.exact, drawn.exact) == (True, False)
    assert drawn.p == pytest.approx(counted.p, abs=0.005)
    assert drawn == sign_flip(values, exact_units=5), "the draw has a fixed seed"


def test_five_pairs_cannot_be_significant_and_six_can():
    assert smallest_p(5) == 0.0625
    assert smallest_p(6) < 0.05
    assert sign_flip([1.0] * 5).p == 0.0625


def test_twenty_units_are_counted_exactly():
    assert sign_flip([1.0] * 20).p == pytest.approx(2 / 2**20)


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_the_bootstrap_is_that_of_scipy_and_repeats_itself(method):
    twentieths = np.array([2, 8, 7, 16, 4, 10])
    wanted = stats.bootstrap((twentieths,), np.mean, method=method, n_resamples=9_999, rng=np.random.default_rng(0))
    # Of fractions with no last binary digit scipy finds means of the same clips apart, which BCa counts.
    values = [0.1, 0.4, 0.35, 0.8, 0.2, 0.5]
    found = bootstrap(values, method=method)
    assert (20 * found.low, 20 * found.high) == pytest.approx(tuple(wanted.confidence_interval))
    assert found == bootstrap(values, method=method)
    untied = list(np.random.default_rng(1).normal(size=7))
    wanted = stats.bootstrap((untied,), np.mean, method=method, n_resamples=9_999, rng=np.random.default_rng(0))
    found = bootstrap(untied, method=method)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval))


@settings(deadline=None, max_examples=20)
@given(varied)
def test_every_interval_holds_the_mean(values: list[float]):
    assume(len(values) > 2)
    centre = mean(values)
    assert centre is not None
    for found in (t_test(values), t_test(values, ratio=RATIO), bootstrap(values, method="percentile")):
        assert found.low is not None and found.high is not None
        assert found.low - 1e-12 <= centre <= found.high + 1e-12


def test_effect_sizes_are_what_their_formulas_give():
    found = effect([1.0, 2.0, 3.0, 0.0])
    assert found.d_z == pytest.approx(1.5 / np.std([1, 2, 3, 0], ddof=1))
    assert found.g == pytest.approx(found.d_z * hedges(3))
    assert found.superiority == 0.875
    assert hedges(4) == pytest.approx(math.gamma(2) / (math.sqrt(2) * math.gamma(1.5)))
    assert hedges(50) == pytest.approx(1 - 3 / (4 * 50 - 1), abs=1e-4), "the usual approximation"
    with pytest.raises(ValueError, match="df is 1"):
        hedges(1)


# Few numbers, equal numbers, missing numbers


@pytest.mark.parametrize("values", [[], [0.5], [0.1, 0.1, 0.1], [0.0, 0.0]])
def test_where_there_is_no_number_it_says_why_and_divides_by_nothing(values: list[float]):
    test, interval, size = t_test(values, ratio=RATIO), bootstrap(values), effect(values)
    assert (test.p, interval.low, size.d_z) == (None, None, None)
    assert test.why and interval.why and size.why
    told = outlook({(i, 0): value for i, value in enumerate(values)}, ratio=RATIO, folds_exist=len(values))
    assert "no number can be told" in told.said


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_no_measurement(bad: float):
    for computed in (t_test, sign_flip, bootstrap, effect, mean, holm, lambda values: deviation(values, ddof=1)):
        with pytest.raises(ValueError, match="wanted finite numbers"):
            computed([bad, 1.0, 0.5])
    with pytest.raises(ValueError, match="wanted finite numbers"):
        units({(1, 0): 0.5, (2, 0): bad})
    with pytest.raises(ValueError, match="wanted finite numbers"):
        outlook({(1, 0): 0.5, (2, 0): bad, (3, 0): 0.4}, ratio=RATIO, folds_exist=5)
    with pytest.raises(ValueError, match="wanted finite numbers"):
        power(bad, 1.0, 5)


def test_equal_values_are_told_from_almost_equal_ones():
    assert t_test([0.3 - 0.2, 0.2 - 0.1, 0.1]).why, "they differ by rounding alone"
    assert t_test([0.1, 0.1, 0.1 + 1e-6]).p is not None


def test_two_pairs_have_no_corrected_effect():
    found = effect([0.1, 0.3])
    assert found.d_z is not None and found.g is None and "three" in found.why


def test_what_not_all_have_is_counted_and_left_out():
    found, unpaired = contrast([({(1, 0): 0.5, (2, 0): 0.6, (3, 0): 0.7}, 1.0), ({(2, 0): 0.5, (4, 0): 0.1}, -1.0)])
    assert found == {(2, 0): pytest.approx(0.1)}
    assert unpaired == 3
    assert contrast([]) == ({}, 0)


def test_a_difference_of_nothing_is_one_however_it_comes_about():
    cells = [({(1, 0): value}, weight) for value, weight in ((0.55, 1.0), (0.5, -1.0), (0.35, -1.0), (0.3, 1.0))]
    (tie,) = contrast(cells)[0].values()
    assert tie == 0.0 and math.copysign(1, tie) == 1
    noise = 1e-17
    exact, nearly = ({(1, 0): 0.1, (2, 0): 0.2, (3, 0): -0.3 + off} for off in (-noise, 3 * noise))
    said = {outlook(one, ratio=RATIO, folds_exist=5).said for one in (exact, nearly, {(1, 0): 0.1, (2, 0): -0.1})}
    assert said == {"no number can be told: the mean difference is 0"}


def test_seeds_of_a_fold_are_one_unit_and_of_one_split_they_are_the_units():
    several = units({(1, 0): 0.1, (1, 1): 0.3, (2, 0): 0.4})
    assert (several.unit, several.values) == ("fold", pytest.approx((0.2, 0.4)))
    lone = units({(1, 0): 0.1, (1, 1): 0.3})
    assert (lone.unit, lone.values) == ("seed", (0.1, 0.3))


def test_equal_spreads_of_pairs_is_the_t_test_of_pitman_and_morgan():
    """t = (F - 1) sqrt(n - 2) / (2 sqrt(F (1 - r^2))), with F the ratio of the variances and r the correlation."""
    draws = np.random.default_rng(5)
    for n in (3, 5, 40):
        first = draws.normal(0.5, 0.06, n)
        second = 0.4 * first + draws.normal(0.3, 0.02, n)
        ratio, r = first.var() / second.var(), np.corrcoef(first, second)[0, 1]
        t = (ratio - 1) * math.sqrt(n - 2) / (2 * math.sqrt(ratio * (1 - r**2)))
        p = equal_spreads(list(first), list(second))
        assert p == pytest.approx(2 * stats.t.sf(abs(t), n - 2))
        assert p == pytest.approx(stats.pearsonr(first + second, first - second)[1])


def test_equal_spreads_are_found_unequal_as_rarely_as_they_should():
    draws = np.random.default_rng(6)
    fold = draws.normal(0.5, 0.03, (2_000, 5))
    pairs = zip(fold + draws.normal(0, 0.02, fold.shape), fold + draws.normal(0, 0.02, fold.shape), strict=True)
    ps = [equal_spreads(list(one), list(other)) for one, other in pairs]
    assert np.mean([p is not None and p < 0.05 for p in ps]) == pytest.approx(0.05, abs=0.015)


def test_what_has_no_pairs_or_no_spread_has_no_p():
    assert equal_spreads([0.5, 0.6], [0.5, 0.7]) is None
    assert equal_spreads([0.5, 0.6, 0.7], [0.5, 0.6, 0.7]) is None
    assert equal_spreads([0.5, 0.6, 0.7], [0.7, 0.6, 0.5]) is None


def test_two_shares_are_as_far_apart_as_their_clips_allow():
    assert two_shares(0.9294, 0.9027, 11_005) == pytest.approx(7.16, abs=0.01)
    assert two_shares(0.5, 0.5, 10) == 0
    assert two_shares(1.0, 0.0, 10) == math.inf
    assert two_shares(1.0, 1.0, 10) == 0


# What would settle it


def test_the_parts_of_the_variance_are_found_again():
    rng = np.random.default_rng(1)
    fold_part, seed_part = rng.normal(0, 0.03, 400), rng.normal(0, 0.02, (400, 5))
    found = components(
        {(fold, seed): fold_part[fold] + seed_part[fold, seed] for fold in range(400) for seed in range(5)}
    )
    assert found.fold == pytest.approx(0.03**2, rel=0.2)
    assert found.seed == pytest.approx(0.02**2, rel=0.1)


def test_one_seed_a_fold_cannot_tell_the_parts_apart():
    found = components({(1, 0): 0.1, (2, 0): 0.3})
    assert (found.fold, found.seed) == (None, None)
    assert "one seed" in found.why
    lone = components({(1, 0): 0.1, (1, 1): 0.3})
    assert lone.fold is None and lone.seed == pytest.approx(0.02)


def test_where_all_folds_are_used_no_further_fold_is_promised():
    found = outlook(folds(("raw", "mamba"), ("mel", "mamba")), ratio=RATIO, folds_exist=5)
    assert (found.settled, found.folds) == (False, 5)
    assert found.seeds is not None and found.seeds > 1
    assert found.supposed and "if seeds make all of the spread" in found.said


def test_the_number_of_seeds_that_it_names_is_enough_and_one_less_is_not():
    values = folds(("raw", "mamba"), ("mel", "mamba"))
    found, std = outlook(values, ratio=RATIO, folds_exist=5), deviation(list(values.values()), ddof=1)
    assert found.seeds is not None and std is not None

    def reached(seeds: int) -> float:
        return power(0.0135, std / math.sqrt(seeds), 5, ratio=RATIO)

    assert reached(found.seeds) >= 0.8 > reached(found.seeds - 1)


def test_seeds_cannot_help_against_a_spread_that_is_all_of_folds():
    values = {(fold, seed): (0.06, -0.05, 0.02)[fold] for fold in range(3) for seed in range(2)}
    found = outlook(values, ratio=0.5, folds_exist=3)
    assert found.seeds is None
    assert found.said == (
        "no number: not even all 3 folds with 1,000 seeds each, for seeds do not shrink the spread between folds"
    )


def test_seeds_help_against_a_spread_that_is_all_of_seeds():
    rng = np.random.default_rng(3)
    values = {(fold, seed): 0.01 + rng.normal(0, 0.03) for fold in range(5) for seed in range(3)}
    found = outlook(values, ratio=RATIO, folds_exist=5)
    assert not found.settled
    assert found.seeds is not None and 3 < found.seeds <= MOST and not found.supposed


def test_on_one_split_seeds_are_counted_as_statsmodels_counts_them():
    values = [0.02, -0.01, 0.015, 0.01]
    found = outlook({(1, seed): value for seed, value in enumerate(values)}, ratio=RATIO, folds_exist=1)
    size = effect(values).d_z
    assert found.seeds == math.ceil(TTestPower().solve_power(size, alpha=ALPHA, power=0.8, alternative="two-sided"))


def test_missing_folds_come_before_further_seeds():
    done = {(1, 0): 0.02, (2, 0): 0.03, (3, 0): 0.005}
    found, std = outlook(done, ratio=0.05, folds_exist=10), deviation(list(done.values()), ddof=1)
    assert std is not None and found.folds is not None and 3 < found.folds < 10
    centre = sum(done.values()) / 3
    assert power(centre, std, found.folds, ratio=0.05) >= 0.8 > power(centre, std, found.folds - 1, ratio=0.05)
    assert (found.seeds, found.supposed) == (1, False)
    assert found.said == f"{found.folds} of the 10 folds with 1 seed each"


def test_where_all_folds_are_not_enough_seeds_are_added_on_all_of_them():
    found = outlook({(1, 0): 0.01, (2, 0): 0.03}, ratio=RATIO, folds_exist=5)
    std = deviation([0.01, 0.03], ddof=1)
    assert (found.folds, found.seeds, found.supposed) == (5, 4, True)
    assert std is not None
    assert power(0.02, std / 2, 5, ratio=RATIO) >= 0.8 > power(0.02, std / math.sqrt(3), 5, ratio=RATIO)


def test_half_of_a_folds_seeds_are_completed_first():
    values = {(fold, seed): 0.025 + 0.004 * fold + 0.03 * (-1) ** seed for fold in range(4) for seed in range(12)}
    unbalanced = {key: value for key, value in values.items() if key[0] < 3 or key[1] == 0}
    found = outlook(unbalanced, ratio=RATIO, folds_exist=4)
    assert (found.folds, found.seeds, found.supposed) == (4, 12, False)


def test_one_fold_of_several_is_told_to_have_the_others_run_first():
    found = outlook({(1, seed): value for seed, value in enumerate((0.01, 0.0101, 0.0099))}, ratio=0.0, folds_exist=5)
    assert (found.settled, found.folds, found.seeds) == (False, None, None)
    assert found.said == "first some of the other 4 folds: one fold shows no spread between folds"
    assert outlook({(1, 0): 0.1}, ratio=0.0, folds_exist=2).said.startswith("first the other fold")


@given(varied, st.integers(min_value=1, max_value=12))
def test_what_it_names_is_enough_at_the_level_that_decides(values: list[float], others: int):
    given = {(fold, 0): value for fold, value in enumerate(values)}
    found = outlook(given, ratio=0.1, folds_exist=12, alpha=ALPHA / others)
    std = deviation(values, ddof=1)
    if found.folds is not None and found.seeds is not None and std is not None:
        spread = std / math.sqrt(found.seeds)
        assert power(sum(values) / len(values), spread, found.folds, ratio=0.1, alpha=ALPHA / others) >= 0.8


def test_what_is_settled_asks_for_nothing():
    found = outlook(folds(("raw", "mamba"), ("raw", "attention")), ratio=RATIO, folds_exist=5)
    assert found.settled and found.folds is None and found.seeds is None


def test_a_negative_ratio_is_refused():
    with pytest.raises(ValueError, match=r"ratio is -0\.1"):
        t_test([0.1, 0.2], ratio=-0.1)


def test_a_negative_variance_of_the_other_number_is_refused():
    with pytest.raises(ValueError, match=r"other -0\.1"):
        t_test([0.1, 0.2], other=-0.1)


@given(varied, st.floats(min_value=1e-6, max_value=1.0))
def test_a_number_that_is_not_exact_widens_the_interval_by_its_variance(values: list[float], other: float):
    exact, found = t_test(values), t_test(values, other=other)
    assume(exact.t is not None)
    assert exact.std is not None and exact.high is not None and exact.mean is not None
    assert found.high is not None and found.mean == exact.mean
    wider = ((found.high - exact.mean) / (exact.high - exact.mean)) ** 2
    assert wider == pytest.approx(1 + other / (exact.std**2 / len(values)))


def test_one_p_of_several_is_itself_or_twice_their_mean():
    assert joined([]) is None
    assert joined([0.03]) == 0.03
    assert joined([0.01, 0.03, 0.05]) == pytest.approx(0.06)
    assert joined([0.9, 0.8]) == 1.0


@pytest.mark.parametrize("shared", [0.0, 0.7, 1.0])
def test_joined_ps_err_no_more_often_than_they_may_however_they_depend(shared: float):
    rng = np.random.default_rng(2)
    z = np.sqrt(shared) * rng.normal(size=(4000, 1)) + np.sqrt(1 - shared) * rng.normal(size=(4000, 6))
    found = [joined(list(row)) for row in 2 * stats.norm.sf(np.abs(z))]
    assert np.mean([p is not None and p < ALPHA for p in found]) <= ALPHA


def test_differences_too_small_to_be_squared_are_no_spread():
    tiny = (2.2e-309, 0.0)
    assert t_test(tiny).t is None and "no spread" in t_test(tiny).why
    assert effect(tiny).d_z is None
