"""Decides by validation accuracy alone which arm of a sweep becomes the champion."""

import math
from dataclasses import dataclass, replace

from mnist_exp.comparison.arms import DEFAULT, SEED, Jobs, Source, arrange, compare_arms
from mnist_exp.comparison.wording import describe_verdict, format_difference
from mnist_exp.errors import UserError
from mnist_exp.metrics import OBJECTIVE, format_metric
from mnist_exp.overrides import command
from mnist_exp.tracking.base import RunRecord

ARM = "arm"  # the key that stands for all keys that varied


@dataclass(frozen=True)
class Decision:
    """Whether an arm takes the champion's place.

    Args:
        run: The run to promote, None if the champion stays.
        reason: The sentence that says why.
        tags: The arm and the verdict, for the version's tags.
    """

    run: RunRecord | None
    reason: str
    tags: dict[str, str]


def decide_by_sweep(source: Source, champion: str | None) -> Decision:
    """Return which arm of a sweep becomes the champion: the best one, if it is higher than the champion's arm.

    An arm is a combination of the values of all keys that varied, the seed aside. Only arms that have finished all seeds count,
    because an arm would look better without those of its seeds that diverged.

    Args:
        source: The runs of the sweep.
        champion: The id of the run that trained the present champion, empty if unknown; None without a champion.

    Raises:
        UserError: The sweep has no validation images of its own or no arm that counts, or the champion is none of its jobs.
    """
    source = replace(source, jobs=_by_arm(source.jobs))
    arms = _finished_arms(source)
    if champion is None:
        means = {arm: math.fsum(map(_objective, runs)) / len(runs) for arm, runs in arms.items()}
        best = max(means, key=lambda arm: means[arm])  # the first of equal ones
        reason = f"The first champion: {best} has the highest mean {OBJECTIVE}, {format_metric(OBJECTIVE, means[best])}."
        return Decision(max(arms[best], key=_objective), reason, {"arm": best})
    numbers = {run.job for run in source.records if run.run_id == champion}
    own = next((job[ARM] for number, job in source.jobs.items() if number in numbers), None)
    if own is None:
        raise UserError(
            f"The champion, run {champion or 'unknown'}, is no job of sweep {source.name}: nothing can be compared with it.",
            key="--sweep",
            value=source.name,
            remedy="Start a sweep with the champion's settings and the new ones as arms, or promote a run with --run.",
        )
    if own not in arms or len(arms) < 2 or len(arms[own]) < 2:
        needed = "its arm and another one must have finished all seeds of the sweep, at least two"
        return Decision(None, f"The champion stays: for a verdict, {needed}. Finished: {', '.join(arms)}.", {})
    jobs = {number: job for number, job in source.jobs.items() if job[ARM] in arms}
    finished = replace(source, records=[run for runs in arms.values() for run in runs], jobs=jobs)
    row = max(compare_arms(arrange([finished], ARM, own), [OBJECTIVE]), key=lambda row: row.values.difference)
    finding = f"{row.arm} against {row.baseline} in {OBJECTIVE}: {describe_verdict(row)}, {format_difference(row)}."
    if row.verdict != "higher":
        return Decision(None, f"The champion stays: {finding}", {})
    return Decision(max(arms[row.arm], key=_objective), finding, {"arm": row.arm, "verdict": row.verdict})


def _by_arm(jobs: Jobs) -> dict[int, dict[str, str]]:
    """Return the arm and the seed of each job."""
    keys = dict.fromkeys(key for job in jobs.values() for key in job if key != SEED)
    varied = [key for key in keys if len({job.get(key) for job in jobs.values()}) > 1]
    arms = {number: " ".join(f"{key}={job.get(key, DEFAULT)}" for key in varied) for number, job in jobs.items()}
    return {number: {ARM: arms[number] or DEFAULT, SEED: job.get(SEED, "")} for number, job in jobs.items()}


def _finished_arms(source: Source) -> dict[str, list[RunRecord]]:
    """Return the runs of each arm that has finished all seeds; raises UserError unless all are validated on the same images."""
    runs = {  # of a job that ran again, the last run counts
        run.job: run
        for run in sorted(source.records, key=lambda run: run.started)
        if run.status == "FINISHED" and math.isfinite(_objective(run))
    }
    arms: dict[str, dict[str, RunRecord]] = {job[ARM]: {} for job in source.jobs.values()}
    for number, job in source.jobs.items():
        if number in runs:
            arms[job[ARM]][job[SEED]] = runs[number]
    seeds = {job[SEED] for job in source.jobs.values()}
    finished = {arm: list(by_seed.values()) for arm, by_seed in arms.items() if by_seed.keys() == seeds}
    if not finished:
        raise UserError(
            f"No arm of sweep {source.name} has finished all seeds with a {OBJECTIVE}.",
            remedy=f"Finish it with `{command('run', '-m', f'sweep.resume={source.name}')}`, or promote a run with --run.",
        )
    images = {run.digests.get("validation") for runs in finished.values() for run in runs}
    if len(images) > 1 or None in images:
        raise UserError(
            f"The runs of sweep {source.name} are not validated on the same images, or also train on them.",
            remedy="Start a sweep on data=mnist_tuning, which validates on images of its own, or promote a run with --run.",
        )
    return finished


def _objective(run: RunRecord) -> float:
    return run.metrics.get(OBJECTIVE, math.nan)
