"""A comparison in words: its title, its tables, and the notes without which they would mislead."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import get_args

import numpy as np

from mnist_exp.comparison.pairs import MEAN, MIN_CURVE, VALUE, Comparison, Row, Verdict
from mnist_exp.comparison.statistics import (
    CONFIDENCE,
    MAX_PAIRS,
    POWER,
    ROUNDING,
    error_of_look,
    pairs_to_detect,
    slope,
    upper_std,
    welch,
)
from mnist_exp.metrics import format_metric, metric_of
from mnist_exp.overrides import command
from mnist_exp.tracking.frame import SEED

MAX_NAMED = 3  # arms that a title names; more are counted
VERDICTS = get_args(Verdict)
MIN_PILOT = 5  # pairs whose spread is a basis for planning


def describe_verdict(row: Row) -> str:
    """Return the verdict in words: higher by more than the margin."""
    by_more = " by more than the margin" if row.verdict in ("higher", "lower") and row.exceeds_margin else ""
    return f"{row.verdict}{by_more}{', but doubtful' if row.is_doubtful and row.is_complete else ''}"


def format_difference(row: Row) -> str:
    """Return a difference with its interval: +0.21 points (+0.10 to +0.32), or with the reason why it has none."""
    found = row.estimate
    difference = format_metric(row.metric, found.difference, signed=True, is_difference=True)
    if row.is_exact:
        return f"{difference} (exact)"
    if found.n < 2 and row.is_complete:
        return f"{difference} ({_count_of(2 - found.n, 'more pair')} needed for an interval)"
    if found.n < 2:
        return difference
    if found.has_interval:
        return f"{difference} ({_interval(row, found.low, found.high)})"
    return (
        f"{difference} ({'the same in all pairs: no interval' if math.isinf(found.low) else 'the looks contradict each other'})"
    )


def _interval(row: Row, low: float, high: float) -> str:
    """Return an interval without its unit: +0.10 to +0.32. An end is never shown as 0, because its sign decides the verdict."""
    ends = [format_metric(row.metric, end, signed=True, bare=True, keep_sign=True) for end in (low, high)]
    return " to ".join(ends)


def format_margin(row: Row) -> str:
    """Return the margin of a row as displayed: 0.05 points; empty without one."""
    return "" if row.margin is None else format_metric(row.metric, row.margin, is_difference=True)


def label(row: Row) -> str:
    """Return the name of a row: se_cnn, or se_cnn at batch_size=128."""
    return f"{row.arm} at {row.level}" if row.level else row.arm


def subtitle(comparison: Comparison) -> str:
    """Return the metric, the baseline and the margin."""
    factor, margin = comparison.factor, format_margin(comparison.rows[0])
    against = f"all pairs of {factor}" if comparison.has_all_pairs else f"against {factor}={comparison.baseline}"
    return f"{comparison.metric}, {against}" + (f"; margin {margin}" if margin else "")


def title(comparison: Comparison) -> str:
    """Return the verdicts in one line; the mean of the levels is no part of it."""
    rows = [row for row in comparison.rows if row.level != MEAN]
    factor, baseline = comparison.factor, comparison.baseline
    if max(row.seeds for row in rows) < 2 and not any(row.is_exact for row in rows):
        return f"No verdict on {factor} yet: an interval needs two seeds"
    if comparison.has_all_pairs:
        return f"Of {len(rows)} comparisons of {factor}, {_count(rows)}"
    if all(row.verdict == "undecided" for row in rows):
        return f"Undecided: no {factor} is clearly better than {baseline}"
    arms = list(dict.fromkeys(row.arm for row in rows))
    if len(arms) > MAX_NAMED:
        return f"Of {len(rows)} comparisons with {factor}={baseline}, {_count(rows)}"
    by_arm = [[row for row in rows if row.arm == arm] for arm in arms]
    by_arm.sort(key=lambda own: min(VERDICTS.index(row.verdict) for row in own))
    return "; ".join(_of_arm(own, comparison.keys) for own in by_arm)


def _count(rows: Sequence[Row]) -> str:
    counts = Counter(row.verdict for row in rows)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts)


def _of_arm(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Return the verdicts on one arm: se_cnn is higher than plain_cnn at 2 of 6 batch sizes, undecided at 4."""
    arm, baseline, counts = rows[0].arm, rows[0].baseline, Counter(row.verdict for row in rows)
    first, *rest = (verdict for verdict in VERDICTS if verdict in counts)
    than = {"higher": f" than {baseline}", "lower": f" than {baseline}", "equivalent": f" to {baseline}"}.get(first, "")
    text = f"{arm} is {first}{than}"
    if not rows[0].level:
        pairs = f" ({rows[0].estimate.n} of {rows[0].seeds} pairs)" if first == "incomplete" else ""
        return f"{text}{describe_verdict(rows[0]).removeprefix(first)}{pairs}"
    is_regular = len(keys) == 1 and re.fullmatch(r"\w+[^\Was_]", keys[0])
    levels = f"{keys[0].replace('_', ' ')}s" if is_regular else "settings"
    others = [f", {verdict} at {counts[verdict]}" for verdict in rest]
    others += [f"; {doubtful} of these verdicts doubtful"] if (doubtful := sum(row.is_doubtful for row in rows)) else []
    return f"{text} at {counts[first]} of {len(rows)} {levels}{''.join(others)}"


