"""The histories and mistakes that runs leave: for the report, summed up over the runs of an arm, and by image.

A table of runs has them by image in the columns `size` and `mistakes`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from mnist_exp.errors import UserError
from mnist_exp.tracking.base import OUTCOME, RunRecord, Store
from mnist_exp.tracking.frame import DIGEST

Curve = tuple[list[float], list[float]]  # x and y of each point
Index = Annotated[int, Field(ge=0, lt=2**31)]
SIZE, MISTAKES = "size", "mistakes"  # the number of images that scored a run, the indices of those that it misread
NUMBER = re.compile(r"\d{1,9}")
MAX_CELLS = 200_000_000  # runs x images
REMEDY = "Compare runs of this version on one data set, or omit --images."


@dataclass(frozen=True)
class History:
    """The content of a run's outcome.json.

    Args:
        history: (examples seen, metrics) of each report of training.
        mistakes: (index of the image, label, prediction) of each mistake.
        split: The name of the split that the mistakes were made on.
        size: The number of its images; 0 if the run did not record it.
    """

    history: list[tuple[int, dict[str, float]]]
    mistakes: list[tuple[Index, Index, Index]]
    split: str
    size: Index = 0

    def curve(self, metric: str) -> Curve:
        """Return the points of a metric against the examples seen."""
        points = [(float(seen), metrics[metric]) for seen, metrics in self.history if metric in metrics]
        return [x for x, _ in points], [y for _, y in points]


Histories = Mapping[str, list[History]]  # by arm


def read_histories(store: Store, records: Mapping[str, RunRecord]) -> dict[str, History | None]:
    """Return the history of each run, None without a readable one; both by id."""
    contents = store.read_artifacts(list(records.values()), OUTCOME)
    return {run_id: parse_history(contents.get(run_id, b"")) for run_id in records}


def parse_history(content: bytes) -> History | None:
    """Return the history in the content of a file, None if it is not one."""
    try:
        return TypeAdapter(History).validate_json(content)
    except ValidationError:
        return None


def mean_confusions(runs: Iterable[History]) -> dict[tuple[int, int], float]:
    """Return how often an average run reads a label as a prediction, by (label, prediction)."""
    runs = list(runs)
    counts = Counter((label, prediction) for run in runs for _, label, prediction in run.mistakes)
    return {pair: count / len(runs) for pair, count in counts.items()}


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
