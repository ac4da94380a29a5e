"""Faults during a run: the process, the tracking server, the disk."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from conftest import CommandLine, free_port, wait_for_server
from mlflow import MlflowClient

from mnist_exp.overrides import quoted
from mnist_exp.paths import CHECKOUT
from mnist_exp.storage import checkpoint, run_dir
from mnist_exp.tracking.connection import connect
from mnist_exp.tracking.views import VIEW_PREFIX, VIEWS

SHORT = ("data=digits", "~phases.train")


def test_a_resumed_run_keeps_its_own_recipe(in_process: CommandLine, store: str) -> None:
    done = in_process("resume=latest", "optimizer=adam", "seed=3")
    assert done.returncode == 1
    assert "optimizer=adam seed=3 cannot change it" in done.stderr


def test_a_run_that_is_not_there_or_has_finished_is_named(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    assert "no unfinished run has a checkpoint" in in_process("resume=latest").stderr
    assert "has no such run" in in_process(f"resume={'0' * 32}").stderr
    assert in_process(*SHORT).returncode == 0
    (run,) = [path.parent.name for path in (tmp_path / "outputs").glob("*/finished")]
    assert "this run has finished" in in_process(f"resume={run}").stderr


def test_a_second_process_is_refused(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    folder = unfinished(in_process, tmp_path)
    with run_dir.lock_run(folder):
        done = in_process("resume=latest")
    assert done.returncode == 1
    assert f"Another process works on run {folder.name}" in done.stderr
    assert in_process("resume=latest").returncode == 0
    (run,) = MlflowClient(store).search_runs(["1"])
    assert run.info.status == "FINISHED"
    assert len(run.outputs.model_outputs) == 1


def test_a_stored_configuration_with_a_foreign_target_is_refused(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    folder = unfinished(in_process, tmp_path)
    saved = checkpoint.load(folder / run_dir.CHECKPOINT)
    saved.config["model"]["_target_"] = "antigravity.main"
    checkpoint.save(folder, saved)
    done = in_process("resume=latest")
    assert done.returncode == 1
    assert "model._target_=antigravity.main is not allowed" in done.stderr
    assert "antigravity" not in sys.modules


def unfinished(in_process: CommandLine, tmp_path: Path) -> Path:
    """The folder of a run of which only the end is missing."""
    assert in_process(*SHORT).returncode == 0
    (folder,) = [path.parent for path in (tmp_path / "outputs").glob("*/finished")]
    (folder / "finished").unlink()
    return folder


def test_a_model_that_a_kill_left_half_recorded_is_completed(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    folder = unfinished(in_process, tmp_path)
    client = MlflowClient(store)
    (pending,) = client.search_logged_models(["1"])
    client.finalize_logged_model(pending.model_id, "PENDING")
    assert in_process("resume=latest").returncode == 0
    (model,) = client.search_logged_models(["1"])
    assert (model.model_id, model.status) == (pending.model_id, "READY")
    assert len(client.get_run(folder.name).outputs.model_outputs) == 1


def test_a_resumed_run_says_so_and_whether_the_software_changed(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    folder = unfinished(in_process, tmp_path)
    saved = checkpoint.load(folder / run_dir.CHECKPOINT)
    checkpoint.save(folder, replace(saved, software=saved.software | {"torch": "1.0"}, elapsed=saved.elapsed + 1000))
    done = in_process("resume=latest")
    assert "torch was 1.0, is " in done.stdout
    run = MlflowClient(store).get_run(folder.name)
    assert run.data.tags["resumed"].startswith("at 1,200 examples; torch was 1.0")
    assert "time/total_seconds │ 100" in " ".join(done.stdout.split()), "the seconds before the resume count"


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been() -> None:
    """Five kills; `tests/stress/kill_and_resume.py` makes fifty."""
    done = subprocess.run(
        [sys.executable, CHECKOUT / "tests" / "stress" / "kill_and_resume.py", "--kills", "5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


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


def begin(address: str, tmp_path: Path, epochs: int, *, more: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    """Start a run, or a sweep, against the store and wait until a run has reported its first epoch."""
    recipe = [*more, *SHORT, f"phases.finetune.epochs={epochs}"]
    command = [sys.executable, "-m", "mnist_exp.run", *recipe, f"output_dir={quoted(str(tmp_path / 'outputs'))}"]
    environment |= {"MLFLOW_TRACKING_URI": address}
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
    points = sorted(client.get_metric_history(run.info.run_id, "epoch"), key=lambda point: point.step)
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
    process = begin(address, tmp_path, epochs=30, more=("tracking.patience=10",))
    stop()
    _, error = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "no longer accepts the records of run" in error
    assert "Traceback" not in error
    start()
    (command,) = re.findall("`([^`]+)`", error)
    shell(command)
    assert_complete(address, 30)


def resume(folder: Path, address: str) -> None:
    """Resume the run in `folder`, which must succeed."""
    subprocess.run(
        [sys.executable, "-m", "mnist_exp.run", f"resume={folder.name}", f"output_dir={folder.parent}"],
        env=os.environ | {"MLFLOW_TRACKING_URI": address},
        check=True,
        capture_output=True,
    )


SECRET = uuid4().hex  # not written here, or the uncommitted changes could hold it


def assert_nowhere(secret: str, folder: Path, *texts: str) -> None:
    """The secret is in none of the files in `folder` and in none of the texts."""
    holders = [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert holders == []
    assert not any(secret in text for text in texts)


@pytest.mark.slow
def test_a_run_is_resumed_with_a_password_that_is_recorded_nowhere(server, tmp_path: Path) -> None:
    address = server[0].replace("://", f"://user:{SECRET}@")
    process = begin(address, tmp_path, epochs=100)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    (folder,) = (tmp_path / "outputs").iterdir()
    assert f"resume={folder.name}" in error
    environment = os.environ | {"MLFLOW_TRACKING_URI": "sqlite:////proc/nowhere.db"}
    command = [sys.executable, "-m", "mnist_exp.run", f"resume={folder.name}", f"output_dir={folder.parent}"]
    typed = [*command, f"tracking.uri='{address}'"]
    done = subprocess.run(typed, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_complete(server[0], 100)
    assert_nowhere(SECRET, tmp_path, out, error, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("typed", [False, True], ids=["environment", "typed"])
def test_a_sweep_is_resumed_with_a_password_that_is_recorded_nowhere(server, tmp_path: Path, typed: bool) -> None:
    address = server[0].replace("://", f"://user:{SECRET}@")
    locations = [f"output_dir={tmp_path}/outputs", *([f"tracking.uri='{address}'"] if typed else [])]
    environment = os.environ | {"MLFLOW_TRACKING_URI": "sqlite:////proc/nowhere.db" if typed else address}
    command = [sys.executable, "-m", "mnist_exp.run", "-m"]
    recipe = [*SHORT, "seed=0,1", "phases.finetune.optimizer.lr=0.001,1e29"]  # of which two jobs fail
    first = subprocess.run([*command, *recipe, *locations], env=environment, capture_output=True, text=True, check=False)
    assert "2 of 4 jobs did not finish" in first.stderr
    second = subprocess.run(
        [*command, "sweep.resume=latest", *locations], env=environment, capture_output=True, text=True, check=False
    )
    assert "2 of 4 jobs did not finish" in second.stderr
    assert_nowhere(SECRET, tmp_path, first.stdout, first.stderr, second.stdout, second.stderr)


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
    assert "0 failed or stopped" in out
    for noise in ("Retrying", "View run", "Traceback"):
        assert noise not in out + error
    client = MlflowClient(address)
    runs = client.search_runs(["1"])
    assert [run.info.status for run in runs] == ["FINISHED"] * 5
    assert not any("error" in run.data.tags for run in runs)


@pytest.mark.slow
@pytest.mark.parametrize("deleted", ["parent", "experiment"])
def test_a_run_deleted_during_a_sweep_can_be_restored(deleted: str, store: str, tmp_path: Path) -> None:
    process = begin(store, tmp_path, epochs=40, more=("-m", "seed=range(0,3)"))
    client = MlflowClient(store)
    (parent,) = client.search_runs(["1"], "tags.sweep_jobs LIKE '%'")
    if deleted == "parent":
        client.delete_run(parent.info.run_id)
    else:
        client.delete_experiment("1")
    _, error = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "Traceback" not in error
    restore, resume_command = re.findall("`([^`]+)`", error)
    assert "restore" in restore
    for command in (restore, resume_command):
        shell(command)
    runs = client.search_runs(["1"])
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    assert not any("error" in run.data.tags for run in runs)


def shell(command: str) -> str:
    """Type a command that was printed, which must succeed; return what it prints."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("sweep", [(), ("-m", "seed=0,1")], ids=["run", "sweep"])
