"""A comparison in words: its title, its tables, and the notes without which they would mislead."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import get_args

from mnist_exp.comparison.pairs import MEAN, VALUE, Comparison, Row, Verdict, has_diverged
from mnist_exp.comparison.statistics import CONFIDENCE, MAX_PAIRS, POWER, pairs_for_equivalence, pairs_to_detect, upper_std
from mnist_exp.metrics import format_metric, metric_of
from mnist_exp.overrides import command
from mnist_exp.tracking.frame import SEED

MAX_NAMED = 3  # arms that a title names; more are counted
VERDICTS = get_args(Verdict)
MIN_PILOT = 5  # pairs whose spread is a basis for planning


def describe_verdict(row: Row) -> str:
    """Return the verdict in words: higher by more than the margin."""
    return f"{row.verdict} by more than the margin" if row.verdict in ("higher", "lower") and row.exceeds_margin else row.verdict


def format_difference(row: Row) -> str:
    """Return a difference with its interval: +0.21 points (+0.10 to +0.32), or with the reason why it has none."""
    found = row.estimate
    if not found.n:
        return "- (2 more pairs give an interval)"
    difference = format_metric(row.metric, found.difference, signed=True, is_difference=True)
    if row.is_exact:
        return f"{difference} (exact)"
    if found.n == 1:
        return f"{difference} (1 more pair gives an interval)"
    if found.has_interval:
        low, high = (format_metric(row.metric, end, signed=True, bare=True) for end in (found.low, found.high))
        return f"{difference} ({low} to {high})"
    return (
        f"{difference} ({'the same in all pairs: no interval' if math.isinf(found.low) else 'the looks contradict each other'})"
    )


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
    if not any(row.estimate.n > 1 for row in rows):
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
        return text + (" by more than the margin" if rows[0].exceeds_margin and than else pairs)
    levels = f"{keys[0].replace('_', ' ')}s" if len(keys) == 1 and "." not in keys[0] else "settings"
    others = (f", {verdict} at {counts[verdict]}" for verdict in rest)
    return f"{text} at {counts[first]} of {len(rows)} {levels}{''.join(others)}"


def differences_table(comparison: Comparison) -> list[dict[str, str]]:
    """Return the rows of the comparison as those of a table."""
    level = comparison.keys[0] if len(comparison.keys) == 1 else "level"
    return [
        {
            comparison.factor: f"{row.arm} against {row.baseline}" if comparison.has_all_pairs else row.arm,
            "verdict": describe_verdict(row),
            **({level: row.level.removeprefix(f"{level}=")} if comparison.keys else {}),
            "n": str(row.estimate.n) if row.is_complete else f"{row.estimate.n} of {row.seeds} pairs",
            "difference (95 %)": format_difference(row),
            "p": f"{row.estimate.p:.2g}" if row.is_complete and math.isfinite(row.estimate.p) else "",
        }
        for row in comparison.rows
    ]


def means_table(comparison: Comparison) -> list[dict[str, str]]:
    """Return the mean of each metric over the finished runs of each arm at each level, with the standard deviation."""
    lines = []
    for _, _, runs in comparison.cells():
        line = {key: str(runs[key].iloc[0]) for key in (comparison.factor, *comparison.keys)} | {"runs": str(len(runs))}
        for metric in comparison.metrics:
            std = runs[metric].std()
            spread = "" if math.isnan(std) or metric_of(metric).is_exact else f" ({format_metric(metric, std, bare=True)})"
            line[metric] = format_metric(metric, runs[metric].mean()) + spread
        lines.append(line)
    return lines


def notes(comparison: Comparison) -> list[str]:
    """Return the sentences without which the numbers would mislead, the most important first."""
    found = [*_causes(comparison), *_doubts(comparison.rows)]
    if needed := seeds_needed(comparison):
        found.append(needed[1])
    rows, looks = len(comparison.rows), comparison.looks
    together = f"{rows} row{'s' * (rows > 1)} and {looks} look{'s' * (looks > 1)}"
    if looks:
        found.append(f"A pair (n) is two runs with the same seed. The 95 % intervals hold together, for {together}.")
    if comparison.keys and any(row.level == MEAN for row in comparison.rows):
        found.append(f"The {MEAN} hides how they differ: read it with the rows above it.")
    if apart := set(comparison.arms) - {comparison.baseline, *(row.arm for row in comparison.rows)}:
        found.append(f"No level has both {comparison.baseline} and {', '.join(sorted(apart))}: no row compares them.")
    if comparison.repeated:
        found.append(f"{comparison.repeated} runs repeat an earlier one with the same settings and seed and do not count.")
    if any(metric_of(name).is_measured_time for name in comparison.metrics):
        found.append("Times were measured under load.")
    return found


def _causes(comparison: Comparison) -> Iterator[str]:
    """Yield the reasons why rows are incomplete, counted in each arm."""
    factor = comparison.factor
    for level, here in comparison.levels():
        rows = [row for row in comparison.rows if row.level == level and not row.is_complete]
        arms = dict.fromkeys(arm for row in rows for arm in (row.arm, row.baseline))
        runs = {arm: here[here[factor] == arm] for arm in arms}
        seeds = here[here[factor].isin(list(arms))][SEED].nunique()
        diverged = {arm: int(has_diverged(own).sum()) for arm, own in runs.items()}
        missing = {arm: int(own[VALUE].isna().sum()) - diverged[arm] for arm, own in runs.items()}
        without_job = {arm: seeds - len(own) for arm, own in runs.items()}
        sweeps = dict.fromkeys(name for own in runs.values() for name in own[own[VALUE].isna()]["sweep"] if name)
        resume = "".join(f" `{command('run', '-m', f'sweep.resume={name}')}`" for name in sweeps)
        for verb, counts, remedy in (
            ("diverged", diverged, ""),
            ("did not finish", missing, resume),
            ("have no job", without_job, " `sweep.extend` adds them."),
        ):
            if any(counts.values()):
                (arm, count), *others = sorted(counts.items(), key=lambda item: -item[1])
                rest = "".join(f", {number} of {seeds} of {other}" for other, number in others)
                at = f"At {level}, " if level else ""
                yield f"{at}{count} of {seeds} seeds of {arm} {verb}{rest}.{remedy}"


def _doubts(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what is unusual about the pairs and the interval of a row."""
    for row in rows:
        found = row.estimate
        if row.is_complete and found.n < row.seeds:
            yield f"{label(row)}: {row.seeds - found.n} of {row.seeds} pairs ran on two processors and do not count."
        if found.low > found.high:
            yield f"{label(row)}: the intervals of the looks do not overlap: later seeds contradict earlier ones."
        elif found.has_interval and not found.low <= found.difference <= found.high:
            yield f"{label(row)}: the mean lies outside of the interval, which earlier looks have narrowed."


