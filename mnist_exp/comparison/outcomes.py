"""The outcome.json that each run leaves: its history and its mistakes, checked and summed up over the runs of an arm."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from mnist_exp.comparison.arms import Arms
from mnist_exp.tracking.base import RunRecord

Curve = tuple[list[float], list[float]]  # x and y of each point
MOST_DISAGREED = 12  # images
Index = Annotated[int, Field(ge=0, lt=2**31)]


@dataclass(frozen=True)
class Outcome:
    """The content of a run's outcome.json.

    Args:
        history: (examples seen, metrics) of each report of training.
        mistakes: (index of the image, label, prediction) of each mistake.
        split: The name of the split that the mistakes were made on.
    """

    history: list[tuple[int, dict[str, float]]]
    mistakes: list[tuple[Index, Index, Index]]
    split: str


Outcomes = Mapping[str, Outcome | None]  # by run id, None without a readable outcome.json


def parse_outcome(content: bytes) -> Outcome | None:
    """Return the outcome in the content of a file, None if it is not one."""
    try:
        return TypeAdapter(Outcome).validate_json(content)
    except ValidationError:
        return None


def curve(outcome: Outcome | None, metric: str) -> Curve:
    """Return the points of a metric against the examples seen: none without an outcome."""
    points = [(float(seen), metrics[metric]) for seen, metrics in (outcome.history if outcome else []) if metric in metrics]
    return [x for x, _ in points], [y for _, y in points]


def mean_mistakes(records: Iterable[RunRecord], outcomes: Outcomes) -> NDArray[np.float64] | None:
    """Return the mean number of mistakes of a run by label and prediction (classes, classes), None if no run has an outcome."""
    readable = _readable(records, outcomes)
    if not readable:
        return None
    mistakes = [mistake for outcome in outcomes.values() if outcome for mistake in outcome.mistakes]
    classes = 1 + max((max(label, prediction) for _, label, prediction in mistakes), default=0)  # the same for every arm
    matrix = np.zeros((classes, classes))
    for outcome in readable:
        for _, label, prediction in outcome.mistakes:
            matrix[label, prediction] += 1 / len(readable)
    return matrix


def disagreements(arms: Arms, outcomes: Outcomes) -> list[dict[str, Any]]:
    """Return the images that an arm and the baseline disagree on most.

    Each has the index of the image, its label, the arm, `share` (of the arm's runs that misclassify it) and `baseline_share`.
    """
    readable = {arm: _readable(runs.values(), outcomes) for arm, runs in arms.runs.items()}
    if any(outcome.split not in ("test", "validation") for runs in readable.values() for outcome in runs):
        return []  # the images of other splits depend on the seed
    labels = {index: label for runs in readable.values() for outcome in runs for index, label, _ in outcome.mistakes}
    errors = {arm: Counter(index for run in runs for index, _, _ in run.mistakes) for arm, runs in readable.items()}
    found: list[dict[str, Any]] = []
    for arm in (arm for arm in arms.others if readable[arm] and readable[arms.baseline]):
        for index, label in labels.items():
            share, baseline_share = (errors[name][index] / len(readable[name]) for name in (arm, arms.baseline))
            if share != baseline_share:
                found.append({"arm": arm, "index": index, "label": label, "share": share, "baseline_share": baseline_share})
    return sorted(found, key=lambda item: (-abs(item["share"] - item["baseline_share"]), item["index"]))[:MOST_DISAGREED]


def _readable(records: Iterable[RunRecord], outcomes: Outcomes) -> list[Outcome]:
    return [outcome for record in records if (outcome := outcomes.get(record.run_id)) is not None]
