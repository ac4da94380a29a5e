import pytest
import torch
import torch.nn.functional as F
from conftest import Compose

from mnist_exp.learning.losses import FocalLoss
from mnist_exp.nodes import build

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3]])
LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_loss_without_focus_is_cross_entropy(smoothing: float) -> None:
    expected = F.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing)
    torch.testing.assert_close(FocalLoss(gamma=0, label_smoothing=smoothing)(LOGITS, LABELS), expected)


def test_focal_loss_is_that_of_its_paper() -> None:
    p = LOGITS.softmax(1)[[0, 1], LABELS]
    torch.testing.assert_close(FocalLoss(gamma=2)(LOGITS, LABELS), (-((1 - p) ** 2) * p.log()).mean())


def test_losses_take_the_probabilities_of_a_teacher(composed: Compose) -> None:
    targets = F.one_hot(LABELS, 3).float()
    for option in ("cross_entropy", "focal"):
        loss = build(composed(f"loss={option}").phases["train"]["loss"], "loss")
        torch.testing.assert_close(loss(LOGITS, targets), loss(LOGITS, LABELS))
