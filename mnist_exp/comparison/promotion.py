"""Decides by validation accuracy alone which arm of a sweep becomes the champion."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mnist_exp.comparison.arms import Arms, Row, Source, arrange, compare_arms
from mnist_exp.comparison.wording import describe_verdict, format_difference
from mnist_exp.errors import UserError
from mnist_exp.metrics import OBJECTIVE, format_metric
from mnist_exp.overrides import command, parse
from mnist_exp.settings import walk
from mnist_exp.tracking.base import RunRecord, Store, StoredRun

PARAMETERS = "model/parameters"
BUNDLE = "arm"  # the factor whose options set any keys


@dataclass(frozen=True)
class Decision:
    """Whether an arm takes the champion's place.

    Args:
        run: The run to promote, None if the champion stays.
        reason: The sentence that says why.
        tags: The arm, the verdict and the interval, for the version's tags.
    """

    run: RunRecord | None
    reason: str
    tags: dict[str, str]


def decide_by_sweep(store: Store, source: Source, champion: str | None) -> Decision:
    """Return which arm of a sweep becomes the champion.

    Args:
        store: The store of the sweep.
        source: The runs of the sweep.
        champion: The id of the run that trained the present champion, None without a champion.

    Raises:
        UserError: The sweep has no validation images of its own, or lacks the champion's arm.
    """
    arms = arrange_arms([source], None, None)
    if champion is None:
        return decide(arms, has_champion=False)
    arm = find_arm(arms, store.read(champion), source.name)
    return decide(arrange_arms([source], arms.factor, arm), has_champion=True)


def find_arm(arms: Arms, champion: StoredRun, sweep_id: str) -> str:
    """Return the arm that has the champion's settings; raises UserError if the sweep has none, with the command that adds it."""
    factor, record = arms.factor, champion.record
    for arm, runs in arms.runs.items():
        if any(run.run_id == record.run_id for run in runs.values()):
            return arm
    value = champion.recipe.choices.get(factor, dict(walk(champion.recipe.settings.model_dump(mode="json"))).get(factor))
    equal = [arm for arm, runs in arms.runs.items() if runs and parse(f"{factor}={arm}").value() == value]
    compared = [arms.runs[arm] for arm in equal] or [runs for runs in arms.runs.values() if runs]
    if factor == BUNDLE and not equal:
        differing = [] if value else [f"it was trained without {BUNDLE}=..."]
    else:
        differing = _differing(record, next(iter(compared[0].values())), None if equal else factor)
    if differing:
        raise UserError(
            f"The champion, run {record.run_id}, differs from the runs of sweep {sweep_id} in more than {factor}: "
            f"{', '.join(differing)}. Start a sweep with the champion's settings and the new ones as arms."
        )
    if equal:
        return equal[0]
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    raise UserError(
        f"The champion's arm, {factor}={text}, is not in sweep {sweep_id}, so that nothing can be compared with it. "
        f"Add it with:\n{command('run', '-m', f'sweep.extend={sweep_id}', f'{factor}={text}')}"
    )


def _differing(champion: RunRecord, run: RunRecord, factor: str | None) -> list[str]:
    """Return the parameters of both runs that differ, except the seed, the data, the machine and what follows from the factor."""

    def matters(name: str) -> bool:
        return name.partition(".")[0] not in ("seed", "data", "device") and not (factor and factor.rpartition(".")[2] in name)

    keys = sorted(filter(matters, champion.params.keys() & run.params.keys()))
    return [f"{key} ({champion.params[key]} and {run.params[key]})" for key in keys if champion.params[key] != run.params[key]]


def arrange_arms(sources: Sequence[Source], factor: str | None, baseline: str | None) -> Arms:
    """Sort the runs of a sweep into arms; raises UserError unless they validate on images that nothing trains on."""
    arms = arrange(sources, factor, baseline)
    for record in arms.records:
        if "validation" not in record.digests:
            raise UserError(
                f"Run {record.run_id} has no validation images of its own: expected a sweep on data=mnist_tuning, whose "
                "validation images are never trained on. Start one, or promote a single run with --run."
            )
        if not math.isfinite(record.metrics.get(OBJECTIVE, math.nan)):
            raise UserError(f"Run {record.run_id} has no {OBJECTIVE}, by which arms are compared.")
    return arms


def decide(arms: Arms, has_champion: bool) -> Decision:
    """Return which arm becomes the champion: the best one, if the comparison with the champion's arm supports it.

    Args:
        arms: The arms; with a champion, its arm is the baseline.
        has_champion: Whether there is a champion.
    """
    if not has_champion:
        means = {arm: _mean(runs.values()) for arm, runs in arms.runs.items() if runs}
        best = max(means, key=lambda arm: means[arm])  # the first of equal ones
        reason = (
            f"The first champion: {arms.factor}={best} has the highest mean {OBJECTIVE}, {format_metric(OBJECTIVE, means[best])}."
        )
        return Decision(_best_run(arms, best), reason, {"arm": f"{arms.factor}={best}"})
    baseline = f"{arms.factor}={arms.baseline}"
    row = max(compare_arms(arms, [OBJECTIVE]), key=lambda row: row.values.difference)  # over the seeds that both arms have
    best = row.arm
    if row.values.difference <= 0 and row.verdict != "equivalent":
        return Decision(None, f"The champion stays: no arm has a higher mean {OBJECTIVE} than {baseline}.", {})
    saved = _parameters(arms, arms.baseline) - _parameters(arms, best)
    finding = f"{arms.factor}={best} against {baseline} in {OBJECTIVE}: {describe_verdict(row)}, {format_difference(row)}"
    tags = {"arm": f"{arms.factor}={best}", "against": baseline, "verdict": row.verdict, "interval": _interval(row)}
    if row.verdict == "higher":
        return Decision(_best_run(arms, best), f"{finding}.", tags)
    if row.verdict == "equivalent" and saved > 0:
        return Decision(_best_run(arms, best), f"{finding}, with {saved:,.0f} fewer parameters.", tags)
    return Decision(None, f"The champion stays: {finding}. A new one must be higher, or equivalent with fewer parameters.", tags)


def _mean(runs: Iterable[RunRecord]) -> float:
    values = [run.metrics[OBJECTIVE] for run in runs]
    return math.fsum(values) / len(values)


def _best_run(arms: Arms, arm: str) -> RunRecord:
    return max(arms.runs[arm].values(), key=lambda run: run.metrics[OBJECTIVE])


def _parameters(arms: Arms, arm: str) -> float:
    return max(run.metrics.get(PARAMETERS, math.nan) for run in arms.runs[arm].values())


def _interval(row: Row) -> str:
    interval = row.values.interval
    low = format_metric(row.metric, interval.low, signed=True, bare=True)
    return f"{low} to {format_metric(row.metric, interval.high, signed=True, is_difference=True)}"
