"""Tables of runs as CSV files: one row per run, with everything that a comparison needs."""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mnist_exp.comparison.arms import Source
from mnist_exp.errors import UserError
from mnist_exp.tracking.base import RunRecord
from mnist_exp.tracking.tags import DATA, JOB, PRUNED

FIELDS = ("sweep", "job", "run", "name", "status", "started", "initial", "data")
TAGS = ("code", "torch", "threads", "cpu", "gpu", PRUNED)
MISSING = "NOT STARTED"  # the status of a job without a run
# Columns with a prefix: their number depends on the sweep.
OVERRIDE, PARAM, METRIC, DIGEST = "override:", "param:", "metric:", "digest:"


def write_table(path: Path, sources: Sequence[Source]) -> None:
    """Write the runs of sweeps to a CSV file, numbers as recorded; raises UserError if the file cannot be written."""
    rows = [row for source in sources for row in rows_of(source)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: ":" in name)  # the fixed ones first
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--export {path} is invalid: it cannot be written: {error}. Choose another path.") from error


def rows_of(source: Source) -> list[dict[str, str]]:
    """Return the runs of a sweep, and its jobs without one, as the rows of a table."""
    rows = [row_of(source, record) for record in source.records if record.job in source.jobs]
    done = {record.job for record in source.records}
    for number in source.jobs.keys() - done:
        empty = RunRecord("", "", f"job {number}", MISSING, 0, None, {}, {}, {JOB: str(number)}, {}, "", "")
        rows.append(row_of(source, empty))
    return rows


def row_of(source: Source, record: RunRecord) -> dict[str, str]:
    """Return a run as the row of a table, by column."""
    assert record.job is not None
    fixed = {
        "sweep": source.name,
        "job": str(record.job),
        "run": record.run_id,
        "name": record.name,
        "status": record.status,
        "started": str(record.started),
        "initial": str(record.job in source.initial).lower(),
        "data": record.data,
    }
    return (
        fixed
        | {name: record.tags.get(name, "") for name in TAGS}
        | _prefixed(OVERRIDE, source.jobs[record.job])
        | _prefixed(PARAM, record.params)
        | _prefixed(METRIC, {name: repr(value) for name, value in record.metrics.items()})
        | _prefixed(DIGEST, record.digests)
    )


def read_tables(paths: Iterable[Path]) -> list[Source]:
    """Return the sweeps in CSV files that `write_table` has written.

    Raises:
        UserError: A file cannot be read, lacks a column, contains a run twice, or a value is not as expected.
    """
    rows: dict[str, dict[str, str]] = {}
    for path in paths:
        for number, row in enumerate(_read(path), start=2):
            if row["run"] in rows and row["run"]:
                raise UserError(
                    f"--results {path}: line {number} repeats run {row['run']}. Expected each run once; delete the line."
                )
            rows[row["run"] or f"{path}:{number}"] = row | {"": f"--results {path}: line {number}"}
    sweeps: dict[str, list[dict[str, str]]] = {}
    for row in rows.values():
        sweeps.setdefault(row["sweep"], []).append(row)
    return [_source(name, found) for name, found in sweeps.items()]


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError.invalid("--results", path, "a file from --export")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"--results {path} is invalid: it cannot be read: {error}. Expected a file from --export X.csv."
        ) from error
    problem = _problem(columns, rows)
    if problem:
        raise UserError(f"--results {path} is invalid: it {problem}. Expected a file from --export PATH.csv.")
    return rows


def _problem(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the reason why a file is no table of runs, empty if it is one."""
    if missing := [name for name in (*FIELDS, *TAGS) if name not in columns]:
        return f"lacks the columns {', '.join(missing)}"
    if repeated := [name for name, count in Counter(columns).items() if count > 1]:
        return f"has the column {repeated[0]} more than once"
    if missing := [name for name in (OVERRIDE + "seed", PARAM + "precision") if name not in columns]:
        return f"lacks the columns {', '.join(missing)}"
    if not {DIGEST + "test", DIGEST + "validation"} & set(columns):
        return f"lacks a column {DIGEST}test or {DIGEST}validation"
    if uneven := [number for number, row in enumerate(rows, start=2) if None in row or None in row.values()]:
        return f"has too many or too few cells in line {uneven[0]}"
    finished = [(number, row) for number, row in enumerate(rows, start=2) if row["status"] == "FINISHED"]
    measured = [name for name in columns if name.startswith((f"{METRIC}test/", f"{METRIC}val/"))]
    for name in (PARAM + "precision", *measured):
        empty = [number for number, row in finished if not row[name]]
        if empty and (len(empty) < len(finished) or name == PARAM + "precision"):
            return f"has no value of {name} in line {empty[0]}, a finished run"
    return "" if rows else "contains no run"


def _source(name: str, rows: Sequence[Mapping[str, str]]) -> Source:
    records, jobs, initial = [], {}, set()
    for row in rows:
        record = _record(row)
        assert record.job is not None
        if record.run_id:
            records.append(record)
        jobs[record.job] = {key: value for key, value in _selected(row, OVERRIDE).items() if value}
        if row["initial"].lower() not in ("true", "false"):
            raise UserError(f"{row['']}: initial={row['initial']} is invalid: expected true or false.")
        if row["initial"].lower() == "true":
            initial.add(record.job)
    in_order = dict(sorted(jobs.items()))  # as in the sweep: the first arm is the baseline by default
    return Source(name, records, in_order, frozenset(initial))


def _record(row: Mapping[str, str]) -> RunRecord:
    job, started = _integer(row, "job", 9), _integer(row, "started", 18)
    metrics = {}
    for name, text in _selected(row, METRIC).items():
        if text:
            metrics[name] = _number(row, METRIC + name, finite=row["status"] == "FINISHED")
    tags = {name: row[name] for name in TAGS if row[name]} | {JOB: str(job), DATA: row["data"]}
    params, digests = ({key: value for key, value in _selected(row, prefix).items() if value} for prefix in (PARAM, DIGEST))
    return RunRecord(row["run"], "", row["name"], row["status"], started, None, params, metrics, tags, digests, "", "")


def _integer(row: Mapping[str, str], name: str, digits: int) -> int:
    if not (row[name].isdecimal() and len(row[name]) <= digits):
        raise UserError(f"{row['']}: {name}={row[name]} is invalid: expected an integer >= 0 of at most {digits} digits.")
    return int(row[name])


def _number(row: Mapping[str, str], name: str, *, finite: bool) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value, finite = math.nan, True
    if finite and not math.isfinite(value):
        raise UserError(f"{row['']}: {name}={row[name]} is invalid: expected a finite number. Correct it, or delete the line.")
    return value


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, str]:
    return {prefix + key: str(value) for key, value in values.items()}


def _selected(row: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
