import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from statsmodels.stats.power import TTestPower

from mnist_exp.comparison.statistics import (
    ALPHA,
    POWER,
    Comparison,
    Interval,
    anytime_p,
    anytime_t,
    compare,
    critical_t,
    equivalence_power,
    levels_differ,
    pairs_for_equivalence,
    pairs_needed,
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

# Accuracies on 10,000 images: multiples of 0.0001, with ties among their differences.
PAIR = st.tuples(st.integers(9900, 9990), st.integers(9900, 9990))
PAIRS = st.lists(PAIR, min_size=2, max_size=40)
DIFFERENCES = st.lists(st.integers(-10, 30), min_size=2, max_size=40)  # many of them far from 0
SINGLE_DIFFERENCE = [(9904, 9901), (9905, 9902), (9960, 9957)]  # 0.0003 in each pair, but for the rounding


def arrays(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    arm, baseline = np.array(pairs).T / 10_000
    return arm, baseline


def numbers(comparison: Comparison) -> dict[str, float]:
    """A comparison's fields by name, without the interval."""
    return {name: value for name, value in vars(comparison).items() if name != "interval"}


def ends(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def spread_out(n: int) -> np.ndarray:
    """Values of mean 0 and standard deviation 1."""
    values = np.arange(n) - (n - 1) / 2
    return values / values.std(ddof=1)


def with_interval(low: float, high: float, *, anytime: bool = False) -> Comparison:
    """A comparison of ten pairs with this interval."""
    scale = (high - low) / 2 * math.sqrt(10) / critical_t(10, anytime=anytime)
    return compare((low + high) / 2 + scale * spread_out(10), np.zeros(10), anytime=anytime)


def within(hits: int, trials: int, nominal: float) -> bool:
    """Whether `hits` lie within 3.3 standard errors of the nominal rate: false for one in a thousand right ones."""
    return abs(hits / trials - nominal) <= 3.3 * math.sqrt(nominal * (1 - nominal) / trials)


def test_students_sleep_data() -> None:
    sleep = compare(*SLEEP)
    assert sleep.n == 10
    assert sleep.difference == pytest.approx(1.58)
    assert (sleep.mean, sleep.baseline_mean) == pytest.approx((2.33, 0.75))
    assert sleep.p == pytest.approx(0.002833, abs=5e-7)  # this and the interval: R's t.test(..., paired = TRUE)
    assert ends(sleep.interval) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)
    t = sleep.difference / sleep.difference_std * math.sqrt(10)
    assert t == pytest.approx(4.0621, abs=5e-5)
    assert sleep.effect_size == pytest.approx(t / math.sqrt(10) * (1 - 3 / (4 * 9 - 1)), rel=1e-3)  # Hedges's approximation
    assert sleep.verdict(None) == "higher"


def test_darwins_maize() -> None:
    maize = compare(*MAIZE)
    assert maize.difference == pytest.approx(2.6167, abs=5e-5)
    assert maize.difference / maize.difference_std * math.sqrt(15) == pytest.approx(2.148, abs=5e-4)
    assert maize.p == pytest.approx(0.0497, abs=5e-5)
    assert ends(maize.interval) == pytest.approx((0.0039, 5.2294), abs=5e-4)
    assert maize.verdict(None) == "higher"
    assert compare(*MAIZE, anytime=True).verdict(None) == compare(*MAIZE, tests=3).verdict(None) == "undecided"


@pytest.mark.parametrize(
    ("estimate", "t", "p", "low", "high"),
    [
        (0.9163, 5.776, 5.632e-06, 0.4021, 1.430),
        (2.2998, 9.527, 6.110e-13, 1.5404, 3.059),
        (0.4801, 2.273, 4.471e-01, -0.1899, 1.150),
    ],
)
def test_the_sequence_agrees_with_the_example_of_avlm(estimate: float, t: float, p: float, low: float, high: float) -> None:
    """The README of the R package of Lindon et al., commit 313f947, which prints 92 degrees of freedom and uses 91."""
    information = (1.065 / (estimate / t)) ** 2
    half = anytime_t(information, 91, 0.05) * estimate / t
    assert anytime_p(t, information, 91) == pytest.approx(p, rel=0.005)
    assert (estimate - half, estimate + half) == pytest.approx((low, high), abs=0.001)


@pytest.mark.parametrize("precision", [0.1, 1, 10])
@pytest.mark.parametrize(("t", "n"), [(0.5, 5), (2.5, 5), (-3, 10), (4, 30)])
def test_the_martingale_is_a_mixture_of_noncentral_t_densities(t: float, n: int, precision: float) -> None:
    def weighted(effect: float) -> float:
        return stats.nct.pdf(t, n - 1, effect * math.sqrt(n)) * stats.norm.pdf(effect, scale=1 / math.sqrt(precision))

    width = 9 / math.sqrt(precision)
    mixture = integrate.quad(weighted, -width, width, points=[t / math.sqrt(n)], limit=200)[0] / stats.t.pdf(t, n - 1)
    assert anytime_p(t, n, n - 1, precision) == pytest.approx(min(1, 1 / mixture), rel=1e-5)


@given(st.integers(2, 5_000), st.sampled_from([ALPHA, ALPHA / 3]), st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_the_bound_of_the_sequence_has_the_p_value_alpha(n: int, alpha: float, precision: float) -> None:
    bound = anytime_t(n, n - 1, alpha, precision)
    p = anytime_p(1e8 if math.isinf(bound) else bound, n, n - 1, precision)
    assert p > alpha if math.isinf(bound) else p == pytest.approx(alpha)


@pytest.mark.parametrize(("tests", "n"), [(1, 5), (3, 6)])
def test_the_anytime_interval_needs_five_pairs_or_more(tests: int, n: int) -> None:
    few, enough = (compare(np.arange(pairs) + 1e6, np.zeros(pairs), tests, anytime=True) for pairs in (n - 1, n))
    assert ends(few.interval) == (-math.inf, math.inf)
    assert not few.interval.is_finite
    assert few.p > ALPHA
    assert few.verdict(1e9) == "undecided"
    assert enough.interval.is_finite
    assert enough.verdict(None) == "higher"


@given(DIFFERENCES, st.sampled_from([1, 3]), st.booleans())
@settings(max_examples=60, deadline=None)
@example([3, 3, 3], 1, False)
@example([0, 0], 1, True)
def test_the_interval_excludes_0_if_and_only_if_p_is_at_most_alpha(differences: list[int], tests: int, anytime: bool) -> None:
    baseline = 9900 + np.arange(len(differences))
    comparison = compare((baseline + differences) / 10_000, baseline / 10_000, tests, anytime=anytime)
    low, high = ends(comparison.interval)
    assert low - 1e-12 <= comparison.difference <= high + 1e-12
    if comparison.difference_std and abs(comparison.p - ALPHA) > 1e-9:
        assert (low > 0 or high < 0) == (comparison.p <= ALPHA)


@pytest.mark.parametrize("anytime", [False, True])
@pytest.mark.parametrize("tests", [1, 3])
@pytest.mark.parametrize("n", [6, 15, 100])
def test_interval_p_and_verdict_agree_up_to_the_border(n: int, tests: int, anytime: bool) -> None:
    border = critical_t(n, tests, anytime=anytime) / math.sqrt(n)
    beyond, before = (
        compare(spread_out(n) + factor * border, np.zeros(n), tests, anytime=anytime) for factor in (1.000001, 0.999999)
    )
    assert before.p > ALPHA > beyond.p
    assert before.interval.low < 0 < beyond.interval.low
    assert (before.verdict(None), beyond.verdict(None)) == ("undecided", "higher")


@pytest.mark.parametrize("anytime", [False, True])
@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (0.06, 0.08, 0.05, "higher"),
        (0.01, 0.08, 0.05, "higher"),
        (0.01, 0.04, 0.05, "higher"),
        (0.01, 0.04, None, "higher"),
        (-0.04, -0.01, 0.05, "lower"),
        (-0.08, -0.06, None, "lower"),
        (-0.04, 0.04, 0.05, "equivalent"),
        (-0.04, 0.04, None, "undecided"),
        (-0.04, 0.06, 0.05, "undecided"),
        (-0.06, 0.04, 0.05, "undecided"),
        (-0.06, 0.06, 0.05, "undecided"),
    ],
)
def test_the_verdict_follows_from_the_interval(
    low: float, high: float, margin: float | None, verdict: str, anytime: bool
) -> None:
    comparison = with_interval(low, high, anytime=anytime)
    assert ends(comparison.interval) == pytest.approx((low, high))
    assert comparison.interval.anytime is anytime
    assert comparison.verdict(margin) == verdict


def test_an_interval_of_several_arms_is_wider() -> None:
    one, three = compare(*SLEEP), compare(*SLEEP, tests=3)
    assert three.interval.low < one.interval.low < one.interval.high < three.interval.high
    assert three.p == pytest.approx(3 * one.p)
    assert compare([1, 2, 3], [2, 2, 2], tests=3).p == 1


@pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_pairs_needed_for_cohens_small_medium_and_large_effect(effect: float, n: int) -> None:
    """Cohen's (1988) effects, as G*Power's "difference between two dependent means" has them."""
    assert pairs_needed(effect, 1) == pairs_needed(-effect / 100, 0.01) == n


@pytest.mark.parametrize("tests", [1, 3])
@pytest.mark.parametrize("n", [2, 3, 5, 10, 30, 73, 87, 876])
def test_the_minimum_detectable_effect_has_the_nominal_power(n: int, tests: int) -> None:
    values = np.arange(n) / 1_000
    comparison = compare(values, np.zeros(n), tests)
    effect = comparison.min_detectable_effect / comparison.difference_std
    assert stats.nct.sf(critical_t(n, tests), n - 1, effect * math.sqrt(n)) == pytest.approx(POWER, abs=1e-4)
    assert pairs_needed(1.0001 * comparison.min_detectable_effect, comparison.difference_std, tests) == n
    assert pairs_needed(0.9999 * comparison.min_detectable_effect, comparison.difference_std, tests) > n


def test_the_power_agrees_with_statsmodels_two_sided() -> None:
    comparison = compare(np.arange(10), np.zeros(10))
    effect = TTestPower().solve_power(nobs=10, alpha=ALPHA, power=POWER)
    assert comparison.min_detectable_effect / comparison.difference_std == pytest.approx(effect, rel=1e-4)


def test_extreme_effects_need_two_pairs_or_very_many() -> None:
    assert pairs_needed(1e9, 1) == pairs_needed(1, 0) == 2
    assert pairs_needed(1e-6, 1) == pytest.approx((stats.norm.isf(ALPHA / 2) + stats.norm.ppf(POWER)) ** 2 * 1e12, rel=1e-4)


def test_pairs_for_equivalence_agree_with_published_examples() -> None:
    """Chow, Shao and Wang have 35 by the normal distribution; PASS has 36 by t, and 16 for a power of 70 % (chapter 519)."""
    normal = ((stats.norm.isf(0.05) + stats.norm.isf(0.1)) * 0.10 / 0.05) ** 2
    assert math.ceil(normal) == 35
    assert pairs_for_equivalence(0.05, 0.10, alpha=0.10) == 36
    assert equivalence_power(15, 20 / 28.284, 0.10) < 0.7 <= equivalence_power(16, 20 / 28.284, 0.10)


@pytest.mark.parametrize("alpha", [0.10, ALPHA, ALPHA / 3])
@pytest.mark.parametrize("ratio", [3, 1, 0.3])
def test_pairs_for_equivalence_are_the_fewest_with_the_power(ratio: float, alpha: float) -> None:
    n = pairs_for_equivalence(-ratio / 100, 0.01, alpha)
    assert n == pairs_for_equivalence(ratio, 1, alpha)
    assert equivalence_power(n - 1, ratio, alpha) < POWER <= equivalence_power(n, ratio, alpha)


def test_wide_margins_need_two_pairs() -> None:
    assert pairs_for_equivalence(1e9, 1) == pairs_for_equivalence(1, 0) == 2


def test_narrow_margins_need_as_many_pairs_as_the_normal_distribution_says() -> None:
    normal = (stats.norm.isf(ALPHA / 2) + stats.norm.isf((1 - POWER) / 2)) ** 2
    for ratio in (0.02, 0.01):
        assert pairs_for_equivalence(ratio, 1) == pytest.approx(normal / ratio**2, rel=1e-3)


@pytest.mark.parametrize(("n", "ratio", "alpha"), [(2, 10, ALPHA), (5, 1.5, ALPHA), (36, 0.5, 0.10), (100, 0.25, ALPHA / 3)])
def test_the_power_of_equivalence_is_the_share_of_intervals_inside(n: int, ratio: float, alpha: float) -> None:
    draws = np.random.default_rng(n).normal(size=(50_000, n))
    half = stats.t.isf(alpha / 2, n - 1) * draws.std(1, ddof=1) / math.sqrt(n)
    power = equivalence_power(n, ratio, alpha)
    inside = (abs(draws.mean(1)) + half < ratio).mean()
    assert 0.05 < power < 0.95
    assert inside == pytest.approx(power, abs=4 * math.sqrt(power * (1 - power) / len(draws)))


@pytest.mark.parametrize("pairs", [pairs_needed, pairs_for_equivalence])
@pytest.mark.parametrize(("difference", "spread"), [(0, 1), (0, 0), (math.nan, 1), (1, math.inf), (1, -1), (1, math.nan)])
def test_no_number_of_pairs(pairs: Callable[[float, float], int], difference: float, spread: float) -> None:
    with pytest.raises(UserError):
        pairs(difference, spread)


def test_levels_differ_if_their_differences_do() -> None:
    noise = np.array([[0.1, -0.2, 0.3, 0.0, -0.1], [0.2, 0.1, -0.3, -0.1, 0.0], [-0.1, 0.3, 0.0, -0.2, 0.1]])
    assert not levels_differ(noise)
    assert not levels_differ(noise + 2)
    assert not levels_differ(noise[:1])
    assert not levels_differ(np.tile(noise[0], (3, 1)))
    assert not levels_differ([[0.0003, 0.0003], [0.0001, 0.0001]])  # the same in both pairs, by chance
    assert levels_differ(noise + np.array([[0], [0], [2]]))
    assert levels_differ(noise[:2] + np.array([[1], [-1]]))


def test_three_levels_need_a_larger_difference_than_two() -> None:
    shift = (critical_t(8) + critical_t(8, 3)) / 2 / math.sqrt(8)
    first, second = spread_out(8) / 2, shift - spread_out(8) / 2
    assert levels_differ([first, second])
    assert not levels_differ([first, second, (first + second) / 2])


def test_the_same_difference_in_every_pair() -> None:
    """As parameter counts have it, and accuracies but for rounding."""
    parameters = compare([7_018.0] * 3, [6_970.0] * 3)
    assert ends(parameters.interval) == (48, 48)
    assert parameters.std == parameters.baseline_std == parameters.difference_std == parameters.min_detectable_effect == 0
    assert math.isnan(parameters.p)
    assert parameters.effect_size == math.inf
    assert len(set(np.subtract(*arrays(SINGLE_DIFFERENCE)))) > 1
    rounded = compare(*arrays(SINGLE_DIFFERENCE))
    assert math.isnan(rounded.p)
    assert rounded.difference_std == rounded.min_detectable_effect == 0
    assert rounded.interval.low == rounded.interval.high == pytest.approx(0.0003)
    assert compare(*arrays([(b, a) for a, b in SINGLE_DIFFERENCE])).effect_size == -math.inf


def test_no_difference_in_any_pair() -> None:
    for arm in ([0.3, 0.6, 0.9], [0.1 + 0.2, 0.6, 0.9]):  # 0.1 + 0.2 > 0.3
        none = compare(arm, [0.3, 0.6, 0.9])
        assert ends(none.interval) == (0, 0)
        assert none.difference == none.min_detectable_effect == 0
        assert math.isnan(none.p)
        assert math.isnan(none.effect_size)


@pytest.mark.parametrize("anytime", [False, True])
@pytest.mark.parametrize("margin", [None, 0.01])
def test_without_spread_the_verdict_is_undecided_unless_the_metric_is_constant(margin: float | None, anytime: bool) -> None:
    def verdict(arm: list[float], baseline: list[float]) -> str:
        return compare(arm, baseline, anytime=anytime).verdict(margin)

    assert verdict([7_018.0] * 3, [6_970.0] * 3) == "higher"
    assert verdict([6_970.0] * 3, [7_018.0] * 3) == "lower"
    assert verdict([7_018.0] * 3, [7_018.0] * 3) == "equivalent"
    assert verdict([0.3, 0.6, 0.9], [0.3, 0.6, 0.9]) == "undecided"
    assert verdict(*arrays(SINGLE_DIFFERENCE)) == "undecided"


def test_two_pairs() -> None:
    two = compare([0.9954, 0.9955], [0.9951, 0.9950])
    assert two.difference == pytest.approx(0.0004)
    assert two.interval.low < 0 < two.interval.high
    assert two.verdict(0.0005) == "undecided"
    assert math.isnan(two.effect_size)
    assert two.min_detectable_effect > two.difference


@given(PAIRS, st.booleans())
@settings(max_examples=40, deadline=None)
@example(SINGLE_DIFFERENCE, False)
def test_a_swap_of_arm_and_baseline_mirrors_the_comparison(pairs: list[tuple[int, int]], anytime: bool) -> None:
    arm, baseline = arrays(pairs)
    there, back = compare(arm, baseline, anytime=anytime), compare(baseline, arm, anytime=anytime)
    mirrored = numbers(back) | {
        "mean": back.baseline_mean,
        "std": back.baseline_std,
        "baseline_mean": back.mean,
        "baseline_std": back.std,
        "difference": -back.difference,
        "effect_size": -back.effect_size,
    }
    assert numbers(there) == pytest.approx(mirrored, nan_ok=True)
    assert ends(there.interval) == pytest.approx((-back.interval.high, -back.interval.low))
    assert {there.verdict(0.001), back.verdict(0.001)} in ({"higher", "lower"}, {"equivalent"}, {"undecided"})


@given(PAIRS, st.integers(-9_000, 9_000), st.booleans())
@settings(max_examples=40, deadline=None)
@example(SINGLE_DIFFERENCE, 1, False)
def test_a_constant_added_to_both_moves_the_means_alone(pairs: list[tuple[int, int]], constant: int, anytime: bool) -> None:
    shift = constant / 10_000
    before = compare(*arrays(pairs), anytime=anytime)
    after = compare(*(values + shift for values in arrays(pairs)), anytime=anytime)
    moved = {"mean": before.mean + shift, "baseline_mean": before.baseline_mean + shift}
    assert numbers(after) == pytest.approx(numbers(before) | moved, nan_ok=True)
    assert ends(after.interval) == pytest.approx(ends(before.interval))


@given(PAIRS, st.sampled_from([0.01, 1 / 3, 100]), st.booleans())
@settings(max_examples=40, deadline=None)
@example(SINGLE_DIFFERENCE, 100, False)
def test_percent_or_fractions_make_the_same_comparison(pairs: list[tuple[int, int]], factor: float, anytime: bool) -> None:
    arm, baseline = arrays(pairs)
    before, after = compare(arm, baseline, anytime=anytime), compare(factor * arm, factor * baseline, anytime=anytime)
    unitless = ("n", "p", "effect_size")
    scaled = {name: value if name in unitless else factor * value for name, value in numbers(before).items()}
    assert numbers(after) == pytest.approx(scaled, nan_ok=True)
    assert ends(after.interval) == pytest.approx((factor * before.interval.low, factor * before.interval.high))


@given(st.lists(PAIR, min_size=2, max_size=10), st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_pairs_does_not_matter(pairs: list[tuple[int, int]], random: Random) -> None:
    before, after = compare(*arrays(pairs)), compare(*arrays(random.sample(pairs, len(pairs))))
    assert numbers(after) == pytest.approx(numbers(before), nan_ok=True)
    assert ends(after.interval) == pytest.approx(ends(before.interval))


@pytest.mark.parametrize(
    ("arm", "baseline"),
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0]),  # unequal lengths
        ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0]),
        ([], []),  # fewer than two pairs
        ([0.99], [0.98]),
        *(([0.9, bad], [0.9, 0.8]) for bad in (math.nan, math.inf, -math.inf)),  # not finite
        ([0.9, 0.8], [0.9, math.nan]),
        (np.zeros((2, 2)), np.zeros((2, 2))),  # two dimensions
    ],
)
def test_values_that_cannot_be_compared(arm: list[float], baseline: list[float]) -> None:
    with pytest.raises(UserError):
        compare(arm, baseline)


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
@pytest.mark.parametrize("n", [5, 10, 30])
def test_the_interval_covers_the_difference_of_normal_values_at_its_level(n: int) -> None:
    """The seed that pairs the values has a larger effect than the noise."""
    random = np.random.default_rng(n)
    seeds = random.normal(0, 5, (4_000, n))
    arms, baselines = seeds + random.normal(3, 1, seeds.shape), seeds + random.normal(size=seeds.shape)
    intervals = [compare(arm, baseline).interval for arm, baseline in zip(arms, baselines, strict=True)]
    assert within(sum(interval.low <= 3 <= interval.high for interval in intervals), len(intervals), 1 - ALPHA)


