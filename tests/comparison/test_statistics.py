import itertools
import math
from collections.abc import Callable
from dataclasses import astuple
from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from mnist_exp.comparison.statistics import (
    ALPHA,
    CONFIDENCE,
    POWER,
    RESAMPLES,
    T_UP_TO,
    Comparison,
    Interval,
    bca_interval,
    compare,
    holm,
    pairs_needed,
    t_interval,
)
from mnist_exp.errors import UserError

pytestmark = pytest.mark.filterwarnings("error")

# Hours of sleep gained by two drugs, ten patients (Cushny and Peebles, 1905; Student, 1908).
SLEEP = (
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
)
# Heights of crossed and of self-fertilised Zea mays, inches, fifteen pairs (Darwin, 1876; Fisher, 1935).
MAIZE = (
    [23.5, 12, 21, 22, 19.125, 21.5, 22.125, 20.375, 18.25, 21.625, 23.25, 21, 22.125, 23, 12],
    [17.375, 20.375, 20, 20, 18.375, 18.625, 18.625, 15.25, 16.5, 18, 16.25, 18, 12.75, 15.5, 18],
)
MAIZE_SIGN_FLIP = 1726 / 2**15  # 863 of the sums are at least the observed one (Fisher, The Design of Experiments, section 21)

# Accuracies on 10,000 images: multiples of 0.0001, with ties among their differences.
PAIR = st.tuples(st.integers(9900, 9990), st.integers(9900, 9990))
PAIRS = st.lists(PAIR, min_size=2, max_size=40)
SINGLE_DIFFERENCE = [(9904, 9901), (9905, 9902), (9960, 9957)]  # 0.0003 in each pair, but for the rounding
ABOVE_T = [(9900 + (7 * i) % 31, 9905 + (5 * i) % 13) for i in range(T_UP_TO + 5)]


def arrays(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    arm, baseline = np.array(pairs).T / 10_000
    return arm, baseline


def numbers(comparison: Comparison) -> dict[str, float]:
    """A comparison's fields by name, without the interval."""
    return {name: value for name, value in vars(comparison).items() if name != "interval"}


def same_interval(first: Interval, second: Interval) -> bool:
    """Whether two intervals agree: but for rounding those of t; BCa's ends may also move on to a neighboring resample."""
    slack = 1e-9 if first.method == "t" else 0.05 * (first.high - first.low)
    return first.method == second.method and np.allclose(astuple(first)[:2], astuple(second)[:2], rtol=1e-7, atol=slack)


def within(hits: int, trials: int, nominal: float) -> bool:
    """Whether `hits` lie within 3.3 standard errors of the nominal rate: false for one in a thousand right ones."""
    return abs(hits / trials - nominal) <= 3.3 * math.sqrt(nominal * (1 - nominal) / trials)


def test_students_sleep_data() -> None:
    sleep = compare(*SLEEP)
    assert sleep.n == 10
    assert sleep.difference == pytest.approx(1.58)
    assert (sleep.mean, sleep.baseline_mean) == pytest.approx((2.33, 0.75))
    assert sleep.p_t == pytest.approx(0.002833, abs=5e-7)  # this and the interval: R's t.test(..., paired = TRUE)
    assert astuple(sleep.interval) == (pytest.approx(0.7001142, abs=5e-8), pytest.approx(2.4598858, abs=5e-8), "t")
    t = sleep.difference / sleep.difference_std * math.sqrt(10)
    assert t == pytest.approx(4.0621, abs=5e-5)
    assert sleep.effect_size == pytest.approx(t / math.sqrt(10) * (1 - 3 / (4 * 9 - 1)), rel=1e-3)  # Hedges's approximation


def test_darwins_maize() -> None:
    maize = compare(*MAIZE)
    assert maize.difference == pytest.approx(2.6167, abs=5e-5)
    assert maize.difference / maize.difference_std * math.sqrt(15) == pytest.approx(2.148, abs=5e-4)
    assert maize.p_t == pytest.approx(0.0497, abs=5e-5)
    drawn_flips = 3.3 * math.sqrt(MAIZE_SIGN_FLIP * (1 - MAIZE_SIGN_FLIP) / RESAMPLES)
    assert maize.p_sign_flip == pytest.approx(MAIZE_SIGN_FLIP, abs=drawn_flips)


def test_the_exact_sign_flips_of_the_maize_are_fishers() -> None:
    eighths = np.rint(8 * np.subtract(*MAIZE)).astype(int)
    sums = np.array(list(itertools.product([-1, 1], repeat=15))) @ eighths
    assert (sums >= eighths.sum()).sum() == 863
    assert (abs(sums) >= eighths.sum()).mean() == MAIZE_SIGN_FLIP


@given(st.lists(st.integers(-30, 30), min_size=2, max_size=11))
@settings(max_examples=30, deadline=None)
@example([3, 3, 3])
@example([0, 0])
@example([1, 2, 3, -3, -2, 1, 5])
def test_sign_flips_count_ties_in_spite_of_rounding(differences: list[int]) -> None:
    """0.9904 - 0.9901 and 0.9905 - 0.9902 are not equal as floats: the exact test is that of the integers."""
    baseline = 9900 + np.arange(len(differences))
    sums = np.array(list(itertools.product([-1, 1], repeat=len(differences)))) @ differences
    p = (abs(sums) >= abs(sum(differences))).mean()
    assert compare((baseline + differences) / 10_000, baseline / 10_000).p_sign_flip == p


def test_drawn_sign_flips_agree_with_scipys() -> None:
    differences = np.random.default_rng(0).normal(0.3, 1, 20)
    theirs = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=99_999, rng=1).pvalue
    ours = compare(differences, np.zeros(20)).p_sign_flip
    assert ours == pytest.approx(theirs, abs=3.3 * math.sqrt(theirs * (1 - theirs) * (1 / 9_999 + 1 / 99_999)))


