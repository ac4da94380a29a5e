"""Which images each run misread: the columns `size` and `mistakes` of a table of runs."""

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mnist_exp.comparison.history import History
from mnist_exp.errors import UserError
from mnist_exp.tracking.frame import DIGEST

SIZE, MISTAKES = "size", "mistakes"  # the number of images that scored a run, the indices of those that it misread
NUMBER = re.compile(r"\d{1,9}")
MAX_CELLS = 200_000_000  # runs x images
REMEDY = "Compare runs of this version on one data set, or omit --images."


def add_mistakes(runs: pd.DataFrame, histories: Mapping[str, History | None]) -> pd.DataFrame:
    """Return a table of runs with the columns SIZE and MISTAKES, as text, empty for runs that have not recorded them.

    Args:
        runs: The table, from `tracking.frame.frame`.
        histories: Those of the runs, by id.
    """
    found = [histories.get(run) for run in runs["run"]]
    sizes = [str(history.size) if history and history.size else "" for history in found]
    mistakes = [" ".join(str(index) for index, _, _ in history.mistakes) if history else "" for history in found]
    return runs.assign(**{SIZE: sizes, MISTAKES: mistakes})


def image_columns(runs: pd.DataFrame) -> list[str]:
    """Return the columns of a table that `add_mistakes` adds, none without them: `size` alone is a key like any other."""
    return [SIZE, MISTAKES] if {SIZE, MISTAKES} <= {*runs} else []


def wrong_images(runs: pd.DataFrame, accuracies: "pd.Series[float]", metric: str) -> NDArray[np.int16]:
    """Return which images each run misread: 0 or 1, (runs, images).

    Args:
        runs: The table.
        accuracies: Those of the runs, NaN for a run that does not count.
        metric: Their name.

    Raises:
        UserError: The metric is no accuracy, the images are not the same, or the columns contradict the accuracies.
    """
    split, _, name = metric.rpartition("/")
    if name != "accuracy":
        raise UserError.invalid("--metric", metric, "an accuracy with --images, such as test/accuracy")
    if not image_columns(runs):
        raise UserError(f"--images needs the columns {SIZE} and {MISTAKES}.", key="--images", remedy=REMEDY)
    counted = runs[accuracies.notna()]
    digests = counted.get(DIGEST + {"val": "validation"}.get(split, split), pd.Series(dtype=str))
    sizes = counted[SIZE].unique()
    if len(sizes) > 1 or digests[digests != ""].nunique() > 1 or not all(NUMBER.fullmatch(size) for size in sizes):
        problem = "--images needs runs that have recorded their mistakes on the same images."
        raise UserError(problem, key="--images", remedy=REMEDY)
    images = int(sizes[0]) if len(sizes) else 0
    if len(runs) * images > MAX_CELLS:
        raise UserError(f"--images takes at most {MAX_CELLS:,} images of all runs: {len(runs):,} x {images:,}.", key="--images")
    wrong = np.zeros((len(runs), images), dtype=np.int16)
    for row, (name, text, accuracy) in enumerate(zip(runs["run"], runs[MISTAKES], accuracies, strict=True)):
        if np.isnan(accuracy):
            continue
        mistakes = {int(index) for index in text.split() if NUMBER.fullmatch(index) and int(index) < images}
        if abs(images - len(mistakes) - accuracy * images) > 0.5:
            raise UserError(
                f"--images: {len(mistakes)} mistakes in {images} images do not give the {metric} of run {name or row + 1}, "
                f"{accuracy:.6g}.",
                key="--images",
                remedy="Compare the accuracy on the images that scored the runs, unrounded.",
            )
        wrong[row, list(mistakes)] = 1
    return wrong
