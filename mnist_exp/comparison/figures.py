"""The figures of the report, drawn by matplotlib from a comparison and the histories of its runs; nothing is saved here."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from scipy import stats

from mnist_exp.comparison.history import Curve, Histories, mean_confusions
from mnist_exp.comparison.pairs import VALUE, Comparison
from mnist_exp.metrics import metric_of
from mnist_exp.tracking.base import COLORS
from mnist_exp.tracking.frame import SEED

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
POINT = "run:"  # the scheme of addresses that stand for runs
WIDTH = 5.2  # inches, of every figure, so that their text has one size
GRAY = (0.5, 0.5, 0.5, 0.25)  # on a light and on a dark ground
MAX_LABEL = 28  # characters
MAX_LINE = 60  # characters, from the left of a figure to its right
MAX_CONFUSIONS = 10


def _style(position: int) -> dict[str, str]:
    """Return color, marker and line of an arm, the same in every figure.

    If one key varies, the color is that of the arm's runs in MLflow.
    """
    color, marker, line = (options[position % len(options)] for options in (COLORS, MARKERS, LINES))
    return {"color": color, "marker": marker, "linestyle": line}


def styles(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Return the style of each arm."""
    return {arm: _style(position) for position, arm in enumerate(comparison.arms)}


def _shown(metric: str, value: Any) -> Any:
    """Return recorded values as displayed."""
    return value * metric_of(metric).scale


def _axis_label(text: str, unit: str) -> str:
    return f"{text} ({unit})" if unit else text


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"


def _figure_of_rows(labels: Sequence[Sequence[str]], xlabel: str) -> tuple[Figure, Axes]:
    """Return a figure whose y axis is a list of rows, the first on top; empty parts of labels are left out."""
    lines = ["\n".join(map(_cut, filter(None, parts))) for parts in labels]
    height = 0.7 + 0.25 * sum(1 + line.count("\n") for line in lines)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot(ylim=(len(lines) - 0.4, -0.6))
    axes.set_xlabel(xlabel, loc="right")  # a long label has room below the names of the rows
    axes.set_yticks(range(len(lines)), lines)
    axes.grid(axis="x", alpha=0.3)
    return figure, axes


