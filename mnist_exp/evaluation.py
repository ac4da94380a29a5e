"""Score a model on a split; values are returned, never logged."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_exp.data import CLASSES, Split
from mnist_exp.errors import UserError

BATCH_SIZE = 250  # larger ones leave the CPU's cache, and take twice as long


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a split: logits (n, 10) float32 and labels (n,) int64, on the CPU."""

    logits: Tensor
    labels: Tensor

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats."""
        return F.cross_entropy(self.logits, self.labels).item()

    @property
    def accuracy(self) -> float:
        """Fraction of the images given their label, 0 to 1."""
        return int((self.logits.argmax(1) == self.labels).sum()) / len(self.labels)

    @property
    def confusion_matrix(self) -> Tensor:
        """Count images by (label, prediction): (10, 10) int64."""
        cells = self.labels * CLASSES + self.logits.argmax(1)
        return torch.bincount(cells, minlength=CLASSES**2).view(CLASSES, CLASSES)

    @property
    def mistakes(self) -> list[tuple[int, int, int]]:
        """The images that were not given their label, as (index, label, prediction)."""
        predictions = self.logits.argmax(1)
        wrong = (predictions != self.labels).nonzero().flatten()
        return list(zip(wrong.tolist(), self.labels[wrong].tolist(), predictions[wrong].tolist(), strict=True))

    def worst_mistakes(self, count: int) -> Tensor:
        """Return the indices of at most `count` wrongly classified images, largest loss first."""
        losses = F.cross_entropy(self.logits, self.labels, reduction="none")
        losses[self.logits.argmax(1) == self.labels] = -1
        worst = losses.argsort(descending=True, stable=True)[:count]
        return worst[losses[worst] >= 0]


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> Evaluation:
    """Score `model` on every image of `split` once, in float32 and in evaluation mode; the model's mode is restored.

    Raises UserError where a logit is not finite: the training has diverged.
    """
    was_training = model.training
    model.eval()
    batches = split.images.split(BATCH_SIZE)  # type: ignore[no-untyped-call]  # torch's
    logits = torch.cat([model(images).float() for images in batches])
    model.train(was_training)
    if not logits.isfinite().all():
        raise UserError(
            "The model's logits are not finite, its training has diverged: allowed are finite numbers. "
            "Lower the learning rate (optimizer.lr, phases.*.optimizer.lr)."
        )
    return Evaluation(logits.cpu(), split.labels.cpu())
