"""The histories and mistakes that runs leave, read for the report and summed up over the runs of an arm."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from mnist_exp.tracking.base import OUTCOME, RunRecord, Store

Curve = tuple[list[float], list[float]]  # x and y of each point
Index = Annotated[int, Field(ge=0, lt=2**31)]


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