def _add_legend(figure: Figure) -> None:
    """Add the legend above all axes, where it hides no data."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if not handles:
        return
    lengths = [len(label) + 6 for label in labels]
    fitting = max(1, MAX_LINE // max(lengths))
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels) if sum(lengths) <= MAX_LINE else fitting)


def _use_log_scale(axes: Axes) -> None:
    """Make the y axis of what is drawn logarithmic, with plain numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)) if high > 5 * low else MaxNLocator(5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def differences_or_curve(comparison: Comparison) -> Figure:
    """Draw the curve of a numeric factor, the differences of any other."""
    return curve(comparison) if comparison.is_numeric else differences(comparison)


def differences(comparison: Comparison) -> Figure:
    """Draw the difference of each row and its intervals, a line at 0, and the margin as a band."""
    rows, metric, drawn = comparison.rows, comparison.metric, styles(comparison)
    several = comparison.has_all_pairs
    labels = [(row.arm, row.level, f"against {row.baseline}" if several else "") for row in rows]
    against = "the second arm" if several else comparison.baseline
    figure, axes = _figure_of_rows(
        labels, _axis_label(f"difference in {metric} from {against}", metric_of(metric).difference_unit)
    )
    axes.axvline(0, color="0.5", linewidth=1)
    if margin := rows[0].margin:  # differences inside of it do not matter
        axes.axvspan(*_shown(metric, np.array([-margin, margin])), color=GRAY, linewidth=0, zorder=0)
    for height, row in enumerate(rows):
        style = drawn[row.arm]
        ends = _shown(metric, np.array(row.ends))
        if np.isfinite(ends).all():
            axes.plot(ends, [height, height], color=style["color"], linewidth=2)
        if row.estimate.new_images:
            ends = _shown(metric, np.array(row.estimate.new_images))
            axes.plot(ends, [height, height], color=style["color"], linewidth=0.8, marker="|")
        fill = style["color"] if row.verdict in ("higher", "lower") else "none"
        axes.plot(_shown(metric, row.estimate.difference), height, style["marker"], color=style["color"], mfc=fill)
    return figure


def curve(comparison: Comparison) -> Figure:
    """Draw the mean of the metric against a numeric factor, one line for each level, with the t interval of each mean.

    Accuracies are drawn as error rates on a logarithmic axis, where 1 % and 2 % are as far apart as 2 % and 4 %, unless one is 0.
    """
    metric = comparison.metric
    split, _, name = metric.rpartition("/")
    has_errors = name == "accuracy" and all(runs[VALUE].mean() < 1 for *_, runs in comparison.cells())
    levels = comparison.levels()
    height = 3.2 + 0.2 * len(levels)  # the legend has up to a line per level
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    ylabel = _axis_label(f"{split} error rate".strip() if has_errors else metric, metric_of(metric).unit)
    axes = figure.add_subplot(xlabel=comparison.factor, ylabel=ylabel)
    for position, (level, runs) in enumerate(levels):
        shown = _shown(metric, 1 - runs[VALUE] if has_errors else runs[VALUE])
        values = runs.assign(x=runs[comparison.factor].astype(float), **{VALUE: shown})
        points = values.groupby("x")[VALUE].agg(["mean", "sem", "count"]).dropna(subset="mean")
        half = points["sem"] * stats.t.isf(0.025, (points["count"] - 1).clip(lower=1))
        axes.errorbar(points.index, points["mean"], half.fillna(0), capsize=3, label=_cut(level), **_style(position))  # type: ignore[arg-type]
    numbers = sorted(map(float, comparison.arms))
    if numbers[0] > 0:
        axes.set_xscale("log")
    axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
    axes.xaxis.set_minor_locator(NullLocator())
    if has_errors:
        _use_log_scale(axes)
    axes.grid(alpha=0.3)
    if comparison.keys:
        _add_legend(figure)
    return figure


def every_run(comparison: Comparison) -> Figure:
    """Draw every finished run as a point, and the mean of each arm at each level as a bar."""
    metric = comparison.metric
    cells = comparison.cells()
    figure, axes = _figure_of_rows([cell[:2] for cell in cells], _axis_label(metric, metric_of(metric).unit))
    drawn = styles(comparison)
    for height, (arm, _, runs) in enumerate(cells):
        style = drawn[arm]
        values = _shown(metric, runs[VALUE])
        spread = np.linspace(-0.15, 0.15, len(values)) + height
        dots = axes.scatter(values, spread, s=18, c=[style["color"]] * len(values), marker=style["marker"], alpha=0.7)
        dots.set_urls([_point(arm, run) for _, run in runs.iterrows()])
        axes.vlines(values.mean(), height - 0.35, height + 0.35, color=style["color"], linewidth=2)
    return figure


def _point(arm: str, run: "pd.Series[Any]") -> str:
    """Return what a point stands for, as an address that `report` turns into a tooltip and a link."""
    name = ", ".join(filter(None, (arm, run[SEED] and f"seed {run[SEED]}", run["run"] and f"run {run['run'][:8]}")))
    return f"{POINT}{run['run']}/{quote(name, safe='')}"


def learning_curves(comparison: Comparison, histories: Histories, objective: str) -> Figure | None:
    """Draw the mean and the range of each arm's training loss and objective; None without data."""
    runs = [run for found in histories.values() for run in found]
    # A run of one epoch has a single point of a validation metric.
    metrics = [name for name in ("train/loss", objective) if any(len(run.curve(name)[0]) > 1 for run in runs)]
    if not metrics:
        return None
    figure = Figure(figsize=(WIDTH, 2.4 * len(metrics)), layout="constrained")
    for position, metric in enumerate(metrics, start=1):
        axes = figure.add_subplot(len(metrics), 1, position, ylabel=_axis_label(metric, metric_of(metric).unit))
        for arm, style in styles(comparison).items():
            lines = [line for run in histories[arm] if len((line := run.curve(metric))[0]) > 1]
            _draw_band(axes, metric, lines, {"label": _cut(arm)} | style)
        if metric.endswith("loss") and axes.lines:
            _use_log_scale(axes)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    axes.set_xlabel("examples seen")
    _add_legend(figure)
    return figure


def _draw_band(axes: Axes, metric: str, lines: list[Curve], style: dict[str, str]) -> None:
    """Draw the mean and the range of the runs' curves, where all runs have a value."""
    if not lines:
        return
    start, end = max(line[0][0] for line in lines), min(line[0][-1] for line in lines)
    grid = np.array([x for x in lines[0][0] if start <= x <= end])
    if not len(grid):  # runs of very different lengths share no range
        return
    heights = _shown(metric, np.array([np.interp(grid, *line) for line in lines]))  # (runs, points)
    axes.fill_between(grid, heights.min(0), heights.max(0), color=style["color"], alpha=0.15, linewidth=0)
    markers = style if len(grid) < 20 else style | {"marker": ""}
    axes.plot(grid, heights.mean(0), markersize=4, **markers)  # type: ignore[arg-type]


def mistakes(comparison: Comparison, histories: Histories, class_names: Sequence[str]) -> Figure | None:
    """Draw the most frequent confusions: how often an average run of each arm reads a label as another; None without any.

    Args:
        comparison: The comparison.
        histories: The histories of the runs, by arm.
        class_names: The name of each class, none if unknown.
    """
    found = {arm: mean_confusions(runs) for arm, runs in histories.items() if runs}
    totals = {pair: sum(counts.get(pair, 0) for counts in found.values()) for counts in found.values() for pair in counts}
    pairs = sorted(totals, key=lambda pair: (-totals[pair], pair))[:MAX_CONFUSIONS]
    if not pairs:
        return None
    names = dict(enumerate(class_names))
    labels = [[" read as ".join(str(names.get(index, index)) for index in pair)] for pair in pairs]
    figure, axes = _figure_of_rows(labels, "images, in an average run")
    for arm, style in styles(comparison).items():
        if arm in found:
            counts = [found[arm].get(pair, 0) for pair in pairs]
            axes.plot(counts, range(len(pairs)), label=_cut(arm), alpha=0.8, **(style | {"linestyle": ""}))  # type: ignore[arg-type]
    axes.set_xlim(left=-0.02 * axes.get_xlim()[1])  # points at 0 are whole
    _add_legend(figure)
    return figure
