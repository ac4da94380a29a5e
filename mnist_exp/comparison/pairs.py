"""From a table of runs to a comparison: which runs pair, and the row of each arm at each level."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mnist_exp.comparison.history import image_columns, wrong_images
from mnist_exp.comparison.statistics import Estimate, Look, error_of_look, estimate, image_variance
from mnist_exp.errors import UserError
from mnist_exp.metrics import metric_of
from mnist_exp.tracking.frame import DIGEST, FIRST, FIXED, SEED

EQUAL = ("code", "torch", "precision", "threads")  # columns in which all compared runs must agree
MIN_CURVE = 3  # values of a numeric factor
MEAN = "mean of the levels"
# Columns that are added, with names that no key has.
VALIDATED = "validation images"
VALUE = "compared value"  # the metric, NaN unless the run has finished with a finite value
ROW = "row of the table"  # its position, from 0
USUAL = ("accuracy", "loss")  # the metrics of a split that are compared by default
FURTHER = ("time/train_seconds", "model/parameters")

_Name = tuple[str, str, str]  # arm, baseline and level of a row
Verdict = Literal["higher", "lower", "equivalent", "undecided", "incomplete"]


@dataclass(frozen=True)
class Row:
    """The comparison of an arm with its baseline at one level.

    Args:
        arm: The value of the factor.
        baseline: The value that it is compared with.
        level: The values of all other keys that vary, such as `batch_size=128`; MEAN for the mean over them; empty without any.
        seeds: The number of seeds that the grids give to the arm or the baseline.
        is_complete: Whether both have finished with a finite value for each of these seeds.
        estimate: The difference in the metric, as recorded.
        metric: The metric.
        margin: The smallest difference that matters, as recorded; None without one.
        may_be_equivalent: Whether the verdict can be "equivalent": a mean only if each level is.
    """

    arm: str
    baseline: str
    level: str
    seeds: int
    is_complete: bool
    estimate: Estimate
    metric: str
    margin: float | None
    may_be_equivalent: bool = True

    @property
    def is_exact(self) -> bool:
        """Whether the difference is known without an interval, as that of the number of parameters is."""
        return metric_of(self.metric).is_exact and self.estimate.n > 0 and not self.estimate.difference_std > 0

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the interval, as recorded: those of a point for an exact value, infinite without an interval."""
        if self.is_exact:
            return self.estimate.difference, self.estimate.difference
        return (self.estimate.low, self.estimate.high) if self.estimate.has_interval else (-math.inf, math.inf)

    @property
    def verdict(self) -> Verdict:
        """The verdict, which follows from interval and margin."""
        low, high = self.ends
        if not self.is_complete:
            return "incomplete"
        if low > 0 or high < 0:
            return "higher" if low > 0 else "lower"
        is_inside = high < self.margin and low > -self.margin if self.margin else low == high
        return "equivalent" if is_inside and self.may_be_equivalent else "undecided"

    @property
    def is_doubtful(self) -> bool:
        """Whether the mean of all pairs lies outside of the interval, which an earlier look has narrowed."""
        return self.estimate.has_interval and not self.estimate.low <= self.estimate.difference <= self.estimate.high

    @property
    def exceeds_margin(self) -> bool:
        """Whether the whole interval lies beyond the margin."""
        low, high = self.ends
        return self.margin is not None and (low >= self.margin or high <= -self.margin)


