"""Losses missing from torch. A loss takes logits (n, classes) float32 and targets, and returns a scalar.

Targets are labels (n,) int64, or probabilities (n, classes) float32 if a teacher gives them.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mnist_exp.errors import Fraction, NonNegative


class FocalLoss(nn.Module):
    """Mean cross-entropy that gives less weight to examples that are classified well.

    Args:
        gamma: Exponent of the weight (1 - p) ** gamma, where p is the probability of the target; 0 gives cross-entropy.
        label_smoothing: Share of each target that is spread over all classes.

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017, equation 4, without class weights.
    """

    def __init__(self, gamma: NonNegative = 2.0, label_smoothing: Fraction = 0.0) -> None:
        super().__init__()
        self.gamma, self.label_smoothing = gamma, label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.ndim == 1:
            targets = F.one_hot(targets, logits.shape[1]).float()  # (n,) -> (n, classes)
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / logits.shape[1]
        log_p = logits.log_softmax(1)  # (n, classes)
        return -(targets * (1 - log_p.exp()) ** self.gamma * log_p).sum(1).mean()
