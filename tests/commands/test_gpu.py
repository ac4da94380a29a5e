"""On a real GPU, with `pytest -m gpu`; elsewhere all are skipped."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CommandLine
from mlflow import MlflowClient
from mlflow.entities import Run
from processes import begin

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA can use")]


def only_run(store: str) -> Run:
    (run,) = MlflowClient(store).search_runs(["1"])
    return run


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_the_default_run(precision: str, command_line: CommandLine, store: str, mnist_root: Path) -> None:
    done = command_line(f"precision={precision}")
    assert done.returncode == 0, done.stderr
    run = only_run(store)
    assert run.data.tags["gpu"] == torch.cuda.get_device_name()
    assert run.data.metrics["test/accuracy"] > 0.98


def test_one_epoch(command_line: CommandLine, store: str, mnist_root: Path) -> None:
    done = command_line("experiment=one_epoch")
    assert done.returncode == 0, done.stderr
    assert only_run(store).data.metrics["test/accuracy"] > 0.993


def test_a_killed_run_resumes(store: str, tmp_path: Path) -> None:
    process = begin(store, tmp_path, epochs=200)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    command = [sys.executable, "-m", "mnist_exp.run", "resume=latest", f"output_dir={tmp_path}/outputs"]
    subprocess.run(command, check=True)
    run = only_run(store)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["epoch"] == 200


def test_jobs_of_a_sweep_share_the_gpus(command_line: CommandLine, store: str, mnist_root: Path) -> None:
    done = command_line("-m", "data.subset=4000", "seed=range(0,4)", "hydra.launcher.processes=4")
    assert done.returncode == 0, done.stderr
    jobs = [run for run in MlflowClient(store).search_runs(["1"]) if "job_num" in run.data.tags]
    assert [run.data.tags["gpu"] for run in jobs] == [torch.cuda.get_device_name()] * 4
