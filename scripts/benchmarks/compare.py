"""Time the comparison of a large sweep: the real command line on a store of synthetic runs.

    python scripts/benchmarks/compare.py [--runs 1000] [--rounds 5]

The runs have the metrics, parameters, data sets and files of real ones. The script prints seconds, median (min to max).
"""

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mnist_exp.composing import compose_recipe
from mnist_exp.learning.datasets import load_digits
from mnist_exp.overrides import combinations, command, text_of
from mnist_exp.settings import Recipe
from mnist_exp.sweep.jobs import Job
from mnist_exp.sweep.summary import describe_sweep, job_table, sweep_metrics
from mnist_exp.tracking.base import COLORS, OUTCOME, RECIPE, RunInfo
from mnist_exp.tracking.mlflow_store import MLflowStore


def make_sweep(uri: str, arms: Sequence[str], seeds: int, factor: str = "model", better: float = 0.001, **others: str) -> str:
    """Record a synthetic sweep and return its id.

    Args:
        uri: The address of the store.
        arms: The values of `factor`.
        seeds: The number of seeds of each arm.
        factor: The key that the sweep varies.
        better: The difference in test/accuracy from each arm to the next.
        others: The choices of further keys, such as batch_size="128,256".
    """
    store = MLflowStore(uri, "mnist_exp")
    data = load_digits(0.02, seed=0)
    grid = [f"{factor}={','.join(arms)}", *(f"{key}={values}" for key, values in others.items()), f"seed=range(0,{seeds})"]
    jobs = combinations(grid)
    tags = {"sweep_jobs": str(len(jobs)), "sweeper": "grid", "grids": json.dumps([grid]), "data": "digits"}
    tags["keys"] = " ".join([factor, *others, "seed"])
    info = RunInfo(f"sweep {factor} by seed", command("run", "-m", *grid), tags)
    with store.start(info) as parent:
        pass
    settings_of_digits = compose_recipe("data=digits").settings
    noise = random.Random(0)
    for number, overrides in enumerate(jobs):
        arm, *rest, seed = map(text_of, overrides)
        tags = {
            "sweep_id": parent.run_id,
            "job_num": str(number),
            "overrides": shlex.join(overrides),
            "data": "digits",
            "arm": " ".join([arm, *rest]),
            "recipe": f"{' '.join([arm, *rest])} {'0' * 8}",
            "objective": "val/accuracy",
            "mlflow.runColor": COLORS[arms.index(arm)],
            "mlflow.parentRunId": parent.run_id,
        }
        with store.start(RunInfo(f"{arm} seed={seed}", command("run", *overrides), tags)) as child:
            settings = {f"train.setting{number}": number for number in range(40)}
            keys = {factor: arm, **dict(zip(others, rest, strict=True))}
            child.log_params(keys | {"seed": seed, "precision": "float32"} | settings)
            child.log_dataset(data, "test", "test")
            accuracy = 0.98 + random.Random(seed).gauss(0, 0.001) + arms.index(arm) * better + noise.gauss(0, 0.0005)
            history = [(3000 * (step + 1), report(step, accuracy)) for step in range(40)]
            for examples_seen, metrics in history:
                child.log_metrics(metrics, examples_seen)
            results = {"test/accuracy": accuracy, "test/loss": 0.05, "time/train_seconds": 3.5, "time/total_seconds": 5.0}
            child.log_results(results | {"model/parameters": 19_600 + len(arm)})
            mistakes = [(noise.randrange(360), noise.randrange(10), noise.randrange(10)) for _ in range(150)]
            child.log_text(json.dumps({"split": "test", "history": history, "mistakes": mistakes}), OUTCOME)
            child.log_text(Recipe(settings_of_digits).as_json(), RECIPE)
    children = store.children(parent.run_id)
    with store.start(info, parent.run_id) as tracker:
        rows = job_table([Job(number, [], "") for number in range(len(children))], children, {}, "val/accuracy")
        tracker.log_results(sweep_metrics(children, "val/accuracy"))
        tracker.set_description(describe_sweep(rows, children, store, store.find_sweep(parent.run_id), "resume"))
    return parent.run_id


def report(step: int, accuracy: float) -> dict[str, float]:
    """Return the metrics of one report of training."""
    metrics = {"train/loss": 2 * 0.9**step, "train/accuracy": accuracy, "train/examples_per_second": 15_000.0}
    return metrics | ({"val/accuracy": accuracy, "val/loss": 0.1} if step % 20 == 19 else {})


def main() -> None:
    """Parse the command line, record the sweep, time its comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{Path(folder)}/mlflow.db"
        make_sweep(uri, ("plain_cnn", "se_cnn"), arguments.runs // 2)
        seconds = []
        for _ in range(arguments.rounds):
            started = time.monotonic()
            compare = [sys.executable, "-m", "mnist_exp.compare", "latest", "--factor", "model", "--baseline", "plain_cnn"]
            subprocess.run(compare, env=os.environ | {"MLFLOW_TRACKING_URI": uri}, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.monotonic() - started)
    print(f"{arguments.runs} runs: {statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})")


if __name__ == "__main__":
    main()
