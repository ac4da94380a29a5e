"""The figures of the report, drawn by matplotlib from arms, rows and outcomes; nothing is saved here."""

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from mnist_exp.comparison.arms import Arms, Block, Row
from mnist_exp.comparison.outcomes import Curve, Outcomes, curve, mean_mistakes
from mnist_exp.metrics import metric_of
from mnist_exp.tracking.base import COLORS, RunRecord

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
POINT = "run:"  # the scheme of addresses that stand for runs
WIDTH = 5.6  # inches: natural size on a desktop, fits a phone


def _styles(arms: Arms) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each arm with its color, marker and line style, the same in every figure."""
    for position, arm in enumerate(arms.runs):
        color, marker, line = (options[position % len(options)] for options in (COLORS, MARKERS, LINES))
        yield arm, {"color": color, "marker": marker, "linestyle": line}


def _scaled(metric: str, value: Any) -> Any:
    """Return recorded values as displayed."""
    return value * metric_of(metric).scale


def _axis_label(metric: str) -> str:
    return f"{metric}{metric_of(metric).axis_unit}"


def point_of(arm: str, record: RunRecord) -> str:
    """Return what a point of a figure stands for, as an address that `report` turns into a tooltip and a link."""
    seed = f", seed {record.params['seed']}" if "seed" in record.params else ""
    return f"{POINT}{record.run_id}/{quote(f'{arm}{seed}, run {record.run_id[:8]}', safe='')}"


def differences(rows: Sequence[Row]) -> Figure:
    """Draw the difference of each arm in the first metric and its interval, a line at 0, and the margin as a band."""
    first = [row for row in rows if row.metric == rows[0].metric]
    figure = Figure(figsize=(WIDTH, 1 + 0.4 * len(first)))
    unit = metric_of(rows[0].metric).difference_unit
    in_unit = f" ({unit})" if unit else ""
    axes = figure.add_subplot(xlabel=f"difference in {rows[0].metric} from {rows[0].baseline}{in_unit}, 95 % interval")
    axes.axvline(0, color="0.5", linewidth=1)
    if rows[0].margin is not None:  # differences inside of it do not matter
        margin = _scaled(rows[0].metric, rows[0].margin)
        axes.axvspan(-margin, margin, color="0.9", zorder=0)
    for height, row in enumerate(reversed(first)):
        interval = row.values.interval
        low, middle, high = (_scaled(row.metric, value) for value in (interval.low, row.values.difference, interval.high))
        if interval.is_finite:
            axes.plot([low, high], [height, height], color="black", linewidth=2)
        axes.plot(middle, height, "o", color="black", mfc="black" if row.is_detected else "white")
    axes.set_yticks(range(len(first)), [row.arm for row in reversed(first)])
    axes.set_ylim(-0.6, len(first) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    return figure


def every_run(arms: Arms, metric: str) -> Figure:
    """Draw every run as a point, each arm's mean as a bar, and lines between the pairs of the first two arms."""
    figure = Figure(figsize=(WIDTH, 3.2))
    axes = figure.add_subplot(ylabel=_axis_label(metric))
    points: list[dict[Block, tuple[float, float]]] = []
    for position, (arm, style) in enumerate(_styles(arms)):
        spread = np.linspace(-0.1, 0.1, len(arms.runs[arm])) + position
        runs = sorted(arms.runs[arm].items())
        points.append({block: (x, _scaled(metric, run.metrics[metric])) for x, (block, run) in zip(spread, runs, strict=True)})
        if runs:
            x, y = zip(*points[-1].values(), strict=True)
            dots = axes.scatter(x, y, s=22, c=[style["color"]] * len(x), marker=style["marker"], alpha=0.8)
            dots.set_urls([point_of(arm, run) for _, run in runs])
            axes.hlines(float(np.mean(y)), position - 0.25, position + 0.25, color=style["color"], linewidth=2)
    for block in sorted(points[0].keys() & points[1].keys()):  # lines to further arms would cross the arms between
        axes.plot(*zip(points[0][block], points[1][block], strict=True), color="0.8", linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(arms.runs)), [f"{arm}\nn = {len(runs)}" for arm, runs in arms.runs.items()])
    axes.set_xlim(-0.5, len(arms.runs) - 0.5)
    axes.grid(axis="y", alpha=0.3)
    return figure


