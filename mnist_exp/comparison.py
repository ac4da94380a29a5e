"""Which runs of a sweep may be set against each other, and what they say in words: arms of one factor, paired by all else."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mnist_exp.errors import UserError
from mnist_exp.statistics import ALPHA, Comparison, compare, holm

if TYPE_CHECKING:
    from mnist_exp.tracking import Record

Setting = tuple[tuple[str, str], ...]  # (key, value) of whatever varied beside the factor, the seed among it


@dataclass(frozen=True)
class Arms:
    """The finished runs of a sweep by the value of one factor, the baseline's first, and by setting; flags: what was left out."""

    factor: str
    baseline: str
    runs: dict[str, dict[Setting, "Record"]]
    flags: list[str]

    def pairs(self, arm: str) -> list[Setting]:
        """Return the settings that both `arm` and the baseline were run in."""
        return sorted(self.runs[arm].keys() & self.runs[self.baseline].keys())

    @property
    def others(self) -> list[str]:
        """The arms that are set against the baseline."""
        return [arm for arm in self.runs if arm != self.baseline]

    @property
    def records(self) -> list["Record"]:
        """All runs."""
        return [record for runs in self.runs.values() for record in runs.values()]


@dataclass(frozen=True)
class Row:
    """One arm against the baseline in one metric; p_t and p_sign_flip: adjusted by Holm over the arms.

    p_t is p_sign_flip's where the difference is the same in every pair by chance: two pairs of a small test set often agree.
    """

    metric: str
    arm: str
    baseline: str
    values: Comparison
    p_t: float
    p_sign_flip: float

    @property
    def difference(self) -> str:
        """The difference with its interval, in words."""
        difference = amount(self.metric, self.values.difference, signed=True, is_difference=True)
        if self.values.difference_std == 0:
            return f"{difference} ({'always' if self.is_fixed else 'in all pairs, no interval'})"
        low, high = self.values.interval.low, self.values.interval.high
        bounds = f"{amount(self.metric, low, signed=True, bare=True)} to {amount(self.metric, high, signed=True, bare=True)}"
        return f"{difference} ({bounds})"

    @property
    def verdict(self) -> str:
        """Whether the arms differ, as a table says it; times only hint."""
        if not self.is_detected:
            return "not shown"
        return "hint" if self.metric.startswith("time/") else "yes"

    @property
    def is_fixed(self) -> bool:
        """Whether the metric, like the number of parameters, does not vary within either arm."""
        return self.values.std == self.values.baseline_std == 0

    @property
    def is_detected(self) -> bool:
        """Whether the difference is more than chance, at 5 % over all arms."""
        return self.values.difference != 0 if self.is_fixed else self.p_t <= ALPHA


def arrange(records: "Sequence[Record]", jobs: Mapping[int, Mapping[str, str]], factor: str | None, baseline: str | None) -> Arms:
    """Sort a sweep's runs into arms.

    records: of its children; jobs: what each job was given, values by key; factor: the key that makes the arms, None for the
    only one that varied beside the seed; baseline: the value that makes the baseline, None for the first.
    Raises UserError that names what there is, also where the runs saw different data.
    """
    varied = [key for key in _keys(jobs) if len({job.get(key) for job in jobs.values()}) > 1]
    factor, values = _factor(varied, jobs, factor)
    if baseline is not None and baseline not in values:
        raise UserError(f"baseline={baseline} is not an arm of {factor}: its arms are {', '.join(values)}.")
    baseline = values[0] if baseline is None else baseline
    arms: dict[str, dict[Setting, Record]] = {value: {} for value in (baseline, *values)}
    flags = []
    for record in sorted(records, key=lambda record: record.started):
        number = record.job
        if record.status != "FINISHED":
            flags.append(f"unfinished: {record.name} is {record.status}")
        elif number is None or number not in jobs:
            flags.append(f"unknown: {record.name} is not in the sweep's definition")
        else:
            setting = tuple((key, jobs[number].get(key, "")) for key in varied if key != factor)
            runs = arms[jobs[number].get(factor, "")]
            if setting in runs:
                flags.append(f"duplicated: {record.name} was run more than once, the last one counts")
            runs[setting] = record
    done = {record.job for record in records}
    flags += [f"missing: job {number} ({_words(job, varied)}) has no run" for number, job in jobs.items() if number not in done]
    result = Arms(factor, baseline, arms, flags)
    for arm in result.others:
        for setting in sorted(arms[arm].keys() ^ arms[baseline].keys()):
            alone, lacks = (arm, baseline) if setting in arms[arm] else (baseline, arm)
            flags.append(f"unpaired: {factor}={alone} {_words(dict(setting), varied)} has no partner in {factor}={lacks}")
    small = [arm for arm in result.others if len(result.pairs(arm)) < 2]
    if len(small) == len(result.others):
        raise UserError(
            f"No arm of {factor} has two pairs of finished runs with {factor}={baseline}, and fewer say nothing of the spread. "
            f"Sweep with 'seed=range(0,5)' or more, or finish the sweep with sweep.resume=<its id>."
            + "".join(f"\n- {flag}" for flag in flags)
        )
    for arm in small:
        flags.append(
            f"left out: {factor}={arm} has {len(result.pairs(arm))} pairs of finished runs, and fewer than two say nothing"
        )
        del arms[arm]
    _check_data(result)
    return result


