import pytest

from mnist_exp.metrics import format_metric

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
