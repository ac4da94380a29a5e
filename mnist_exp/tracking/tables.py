"""The rows of tables of runs."""

import time
from collections.abc import Sequence

from mnist_exp.config import did_you_mean
from mnist_exp.errors import UserError
from mnist_exp.metrics import format_metric, metric_of
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import RunRecord

METRICS = ("val/accuracy", "test/accuracy")


def choose(records: Sequence[RunRecord], data: str | None, last: int | None) -> list[RunRecord]:
    """Return the chosen runs and the sweeps of chosen jobs, in the order of `records`.

    Args:
        records: The runs, the newest first.
        data: The name of a data set; None for all.
        last: The number of newest runs, without sweeps; None for all.

    Raises:
        UserError: No run has the data set.
    """
    names = {record.data for record in records} - {""}
    if data and data not in names:
        hint = did_you_mean(data, names)
        raise UserError(f"--data {data} is invalid{hint}: expected one of {', '.join(sorted(names))}.")
    runs = [record for record in records if tag.SWEEP_JOBS not in record.tags and data in (None, record.data)][:last]
    ids = {record.run_id for record in runs} | {record.tags.get(tag.SWEEP) for record in runs}
    return [record for record in records if record.run_id in ids]


def tree(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """Return runs, the newest first, as the rows of a table: the newest last, and jobs below their sweep."""
    children = [record for record in records if tag.SWEEP in record.tags]
    rows = []
    for record in reversed(records):
        if tag.SWEEP in record.tags:
            continue
        rows.append(row(record.name, record))
        jobs = [child for child in children if child.tags[tag.SWEEP] == record.run_id]
        rows += [row(f"  {child.name}", child) for child in sorted(jobs, key=lambda child: child.job or 0)]
    return rows


def ranking(records: Sequence[RunRecord], metric: str) -> list[dict[str, str]]:
    """Return the runs that have a metric as the rows of a table, the best first; the highest, if the metric has no direction."""
    known = {name for record in records for name in record.metrics}
    if metric not in known:
        hint = did_you_mean(metric, known)
        raise UserError(f"--sort {metric} is invalid{hint}: expected one of {', '.join(sorted(known))}.")
    found = [record for record in records if metric in record.metrics]
    found.sort(key=lambda record: record.metrics[metric], reverse=metric_of(metric).higher_is_better is not False)
    return [row(record.name, record, (metric, *(other for other in METRICS if other != metric))) for record in found]


def row(name: str, record: RunRecord, metrics: Sequence[str] = METRICS) -> dict[str, str]:
    """Return a run as the row of a table.

    Args:
        name: The displayed name.
        record: The run.
        metrics: The metrics of the columns.
    """
    shown = {key: format_metric(key, record.metrics[key]) if key in record.metrics else "" for key in metrics}
    return {"run": record.run_id, "name": name, "status": record.status, **shown}


def overview(record: RunRecord) -> dict[str, str]:
    """Return the origin and the status of a run by name, without empty values."""
    values = {
        "run": record.run_id,
        "name": record.name,
        "status": record.status,
        "error": record.tags.get(tag.ERROR, ""),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.started / 1000)),
        "sweep": record.tags.get(tag.SWEEP, ""),
        "data": record.data,
        "commit": record.commit + (" and uncommitted changes" if record.tags.get(tag.DIRTY) == "true" else ""),
    }
    return {name: text for name, text in values.items() if text}
