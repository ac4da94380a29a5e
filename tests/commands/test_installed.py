"""A copy that was installed, not editable, run by somebody who has no checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_exp.paths import CHECKOUT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the copy; what it depends on comes from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    source = tmp_path_factory.mktemp("source") / "checkout"
    subprocess.run(["git", "clone", "--quiet", CHECKOUT, source], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", folder]
    subprocess.run([*pip, source], check=True)
    return folder


def run(installed: Path, here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment |= {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)


def test_it_trains_into_the_current_folder(installed: Path, tmp_path: Path) -> None:
    composed = run(installed, tmp_path, "mnist_exp.run", "--cfg", "job")
    assert composed.returncode == 0, composed.stderr
    done = run(installed, tmp_path, "mnist_exp.run", "data=digits", "~phases.train")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock", "mlartifacts", "outputs"}
    assert "test/accuracy" in done.stdout
    listed = run(installed, tmp_path, "mnist_exp.runs", "list")
    assert "FINISHED" in listed.stdout, listed.stderr


def test_it_sweeps_and_compares(installed: Path, tmp_path: Path) -> None:
    swept = run(installed, tmp_path, "mnist_exp.run", "-m", "data=digits", "~phases.train", "model=se_cnn,plain_cnn", "seed=0,1")
    assert swept.returncode == 0, swept.stderr
    compared = run(installed, tmp_path, "mnist_exp.compare", "--factor", "model")
    assert compared.returncode == 0, compared.stderr
    assert "plain_cnn" in compared.stdout
