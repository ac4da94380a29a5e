"""The interval over all looks, its p-value, and the numbers of seeds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mnist_exp.comparison.statistics import (
    ALPHA,
    CONFIDENCE,
    POWER,
    Estimate,
    Look,
    error_of_look,
    estimate,
    image_variance,
    pairs_to_detect,
    slope,
    upper_std,
    welch,
)

pytestmark = pytest.mark.filterwarnings("error")

# Hours of sleep gained by two drugs, ten patients (Cushny and Peebles, 1905; Student, 1908).
SLEEP = (
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
)
DIFFERENCES = st.lists(st.integers(-10, 30), min_size=2, max_size=40)


def at(differences: object, *counts: int, rows: int = 1) -> Estimate:
    """The estimate after looks at the first of some differences, and at all."""
    values = np.asarray(differences, dtype=float)
    looks = [*counts, len(values)]
    return estimate([Look(values[:n], np.zeros(n), error_of_look(k) / rows) for k, n in enumerate(looks, start=1)])


def within(hits: int, trials: int, nominal: float) -> bool:
    """Whether `hits` lie within 3.3 standard errors of the nominal rate: false for one in a thousand right ones."""
    return abs(hits / trials - nominal) <= 3.3 * math.sqrt(nominal * (1 - nominal) / trials)


def test_students_sleep_data() -> None:
    sleep = estimate([Look(*map(np.array, SLEEP), alpha=0.05)])
    assert (sleep.n, sleep.difference) == (10, pytest.approx(1.58))
    assert (sleep.low, sleep.high) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)  # R's t.test(..., paired = TRUE)
    assert sleep.p == pytest.approx(0.002833, abs=5e-7)


def test_the_variance_of_images_is_the_mean_covariance_of_two_seeds() -> None:
    """Against the definition, pair by pair."""
    differences = np.random.default_rng(0).integers(-1, 2, (5, 40)).astype(float) + np.linspace(-1, 1, 40).round()
    totals = differences.sum(1)
    covariances = [
        (differences[s] @ differences[t] - totals[s] * totals[t] / 40) / 39 for s in range(5) for t in range(5) if s != t
    ]
    assert np.mean(covariances) > 0
    assert image_variance(differences) == pytest.approx(np.mean(covariances) / 40)
    assert image_variance(np.array([[1.0, -1.0], [-1.0, 1.0]])) == 0, "never below 0"
    alike = np.tile(differences[0], (3, 1))
    assert image_variance(alike) == pytest.approx(differences[0].var(ddof=1) / 40), "seeds that agree add nothing"


def test_the_interval_for_new_images_adds_the_variance_of_seeds_and_images() -> None:
    values = np.array([0.001, 0.003, 0.002, 0.004])
    found = estimate([Look(values, np.zeros(4), 0.05, image_variance=1e-6)])
    half = math.sqrt(stats.t.isf(0.025, 3) ** 2 * values.var(ddof=1) / 4 + 1.96**2 * 1e-6)
    assert found.new_images == pytest.approx((0.0025 - half, 0.0025 + half), rel=1e-4)
    assert (found.high - found.low) / 2 < half
    assert estimate([Look(values, np.zeros(4), 0.05)]).new_images is None
    later = Look(values[[0, 1, 2, 3] * 5] + 0.1, np.zeros(20), 0.05, image_variance=1e-6)
    contradicting = estimate([Look(values, np.zeros(4), 0.05, image_variance=1e-6), later])
    assert (contradicting.has_interval, contradicting.new_images) == (False, None)


def test_slopes_are_those_of_each_curve() -> None:
    x = np.array([0.0, 1.0, 2.0])
    assert slope(x, np.array([1 + 2 * x, 5 + 4 * x])) == pytest.approx((3, 3 - stats.t.isf(0.025, 1), 3 + stats.t.isf(0.025, 1)))


def test_welch_on_students_sleep_data() -> None:
    assert welch(*map(np.array, SLEEP)) == pytest.approx((1.58, -0.2054832, 3.3654832), abs=5e-8)  # R's t.test


def test_the_errors_of_all_looks_add_up_to_alpha() -> None:
    assert sum(error_of_look(look) for look in range(1, 10_000)) == pytest.approx(ALPHA, abs=1e-5)
    plain = stats.t.isf(0.025, 19)
    widths = [stats.t.isf(error_of_look(look) / 2, 19) / plain for look in (1, 2)]
    assert widths == pytest.approx([1.05, 1.51], abs=0.01)


@given(DIFFERENCES, st.lists(st.integers(2, 40), max_size=3), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_p_is_at_most_alpha_if_and_only_if_a_look_excludes_0(differences: list[int], counts: list[int], rows: int) -> None:
    found = at(differences, *sorted({n for n in counts if n < len(differences)}), rows=rows)
    if not math.isnan(found.p) and abs(found.p - ALPHA) > 1e-9:
        assert (found.low > 0 or found.high < 0) == (found.p <= ALPHA)


@given(DIFFERENCES, st.integers(2, 39))
@settings(max_examples=60, deadline=None)
def test_a_further_look_only_narrows_the_interval(differences: list[int], n: int) -> None:
    if n < len(differences):
        before, after = at(differences[:n]), at(differences, n)
        assert before.low <= after.low
        assert after.high <= before.high
        assert not after.p > before.p


@pytest.mark.parametrize("differences", [[], [0.1], [0.0003, 0.0003, 0.0003], [0.0, 0.0]])
def test_without_a_spread_there_is_no_interval(differences: list[float]) -> None:
    found = at(differences)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert math.isnan(found.p)
    assert not found.has_interval


def test_rounding_is_no_spread() -> None:
    """0.9904 - 0.9901 and 0.9905 - 0.9902 differ by 1e-16."""
    arm, baseline = np.array([0.9904, 0.9905, 0.9960]), np.array([0.9901, 0.9902, 0.9957])
    assert len(set(arm - baseline)) > 1
    assert not estimate([Look(arm, baseline, ALPHA)]).has_interval


def test_looks_can_contradict_each_other() -> None:
    found = at([1.0, 1.01, 0.99, 1.0, *[-1.0, -1.01, -0.99] * 60], 4)
    assert found.low > found.high
    assert not found.has_interval


@pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_pairs_to_detect_cohens_small_medium_and_large_effect(effect: float, n: int) -> None:
    """Cohen's (1988) effects, as G*Power's "difference between two dependent means" has them."""
    assert pairs_to_detect(effect, 1, 0.05) == pairs_to_detect(effect / 100, 0.01, 0.05) == n


def test_extreme_effects_need_two_pairs_or_more_than_anybody_plans() -> None:
    assert pairs_to_detect(1e9, 1, 0.05) == 2
    assert pairs_to_detect(1e-6, 1, 0.05) is None


@pytest.mark.parametrize("n", [5, 10, 20])
def test_the_upper_number_of_seeds_suffices_in_four_of_five_pilots(n: int) -> None:
    """The number itself suffices in fewer than three of five: 10 to 69 seeds from pilots of 5, where 34 are needed."""
    pilots = np.random.default_rng(n).normal(size=(2_000, n)).std(1, ddof=1)
    assert within(int((upper_std(1.0, n) * pilots >= 1).sum()), len(pilots), CONFIDENCE)
    assert np.mean(pilots >= 1) < 0.6
    needed = pairs_to_detect(0.5, 1, 0.05)
    for std in pilots[:20]:
        bound = pairs_to_detect(0.5, upper_std(std, n), 0.05)
        assert (bound >= needed) == (upper_std(std, n) >= 1 - 0.02) or abs(upper_std(std, n) - 1) < 0.02


@pytest.mark.parametrize("alpha", [0.04, 0.005])
def test_the_number_detects_the_difference_with_its_power(alpha: float) -> None:
    n = pairs_to_detect(0.5, 1, alpha)
    draws = np.random.default_rng(0).normal(0.5, 1, (5_000, n))
    shares = [(stats.ttest_1samp(draws[:, :count], 0, axis=1).pvalue < alpha).mean() for count in (n - 4, n)]
    assert shares[0] < POWER
    assert shares[1] == pytest.approx(POWER, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(5,), (5, 20), (5, 10, 20), tuple(range(5, 30, 5))])
def test_all_looks_together_err_in_at_most_one_of_twenty_studies(counts: tuple[int, ...]) -> None:
    """The plain t interval at every look errs in up to a third of them."""
    draws = np.random.default_rng(len(counts)).normal(size=(4_000, counts[-1]))
    found = [at(values, *counts[:-1]) for values in draws]
    wrong = np.mean([result.low > 0 or result.high < 0 for result in found])
    assert wrong <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / len(draws))


@pytest.mark.slow
def test_arms_that_are_added_one_by_one_err_in_at_most_one_of_twenty_studies() -> None:
    arms, n = 6, 10
    draws = np.random.default_rng(0).normal(size=(2_000, arms + 1, n))
    wrong = []
    for baseline, *values in draws:
        found = (
            estimate([Look(arm, baseline, error_of_look(look) / look) for look in range(first, arms + 1)])
            for first, arm in enumerate(values, start=1)
        )
        wrong.append(any(result.low > 0 or result.high < 0 for result in found))
    assert np.mean(wrong) <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / len(draws))
