"""Simulate comparisons: how often their intervals and verdicts are wrong, and how often they find a difference.

    python scripts/simulations.py [--draws 4000] [--seed 0]

The script prints a sentence and a table for each question of docs/statistics.md. Each share is that of simulated studies, with
its standard error in parentheses; intervals and verdicts come from mnist_exp.comparison. It takes 5 minutes on one core.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mnist_exp.comparison.pairs import Row, compare
from mnist_exp.comparison.statistics import (
    Look,
    error_of_look,
    estimate,
    image_variance,
    pairs_to_detect,
    upper_std,
)

Floats = NDArray[np.float64]

MARGIN = 0.05  # points, and the standard deviation of the differences
IMAGES = 10_000  # of a test set, of which HARD are sometimes misread
HARD = 400
OWN_IMAGES = 905  # gives differences of accuracies a standard deviation of 5 images, 0.05 points


def normal(random: np.random.Generator, n: int) -> Floats:
    """Draw n differences from a normal distribution."""
    return random.normal(size=n) * MARGIN


def skewed(random: np.random.Generator, n: int) -> Floats:
    """Draw n differences from an exponential distribution, less its mean."""
    return (random.exponential(size=n) - 1) * MARGIN


def discrete(random: np.random.Generator, n: int) -> Floats:
    """Draw n differences of two accuracies on 10,000 images.

    Each accuracy is Binomial(10000, 0.986) / 10000. A pair shares the outcomes of all but OWN_IMAGES images, which cancel.
    """
    arm, baseline = (random.binomial(OWN_IMAGES, 0.986, n) for _ in range(2))
    return (arm - baseline) / 100


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "normal": normal,
    "skewed: exponential": skewed,
    "discrete: accuracies on 10,000 images": discrete,
}


def row_of(differences: Floats, counts: Sequence[int] = (), first: int = 1, rows: Iterable[int] = ()) -> Row:
    """Return the row of an arm, whose metric is displayed as recorded.

    Args:
        differences: The differences from the baseline.
        counts: The number of pairs at each look; empty for one look at all pairs.
        first: The number of the arm's first look.
        rows: The number of rows of the table at each look; empty for one.
    """
    looks = counts or (len(differences),)
    numbers = list(rows) or [1] * len(looks)
    history = [
        Look(differences[:n], np.zeros(n), error_of_look(look) / number)
        for look, (n, number) in enumerate(zip(looks, numbers, strict=True), start=first)
    ]
    return Row("arm", "baseline", "", len(differences), True, estimate(history), "other", MARGIN)


def is_false(row: Row, truth: float) -> bool:
    """Return whether a verdict is wrong."""
    wrong = {
        "higher": truth <= (MARGIN if row.exceeds_margin else 0),
        "lower": truth >= (-MARGIN if row.exceeds_margin else 0),
        "equivalent": abs(truth) >= MARGIN,
    }
    return wrong.get(row.verdict, False)


def share(hits: Sequence[bool]) -> str:
    """Return the share of hits with its standard error."""
    rate = float(np.mean(hits))
    return f"{rate:.1%} ({math.sqrt(rate * (1 - rate) / len(hits)):.1%})".replace("%", " %")


def show(sentence: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a sentence and a Markdown table."""
    print(f"\n{sentence}\n")
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |")


def show_coverage(random: np.random.Generator, draws: int) -> None:
    counts = (3, 5, 10, 30, 100)
    lines = []
    for name, draw in DISTRIBUTIONS.items():
        ends = {n: [row_of(draw(random, n)).ends for _ in range(draws)] for n in counts}
        lines.append([name, *(share([low <= 0 <= high for low, high in found]) for found in ends.values())])
    sentence = "At the first look, the interval contains the true difference in 96 % of studies with normal differences."
    show(sentence, ["differences", *(f"n = {n}" for n in counts)], lines)


def show_false_verdicts(random: np.random.Generator, draws: int) -> None:
    questions = {"higher or lower": 0.0, "equivalent": MARGIN, "by more than the margin": MARGIN}
    lines = []
    for name, draw in DISTRIBUTIONS.items():
        line = [name]
        for verdict, truth in questions.items():
            rows = [row_of(draw(random, 20) + truth) for _ in range(draws)]
            hits = {
                "higher or lower": [row.verdict in ("higher", "lower") for row in rows],
                "equivalent": [row.verdict == "equivalent" for row in rows],
                "by more than the margin": [row.exceeds_margin for row in rows],
            }
            line.append(share(hits[verdict]))
        lines.append(line)
    sentence = (
        "With 20 seeds and normal differences, each kind of false verdict is rarer than one in twenty: higher or lower although "
        "the arms are equal, equivalent or more than the margin although the difference is the margin."
    )
    show(sentence, ["differences", *questions], lines)


def show_family(random: np.random.Generator, draws: int) -> None:
    lines = []
    for arms in (1, 3, 6):
        found = []
        for _ in range(draws):
            baseline, *values = random.normal(size=(arms + 1, 20)) * MARGIN / math.sqrt(2)
            found.append(any(is_false(row_of(arm - baseline, rows=[arms]), 0.0) for arm in values))
        lines.append([str(arms), share(found)])
    sentence = "All rows of a table together give a false verdict in at most 5 % of studies: 20 seeds, all arms equal."
    show(sentence, ["arms against one baseline", "any false verdict"], lines)