@pytest.mark.slow
def test_three_arms_together_err_in_at_most_one_of_twenty_cases() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(3_000, 4, 10))
    found = [any(compare(arm, baseline, 3).verdict(None) != "undecided" for arm in arms) for baseline, *arms in values]
    assert 0.02 < np.mean(found) <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / len(found))


@pytest.mark.slow
def test_only_the_anytime_interval_keeps_its_level_if_one_looks_after_every_pair() -> None:
    draws, counts = np.random.default_rng(0).normal(size=(10_000, 200)), np.arange(2, 201)
    means = draws.cumsum(1)[:, 1:] / counts
    stds = np.sqrt((np.square(draws).cumsum(1)[:, 1:] - counts * means**2) / (counts - 1))
    t = abs(means) / stds * np.sqrt(counts)
    fixed, anytime = ((t > [critical_t(n, anytime=kind) for n in counts]).any(1).mean() for kind in (False, True))
    assert anytime <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / len(draws))
    assert fixed > 0.15


@pytest.mark.slow
@pytest.mark.parametrize(("levels", "n"), [(2, 3), (2, 10), (3, 5)])
def test_equal_levels_differ_in_at_most_one_of_twenty_cases(levels: int, n: int) -> None:
    draws = np.random.default_rng(n).normal(size=(4_000, levels, n))
    assert np.mean([levels_differ(values) for values in draws]) <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / len(draws))
