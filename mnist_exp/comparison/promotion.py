"""Decides by the objective, on validation images alone, which arm of a sweep becomes the champion."""

import math
from dataclasses import dataclass

import pandas as pd

from mnist_exp.comparison.pairs import compare, has_value, varied_keys
from mnist_exp.comparison.wording import describe_verdict, format_difference
from mnist_exp.errors import UserError
from mnist_exp.metrics import best_first, format_metric, metric_of
from mnist_exp.overrides import command
from mnist_exp.tracking.frame import DIGEST, SEED

ARM = "arm"  # the key that stands for all keys that vary


@dataclass(frozen=True)
class Decision:
    """Whether an arm takes the champion's place.

    Args:
        run_id: The run to promote, None if the champion stays.
        reason: The sentence that says why.
        tags: The arm and the verdict, for the version's tags.
    """

    run_id: str | None
    reason: str
    tags: dict[str, str]


def decide_by_sweep(runs: pd.DataFrame, objective: str, champion: str | None) -> Decision:
    """Return which arm of a sweep becomes the champion: the best one, if it is better than the champion's arm.

    An arm is a combination of the values of all keys that vary, the seed aside. Only arms that have finished all seeds count,
    because an arm would look better without those of its seeds that diverged.

    Args:
        runs: The runs of the sweep, from `tracking.frame.frame`.
        objective: The metric that decides.
        champion: The id of the run that trained the present champion, empty if unknown; None without a champion.

    Raises:
        UserError: The sweep has no validation images of its own or no arm that counts, or the champion is none of its jobs.
    """
    keys, sweep = varied_keys(runs), runs["sweep"].iloc[0]
    arms = [
        " ".join(f"{key}={value}" for key, value in zip(keys, job, strict=True)) for job in runs[keys].itertuples(index=False)
    ]
    runs = runs.drop(columns=keys).assign(**{ARM: arms, objective: runs.get(objective, math.nan)})
    means = _means_of_finished_arms(runs, objective, sweep)

    def best_run(arm: str) -> str:
        scores = runs[runs[ARM] == arm].set_index("run")[objective].dropna()
        return str(best_first(objective, scores.index, scores.__getitem__)[0])

    if champion is None:
        best = str(best_first(objective, means.index, means.__getitem__)[0])
        value = format_metric(objective, means[best])
        reason = f"The first champion: {best or 'the only arm'} has the best mean {objective}, {value}."
        return Decision(best_run(best), reason, {"arm": best})
    own = runs.loc[runs["run"] == champion, ARM]
    if own.empty:
        raise UserError(
            f"The champion, run {champion or 'unknown'}, is no job of sweep {sweep}: nothing can be compared with it.",
            key="--sweep",
            value=sweep,
            remedy="Start a sweep with the champion's settings and the new ones as arms, or promote a run with --run.",
        )
    if runs[ARM].nunique() == 1:
        return Decision(None, "The champion stays: the sweep has no other arm.", {})
    rows = [row for row in compare(runs, ARM, own.iloc[0], [objective]).rows if row.is_complete and row.estimate.n]
    if not rows:
        return Decision(None, "The champion stays: for a verdict, its arm and another one must have finished all seeds.", {})
    row = best_first(objective, rows, lambda row: row.estimate.difference)[0]
    better = "lower" if metric_of(objective).higher_is_better is False else "higher"
    finding = f"{row.arm} against {row.baseline} in {objective}: {describe_verdict(row)}, {format_difference(row)}."
    if row.verdict != better or row.is_doubtful:
        return Decision(None, f"The champion stays: {finding}", {})
    return Decision(best_run(row.arm), finding, {"arm": row.arm, "verdict": row.verdict})


def _means_of_finished_arms(runs: pd.DataFrame, objective: str, sweep: str) -> "pd.Series[float]":
    """Return the mean objective of each arm that has finished all seeds; raises UserError unless all use the same images."""
    finished = runs[has_value(runs, objective)].groupby(ARM, sort=False)[SEED].nunique() == runs[SEED].nunique()
    done = runs[runs[ARM].isin(finished[finished].index)]
    if done.empty:
        raise UserError(
            f"No arm of sweep {sweep} has finished all seeds with a {objective}.",
            remedy=f"Finish it with `{command('run', '-m', f'sweep.resume={sweep}')}`, or promote a run with --run.",
        )
    images = set(done.get(f"{DIGEST}validation", pd.Series("")))
    if len(images) > 1 or "" in images:
        raise UserError(
            f"The runs of sweep {sweep} are not validated on the same images, or also train on them.",
            remedy="Sweep on data that validate on the same images for each seed, as data=mnist_tuning does, or use --run.",
        )
    return done.groupby(ARM, sort=False)[objective].mean()
