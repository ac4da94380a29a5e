"""Paired statistics of an arm and its baseline: arrays in, numbers out, computed by scipy and statsmodels."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats
from statsmodels.stats.power import TTestPower

from mnist_exp.errors import UserError

ALPHA = 0.05  # two-sided, over all arms
POWER = 0.8
# The precision of the prior of the effect size in `anytime_t`, in observations. A small one gives finite intervals from
# 5 values on (for a single arm); larger ones are narrower by at most 8 % at 100 values, and infinite up to 10 of them.
MIXTURE_PRECISION = 1.0
ROUNDING = 1e-12  # relative to the largest value: 0.9904 - 0.9901 and 0.9905 - 0.9902 differ by 1e-16 but count as equal

Verdict = Literal["higher", "lower", "equivalent", "undecided"]


@dataclass(frozen=True)
class Interval:
    """An interval of a mean.

    Args:
        low: The lower end.
        high: The upper end.
        anytime: Whether it is valid at every number of values, however often one looks; else at one number, chosen before.
    """

    low: float
    high: float
    anytime: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether there are enough values for an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Comparison:
    """The statistics of paired values of an arm and its baseline, with a two-sided interval and its p-value.

    If the difference is the same in every pair, no spread exists to test against: `p` is nan, `interval` is [difference,
    difference], `min_detectable_effect` is 0, and `effect_size` is infinite, or nan if the difference is 0.

    Args:
        n: The number of pairs.
        baseline_mean: The mean of the baseline, in the unit of the values.
        baseline_std: The baseline's standard deviation (n - 1), in the unit of the values.
        mean: The mean of the arm, in the unit of the values.
        std: The arm's standard deviation (n - 1), in the unit of the values.
        difference: The mean of arm - baseline, in the unit of the values.
        difference_std: The standard deviation (n - 1) of arm - baseline, in the unit of the values.
        interval: The interval of the mean difference, at level 1 - ALPHA over all arms (Bonferroni).
        p: The p-value of no difference, at most ALPHA if and only if `interval` excludes 0.
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
    p: float
    effect_size: float
    min_detectable_effect: float

    @property
    def is_constant(self) -> bool:
        """Whether neither the arm nor the baseline varies, as with the number of parameters."""
        return self.std == self.baseline_std == 0

    def verdict(self, margin: float | None) -> Verdict:
        """Return what the interval says.

        Args:
            margin: The smallest difference that matters, in the unit of the values; without one, no arm is equivalent.
        """
        if self.difference_std == 0 and not self.is_constant:  # the same in all pairs by chance
            return "undecided"
        if self.interval.low > 0:
            return "higher"
        if self.interval.high < 0:
            return "lower"
        inside = margin is not None and -margin < self.interval.low and self.interval.high < margin
        return "equivalent" if inside or self.is_constant else "undecided"


