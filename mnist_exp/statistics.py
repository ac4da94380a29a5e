"""What paired runs say of an arm and its baseline: arrays in, numbers out; scipy and statsmodels do the mathematics."""

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
# BCa is too narrow for few values: of 20,000 simulated 95 % intervals it covered the mean in 83 % at n = 5, 90 % at 10, 93 %
# at 30 and 94 % at 50 of normal values, where t covers 95 % at any n; of exponential ones in 80, 88, 93 and 94 %, and t in
# 88, 90, 93 and 93 %. From about 30 on BCa is no worse than t where values are skewed.
T_UP_TO = 30
RESAMPLES = 9_999  # bootstrap samples, and sign flips: all 2**n of them up to n = 13
BATCH = 500  # resamples at once: larger ones leave the CPU's cache
ROUNDING = 1e-12  # of the largest value: 0.9904 - 0.9901 and 0.9905 - 0.9902 differ by 1e-16, and mean the same


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a mean, at CONFIDENCE; method: "t" or "BCa"."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Comparison:
    """What the paired values of an arm and of the baseline say; all but n, p_* and effect_size are in the values' unit.

    n: pairs; *_std: with n - 1 in the denominator; difference: mean of arm - baseline; interval: of the mean difference, t
    up to T_UP_TO pairs and BCa above; p_t: of the paired t test; p_sign_flip: of the sign-flip test of the mean difference
    (Fisher, 1935), exact up to 13 pairs, which cannot fall below 2 / 2**n; effect_size: Hedges' g of the differences,
    which is Cohen's d_z = difference / difference_std without its small-sample bias (Hedges, 1981), nan for two pairs,
    where d_z has no expectation; shows: the smallest difference that the paired t test finds with POWER, given this n
    and difference_std. All tests are two-sided.

    Where the difference is the same in every pair, as those of parameter counts are, there is no spread to test against:
    p_t is nan, interval [difference, difference], shows 0, and effect_size infinite, or nan if the difference is 0.
    p_sign_flip needs no spread and remains.
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
    shows: float


def compare(arm: ArrayLike, baseline: ArrayLike, tests: int = 1) -> Comparison:
    """Compare the values (n,) of an arm with the baseline's (n,), which are paired by position.

    tests: how many such comparisons are judged together, which `shows` takes into account as Bonferroni does.
    Raises UserError where they are not of one length, fewer than two pairs, or not finite.
    """
    arm, baseline = _checked(arm), _checked(baseline)
    if len(arm) != len(baseline):
        raise UserError(
            f"The arm has {len(arm)} values and the baseline {len(baseline)}: pairs need as many of each. "
            "Compare the runs whose seeds both have."
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
        shows=_effect_found_by(n, tests) * difference_std,
    )


def pairs_needed(difference: float, difference_std: float, tests: int = 1) -> int:
    """Return the smallest number of pairs whose paired t test, one of `tests` judged together, finds `difference` with POWER.

    Raises UserError where the difference is 0, which no number of pairs finds, or where either is not finite.
    """
    if not (np.isfinite([difference, difference_std]).all() and abs(difference) > ROUNDING * difference_std >= 0):
        raise UserError(
            f"No number of pairs follows from difference={difference} and difference_std={difference_std}: allowed are a finite "
            "difference other than 0 and a finite spread of at least 0. Name the smallest difference that matters."
        )
    if abs(difference) >= _effect_found_by(2, tests) * difference_std:
        return 2
    return math.ceil(_solve_power(tests, effect_size=abs(difference) / difference_std))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's (1979) adjusted p-values in the order given; a nan stays nan and does not count as a test."""
    adjusted = np.array(p_values, dtype=float)
    tests = ~np.isnan(adjusted)
    if tests.any():  # multipletests divides by their number
        adjusted[tests] = multipletests(adjusted[tests], method="holm")[1]
    return [float(p) for p in adjusted]


def t_interval(values: ArrayLike) -> Interval:
    """Return Student's confidence interval of the mean of the values (n,); raises UserError as `compare` does."""
    values = _checked(values)
    half = stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return Interval(float(values.mean() - half), float(values.mean() + half), "t")


def bca_interval(values: ArrayLike) -> Interval:
    """Return the bootstrap's BCa interval of the mean of the values (n,) (Efron, 1987), or t's where all values are equal.

    The resamples come from a generator of their own, so equal values give an equal interval. Raises UserError as `compare`.
    """
    values = _checked(values)
    if _mean_and_std(values, _rounding(values))[1] == 0:
        return t_interval(values)
    interval = stats.bootstrap(
        (values,), np.mean, method="BCa", confidence_level=CONFIDENCE, n_resamples=RESAMPLES, batch=BATCH, rng=_generator()
    ).confidence_interval
    return Interval(float(interval.low), float(interval.high), "BCa")


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    """Return the values as a float64 array (n,); raises UserError where they are not finite, or fewer than two."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise UserError(f"The values have the shape {array.shape}: allowed is one dimension. Pass one value for each run.")
    if len(array) < 2:
        raise UserError(f"n={len(array)}: one pair says nothing of the spread, allowed are two or more. Run more seeds.")
    if not np.isfinite(array).all():
        raise UserError(f"The values {array} are not all finite: allowed are numbers. Leave out the runs without one.")
    return array


def _rounding(values: NDArray[np.float64]) -> float:
    return ROUNDING * float(np.abs(values).max())


def _mean_and_std(values: NDArray[np.float64], rounding: float) -> tuple[float, float]:
    """Return the mean and the standard deviation (n - 1), 0 where they are no more than the rounding of the values."""
    mean, std = float(values.mean()), float(values.std(ddof=1))
    return (mean if abs(mean) > rounding else 0.0), (std if std > rounding else 0.0)


def _generator() -> np.random.Generator:
    return np.random.default_rng(0)


def _p_sign_flip(differences: NDArray[np.float64], rounding: float) -> float:
    """Return the share of the sign flips whose |mean| reaches the observed one, which counts among them."""
    null = stats.permutation_test(
        (differences,),
        lambda flipped, axis: flipped.mean(axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=_generator(),
    ).null_distribution
    # Not scipy's own p-value: it misses ties of differences such as 0.9904 - 0.9901, whose rounding exceeds its tolerance.
    reached = int((np.abs(null) >= abs(differences.mean()) - rounding).sum())
    drawn = len(null) == RESAMPLES  # and not all 2**n flips, among which is the observed one
    return (reached + drawn) / (len(null) + drawn)


def _hedges_correction(degrees: int) -> float:
    """Return the factor that makes Cohen's d unbiased, nan for one degree of freedom (Hedges, 1981)."""
    if degrees == 1:
        return math.nan
    return math.exp(special.gammaln(degrees / 2) - special.gammaln((degrees - 1) / 2)) / math.sqrt(degrees / 2)


@cache
def _effect_found_by(n: int, tests: int = 1) -> float:
    """Return the smallest difference / difference_std that a paired t test of n pairs, one of `tests`, finds with POWER."""
    return _solve_power(tests, nobs=n)


def _solve_power(tests: int, **known: float) -> float:
    # One-sided at half the level: leaves out rejections on the wrong side, one in a million, but the two-sided solver meets
    # scipy's nct.cdf there, which is nan at some n (73, 87, 876 ...), and then warns and returns nan.
    return float(TTestPower().solve_power(alpha=ALPHA / 2 / tests, power=POWER, alternative="larger", **known))
