"""Paired statistics of an arm and its baseline: arrays in, numbers out, computed by scipy and statsmodels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from mnist_exp.errors import UserError

CONFIDENCE = 0.95
ALPHA = 0.05  # two-sided
POWER = 0.8
# BCa intervals are too narrow for few values. Coverage of 20,000 simulated 95 % intervals at n = 5, 10, 30 and 50: for normal
# values BCa 83, 90, 93 and 94 %, t 95 % at any n; for exponential values BCa 80, 88, 93 and 94 %, t 88, 90, 93 and 93 %.
# From about n = 30, BCa is at least as good as t for skewed values.
T_UP_TO = 30
RESAMPLES = 9_999  # bootstrap samples and sign flips; up to n = 13 all 2**n flips are used instead
BATCH = 500  # resamples at a time; larger batches do not fit into the CPU cache
ROUNDING = 1e-12  # relative to the largest value: 0.9904 - 0.9901 and 0.9905 - 0.9902 differ by 1e-16 but count as equal


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a mean at level CONFIDENCE; `method` is "t" or "BCa"."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Comparison:
    """The statistics of paired values of an arm and its baseline. All tests are two-sided.

    If the difference is the same in every pair, as for parameter counts, no spread exists to test against: `p_t` is nan,
    `interval` is [difference, difference], `min_detectable_effect` is 0, and `effect_size` is infinite, or nan if the
    difference is 0. `p_sign_flip` needs no spread and is always defined.

    Args:
        n: The number of pairs.
        baseline_mean: The mean of the baseline, in the unit of the values.
        baseline_std: The baseline's standard deviation (n - 1), in the unit of the values.
        mean: The mean of the arm, in the unit of the values.
        std: The arm's standard deviation (n - 1), in the unit of the values.
        difference: The mean of arm - baseline, in the unit of the values.
        difference_std: The standard deviation (n - 1) of arm - baseline, in the unit of the values.
        interval: The interval of the mean difference: t up to T_UP_TO pairs, BCa above.
        p_t: The p-value of the paired t test.
        p_sign_flip: The p-value of the sign-flip test of the mean difference (Fisher, 1935): exact up to 13 pairs, and
            at least 2 / 2**n.
        effect_size: Hedges' g of the differences: Cohen's d_z = difference / difference_std without its small-sample bias
            (Hedges, 1981); nan for two pairs, where d_z has no expectation.
        min_detectable_effect: The smallest difference that the paired t test detects with probability POWER at this n and
            difference_std, in the unit of the values.
    """

    n: int
    baseline_mean: float
    baseline_std: float
    mean: float
    std: float
    difference: float
    difference_std: float
    interval: Interval
    p_t: float
    p_sign_flip: float
    effect_size: float
    min_detectable_effect: float


def compare(arm: ArrayLike, baseline: ArrayLike, tests: int = 1) -> Comparison:
    """Compare the values of an arm with those of its baseline, paired by position.

    Args:
        arm: The arm's values (n,), n >= 2, finite.
        baseline: The baseline's values (n,), finite.
        tests: The number of comparisons tested together; `min_detectable_effect` applies Bonferroni's correction for it.

    Raises:
        UserError: The values differ in length, are not finite, or form fewer than two pairs.
    """
    arm, baseline = _checked(arm), _checked(baseline)
    if len(arm) != len(baseline):
        raise UserError(
            f"The arm has {len(arm)} values and the baseline {len(baseline)}: expected as many of each. "
            "Compare only the seeds that both have."
        )
    n = len(arm)
    differences = arm - baseline
    rounding = max(_rounding(arm), _rounding(baseline))
    difference, difference_std = _mean_and_std(differences, rounding)
    baseline_mean, baseline_std = _mean_and_std(baseline, _rounding(baseline))
    mean, std = _mean_and_std(arm, _rounding(arm))
    if difference_std == 0:
        interval = Interval(difference, difference, "t")
        p_t = math.nan
        effect_size = math.copysign(math.inf, difference) if difference else math.nan
    else:
        interval = t_interval(differences) if n <= T_UP_TO else bca_interval(differences)
        p_t = float(stats.ttest_rel(arm, baseline).pvalue)
        effect_size = difference / difference_std * _hedges_correction(n - 1)
    return Comparison(
        n=n,
        baseline_mean=baseline_mean,
        baseline_std=baseline_std,
        mean=mean,
        std=std,
        difference=difference,
        difference_std=difference_std,
        interval=interval,
        p_t=p_t,
        p_sign_flip=_p_sign_flip(differences, rounding),
        effect_size=effect_size,
        min_detectable_effect=_detectable_effect(n, tests) * difference_std,
    )


def pairs_needed(difference: float, difference_std: float, tests: int = 1) -> int:
    """Return the smallest number of pairs at which the paired t test detects `difference` with probability POWER.

    Args:
        difference: The mean difference to detect, finite and not 0.
        difference_std: The standard deviation of the differences, in the same unit, finite and >= 0.
        tests: The number of comparisons tested together (Bonferroni).

    Raises:
        UserError: No number of pairs suffices, because a value is out of range.
    """
    if not (np.isfinite([difference, difference_std]).all() and abs(difference) > ROUNDING * difference_std >= 0):
        raise UserError(
            f"difference={difference}, difference_std={difference_std} is invalid: expected a finite difference other than 0 and "
            "a finite standard deviation >= 0. Pass the smallest difference that matters."
        )
    if abs(difference) >= _detectable_effect(2, tests) * difference_std:
        return 2
    return math.ceil(_solve_power(tests, effect_size=abs(difference) / difference_std))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted by Holm's method (1979), in input order; a nan stays nan and does not count as a test."""
    adjusted = np.array(p_values, dtype=float)
    tests = ~np.isnan(adjusted)
    if tests.any():  # multipletests divides by their number
        adjusted[tests] = multipletests(adjusted[tests], method="holm")[1]
    return [float(p) for p in adjusted]


