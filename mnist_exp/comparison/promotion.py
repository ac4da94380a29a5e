"""Decides by validation accuracy alone which arm of a sweep becomes the champion."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mnist_exp.comparison.arms import Arms, Source, arrange, compare_arms
from mnist_exp.comparison.wording import describe_verdict, format_difference
from mnist_exp.errors import UserError
from mnist_exp.metrics import OBJECTIVE, format_metric
from mnist_exp.tracking.base import RunRecord


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

    Args:
        source: The runs of the sweep.
        champion: The id of the run that trained the present champion, None without a champion.

    Raises:
        UserError: The sweep has no validation images of its own, or the champion is none of its jobs.
    """
    arms = arrange_arms(source, None, None)
    if champion is None:
        means = {arm: _mean(runs.values()) for arm, runs in arms.runs.items() if runs}
        best = max(means, key=lambda arm: means[arm])  # the first of equal ones
        mean = format_metric(OBJECTIVE, means[best])
        reason = f"The first champion: {arms.factor}={best} has the highest mean {OBJECTIVE}, {mean}."
        return Decision(_best_run(arms, best), reason, {"arm": f"{arms.factor}={best}"})
    own = [arm for arm, runs in arms.runs.items() if any(run.run_id == champion for run in runs.values())]
    if not own:
        raise UserError(
            f"The champion, run {champion}, is no job of sweep {source.name}, so that nothing can be compared with it.",
            key="--sweep",
            value=source.name,
            remedy="Start a sweep with the champion's settings and the new ones as arms, or promote a run with --run.",
        )
    arms = arrange_arms(source, arms.factor, own[0])
    row = max(compare_arms(arms, [OBJECTIVE]), key=lambda row: row.values.difference)  # over the seeds that both arms have
    compared = f"{arms.factor}={row.arm} against {arms.factor}={arms.baseline} in {OBJECTIVE}"
    finding = f"{compared}: {describe_verdict(row)}, {format_difference(row)}."
    if row.verdict != "higher":
        return Decision(None, f"The champion stays: {finding}", {})
    return Decision(_best_run(arms, row.arm), finding, {"arm": f"{arms.factor}={row.arm}", "verdict": row.verdict})


def arrange_arms(source: Source, factor: str | None, baseline: str | None) -> Arms:
    """Sort the runs of a sweep into arms; raises UserError unless they validate on images that nothing trains on."""
    arms = arrange([source], factor, baseline)
    for record in arms.records:
        if "validation" not in record.digests:
            raise UserError(
                f"Run {record.run_id} has no validation images of its own: expected a sweep on data=mnist_tuning, whose "
                "validation images are never trained on. Start one, or promote a single run with --run."
            )
        if not math.isfinite(record.metrics.get(OBJECTIVE, math.nan)):
            raise UserError(f"Run {record.run_id} has no {OBJECTIVE}, by which arms are compared.")
    return arms


def _mean(runs: Iterable[RunRecord]) -> float:
    values = [run.metrics[OBJECTIVE] for run in runs]
    return math.fsum(values) / len(values)


def _best_run(arms: Arms, arm: str) -> RunRecord:
    return max(arms.runs[arm].values(), key=lambda run: run.metrics[OBJECTIVE])