def test_drawn_sign_flips_never_give_0() -> None:
    """The observed signs count as one of the flips (Phipson and Smyth, 2010)."""
    assert compare(np.linspace(1, 2, 40), np.zeros(40)).p_sign_flip == 1 / (RESAMPLES + 1)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert np.isnan(holm([math.nan])).all()
    assert holm([math.nan, 0.01, 0.02, math.nan]) == pytest.approx([math.nan, 0.02, 0.02, math.nan], nan_ok=True)


def test_holm_agrees_with_statsmodels() -> None:
    p_values = np.random.default_rng(0).beta(0.3, 1, 20)
    assert holm(list(p_values)) == multipletests(p_values, method="holm")[1].tolist()


@pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_pairs_needed_for_cohens_small_medium_and_large_effect(effect: float, n: int) -> None:
    """Cohen's (1988) effects, as G*Power's "difference between two dependent means" has them."""
    assert pairs_needed(effect, 1) == pairs_needed(-effect / 100, 0.01) == n


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30, 73, 87, 876])
def test_the_minimum_detectable_effect_has_the_nominal_power(n: int) -> None:
    values = np.arange(n) / 1_000
    comparison = compare(values, np.zeros(n))
    effect = comparison.min_detectable_effect / comparison.difference_std
    critical = stats.t.isf(ALPHA / 2, n - 1)
    assert stats.nct.sf(critical, n - 1, effect * math.sqrt(n)) == pytest.approx(POWER, abs=1e-4)
    assert pairs_needed(1.0001 * comparison.min_detectable_effect, comparison.difference_std) == n
    assert pairs_needed(0.9999 * comparison.min_detectable_effect, comparison.difference_std) > n


def test_the_power_agrees_with_statsmodels_two_sided() -> None:
    comparison = compare(np.arange(10), np.zeros(10))
    effect = TTestPower().solve_power(nobs=10, alpha=ALPHA, power=POWER)
    assert comparison.min_detectable_effect / comparison.difference_std == pytest.approx(effect, rel=1e-4)


def test_extreme_effects_need_two_pairs_or_very_many() -> None:
    assert pairs_needed(1e9, 1) == pairs_needed(1, 0) == 2
    assert pairs_needed(1e-6, 1) == pytest.approx((stats.norm.isf(ALPHA / 2) + stats.norm.ppf(POWER)) ** 2 * 1e12, rel=1e-4)


@pytest.mark.parametrize(("difference", "spread"), [(0, 1), (0, 0), (math.nan, 1), (1, math.inf), (1, -1), (1, math.nan)])
def test_no_number_of_pairs(difference: float, spread: float) -> None:
    with pytest.raises(UserError, match=r"difference=.* a finite difference other than 0"):
        pairs_needed(difference, spread)


def test_the_same_difference_in_every_pair() -> None:
    """As parameter counts have it, and accuracies but for rounding."""
    parameters = compare([7_018.0] * 3, [6_970.0] * 3)
    assert astuple(parameters.interval) == (48, 48, "t")
    assert parameters.std == parameters.baseline_std == parameters.difference_std == parameters.min_detectable_effect == 0
    assert math.isnan(parameters.p_t)
    assert parameters.p_sign_flip == 2 / 2**3
    assert parameters.effect_size == math.inf
    assert len(set(np.subtract(*arrays(SINGLE_DIFFERENCE)))) > 1
    rounded = compare(*arrays(SINGLE_DIFFERENCE))
    assert math.isnan(rounded.p_t)
    assert rounded.difference_std == rounded.min_detectable_effect == 0
    assert rounded.interval.low == rounded.interval.high == pytest.approx(0.0003)
    assert compare(*arrays([(b, a) for a, b in SINGLE_DIFFERENCE])).effect_size == -math.inf


