"""Stores that are down, answer 500, are full or deleted: one message, no lost record, and no password in sight."""

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import pytest
from conftest import Call, CommandLine, free_port, wait_for_server
from mlflow import MlflowClient
from PIL import Image
from processes import (
    SECRET,
    SHORT,
    assert_complete,
    assert_nowhere,
    assert_sweep_complete,
    begin,
    broken_server,
    local_defaults,
    shell,
    small_disk,
)

from mnist_exp import cli, compare, draw, evaluate, predict, run, runs, ui
from mnist_exp.tracking.connection import connect
from mnist_exp.tracking.views import VIEW_PREFIX, fixed_views

COMMANDS = {
    "run": (run.main, SHORT),
    "sweep": (run.main, ("-m", *SHORT, "seed=0,1")),
    "predict": (predict.main, ("digit.png",)),
    "draw": (draw.main, ("--port", str(free_port()))),
    "ui": (ui.main, ()),
    "runs": (runs.main, ("list",)),
    "compare": (compare.main, ()),
    "evaluate": (evaluate.main, ("latest", "--data", "digits")),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let MLflow's client ask once: by default it repeats a request for minutes. Leave the environment to no other test."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield
    forkserver._forkserver._stop()  # the workers of a later sweep would have it, too; there is no public way


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name in COMMANDS for place in ("typed", "environment")]
    + [(name, "conf/local") for name in ("run", "sweep", "runs")],
)
def test_a_server_that_answers_500_gets_the_password_and_no_record_does(
    call: Call, name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message does not contain it, nor does the stack trace, which is asked for unless the address is typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "TRACE", place != "typed")
    Image.new("L", (28, 28)).save("digit.png")
    command, arguments = COMMANDS[name]
    locations = [f"output_dir={tmp_path}"] if command is run.main else ["--output-dir", str(tmp_path)]
    with broken_server() as (server, seen):
        address = server.replace("://", f"://user:{SECRET}@")
        if place == "typed":
            locations += [f"tracking.uri='{address}'"] if command is run.main else ["--tracking-uri", address]
        elif place == "environment":
            monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with local_defaults(f"tracking: {{uri: '{address}'}}") as local:
            monkeypatch.setenv("MNIST_EXP_LOCAL", local if place == "conf/local" else "none")
            done = call(command, *arguments, *locations)
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == (place != "typed")
    assert "500" in done.stderr
    assert_nowhere(SECRET, tmp_path, done.stdout, done.stderr)
    credentials = base64.b64encode(f"user:{SECRET}".encode()).decode()
    assert set(seen) == {f"Basic {credentials}"}


@pytest.mark.parametrize("arguments", [("latest",), ("0" * 32,), ("abcdef",)], ids=str)
def test_a_sweep_that_the_server_cannot_read_is_not_said_to_be_missing(
    call: Call, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with broken_server(with_experiment=True) as (server, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
        locations = (f"output_dir={tmp_path}/outputs", "tracking.patience=0")
        for done in (
            call(compare.main, *arguments),
            call(run.main, "-m", f"sweep.extend='{arguments[0]}'", "seed=range(5,20)", *locations),
            call(run.main, "-m", f"sweep.resume='{arguments[0]}'", *locations),
        ):
            assert done.returncode == 1
            assert "500" in done.stderr
            assert "Traceback" not in done.stderr


def test_a_run_that_the_server_does_not_start_leaves_one_message(in_process: CommandLine, tmp_path: Path) -> None:
    with broken_server(with_experiment=True) as (server, _):
        done = in_process(*SHORT, f"tracking.uri={server}")
    assert done.returncode == 1
    assert f"{server} cannot start a run" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "outputs").iterdir()) == []


def test_a_run_that_a_full_store_does_not_start_leaves_one_message(
    in_process: CommandLine, template_database: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "store", "8m") as fill:
        shutil.copyfile(template_database, tmp_path / "store" / "mlflow.db")
        address = f"sqlite:///{tmp_path}/store/mlflow.db"
        connect(address, "mnist_exp")
        fill()
        done = in_process(*SHORT, f"tracking.uri={address}")
    assert done.returncode == 1
    assert address in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "outputs").iterdir()) == []


@pytest.fixture
def server(template_database: Path, tmp_path: Path) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """An MLflow server: its address, and functions that stop and start it."""
    shutil.copyfile(template_database, tmp_path / "server.db")
    port = free_port()
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
        wait_for_server(f"http://127.0.0.1:{port}/health", processes[-1])

    def stop(signum: int = signal.SIGTERM) -> None:
        os.killpg(processes[-1].pid, signum)
        processes[-1].wait(timeout=30)

    start()
    yield f"http://127.0.0.1:{port}", stop, start
    stop()


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
    process = begin(address, tmp_path, epochs=30, more=("tracking.patience=10", f"tracking.uri={address}"))
    stop()
    _, error = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "Traceback" not in error
    start()
    (command,) = re.findall("`([^`]+)`", error)
    shell(command)
    assert_complete(address, 30)


