"""Kill runs at random moments, resume them, and compare them with a run that was never interrupted.

    python scripts/stress/kill_and_resume.py [--kills 50] [--seed 0] [--signals KILL]

Each trial starts the real command line on `digits` and kills the process a random time after its run has started: while it
records the start, in either phase, between them, while it writes a checkpoint or to MLflow, or at the end. It resumes the run,
kills it again, and so on until one attempt finishes. Weights, optimizer state, metric history and MLflow's points must then equal
those of the reference run bit for bit. A run that is killed before its first checkpoint is started from the beginning.
After a signal that a process can catch (`--signals TERM,INT,HUP`) the run must also be KILLED in MLflow, or FINISHED if it was.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from mnist_exp.storage import checkpoint, run_dir

# An epoch of 24 steps, then two of 10, with a checkpoint every third step: many boundaries in a short time.
RECIPE = ["data=digits", "batch_size=2500", "phases.finetune.epochs=2", "save_every=3"]
CORES = os.cpu_count() or 1
MEASURED = ("time/", "train/examples_per_second")  # metrics that differ from run to run


def start(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """Start the command line with its output and its store under `folder`."""
    command = [sys.executable, "-m", "mnist_exp.run", *overrides, f"output_dir={folder}/outputs"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes], seconds: float | None = None) -> None:
    """Wait up to `seconds` for a process that must succeed; raises TimeoutExpired."""
    _, error = process.communicate(timeout=seconds)
    if process.returncode != 0:
        raise SystemExit(f"a run that was not killed ended with {process.returncode}:\n{error.decode()}")


def read_outcome(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the outcome of the one finished run under `folder`: its last state with its history, and its points in MLflow."""
    (finished,) = folder.glob("outputs/*/finished")
    saved = checkpoint.load(finished.parent / run_dir.CHECKPOINT)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run = client.get_run(saved.run_id)
    if run.info.status != "FINISHED":
        raise SystemExit(f"the run is {run.info.status} in MLflow")
    points: dict[str, Any] = {}
    for key in run.data.metrics:
        recorded = client.get_metric_history(saved.run_id, key)
        points[key] = sorted((point.step, 0.0 if key.startswith(MEASURED) else point.value) for point in recorded)
    history = [
        (step, {key: value for key, value in metrics.items() if not key.startswith(MEASURED)}) for step, metrics in saved.history
    ]
    return {"state": saved.state, "history": history}, points


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Return the paths at which two nested values differ in at least one bit."""
    if isinstance(first, torch.Tensor):
        return [] if first.equal(second) else [path]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{path}: {sorted(first.keys() ^ second.keys())}"]
        return [difference for key in first for difference in differences(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return [f"{path}: {len(first)} and {len(second)} entries"]
        pairs = enumerate(zip(first, second, strict=True))
        return [difference for index, (one, other) in pairs for difference in differences(one, other, f"{path}/{index}")]
    return [] if first == second else [path]


def wait_for_run(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the process has started or resumed a run; before that it has nothing to lose."""
    known = {path.stat().st_mtime_ns for path in folder.glob("outputs/*/lock")}
    while process.poll() is None and {path.stat().st_mtime_ns for path in folder.glob("outputs/*/lock")} <= known:
        time.sleep(0.01)


def check_end(folder: Path, process: subprocess.Popen[bytes], signum: signal.Signals) -> None:
    """Raise SystemExit unless the exit status of the process and the status of its run match the signal."""
    finished = list(folder.glob("outputs/*/finished"))
    # -signum: Python has already removed its handlers, after everything was recorded.
    if process.returncode not in ((0, 128 + signum, -signum) if finished else (128 + signum,)):
        raise SystemExit(f"after {signum.name} the process ended with {process.returncode}")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = [run for experiment in client.search_experiments() for run in client.search_runs([experiment.experiment_id])]
    statuses = [run.info.status for run in runs[:1]]  # the newest; earlier ones were killed before a first checkpoint
    if statuses not in ([], ["FINISHED"] if finished else ["KILLED"]):
        raise SystemExit(f"after {signum.name} the run is {statuses} in MLflow, finished: {bool(finished)}")


def trial(
    template: Path, folder: Path, rng: random.Random, duration: float, signals: list[signal.Signals]
) -> tuple[int, int, list[str]]:
    """Run, kill and resume until the run has finished.

    Args:
        template: An empty store.
        folder: The folder of the trial, which does not exist yet.
        rng: Draws the moments and the signals.
        duration: Seconds that a run takes.
        signals: The signals to draw from.

    Returns:
        The number of kills, the number of restarts, and the last checkpoint before each other kill.
    """
    folder.mkdir()
    shutil.copyfile(template, folder / "mlflow.db")
    kills = restarts = 0
    positions: list[str] = []
    process = start(folder, *RECIPE)
    while True:
        wait_for_run(folder, process)
        try:
            finish(process, rng.uniform(0, duration))
            return kills, restarts, positions
        except subprocess.TimeoutExpired:
            signum = rng.choice(signals)
            process.send_signal(signum)
            process.communicate()
        kills += 1
        if signum != signal.SIGKILL:
            check_end(folder, process, signum)
        saved = {path.parent for path in folder.glob("outputs/*/checkpoint*.pt")}
        if not saved:
            restarts += 1
            shutil.rmtree(folder / "outputs", ignore_errors=True)
            process = start(folder, *RECIPE)
            continue
        (run,) = saved
        if run_dir.is_complete(run):
            return kills, restarts, [*positions, "after the end"]
        state = checkpoint.load_latest_intact(run).state
        positions.append(f"{state['phase']}, step {state['steps']}" if state else "before the first step")
        process = start(folder, "resume=latest")


def main() -> None:
    """Parse the command line, run the reference run and the trials, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", default="KILL", help="from which one is drawn for each kill, such as TERM,INT,HUP")
    arguments = parser.parse_args()
    signals = [signal.Signals[f"SIG{name}"] for name in arguments.signals.split(",")]
    with tempfile.TemporaryDirectory() as base, ThreadPoolExecutor(CORES) as pool:
        template, reference = Path(base) / "template.db", Path(base) / "reference"
        MlflowClient(f"sqlite:///{template}").search_experiments()
        reference.mkdir()
        shutil.copyfile(template, reference / "mlflow.db")
        process = start(reference, *RECIPE)
        wait_for_run(reference, process)
        started = time.monotonic()
        finish(process)
        duration = time.monotonic() - started
        expected = read_outcome(reference)

        def compared(number: int) -> tuple[int, int, list[str]]:
            folder = Path(base) / f"trial-{number}"
            result = trial(template, folder, random.Random(f"{arguments.seed}/{number}"), duration, signals)
            found = differences(expected, read_outcome(folder))
            if found:
                raise SystemExit(f"trial {number}: differs from the reference run in {found[:10]}")
            shutil.rmtree(folder)
            return result

        kills = restarts = trials = 0
        positions = Counter[str]()
        while kills < arguments.kills:
            for killed, restarted, found in pool.map(compared, range(trials, trials + CORES)):
                kills, restarts, trials = kills + killed, restarts + restarted, trials + 1
                positions.update(found)
            print(f"{kills} kills, {trials} runs, each equal to the reference run", flush=True)
    print(f"{kills} kills, {restarts} of them before a first checkpoint; the others by the last checkpoint before them:")
    for position, count in sorted(positions.items()):
        print(f"  {position}: {count}")


if __name__ == "__main__":
    main()
