"""The report of a comparison: one HTML file that needs no server and no address outside itself; figures as SVG within it."""

import base64
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image

from mnist_exp.comparison import Arms, Row, Setting, amount, differing_params, number
from mnist_exp.sweep import COLOURS

if TYPE_CHECKING:
    from torch import Tensor

    from mnist_exp.tracking import Record

TEMPLATE = Path(__file__).with_name("report.html")
# Each arm has a colour that colour-blind people tell from others, a marker and a line of its own.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
WIDTH = 5.6  # inches: at its natural size on a desktop, whole on a phone
MOST_DISAGREED = 12  # images
Outcome = Mapping[str, Any]  # the history, the mistakes, and the split that they were made on
Outcomes = Mapping[str, Outcome | None]  # by run id


def render(
    arms: Arms,
    rows: Sequence[Row],
    said: str,
    notes: Sequence[str],
    outcomes: Outcomes,
    parent: "Record",
    commands: Sequence[str],
    images: "Tensor | None",
) -> str:
    """Return the report as HTML, every text from outside escaped.

    said: the answer; notes: what is to be known beside it; outcomes: None for a run that left none; commands: that repeat the
    comparison; images: the scored ones, uint8 (n, 1, 28, 28), None where they are not at hand.
    """
    # Names are no formulas; equal figures, equal bytes.
    with mpl.rc_context({"text.parse_math": False, "svg.hashsalt": "mnist_exp"}):
        figures = {
            "differences": differences(rows),
            "seeds": seeds(arms, rows),
            "examples": curves(arms, outcomes, against="examples"),
            "seconds": curves(arms, outcomes, against="seconds"),
            "cost": cost(arms, rows[0].metric),
            "confusion": confusion(arms, outcomes),
        }
        drawn = {name: as_svg(figure) if figure else None for name, figure in figures.items()}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"amount": amount, "number": number}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        arms=arms,
        rows=rows,
        said=said,
        notes=notes,
        parent=parent,
        commands=commands,
        figures=drawn,
        disagreements=[
            item | {"picture": as_png(images[item["index"], 0].numpy()) if images is not None else None}
            for item in disagreements(arms, outcomes)
            if images is None or item["index"] < len(images)
        ],
        params=differing_params(arms),
        without_outcome=sum(outcome is None for outcome in outcomes.values()),
    )


def understood(outcome: Any) -> Outcome | None:
    """Return a run's outcome.json with every value of the type and in the range that it must have, None where one has not."""
    try:
        history = [
            (int(seen), {str(key): float(value) for key, value in metrics.items()}) for seen, metrics in outcome["history"]
        ]
        mistakes = [(int(index), int(label), int(prediction)) for index, label, prediction in outcome["mistakes"]]
        split = str(outcome["split"])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None
    digits = all(index >= 0 and 0 <= label <= 9 and 0 <= prediction <= 9 for index, label, prediction in mistakes)
    timed = all(metrics.get("train/examples_per_second", 1) > 0 for _, metrics in history)
    return {"history": history, "mistakes": mistakes, "split": split} if digits and timed else None


def as_svg(figure: Figure) -> str:
    """Return a figure as the address of an image that holds it."""
    text = io.BytesIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return f"data:image/svg+xml;base64,{base64.b64encode(text.getvalue()).decode()}"


