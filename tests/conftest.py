import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from mnist_exp import paths
from mnist_exp.composing import compose_recipe
from mnist_exp.learning.data import Dataset, Split
from mnist_exp.learning.datasets import MNIST_FILES, load_digits
from mnist_exp.nodes import build
from mnist_exp.paths import HOME
from mnist_exp.run import main
from mnist_exp.settings import DataDescription, Recipe, Settings
from mnist_exp.signals import SIGNALS
from mnist_exp.storage import checkpoint, run_dir
from mnist_exp.tracking.base import RunInfo
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.models import save_model

Compose = Callable[..., Settings]
CommandLine = Callable[..., subprocess.CompletedProcess[str]]
Call = Callable[..., subprocess.CompletedProcess[str]]
MNIST = DataDescription(class_names=list("0123456789"), side=28, channels=1, preparation="handwriting")
MNIST_SHAPE = MNIST.shape


def pytest_configure() -> None:
    """Take one thread in each of several processes of tests: on their cores a second one only waits."""
    os.environ["MNIST_EXP_LOCAL"] = "none"  # the developer's own defaults must not matter
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start
        torch.set_num_threads(1)


def finished(settings: Settings, data: Dataset, output_dir: Path, *, ended: bool = True) -> str:
    """Leave what a finished run leaves, of a network that has not learned anything, and return the run's id."""
    run_id = uuid4().hex
    model = build(settings.model, "model", **data.shape)
    state = {"model": model.state_dict(), "phase": list(settings.phases)[-1], "ended": ended}
    history = [(1, {"epoch": 1.0})]
    used = [phase["split"] for phase in settings.phases.values()]
    folder = run_dir.ensure_writable_dir(output_dir / run_id)
    recipe = Recipe(settings.model_copy(update={"data_description": DataDescription(**data.description, trained_on=used)}))
    checkpoint.save(folder, checkpoint.Checkpoint(run_id, recipe, {}, state, history, {}, 0.0))
    if ended:
        save_model(folder / "model", model, recipe.settings, {})
    run_dir.mark_complete(folder)
    return run_id


class Bomb:
    """An object whose unpickling executes a command."""

    def __reduce__(self):
        return (os.system, ("touch exploded",))


def chromium() -> str | None:
    """Return the browser that pages are looked at in."""
    return next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests apart from the run of an `mlflow run` that started them, and from each other's experiments and draws."""
    torch.manual_seed(0)
    paths.typed.clear()
    for name in (
        "MNIST_EXP_TRACKING",
        "MLFLOW_RUN_ID",
        "MLFLOW_EXPERIMENT_ID",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
    ):
        monkeypatch.setenv(name, "")  # puts back, after the test, what the commands set
        monkeypatch.delenv(name)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which a run sets for Hydra


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    root = Path(os.environ.get("MNIST_ROOT", HOME / "data"))
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
    """Digits with epochs of one pass, or of a batch of fine-tuning: enough to take steps, not to learn."""
    sizes = {name: max(128, len(split)) for name, split in digits.splits.items()}
    return replace(digits, splits={name: replace(split, epoch_size=sizes[name]) for name, split in digits.splits.items()})


def one_split(name: str = "mnist", split: str = "test", digest: str = "ab12", shape: tuple[int, ...] = (1, 28, 28)) -> Dataset:
    """A data set of ten black images."""
    images, labels = torch.zeros(10, *shape, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64)
    return Dataset(name, "somewhere", "0123456789", {split: Split(images, labels, 10, digest)}, validation=split)


@pytest.fixture
def composed() -> Compose:
    """Compose and check the configuration as the command line does."""
    return lambda *overrides: compose_recipe(*overrides).settings


@pytest.fixture
def stored_run(store: str, tmp_path: Path, composed: Compose) -> str:
    """The id of a finished run whose network has not learned anything."""
    settings = composed().model_copy(update={"data_description": MNIST})
    opened = MLflowStore(store, "mnist_exp")
    opened.open()
    with opened.start(RunInfo("se_cnn", "python -m mnist_exp.run", {"data": "mnist"})) as tracker:
        tracker.log_model("se_cnn-mnist", build(settings.model, "model", **MNIST_SHAPE), settings, {}, tmp_path / "model")
    return str(tracker.run_id)


@pytest.fixture
def command_line(tmp_path: Path) -> CommandLine:
    """Run `python -m mnist_exp.run` as a user does, with its output under tmp_path."""

    def run(*overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mnist_exp.run", *overrides, f"output_dir={tmp_path / 'outputs'}"],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | environment,
            check=False,
        )

    return run


@pytest.fixture
def handlers_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put back, after the test, what `signals.install_signal_handlers` replaces in this process."""
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def free_port() -> int:
    """Return a port of this machine that no server uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_server(address: str, process: "subprocess.Popen[Any]", seconds: float = 60) -> None:
    """Wait until a server answers at an address; its process must go on."""
    for _ in range(int(4 * seconds)):
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            assert process.poll() is None, "the server has ended"
            time.sleep(0.25)
    raise AssertionError(f"nothing answers at {address}")


def exit_status(command: Callable[[], object]) -> int:
    """Call the main function of a command and return the status with which its process would end."""
    try:
        command()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def call(handlers_put_back: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Call the main function of a command with a command line, within this process, which saves the imports."""

    def run(command: Callable[[], object], *arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["mnist-exp", *arguments])
        status = exit_status(command)
        printed = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, status, printed.out, printed.err)

    return run


@pytest.fixture
def in_process(call: Call, tmp_path: Path) -> CommandLine:
    """Do what `command_line` does within this process."""
    return lambda *overrides: call(main, *overrides, f"output_dir={tmp_path / 'outputs'}")


@pytest.fixture
def refuse(in_process: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the command line, expect it to refuse without a trace of a run, and return what it says."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'untouched.db'}")

    def run(*overrides: str) -> str:
        done = in_process(*overrides)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "untouched.db").exists(), "a refused run must leave nothing in MLflow"
        assert not list(tmp_path.rglob("*.pt"))
        return done.stderr

    return run
