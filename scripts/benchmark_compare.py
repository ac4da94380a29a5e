"""Time the comparison of a large sweep: the real command line on a store of made-up runs.

    python scripts/benchmark_compare.py [--runs 1000] [--rounds 5]

The runs have the metrics, parameters, data sets and files that real ones leave. Prints seconds, median (min to max).
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from mnist_exp.data import load_digits
from mnist_exp.definition import Definition, Job
from mnist_exp.tracking import OUTCOME, MLflowTracker


def make_sweep(store: str, arms: Iterable[str], seeds: int, factor: str = "model", better: float = 0.001) -> str:
    """Record a sweep over `arms`, values of `factor`, and over seeds, each arm `better` than the one before; return its id."""
    data = load_digits(0.02, seed=0)
    jobs = [[f"{factor}={arm}", f"seed={seed}"] for arm, seed in product(arms, range(seeds))]
    overrides = [f"{factor}={','.join(arms)}", f"seed=range(0,{seeds})"]
    definition = Definition("Grid", len(jobs), overrides, {}, [Job(number, job, "") for number, job in enumerate(jobs)])
    with MLflowTracker(store, "mnist_exp").start(f"sweep {factor} by seed", {"sweep_jobs": str(len(jobs))}) as parent:
        parent.text(definition.as_json(), "sweep.json")
        parent.tags({"mlflow.note.content": f"{len(jobs)} jobs: {len(jobs)} FINISHED."})
    chance = random.Random(0)
    for number, (arm, seed) in enumerate(product(arms, range(seeds))):
        tags = {"sweep_id": parent.run_id, "mlflow.parentRunId": parent.run_id, "job_num": str(number), "data": "digits"}
        with MLflowTracker(store, "mnist_exp").start(f"{arm} seed={seed}", tags) as child:
            child.params({"model": arm, "seed": seed} | {f"train.setting{place}": place for place in range(40)})
            child.dataset(data, "test", "test")
            accuracy = 0.98 + random.Random(seed).gauss(0, 0.001) + jobs_before(arms, arm) * better + chance.gauss(0, 0.0005)
            history = [(3000 * (step + 1), report(step, accuracy)) for step in range(40)]
            for examples_seen, metrics in history:
                child.metrics(metrics, examples_seen)
            child.metrics({"test/accuracy": accuracy, "test/loss": 0.05, "time/train_seconds": 3.5}, 120_000)
            child.metrics({"model/parameters": 19_600 + len(arm), "time/total_seconds": 5.0}, 120_000)
            mistakes = [(chance.randrange(360), chance.randrange(10), chance.randrange(10)) for _ in range(150)]
            child.text(json.dumps({"split": "test", "history": history, "mistakes": mistakes}), OUTCOME)
    return parent.run_id


def jobs_before(arms: Iterable[str], arm: str) -> int:
    """Return the place of an arm among the arms."""
    return list(arms).index(arm)


def report(step: int, accuracy: float) -> dict[str, float]:
    """Return the metrics of one report of training."""
    metrics = {"train/loss": 2 * 0.9**step, "train/accuracy": accuracy, "train/examples_per_second": 15_000.0}
    return metrics | ({"val/accuracy": accuracy, "val/loss": 0.1} if step % 20 == 19 else {})


def main() -> None:
    """Parse the command line, make the sweep, time its comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{Path(folder)}/mlflow.db"
        make_sweep(store, ("plain_cnn", "se_cnn"), arguments.runs // 2)
        seconds = []
        for _ in range(arguments.rounds):
            began = time.monotonic()
            command = [sys.executable, "-m", "mnist_exp.compare", "factor=model", "baseline=plain_cnn"]
            subprocess.run(command, env=os.environ | {"MLFLOW_TRACKING_URI": store}, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.monotonic() - began)
    print(f"{arguments.runs} runs: {statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})")


if __name__ == "__main__":
    main()