@dataclass(frozen=True)
class Comparison:
    """The answer to the question how the arms of a factor differ.

    Args:
        factor: The key whose values are the arms.
        baseline: The value that the others are compared with.
        metrics: The compared metric, and further ones that are shown.
        runs: The runs by arm, level and seed, the first finished one of each, in the order of the jobs.
        keys: The other keys that vary, the seed aside.
        rows: The comparisons; together, one of their intervals misses the true difference in at most 5 % of studies.
        looks: The number of looks at which a row had two pairs.
        repeated: The number of runs that repeat an earlier one and do not count.
        remarks: Notes on the table of runs.
    """

    factor: str
    baseline: str
    metrics: list[str]
    runs: pd.DataFrame
    keys: list[str]
    rows: list[Row]
    looks: int
    repeated: int
    remarks: Sequence[str]

    @property
    def metric(self) -> str:
        """The compared metric."""
        return self.metrics[0]

    @property
    def has_all_pairs(self) -> bool:
        """Whether arms are also compared with others than the baseline."""
        return any(row.baseline != self.baseline for row in self.rows)

    @property
    def arms(self) -> list[str]:
        """The values of the factor, in the order of the jobs."""
        return list(self.runs[self.factor].unique())

    @property
    def is_numeric(self) -> bool:
        """Whether the factor has enough numbers as values for a curve."""
        numbers = pd.to_numeric(pd.Series(self.arms), errors="coerce")
        return len(numbers) >= MIN_CURVE and bool(np.isfinite(numbers).all())

    def levels(self) -> list[tuple[str, pd.DataFrame]]:
        """Return the runs of each level of the other keys."""
        return _levels(self.runs, self.keys)

    def cells(self) -> list[tuple[str, str, pd.DataFrame]]:
        """Return the finished runs of each arm at each level, as (arm, level, runs), without empty ones."""
        done = self.runs[self.runs["status"] == "FINISHED"]
        found = [(arm, level, here[here[self.factor] == arm]) for arm in self.arms for level, here in _levels(done, self.keys)]
        return [cell for cell in found if len(cell[2])]

    def differences(self, row: Row) -> "pd.Series[float]":
        """Return the difference of each pair of a row at one level, as recorded, by processor and seed."""
        here = dict(self.levels())[row.level].set_index(["processor", SEED])
        arm, baseline = (here.loc[here[self.factor] == name, VALUE] for name in (row.arm, row.baseline))
        return (arm - baseline).dropna()


def varied_keys(runs: pd.DataFrame, metrics: Sequence[str] = ()) -> list[str]:
    """Return the keys that vary, the seed aside: columns without a slash that are neither fixed ones nor named as metrics.

    `data` and `precision` are keys if they come before `seed`, where a table has its keys.
    """
    columns = list(runs)
    keys = {"data", "precision"} & set(columns[: columns.index(SEED)])
    others = [*FIRST, SEED, *(name for name in FIXED if name not in keys), *image_columns(runs), *metrics]
    return [name for name in columns if "/" not in name and name not in others and runs[name].nunique() > 1]


def compare(
    runs: pd.DataFrame,
    factor: str,
    baseline: str | None = None,
    metrics: Sequence[str] | None = None,
    margin: float | None = None,
    *,
    all_pairs: bool = False,
    new_images: bool = False,
    remarks: Sequence[str] = (),
) -> Comparison:
    """Compare the arms of a factor, paired by seed within each level of the other keys.

    Args:
        runs: A table from `tracking.frame.frame` or `tables.read_tables`.
        factor: The key whose values are the arms.
        baseline: The arm to compare with; None selects the first.
        metrics: The metrics, of which the first is compared; None selects the usual ones.
        margin: The smallest difference that matters, as displayed; None for the metric's own.
        all_pairs: Whether to compare all pairs of arms.
        new_images: Whether to estimate the interval for new images, too; the table has the columns of `history.add_mistakes`.
        remarks: Notes on the table.

    Raises:
        UserError: An argument names nothing in the table, or the runs must not be compared.
    """
    metrics = choose_metrics(runs, metrics)
    keys = varied_keys(runs, metrics)
    if factor not in keys:
        raise UserError.invalid("--factor", factor, f"a key that varies, the seed aside: {', '.join(keys) or 'none'}")
    keys.remove(factor)
    kept, repeated = _first_finished(runs, metrics[0], [*keys, SEED, factor])
    arms = list(kept[factor].unique())
    if baseline is not None and baseline not in arms:
        raise UserError.invalid("--baseline", baseline, f"a value of {factor}: {', '.join(arms)}")
    baseline = arms[0] if baseline is None else baseline
    _check(kept, factor, keys, metrics[0])
    others = [arm for arm in arms if arm != baseline]
    wanted = (
        [(arm, other) for other, arm in combinations([baseline, *others], 2)] if all_pairs else [(a, baseline) for a in others]
    )
    kept[ROW] = range(len(kept))
    wrong = wrong_images(kept, kept[VALUE], metrics[0]) if new_images else np.zeros((len(kept), 0), dtype=np.int16)
    tables = [_pair(kept[kept["look"] <= look], factor, keys, wanted, wrong) for look in sorted(kept["look"].unique())]
    seen = [table for table in tables if any(len(pairs.values) > 1 for pairs in table.values())]
    rows = _rows(seen or tables[-1:], metrics[0], margin)
    if not rows:
        problem = f"No other value of {factor} has a job with the same {', '.join(keys)} as {factor}={baseline}."
        remedy = "Choose another --baseline. In a table of your own, a metric has a slash in its name, or --metric names it."
        raise UserError(problem, key="--factor", value=factor, remedy=remedy)
    return Comparison(factor, baseline, metrics, kept, keys, rows, len(seen), repeated, remarks)