def test_no_difference_in_any_pair() -> None:
    for arm in ([0.3, 0.6, 0.9], [0.1 + 0.2, 0.6, 0.9]):  # 0.1 + 0.2 > 0.3
        none = compare(arm, [0.3, 0.6, 0.9])
        assert astuple(none.interval) == (0, 0, "t")
        assert none.difference == none.min_detectable_effect == 0
        assert math.isnan(none.p_t)
        assert math.isnan(none.effect_size)
        assert none.p_sign_flip == 1


def test_two_pairs() -> None:
    two = compare([0.9954, 0.9955], [0.9951, 0.9950])
    assert two.difference == pytest.approx(0.0004)
    assert two.interval.low < 0 < two.interval.high
    assert two.p_sign_flip == 0.5
    assert math.isnan(two.effect_size)
    assert two.min_detectable_effect > two.difference


@given(PAIRS)
@settings(max_examples=40, deadline=None)
@example(SINGLE_DIFFERENCE)
@example(ABOVE_T)
def test_a_swap_of_arm_and_baseline_mirrors_the_comparison(pairs: list[tuple[int, int]]) -> None:
    arm, baseline = arrays(pairs)
    there, back = compare(arm, baseline), compare(baseline, arm)
    mirrored = numbers(back) | {
        "mean": back.baseline_mean,
        "std": back.baseline_std,
        "baseline_mean": back.mean,
        "baseline_std": back.std,
        "difference": -back.difference,
        "effect_size": -back.effect_size,
    }
    assert numbers(there) == pytest.approx(mirrored, nan_ok=True)
    assert same_interval(there.interval, Interval(-back.interval.high, -back.interval.low, back.interval.method))


@given(PAIRS, st.integers(-9_000, 9_000))
@settings(max_examples=40, deadline=None)
@example(SINGLE_DIFFERENCE, 1)
@example(ABOVE_T, 1)
def test_a_constant_added_to_both_moves_the_means_alone(pairs: list[tuple[int, int]], constant: int) -> None:
    shift = constant / 10_000
    before, after = compare(*arrays(pairs)), compare(*(values + shift for values in arrays(pairs)))
    moved = {"mean": before.mean + shift, "baseline_mean": before.baseline_mean + shift}
    assert numbers(after) == pytest.approx(numbers(before) | moved, nan_ok=True)
    assert same_interval(after.interval, before.interval)


@given(PAIRS, st.sampled_from([0.01, 1 / 3, 100]))
@settings(max_examples=40, deadline=None)
@example(SINGLE_DIFFERENCE, 100)
@example(ABOVE_T, 100)
def test_percent_or_fractions_make_the_same_comparison(pairs: list[tuple[int, int]], factor: float) -> None:
    arm, baseline = arrays(pairs)
    before, after = compare(arm, baseline), compare(factor * arm, factor * baseline)
    unitless = ("n", "p_t", "p_sign_flip", "effect_size")
    scaled = {name: value if name in unitless else factor * value for name, value in numbers(before).items()}
    assert numbers(after) == pytest.approx(scaled, nan_ok=True)
    interval = Interval(factor * before.interval.low, factor * before.interval.high, before.interval.method)
    assert same_interval(after.interval, interval)


@given(st.lists(PAIR, min_size=2, max_size=10), st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_pairs_does_not_matter(pairs: list[tuple[int, int]], random: Random) -> None:
    before, after = compare(*arrays(pairs)), compare(*arrays(random.sample(pairs, len(pairs))))
    assert numbers(after) == pytest.approx(numbers(before), nan_ok=True)
    assert same_interval(after.interval, before.interval)


@given(PAIRS)
@settings(max_examples=40, deadline=None)
@example(ABOVE_T)
def test_equal_values_give_an_equal_comparison(pairs: list[tuple[int, int]]) -> None:
    assert repr(compare(*arrays(pairs))) == repr(compare(*arrays(pairs)))  # repr: nan is not equal to nan


@given(PAIRS)
@settings(max_examples=40, deadline=None)
@example(ABOVE_T)
def test_the_interval_contains_the_difference_and_excludes_0_if_the_t_test_rejects_it(pairs: list[tuple[int, int]]) -> None:
    comparison = compare(*arrays(pairs))
    low, high, method = astuple(comparison.interval)
    assert low - 1e-12 <= comparison.difference <= high + 1e-12
    if method == "t" and abs(comparison.p_t - ALPHA) > 1e-6:
        assert (low <= 0 <= high) == (comparison.p_t > ALPHA)


def test_bca_agrees_with_scipy_and_takes_over_above_the_border() -> None:
    values = np.random.default_rng(0).exponential(size=T_UP_TO + 1)
    ours = bca_interval(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=99_999, batch=1_000, method="BCa", rng=1).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)  # in a width of 0.7
    assert compare(values, np.zeros_like(values)).interval == ours
    assert compare(values[1:], np.zeros(T_UP_TO)).interval == t_interval(values[1:])
    assert astuple(bca_interval([3.0] * 40)) == (3, 3, "t")