def test_the_printed_command_resumes(
    signum: signal.Signals, sweep: tuple[str, ...], template_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As typed into a shell, in another folder and without the environment of the first."""
    folder = tmp_path / "a b's"
    folder.mkdir()
    shutil.copyfile(template_database, folder / "mlflow.db")
    address = f"sqlite:///{folder}/mlflow.db"
    process = begin(address, folder, epochs=60, more=sweep)
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert f"Stopped by {signum.name}.\n`python -m mnist_exp.run " in error
    children = [run for run in MlflowClient(address).search_runs(["1"]) if "sweep_jobs" not in run.data.tags]
    assert {run.info.status for run in children} == {"KILLED"}
    assert {run.data.tags["error"] for run in children} == {f"Stopped by {signum.name}."}
    before = {run.info.run_id: run.data.tags for run in MlflowClient(address).search_runs(["1"])}
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (command,) = re.findall("`([^`]+)`", error)
    shown = shell(command)
    runs = MlflowClient(address).search_runs(["1"])
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        assert "error" not in run.data.tags
        for key in ("mlflow.source.name", "overrides"):
            assert run.data.tags[key] == before.get(run.info.run_id, run.data.tags)[key], "runs that had started keep theirs"
    assert "Open it in the MLflow UI: MLFLOW_TRACKING_URI=" in shown


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("run", *SHORT), ("run", "-m", *SHORT, "seed=0,1"), ("runs", "list")], ids=str)
def test_a_closed_pipe_is_no_error(arguments: tuple[str, ...], store: str, tmp_path: Path) -> None:
    module, *overrides = arguments
    locations = [f"output_dir={tmp_path}/outputs"] if module == "run" else []
    if module == "runs":
        client = MlflowClient(store)
        client.set_terminated(client.create_run(client.create_experiment("mnist_exp")).info.run_id)
    command = shlex.join([sys.executable, "-m", f"mnist_exp.{module}", *overrides, *locations])
    reader = ["bash", "-c", f"({command}; echo $? >{tmp_path}/status) 2>{tmp_path}/errors | true"]
    subprocess.run(reader, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "status").read_text() == "0\n", (tmp_path / "errors").read_text()
    assert "Error" not in (tmp_path / "errors").read_text()
    for run in MlflowClient(store).search_runs(["1"]):
        assert run.info.status == "FINISHED"
        assert "error" not in run.data.tags


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [(), ("-m", "seed=0,1")], ids=["run", "sweep"])
def test_of_two_that_resume_at_the_same_moment_one_is_refused(sweep: tuple[str, ...], store: str, tmp_path: Path) -> None:
    process = begin(store, tmp_path, epochs=60, more=sweep)
    process.terminate()
    process.communicate(timeout=60)
    resume = ["-m", "sweep.resume=latest"] if sweep else ["resume=latest"]
    command = [sys.executable, "-m", "mnist_exp.run", *resume, f"output_dir={tmp_path}/outputs"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], errors
    assert any("Another process works on run" in error for error in errors)
    assert not any("Traceback" in error for error in errors)
    runs = MlflowClient(store).search_runs(["1"])
    assert [run.info.status for run in runs] == ["FINISHED"] * (3 if sweep else 1)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="to become another user takes root")
@pytest.mark.parametrize("resume", [False, True])
def test_another_user_learns_which_folder_cannot_be_written(resume: bool, tmp_path: Path) -> None:
    """Root without its privilege to override permissions acts as another user than the folder's owner."""
    outputs = tmp_path / "outputs"
    run_id = "0" * 32
    (outputs / run_id).mkdir(parents=True)
    (outputs / run_id / run_dir.LOCK).touch(mode=0o600)
    for path in (outputs / run_id / run_dir.LOCK, outputs / run_id, outputs):
        os.chown(path, 65534, 65534)
    command = [sys.executable, "-m", "mnist_exp.run", *([f"resume={run_id}"] if resume else SHORT), f"output_dir={outputs}"]
    theirs = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command, "tracking=none"]
    done = subprocess.run(theirs, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"output_dir: {outputs}" in done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


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


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[], None]]:
    """A file system of its own in `folder`; yields a function that fills what is left of it with the file `filler`."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system of one's own takes root")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)

    def fill() -> None:
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_an_output_disk_that_fills_up_costs_an_epoch_at_most(store: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "outputs", "4m") as fill:
        process = begin(store, tmp_path, epochs=100)
        fill()
        _, error = process.communicate(timeout=240)
        assert process.returncode == 1
        assert "cannot be written: [Errno 28] No space left on device" in error
        assert "Traceback" not in error
        (run,) = MlflowClient(store).search_runs(["1"])
        assert run.info.status == "FAILED"
        (tmp_path / "outputs" / "filler").unlink()
        resume(tmp_path / "outputs" / run.info.run_id, store)
        assert_complete(store, 100)


@pytest.mark.slow
def test_a_store_whose_disk_fills_up_gets_the_rest_on_resume(template_database: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "store", "8m") as fill:
        shutil.copyfile(template_database, tmp_path / "store" / "mlflow.db")
        address = f"sqlite:///{tmp_path}/store/mlflow.db"
        process = begin(address, tmp_path, epochs=30, more=("tracking.patience=10",))
        fill()
        _, error = process.communicate(timeout=240)
        assert process.returncode == 1
        assert "no longer accepts the records of run" in error
        (tmp_path / "store" / "filler").unlink()
        (command,) = re.findall("`([^`]+)`", error)
        shell(command)
        assert_complete(address, 30)


@pytest.mark.slow
def test_a_sweep_whose_store_s_disk_fills_up_can_be_resumed(template_database: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "store", "8m") as fill:
        shutil.copyfile(template_database, tmp_path / "store" / "mlflow.db")
        address = f"sqlite:///{tmp_path}/store/mlflow.db"
        process = begin(address, tmp_path, epochs=20, more=("-m", "seed=range(0,4)", "tracking.patience=10"))
        fill()
        out, error = process.communicate(timeout=500)
        assert process.returncode == 1, out
        assert "Traceback" not in error
        (tmp_path / "store" / "filler").unlink()
        (command,) = re.findall("`([^`]+)`", error)
        shell(command)
        runs = MlflowClient(address).search_runs(["1"])
        assert [run.info.status for run in runs] == ["FINISHED"] * 5
        assert not any("error" in run.data.tags for run in runs)


@pytest.mark.slow
def test_out_of_memory_is_a_message(store: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mnist_exp.run", "data=digits", "batch_size=58800", f"output_dir={tmp_path}/outputs"]
    done = subprocess.run(["prlimit", "--as=5000000000", *command], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "Out of memory" in done.stderr
    assert "Choose a smaller batch_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(run.info.status == "FAILED" for run in MlflowClient(store).search_runs(["1"]))


FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


@pytest.mark.slow
@pytest.mark.skipif(FAKETIME is None, reason="the clock is set by libfaketime, which is not installed")
@pytest.mark.parametrize("jump", ["-2d", "+400d"])
def test_a_clock_that_jumps_changes_nothing_but_the_times(jump: str, store: str, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0")
    preload = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    process = begin(store, tmp_path, epochs=60, **preload, FAKETIME_DONT_FAKE_MONOTONIC="1")
    clock.write_text(jump)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert_complete(store, 60)
    (run,) = MlflowClient(store).search_runs(["1"])
    assert run.info.end_time >= run.info.start_time
    assert 0 < run.data.metrics["time/total_seconds"] < 240


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


def assert_eight_writers_lose_nothing(address: str) -> None:
    """Eight processes log 1,000 points each, in 50 batches each, to one store that is new."""
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
    runs = client.search_runs([client.get_experiment_by_name("shared").experiment_id])
    assert sorted(run.data.params["writer"] for run in runs) == [str(number) for number in range(8)]
    for run in runs:
        assert run.info.status == "FINISHED"
        for key, power in (("value", 1), ("square", 2)):
            points = client.get_metric_history(run.info.run_id, key)
            assert [(point.step, point.value) for point in sorted(points, key=lambda point: point.step)] == [
                (step, step**power) for step in range(500)
            ]
        assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["text.txt"]


@pytest.mark.slow
def test_eight_processes_share_a_new_database(tmp_path: Path) -> None:
    assert_eight_writers_lose_nothing(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.slow
def test_eight_processes_share_a_server(server) -> None:
    assert_eight_writers_lose_nothing(server[0])


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
            assert {VIEW_PREFIX + key for key in VIEWS} <= tags.keys()
