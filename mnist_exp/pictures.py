"""The pictures of a run, as matplotlib figures: numbers in, a figure out; nothing is saved or logged here.

Margins are given, and images share axes: letting matplotlib lay out dozens of axes took longer than training half an epoch.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import Tensor

from mnist_exp.evaluation import Evaluation

History = Sequence[tuple[int, Mapping[str, float]]]  # (examples seen, metrics), in order


def confusion_matrix(evaluation: Evaluation, title: str) -> Figure:
    """Draw labels against predictions, counts in the cells, coloured by the share of mistakes."""
    counts = evaluation.confusion_matrix
    mistakes = counts.float() / counts.sum(1, keepdim=True).clamp(min=1)
    mistakes.fill_diagonal_(0)
    figure = Figure(figsize=(6, 5.6))
    axes = figure.add_subplot(xlabel="prediction", ylabel="label", title=title, xticks=range(10), yticks=range(10))
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
            axes.yaxis.set_major_formatter("{x:g}")  # powers of ten would take the parser of formulas, most of a second
            axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right" if metric == "loss" else "lower right")
    return figure


def learning_rate(history: History) -> Figure:
    """Draw the learning rate against the examples seen."""
    figure = Figure(figsize=(6, 3.6))
    figure.subplots_adjust(left=0.18, right=0.97, bottom=0.15, top=0.9)
    axes = figure.add_subplot(xlabel="examples seen", title="train/lr")
    axes.plot([seen for seen, _ in history], [metrics["train/lr"] for _, metrics in history], marker=".")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    return figure


def augmented_digits(
    images: Tensor,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    generator: torch.Generator,
    versions: int = 9,
) -> Figure:
    """Draw each of `images` (n, 1, 28, 28) in a row: as it is, then augmented anew `versions` times."""
    columns = torch.cat([images.float(), *(augment(images, generator) for _ in range(versions))], dim=1).cpu()  # (n, 10, 28, 28)
    framed = F.pad(columns, (1, 1, 1, 1), value=255)
    sheet = framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # (n, 30, 10, 30) -> (n * 30, 10 * 30)
    figure = Figure(figsize=(sheet.shape[1] / 42, sheet.shape[0] / 42 + 0.4))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.93)
    axes = figure.add_subplot(title="left: as it is; then: augmented, one draw per image")
    axes.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=255)
    axes.axis("off")
    return figure


def worst_mistakes(evaluation: Evaluation, images: Tensor, count: int = 25) -> Figure:
    """Draw the `count` mistakes of largest loss, each with its label, prediction and confidence; images: (n, 1, 28, 28)."""
    worst = evaluation.worst_mistakes(count)
    confidences, predictions = evaluation.logits[worst].softmax(1).max(1)
    total = int((evaluation.logits.argmax(1) != evaluation.labels).sum())
    columns = 5
    rows = -(-count // columns)
    cells = torch.full((rows * columns, 36, 36), 255.0)  # each image with room for its line above
    cells[: len(worst), 8:, 4:32] = images[worst.to(images.device), 0].float().cpu()
    sheet = cells.view(rows, columns, 36, 36).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # (rows * 36, columns * 36)
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
        axes.text(column * 36 + 18, row * 36 + 6, text, ha="center", va="baseline", fontsize=9)
    return figure
