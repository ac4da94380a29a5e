import pytest
import torch

from mnist_exp.learning.evaluation import Evaluation

LOGITS = torch.full((4, 10), -10.0)
LOGITS[0, 3], LOGITS[1, 3], LOGITS[2, 7], LOGITS[3, 0] = 10, 5, 9, 1
EVALUATION = Evaluation(LOGITS, torch.tensor([3, 4, 7, 9]))


def test_scores() -> None:
    assert EVALUATION.accuracy == 0.5
    assert EVALUATION.loss == pytest.approx((15 + 11) / 4, abs=1e-3)


def test_confusion_matrix_counts_labels_by_predictions() -> None:
    matrix = EVALUATION.confusion_matrix
    assert matrix.sum() == 4
    assert all(matrix[label, prediction] == 1 for label, prediction in ((3, 3), (4, 3), (7, 7), (9, 0)))


def test_worst_mistakes_are_mistakes_in_order() -> None:
    assert EVALUATION.worst_mistakes(25).tolist() == [1, 3]
    assert EVALUATION.worst_mistakes(1).tolist() == [1]