def _keys(jobs: Mapping[int, Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(key for job in jobs.values() for key in job))


def _words(job: Mapping[str, str], keys: Sequence[str]) -> str:
    return " ".join(f"{key}={job[key]}" for key in keys if key in job)


def _factor(varied: list[str], jobs: Mapping[int, Mapping[str, str]], factor: str | None) -> tuple[str, list[str]]:
    """Return the factor and its values, in the order of the jobs; raises UserError."""
    candidates = [key for key in varied if key != "seed"]
    there = ", ".join(candidates) or "none"
    if factor is None:
        if len(candidates) != 1:
            raise UserError(f"factor must be named: beside the seed, the sweep varied {there}. Add factor=KEY.")
        factor = candidates[0]
    if factor == "seed":
        raise UserError(f"factor=seed cannot be compared: seeds pair the runs of the arms. Varied beside it: {there}.")
    if factor not in varied:
        raise UserError(f"factor={factor} did not vary in this sweep: those that did are {there}.")
    return factor, list(dict.fromkeys(job.get(factor, "") for job in jobs.values()))


def _check_data(arms: Arms) -> None:
    """Raise UserError if runs were scored on different data."""
    seen: dict[tuple[str, str], str] = {}
    for record in arms.records:
        digest = record.digests.get("test") or record.digests.get("validation") or f"not recorded by {record.name}"
        seen.setdefault((record.tags.get("data", ""), digest), record.name)
    if len(seen) > 1:
        found = "; ".join(f"{data} ({digest}): {name}" for (data, digest), name in seen.items())
        raise UserError(f"The runs were scored on different data and cannot be compared: {found}. Sweep on one data set.")


def _check_validation(arms: Arms) -> None:
    """Raise UserError if the runs of a pair were validated on different images."""
    for arm in arms.others:
        for setting in arms.pairs(arm):
            pair = [arms.runs[name][setting] for name in (arm, arms.baseline)]
            if len({record.digests.get("validation") or record.digests.get("finetune") for record in pair}) > 1:
                names = " and ".join(record.name for record in pair)
                raise UserError(f"metrics: {names} were validated on different images. Compare test/accuracy, or one data split.")


def choose_metrics(arms: Arms, wanted: Sequence[str] | None) -> list[str]:
    """Return the metrics to compare, the wanted or the usual ones; raises UserError on one that a run lacks or has as NaN."""
    there = sorted(set.intersection(*(set(record.metrics) for record in arms.records)))
    if wanted is None:
        judge = "test" if "test/accuracy" in there else "val"
        usual = (f"{judge}/accuracy", f"{judge}/loss", "time/train_seconds", "time/total_seconds", "model/parameters")
        wanted = [metric for metric in usual if metric in there]
        if not wanted:
            raise UserError(f"metrics: not every run has one of {', '.join(usual)}; name some of {', '.join(there) or 'none'}.")
    for metric in wanted:
        if metric not in there:
            raise UserError(f"metrics: not every run has {metric}; what all have is {', '.join(there) or 'nothing'}.")
        broken = [record.name for record in arms.records if not math.isfinite(record.metrics[metric])]
        if broken:
            raise UserError(
                f"metrics: {metric} is not a finite number in {len(broken)} of {len(arms.records)} runs, such as {broken[0]}: "
                f"their mean says nothing. Compare another of {', '.join(there)}, or sweep again without what diverged."
            )
    return list(wanted)


def rows(arms: Arms, metrics: Sequence[str]) -> list[Row]:
    """Return every arm against the baseline in every metric."""
    if any(metric.startswith("val/") for metric in metrics):
        _check_validation(arms)
    result = []
    for metric in metrics:
        compared = []
        for arm in arms.others:
            ours, theirs = (_values(arms, name, arms.pairs(arm), metric) for name in (arm, arms.baseline))
            compared.append(compare(ours, theirs, tests=len(arms.others)))
        by_chance = [math.isnan(pairs.p_t) and (pairs.std or pairs.baseline_std) for pairs in compared]
        p_t = holm([pairs.p_sign_flip if alike else pairs.p_t for pairs, alike in zip(compared, by_chance, strict=True)])
        p_sign_flip = holm([pairs.p_sign_flip for pairs in compared])
        for arm, pairs, p, p_flip in zip(arms.others, compared, p_t, p_sign_flip, strict=True):
            result.append(Row(metric, arm, arms.baseline, pairs, p, p_flip))
    return result


def _values(arms: Arms, arm: str, settings: Sequence[Setting], metric: str) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.array([arms.runs[arm][setting].metrics[metric] for setting in settings])


def amount(metric: str, value: float, *, signed: bool = False, is_difference: bool = False, bare: bool = False) -> str:
    """Return a value of a metric with its unit, or bare: 98.60 %, a difference of 0.21 points, 3.4 s."""
    if not math.isfinite(value):
        return "-"
    sign = "+z" if signed else "z"  # z: what rounds to 0 is 0, not -0
    if metric.endswith("accuracy"):
        number, unit = f"{100 * value:{sign}.2f}", "points" if is_difference else "%"
    elif metric.startswith("time/"):
        number, unit = f"{value:{sign}.2f}", "s"
    else:
        number, unit = f"{value:{sign},.0f}" if metric == "model/parameters" else f"{value:{sign}.3g}", ""
    return number if bare else f"{number} {unit}".rstrip()


def number(value: float, form: str = ".2g") -> str:
    """Return a number without a unit, a dash where there is none."""
    return f"{value:{form}}" if math.isfinite(value) else "-"


def answer(arms: Arms, found: Sequence[Row]) -> str:
    """Return what the first metric says, in one sentence."""
    first = [row for row in found if row.metric == found[0].metric]
    parts = []
    for row in first:
        higher = "higher by" if row.values.difference > 0 else "lower by"
        verdict = f"is {higher}" if row.is_detected else "shows no detectable difference:"
        parts.append(f"{row.arm} {verdict} {row.difference.lstrip('+-') if row.is_detected else row.difference}")
    pairs = " and ".join(dict.fromkeys(f"{row.values.n}" for row in first))
    mean = amount(first[0].metric, first[0].values.baseline_mean)
    about = f"In {first[0].metric}, against {arms.factor}={arms.baseline} ({mean})"
    corrected = f", verdicts corrected for {len(first)} arms" if len(first) > 1 else ""
    return f"{about}: {'; '.join(parts)}; 95 % intervals, n = {pairs} pairs{corrected}."


def unknowns(arms: Arms, found: Sequence[Row]) -> list[str]:
    """Return the smallest difference that each arm's pairs can show in the first metric, and what follows from it.

    How many seeds would show the difference that was seen is not said: to run them and pool all finds differences that are
    none in some 9 % of cases instead of 5 %.
    """
    told, tests = [], len(arms.others)
    level = "level 5 %" if tests == 1 else f"level 5 % over {tests} arms"
    for row in found:
        if row.metric != found[0].metric or row.values.difference_std == 0:
            continue
        shows = amount(row.metric, row.values.shows, is_difference=True)
        told.append(f"{row.arm}: n = {row.values.n} pairs can show differences of {shows} or more (power 80 %, {level}).")
    if told:
        told.append("Seeds that are added after a look at the result need a correction: the intervals hold for one look.")
    return told


def cautions(found: Sequence[Row]) -> list[str]:
    """Return what is to be borne in mind of the metrics compared."""
    timed = any(row.metric.startswith("time/") for row in found)
    return ["Times were taken beside other jobs and in the order of the sweep: they hint, they do not judge."] if timed else []


def differing_params(arms: Arms) -> dict[str, dict[str, str]]:
    """Return the parameters that are not the same in all arms: their values by arm."""
    keys = sorted({key for record in arms.records for key in record.params} - {"seed"})
    table = {
        key: {
            arm: ", ".join(sorted({record.params.get(key, "-") for record in runs.values()})) for arm, runs in arms.runs.items()
        }
        for key in keys
    }
    return {key: by_arm for key, by_arm in table.items() if len(set(by_arm.values())) > 1}
