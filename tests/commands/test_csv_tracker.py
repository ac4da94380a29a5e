"""docs/examples/csv_tracker.py, used as docs/extending.md says, in processes that cannot import MLflow."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from processes import shell

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SHORT = ("data=digits", "~phases.train", "phases.finetune.epochs=10")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user sets: where the code and the runs are."""
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "mlflow.py").write_text("raise ImportError('MLflow is not needed')")
    folders = [str(absent), str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    monkeypatch.setenv("CSV_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def picture(tmp_path: Path) -> str:
    image = Image.new("L", (28, 28))
    ImageDraw.Draw(image).line([(14, 4), (14, 24)], fill=255, width=3)
    image.save(tmp_path / "one.png")
    return str(tmp_path / "one.png")


def start(tmp_path: Path, module: str, *arguments: str) -> "subprocess.Popen[str]":
    folder = ["--config-dir", str(EXAMPLES)]
    if module == "run":
        options = [*folder, *arguments, f"output_dir={tmp_path}/outputs"]
    else:
        options = [*arguments, *folder, "--output-dir", f"{tmp_path}/outputs"]
    command = [sys.executable, "-m", f"mnist_exp.{module}", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def call(tmp_path: Path, module: str, *arguments: str) -> str:
    """Run a command, which must succeed; return what it prints."""
    process = start(tmp_path, module, *arguments)
    printed, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return printed


def refuse(tmp_path: Path, module: str, *arguments: str) -> str:
    """Run a command, which must fail with a message; return the message."""
    process = start(tmp_path, module, *arguments)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "Traceback" not in error
    return error


def records(tmp_path: Path) -> Iterator[dict[str, Any]]:
    for file in tmp_path.glob("runs/*/run.json"):
        yield json.loads(file.read_text())


def test_a_run_and_its_model(tmp_path: Path, picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = call(tmp_path, "run", "tracking=csv", *SHORT[:2])
    assert "MLflow" not in printed
    (record,) = records(tmp_path)
    assert record["status"] == "FINISHED"
    assert f"{record['metrics']['test/accuracy']:.2%}".replace("%", " %") in printed
    hint = next(line.partition(": ")[2] for line in printed.splitlines() if "mnist_exp.predict" in line)
    assert "one.png" in shell(hint.replace("FILE", picture)), "a printed command chooses the tracker that was typed"
    monkeypatch.setenv("MNIST_EXP_TRACKING", "csv")
    assert "MNIST_EXP_TRACKING" in refuse(tmp_path, "ui")


@pytest.mark.slow
def test_a_sweep_is_resumed_compared_and_used(tmp_path: Path, picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_EXP_TRACKING", "csv")
    process = start(tmp_path, "run", "-m", "model=se_cnn,plain_cnn", "seed=0,1", *SHORT)
    while not (saved := [run for run in records(tmp_path) if (tmp_path / "outputs" / run["run_id"] / "checkpoint.pt").exists()]):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(int(saved[0]["tags"]["pid"]), signal.SIGKILL)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "SIGKILL" in error
    (resume,) = re.findall("`(.*sweep.resume=.*)`", error)
    shell(resume)
    (sweep,) = [run for run in records(tmp_path) if "sweep_jobs" in run["tags"]]
    jobs = {run["run_id"]: run for run in records(tmp_path) if run["tags"].get("sweep_id") == sweep["run_id"]}
    assert [sweep["status"], *(job["status"] for job in jobs.values())] == ["FINISHED"] * 5
    assert "error" not in jobs[saved[0]["run_id"]]["tags"], "it went on from its checkpoint"
    compared = call(tmp_path, "compare", "--factor", "model", "--baseline", "plain_cnn")
    assert "se_cnn" in Path(re.findall("Report: (.*)", compared)[0]).read_text()
    assert sweep["run_id"][:8] in call(tmp_path, "runs", "list")
    job = next(iter(jobs))
    assert "one.png" in call(tmp_path, "predict", "--model", job[:8], "--as-is", picture)
    assert "is identical to run" in call(tmp_path, "run", f"rerun={job}")
    for module, *arguments in (
        ("runs", "promote", "--run", job, "--name", "digits"),
        ("predict", "--model", "models:/digits@champion", picture),
    ):
        assert "MNIST_EXP_TRACKING" in refuse(tmp_path, module, *arguments)
    call(tmp_path, "runs", "delete", sweep["run_id"])
    assert [run["tags"].get("rerun_of") for run in records(tmp_path)] == [job], "the sweep and its jobs are gone"
