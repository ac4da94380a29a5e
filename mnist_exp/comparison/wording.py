"""A comparison in words: the headline, the notes below it, the table of numbers, and the format of each number."""

import math
from collections.abc import Sequence

from mnist_exp.comparison.arms import Arms, Level, Row
from mnist_exp.comparison.statistics import ALPHA, pairs_for_equivalence, pairs_needed
from mnist_exp.metrics import format_metric, metric_of

COLUMNS = ("metric", "arm", "n", "mean (sd)", "difference (95 %)", "p", "effect", "verdict")
MOST_PAIRS = 100_000  # nobody runs more


def _format_number(value: float, form: str = ".2g") -> str:
    return f"{value:{form}}" if math.isfinite(value) else "-"


def format_difference(row: Row) -> str:
    """Return a difference with its interval: +0.21 points (+0.10 to +0.32)."""
    difference = format_metric(row.metric, row.values.difference, signed=True, is_difference=True)
    if row.values.difference_std == 0:
        return f"{difference} ({'always' if row.is_fixed else 'in all pairs, no interval'})"
    if not row.values.interval.is_finite:
        return f"{difference} (too few pairs for an interval)"
    low, high = (
        format_metric(row.metric, end, signed=True, bare=True) for end in (row.values.interval.low, row.values.interval.high)
    )
    return f"{difference} ({low} to {high})"


def format_margin(row: Row) -> str:
    """Return the margin of a row as displayed: 0.05 points; empty without one."""
    return "" if row.margin is None else format_metric(row.metric, row.margin, is_difference=True)


def describe_verdict(row: Row) -> str:
    """Return the verdict in words: higher, by less than the margin."""
    verdict = row.verdict
    if verdict in ("higher", "lower") and metric_of(row.metric).is_measured_time:
        return f"{verdict} (indicative)"
    if verdict not in ("higher", "lower") or row.margin is None or row.is_fixed:
        return verdict
    near, far = sorted((abs(row.values.interval.low), abs(row.values.interval.high)))
    if near >= row.margin:
        return f"{verdict} by more than the margin"
    return f"{verdict}, by less than the margin" if far <= row.margin else verdict


def headline(arms: Arms, rows: Sequence[Row]) -> str:
    """Return the result in the first metric as one sentence."""
    first = [row for row in rows if row.metric == rows[0].metric]
    parts = [_result(row) for row in first]
    pairs = " and ".join(dict.fromkeys(f"{row.values.n}" for row in first))
    mean = format_metric(first[0].metric, first[0].values.baseline_mean)
    about = f"In {first[0].metric}, against {arms.factor}={arms.baseline} ({mean})"
    margin = f", margin {format_margin(first[0])}" if first[0].margin is not None else ""
    corrected = f" over {len(first)} arms" if len(first) > 1 else ""
    return f"{about}: {'; '.join(parts)}; 95 % intervals{corrected}, n = {pairs} seeds{margin}."


def _result(row: Row) -> str:
    verdict = describe_verdict(row)
    return f"{row.arm} {'undecided' if verdict == 'undecided' else f'is {verdict}'}: {format_difference(row)}"


def power_notes(arms: Arms, rows: Sequence[Row]) -> list[str]:
    """Return what the number of seeds can show in the first metric, from its spread and margin.

    Nothing here depends on the observed difference: seeds chosen by it find differences where none exist more often than 5 %.
    """
    tests = len(arms.others)
    level = "level 5 %" if tests == 1 else f"level 5 % over {tests} arms"
    texts = []
    for row in rows:
        if row.metric != rows[0].metric or row.values.difference_std == 0:
            continue
        spread = row.values.difference_std
        effect = format_metric(row.metric, row.values.min_detectable_effect, is_difference=True)
        first = "" if arms.seeds_known else "if all seeds had been defined before the first job, "
        text = f"{row.arm}: {first}{row.values.n} seeds detect a difference of {effect} (power 80 %, {level})."
        if row.margin is not None and row.margin > spread / math.sqrt(MOST_PAIRS):
            detect = pairs_needed(row.margin, spread, tests)
            equal = pairs_for_equivalence(row.margin, spread, ALPHA / tests)
            text += f" {detect:,} seeds detect the margin; {equal:,} show equivalence if there is no difference"
            text += "."
        texts.append(text if arms.seeds_known else f"{text} This wider interval needs more seeds.")
    return texts


def level_notes(levels: Sequence[Level], metric: str) -> list[str]:
    """Return the differences of each arm by the level of another key, with a warning if they depend on it."""
    notes = []
    for arm, key, differs in dict.fromkeys((level.arm, level.key, level.differs) for level in levels):
        shown = [
            f"{level.level}: {format_metric(metric, level.difference, signed=True, is_difference=True)}"
            for level in levels
            if (level.arm, level.key) == (arm, key)
        ]
        warning = ": it depends on it more than chance explains" if differs else ""
        notes.append(f"The difference of {arm} by {key}{warning}: {', '.join(shown)}.")
    return notes


def caveats(rows: Sequence[Row]) -> list[str]:
    """Return the limits of the compared metrics."""
    timed = any(metric_of(row.metric).is_measured_time for row in rows)
    return ["Times were measured under load and in the order of the sweep; treat them as indicative."] if timed else []


def notes(arms: Arms, rows: Sequence[Row], levels: Sequence[Level]) -> list[str]:
    """Return the notes below the headline: kind of interval, power, levels, caveats, and the runs that are left out."""
    metric = rows[0].metric
    intervals = [arms.seeds_reason, *power_notes(arms, rows)]
    return [*intervals, *level_notes(levels, metric), *caveats(rows), *arms.flags]


def table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return the comparisons as table rows: for each metric the baseline, then every arm."""
    lines: list[tuple[str, ...]] = []
    previous: tuple[str, int, float] | None = None
    for row in rows:
        values, n = row.values, str(row.values.n)
        baseline = (row.metric, values.n, values.baseline_mean)
        if baseline != previous:  # an arm may have fewer seeds than another
            mean = _format_mean(row.metric, values.baseline_mean, values.baseline_std)
            lines.append((row.metric, row.baseline, n, mean, "", "", "", ""))
        previous = baseline
        mean = _format_mean(row.metric, values.mean, values.std)
        effect = _format_number(values.effect_size, "+.2f")
        p = _format_number(values.p)
        lines.append(("", row.arm, n, mean, format_difference(row), p, effect, describe_verdict(row)))
    return [dict(zip(COLUMNS, line, strict=True)) for line in lines]


def _format_mean(metric: str, mean: float, std: float) -> str:
    return f"{format_metric(metric, mean)} ({format_metric(metric, std, bare=True)})"
