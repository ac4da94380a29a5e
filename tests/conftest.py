import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from mnist_exp.config import resolve
from mnist_exp.data import MNIST_FILES, Dataset, load_digits
from mnist_exp.run import ROOT, main

Compose = Callable[..., dict[str, Any]]
CommandLine = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    root = Path(os.environ.get("MNIST_ROOT", ROOT / "data"))
    if not all((root / "MNIST" / "raw" / f"{name}.gz").exists() for name in MNIST_FILES):
        pytest.skip(f"the real MNIST is not in {root}: set MNIST_ROOT to a torchvision root that holds MNIST/raw/*.gz")
    return root


@pytest.fixture(scope="session")
def template_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making one takes six seconds, copying one none."""
    import mlflow

    database = tmp_path_factory.mktemp("template") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture
def store(template_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of this test's own, which MLFLOW_TRACKING_URI points to."""
    shutil.copyfile(template_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_digits(0.02, seed=0)


@pytest.fixture(scope="session")
def short_digits(digits: Dataset) -> Dataset:
    """Digits with epochs of one pass: enough to take steps, not to learn."""
    return replace(digits, splits={name: replace(split, epoch_size=len(split)) for name, split in digits.splits.items()})


@pytest.fixture
def composed() -> Iterator[Compose]:
    """Compose and check the configuration as the command line does."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield lambda *overrides: resolve(compose("config", list(overrides)))


@pytest.fixture
def command_line(tmp_path: Path) -> CommandLine:
    """Run `python -m mnist_exp.run` as a user does, with its output under tmp_path."""

    def run(*overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mnist_exp.run", f"output_dir={tmp_path / 'outputs'}", *overrides],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | environment,
            check=False,
        )

    return run


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line in this process, expect it to refuse, and return what it says."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'untouched.db'}")

    def run(*overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mnist-exp", f"output_dir={tmp_path / 'outputs'}", *overrides])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code not in (0, None)
        message = capfd.readouterr().err
        assert "Traceback" not in message
        assert not (tmp_path / "untouched.db").exists(), "a refused run must leave nothing in MLflow"
        return message

    return run
