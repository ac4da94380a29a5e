import torch
from torch import nn

from mnist_exp.learning.distillation import Ensemble, Labels

IMAGES, LABELS = torch.rand(5, 1, 28, 28), torch.arange(5)


def test_labels_are_the_targets_without_a_teacher() -> None:
    assert Labels()(IMAGES, LABELS) is LABELS
    assert not Labels().saw_validation_split


def test_an_ensemble_returns_the_mean_probabilities_without_gradients() -> None:
    first, second = (nn.Sequential(nn.Flatten(), nn.Linear(784, 10)) for _ in range(2))
    targets = Ensemble([first, second], saw_validation_split=False)(IMAGES, LABELS)
    torch.testing.assert_close(targets, (first(IMAGES).softmax(1) + second(IMAGES).softmax(1)) / 2)
    assert not targets.requires_grad