def differences_table(comparison: Comparison) -> list[dict[str, str]]:
    """Return the rows of the comparison as those of a table."""
    key = comparison.keys[0] if len(comparison.keys) == 1 else ""
    level = _heading(key) if key else "level"
    images = any(row.estimate.new_images for row in comparison.rows)
    return [
        {
            _heading(comparison.factor): f"{row.arm} against {row.baseline}" if comparison.has_all_pairs else row.arm,
            "verdict": describe_verdict(row),
            **({level: row.level.removeprefix(f"{key}=")} if comparison.keys else {}),
            "n": str(row.estimate.n) if row.is_complete else f"{row.estimate.n} of {row.seeds} pairs",
            "difference (95 %)": format_difference(row),
            **({"new images (95 %)": _interval(row, *ends) if (ends := row.estimate.new_images) else ""} if images else {}),
            "p": f"{row.estimate.p:.2g}" if row.is_complete and row.estimate.has_interval else "",
        }
        for row in comparison.rows
    ]


def _heading(key: str) -> str:
    """Return the heading of a key's column, which is none of the other columns'."""
    return f"{key}=" if key in ("verdict", "level", "n", "p", "runs") else key


def means_table(comparison: Comparison) -> list[dict[str, str]]:
    """Return the mean of each metric over the finished runs of each arm at each level, with the standard deviation."""
    lines = []
    for _, _, runs in comparison.cells():
        line = {_heading(key): str(runs[key].iloc[0]) for key in (comparison.factor, *comparison.keys)}
        line["runs"] = str(len(runs))
        for metric in comparison.metrics:
            std = runs[metric].std()
            spread = "" if math.isnan(std) or metric_of(metric).is_exact else f" ({format_metric(metric, std, bare=True)})"
            line[metric] = format_metric(metric, runs[metric].mean()) + spread
        lines.append(line)
    return lines


def notes(comparison: Comparison) -> list[str]:
    """Return the sentences without which the numbers would mislead, the most important first."""
    found = [*_causes(comparison), *_doubts(comparison.rows), *_gaps(comparison)]
    if needed := seeds_needed(comparison):
        found.append(needed[1])
    if comparison.looks:
        together = f"{_count_of(len(comparison.rows), 'row')} and {_count_of(comparison.looks, 'look')}"
        found.append(f"A pair (n) is two runs with the same seed. The 95 % intervals hold together, for {together}.")
    if any(row.estimate.new_images for row in comparison.rows):
        found.append(
            "New images: the interval for other images of the same kind. It takes the images to be independent: where they come "
            "in groups, as MNIST's do by writer, it is probably too narrow."
        )
    found += [*_slopes(comparison), *_processors(comparison)]
    if any(row.level == MEAN for row in comparison.rows):
        found.append(f"The {MEAN} hides how they differ: read it with the rows above it.")
    if comparison.repeated:
        found.append(
            f"Left out, because they repeat others: {_count_of(comparison.repeated, 'run')} with the same settings and seed."
        )
    if any(metric_of(name).is_measured_time for name in comparison.metrics):
        found.append("Times were measured under load.")
    return [*found, *comparison.remarks]


