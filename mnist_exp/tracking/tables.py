"""Runs as the rows of tables, and the differences between two runs."""

import re
import time
from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from mnist_exp.errors import UserError
from mnist_exp.metrics import OBJECTIVE, format_metric, metric_of
from mnist_exp.settings import did_you_mean, walk
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import RunRecord, StoredRun
from mnist_exp.tracking.mlflow_store import MLflowStore, download
from mnist_exp.tracking.provenance import ORIGIN, PATCH, Origin

METRICS = (OBJECTIVE, "test/accuracy")
CODE = {tag.COMMIT: "commit", tag.BRANCH: "branch", tag.DIRTY: "uncommitted changes", "code": "digest of the code"}

Section = dict[str, tuple[str, str]]  # the values of both runs by name; a missing one is empty


def filter_runs(records: Sequence[RunRecord], data: str | None, last: int | None) -> list[RunRecord]:
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


def run_tree(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """Return runs, the newest first, as the rows of a table: the newest last, and jobs below their sweep."""
    children = [record for record in records if tag.SWEEP in record.tags]
    rows = []
    for record in reversed(records):
        if tag.SWEEP in record.tags:
            continue
        rows.append(run_row(record.name, record))
        jobs = [child for child in children if child.tags[tag.SWEEP] == record.run_id]
        rows += [run_row(f"  {child.name}", child) for child in sorted(jobs, key=lambda child: child.job or 0)]
    return rows


def ranking(records: Sequence[RunRecord], metric: str) -> list[dict[str, str]]:
    """Return the runs that have a metric as the rows of a table, the best first; the highest, if the metric has no direction."""
    known = {name for record in records for name in record.metrics}
    if metric not in known:
        hint = did_you_mean(metric, known)
        raise UserError(f"--sort {metric} is invalid{hint}: expected one of {', '.join(sorted(known))}.")
    found = [record for record in records if metric in record.metrics]
    found.sort(key=lambda record: record.metrics[metric], reverse=metric_of(metric).higher_is_better is not False)
    return [run_row(record.name, record, (metric, *(other for other in METRICS if other != metric))) for record in found]


def run_row(name: str, record: RunRecord, metrics: Sequence[str] = METRICS) -> dict[str, str]:
    """Return a run as the row of a table.

    Args:
        name: The displayed name.
        record: The run.
        metrics: The metrics of the columns.
    """
    shown = {key: format_metric(key, record.metrics[key]) if key in record.metrics else "" for key in metrics}
    return {"run": record.run_id, "name": name, "status": record.status, **shown}


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


def run_differences(store: MLflowStore, first_id: str, second_id: str) -> dict[str, Section]:
    """Return only the values in which two runs differ, by section; a section without differences is empty.

    Args:
        store: The store of both runs.
        first_id: The id of a run.
        second_id: The id of another run.

    Raises:
        UserError: A run does not exist, is a sweep, or has no readable recipe.
    """
    runs = [store.read(run_id) for run_id in (first_id, second_id)]
    first, second = (_comparable(store, run) for run in runs)
    return {section: _differing(first[section], second[section]) for section in first}


def _comparable(store: MLflowStore, run: StoredRun) -> dict[str, dict[str, str]]:
    record, tags = run.record, run.record.tags
    origin = _origin(store, run)
    config = walk(run.recipe.settings.model_dump(mode="json"))
    return {
        "configuration": {key: str(value) for key, value in config if not isinstance(value, dict | list)},
        "code": {name: tags[key] for key, name in CODE.items() if key in tags} | _changed_files(_text(store, run, PATCH)),
        "packages": origin.packages,
        "machine": origin.machine,
        "data": {"name": record.data} | {f"digest of {split}": digest for split, digest in record.digests.items()},
        "metrics": {name: format_metric(name, value) for name, value in sorted(record.metrics.items())},
    }


def _origin(store: MLflowStore, run: StoredRun) -> Origin:
    try:
        return Origin.model_validate_json(_text(store, run, ORIGIN))
    except ValidationError:  # the run ended before it recorded one
        return Origin()


def _text(store: MLflowStore, run: StoredRun, path: str) -> str:
    """Return a text file of a run, empty if it has none."""
    try:
        return download(store.client, run.record.run_id, path).decode(errors="replace")
    except OSError:
        return ""


def _changed_files(patch: str) -> dict[str, str]:
    """Return the number of added and removed lines of each file in a patch, and git's digest of its new content."""
    files = {}
    for part in re.split(r"^diff --git ", patch, flags=re.MULTILINE)[1:]:
        name = part.splitlines()[0].rpartition(" b/")[2]
        added, removed = (len(re.findall(rf"^\{sign}(?!\{sign})", part, flags=re.MULTILINE)) for sign in "+-")
        blob = re.search(r"^index \w+\.\.(\w{1,10})", part, flags=re.MULTILINE)
        files[name] = f"+{added} -{removed} lines" + (f", {blob[1]}" if blob else "")
    return files


def _differing(first: Mapping[str, str], second: Mapping[str, str]) -> Section:
    keys = dict.fromkeys([*first, *second])
    return {key: (first.get(key, ""), second.get(key, "")) for key in keys if first.get(key) != second.get(key)}