def learning_curves(arms: Arms, outcomes: Outcomes) -> Figure | None:
    """Draw the mean and the range of each arm's training loss and validation accuracy; None without data."""
    metrics = [
        metric
        for metric in ("train/loss", "val/accuracy")  # a run of one epoch has a single point of val/accuracy
        if any(len(curve(outcome, metric)[0]) > 1 for outcome in outcomes.values())
    ]
    if not metrics:
        return None
    figure = Figure(figsize=(WIDTH, 2.5 * len(metrics)))
    for position, metric in enumerate(metrics, start=1):
        axes = figure.add_subplot(len(metrics), 1, position, ylabel=_axis_label(metric))
        for arm, style in _styles(arms):
            points = [curve(outcomes.get(record.run_id), metric) for record in arms.runs[arm].values()]
            _draw_band(axes, metric, [line for line in points if len(line[0]) > 1], {"label": arm} | style)
        if metric.endswith("loss"):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    axes.set_xlabel("examples seen")
    figure.axes[0].legend(fontsize="small")
    return figure


def _draw_band(axes: Axes, metric: str, lines: list[Curve], style: dict[str, str]) -> None:
    """Draw the mean and the range of the runs' curves, where all runs have a value."""
    if not lines:
        return
    start, end = max(line[0][0] for line in lines), min(line[0][-1] for line in lines)
    grid = np.array([x for x in lines[0][0] if start <= x <= end])
    heights = _scaled(metric, np.array([np.interp(grid, *line) for line in lines]))  # (runs, points)
    axes.fill_between(grid, heights.min(0), heights.max(0), color=style["color"], alpha=0.15, linewidth=0)
    markers = style if len(grid) < 20 else style | {"marker": ""}
    axes.plot(grid, heights.mean(0), markersize=4, **markers)  # type: ignore[arg-type]


def cost(arms: Arms, metric: str) -> Figure | None:
    """Draw a metric against parameters and against training time: every run, and each arm's mean with its spread."""
    costs = [name for name in ("model/parameters", "time/train_seconds") if all(name in r.metrics for r in arms.records)]
    if not costs:
        return None
    figure = Figure(figsize=(WIDTH, 2.8))
    for position, name in enumerate(costs, start=1):
        axes = figure.add_subplot(1, len(costs), position, xlabel=name.replace("time/train_seconds", "seconds of training"))
        for arm, style in _styles(arms):
            runs = list(arms.runs[arm].values())
            x = np.array([record.metrics[name] for record in runs])
            y = _scaled(metric, np.array([record.metrics[metric] for record in runs]))
            dots = axes.scatter(x, y, s=10, c=[style["color"]] * len(x), marker=style["marker"], alpha=0.4)
            dots.set_urls([point_of(arm, run) for run in runs])
            if runs:
                spread = float(y.std(ddof=1)) if len(y) > 1 else 0.0
                axes.errorbar(x.mean(), y.mean(), yerr=spread, label=arm, capsize=3, **(style | {"linestyle": ""}))  # type: ignore[arg-type]
        axes.grid(alpha=0.3)
        axes.margins(x=0.2)
        axes.tick_params(axis="x", rotation=30)
    figure.axes[0].set_ylabel(_axis_label(metric))
    figure.subplots_adjust(wspace=0.35)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 0.92), ncols=3, fontsize="small", frameon=False)
    return figure


def confusion(arms: Arms, outcomes: Outcomes) -> Figure | None:
    """Draw the mean mistakes of each arm by label and prediction."""
    found = {arm: matrix for arm in arms.runs if (matrix := mean_mistakes(arms.runs[arm].values(), outcomes)) is not None}
    if not found:
        return None
    columns = 2
    height = -(-len(found) // columns)
    figure = Figure(figsize=(WIDTH, 2.9 * height))
    top = max(1.0, max(float(matrix.max()) for matrix in found.values()))
    for position, (arm, matrix) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(height, columns, position, xticks=range(len(matrix)), yticks=range(len(matrix)))
        axes.imshow(matrix, cmap="Greys", vmin=0, vmax=top)
        axes.tick_params(labelsize="x-small", length=0)
        for label, prediction in np.argwhere(matrix >= 0.5):
            value = matrix[label, prediction]
            color = "white" if value > 0.6 * top else "black"
            axes.text(
                prediction, label, f"{value:.{0 if value >= 9.95 else 1}f}", ha="center", va="center", fontsize=6, color=color
            )
        axes.set_title(arm, fontsize="small")
    figure.supylabel("label", fontsize="small")
    figure.supxlabel("prediction; number of mistakes in an average run", fontsize="small")
    figure.tight_layout()
    return figure