def choose_metrics(runs: pd.DataFrame, wanted: Sequence[str] | None, objective: str = "") -> list[str]:
    """Return the metrics to show, the compared one first.

    Args:
        runs: The table.
        wanted: The metrics that the user names, None for the usual ones.
        objective: The metric that decides a sweep, which comes first on the compared split; empty without one.

    Raises:
        UserError: The table has none of them.
    """
    known = [name for name in runs if "/" in name and not name.startswith(DIGEST) and runs[name].notna().any()]
    listed = ", ".join(known)
    if wanted is not None:
        for name in wanted:
            if name not in runs or not pd.api.types.is_float_dtype(runs[name]):
                raise UserError.invalid("--metric", name, f"a metric of the runs: {listed or 'none'}")
        return list(wanted)
    if not known:
        raise UserError("Nothing can be compared: no run has a metric.", remedy="Finish the sweep with sweep.resume=latest.")
    split = next((split for split in ("test/", "val/") if any(name.startswith(split) for name in known)), "")
    own = [name for name in known if name.startswith(split)] if split or len(known) == 1 else []
    if not own:
        raise UserError(f"--metric is missing: expected one of {listed}.", key="--metric", remedy="Add --metric NAME.")
    usual = [split + name for name in dict.fromkeys([objective.rpartition("/")[2], *USUAL]) if split + name in own]
    return [*(usual or own[:1]), *(name for name in FURTHER if name in known and name not in own)]


def has_value(runs: pd.DataFrame, metric: str) -> "pd.Series[bool]":
    """Return whether each run has finished with a finite value of a metric."""
    return (runs["status"] == "FINISHED") & np.isfinite(runs[metric])


def _first_finished(runs: pd.DataFrame, metric: str, index: list[str]) -> tuple[pd.DataFrame, int]:
    """Return one row for each arm, level and seed, with the column VALUE, and the number of rows that are left out.

    Of several, the first one with a value counts, at the first look of all: the result of a look must not change later, and runs
    that are repeated because others failed fill the look that lacked them.
    """
    valid = has_value(runs, metric)
    looks = runs.groupby(index, sort=False)["look"].transform("min")
    valued = runs.assign(**{VALUE: runs[metric].where(valid), "look": looks})
    kept = valued.iloc[np.argsort(~valid, kind="stable")].drop_duplicates(index).sort_index()
    return kept, len(runs) - len(kept)


def _check(runs: pd.DataFrame, factor: str, keys: list[str], metric: str) -> None:
    """Raise UserError if runs differ in more than the factor, the other keys and the seed."""
    done = runs[runs["status"] == "FINISHED"]
    per_seed = [SEED, *keys]
    checks: list[tuple[str, list[str], str]]
    checks = [(name, [], "Repeat the runs of one of them.") for name in EQUAL if name not in (factor, *keys)]
    checks += [("data", keys, "Sweep on one data set."), (DIGEST + "test", keys, "Sweep on one data set.")]
    checks += [
        ("digest", [factor, *keys], "Compare sweeps that share the other settings; `runs diff` shows how two runs differ.")
    ]
    if metric.startswith("val/"):
        validated = [done.get(DIGEST + split, pd.Series("", done.index)) for split in ("validation", "finetune")]
        done = done.assign(**{VALIDATED: validated[0].where(validated[0] != "", validated[1])})
        checks.append((VALIDATED, per_seed, "Compare test/accuracy, or sweep with one data split."))
    if factor.partition(".")[0] != "data":
        trained = [name for name in done if name.startswith(DIGEST) and name not in (DIGEST + "test", DIGEST + "validation")]
        checks += [(name, per_seed, "Sweep with one data split.") for name in trained]
    for column, by, remedy in checks:
        if column != factor and column in done:
            _require_one_value(done, column, by, factor, remedy)


def _require_one_value(runs: pd.DataFrame, column: str, by: list[str], factor: str, remedy: str) -> None:
    """Raise UserError unless a column has one value in each group of `by`; an empty one counts as equal to all."""
    known = runs[runs[column] != ""]
    for _, group in known.groupby(by, sort=False) if by else [("", known)]:
        different = group.drop_duplicates(column)
        if len(different) > 1:
            names = (f"{factor}={run[factor]} seed={run[SEED]} {run['run']}".rstrip() for _, run in different.iterrows())
            found = "; ".join(f"{value} in {name}" for value, name in zip(different[column], names, strict=True))
            raise UserError(f"The runs differ in {column} and cannot be compared: {found}.", key=column, remedy=remedy)


