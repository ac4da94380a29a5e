"""The runs of sweeps as one table, a row per job: for comparisons, `results.csv` and the Python interface."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from mnist_exp.overrides import combinations, key_of, text_of
from mnist_exp.tracking.base import RunRecord, Sweep, latest_run_per_job
from mnist_exp.tracking.tags import CPU, DIVERGED, ERROR, GPU

SEED = "seed"
DEFAULT = "default"  # the value of a key that a job does not set
NONE = "none"  # the value of a key that a job deletes
NOT_STARTED = "NOT STARTED"  # the status of a job without a run
DIGEST = "digest/"  # begins the columns with the digests of the splits
# The columns of every table, before and after those of the keys that vary.
FIRST = ("sweep", "look")
FIXED = ("run", "status", "error", "data", "precision", "code", "torch", "threads", "processor", "digest")


def frame(sweeps: Iterable[tuple[Sweep, Iterable[RunRecord]]]) -> pd.DataFrame:
    """Return the jobs of sweeps, in the order in which their grids define them.

    Args:
        sweeps: Each sweep with its runs, in the order of their start.

    Returns:
        The columns `sweep` and `look`; the keys that vary, named as typed, as text; `seed`; the columns FIXED, `digest/SPLIT` for
        each split of the data, and each metric with a slash in its name, as recorded. `look` counts the recorded grids of all
        sweeps, in the order in which their first jobs started. `status` is that of MLflow, DIVERGED or NOT STARTED. `digest` is
        that of the run's parameters, the seed aside. Missing texts are empty, missing metrics NaN.
    """
    jobs = [(sweep.run_id, job) for sweep, children in sweeps for job in _jobs(sweep, children)]
    keys = [key for key in dict.fromkeys(key for _, job in jobs for key in job.values) if key != SEED]
    varied = [key for key in keys if len({job.values.get(key) for _, job in jobs}) > 1]
    started: dict[tuple[str, int], float] = {}  # of each look, by sweep and grid
    for sweep_id, job in jobs:
        grid = sweep_id, job.grid
        started[grid] = min(started.get(grid, math.inf), job.run.started if job.run else math.inf)
    looks = {grid: look for look, grid in enumerate(sorted(started, key=lambda grid: started[grid]), start=1)}
    rows = [
        {"sweep": sweep_id, "look": looks[sweep_id, job.grid]}
        | {key: job.values.get(key, DEFAULT) or NONE for key in varied}
        | {SEED: job.values.get(SEED, "")}
        | {name: text for name, text in _describe(job.run).items() if name not in varied}
        for sweep_id, job in jobs
    ]
    texts = pd.DataFrame(rows).fillna("")
    digests = sorted(name for name in texts if name.startswith(DIGEST))
    measured = [{name: value for name, value in job.run.metrics.items() if "/" in name} if job.run else {} for _, job in jobs]
    metrics = pd.DataFrame(measured, texts.index, dtype=float)
    return pd.concat([texts.drop(columns=digests), texts[digests], metrics[sorted(metrics)]], axis=1)


@dataclass(frozen=True)
class _Job:
    """A job of a sweep: the number of the grid that defines it, the values of its keys, and its run, None without one."""

    grid: int
    values: dict[str, str]
    run: RunRecord | None


def _jobs(sweep: Sweep, children: Iterable[RunRecord]) -> Iterator[_Job]:
    """Yield the jobs of a sweep."""
    runs = latest_run_per_job(children)
    default = next((run.params.get(SEED, "") for _, run in sorted(runs.items())), "")
    for grid, overrides, run in _combinations(sweep, runs):
        values = {key_of(override): text_of(override) for override in overrides}
        yield _Job(grid, {SEED: run.params.get(SEED, default) if run else default} | values, run)


def _combinations(sweep: Sweep, runs: Mapping[int, RunRecord]) -> Iterator[tuple[int, Sequence[str], RunRecord | None]]:
    """Yield the number of the grid, the overrides and the run of each job of a sweep."""
    if sweep.sweeper != "grid":  # a search records what it has proposed
        yield from ((1, run.overrides, run) for _, run in sorted(runs.items()))
        return
    grids: dict[tuple[str, ...], int] = {}
    for number, grid in enumerate(sweep.grids, start=1):
        for combination in combinations(grid):
            grids.setdefault(combination, number)
    if sweep.total == len(grids):
        yield from ((grid, overrides, runs.get(number)) for number, (overrides, grid) in enumerate(grids.items()))
        return
    # Some combinations compose equal configurations, which are one job: a run is the first of them.
    found = {tuple(run.overrides): run for _, run in sorted(runs.items())}
    yield from ((grids.get(overrides, 1), overrides, run) for overrides, run in found.items())
    missing = [overrides for overrides in grids if overrides not in found]
    yield from ((grids[overrides], overrides, None) for overrides in missing[: sweep.total - len(found)])


def _describe(run: RunRecord | None) -> dict[str, str]:
    """Return the texts of a run by column."""
    if run is None:
        return dict.fromkeys(FIXED, "") | {"status": NOT_STARTED}
    params = {key: value for key, value in run.params.items() if key != SEED}
    return {
        "run": run.run_id,
        "status": "DIVERGED" if DIVERGED in run.tags else run.status,
        "error": run.tags.get(ERROR, ""),
        "data": run.data,
        "precision": run.params.get("precision", ""),
        **{name: run.tags.get(name, "") for name in ("code", "torch", "threads")},
        "processor": " with ".join(run.tags[name] for name in (CPU, GPU) if name in run.tags),
        "digest": hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:12],
        **{DIGEST + split: digest for split, digest in run.digests.items()},
    }
