"""The curve of a report shows the numbers of its tables."""

import pandas as pd
import pytest
from synthetic import SEEDS, grid, table

from mnist_exp.comparison import figures
from mnist_exp.comparison.pairs import compare

JOBS = grid(batch_size=["64", "128", "256"], seed=SEEDS)


def heights(runs: pd.DataFrame) -> tuple[str, list[float]]:
    """The label of the axis, and the heights of the curve."""
    (axes,) = figures.curve(compare(runs, "batch_size")).axes
    return axes.get_ylabel(), list(axes.lines[0].get_ydata())


def test_a_curve_of_accuracies_shows_error_rates() -> None:
    runs = table(JOBS, lambda job: 0.99 - int(job["batch_size"]) / 10_000 + int(job["seed"]) / 1000 - 0.002)
    assert heights(runs) == ("test error rate (%)", pytest.approx([1.64, 2.28, 3.56]))
    runs.loc[runs["batch_size"] == "64", "test/accuracy"] = 1.0
    assert heights(runs) == ("test/accuracy (%)", pytest.approx([100, 97.72, 96.44])), "an error rate of 0 has no logarithm"


def test_a_curve_of_another_metric_shows_its_values() -> None:
    runs = table(JOBS, lambda job: int(job["batch_size"]) / 1000 + int(job["seed"]) / 1000, metric="test/loss")
    assert heights(runs) == ("test/loss", pytest.approx([0.066, 0.13, 0.258]))
