"""The figures of a run, drawn by matplotlib from numbers and images. Nothing is saved or logged here.

Margins are fixed and images share axes, because a layout of dozens of axes by matplotlib takes longer than half an epoch.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from mnist_exp.learning.data import Dataset, generator
from mnist_exp.learning.evaluation import Evaluation, accuracy
from mnist_exp.learning.training import Phase
from mnist_exp.metrics import format_metric

MAX_LINE = 26  # characters, in the smallest text that is legible above an image
MISTAKES_WIDTH = 4.4  # inches: 660 pixels, the width of the column of MLflow's page that shows the figure
History = Sequence[tuple[int, Mapping[str, float]]]  # (examples seen, metrics), in order


def run_figures(
    evaluation: Evaluation,
    split: str,
    data: Dataset,
    phases: Sequence[Phase],
    history: History,
    phase_starts: Mapping[str, int],
    seed: int,
    *,
    with_recipe: bool,
) -> Iterator[tuple[str, Figure]]:
    """Draw the figures of a run one by one, each with its name.

    Args:
        evaluation: The trained model's evaluation.
        split: Name of the split that it was evaluated on.
        data: The data set.
        phases: The phases of training; the first one's augmentation is shown.
        history: The reports of training.
        phase_starts: The examples seen at the start of each phase.
        seed: Seed of the augmented images.
        with_recipe: Whether to include the figures that show the recipe and not the result.
    """
    first = phases[0].config
    sample = data.splits[first.split].images[:8]
    title = f"{split}, accuracy {format_metric('accuracy', accuracy(evaluation.logits, evaluation.labels))}"
    yield "confusion_matrix", confusion_matrix(evaluation, data.class_names, title)
    yield "worst_mistakes", worst_mistakes(evaluation, data.splits[split].images, data.class_names)
    yield "learning_curves", learning_curves(history, phase_starts)
    if with_recipe:
        yield "augmented_images", augmented_images(sample, first.augmentation, generator(seed, "picture"))


def confusion_matrix(evaluation: Evaluation, class_names: Sequence[str], title: str) -> Figure:
    """Draw the number of images by label and prediction; the color shows the share of mistakes."""
    counts = evaluation.confusion_matrix
    mistakes = counts.float() / counts.sum(1, keepdim=True).clamp(min=1)  # (classes, classes) / (classes, 1)
    mistakes.fill_diagonal_(0)
    has_long_names = max(map(len, class_names)) > 2
    figure = Figure(figsize=(6, 5.6), layout="constrained" if has_long_names else None)
    ticks = range(len(counts))
    axes = figure.add_subplot(xlabel="prediction", ylabel="label", title=title)
    axes.set_xticks(ticks, class_names, rotation=90 if has_long_names else 0, parse_math=False)
    axes.set_yticks(ticks, class_names, parse_math=False)
    axes.imshow(mistakes.numpy(), cmap="Reds", vmin=0, vmax=max(0.02, float(mistakes.max()) * 1.5))
    for label, row in enumerate(counts.tolist()):
        for prediction, count in enumerate(row):
            if count:
                weight = "bold" if label == prediction else "normal"
                axes.text(prediction, label, str(count), ha="center", va="center", fontsize=8, weight=weight)
    return figure


def learning_curves(history: History, phase_starts: Mapping[str, int]) -> Figure:
    """Draw loss and accuracy of training and validation against the examples seen.

    The phases are not connected: their batch sizes, and with them the numbers of averaged images, differ.
    """
    figure = Figure(figsize=(9, 3.8))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.14, top=0.87, wspace=0.22)
    starts = [*phase_starts.values(), math.inf]
    for position, metric in enumerate(("loss", "accuracy"), start=1):
        axes = figure.add_subplot(1, 2, position, xlabel="examples seen", ylabel=metric)
        for part, style in (("train", {"color": "C0", "marker": "."}), ("val", {"color": "C1", "marker": "o"})):
            key = f"{part}/{metric}"
            for start, end in pairwise([0, *starts]):
                points = [(seen, metrics[key]) for seen, metrics in history if start < seen <= end and key in metrics]
                if points:
                    axes.plot(*zip(*points, strict=True), label=part, markersize=5, **style)  # type: ignore[arg-type]
        if len(phase_starts) > 1:
            _mark_phases(axes, phase_starts)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if metric == "loss":
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(5))
            axes.yaxis.set_major_formatter("{x:g}")  # powers of ten need the parser of formulas, most of a second
            axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    lines = dict(zip(labels, handles, strict=True))  # one of all phases
    figure.legend(lines.values(), lines, loc="lower center", ncols=2, frameon=False)
    return figure


def _mark_phases(axes: Axes, phase_starts: Mapping[str, int]) -> None:
    """Draw a line at the start of each phase, and its name above the axes; neighbors at two heights, so that none overlap."""
    left, right = axes.get_xlim()
    for number, (phase, start) in enumerate(phase_starts.items()):
        axes.axvline(start, color="0.5", linestyle=":", linewidth=1)
        side = "left" if start < (left + right) / 2 else "right"
        height = 1.02 + 0.055 * (number % 2)
        axes.text(start, height, phase, color="0.3", fontsize=9, ha=side, parse_math=False, transform=axes.get_xaxis_transform())


def augmented_images(
    images: Tensor,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    generator: torch.Generator,
    versions: int = 9,
) -> Figure:
    """Draw each image in a row: first the original, then augmented versions of it.

    Args:
        images: (n, channels, side, side).
        augment: An augmentation.
        generator: Source of its randomness.
        versions: Number of augmented versions.
    """
    columns = [_colors(images), *(_colors(augment(images, generator)) for _ in range(versions))]
    framed = F.pad(torch.stack(columns, dim=1), (0, 0, 1, 1, 1, 1), value=1)  # (n, columns, side, side, 3) -> each side + 2
    sheet = framed.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (n * (side + 2), columns * (side + 2), 3)
    figure = Figure(figsize=(sheet.shape[1] / 42, sheet.shape[0] / 42 + 0.4))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.93)
    axes = figure.add_subplot(title="left: original; right: augmented, one draw per image")
    axes.imshow(sheet.numpy())
    axes.axis("off")
    return figure


def worst_mistakes(evaluation: Evaluation, images: Tensor, class_names: Sequence[str], count: int = 25) -> Figure:
    """Draw the mistakes with the largest loss, each with its label, prediction and confidence, the most frequent confusion first.

    Args:
        evaluation: Evaluation of the images.
        images: (n, channels, side, side).
        class_names: Name of each class.
        count: Largest number of mistakes to draw.
    """
    mistakes = {index: confusion for index, *confusion in evaluation.mistakes}
    worst = evaluation.worst_mistakes(count).tolist()
    frequency = Counter(tuple(mistakes[index]) for index in worst)
    worst.sort(key=lambda index: (-frequency[tuple(mistakes[index])], mistakes[index]))
    confidences = evaluation.logits[worst].softmax(1).amax(1)  # (m, classes) -> (m,)
    columns = 5
    rows = max(1, -(-len(worst) // columns))
    side = images.shape[-1]
    room = -(-side * 2 // 7)  # for text above each image
    cell = side + room
    cells = torch.ones(rows * columns, cell, cell, 3)
    cells[: len(worst), room:, room // 2 : room // 2 + side] = _colors(images[worst])  # (m, side, side, 3)
    grid = cells.view(rows, columns, cell, cell, 3)
    sheet = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows * cell, columns * cell, 3)
    height = MISTAKES_WIDTH / columns * rows + 0.2
    figure = Figure(figsize=(MISTAKES_WIDTH, height))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.2 / height)
    title = f"The {len(worst)} worst of {len(mistakes)} mistakes: label > prediction, confidence"
    axes = figure.add_subplot(title=title)
    axes.title.set_fontsize(7)
    axes.imshow(sheet.numpy())
    axes.axis("off")
    style: Any = {"ha": "center", "va": "center", "parse_math": False}  # names are text
    for position, index in enumerate(worst):
        row, column = divmod(position, columns)
        label, prediction = (class_names[label] for label in mistakes[index])
        lines = [f"{label} > {prediction}, {confidences[position]:.0%}"]
        if len(lines[0]) > 16:
            parts = f"{label} >", f"{prediction}, {confidences[position]:.0%}"
            lines = [line for part in parts for line in textwrap.wrap(part, MAX_LINE, break_long_words=False)]
        fontsize = min(6.5, 85 / max(map(len, lines)), 11 / len(lines))  # points: as wide as the cell, and as high as the room
        axes.text((column + 0.5) * cell, (row + 0.5) * cell - side / 2, "\n".join(lines), fontsize=fontsize, **style)
    return figure


def _colors(images: Tensor) -> Tensor:
    """Return images on the CPU for matplotlib: (n, channels, h, w) from 0 to 255 -> (n, h, w, 3) float32 from 0 to 1."""
    colors = images if images.shape[1] == 3 else images.float().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return (colors.float() / 255).clamp(0, 1).permute(0, 2, 3, 1).cpu()
