"""The runs of sweeps as one table, a row per job: for comparisons, `results.csv` and the Python interface."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import pandas as pd

from mnist_exp.overrides import combinations, key_of, text_of
from mnist_exp.tracking.base import RunRecord, Sweep, latest_run_per_job
from mnist_exp.tracking.tags import CPU, DIVERGED, ERROR, GPU

SEED = "seed"
DEFAULT = "default"  # the value of a key that a job does not set
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
        each split of the data, and each metric under its name, as recorded. `look` counts the recorded grids, over all sweeps.
        `status` is that of MLflow, DIVERGED or NOT STARTED. `digest` is that of the run's parameters, the seed aside. Missing
        texts are empty, missing metrics NaN.
    """
    jobs = []
    looks = 0
    for sweep, children in sweeps:
        jobs += [(sweep, looks + look, overrides, run) for look, overrides, run in _jobs(sweep, children)]
        looks += len(sweep.grids)
    keyed = [{key_of(override): text_of(override) for override in overrides} for _, _, overrides, _ in jobs]
    keys = [key for key in dict.fromkeys(key for values in keyed for key in values) if key != SEED]
    varied = [key for key in keys if len({values.get(key) for values in keyed}) > 1]
    rows = [
        {"sweep": sweep.run_id, "look": look}
        | {key: values.get(key, DEFAULT) for key in varied}
        | {SEED: values.get(SEED, "")}
        | {name: text for name, text in _describe(run).items() if name not in varied}
        for (sweep, look, _, run), values in zip(jobs, keyed, strict=True)
    ]
    texts = pd.DataFrame(rows).fillna("")
    digests = sorted(name for name in texts if name.startswith(DIGEST))
    metrics = pd.DataFrame([run.metrics if run else {} for *_, run in jobs], texts.index, dtype=float)
    return pd.concat([texts.drop(columns=digests), texts[digests], metrics[sorted(metrics)]], axis=1)


def _jobs(sweep: Sweep, children: Iterable[RunRecord]) -> Iterator[tuple[int, Sequence[str], RunRecord | None]]:
    """Yield the look, the overrides and the run of each job of a sweep."""
    runs = latest_run_per_job(children)
    if sweep.sweeper != "grid":  # a search records what it has proposed
        yield from ((1, run.overrides, run) for _, run in sorted(runs.items()))
        return
    looks: dict[tuple[str, ...], int] = {}
    for look, grid in enumerate(sweep.grids, start=1):
        for combination in combinations(grid):
            looks.setdefault(combination, look)
    if sweep.total == len(looks):
        yield from ((look, overrides, runs.get(number)) for number, (overrides, look) in enumerate(looks.items()))
        return
    # Some combinations compose equal configurations, which are one job: a run is the first of them.
    found = {tuple(run.overrides): run for _, run in sorted(runs.items())}
    yield from ((looks.get(overrides, 1), overrides, run) for overrides, run in found.items())
    missing = [overrides for overrides in looks if overrides not in found]
    yield from ((looks[overrides], overrides, None) for overrides in missing[: sweep.total - len(found)])


def _describe(run: RunRecord | None) -> dict[str, str]:
    """Return the texts of a run by column."""
    if run is None:
        return {"status": NOT_STARTED}
    params = {key: value for key, value in run.params.items() if key != SEED}
    return {
        "run": run.run_id,
        "status": "DIVERGED" if DIVERGED in run.tags else run.status,
        "error": run.tags.get(ERROR, ""),
        "data": run.data,
        "precision": run.params.get("precision", ""),
        **{name: run.tags.get(name, "") for name in ("code", "torch", "threads")},
        "processor": processor(run.tags),
        "digest": hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:12],
        **{DIGEST + split: digest for split, digest in run.digests.items()},
    }


def processor(tags: Mapping[str, str]) -> str:
    """Return the processor of a run, and its GPU if it used one."""
    return " with ".join(tags[name] for name in (CPU, GPU) if name in tags)
