"""Evaluation of a model on a split. Values are returned, never logged."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_exp.errors import DivergedError, UserError
from mnist_exp.learning.data import Split
from mnist_exp.metrics import METRICS

BATCH_SIZE = 250  # larger batches exceed the CPU's cache and take twice as long
Metric = Callable[[Tensor, Tensor], float]
EVALUATED: list[Metric] = []  # the metrics of an evaluation


def metric(function: Metric) -> Metric:
    """Make a function of logits (n, classes) float32 and labels (n,) int64 a metric of every evaluation, under its own name.

    Raises:
        UserError: `metrics.py` has no entry of that name.
    """
    if function.__name__ not in METRICS:
        remedy = "Add a line that says how it is displayed, and whether higher is better."
        raise UserError(f"The metric {function.__name__} has no entry in metrics.py.", key=function.__name__, remedy=remedy)
    EVALUATED.append(function)
    return function


@metric
def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction of correct predictions, 0 to 1."""
    return int((logits.argmax(1) == labels).sum()) / len(labels)


@metric
def loss(logits: Tensor, labels: Tensor) -> float:
    """Return the mean cross-entropy, in nats."""
    return F.cross_entropy(logits, labels).item()


@metric
def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error, 0 to 1: the mean gap between confidence and accuracy in 15 equal-width bins.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, equation 3.
    """
    confidences, predictions = logits.double().softmax(1).max(1)  # (n, classes) -> (n,), (n,)
    bins = (confidences * 15).ceil().long() - 1  # bin m covers (m / 15, (m + 1) / 15]
    gaps = (predictions == labels).double() - confidences
    return float(torch.zeros(15, dtype=torch.double).index_add_(0, bins.clamp(0, 14), gaps).abs().sum()) / len(labels)


@dataclass(frozen=True)
class Evaluation:
    """A model's logits (n, classes) float32 on a split, and the labels (n,) int64, both on the CPU."""

    logits: Tensor
    labels: Tensor

    @property
    def metrics(self) -> dict[str, float]:
        """The value of each of `EVALUATED`, by its name."""
        return {function.__name__: function(self.logits, self.labels) for function in EVALUATED}

    @property
    def predictions(self) -> Tensor:
        """The class of largest logit for each image: (n,) int64."""
        return self.logits.argmax(1)  # (n, classes) -> (n,)

    @property
    def confusion_matrix(self) -> Tensor:
        """Number of images by (label, prediction): (classes, classes) int64."""
        classes = self.logits.shape[1]
        cells = self.labels * classes + self.predictions
        return torch.bincount(cells, minlength=classes**2).view(classes, classes)  # (classes * classes,) -> (classes, classes)

    @property
    def mistakes(self) -> list[tuple[int, int, int]]:
        """The wrong predictions, as (index, label, prediction)."""
        wrong = (self.predictions != self.labels).nonzero().flatten()  # (m, 1) -> (m,)
        return list(zip(wrong.tolist(), self.labels[wrong].tolist(), self.predictions[wrong].tolist(), strict=True))

    def worst_mistakes(self, count: int) -> Tensor:
        """Return the indices (m,) of the wrong predictions with the largest loss, in descending order, at most `count`."""
        losses = F.cross_entropy(self.logits, self.labels, reduction="none")  # (n,)
        losses[self.predictions == self.labels] = -1
        worst = losses.argsort(descending=True, stable=True)[:count]
        return worst[losses[worst] >= 0]


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> Evaluation:
    """Evaluate `model` once on every image of `split`, in float32 and evaluation mode, and restore the model's mode.

    Raises:
        DivergedError: A logit is not finite, because the training diverged.
    """
    was_training = model.training
    model.eval()
    batches = split.images.split(BATCH_SIZE)  # type: ignore[no-untyped-call]  # torch's
    logits = torch.cat([model(images).float() for images in batches])  # (n, classes)
    model.train(was_training)
    if not logits.isfinite().all():
        raise DivergedError(
            "The model's logits are not finite: the training diverged.",
            remedy="Lower the learning rate (optimizer.lr, phases.*.optimizer.lr).",
        )
    return Evaluation(logits.cpu(), split.labels.cpu())