def t_interval(values: ArrayLike) -> Interval:
    """Return Student's confidence interval of the mean of the values (n,).

    Raises:
        UserError: The values are not finite, or fewer than two.
    """
    values = _checked(values)
    half = stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return Interval(float(values.mean() - half), float(values.mean() + half), "t")


def bca_interval(values: ArrayLike) -> Interval:
    """Return the BCa bootstrap interval (Efron, 1987) of the mean of the values (n,), or the t interval of equal values.

    The generator has a fixed seed, so equal values yield equal intervals.

    Raises:
        UserError: The values are not finite, or fewer than two.
    """
    values = _checked(values)
    if _mean_and_std(values, _rounding(values))[1] == 0:
        return t_interval(values)
    interval = stats.bootstrap(
        (values,),
        np.mean,
        method="BCa",
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(interval.low), float(interval.high), "BCa")


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    """Return the values as a float64 array (n,); raises UserError if they are not finite, or fewer than two."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise UserError(f"values of shape {array.shape} are invalid: expected one dimension. Pass one value per run.")
    if len(array) < 2:
        raise UserError(f"n={len(array)} is invalid: expected at least two pairs to estimate the spread. Run more seeds.")
    if not np.isfinite(array).all():
        raise UserError(f"values={array} is invalid: expected finite numbers. Leave out the runs without one.")
    return array


def _rounding(values: NDArray[np.float64]) -> float:
    return ROUNDING * float(np.abs(values).max())


def _mean_and_std(values: NDArray[np.float64], rounding: float) -> tuple[float, float]:
    """Return the mean and the standard deviation (n - 1), each 0 if it does not exceed `rounding`."""
    mean, std = float(values.mean()), float(values.std(ddof=1))
    return (mean if abs(mean) > rounding else 0.0), (std if std > rounding else 0.0)


def _p_sign_flip(differences: NDArray[np.float64], rounding: float) -> float:
    """Return the share of sign flips, the observed one included, whose |mean| reaches the observed one."""
    null = stats.permutation_test(
        (differences,),
        lambda flipped, axis: flipped.mean(axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=np.random.default_rng(0),
    ).null_distribution
    # scipy's own p-value misses ties between differences such as 0.9904 - 0.9901, whose rounding exceeds its tolerance.
    reached = int((np.abs(null) >= abs(differences.mean()) - rounding).sum())
    drawn = len(null) == RESAMPLES  # a random sample lacks the observed flip, the full set of 2**n contains it
    return (reached + drawn) / (len(null) + drawn)


def _hedges_correction(degrees: int) -> float:
    """Return the factor that removes the bias of Cohen's d (Hedges, 1981); nan for one degree of freedom."""
    if degrees == 1:
        return math.nan
    return math.exp(special.gammaln(degrees / 2) - special.gammaln((degrees - 1) / 2)) / math.sqrt(degrees / 2)


@cache
def _detectable_effect(n: int, tests: int = 1) -> float:
    """Return the smallest difference / difference_std that one of `tests` paired t tests of n pairs detects with POWER."""
    return _solve_power(tests, nobs=n)


def _solve_power(tests: int, **known: float) -> float:
    # One-sided at half the level, which ignores rejections on the wrong side (one in a million): the two-sided solver calls
    # scipy's nct.cdf there, which is nan at some n (73, 87, 876, ...), and then warns and returns nan.
    return float(TTestPower().solve_power(alpha=ALPHA / 2 / tests, power=POWER, alternative="larger", **known))
