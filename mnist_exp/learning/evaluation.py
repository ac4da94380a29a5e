"""Evaluation of a model on a split. Values are returned, never logged."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_exp.errors import UserError
from mnist_exp.learning.data import CLASSES, Split

BATCH_SIZE = 250  # larger batches exceed the CPU's cache and take twice as long


@dataclass(frozen=True)
class Evaluation:
    """A model's logits (n, 10) float32 on a split, and the labels (n,) int64, both on the CPU."""

    logits: Tensor
    labels: Tensor

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats."""
        return F.cross_entropy(self.logits, self.labels).item()

    @property
    def predictions(self) -> Tensor:
        """The class of largest logit for each image: (n,) int64."""
        return self.logits.argmax(1)  # (n, 10) -> (n,)

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions, 0 to 1."""
        return int((self.predictions == self.labels).sum()) / len(self.labels)

    @property
    def confusion_matrix(self) -> Tensor:
        """Number of images by (label, prediction): (10, 10) int64."""
        cells = self.labels * CLASSES + self.predictions
        return torch.bincount(cells, minlength=CLASSES**2).view(CLASSES, CLASSES)  # (100,) -> (10, 10)

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
        UserError: A logit is not finite, because the training diverged.
    """
    was_training = model.training
    model.eval()
    batches = split.images.split(BATCH_SIZE)  # type: ignore[no-untyped-call]  # torch's
    logits = torch.cat([model(images).float() for images in batches])  # (n, 10)
    model.train(was_training)
    if not logits.isfinite().all():
        raise UserError(
            "The model's logits are not finite: the training diverged. "
            "Lower the learning rate (optimizer.lr, phases.*.optimizer.lr)."
        )
    return Evaluation(logits.cpu(), split.labels.cpu())