def seeds_needed(comparison: Comparison) -> tuple[int | None, str] | None:
    """Return the number of seeds that the undecided row with the largest spread needs, and the sentence that says so.

    The number depends on the spread and the margin, never on the observed difference: seeds that are chosen by that find
    differences where none exist in more than 5 % of studies.

    Returns:
        The number is that for equivalence, the larger one; None above MAX_PAIRS. No result if nothing is undecided.
    """
    undecided = [row for row in comparison.rows if row.verdict == "undecided"]
    if undecided and min(row.estimate.n for row in undecided) < MIN_PILOT:
        return MIN_PILOT, f"Run at least {MIN_PILOT} seeds to plan."
    plannable = [row for row in undecided if row.margin and row.estimate.difference_std > 0]
    if not plannable:
        return None
    row = max(plannable, key=lambda row: row.estimate.difference_std)
    n, std, alpha = row.estimate.n, row.estimate.difference_std, comparison.alpha_of_next_look
    spreads = (std, upper_std(std, n))
    detect, equal = (
        [function(row.margin or 0, spread, alpha) for spread in spreads] for function in (pairs_to_detect, pairs_for_equivalence)
    )
    return equal[0], (
        f"{label(row)}: {_format_seeds(*detect)} detect a difference of {format_margin(row)} with {POWER:.0%} power; "
        f"{_format_seeds(*equal)} show equivalence if there is none."
    ).replace("%", " %")


def _format_seeds(number: int | None, upper: int | None) -> str:
    """Return a number of seeds and its upper bound: 58 seeds (at most 112, 80 % confidence)."""
    if number is None:
        return f"more than {MAX_PAIRS:,} seeds"
    bound = f"more than {MAX_PAIRS:,}" if upper is None else f"{upper:,}"
    return f"{number:,} seeds (at most {bound}, {CONFIDENCE:.0%} confidence)"
