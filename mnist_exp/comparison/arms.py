"""Which runs of a sweep may be compared: arms of one factor, their runs paired by every other key that varied."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mnist_exp.comparison.statistics import ALPHA, Comparison, compare, holm
from mnist_exp.errors import UserError
from mnist_exp.tracking.base import RunRecord

Jobs = Mapping[int, Mapping[str, str]]  # the overrides of each job by its number, as values by key
Block = tuple[tuple[str, str], ...]  # (key, value) of every key that varied except the factor, the seed included


@dataclass(frozen=True)
class Arms:
    """The finished runs of a sweep, grouped by the value of one factor.

    Args:
        factor: The key whose values are compared.
        baseline: The value that the other arms are compared with.
        runs: The runs by arm, the baseline first, and by block.
        flags: One message for each run that is left out.
    """

    factor: str
    baseline: str
    runs: dict[str, dict[Block, RunRecord]]
    flags: list[str]

    def pairs(self, arm: str) -> list[Block]:
        """Return the blocks that both `arm` and the baseline have a run in."""
        return sorted(self.runs[arm].keys() & self.runs[self.baseline].keys())

    @property
    def others(self) -> list[str]:
        """The arms except the baseline."""
        return [arm for arm in self.runs if arm != self.baseline]

    @property
    def records(self) -> list[RunRecord]:
        """The runs of all arms."""
        return [record for runs in self.runs.values() for record in runs.values()]


@dataclass(frozen=True)
class Row:
    """The comparison of one arm with the baseline in one metric.

    Args:
        values: The statistics of the pairs.
        p_t: The p-value of the t test, adjusted by Holm over the arms. It equals `p_sign_flip` if the difference is the same
            in every pair by chance, as two pairs of a small test set often are.
        p_sign_flip: The p-value of the sign-flip test, adjusted by Holm over the arms.
    """

    metric: str
    arm: str
    baseline: str
    values: Comparison
    p_t: float
    p_sign_flip: float

    @property
    def is_fixed(self) -> bool:
        """Whether the metric is constant within both arms, as the number of parameters is."""
        return self.values.std == self.values.baseline_std == 0

    @property
    def is_detected(self) -> bool:
        """Whether the difference is significant at 5 % over all arms."""
        return self.values.difference != 0 if self.is_fixed else self.p_t <= ALPHA


def arrange(records: Sequence[RunRecord], jobs: Jobs, factor: str | None, baseline: str | None) -> Arms:
    """Sort the runs of a sweep into arms.

    Args:
        records: The children of the sweep.
        jobs: The jobs that the sweep defines.
        factor: The key whose values are the arms; None selects the only key that varied besides the seed.
        baseline: The arm to compare with; None selects the first.

    Raises:
        UserError: The factor or the baseline does not exist, no arm has two pairs, or the runs used different test data.
    """
    keys = dict.fromkeys(key for job in jobs.values() for key in job)
    varied = [key for key in keys if len({job.get(key) for job in jobs.values()}) > 1]
    factor, values = _choose_factor(varied, jobs, factor)
    if baseline is not None and baseline not in values:
        raise UserError(f"baseline={baseline} is invalid: expected an arm of {factor}: {', '.join(values)}.")
    baseline = values[0] if baseline is None else baseline
    arms = Arms(factor, baseline, {value: {} for value in (baseline, *values)}, [])
    _add_runs(arms, records, jobs, varied)
    _drop_arms_without_pairs(arms, varied)
    _check_test_data(arms)
    return arms


def _format_job(job: Mapping[str, str], keys: Sequence[str]) -> str:
    return " ".join(f"{key}={job[key]}" for key in keys if key in job)


def _choose_factor(varied: list[str], jobs: Jobs, factor: str | None) -> tuple[str, list[str]]:
    """Return the factor and its values in the order of the jobs; raises UserError."""
    candidates = [key for key in varied if key != "seed"]
    expected = f"expected a key that the sweep varied besides the seed: {', '.join(candidates) or 'none'}"
    if factor is None:
        if len(candidates) != 1:
            raise UserError(f"factor=null is invalid: {expected}. Add factor=KEY.")
        factor = candidates[0]
    if factor not in candidates:
        reason = " Seeds pair the runs of the arms." if factor == "seed" else ""
        raise UserError(f"factor={factor} is invalid: {expected}.{reason}")
    return factor, list(dict.fromkeys(job.get(factor, "") for job in jobs.values()))


def _add_runs(arms: Arms, records: Sequence[RunRecord], jobs: Jobs, varied: list[str]) -> None:
    """Add each finished run to its arm and block, and flag the other runs and the jobs without a run."""
    for record in sorted(records, key=lambda record: record.started):
        number = record.job
        if record.status != "FINISHED":
            arms.flags.append(f"unfinished: {record.name} is {record.status}")
        elif number is None or number not in jobs:
            arms.flags.append(f"unknown: {record.name} is not in the sweep's definition")
        else:
            block = tuple((key, jobs[number].get(key, "")) for key in varied if key != arms.factor)
            runs = arms.runs[jobs[number].get(arms.factor, "")]
            if block in runs:
                arms.flags.append(f"duplicated: {record.name} ran more than once; the last run counts")
            runs[block] = record
    done = {record.job for record in records}
    missing = [(number, job) for number, job in jobs.items() if number not in done]
    arms.flags.extend(f"missing: job {number} ({_format_job(job, varied)}) has no run" for number, job in missing)


def _drop_arms_without_pairs(arms: Arms, varied: list[str]) -> None:
    """Flag unpaired runs and drop the arms with fewer than two pairs; raises UserError if no arm remains."""
    for arm in arms.others:
        for block in sorted(arms.runs[arm].keys() ^ arms.runs[arms.baseline].keys()):
            alone, lacks = (arm, arms.baseline) if block in arms.runs[arm] else (arms.baseline, arm)
            run = f"{arms.factor}={alone} {_format_job(dict(block), varied)}"
            arms.flags.append(f"unpaired: {run} has no partner in {arms.factor}={lacks}")
    small = [arm for arm in arms.others if len(arms.pairs(arm)) < 2]
    if len(small) == len(arms.others):
        raise UserError(
            f"No arm of {arms.factor} has two pairs of finished runs with {arms.factor}={arms.baseline}, the minimum to "
            "estimate the spread. Sweep with 'seed=range(0,5)' or more, or finish the sweep with sweep.resume=<its id>."
            + "".join(f"\n- {flag}" for flag in arms.flags)
        )
    for arm in small:
        count = len(arms.pairs(arm))
        arms.flags.append(f"left out: {arms.factor}={arm} has {count} pairs of finished runs; expected at least two")
        del arms.runs[arm]


def _check_test_data(arms: Arms) -> None:
    """Raise UserError if the runs were evaluated on different data."""
    seen: dict[tuple[str, str], str] = {}
    for record in arms.records:
        digest = record.digests.get("test") or record.digests.get("validation") or f"not recorded by {record.name}"
        seen.setdefault((record.data, digest), record.name)
    if len(seen) > 1:
        found = "; ".join(f"{data} ({digest}): {name}" for (data, digest), name in seen.items())
        raise UserError(f"The runs were evaluated on different data and cannot be compared: {found}. Sweep on one data set.")


def _check_validation_data(arms: Arms, metric: str) -> None:
    """Raise UserError if the runs of a pair were validated on different images."""
    for arm in arms.others:
        for block in arms.pairs(arm):
            pair = [arms.runs[name][block] for name in (arm, arms.baseline)]
            if len({record.digests.get("validation") or record.digests.get("finetune") for record in pair}) > 1:
                names = " and ".join(record.name for record in pair)
                raise UserError(
                    f"metrics={metric} is invalid: expected pairs with the same validation images, but {names} were validated "
                    "on different images. Compare test/accuracy, or sweep with one data split."
                )


def choose_metrics(arms: Arms, wanted: Sequence[str] | None) -> list[str]:
    """Return the metrics to compare: the wanted ones, or by default accuracy, loss, time and parameters.

    Raises:
        UserError: A run lacks a metric, or its value is not finite.
    """
    shared = sorted(set.intersection(*(set(record.metrics) for record in arms.records)))
    listed = ", ".join(shared) or "none"
    if wanted is None:
        split = "test" if "test/accuracy" in shared else "val"
        usual = (f"{split}/accuracy", f"{split}/loss", "time/train_seconds", "time/total_seconds", "model/parameters")
        wanted = [metric for metric in usual if metric in shared]
        if not wanted:
            raise UserError(f"metrics=null is invalid: expected one of {', '.join(usual)} in every run. Choose from {listed}.")
    for metric in wanted:
        if metric not in shared:
            raise UserError(f"metrics={metric} is invalid: expected a metric that every run has: {listed}.")
        broken = [record.name for record in arms.records if not math.isfinite(record.metrics[metric])]
        if broken:
            raise UserError(
                f"metrics={metric} is invalid: expected finite values, but {len(broken)} of {len(arms.records)} runs, such as "
                f"{broken[0]}, have none. Compare another of {listed}, or sweep without the values that diverge."
            )
    return list(wanted)


def compare_arms(arms: Arms, metrics: Sequence[str]) -> list[Row]:
    """Compare every arm with the baseline in every metric; raises UserError if `val/` metrics come from different images."""
    rows = []
    for metric in metrics:
        if metric.startswith("val/"):
            _check_validation_data(arms, metric)
        compared = []
        for arm in arms.others:
            blocks = arms.pairs(arm)
            ours, theirs = ([arms.runs[name][block].metrics[metric] for block in blocks] for name in (arm, arms.baseline))
            compared.append(compare(ours, theirs, tests=len(arms.others)))
        by_chance = [math.isnan(pairs.p_t) and (pairs.std or pairs.baseline_std) for pairs in compared]
        p_t = holm([pairs.p_sign_flip if alike else pairs.p_t for pairs, alike in zip(compared, by_chance, strict=True)])
        p_sign_flip = holm([pairs.p_sign_flip for pairs in compared])
        for arm, pairs, p, p_flip in zip(arms.others, compared, p_t, p_sign_flip, strict=True):
            rows.append(Row(metric, arm, arms.baseline, pairs, p, p_flip))
    return rows


def differing_params(arms: Arms) -> dict[str, dict[str, str]]:
    """Return the parameters that differ between arms, as their values by arm."""
    table = {}
    for key in sorted({key for record in arms.records for key in record.params} - {"seed"}):
        values = {arm: {record.params.get(key, "-") for record in runs.values()} for arm, runs in arms.runs.items()}
        by_arm = {arm: ", ".join(sorted(found)) for arm, found in values.items()}
        if len(set(by_arm.values())) > 1:
            table[key] = by_arm
    return table
