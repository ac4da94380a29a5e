"""The runs of a sweep as a pandas data frame."""

from typing import TYPE_CHECKING, Any

from mnist_exp.overrides import key_of, store_uri, text_of
from mnist_exp.tracking.tags import ARM

if TYPE_CHECKING:
    import pandas as pd


def frame(sweep: str = "latest", uri: str | None = None, experiment: str = "mnist_exp") -> "pd.DataFrame":
    """Return the runs of a sweep, one per row.

    Args:
        sweep: The id of a sweep, its first 6 or more digits, or `latest`.
        uri: The address of the MLflow store; None for the one that the commands use.
        experiment: The name of the MLflow experiment.

    Returns:
        The columns `run`, `job`, `status`, `arm` and `data`; one column for each key that the jobs set, such as `seed` or
        `model`, with numbers where all values are; and one for each metric, as recorded. Missing values are NaN.

    Raises:
        UserError: There is no such sweep.
    """
    import pandas as pd

    from mnist_exp.tracking.mlflow_store import MLflowStore

    store = MLflowStore(uri or store_uri(), experiment)
    store.open()
    parent, definition = store.find_sweep(sweep, finished_too=True)
    overrides = {job.number: {key_of(item): text_of(item) for item in job.overrides} for job in definition.jobs}
    rows: list[dict[str, Any]] = [
        {"run": record.run_id, "job": record.job, "status": record.status, "arm": record.tags.get(ARM, ""), "data": record.data}
        | overrides.get(record.job or 0, {})
        | record.metrics
        for record in sorted(store.children(parent.run_id), key=lambda record: record.job or 0)
    ]
    table = pd.DataFrame(rows)
    for key in dict.fromkeys(key for values in overrides.values() for key in values if key in table):
        numbers = pd.to_numeric(table[key], errors="coerce")
        if numbers.notna().equals(table[key].notna()):
            table[key] = numbers
    return table
