import pytest
from conftest import CommandLine
from mlflow import MlflowClient

from mnist_exp.learning.evaluation import EVALUATED
from mnist_exp.metrics import METRICS, OTHER, format_metric, metric_of


def test_every_metric_of_an_evaluation_has_a_format() -> None:
    assert EVALUATED.keys() <= METRICS.keys(), "a function in learning/evaluation.py lacks its entry in metrics.py"


def test_every_format_belongs_to_a_metric_that_runs_record(in_process: CommandLine, store: str) -> None:
    assert in_process("data=digits", "~phases.train", "phases.finetune.split=train", "phases.finetune.epochs=1").returncode == 0
    (run,) = MlflowClient(store).search_runs(["1"])
    assert OTHER not in map(metric_of, run.data.metrics)
    assert {metric_of(name).name for name in run.data.metrics} == set(METRICS)
    for name in EVALUATED:
        assert {f"val/{name}", f"test/{name}"} <= run.data.metrics.keys()


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