@pytest.mark.slow
@pytest.mark.parametrize("typed", [False, True], ids=["environment", "typed"])
def test_a_sweep_is_resumed_with_a_password_that_is_recorded_nowhere(server, tmp_path: Path, typed: bool) -> None:
    address = server[0].replace("://", f"://user:{SECRET}@")
    locations = [f"output_dir={tmp_path}/outputs", *([f"tracking.uri='{address}'"] if typed else [])]
    environment = os.environ | {"MLFLOW_TRACKING_URI": "sqlite:////proc/nowhere.db" if typed else address}
    command = [sys.executable, "-m", "mnist_exp.run", "-m"]
    recipe = [*SHORT, "seed=0,1", "phases.finetune.optimizer.lr=0.001,1e29"]  # of which two jobs fail
    for overrides in (recipe, ["sweep.resume=latest"]):
        done = subprocess.run([*command, *overrides, *locations], env=environment, capture_output=True, text=True, check=False)
        assert "2 of 4 jobs did not finish" in done.stderr
        assert_nowhere(SECRET, tmp_path, done.stdout, done.stderr)


@pytest.mark.slow
def test_a_server_that_is_killed_costs_a_sweep_no_job(server, tmp_path: Path) -> None:
    """Two jobs end while it is away, and wait to record that; two others start, and wait to open it."""
    address, stop, start = server
    process = begin(address, tmp_path, epochs=15, more=("-m", "seed=range(0,4)"))
    stop(signal.SIGKILL)
    time.sleep(25)
    start()
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    for noise in ("Retrying", "View run", "Traceback"):
        assert noise not in out + error
    assert_sweep_complete(address, 4)


@pytest.mark.slow
@pytest.mark.parametrize("deleted", ["parent", "experiment"])
def test_a_run_deleted_during_a_sweep_can_be_restored(deleted: str, store: str, tmp_path: Path) -> None:
    process = begin(store, tmp_path, epochs=40, more=("-m", "seed=range(0,3)", f"tracking.uri={store}"))
    client = MlflowClient(store)
    (parent,) = client.search_runs(["1"], "tags.sweep_jobs LIKE '%'")
    if deleted == "parent":
        client.delete_run(parent.info.run_id)
    else:
        client.delete_experiment("1")
    _, error = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "Traceback" not in error
    restore, resume = re.findall("`([^`]+)`", error)
    assert "restore" in restore
    for command in (restore, resume):
        shell(command)
    assert_sweep_complete(store, 3)


WRITER = """
import sys
from mnist_exp.tracking.base import RunInfo
from mnist_exp.tracking.mlflow_store import MLflowStore
with MLflowStore(sys.argv[1], "shared").start(RunInfo(sys.argv[2], "", {"writer": sys.argv[2]})) as tracker:
    for step in range(500):
        tracker.log_metrics({"value": step, "square": step * step}, step)
        if step % 10 == 9:
            tracker.flush()
    tracker.log_params({"writer": sys.argv[2]})
    tracker.log_text("x" * 1000, "text.txt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["database", "server"])
def test_eight_processes_share_a_new_store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Each logs 1,000 points in 50 batches."""
    address = request.getfixturevalue("server")[0] if kind == "server" else f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-c", WRITER, address]
    writers = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for number in range(8)
    ]
    for writer in writers:
        _, error = writer.communicate(timeout=300)
        assert writer.returncode == 0, error
        assert "locked" not in error
    client = MlflowClient(address)
    found = client.search_runs([client.get_experiment_by_name("shared").experiment_id])
    assert sorted(item.data.params["writer"] for item in found) == [str(number) for number in range(8)]
    for item in found:
        assert item.info.status == "FINISHED"
        for key, power in (("value", 1), ("square", 2)):
            points = client.get_metric_history(item.info.run_id, key)
            assert sorted((point.step, point.value) for point in points) == [(step, step**power) for step in range(500)]
        assert [file.path for file in client.list_artifacts(item.info.run_id)] == ["text.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("made", [False, True], ids=["new experiment", "experiment without our view"])
def test_eight_that_open_a_server_at_once_find_one_experiment(made: bool, server) -> None:
    together = threading.Barrier(8)

    def first_run(experiment: str) -> str:
        together.wait()
        return connect(server[0], experiment)[1]

    with ThreadPoolExecutor(8) as pool:
        for experiment in map(str, range(20)):  # the race was lost in about one of four
            if made:
                MlflowClient(server[0]).create_experiment(experiment)
            assert len(set(pool.map(first_run, [experiment] * 8))) == 1
            tags = MlflowClient(server[0]).get_experiment_by_name(experiment).tags
            assert {VIEW_PREFIX + key for key in fixed_views()} <= tags.keys()
