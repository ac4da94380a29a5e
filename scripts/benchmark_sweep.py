"""Time whole sweeps of the reference recipe: in parallel, one after another, in parallel without tracking; and DataLoader.

    python scripts/benchmark_sweep.py [--runs 20] [--rounds 3]

The real command line on MNIST, into a new store each; all take turns. One after another, a job has either both cores, or one, as
it has in parallel, which gives the same results bit for bit. The yardstick is one run of scripts/dataloader.py, transforms on
tensors, both cores: its training alone, and the whole command. Prints seconds a run, and ratios within a round.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark import run_dataloader, spread, unpacked_mnist
from hydra import compose, initialize_config_dir
from mlflow import MlflowClient

from mnist_exp import CONF
from mnist_exp.config import resolve

PARALLEL = "in parallel"
WAYS = {
    PARALLEL: [],
    "one after another, two threads": ["hydra.launcher.processes=1"],
    "one after another, one thread": ["hydra.launcher.processes=1"],
    "in parallel, tracking=none": ["tracking=none"],
}
YARDSTICKS = ("DataLoader, training alone", "DataLoader, whole command")


def sweep(way: str, runs: int, folder: Path) -> float:
    """Run a sweep; return its seconds."""
    store = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(store).search_experiments()  # a new store takes six seconds, once in its life
    command = [sys.executable, "-m", "mnist_exp.run", "-m", "data.fallback=null", f"seed=range(0,{runs})", *WAYS[way]]
    if way.endswith("one thread"):
        command = ["taskset", "--cpu-list", "0", *command]
    began = time.monotonic()
    subprocess.run(
        [*command, f"output_dir={folder}/outputs"],
        env=os.environ | {"MLFLOW_TRACKING_URI": store},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.monotonic() - began


def main() -> None:
    """Parse the command line, time the sweeps, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        root = Path(resolve(compose("config"))["data"]["root"])
    a_run: dict[str, list[float]] = {way: [] for way in (*WAYS, *YARDSTICKS)}
    for seed in range(arguments.rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                a_run[way].append(sweep(way, arguments.runs, Path(folder)) / arguments.runs)
        with tempfile.TemporaryDirectory() as folder:
            taken = run_dataloader(unpacked_mnist(Path(folder), root), "v2", seed)
            for yardstick, what in zip(YARDSTICKS, ("training", "wall"), strict=True):
                a_run[yardstick].append(taken[what])
    print(f"seconds a run, median (min to max) of {arguments.rounds} rounds of {arguments.runs} runs; ratio to {PARALLEL}")
    for way, taken in a_run.items():
        ratio = statistics.median(other / ours for other, ours in zip(taken, a_run[PARALLEL], strict=True))
        print(f"{way:32} {spread(taken, 2):24} {ratio:.2f}")


if __name__ == "__main__":
    main()
