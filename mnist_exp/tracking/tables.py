"""Runs as the rows of tables, and the differences between two runs."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from mnist_exp.errors import UserError
from mnist_exp.metrics import best_first, format_metric
from mnist_exp.nodes import did_you_mean, walk
from mnist_exp.overrides import JOB_KEY
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import RunRecord, Store

# Tags of the code and the machine, by the names that `runs diff` shows.
ENVIRONMENT = {"commit": tag.COMMIT, "branch": tag.BRANCH, "uncommitted changes": tag.DIRTY, "digest of the code": "code"}
ENVIRONMENT |= {name: name for name in ("torch", "threads", tag.CPU, tag.GPU)}

Group = list[RunRecord]  # a single run, or a sweep followed by its jobs
Section = dict[str, tuple[str, str]]  # the values of both runs by name; a missing one is empty


def group_by_sweep(records: Iterable[RunRecord]) -> list[Group]:
    """Return the sweeps, each with its jobs by number, and the single runs, in the order of `records`."""
    runs = {record.run_id: record for record in records}
    jobs = defaultdict(list)
    for run in runs.values():
        jobs[run.tags.get(tag.SWEEP)].append(run)
    heads = [run for run in runs.values() if run.tags.get(tag.SWEEP) not in runs]
    return [[head, *sorted(jobs[head.run_id], key=lambda job: job.job or 0)] for head in heads]


def filter_runs(records: Sequence[RunRecord], data: str | None, since: float, last: int | None) -> list[RunRecord]:
    """Return the chosen runs and the sweeps of chosen jobs, in the order of `records`.

    Args:
        records: The runs, the newest first.
        data: The name of a data set; None for all.
        since: Milliseconds since 1970, for runs that started later.
        last: The number of newest runs, without the sweeps of jobs; None for all.

    Raises:
        UserError: No run has the data set.
    """
    names = {record.data for record in records} - {""}
    if data and data not in names:
        raise UserError.invalid("--data", data, f"one of {', '.join(sorted(names))}{did_you_mean(data, names)}")
    sweeps = {record.tags.get(tag.SWEEP) for record in records}
    runs = [run for run in records if run.run_id not in sweeps and data in (None, run.data) and run.started >= since]
    ids = {id_ for run in runs[:last] for id_ in (run.run_id, run.tags.get(tag.SWEEP))}
    return [record for record in records if record.run_id in ids]


def run_tree(
    records: Iterable[RunRecord], chosen: Iterable[RunRecord], metrics: Sequence[str], *, with_jobs: bool
) -> list[dict[str, str]]:
    """Return the rows of a table: the newest run last, and jobs below their sweep.

    Args:
        records: All runs, the newest first.
        chosen: The runs of the table.
        metrics: The metrics of the columns.
        with_jobs: Whether the table has the jobs of sweeps.
    """
    ids = {record.run_id for record in chosen}
    rows = []
    for group in reversed(group_by_sweep(records)):
        named = [(group_name(group), group[0]), *((f"  {job.name}", job) for job in group[1:] if with_jobs)]
        rows += [run_row(name, run, metrics) for name, run in named if run.run_id in ids]
    return rows


def group_name(group: Group) -> str:
    """Return the name of a single run, or that of a sweep with the number of its finished jobs."""
    total = group[0].tags.get(tag.SWEEP_JOBS)
    finished = {job.job for job in group[1:] if job.status == "FINISHED"} - {None}
    return f"{group[0].name} ({len(finished)} of {total} jobs)" if total else group[0].name


def ranking(records: Sequence[RunRecord], metric: str, metrics: Sequence[str]) -> list[dict[str, str]]:
    """Return the runs that have a metric as the rows of a table, the best first.

    Args:
        records: The runs.
        metric: The metric.
        metrics: The metrics of the columns, after that one.
    """
    known = {name for record in records for name in record.metrics}
    if metric not in known:
        raise UserError.invalid("--sort", metric, f"one of {', '.join(sorted(known))}{did_you_mean(metric, known)}")
    found = best_first(metric, (record for record in records if metric in record.metrics), lambda record: record.metrics[metric])
    return [run_row(record.name, record, (metric, *(other for other in metrics if other != metric))) for record in found]


def run_row(name: str, record: RunRecord, metrics: Sequence[str]) -> dict[str, str]:
    """Return a run as the row of a table.

    Args:
        name: The displayed name.
        record: The run.
        metrics: The metrics of the columns.
    """
    shown = {key: format_metric(key, record.metrics[key]) if key in record.metrics else "" for key in metrics}
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.started / 1000))
    return {"run": record.run_id, "name": name, "status": record.status, "started": started, **shown}


def run_details(record: RunRecord) -> dict[str, str]:
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


def run_differences(store: Store, first: RunRecord, second: RunRecord) -> dict[str, Section]:
    """Return only the values in which two runs of a store differ, by section; a section without differences is empty.

    Raises:
        UserError: A run is a sweep, or has no readable recipe.
    """
    before, after = (_comparable(store, record) for record in (first, second))
    return {section: _differing(before[section], after[section]) for section in before}


def _comparable(store: Store, record: RunRecord) -> dict[str, dict[str, str]]:
    settings = store.recipe(record).settings
    config, apart = walk(settings.model_dump(mode="json", exclude={JOB_KEY})), settings.neutral_arguments()
    return {
        "configuration": {key: str(value) for key, value in config if not (isinstance(value, dict | list) or key in apart)},
        "environment": {name: record.tags.get(key, "") for name, key in ENVIRONMENT.items()},
        "data": {"name": record.data} | {f"digest of {split}": digest for split, digest in record.digests.items()},
        "metrics": {name: format_metric(name, value) for name, value in sorted(record.metrics.items())},
    }


def _differing(first: Mapping[str, str], second: Mapping[str, str]) -> Section:
    keys = dict.fromkeys([*first, *second])
    return {key: (first.get(key, ""), second.get(key, "")) for key in keys if first.get(key) != second.get(key)}
