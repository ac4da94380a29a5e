"""Runs of sweeps that never ran, for the tests of arms and wording."""

import random

from mnist_exp.tracking.base import RunRecord

Jobs = dict[int, dict[str, str]]


def record(number: int, accuracy: float, status: str = "FINISHED", digest: str = "d", **metrics: float) -> RunRecord:
    found = {"test/accuracy": accuracy, "test/loss": 1 - accuracy, "model/parameters": 100.0} | metrics
    tags = {"job_num": str(number), "data": "mnist"}
    return RunRecord(
        f"{number:032x}", "1", f"run {number}", status, number, None, {"p": "1"}, found, tags, {"test": digest}, "", ""
    )


def grid(**choices: list[str]) -> Jobs:
    jobs: list[dict[str, str]] = [{}]
    for key, values in choices.items():
        jobs = [job | {key: value} for job in jobs for value in values]
    return dict(enumerate(jobs))


SEEDS = [str(seed) for seed in range(5)]
TWO_MODELS = grid(model=["se_cnn", "plain_cnn"], seed=SEEDS)


def scored(jobs: Jobs, better: float, arm: str = "se_cnn") -> list[RunRecord]:
    """Runs whose accuracy depends on the seed and is higher by `better`, plus a little noise, in `arm`."""
    chance = random.Random(0)
    return [
        record(number, 0.9 + int(job["seed"]) / 100 + (better + chance.gauss(0, 0.001) if job["model"] == arm else 0))
        for number, job in jobs.items()
    ]
