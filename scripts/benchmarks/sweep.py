"""Time whole sweeps of the reference recipe: in parallel, one after another, in parallel without tracking; and a DataLoader.

    python scripts/benchmarks/sweep.py [--runs 20] [--rounds 3]

Each sweep runs the real command line on MNIST, into a new store; the variants take turns. One after another, a job has either
both cores or one. With one it has as many threads as in parallel, so its results are the same bit for bit. The baseline is one
run of dataloader.py with transforms on tensors and both cores: its training alone, and the whole command. The script prints
seconds per run, and ratios within a round.
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
from run import mnist_root, run_dataloader, spread, unpacked_mnist

PARALLEL = "in parallel"
VARIANTS = {
    PARALLEL: [],
    "one after another, two threads": ["hydra.launcher.processes=1"],
    "one after another, one thread": ["hydra.launcher.processes=1"],
    "in parallel, tracking=none": ["tracking=none"],
}
BASELINES = {"DataLoader, training alone": "training", "DataLoader, whole command": "wall"}


def sweep(variant: str, runs: int, folder: Path) -> float:
    """Run a sweep and return its seconds."""
    store = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(store).search_experiments()  # creating a store takes six seconds, once
    command = [sys.executable, "-m", "mnist_exp.run", "-m", "data.fallback=null", f"seed=range(0,{runs})", *VARIANTS[variant]]
    if variant.endswith("one thread"):
        command = ["taskset", "--cpu-list", "0", *command]
    command.append(f"output_dir={folder}/outputs")
    started = time.monotonic()
    subprocess.run(command, env=os.environ | {"MLFLOW_TRACKING_URI": store}, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> None:
    """Parse the command line, time the sweeps, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    root = mnist_root()
    seconds: dict[str, list[float]] = {variant: [] for variant in (*VARIANTS, *BASELINES)}  # per run
    for seed in range(arguments.rounds):
        for variant in VARIANTS:
            with tempfile.TemporaryDirectory() as folder:
                seconds[variant].append(sweep(variant, arguments.runs, Path(folder)) / arguments.runs)
        with tempfile.TemporaryDirectory() as folder:
            measured = run_dataloader(unpacked_mnist(Path(folder), root), "v2", seed)
            for baseline, key in BASELINES.items():
                seconds[baseline].append(measured[key])
    print(f"seconds per run, median (min to max) of {arguments.rounds} rounds of {arguments.runs} runs; ratio to {PARALLEL}")
    for variant, values in seconds.items():
        ratio = statistics.median(value / ours for value, ours in zip(values, seconds[PARALLEL], strict=True))
        print(f"{variant:32} {spread(values, 2):24} {ratio:.2f}")


if __name__ == "__main__":
    main()
