"""Faults of the machine during a run: pipes that close, disks, memory and clocks."""

import contextlib
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from processes import SHORT, assert_complete, assert_sweep_complete, begin, shell, small_disk

from mnist_exp.storage import run_dir

pytestmark = pytest.mark.slow  # each waits for processes, some for half a minute


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


@pytest.mark.skipif(os.geteuid() != 0, reason="to become another user takes root")
@pytest.mark.parametrize("resume", [False, True])
def test_another_user_learns_which_folder_cannot_be_written(resume: bool, tmp_path: Path) -> None:
    """Root without its privilege to override permissions acts as another user than the folder's owner."""
    outputs, run_id = tmp_path / "outputs", "0" * 32
    (outputs / run_id).mkdir(parents=True)
    for name in (run_dir.LOCK, run_dir.CHECKPOINT):
        (outputs / run_id / name).touch(mode=0o600)
    for path in (*(outputs / run_id).iterdir(), outputs / run_id, outputs):
        os.chown(path, 65534, 65534)
    command = [sys.executable, "-m", "mnist_exp.run", *([f"resume={run_id}"] if resume else SHORT), f"output_dir={outputs}"]
    theirs = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command, "tracking=none"]
    done = subprocess.run(theirs, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"output_dir: {outputs}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_locked_for_half_a_minute_gets_everything(store: str, tmp_path: Path) -> None:
    process = begin(store, tmp_path, epochs=60)
    with contextlib.closing(sqlite3.connect(store.removeprefix("sqlite:///"), isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(30)
        other.execute("ROLLBACK")
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert_complete(store, 60)


def test_an_output_disk_that_fills_up_costs_an_epoch_at_most(store: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "outputs", "4m") as fill:
        process = begin(store, tmp_path, epochs=100)
        fill()
        _, error = process.communicate(timeout=240)
        assert process.returncode == 1
        assert "No space left on device" in error
        assert "Traceback" not in error
        (run,) = MlflowClient(store).search_runs(["1"])
        assert run.info.status == "FAILED"
        (tmp_path / "outputs" / "filler").unlink()
        (command,) = re.findall("`([^`]+)`", error)
        shell(command)
        assert_complete(store, 100)


@pytest.mark.parametrize(("jobs", "epochs"), [(0, 30), (4, 20)], ids=["run", "sweep"])
def test_a_store_whose_disk_fills_up_gets_the_rest_on_resume(
    jobs: int, epochs: int, template_database: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "store", "8m") as fill:
        shutil.copyfile(template_database, tmp_path / "store" / "mlflow.db")
        address = f"sqlite:///{tmp_path}/store/mlflow.db"
        sweep = ("-m", f"seed=range(0,{jobs})") if jobs else ()
        process = begin(address, tmp_path, epochs, more=(*sweep, "tracking.patience=10", f"tracking.uri={address}"))
        fill()
        out, error = process.communicate(timeout=500)
        assert process.returncode == 1, out
        assert "Traceback" not in error
        (tmp_path / "store" / "filler").unlink()
        (command,) = re.findall("`([^`]+)`", error)
        shell(command)
        if jobs:
            assert_sweep_complete(address, jobs)
        else:
            assert_complete(address, epochs)


def test_out_of_memory_is_a_message(store: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mnist_exp.run", "data=digits", "batch_size=58800", f"output_dir={tmp_path}/outputs"]
    done = subprocess.run(["prlimit", "--as=5000000000", *command], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "batch_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(run.info.status == "FAILED" for run in MlflowClient(store).search_runs(["1"]))


FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


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
