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
        "confusion_matrix": lambda: confusion_matrix(evaluation, data.class_names, title),
        "worst_mistakes": lambda: worst_mistakes(evaluation, data.splits[split].images, data.class_names),
        "learning_curves": lambda: learning_curves(history),
    }
    if with_recipe:
        drawings["augmented_images"] = lambda: augmented_images(sample, first.augmentation, generator(seed, "picture"))
    return drawings


def confusion_matrix(evaluation: Evaluation, class_names: Sequence[str], title: str) -> Figure:
    """Draw the number of images by label and prediction; the color shows the share of mistakes."""
    counts = evaluation.confusion_matrix
    mistakes = counts.float() / counts.sum(1, keepdim=True).clamp(min=1)  # (classes, classes) / (classes, 1)
    mistakes.fill_diagonal_(0)
    has_long_names = max(map(len, class_names)) > 2
    figure = Figure(figsize=(6, 5.6), layout="constrained" if has_long_names else None)
    ticks = range(len(counts))
    axes = figure.add_subplot(xlabel="prediction", ylabel="label", title=title)
    axes.set_xticks(ticks, class_names, rotation=90 if has_long_names else 0)
    axes.set_yticks(ticks, class_names)
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
    """Draw the mistakes with the largest loss, each with its label, prediction and confidence.

    Args:
        evaluation: Evaluation of the images.
        images: (n, channels, side, side).
        class_names: Name of each class.
        count: Largest number of mistakes to draw.
    """
    worst = evaluation.worst_mistakes(count)
    confidences, predictions = evaluation.logits[worst].softmax(1).max(1)  # (m, classes) -> (m,), (m,)
    total = int((evaluation.predictions != evaluation.labels).sum())
    columns = 5
    rows = -(-count // columns)
    cell = images.shape[-1] + 8
    cells = torch.ones(rows * columns, cell, cell, 3)  # each image has room for a line of text above
    cells[: len(worst), 8:, 4:-4] = _colors(images[worst.to(images.device)])  # (m, side, side, 3)
    grid = cells.view(rows, columns, cell, cell, 3)
    sheet = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows * cell, columns * cell, 3)
    figure = Figure(figsize=(6.5, 7))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.94)
    title = f"The {len(worst)} worst of {total} mistakes: label > prediction, confidence"
    axes = figure.add_subplot(title=title)
    axes.title.set_fontsize(10)
    axes.imshow(sheet.numpy())
    axes.axis("off")
    found = zip(evaluation.labels[worst].tolist(), predictions.tolist(), confidences.tolist(), strict=True)
    for position, (label, prediction, confidence) in enumerate(found):
        row, column = divmod(position, columns)
        text = f"{class_names[label][:9]} > {class_names[prediction][:9]}, {confidence:.0%}"
        axes.text((column + 0.5) * cell, row * cell + 6, text, ha="center", va="baseline", fontsize=9 if len(text) < 16 else 6)
    return figure


def _colors(images: Tensor) -> Tensor:
    """Return images on the CPU for matplotlib: (n, channels, h, w) from 0 to 255 -> (n, h, w, 3) float32 from 0 to 1."""
    colors = images if images.shape[1] == 3 else images.float().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return (colors.float() / 255).clamp(0, 1).permute(0, 2, 3, 1).cpu()
