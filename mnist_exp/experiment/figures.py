"""The figures of a run, drawn by matplotlib from numbers and images. Nothing is saved or logged here.

Margins are fixed and images share axes, because a layout of dozens of axes by matplotlib takes longer than half an epoch.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import Tensor

from mnist_exp.learning.data import Dataset, generator
from mnist_exp.learning.evaluation import Evaluation, accuracy
from mnist_exp.learning.training import Phase
from mnist_exp.metrics import format_metric

History = Sequence[tuple[int, Mapping[str, float]]]  # (examples seen, metrics), in order


def run_figures(
    evaluation: Evaluation, split: str, data: Dataset, phases: Sequence[Phase], history: History, seed: int, *, with_recipe: bool
) -> dict[str, Callable[[], Figure]]:
    """Return functions that draw the figures of a run, by name.

    Args:
        evaluation: The trained model's evaluation.
        split: Name of the split that it was evaluated on.
        data: The data set.
        phases: The phases of training; the first one's augmentation is shown.
        history: The reports of training.
        seed: Seed of the augmented images.
        with_recipe: Whether to include the figures that show the recipe and not the result.
    """
    first = phases[0].config
    sample = data.splits[first.split].images[:8]
    title = f"{split}, accuracy {format_metric('accuracy', accuracy(evaluation.logits, evaluation.labels))}"
    drawings: dict[str, Callable[[], Figure]] = {
        "confusion_matrix": lambda: confusion_matrix(evaluation, title),
        "worst_mistakes": lambda: worst_mistakes(evaluation, data.splits[split].images),
        "learning_curves": lambda: learning_curves(history),
    }
    if with_recipe:
        drawings["augmented_digits"] = lambda: augmented_digits(sample, first.augmentation, generator(seed, "picture"))
    return drawings


def confusion_matrix(evaluation: Evaluation, title: str) -> Figure:
    """Draw the number of images by label and prediction; the color shows the share of mistakes."""
    counts = evaluation.confusion_matrix
    mistakes = counts.float() / counts.sum(1, keepdim=True).clamp(min=1)  # (classes, classes) / (classes, 1)
    mistakes.fill_diagonal_(0)
    figure = Figure(figsize=(6, 5.6))
    ticks = range(len(counts))
    axes = figure.add_subplot(xlabel="prediction", ylabel="label", title=title, xticks=ticks, yticks=ticks)
    axes.imshow(mistakes.numpy(), cmap="Reds", vmin=0, vmax=max(0.02, float(mistakes.max()) * 1.5))
    for label, row in enumerate(counts.tolist()):
        for prediction, count in enumerate(row):
            if count:
                weight = "bold" if label == prediction else "normal"
                axes.text(prediction, label, str(count), ha="center", va="center", fontsize=8, weight=weight)
    return figure


def learning_curves(history: History) -> Figure:
    """Draw loss and accuracy of training and validation against the examples seen."""
    figure = Figure(figsize=(9, 3.6))
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.15, top=0.9, wspace=0.25)
    for position, metric in enumerate(("loss", "accuracy"), start=1):
        axes = figure.add_subplot(1, 2, position, xlabel="examples seen", title=metric)
        for part, style in (("train", {"color": "C0"}), ("val", {"color": "C1", "marker": "o"})):
            points = [(seen, metrics[f"{part}/{metric}"]) for seen, metrics in history if f"{part}/{metric}" in metrics]
            if points:
                axes.plot(*zip(*points, strict=True), label=f"{part}/{metric}", **style)  # type: ignore[arg-type]
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if metric == "loss":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # powers of ten need the parser of formulas, most of a second
            axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right" if metric == "loss" else "lower right")
    return figure


def augmented_digits(
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
    columns = [_gray(images), *(_gray(augment(images, generator)) for _ in range(versions))]
    framed = F.pad(torch.stack(columns, dim=1), (1, 1, 1, 1), value=255)  # (n, columns, side, side) -> each side + 2
    sheet = framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # (n * (side + 2), columns * (side + 2))
    figure = Figure(figsize=(sheet.shape[1] / 42, sheet.shape[0] / 42 + 0.4))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.93)
    axes = figure.add_subplot(title="left: original; right: augmented, one draw per image")
    axes.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=255)
    axes.axis("off")
    return figure


def worst_mistakes(evaluation: Evaluation, images: Tensor, count: int = 25) -> Figure:
    """Draw the mistakes with the largest loss, each with its label, prediction and confidence.

    Args:
        evaluation: Evaluation of the images.
        images: (n, channels, side, side).
        count: Largest number of mistakes to draw.
    """
    worst = evaluation.worst_mistakes(count)
    confidences, predictions = evaluation.logits[worst].softmax(1).max(1)  # (m, classes) -> (m,), (m,)
    total = int((evaluation.predictions != evaluation.labels).sum())
    columns = 5
    rows = -(-count // columns)
    cell = images.shape[-1] + 8
    cells = torch.full((rows * columns, cell, cell), 255.0)  # each image has room for a line of text above
    cells[: len(worst), 8:, 4:-4] = _gray(images[worst.to(images.device)])  # (m, side, side)
    sheet = cells.view(rows, columns, cell, cell).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # (rows * cell, columns * cell)
    figure = Figure(figsize=(6.5, 7))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.94)
    title = f"The {len(worst)} worst of {total} mistakes: label > prediction, confidence"
    axes = figure.add_subplot(title=title)
    axes.title.set_fontsize(10)
    axes.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=255)
    axes.axis("off")
    found = zip(evaluation.labels[worst].tolist(), predictions.tolist(), confidences.tolist(), strict=True)
    for position, (label, prediction, confidence) in enumerate(found):
        row, column = divmod(position, columns)
        text = f"{label} > {prediction}, {confidence:.0%}"
        axes.text((column + 0.5) * cell, row * cell + 6, text, ha="center", va="baseline", fontsize=9)
    return figure


def _gray(images: Tensor) -> Tensor:
    """Return images on the CPU with the mean of their channels: (n, channels, h, w) -> (n, h, w) float32."""
    return images.float().mean(1).cpu()
