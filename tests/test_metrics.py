from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Compose

from mnist_exp.learning.data import Dataset
from mnist_exp.learning.evaluation import EVALUATED
from mnist_exp.learning.training import fit, prepare_phases
from mnist_exp.metrics import METRICS, OTHER, format_metric, metric_of
from mnist_exp.settings import build


def test_every_metric_of_an_evaluation_has_a_format() -> None:
    assert EVALUATED.keys() <= METRICS.keys(), "a function in learning/evaluation.py lacks its entry in metrics.py"


def test_every_metric_of_training_has_a_format(composed: Compose, digits: Dataset) -> None:
    settings = composed("data=digits", "~phases.train")
    model = build(settings.model, "model", **digits.shape)
    one_step = replace(digits, splits=digits.splits | {"train": replace(digits.splits["train"], epoch_size=128)})
    phase = replace(build(settings.phases["finetune"], "phases.finetune"), split="train", epochs=1)
    reports = list(
        fit(model, prepare_phases(model, {"finetune": phase}, one_step, Path()), one_step, seed=0, precision=torch.float32)
    )
    recorded = {name for report in reports for name in report.metrics}
    assert {f"val/{name}" for name in EVALUATED} <= recorded
    assert OTHER not in map(metric_of, recorded)


SHOWN = {
    "test/accuracy": (0.98604, "98.60 %"),
    "val/loss": (0.043219, "0.0432"),
    "test/calibration_error": (0.0051, "0.51 %"),
    "model/parameters": (19_674.0, "19,674"),
    "time/train_seconds": (3.456, "3.46 s"),
    "train/examples_per_second": (12_345.6, "12,346 examples/s"),
    "sweep/unknown": (0.123456, "0.1235"),
    "train/loss": (float("nan"), "-"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_metric_looks_the_same_everywhere(name: str) -> None:
    value, text = SHOWN[name]
    assert format_metric(name, value) == text


def test_differences_have_a_sign_and_a_unit_of_their_own() -> None:
    assert format_metric("test/accuracy", 0.0012, signed=True, is_difference=True) == "+0.12 points"
    assert format_metric("test/accuracy", -0.00001, signed=True, bare=True) == "+0.00"
