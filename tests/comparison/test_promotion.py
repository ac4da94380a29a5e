"""Which arm becomes the champion: by validation accuracy and its interval alone."""

import numpy as np
import pandas as pd
import pytest
from synthetic import SEEDS, Job, grid, table

from mnist_exp.comparison.promotion import Decision, decide_by_sweep
from mnist_exp.errors import UserError

JOBS = grid(model=["old", "new"], seed=SEEDS)
OLD = f"{0:032x}"  # the id of the first job of the arm `old`


def sweep(better: float = 0.002, noise: float = 0.0002, jobs: list[Job] = JOBS) -> pd.DataFrame:
    """A sweep whose jobs with `new` in each key are better in val/accuracy, and worse in test/accuracy."""

    def count_new(job: Job) -> int:
        return list(job.values()).count("new")

    def value(job: Job) -> float:
        return 0.99 + int(job["seed"]) / 10_000 + count_new(job) * (better + noise * (-1) ** int(job["seed"]))

    runs = table(jobs, value, "val/accuracy").assign(**{"digest/validation": "v"})
    return runs.assign(**{"test/accuracy": [0.9 - 0.1 * count_new(job) for job in jobs]})


def changed(runs: pd.DataFrame, number: int, **values: object) -> pd.DataFrame:
    """Return a sweep in which one run is another."""
    runs = runs.copy()
    runs.loc[number, list(values)] = list(values.values())
    return runs


def decide(runs: pd.DataFrame, champion: str | None, objective: str = "val/accuracy") -> Decision:
    return decide_by_sweep(runs, objective, champion)


def promoted(decision: Decision) -> int | None:
    """Return the number of the job that is promoted."""
    return int(decision.run_id, 16) if decision.run_id else None


def test_the_first_champion_is_the_best_arm_by_validation_and_its_best_run() -> None:
    assert promoted(decide(sweep(), None)) == 9, "the best run of the arm `new`, although its test accuracy is worse"


def test_of_a_loss_the_lowest_arm_is_the_best() -> None:
    runs = sweep().rename(columns={"val/accuracy": "val/loss"})
    chosen = decide(runs, None, "val/loss")
    assert (promoted(chosen), chosen.tags) == (0, {"arm": "model=old"})
    new = f"{9:032x}"
    assert decide(runs, new, "val/loss").tags == {"arm": "model=old", "verdict": "lower"}


def test_a_higher_arm_takes_the_place() -> None:
    chosen = decide(sweep(), OLD)
    assert promoted(chosen) == 9
    assert chosen.tags == {"arm": "model=new", "verdict": "higher"}


@pytest.mark.parametrize(("better", "noise"), [(0.0005, 0.01), (-0.002, 0.0002), (0.00001, 0.00002), (0.0, 0.0), (0.002, 0.0)])
def test_an_arm_that_is_undecided_lower_or_equivalent_changes_nothing(better: float, noise: float) -> None:
    """Among them one that is better by the same number of images in each pair, which has no interval."""
    assert promoted(decide(sweep(better, noise), OLD)) is None


def test_of_several_keys_the_best_combination_is_the_arm() -> None:
    runs = sweep(jobs=grid(model=["old", "new"], batch_size=["512", "new"], seed=SEEDS))
    chosen = decide(runs, None)
    assert chosen.tags == {"arm": "model=new batch_size=new"}
    assert decide(runs, OLD).tags == chosen.tags | {"verdict": "higher"}
    assert promoted(decide(runs, chosen.run_id)) is None, "it is the champion already"


def test_of_equal_arms_the_first_is_promoted() -> None:
    assert decide(sweep(0, 0), None).tags == {"arm": "model=old"}


@pytest.mark.parametrize("failed", [{"status": "FAILED"}, {"status": "DIVERGED"}, {"val/accuracy": np.nan}])
def test_an_arm_with_an_unfinished_or_diverged_seed_does_not_count(failed: dict[str, object]) -> None:
    runs = changed(sweep(), 7, **failed)
    assert decide(runs, None).tags == {"arm": "model=old"}
    assert promoted(decide(runs, OLD)) is None
    assert promoted(decide(changed(sweep(), 0, **failed), OLD)) is None, "a seed of the champion's arm"
    with pytest.raises(UserError):
        decide(changed(runs, 0, **failed), None)


def test_the_survivor_of_ten_seeds_is_no_champion() -> None:
    runs = sweep(jobs=grid(model=["old", "new"], seed=map(str, range(10))))
    runs.loc[13:, "status"] = "DIVERGED"
    assert promoted(decide(runs, OLD)) is None


def test_an_arm_without_pairs_does_not_hide_a_better_one() -> None:
    runs = sweep(jobs=grid(model=["old", "elsewhere", "new"], seed=SEEDS))
    runs.loc[runs["model"] == "elsewhere", "processor"] = "another"
    assert decide(runs, OLD).tags["arm"] == "model=new"


def test_one_seed_is_enough_for_the_first_champion_only() -> None:
    runs = sweep(jobs=grid(model=["old", "new"], seed=["0"]))
    assert decide(runs, None).tags == {"arm": "model=new"}
    assert promoted(decide(runs, OLD)) is None


def test_a_sweep_over_seeds_alone_is_one_arm() -> None:
    runs = sweep(jobs=grid(seed=SEEDS))
    assert promoted(decide(runs, None)) == 4
    assert promoted(decide(runs, OLD)) is None


@pytest.mark.parametrize("champion", ["f" * 32, ""])
def test_a_champion_of_another_sweep_is_not_compared(champion: str) -> None:
    with pytest.raises(UserError) as error:
        decide(sweep(), champion)
    assert error.value.key == "--sweep"


@pytest.mark.parametrize("digest", ["", "other"])
@pytest.mark.parametrize("champion", [None, OLD])
def test_runs_without_validation_images_of_their_own_are_refused(digest: str, champion: str | None) -> None:
    with pytest.raises(UserError) as error:
        decide(changed(sweep(), 9, **{"digest/validation": digest}), champion)
    assert "data=mnist_tuning" in error.value.remedy