def as_png(pixels: "np.ndarray[Any, Any]") -> str:
    """Return an image, uint8 (h, w), dark on light, as the address of a PNG that holds it."""
    content = io.BytesIO()
    Image.fromarray(255 - pixels).save(content, format="png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def looks(arms: Arms) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each arm with the colour, marker and line that it has in every figure."""
    for place, arm in enumerate(arms.runs):
        colour, marker, line = (options[place % len(options)] for options in (COLOURS, MARKERS, LINES))
        yield arm, {"color": colour, "marker": marker, "linestyle": line}


def scaled(metric: str, value: Any) -> Any:
    """Return a value as figures show it: accuracies in percent."""
    return value * 100 if metric.endswith("accuracy") else value


def axis_label(metric: str) -> str:
    """Return a metric's name with the unit that figures show it in."""
    return f"{metric} (%)" if metric.endswith("accuracy") else metric


def differences(rows: Sequence[Row]) -> Figure:
    """Draw the difference of each arm in the first metric, with its interval and the line of no difference."""
    first = [row for row in rows if row.metric == rows[0].metric]
    figure = Figure(figsize=(WIDTH, 1 + 0.4 * len(first)))
    unit = " (points)" if rows[0].metric.endswith("accuracy") else ""
    axes = figure.add_subplot(xlabel=f"difference in {rows[0].metric} from {rows[0].baseline}{unit}, 95 % interval")
    axes.axvline(0, color="0.5", linewidth=1)
    for height, row in enumerate(reversed(first)):
        low, middle, high = (
            scaled(row.metric, value) for value in (row.values.interval.low, row.values.difference, row.values.interval.high)
        )
        axes.plot([low, high], [height, height], color="black", linewidth=2)
        axes.plot(middle, height, "o", color="black", mfc="black" if row.is_detected else "white")
    axes.set_yticks(range(len(first)), [row.arm for row in reversed(first)])
    axes.set_ylim(-0.6, len(first) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    return figure


def seeds(arms: Arms, rows: Sequence[Row]) -> Figure:
    """Draw every run as a point, the pairs of the first two arms joined, and each arm's mean as a bar."""
    metric = rows[0].metric
    figure = Figure(figsize=(WIDTH, 3.2))
    axes = figure.add_subplot(ylabel=axis_label(metric))
    points: list[dict[Setting, tuple[float, float]]] = []
    for place, (arm, look) in enumerate(looks(arms)):
        spread = np.linspace(-0.1, 0.1, len(arms.runs[arm])) + place
        runs = sorted(arms.runs[arm].items())
        points.append({setting: (x, scaled(metric, run.metrics[metric])) for x, (setting, run) in zip(spread, runs, strict=True)})
        if runs:
            x, y = zip(*points[-1].values(), strict=True)
            axes.scatter(x, y, s=22, color=look["color"], marker=look["marker"], alpha=0.8)
            axes.hlines(float(np.mean(y)), place - 0.25, place + 0.25, color=look["color"], linewidth=2)
    for setting in points[0].keys() & points[1].keys():  # of further arms the lines would cross those in between
        axes.plot(*zip(points[0][setting], points[1][setting], strict=True), color="0.8", linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(arms.runs)), [f"{arm}\nn = {len(runs)}" for arm, runs in arms.runs.items()])
    axes.set_xlim(-0.5, len(arms.runs) - 0.5)
    axes.grid(axis="y", alpha=0.3)
    return figure


def curves(arms: Arms, outcomes: Outcomes, against: str) -> Figure | None:
    """Draw each arm's loss and validation accuracy, mean and range, against `examples` seen or `seconds` of training."""
    metrics = [
        metric
        for metric in ("train/loss", "val/accuracy")  # of which a run of one epoch has a single point
        if any(len(curve(outcome, metric, against)[0]) > 1 for outcome in outcomes.values())
    ]
    if not metrics:
        return None
    figure = Figure(figsize=(WIDTH, 2.5 * len(metrics)))
    for place, metric in enumerate(metrics, start=1):
        axes = figure.add_subplot(len(metrics), 1, place, ylabel=axis_label(metric))
        for arm, look in looks(arms):
            told = [curve(outcomes.get(record.run_id), metric, against) for record in arms.runs[arm].values()]
            lines = [line for line in told if len(line[0]) > 1]
            if not lines:
                continue
            start, end = max(line[0][0] for line in lines), min(line[0][-1] for line in lines)  # where all have a value
            grid = np.array(lines[0][0]) if against == "examples" else np.linspace(start, end, 100)
            grid = grid[(grid >= start) & (grid <= end)]
            heights = scaled(metric, np.array([np.interp(grid, *line) for line in lines]))
            axes.fill_between(grid, heights.min(0), heights.max(0), color=look["color"], alpha=0.15, linewidth=0)
            few = look if len(grid) < 20 else look | {"marker": ""}
            axes.plot(grid, heights.mean(0), label=arm, markersize=4, **few)  # type: ignore[arg-type]
        if metric.endswith("loss"):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        if against == "examples":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    axes.set_xlabel("examples seen" if against == "examples" else "seconds of training")
    figure.axes[0].legend(fontsize="small")
    return figure


def curve(outcome: Outcome | None, metric: str, against: str) -> tuple[list[float], list[float]]:
    """Return a metric of a run against examples seen, or against seconds of training, summed up from the speed."""
    places, heights, seconds, before = [], [], 0.0, 0
    for examples_seen, metrics in outcome["history"] if outcome else []:
        if "train/examples_per_second" in metrics:
            seconds += (examples_seen - before) / metrics["train/examples_per_second"]
            before = examples_seen
        if metric in metrics:
            places.append(float(examples_seen) if against == "examples" else seconds)
            heights.append(metrics[metric])
    return places, heights


def cost(arms: Arms, metric: str) -> Figure | None:
    """Draw what each arm reaches against its parameters and against its time: every run, and the means with their spread."""
    prices = [price for price in ("model/parameters", "time/train_seconds") if all(price in r.metrics for r in arms.records)]
    if not prices:
        return None
    figure = Figure(figsize=(WIDTH, 2.8))
    for place, price in enumerate(prices, start=1):
        axes = figure.add_subplot(1, len(prices), place, xlabel=price.replace("time/train_seconds", "seconds of training"))
        for arm, look in looks(arms):
            runs = list(arms.runs[arm].values())
            x = np.array([record.metrics[price] for record in runs])
            y = scaled(metric, np.array([record.metrics[metric] for record in runs]))
            axes.scatter(x, y, s=10, color=look["color"], marker=look["marker"], alpha=0.4)
            if runs:
                spread = float(y.std(ddof=1)) if len(y) > 1 else 0.0
                axes.errorbar(x.mean(), y.mean(), yerr=spread, label=arm, capsize=3, **(look | {"linestyle": ""}))  # type: ignore[arg-type]
        axes.grid(alpha=0.3)
        axes.margins(x=0.2)
        axes.tick_params(axis="x", rotation=30)
    figure.axes[0].set_ylabel(axis_label(metric))
    figure.subplots_adjust(wspace=0.35)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 0.92), ncols=3, fontsize="small", frameon=False)
    return figure


