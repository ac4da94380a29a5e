"""Simulate the intervals of a comparison: their coverage, their errors under repeated looks, and the price of avoiding these.

    python scripts/simulations.py [--draws 20000] [--seed 0]

The script prints the tables of docs/statistics.md, with standard errors in parentheses. A draw is one study: the paired
differences of an arm and its baseline. All limits are those of mnist_exp.comparison.statistics.
"""

import argparse
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mnist_exp.comparison.statistics import critical_t, pairs_needed

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

PAIRS = 200
COUNTS = np.arange(2, PAIRS + 1)  # the numbers of pairs at which one looks
OWN_IMAGES = 905  # gives differences a standard deviation of 5 images, 0.05 points


def normal(random: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Draw from a normal distribution."""
    return random.normal(size=shape)


def skewed(random: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Draw from an exponential distribution, less its mean."""
    return random.exponential(size=shape) - 1


def discrete(random: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Draw differences of two accuracies, in images.

    Each accuracy is Binomial(10000, 0.986) / 10000. A pair shares the outcomes of all but OWN_IMAGES images, which cancel.
    """
    arm, baseline = (random.binomial(OWN_IMAGES, 0.986, shape) for _ in range(2))
    return (arm - baseline).astype(np.float64)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Floats]] = {
    "normal": normal,
    "skewed: exponential": skewed,
    "discrete: accuracies on 10,000 images": discrete,
}


def running_t(differences: Floats) -> Floats:
    """Return |t| (draws, n - 1) after 2, 3, ... n pairs: without spread infinite, or 0 if all differences are 0."""
    sums, squares = (np.cumsum(differences**power, axis=1)[:, 1:] for power in (1, 2))
    counts = np.arange(2, differences.shape[1] + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(sums) / np.sqrt(np.maximum(counts * squares - sums**2, 0) / (counts - 1))
    return np.where(np.isnan(t), 0.0, t)


def limits(*, anytime: bool) -> Floats:
    """Return the limit of |t| at each number of pairs."""
    return np.array([critical_t(int(n), anytime=anytime) for n in COUNTS])


def errs(t: Floats, first: int, last: int, *, anytime: bool) -> Bools:
    """Return for each draw whether its interval excludes 0 at any number of pairs from `first` to `last`."""
    looks = slice(first - COUNTS[0], last - COUNTS[0] + 1)
    excludes: Bools = t[:, looks] > limits(anytime=anytime)[looks]
    return np.asarray(excludes.any(axis=1))


def share(hits: Bools) -> str:
    """Return the share of hits with its standard error."""
    rate = float(hits.mean())
    return f"{rate:.1%} ({math.sqrt(rate * (1 - rate) / len(hits)):.1%})".replace("%", " %")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |")


def print_coverage(random: np.random.Generator, draws: int) -> None:
    """Print how often the fixed interval contains the true difference."""
    counts = (3, 5, 10, 30, 100)
    rows = []
    for name, draw in DISTRIBUTIONS.items():
        t = {n: running_t(draw(random, (draws, n)))[:, -1] for n in counts}
        rows.append([name, *(share(t[n] <= critical_t(n)) for n in counts)])
    print_table("Coverage of the fixed interval", ["differences", *(f"n = {n}" for n in counts)], rows)


def print_errors(random: np.random.Generator, draws: int) -> None:
    """Print how often a study without a difference gets a verdict, if one looks at every pair or mixes both intervals."""
    looking, mixed = [], []
    for name, draw in DISTRIBUTIONS.items():
        t = running_t(draw(random, (draws, PAIRS)))
        t[np.isinf(t)] = 0  # without spread the verdict is undecided
        looking.append([name, *(share(errs(t, 2, PAIRS, anytime=anytime)) for anytime in (False, True))])
        five, twenty = (errs(t, n, n, anytime=False) for n in (5, 20))
        before, after = errs(t, 2, 19, anytime=True), errs(t, 6, PAIRS, anytime=True)
        mixed.append([name, *(share(hits) for hits in (five, five | after, before | twenty, five | twenty))])
    print_table(f"False verdicts, a look after every pair from 2 to {PAIRS}", ["differences", "fixed", "anytime"], looking)
    looks = ["fixed at 5", f"fixed at 5, anytime at 6 to {PAIRS}", "anytime at 2 to 19, fixed at 20", "fixed at 5 and at 20"]
    print_table("False verdicts, several intervals in one study", ["differences", *looks], mixed)


def print_price(random: np.random.Generator, draws: int) -> None:
    """Print how much wider the anytime interval is, and how many pairs it takes to exclude 0."""
    counts = (5, 10, 20, 30, 60, 100)
    rows = []
    for arms in (1, 3):
        ratios = [critical_t(n, arms, anytime=True) / critical_t(n, arms) for n in counts]
        rows.append([str(arms), *(f"{ratio:.2f}" if math.isfinite(ratio) else "infinite" for ratio in ratios)])
    print_table("Width of the anytime interval, relative to the fixed one", ["arms", *(f"n = {n}" for n in counts)], rows)
    rows = []
    for effect in (1.0, 0.5):
        found = running_t(normal(random, (draws, PAIRS)) + effect) > limits(anytime=True)
        first = np.where(found.any(1), found.argmax(1) + COUNTS[0], PAIRS + 1)
        median, late = (str(int(n)) for n in np.quantile(first, [0.5, 0.8], method="inverted_cdf"))
        rows.append([f"{effect:g}", str(pairs_needed(effect, 1)), median, late])
    header = ["difference, standard deviations", "fixed: pairs for 80 %", "anytime: pairs for 50 %", "anytime: pairs for 80 %"]
    print_table("Pairs until the interval excludes 0, normal differences", header, rows)


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random = np.random.default_rng(arguments.seed)
    for part in (print_coverage, print_errors, print_price):
        part(random, arguments.draws)


if __name__ == "__main__":
    main()
