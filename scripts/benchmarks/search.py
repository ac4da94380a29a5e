"""Measure how long workers idle during a search whose jobs take unequal times: proposed in batches, and as workers get free.

    python scripts/benchmarks/search.py [--trials 16] [--rounds 3] [--processes 2]

A job trains for 1 to 8 epochs on 6,000 images. Both variants take turns. The idle share is the part of the time from the start
of the first job to the end of the last one, over all workers, in which no job ran.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlflow import MlflowClient
from run import spread

SEARCH = [
    "-m", "hydra/sweeper=optuna", "data=mnist_tuning", "data.fallback=null", "data.subset=6000", "phase=[train]",
    "phases.train.epochs=choice(1,2,4,8)", "optimizer.lr=tag(log,interval(0.05,1))",
]  # fmt: skip


def search(folder: Path, trials: int, processes: int, at_once: str, seed: int) -> tuple[float, float]:
    """Run a search; return the idle share of its workers and its seconds."""
    store = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(store).search_experiments()  # creating a store takes six seconds, once
    options = [f"hydra.sweeper.n_trials={trials}", f"hydra.launcher.processes={processes}", f"hydra.sweeper.at_once={at_once}"]
    command = [sys.executable, "-m", "mnist_exp.run", *SEARCH, *options, f"seed={seed}", f"output_dir={folder}/outputs"]
    started = time.monotonic()
    subprocess.run(command, env=os.environ | {"MLFLOW_TRACKING_URI": store}, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    jobs = [run.info for run in MlflowClient(store).search_runs(["1"]) if "job_num" in run.data.tags]
    busy = sum(job.end_time - job.start_time for job in jobs)
    whole = max(job.end_time for job in jobs) - min(job.start_time for job in jobs)
    return 1 - busy / (processes * whole), seconds


def main() -> None:
    """Parse the command line, run the searches, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    variants = {"in batches": str(arguments.processes), "as workers get free": "null"}
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for seed in range(arguments.rounds):
        for name, at_once in variants.items():
            with tempfile.TemporaryDirectory() as folder:
                measured[name].append(search(Path(folder), arguments.trials, arguments.processes, at_once, seed))
    print(f"idle share of {arguments.processes} workers, seconds: median (min to max) of {arguments.rounds} searches")
    for name, values in measured.items():
        shares, seconds = zip(*values, strict=True)
        print(f"{name:22} {statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})   {spread(seconds, 1)}")


if __name__ == "__main__":
    main()
