"""Time whole sweeps of the reference recipe: in parallel, one after another, and in parallel without tracking.

    python scripts/benchmark_sweep.py [--runs 20] [--rounds 1]

The real command line on MNIST, into a new store each; the three take turns. Prints seconds and ratios.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from mlflow import MlflowClient

WAYS = {
    "in parallel": [],
    "one after another": ["hydra.launcher.processes=1"],
    "in parallel, tracking=none": ["tracking=none"],
}


def main() -> None:
    """Parse the command line, time the sweeps, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way, overrides in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                store = f"sqlite:///{folder}/mlflow.db"
                MlflowClient(store).search_experiments()  # a new store takes six seconds, once in its life
                command = [sys.executable, "-m", "mnist_exp.run", "-m", "data.fallback=null", f"seed=range(0,{arguments.runs})"]
                command += [*overrides, f"output_dir={folder}/outputs"]
                began = time.monotonic()
                subprocess.run(command, env=os.environ | {"MLFLOW_TRACKING_URI": store}, check=True, stdout=subprocess.DEVNULL)
                seconds[way].append(time.monotonic() - began)
    reference = statistics.median(seconds["in parallel"])
    for way, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{way:28} {median:6.1f} s  {median / arguments.runs:5.2f} s a run  ratio {median / reference:.2f}  {taken}")


if __name__ == "__main__":
    main()