@pytest.mark.parametrize("arm", [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
def test_unequal_lengths(arm: list[float]) -> None:
    with pytest.raises(UserError, match=rf"The arm has {len(arm)} values and the baseline 3: .* the seeds that both have"):
        compare(arm, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_pairs(n: int) -> None:
    with pytest.raises(UserError, match=rf"n={n} is invalid: expected at least two pairs .* Run more seeds"):
        compare([0.99] * n, [0.98] * n)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    for arm, baseline in (([0.9, bad], [0.9, 0.8]), ([0.9, 0.8], [0.9, bad])):
        with pytest.raises(UserError, match=r"is invalid: expected finite numbers\. Leave out"):
            compare(arm, baseline)


def test_values_of_two_dimensions() -> None:
    with pytest.raises(UserError, match=r"shape \(2, 2\)"):
        compare(np.zeros((2, 2)), np.zeros((2, 2)))


@pytest.mark.parametrize("n", [5, 10, 30])
def test_t_intervals_cover_the_mean_of_normal_values_at_their_level(n: int) -> None:
    draws = np.random.default_rng(n).normal(3, 2, (4_000, n))
    covered = sum(interval.low <= 3 <= interval.high for interval in map(t_interval, draws))
    assert within(covered, len(draws), CONFIDENCE)


@pytest.mark.parametrize(
    ("n", "level"),
    [
        (5, 2 / 32),  # no p-value is smaller
        pytest.param(10, 50 / 1024, marks=pytest.mark.slow),  # the largest attainable one below 5 %
        pytest.param(30, ALPHA, marks=pytest.mark.slow),
    ],
)
def test_the_tests_err_at_their_level(n: int, level: float) -> None:
    """No difference exists, and the seed that pairs the values has a larger effect than the noise."""
    random = np.random.default_rng(n)
    seeds = random.normal(0, 5, (2_000, n))
    arms, baselines = seeds + random.normal(size=seeds.shape), seeds + random.normal(size=seeds.shape)
    comparisons = list(map(compare, arms, baselines))
    assert within(sum(c.p_t <= ALPHA for c in comparisons), 2_000, ALPHA)
    assert within(sum(c.p_sign_flip <= level for c in comparisons), 2_000, level)
    if n == 5:
        assert min(c.p_sign_flip for c in comparisons) == level


@pytest.mark.parametrize("n", [5, 10, 30])
def test_the_t_test_detects_the_minimum_detectable_effect_in_four_of_five_cases(n: int) -> None:
    unit = compare(np.arange(n), np.zeros(n))
    draws = np.random.default_rng(n).normal(unit.min_detectable_effect / unit.difference_std, 1, (20_000, n))
    found = (stats.ttest_1samp(draws, 0, axis=1).pvalue < ALPHA).sum()
    assert within(int(found), len(draws), POWER)


@pytest.mark.parametrize("n", [5, 10])
def test_the_effect_size_is_unbiased(n: int) -> None:
    """d_z itself is 25 % (n = 5) and 9 % (n = 10) too large on average."""
    draws = np.random.default_rng(n).normal(0.8, 1, (100_000, n))
    scale = compare(np.arange(n), np.zeros(n))
    correction = scale.effect_size / (scale.difference / scale.difference_std)
    effects = correction * draws.mean(1) / draws.std(1, ddof=1)
    assert effects.mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "mean", "n", "coverage"),
    [
        (np.random.Generator.standard_normal, 0, 50, 0.938),
        (np.random.Generator.standard_exponential, 1, 50, 0.935),
        # The reason for the t interval of few pairs:
        (np.random.Generator.standard_normal, 0, 30, 0.932),
        (np.random.Generator.standard_normal, 0, 10, 0.896),
        (np.random.Generator.standard_normal, 0, 5, 0.834),
    ],
)
def test_bca_covers_the_mean_somewhat_less_often_than_its_level(draw: Callable, mean: float, n: int, coverage: float) -> None:
    """Compared with the coverage of 20,000 intervals at the choice of T_UP_TO, not with 95 %: BCa is exact for large n only."""
    draws = draw(np.random.default_rng(n), (5_000, n))
    covered = sum(interval.low <= mean <= interval.high for interval in map(bca_interval, draws))
    assert within(covered, len(draws), coverage)
