"""Tables of runs that never ran, for the tests of comparisons."""

from collections.abc import Callable, Iterable
from itertools import product
from random import Random

import pandas as pd

Job = dict[str, str]
SEEDS = [str(seed) for seed in range(5)]


def grid(**choices: Iterable[str]) -> list[Job]:
    """Every combination of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def table(jobs: list[Job], value: Callable[[Job], float], metric: str = "test/accuracy", look: int = 1) -> pd.DataFrame:
    """The table of finished runs with a value each."""
    keys = list(dict.fromkeys(key for job in jobs for key in job if key != "seed"))
    rows = [
        {"sweep": "s", "look": look}
        | {key: job.get(key, "default") for key in keys}
        | {"seed": job.get("seed", ""), "run": f"{number:032x}", "status": "FINISHED", "error": "", "data": "mnist"}
        | {"precision": "float32", "code": "c", "torch": "2", "threads": "1", "processor": "cpu"}
        | {
            "digest": str(sorted((key, text) for key, text in job.items() if key != "seed")),
            "digest/test": "d",
            metric: value(job),
        }
        for number, job in enumerate(jobs)
    ]
    return pd.DataFrame(rows)


def scored(jobs: list[Job], better: float = 0.0, noise: float = 0.001, seed: int = 0) -> pd.DataFrame:
    """Runs whose accuracy depends on the seed, with noise, and is higher by `better` in se_cnn."""
    chance = Random(seed)
    return table(
        jobs,
        lambda job: 0.9 + int(job["seed"]) / 1000 + better * (job.get("model") == "se_cnn") + chance.gauss(0, noise),
    )


TWO_MODELS = grid(model=["plain_cnn", "se_cnn"], seed=SEEDS)
