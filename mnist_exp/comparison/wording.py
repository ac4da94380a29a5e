"""A comparison in words: the headline, the notes below it, the table of numbers, and the format of each number."""

import math
from collections.abc import Sequence

from mnist_exp.comparison.arms import Arms, Row
from mnist_exp.metrics import format_metric, metric_of

COLUMNS = ("metric", "arm", "n", "mean (sd)", "difference (95 %)", "p: t / flip", "effect", "differs")


def _format_number(value: float, form: str = ".2g") -> str:
    return f"{value:{form}}" if math.isfinite(value) else "-"


def format_difference(row: Row) -> str:
    """Return a difference with its interval: +0.21 points (+0.10 to +0.32)."""
    difference = format_metric(row.metric, row.values.difference, signed=True, is_difference=True)
    if row.values.difference_std == 0:
        return f"{difference} ({'always' if row.is_fixed else 'in all pairs, no interval'})"
    low, high = (
        format_metric(row.metric, end, signed=True, bare=True) for end in (row.values.interval.low, row.values.interval.high)
    )
    return f"{difference} ({low} to {high})"


def _verdict(row: Row) -> str:
    if not row.is_detected:
        return "not detected"
    return "indicative" if metric_of(row.metric).is_measured_time else "yes"


def headline(arms: Arms, rows: Sequence[Row]) -> str:
    """Return the result in the first metric as one sentence."""
    first = [row for row in rows if row.metric == rows[0].metric]
    parts = []
    for row in first:
        higher = "higher by" if row.values.difference > 0 else "lower by"
        verdict = f"is {higher}" if row.is_detected else "shows no detectable difference:"
        difference = format_difference(row)
        parts.append(f"{row.arm} {verdict} {difference.lstrip('+-') if row.is_detected else difference}")
    pairs = " and ".join(dict.fromkeys(f"{row.values.n}" for row in first))
    mean = format_metric(first[0].metric, first[0].values.baseline_mean)
    about = f"In {first[0].metric}, against {arms.factor}={arms.baseline} ({mean})"
    corrected = f", verdicts corrected for {len(first)} arms" if len(first) > 1 else ""
    return f"{about}: {'; '.join(parts)}; 95 % intervals, n = {pairs} pairs{corrected}."


def power_notes(arms: Arms, rows: Sequence[Row]) -> list[str]:
    """Return the minimum detectable effect of each arm in the first metric, and a warning about adding seeds.

    The notes name no number of seeds that would detect the observed difference: running them and pooling all runs finds a
    difference where none exists in about 9 % of cases instead of 5 %.
    """
    tests = len(arms.others)
    level = "level 5 %" if tests == 1 else f"level 5 % over {tests} arms"
    texts = []
    for row in rows:
        if row.metric == rows[0].metric and row.values.difference_std != 0:
            effect = format_metric(row.metric, row.values.min_detectable_effect, is_difference=True)
            texts.append(f"{row.arm}: minimum detectable effect {effect} at n = {row.values.n} pairs (power 80 %, {level}).")
    if texts:
        texts.append("Adding seeds after a look at the result requires a correction: the intervals are valid for one look.")
    return texts


def caveats(rows: Sequence[Row]) -> list[str]:
    """Return the limits of the compared metrics."""
    timed = any(metric_of(row.metric).is_measured_time for row in rows)
    return ["Times were measured under load and in the order of the sweep; treat them as indicative."] if timed else []


def notes(arms: Arms, rows: Sequence[Row]) -> list[str]:
    """Return the notes below the headline: power, caveats, and the runs that are left out."""
    return [*power_notes(arms, rows), *caveats(rows), *arms.flags]


def table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return the comparisons as table rows: for each metric the baseline, then every arm."""
    lines: list[tuple[str, ...]] = []
    previous: tuple[str, int, float] | None = None
    for row in rows:
        values, n = row.values, str(row.values.n)
        baseline = (row.metric, values.n, values.baseline_mean)
        if baseline != previous:  # an arm may have fewer pairs than another
            mean = _format_mean(row.metric, values.baseline_mean, values.baseline_std)
            lines.append((row.metric, row.baseline, n, mean, "", "", "", ""))
        previous = baseline
        mean = _format_mean(row.metric, values.mean, values.std)
        p = f"{_format_number(row.p_t)} / {_format_number(row.p_sign_flip)}"
        effect = _format_number(values.effect_size, "+.2f")
        lines.append(("", row.arm, n, mean, format_difference(row), p, effect, _verdict(row)))
    return [dict(zip(COLUMNS, line, strict=True)) for line in lines]


def _format_mean(metric: str, mean: float, std: float) -> str:
    return f"{format_metric(metric, mean)} ({format_metric(metric, std, bare=True)})"
