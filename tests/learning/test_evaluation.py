import pytest
import torch

from mnist_exp.learning.evaluation import Evaluation, calibration_error

LOGITS = torch.full((4, 10), -10.0)
LOGITS[0, 3], LOGITS[1, 3], LOGITS[2, 7], LOGITS[3, 0] = 10, 5, 9, 1
EVALUATION = Evaluation(LOGITS, torch.tensor([3, 4, 7, 9]))


def test_scores() -> None:
    assert EVALUATION.metrics["accuracy"] == 0.5
    assert EVALUATION.metrics["loss"] == pytest.approx((15 + 11) / 4, abs=1e-3)


def test_calibration_error() -> None:
    """Four predictions of confidence 0.9, three of them correct, and two of 0.5, one correct: gaps of 0.15 and 0."""
    confidences = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.5, 0.5])
    logits = torch.stack([confidences.log(), (1 - confidences).log()], dim=1)
    labels = torch.tensor([0, 0, 0, 1, 0, 1])
    assert calibration_error(logits, labels) == pytest.approx(4 / 6 * 0.15, abs=1e-6)
    assert calibration_error(torch.tensor([[100.0, 0.0]]), torch.tensor([0])) == pytest.approx(0)
    assert calibration_error(torch.tensor([[100.0, 0.0]]), torch.tensor([1])) == pytest.approx(1)


def test_confusion_matrix_counts_labels_by_predictions() -> None:
    matrix = EVALUATION.confusion_matrix
    assert matrix.sum() == 4
    assert all(matrix[label, prediction] == 1 for label, prediction in ((3, 3), (4, 3), (7, 7), (9, 0)))


def test_worst_mistakes_are_mistakes_in_order() -> None:
    assert EVALUATION.worst_mistakes(25).tolist() == [1, 3]
    assert EVALUATION.worst_mistakes(1).tolist() == [1]
