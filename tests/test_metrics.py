import os
import subprocess
import sys
from pathlib import Path

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


def test_a_metric_without_an_entry_is_an_error_before_training(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom mnist_exp import metrics\ndel metrics.METRICS['calibration_error']\n"
        f"sys.argv = ['run', 'data=digits', 'output_dir={tmp_path}/outputs']\nfrom mnist_exp.run import main\nmain()\n"
    )
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "calibration_error" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
