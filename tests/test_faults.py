"""What breaks while a run is on: the process, the tracking server, the disk."""

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import CommandLine
from mlflow import MlflowClient

from mnist_exp import ROOT, checkpoint

SHORT = ("data=digits", "~phases.train")


def test_a_resumed_run_keeps_its_own_recipe(in_process: CommandLine, store: str) -> None:
    done = in_process("resume=latest", "optimizer=adam", "seed=3")
    assert done.returncode == 1
    assert "optimizer=adam seed=3 cannot change it" in done.stderr


def test_a_run_that_is_not_there_or_has_finished_is_named(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    assert "no unfinished run has a checkpoint" in in_process("resume=latest").stderr
    assert "there is no such run" in in_process(f"resume={'0' * 32}").stderr
    assert in_process(*SHORT).returncode == 0
    (run,) = [path.parent.name for path in (tmp_path / "outputs").glob("*/finished")]
    assert "this run has finished" in in_process(f"resume={run}").stderr


def test_a_second_process_is_refused(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    assert in_process(*SHORT).returncode == 0
    (folder,) = [path.parent for path in (tmp_path / "outputs").glob("*/finished")]
    (folder / "finished").unlink()
    with checkpoint.hold(folder):
        done = in_process("resume=latest")
    assert done.returncode == 1
    assert f"Run {folder.name} is being worked on by another process" in done.stderr
    assert in_process("resume=latest").returncode == 0
    (run,) = MlflowClient(store).search_runs(["1"])
    assert run.info.status == "FINISHED"
    assert len(run.outputs.model_outputs) == 1


def test_a_stored_configuration_with_a_foreign_target_is_refused(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    assert in_process(*SHORT).returncode == 0
    (folder,) = [path.parent for path in (tmp_path / "outputs").glob("*/finished")]
    (folder / "finished").unlink()
    saved = checkpoint.load(folder / checkpoint.NAME)
    saved.config["model"]["_target_"] = "antigravity.main"
    checkpoint.save(folder, saved)
    done = in_process("resume=latest")
    assert done.returncode == 1
    assert "model._target_=antigravity.main is not allowed" in done.stderr
    assert "antigravity" not in sys.modules


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been() -> None:
    """Five kills; `scripts/kill_and_resume.py` makes fifty."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "kill_and_resume.py", "--kills", "5"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def server(template_database: Path, tmp_path: Path) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """An MLflow server: its address, and functions that stop and start it."""
    shutil.copyfile(template_database, tmp_path / "server.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "served")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        processes.append(
            subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        )
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                return
            except OSError:
                assert processes[-1].poll() is None
                time.sleep(0.25)

    def stop() -> None:
        processes[-1].terminate()
        processes[-1].wait(timeout=30)

    start()
    yield f"http://127.0.0.1:{port}", stop, start
    stop()


def begin(address: str, tmp_path: Path, epochs: int) -> subprocess.Popen[str]:
    """Start a run against the store and wait until it has reported its first epoch."""
    command = [
        sys.executable,
        "-m",
        "mnist_exp.run",
        *SHORT,
        f"phases.finetune.epochs={epochs}",
        f"output_dir={tmp_path}/outputs",
    ]
    process = subprocess.Popen(
        command, env=os.environ | {"MLFLOW_TRACKING_URI": address}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    client = MlflowClient(address)
    while not any(run.data.metrics for run in client.search_runs([e.experiment_id for e in client.search_experiments()])):
        assert process.poll() is None
        time.sleep(0.2)
    return process


def assert_complete(address: str, epochs: int) -> None:
    """The one run has finished, with every point of every epoch once."""
    client = MlflowClient(address)
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "epoch")
    assert [round(point.value * 10) for point in points] == list(range(1, 10 * epochs + 1))
    assert len({output.model_id for output in run.outputs.model_outputs}) == 1
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"checkpoint.pt", "config.yaml", "pictures"}


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back_gets_everything(server, tmp_path: Path) -> None:
    address, stop, start = server
    process = begin(address, tmp_path, epochs=150)
    stop()
    time.sleep(5)
    start()
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert_complete(address, 150)


@pytest.mark.slow
def test_a_server_that_stays_away_loses_nothing(server, tmp_path: Path) -> None:
    address, stop, start = server
    process = begin(address, tmp_path, epochs=30)
    stop()
    _, error = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "no longer takes what run" in error
    assert "Traceback" not in error
    (folder,) = (tmp_path / "outputs").iterdir()
    assert f"`python -m mnist_exp.run resume={folder.name}` sends the rest" in error
    start()
    go_on(folder, address)
    assert_complete(address, 30)


def go_on(folder: Path, address: str) -> None:
    """Resume the run in `folder`, which must succeed."""
    subprocess.run(
        [sys.executable, "-m", "mnist_exp.run", f"resume={folder.name}", f"output_dir={folder.parent}"],
        env=os.environ | {"MLFLOW_TRACKING_URI": address},
        check=True,
        capture_output=True,
    )


@pytest.mark.slow
def test_a_database_locked_for_half_a_minute_gets_everything(store: str, tmp_path: Path) -> None:
    process = begin(store, tmp_path, epochs=60)
    with contextlib.closing(sqlite3.connect(store.removeprefix("sqlite:///"), isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(30)
        other.execute("ROLLBACK")
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert_complete(store, 60)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system of one's own takes root")
def test_a_disk_that_fills_up_costs_an_epoch_at_most(store: str, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path / "outputs"], check=True)
    try:
        process = begin(store, tmp_path, epochs=100)
        with contextlib.suppress(OSError), (tmp_path / "outputs" / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        _, error = process.communicate(timeout=240)
        assert process.returncode == 1
        assert "cannot be written: [Errno 28] No space left on device" in error
        assert "Traceback" not in error
        (run,) = MlflowClient(store).search_runs(["1"])
        assert run.info.status == "FAILED"
        (tmp_path / "outputs" / "filler").unlink()
        go_on(tmp_path / "outputs" / run.info.run_id, store)
        assert_complete(store, 100)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path / "outputs"], check=True)
