"""The same sweep on a Ray cluster and on SLURM, both real, both of this one machine."""

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CommandLine
from test_gpus import add_witness, seen_by
from test_sweep import LONG, SHORT, begin, parent_and_children

from mnist_exp.storage import run_dir
from mnist_exp.tracking.base import RunRecord
from mnist_exp.tracking.mlflow_store import MLflowStore

pytestmark = pytest.mark.cluster


@pytest.fixture
def ray() -> Iterator[str]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs pip install -e '.[ray]'")
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
    head = ["--head", "--num-cpus", "2", "--num-gpus", "2", "--disable-usage-stats", "--include-dashboard=false"]
    subprocess.run([*command, "start", *head], check=True, capture_output=True)
    yield "ray_cluster"
    subprocess.run([*command, "stop"], check=True, capture_output=True)


@pytest.fixture
def slurm() -> Iterator[str]:
    if importlib.util.find_spec("submitit") is None or shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.skip("needs pip install -e '.[slurm]', Debian's slurmctld, slurmd, slurm-client and munge, and root")
    script = Path(__file__).with_name("one_node_slurm.sh")
    subprocess.run([script, "start"], check=True)
    yield "slurm"
    subprocess.run([script, "stop"], check=True)


@pytest.mark.parametrize(
    ("cluster", "resource"), [("ray", "ray.remote.num_gpus=1"), ("slurm", "gpus_per_node=1")], ids=["ray", "slurm"]
)
def test_a_sweep_on_a_cluster(
    cluster: str,
    resource: str,
    request: pytest.FixtureRequest,
    command_line: CommandLine,
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each job gets one of two fake GPUs, as in test_gpus.py."""
    witness = add_witness(tmp_path, monkeypatch)  # before the cluster starts: its jobs get this environment
    launcher = request.getfixturevalue(cluster)
    sharing = (f"hydra/launcher={launcher}", f"hydra.launcher.{resource}")
    done = command_line("-m", *witness, *SHORT[1:], *sharing, "model=se_cnn,plain_cnn")
    assert done.returncode == 0, done.stderr
    parent, children = parent_and_children(store)
    assert parent.info.status == "FINISHED"
    assert [(child.name, child.status) for child in children] == [
        (f"{model} digits", "FINISHED") for model in ("se_cnn", "plain_cnn")
    ]
    assert {child.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert len(list((tmp_path / "outputs").glob("*/finished"))) == 2
    assert {gpu for _, gpu in seen_by(tmp_path)} == {"0", "1"}

    failing = command_line(*SHORT, f"hydra/launcher={launcher}", "phases.finetune.optimizer.lr=1e29", "seed=5,6")
    assert failing.returncode == 1
    assert "learning rate" in failing.stderr, "the reason of a job"
    assert "Traceback" not in failing.stderr


def queue() -> list[tuple[str, str, str]]:
    """Id, name and state of each job that waits or runs."""
    shown = subprocess.run(["squeue", "--noheader", "--array", "--format=%i %j %T"], check=True, capture_output=True, text=True)
    return [(*line.split(),) for line in shown.stdout.splitlines()]  # type: ignore[misc]


def running(store: str) -> list[RunRecord]:
    return [run for run in MLflowStore(store, "mnist_exp").runs(status="RUNNING") if run.job is not None]


@pytest.mark.parametrize(("cluster", "signum"), [("ray", signal.SIGTERM), ("ray", signal.SIGINT), ("slurm", signal.SIGINT)])
def test_a_stopped_sweep_ends_its_jobs(
    cluster: str, signum: signal.Signals, request: pytest.FixtureRequest, command_line: CommandLine, store: str, tmp_path: Path
) -> None:
    launcher = f"hydra/launcher={request.getfixturevalue(cluster)}"
    process = begin(store, tmp_path, *LONG, launcher, jobs=1)
    if cluster == "slurm":
        assert {state for *_, state in queue()} == {"RUNNING", "PENDING"}
    process.send_signal(signum)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signum
    assert "Traceback" not in error
    assert "sweep.resume=" in error
    if cluster == "slurm":
        assert queue() == []
    parent, children = parent_and_children(store)
    assert parent.info.status == "KILLED"
    assert {child.status for child in children} == {"KILLED"}
    assert all(run_dir.has_checkpoint(tmp_path / "outputs" / child.run_id) for child in children)


def test_ray_starts_a_job_again_that_died(ray: str, store: str, tmp_path: Path) -> None:
    process = begin(store, tmp_path, *LONG, f"hydra/launcher={ray}", jobs=1)
    first = next(run for run in running(store) if run.metrics)
    os.kill(int(first.tags["pid"]), signal.SIGKILL)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    parent, children = parent_and_children(store)
    assert parent.info.status == "FINISHED"
    assert [child.status for child in children] == ["FINISHED"] * 4
    assert [child.run_id for child in children if "resumed" in child.tags] == [first.run_id]


def test_jobs_that_are_preempted_or_killed(
    slurm: str, command_line: CommandLine, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preempted job resumes when it is requeued; a killed one fails alone, and sweep.resume completes it."""
    monkeypatch.setenv("PATH", f"{Path(__file__).parent}:{os.environ['PATH']}")  # with sacct
    draw = random.Random(0)
    jobs = ("-m", "data=digits", "~phases.train", "phases.finetune.epochs=20", "seed=range(0,10)", f"hydra/launcher={slurm}")
    process = begin(store, tmp_path, *jobs, jobs=1)
    preempted, killed = set[str](), set[str]()
    while process.poll() is None:
        for run in running(store):
            if run.run_id in preempted | killed or not run.metrics:
                continue
            if len(preempted) < 3 and draw.random() < 0.3:
                (job,) = [job for job, *_ in queue() if job.endswith(f"_{run.job}")]
                subprocess.run(["scontrol", "requeue", job], check=True)
                preempted.add(run.run_id)
            elif len(killed) < 2 and draw.random() < 0.2:
                os.kill(int(run.tags["pid"]), signal.SIGKILL)
                killed.add(run.run_id)
        time.sleep(1)
    assert (len(preempted), len(killed)) == (3, 2)
    _, error = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in error
    parent, children = parent_and_children(store)
    assert parent.info.status == "FAILED"
    assert {child.run_id: child.status for child in children} == {
        child.run_id: "KILLED" if child.run_id in killed else "FINISHED" for child in children
    }
    assert all("resumed" in child.tags for child in children if child.run_id in preempted)
    done = command_line("-m", "sweep.resume=latest", f"hydra/launcher={slurm}")
    assert done.returncode == 0, done.stderr
    parent, children = parent_and_children(store)
    assert parent.info.status == "FINISHED"
    assert [(child.job, child.status) for child in children] == [(number, "FINISHED") for number in range(10)]