def confusion(arms: Arms, outcomes: Outcomes) -> Figure | None:
    """Draw the mistakes of an average run of each arm, by label and prediction, and how the arms differ from the baseline."""
    sheets = {arm: sheet for arm in arms.runs if (sheet := mistakes(arms.runs[arm].values(), outcomes)) is not None}
    if arms.baseline not in sheets:
        return None
    panels = [(arm, sheet, "Greys") for arm, sheet in sheets.items()]
    panels += [
        (f"{arm}\nless {arms.baseline}", sheets[arm] - sheets[arms.baseline], "PuOr") for arm in arms.others if arm in sheets
    ]
    columns = 2
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 2.9 * height))
    top = max(1.0, max(float(sheet.max()) for sheet in sheets.values()))
    for place, (title, sheet, colours) in enumerate(panels, start=1):
        axes = figure.add_subplot(height, columns, place, xticks=range(10), yticks=range(10))
        limit = top if colours == "Greys" else max(0.5, float(np.abs(sheet).max()))
        axes.imshow(sheet, cmap=colours, vmin=0 if colours == "Greys" else -limit, vmax=limit)
        axes.set_title(title, fontsize="small")
        axes.tick_params(labelsize="x-small", length=0)
        for label, prediction in np.argwhere(np.abs(sheet) >= 0.5):
            value = sheet[label, prediction]
            dark = value > 0.6 * limit if colours == "Greys" else abs(value) > 0.7 * limit
            digits = 0 if abs(value) >= 9.95 else 1
            text = f"{value:.{digits}f}" if colours == "Greys" else f"{value:+.{digits}f}"
            axes.text(prediction, label, text, ha="center", va="center", fontsize=6, color="white" if dark else "black")
    figure.supylabel("label", fontsize="small")
    figure.supxlabel("prediction; number of mistakes in an average run", fontsize="small")
    figure.tight_layout()
    return figure


def mistakes(records: "Iterable[Record]", outcomes: Outcomes) -> "np.ndarray[Any, Any] | None":
    """Return the mistakes of an average run by (label, prediction), (10, 10), or None where no run has told them."""
    told = [outcome["mistakes"] for record in records if (outcome := outcomes.get(record.run_id)) is not None]
    if not told:
        return None
    sheet = np.zeros((10, 10))
    for run in told:
        for _, label, prediction in run:
            sheet[label, prediction] += 1 / len(told)
    return sheet


def disagreements(arms: Arms, outcomes: Outcomes) -> list[dict[str, Any]]:
    """Return the images that divide an arm from the baseline most: index, label, and the share of either's runs that err."""
    told = {
        arm: [outcome for record in runs.values() if (outcome := outcomes.get(record.run_id)) is not None]
        for arm, runs in arms.runs.items()
    }
    if any(outcome["split"] not in ("test", "validation") for runs in told.values() for outcome in runs):
        return []  # the images of other splits depend on the seed
    labels = {index: label for runs in told.values() for outcome in runs for index, label, _ in outcome["mistakes"]}
    errs = {arm: Counter(index for outcome in runs for index, _, _ in outcome["mistakes"]) for arm, runs in told.items() if runs}
    found = []
    for arm in arms.others:
        if arm not in errs or arms.baseline not in errs:
            continue
        for index, label in labels.items():
            share, before = errs[arm][index] / len(told[arm]), errs[arms.baseline][index] / len(told[arms.baseline])
            if share != before:
                found.append({"arm": arm, "index": index, "label": label, "share": share, "before": before})
    return sorted(found, key=lambda item: (-abs(item["share"] - item["before"]), item["index"]))[:MOST_DISAGREED]