def compare(arm: ArrayLike, baseline: ArrayLike, tests: int = 1, *, anytime: bool = False) -> Comparison:
    """Compare the values of an arm with those of its baseline, paired by position.

    Args:
        arm: The arm's values (n,), n >= 2, finite.
        baseline: The baseline's values (n,), finite.
        tests: The number of arms that are compared with the baseline; interval and p-value are adjusted for it (Bonferroni).
        anytime: Whether the number of pairs depends on results that were seen before.

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
    rounding = max(_rounding(arm), _rounding(baseline))
    difference, difference_std = _mean_and_std(arm - baseline, rounding)
    baseline_mean, baseline_std = _mean_and_std(baseline, _rounding(baseline))
    mean, std = _mean_and_std(arm, _rounding(arm))
    if difference_std == 0:
        interval, p = Interval(difference, difference, anytime), math.nan
        effect_size = math.copysign(math.inf, difference) if difference else math.nan
    else:
        t = difference / difference_std * math.sqrt(n)
        half = critical_t(n, tests, anytime=anytime) * difference_std / math.sqrt(n)
        interval = Interval(difference - half, difference + half, anytime)
        p = min(1.0, tests * (anytime_p(t, n, n - 1) if anytime else float(2 * stats.t.sf(abs(t), n - 1))))
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
        p=p,
        effect_size=effect_size,
        min_detectable_effect=_detectable_effect(n, tests) * difference_std,
    )


def critical_t(n: int, tests: int = 1, *, anytime: bool = False) -> float:
    """Return the half-width of an interval of a mean in standard errors, infinite if n values are too few.

    Args:
        n: The number of values, at least 2.
        tests: The number of intervals that hold together (Bonferroni).
        anytime: Whether the interval is valid at every n at once.
    """
    alpha = ALPHA / tests
    return anytime_t(n, n - 1, alpha) if anytime else float(stats.t.ppf(1 - alpha / 2, n - 1))


def anytime_t(information: float, degrees: int, alpha: float, precision: float = MIXTURE_PRECISION) -> float:
    """Return the largest |t| that the t-mixture confidence sequence of level 1 - alpha contains.

    The sequence inverts the test martingale of `anytime_p`. Solved for t, with r = precision / (precision + information) and
    k = (r alpha^2)^(1 / (degrees + 1)), the bound is t^2 = degrees (1 - k) / (k - r), infinite for k <= r. It is the sequence of
    Wang and Ramdas (arXiv:2310.03722), Theorem 4.9, and the one of Lindon et al. (arXiv:2210.08589) for one coefficient.

    Args:
        information: The number of values; for a coefficient of a regression, (residual std / standard error)^2.
        degrees: The degrees of freedom of the standard error.
        alpha: The probability that the sequence ever misses the mean.
        precision: The precision of the Gaussian prior of the effect size.
    """
    r = precision / (precision + information)
    k = (r * alpha**2) ** (1 / (degrees + 1))
    return math.sqrt(degrees * (1 - k) / (k - r)) if k > r else math.inf


def anytime_p(t: float, information: float, degrees: int, precision: float = MIXTURE_PRECISION) -> float:
    """Return the p-value that is valid at every number of values: the inverse of the mixture test martingale, at most 1.

    With a N(0, 1 / precision) prior of the effect size mu / sigma and the right Haar prior of sigma, the likelihood ratio of n
    values against mu = 0 is M = sqrt(c / (n + c)) ((1 + t^2 / d) / (1 + c / (n + c) t^2 / d))^((d + 1) / 2), with c = precision,
    d = n - 1. It is a martingale of mean 1 that depends on the values through their ratios alone; by Ville's inequality, it
    exceeds 1 / alpha at any n with probability at most alpha.

    Source: Wang and Ramdas (arXiv:2310.03722), Theorem 4.9, equation 41. They write it with the sum S and the sum of squares V of
    the values: M = sqrt(c / (n + c)) ((n + c) V / ((n + c) V - S^2))^(n / 2). Theorem 4.7 has the flat prior of Lai (1976).

    Args:
        t: The t statistic.
        information: As in `anytime_t`.
        degrees: As in `anytime_t`.
        precision: As in `anytime_t`.
    """
    r = precision / (precision + information)
    log_martingale = 0.5 * math.log(r) + (degrees + 1) / 2 * (math.log1p(t * t / degrees) - math.log1p(r * t * t / degrees))
    return min(1.0, math.exp(-log_martingale))


def pairs_needed(difference: float, difference_std: float, tests: int = 1) -> int:
    """Return the smallest number of pairs at which the paired t test detects `difference` with probability POWER.

    Args:
        difference: The mean difference to detect, finite and not 0.
        difference_std: The standard deviation of the differences, in the same unit, finite and >= 0.
        tests: The number of comparisons tested together (Bonferroni).

    Raises:
        UserError: No number of pairs suffices, because a value is out of range.
    """
    _check_spread(difference, difference_std)
    if abs(difference) >= _detectable_effect(2, tests) * difference_std:
        return 2
    return math.ceil(_solve_power(tests, effect_size=abs(difference) / difference_std))


def pairs_for_equivalence(margin: float, difference_std: float, alpha: float = ALPHA) -> int:
    """Return the smallest number of pairs at which the interval of no difference is within +-margin with probability POWER.

    Args:
        margin: The smallest difference that matters, finite and not 0.
        difference_std: The standard deviation of the differences, in the same unit, finite and >= 0.
        alpha: One minus the level of the two-sided interval.

    Raises:
        UserError: A value is out of range.
    """
    _check_spread(margin, difference_std)
    if difference_std == 0:
        return 2
    ratio = abs(margin) / difference_std
    high = 2
    while equivalence_power(high, ratio, alpha) < POWER:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if equivalence_power(middle, ratio, alpha) < POWER else (low, middle)
    return max(high, 2)


@cache
def equivalence_power(n: int, ratio: float, alpha: float = ALPHA) -> float:
    """Return the probability that the 1 - alpha interval of a mean of 0 lies within +-ratio standard deviations.

    Args:
        n: The number of values, at least 2.
        ratio: The margin in standard deviations of a value.
        alpha: One minus the level of the interval.
    """
    degrees, limit = float(n - 1), ratio * math.sqrt(n)  # an int of 2**63 or more is none for scipy
    t = float(stats.t.ppf(1 - alpha / 2, degrees))
    # Integrate over the distribution function of the sample's standard deviation, up to the largest for an interval inside.
    inside = float(special.chdtr(degrees, degrees * (limit / t) ** 2))
    nodes, weights = np.polynomial.legendre.leggauss(100)
    std = np.sqrt(special.chdtri(degrees, 1 - inside * (nodes + 1) / 2) / degrees)  # of the sample, in true ones
    return float(inside / 2 * weights @ (2 * special.ndtr(limit - t * std) - 1))


def levels_differ(differences: ArrayLike) -> bool:
    """Return whether the difference of two arms depends on the level of another factor, at 5 % over all pairs of levels.

    Args:
        differences: The differences (levels, n) of the arms by level and seed.
    """
    values = np.asarray(differences, dtype=np.float64)
    pairs = [(first, second) for first in range(len(values)) for second in range(first)]
    found = []
    for first, second in pairs:
        mean, std = _mean_and_std(values[first] - values[second], _rounding(values))
        half = critical_t(values.shape[1], len(pairs)) * std / math.sqrt(values.shape[1])
        found.append(abs(mean) > half > 0)
    return any(found)


def _check_spread(difference: float, difference_std: float) -> None:
    if not (np.isfinite([difference, difference_std]).all() and abs(difference) > ROUNDING * difference_std >= 0):
        raise UserError(
            f"difference={difference}, difference_std={difference_std} is invalid: expected a finite difference other than 0 and "
            "a finite standard deviation >= 0. Pass the smallest difference that matters."
        )


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