def _count_of(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _causes(comparison: Comparison) -> Iterator[str]:
    """Yield the reasons why rows are incomplete, counted in each arm."""
    factor, metric = comparison.factor, comparison.metric
    for level, runs in comparison.levels():
        rows = [row for row in comparison.rows if row.level == level and not row.is_complete]
        arms = list(dict.fromkeys(arm for row in rows for arm in (row.arm, row.baseline)))
        here = runs[runs[factor].isin(arms)]
        seeds = here[SEED].nunique()
        without = here[here[VALUE].isna()]
        ended = without["status"] == "FINISHED"
        diverged = (without["status"] == "DIVERGED") | (ended & without[metric].notna())
        unfinished = without[~ended & ~diverged]
        resume = [command("run", "-m", f"sweep.resume={name}") for name in unfinished["sweep"].unique() if name]
        causes = {
            "diverged": Counter(without[factor][diverged]),
            f"have no {metric}": Counter(without[factor][ended & ~diverged]),
            "did not finish": Counter(unfinished[factor]),
            "have no job": Counter({arm: seeds - int((here[factor] == arm).sum()) for arm in arms}),
        }
        for verb, counts in causes.items():
            if any(counts.values()):
                first, *others = sorted(arms, key=lambda arm: -counts[arm])
                text = f"{counts[first]} of {seeds} seeds of {first} {verb}"
                text += "".join(f", {counts[arm]} of {seeds} of {arm}" for arm in others)
                remedy = "".join(f" `{line}`" for line in resume) if verb == "did not finish" else ""
                yield f"{f'At {level}, ' if level else ''}{text}.{remedy}"


def _gaps(comparison: Comparison) -> Iterator[str]:
    """Yield the arms and levels that have no row."""
    shown = {(row.arm, row.level) for row in comparison.rows}
    levels = [level for level, _ in comparison.levels()]
    for arm in (arm for arm in comparison.arms if arm != comparison.baseline):
        if apart := [level for level in levels if (arm, level) not in shown]:
            yield f"No row compares {arm} with {comparison.baseline} at {', '.join(apart)}: one of them has no jobs there."


def _doubts(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what is unusual about the pairs and the interval of a row."""
    for row in rows:
        found = row.estimate
        if row.is_complete and found.n < row.seeds:
            yield f"{label(row)}: {row.seeds - found.n} of {row.seeds} pairs ran on two processors and do not count."
        if found.low > found.high:
            yield f"{label(row)}: the intervals of the looks do not overlap: later seeds contradict earlier ones."
        elif row.is_doubtful:
            yield (
                f"{label(row)}: doubtful, because the mean of all {found.n} pairs lies outside of the interval. "
                "An earlier look has narrowed it, and later seeds do not confirm that look."
            )


def _slopes(comparison: Comparison) -> Iterator[str]:
    """Yield the slope of the error rate against a numeric factor, at each level without a missing run."""
    if not (comparison.is_numeric and comparison.metric.rpartition("/")[2] == "accuracy"):
        return
    for level, runs in comparison.levels():
        rates = 1 - runs.pivot(index=["processor", SEED], columns=comparison.factor, values=VALUE)
        sizes = rates.columns.to_numpy(float)
        if len(rates) > 1 and len(sizes) >= MIN_CURVE and (sizes > 0).all() and (rates > 0).all(axis=None):
            mean, low, high = slope(np.log2(sizes), np.log2(rates.to_numpy()))
            start = f"At {level}, a" if level else "A"
            yield (
                f"{start} straight line through log2(error rate) against log2({comparison.factor}) has "
                f"the slope {mean:.3f} ({low:.3f} to {high:.3f}; one slope per seed, n = {len(rates)}, 95 % t interval for "
                "this level alone). It does not show whether the curve is straight."
            )


def _processors(comparison: Comparison) -> Iterator[str]:
    """Yield how the mean differences on two processors differ, for each row at one level."""
    for row in (row for row in comparison.rows if row.level != MEAN):
        by_processor = comparison.differences(row).groupby("processor")
        groups = {name: values.to_numpy() for name, values in by_processor if name and len(values) > 1}
        for (one, first), (other, second) in combinations(groups.items(), 2):
            if first.std() + second.std() > ROUNDING:
                mean, low, high = welch(first, second)
                difference = format_metric(row.metric, mean, signed=True, is_difference=True)
                yield (
                    f"{label(row)} minus {row.baseline} on {one} (n = {len(first)}), less the same on {other} "
                    f"(n = {len(second)}): {difference} ({_interval(row, low, high)}; Welch's 95 % t interval, "
                    "for this row alone)."
                )


def seeds_needed(comparison: Comparison) -> tuple[int | None, str] | None:
    """Return the number of seeds that detect the margin in the undecided row with the largest spread, and a sentence about it.

    The number depends on the spread and the margin, never on the observed difference: seeds that are chosen by that find
    differences where none exist in more than 5 % of studies. It is None above MAX_PAIRS, and without a margin.
    """
    undecided = [row for row in comparison.rows if row.verdict == "undecided" and row.level != MEAN]
    if not undecided:
        return None
    row = max(undecided, key=lambda row: row.estimate.difference_std)
    n, std = row.estimate.n, row.estimate.difference_std
    if row.margin is None:
        return None, "To plan the number of seeds, name the smallest difference that matters: --margin."
    if min(row.estimate.n for row in undecided) < MIN_PILOT:
        return MIN_PILOT, f"Run at least {MIN_PILOT} seeds to plan."
    if std == 0:  # the same difference in all pairs: there is no spread to plan from
        return None
    alpha = error_of_look(comparison.looks + 1) / len(comparison.rows)
    number, upper = (pairs_to_detect(row.margin, spread, alpha) for spread in (std, upper_std(std, n)))
    if number is not None and number <= n:
        return None
    seeds, most = (f"more than {MAX_PAIRS:,}" if count is None else f"{count:,}" for count in (number, upper))
    bound = "" if number is None else f" (at most {most}, {CONFIDENCE * 100:.0f} % confidence)"
    power = f"with {POWER * 100:.0f} % power"
    return number, f"{label(row)}: {seeds} seeds{bound} detect a difference of {format_margin(row)} at the next look, {power}."
