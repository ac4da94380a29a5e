"""Paired statistics of an arm and its baseline: arrays in, numbers out, computed by scipy."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ALPHA = 0.05  # the probability of any error: two-sided, over all rows and looks
POWER = 0.8
CONFIDENCE = 0.8  # of the upper bound of a standard deviation
MAX_PAIRS = 10_000  # nobody plans more
ROUNDING = 1e-12  # relative to the largest value: 0.9904 - 0.9901 and 0.9905 - 0.9902 differ by 1e-16 but count as equal


def error_of_look(look: int) -> float:
    """Return the share of ALPHA that is spent at a look, from 1: 0.04, then 0.01 / (k (k - 1)), which add up to 0.05."""
    return 0.04 if look == 1 else 0.01 / (look * (look - 1))


@dataclass(frozen=True)
class Look:
    """The pairs of a row at one look.

    Args:
        arm: The values of the arm (n,), float64.
        baseline: The values of the baseline (n,), paired by position.
        alpha: The probability of an error of this row at this look.
        image_variance: The part of the variance of the mean difference that comes from the images, from `image_variance`; None
            if unknown.
    """

    arm: NDArray[np.float64]
    baseline: NDArray[np.float64]
    alpha: float
    image_variance: float | None = None


@dataclass(frozen=True)
class Estimate:
    """The mean difference of an arm from its baseline, in the unit of the values.

    Args:
        n: The number of pairs.
        difference: The mean of arm - baseline, nan without pairs.
        difference_std: The standard deviation (n - 1) of arm - baseline, nan below two pairs.
        low: The lower end of the interval, -inf without one; above `high` if the intervals of the looks do not overlap.
        high: The upper end.
        p: The p-value of no difference, at most ALPHA if and only if the interval of a look excludes 0; nan without an interval.
        new_images: The ends of the interval for other images of the same kind; None if the variance between images is unknown,
            or if the looks contradict each other.
    """

    n: int
    difference: float
    difference_std: float
    low: float
    high: float
    p: float
    new_images: tuple[float, float] | None = None

    @property
    def has_interval(self) -> bool:
        """Whether there is a spread to compute an interval from, and the looks do not contradict each other."""
        return math.isfinite(self.low) and self.low <= self.high


def estimate(looks: Sequence[Look]) -> Estimate:
    """Return the estimate at the last of several looks, each with all pairs of the one before.

    The interval is the intersection of the t intervals of all looks, at 1 - alpha of each. It contains the true difference with
    a probability of at least 1 minus the sum of the alphas (union bound). A look at fewer than two pairs, or at differences that
    do not vary, adds nothing.
    """
    last = looks[-1]
    rounding = ROUNDING * float(np.abs([last.arm, last.baseline]).max(initial=0.0))
    difference, difference_std = _mean_and_std(last.arm - last.baseline, rounding)
    low, high, p = -math.inf, math.inf, math.nan
    new_low, new_high = -math.inf, math.inf
    for look in looks:
        n = len(look.arm)
        middle, spread = _mean_and_std(look.arm - look.baseline, rounding)
        if not spread > 0:
            continue
        error = spread / math.sqrt(n)
        half = float(stats.t.isf(look.alpha / 2, n - 1)) * error
        low, high = max(low, middle - half), min(high, middle + half)
        if look.image_variance is not None:
            wide = math.hypot(half, float(stats.norm.isf(look.alpha / 2)) * math.sqrt(look.image_variance))
            new_low, new_high = max(new_low, middle - wide), min(new_high, middle + wide)
        p = float(np.fmin(p, min(1.0, 2 * stats.t.sf(abs(middle) / error, n - 1) * ALPHA / look.alpha)))
    new_images = (new_low, new_high) if -math.inf < new_low <= new_high else None
    return Estimate(len(last.arm), difference, difference_std, low, high, p, new_images)


def image_variance(differences: NDArray[Any]) -> float:
    """Return the part of the variance of a mean difference in accuracy that comes from the choice of the images.

    Seeds that agree on an image count it once: the mean covariance of two seeds over the images estimates the variance of an
    image's mean over all seeds. The images are taken to be independent. A negative estimate counts as 0.

    Args:
        differences: [the baseline is wrong] - [the arm is wrong] for each seed and image (seeds, images), at least two of each.
    """
    seeds, images = differences.shape
    totals = differences.sum(1, dtype=float)  # (seeds,)
    # Sums over all pairs of different seeds: of the products of their differences on an image, and of their totals.
    products = (differences.sum(0, dtype=float) ** 2).sum() - (differences**2).sum(dtype=float)
    of_totals = totals.sum() ** 2 - (totals**2).sum()
    covariance = (products - of_totals / images) / (images - 1) / (seeds * (seeds - 1))
    return max(0.0, float(covariance / images))


def slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the mean of the least-squares slopes of several curves, and the ends of its t interval at 1 - ALPHA.

    Args:
        x: The positions of the points (points,).
        y: The values of each curve (curves, points), at least two curves.
    """
    slopes = np.polyfit(x, y.T, 1)[0]  # (curves,)
    half = stats.t.isf(ALPHA / 2, len(slopes) - 1) * stats.sem(slopes)
    return float(slopes.mean()), float(slopes.mean() - half), float(slopes.mean() + half)


def welch(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the difference of two means, first less second, and the ends of Welch's t interval at 1 - ALPHA."""
    low, high = stats.ttest_ind(first, second, equal_var=False).confidence_interval(1 - ALPHA)
    return float(first.mean() - second.mean()), float(low), float(high)


def upper_std(std: float, n: int) -> float:
    """Return the upper bound of the true standard deviation of normal values, with a probability of CONFIDENCE.

    Args:
        std: The standard deviation of the sample.
        n: The number of its values, at least 2.
    """
    return std * math.sqrt((n - 1) / stats.chi2.ppf(1 - CONFIDENCE, n - 1))


def pairs_to_detect(difference: float, std: float, alpha: float) -> int | None:
    """Return the smallest number of pairs at which the paired t test detects a difference with probability POWER.

    Args:
        difference: The difference to detect, above 0.
        std: The standard deviation of the differences, in the same unit, above 0.
        alpha: The level of the two-sided test.

    Returns:
        The number, None above MAX_PAIRS.
    """

    def power(n: int) -> float:
        return float(stats.nct.sf(stats.t.isf(alpha / 2, n - 1), n - 1, difference / std * math.sqrt(n)))

    counts = range(2, MAX_PAIRS + 1)
    position = bisect_left(counts, POWER, key=power)
    return counts[position] if position < len(counts) else None


def _mean_and_std(values: NDArray[np.float64], rounding: float) -> tuple[float, float]:
    """Return the mean and the standard deviation (n - 1), each 0 if it does not exceed `rounding`; nan if n is too small."""
    mean = float(values.mean()) if len(values) else math.nan
    std = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return (0.0 if abs(mean) <= rounding else mean), (0.0 if std <= rounding else std)