@dataclass(frozen=True)
class _Pairs:
    """The pairs of an arm and its baseline.

    Args:
        values: The values of each pair, in the columns `arm` and `baseline`, by seed.
        differences: [the baseline is wrong] - [the arm is wrong] of each pair, by seed and image; no columns if unknown.
        planned: The number of seeds that the grids give to the arm or the baseline.
        is_complete: Whether both have a value for each of these seeds.
        levels: The levels whose values these are, or are the means of.
    """

    values: pd.DataFrame
    differences: pd.DataFrame
    planned: int
    is_complete: bool
    levels: tuple[str, ...]

    def look(self, alpha: float) -> Look:
        """Return the pairs as a look, at a probability of an error."""
        arm, baseline = self.values.to_numpy().T
        known = min(self.differences.shape) > 1
        return Look(arm, baseline, alpha, image_variance(self.differences.to_numpy()) if known else None)


def _levels(runs: pd.DataFrame, keys: list[str]) -> list[tuple[str, pd.DataFrame]]:
    if not keys:
        return [("", runs)]
    groups = runs.groupby(keys, sort=False)
    return [(" ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True)), here) for values, here in groups]


def _pair(
    runs: pd.DataFrame,
    factor: str,
    keys: list[str],
    wanted: Sequence[tuple[str, str]],
    wrong: NDArray[np.int16],
) -> dict[_Name, _Pairs]:
    """Return the pairs of each arm and its baseline by level: runs of one seed, on one processor.

    Args:
        runs: The runs of a look.
        factor: The key whose values are the arms.
        keys: The other keys.
        wanted: The arms to compare, each with its baseline.
        wrong: From `wrong_images`, by ROW; without images, the pairs have no differences on them.
    """
    found = {}
    levels = {
        level: {arm: own.set_index(SEED) for arm, own in here.groupby(factor)} for level, here in _levels(runs, keys)
    }  # the runs of each arm at each level, by seed
    for arm, baseline in wanted:
        own = []
        for level, cells in levels.items():
            if arm in cells and baseline in cells:
                values = pd.concat({"arm": cells[arm][VALUE], "baseline": cells[baseline][VALUE]}, axis=1).sort_index()
                is_valid = values.notna().all(axis=1)
                is_paired = is_valid & cells[arm]["processor"].eq(cells[baseline]["processor"])
                paired = values.loc[is_paired]
                arm_wrong, baseline_wrong = (wrong[cells[name].loc[paired.index, ROW]] for name in (arm, baseline))
                differences = pd.DataFrame(baseline_wrong - arm_wrong, paired.index)
                own.append(_Pairs(paired, differences, len(values), bool(is_valid.all()), (level,)))
                found[arm, baseline, level] = own[-1]
        if len(own) == len(levels) > 1 and all(pairs.is_complete for pairs in own):
            mean, differences = _mean([pairs.values for pairs in own]), _mean([pairs.differences for pairs in own])
            if len(mean):
                found[arm, baseline, MEAN] = _Pairs(mean, differences, len(mean), is_complete=True, levels=tuple(levels))
    return found


def _mean(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the mean of the tables of all levels, of the seeds that all have."""
    return (reduce(pd.DataFrame.add, tables) / len(tables)).dropna()


def _rows(looks: Sequence[dict[_Name, _Pairs]], metric: str, margin: float | None) -> list[Row]:
    """Return the rows of a table.

    Args:
        looks: The pairs at each look, those of the table last.
        metric: The compared metric.
        margin: As in `compare`.
    """
    shown = metric_of(metric).margin if margin is None else margin
    smallest = None if shown is None else shown / metric_of(metric).scale
    rows: list[Row] = []
    for (arm, baseline, level), pairs in looks[-1].items():
        history = []
        for number, table in enumerate(looks, start=1):
            then = table.get((arm, baseline, level))
            if then and then.levels == pairs.levels:  # the mean over other levels is another quantity
                history.append(then.look(error_of_look(number) / len(table)))
        levels = [row for row in rows if (row.arm, row.baseline) == (arm, baseline)]
        may_be_equivalent = level != MEAN or all(row.verdict == "equivalent" for row in levels)
        rows.append(
            Row(
                arm=arm,
                baseline=baseline,
                level=level,
                seeds=pairs.planned,
                is_complete=pairs.is_complete,
                estimate=estimate(history),
                metric=metric,
                margin=smallest,
                may_be_equivalent=may_be_equivalent,
            )
        )
    return rows
