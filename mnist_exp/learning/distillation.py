"""Training targets of a batch: the labels, or the predictions of networks trained before (distillation)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Targets:
    """Map a batch of augmented images (n, channels, side, side) float32 and labels (n,) int64 to the targets of the loss.

    The base class trains towards the labels.

    Attributes:
        saw_validation_split: Whether a network behind the targets may have been trained on the split that validates. The
            val/ metrics of the student would leak, and are skipped.
    """

    saw_validation_split = False

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return class indices (n,) int64 or probabilities (n, classes) float32."""
        return labels


class Ensemble(Targets):
    """Train towards the mean class probabilities of trained networks.

    Args:
        networks: At least one network, in evaluation mode and on the device of the images.
        saw_validation_split: See `Targets`.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2, at temperature 1, without the labels.
    """

    def __init__(self, networks: Sequence[nn.Module], saw_validation_split: bool) -> None:
        self.networks = networks
        self.saw_validation_split = saw_validation_split

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return probabilities (n, classes) float32."""
        probabilities = [network(images).float().softmax(1) for network in self.networks]
        return torch.stack(probabilities).mean(0)  # (networks, n, classes) -> (n, classes)