def show_looks(random: np.random.Generator, draws: int) -> None:
    plans = {"5": (5,), "5, 20": (5, 20), "5, 10, 20, 40": (5, 10, 20, 40), "every 5 up to 100": tuple(range(5, 101, 5))}
    lines = []
    for name, counts in plans.items():
        line = [name]
        for draw in DISTRIBUTIONS.values():
            line.append(share([is_false(row_of(draw(random, counts[-1]), counts), 0.0) for _ in range(draws)]))
        lines.append(line)
    sentence = "However often one looks, at most 5 % of studies with normal differences ever give a false verdict."
    show(sentence, ["looks at", *DISTRIBUTIONS], lines)
    studies = [random.normal(MARGIN / 2, MARGIN, 40) for _ in range(draws)]
    power = [
        share([row_of(values[: counts[-1]], counts).verdict == "higher" for values in studies]) for counts in ((20,), (20, 40))
    ]
    show(
        "A difference of half a standard deviation is found in this share of studies that look at 20 and at 40 seeds.",
        ["at 20", "at 20 or 40"],
        [power],
    )


def show_added_arms(random: np.random.Generator, draws: int) -> None:
    lines = []
    for arms in (3, 6, 10):
        found = []
        for _ in range(draws):
            baseline, *values = random.normal(size=(arms + 1, 10)) * MARGIN / math.sqrt(2)
            rows = (
                row_of(arm - baseline, [10] * (arms + 1 - first), first, range(first, arms + 1))
                for first, arm in enumerate(values, start=1)
            )
            found.append(any(is_false(row, 0.0) for row in rows))
        lines.append([str(arms), share(found)])
    sentence = "Arms that are added one by one, with a look after each, together give a false verdict in at most 5 % of studies."
    show(sentence, ["arms", "any false verdict"], lines)


def show_failures(random: np.random.Generator, draws: int) -> None:
    lines = []
    for failed in (1, 3, 5):
        alone, compared = [], []
        for _ in range(draws // 8):
            differences = np.sort(normal(random, 10))
            alone.append(row_of(differences[failed:]))
            runs = pd.DataFrame(
                {"arm": ["a"] * 10 + ["b"] * 10, "seed": list(range(10)) * 2, "test/x": [*np.zeros(10), *differences]}
            )
            status = ["FINISHED"] * 10 + ["DIVERGED"] * failed + ["FINISHED"] * (10 - failed)
            compared += compare(runs.assign(status=status, look=1, processor="", run=""), "arm").rows
        lines.append([f"{failed} of 10", *(share([row.verdict == "higher" for row in rows]) for rows in (alone, compared))])
    sentence = (
        "If the worst runs of an arm diverge, the others look better although the arms are equal. `compare` gives no verdict."
    )
    show(sentence, ["diverged", "higher, by the others alone", "higher, by compare"], lines)


def show_bound(random: np.random.Generator, draws: int) -> None:
    alpha = error_of_look(2)
    needed = pairs_to_detect(MARGIN / 2, MARGIN, alpha) or 0
    lines = []
    for n in (5, 10, 20):
        stds = [float(normal(random, n).std(ddof=1)) for _ in range(draws // 4)]
        numbers = [
            [pairs_to_detect(MARGIN / 2, spread, alpha) or math.inf for spread in (std, upper_std(std, n))] for std in stds
        ]
        found, bounds = zip(*numbers, strict=True)
        low, high = np.quantile(found, [0.1, 0.9], method="nearest")
        suffices = [share([number >= needed for number in column]) for column in (found, bounds)]
        lines.append([str(n), f"{low:.0f} to {high:.0f}", *suffices])
    sentence = (
        f"To detect half a standard deviation at the second look takes {needed} seeds. The number from a pilot suffices in half "
        "of the studies or fewer, its upper bound in 80 %."
    )
    show(sentence, ["pilot", "number, 80 % of pilots", "number suffices", "upper bound suffices"], lines)


def show_new_images(random: np.random.Generator, draws: int) -> None:
    counts = (3, 5, 10, 30)
    lines = []
    for own in (0.0, 0.3, 1.0):
        alone: list[list[bool]] = []
        both: list[list[bool]] = []
        for n in counts:
            ends, parts = [], []
            for _ in range(draws):
                # The logit of a mistake: an image's difficulty, an arm's own part of it, the quality of a run.
                arms = random.normal(-3, 2, HARD) + own * random.normal(size=(2, 1, HARD))
                wrong = random.random((2, n, HARD)) < 1 / (1 + np.exp(-arms - random.normal(0, 0.1, (2, n, 1))))
                differences = np.zeros((n, IMAGES))
                differences[:, :HARD] = wrong[0].astype(int) - wrong[1]
                values = differences.mean(1)
                variance = image_variance(differences)
                parts.append((variance, values.var(ddof=1) / n))
                found = estimate([Look(values, np.zeros(n), error_of_look(1), variance)])
                ends.append(((found.low, found.high), found.new_images or (-math.inf, math.inf)))
            alone.append([low <= 0 <= high for (low, high), _ in ends])
            both.append([low <= 0 <= high for _, (low, high) in ends])
        of_images, of_seeds = np.mean(parts, axis=0)
        part = f"{of_images / (of_images + of_seeds):.0%}".replace("%", " %")
        lines += [[part, "seeds", *map(share, alone)], [part, "seeds and images", *map(share, both)]]
    sentence = (
        "For new images, intervals from the seeds alone are too narrow if the arms differ on single images, the more so the more "
        "seeds there are. With the variance between images, they contain the true difference in 96 % of studies or more. The "
        "first column is the part of the images in the variance of the mean difference at 30 seeds."
    )
    show(sentence, ["of the images", "interval from", *(f"n = {n}" for n in counts)], lines)


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random = np.random.default_rng(arguments.seed)
    parts = (
        show_coverage,
        show_false_verdicts,
        show_family,
        show_looks,
        show_added_arms,
        show_failures,
        show_bound,
        show_new_images,
    )
    for part in parts:
        part(random, arguments.draws)


if __name__ == "__main__":
    main()
