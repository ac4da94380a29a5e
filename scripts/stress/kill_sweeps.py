"""Kill parallel sweeps with SIGKILL at random moments, resume them, and compare them with a sweep that was never interrupted.

    python scripts/stress/kill_sweeps.py [--kills 20] [--seed 0]

Each trial starts the real command line with a sweep of four jobs on `digits`. A random time after a job has started, it kills the
parent, a worker, the server that forks the workers, or the parent and its workers. It then resumes the sweep, which may be killed
again, until the sweep finishes. The parent and every job must be FINISHED, no job may exist twice, no process may be left, and
all metrics must equal those of the reference sweep bit for bit.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from kill_and_resume import MEASURED
from mlflow import MlflowClient

PATIENCE = 600  # seconds for a sweep to end
RECIPE = ["-m", "data=digits", "batch_size=2500", "save_every=3", "model=se_cnn,plain_cnn", "seed=0,1"]


def store_of(folder: Path) -> str:
    """Return the address of the store under `folder`."""
    return f"sqlite:///{folder}/mlflow.db"


def start(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """Start the command line with its output and its store under `folder`."""
    command = [sys.executable, "-m", "mnist_exp.run", *overrides, f"output_dir={folder}/outputs"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": store_of(folder)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def read_points(folder: Path) -> dict[str, Any]:
    """Return the points of every job of the one sweep under `folder`; raises SystemExit unless each has finished once."""
    client = MlflowClient(store_of(folder))
    runs = client.search_runs(["1"])
    unfinished = [(run.info.run_name, run.info.status) for run in runs if run.info.status != "FINISHED"]
    jobs = sorted(run.data.tags.get("job_num", "parent") for run in runs)
    if unfinished or jobs != ["0", "1", "2", "3", "parent"]:
        raise SystemExit(f"jobs {jobs}; not finished: {unfinished}")
    points: dict[str, Any] = {}
    for run in runs:
        job = run.data.tags.get("job_num")
        if job is None:  # each resume of the parent records its counts again
            points |= {f"parent/{key}": value for key, value in run.data.metrics.items()}
            continue
        for key in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, key)
            values = sorted((point.step, point.value) for point in history)
            points[f"{job}/{key}"] = [step for step, _ in values] if key.startswith(MEASURED) else values
    return points


def server(parent: int) -> int | None:
    """Return the process that forks the workers of `parent` (Linux)."""
    for pid in children(parent):
        with suppress(OSError):
            if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return None


def workers(parent: int) -> list[int]:
    """Return the processes that run the jobs of `parent`."""
    return children(pid) if (pid := server(parent)) else []


def children(parent: int) -> list[int]:
    """Return the children of a process."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit() and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(folder.name))
    return found


def check_none_left(folder: Path) -> None:
    """Raise SystemExit unless all processes that `start` has started in `folder` end within a minute (Linux)."""
    deadline = time.monotonic() + 60
    while left := processes_of(store_of(folder)):
        if time.monotonic() > deadline:
            raise SystemExit(f"these processes were left: {left}")
        time.sleep(0.5)


def processes_of(store: str) -> list[int]:
    """Return the processes whose environment names a store."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"MLFLOW_TRACKING_URI={store}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def trial(template: Path, folder: Path, rng: random.Random, duration: float) -> list[str]:
    """Run, kill and resume a sweep until it has finished.

    Args:
        template: An empty store.
        folder: The folder of the trial, which does not exist yet.
        rng: Draws the moments and the victims.
        duration: Seconds that a sweep takes.

    Returns:
        The victims in order: "parent", "worker", "server" or "all".
    """
    folder.mkdir()
    shutil.copyfile(template, folder / "mlflow.db")
    killed: list[str] = []
    process = start(folder, *RECIPE)
    while True:
        known = len(list(folder.glob("outputs/*/lock")))
        while process.poll() is None and not killed and len(list(folder.glob("outputs/*/lock"))) < known + 2:
            time.sleep(0.05)
        try:
            _, error = process.communicate(timeout=rng.uniform(0, 0.8 * duration))
            if process.returncode == 0:
                return killed
            raise SystemExit(f"a sweep that was not killed ended with {process.returncode}:\n{error.decode()}")
        except subprocess.TimeoutExpired:
            forking = server(process.pid)
            jobs = children(forking) if forking else []
            rng.shuffle(jobs)
            victim = rng.choice(["parent", "worker", "server", "all"]) if jobs else "parent"
            victims = {
                "parent": [process.pid],
                "worker": jobs[:1],
                "server": [forking],
                "all": [process.pid, *jobs],
            }[victim]
            for pid in filter(None, victims):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed.append(victim)
            process.communicate(timeout=PATIENCE)
        parents = MlflowClient(store_of(folder)).search_runs(["1"], "tags.sweep_jobs LIKE '%'")
        if any(run.info.status == "FINISHED" for run in parents):
            return killed  # after its end
        if not parents:
            shutil.rmtree(folder)
            return killed + trial(template, folder, rng, duration)  # killed before the sweep was recorded
        process = start(folder, "-m", "sweep.resume=latest")


def main() -> None:
    """Parse the command line, run the reference sweep and the trials, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        template, reference = Path(base) / "template.db", Path(base) / "reference"
        MlflowClient(f"sqlite:///{template}").search_experiments()
        reference.mkdir()
        shutil.copyfile(template, reference / "mlflow.db")
        started = time.monotonic()
        _, error = start(reference, *RECIPE).communicate()
        duration = time.monotonic() - started
        try:
            expected = read_points(reference)
        except SystemExit:
            raise SystemExit(error.decode()) from None
        killed, sweeps = Counter[str](), 0
        while killed.total() < arguments.kills:
            folder = Path(base) / f"trial-{sweeps}"
            killed.update(trial(template, folder, random.Random(f"{arguments.seed}/{sweeps}"), duration))
            check_none_left(folder)
            found = read_points(folder)
            if found != expected:
                differ = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
                raise SystemExit(f"sweep {sweeps} differs from the reference sweep in {differ[:10]}")
            shutil.rmtree(folder)
            sweeps += 1
            print(f"{killed.total()} kills {dict(killed)}, {sweeps} sweeps, each equal to the reference sweep", flush=True)


if __name__ == "__main__":
    main()
