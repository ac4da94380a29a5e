"""Which arm becomes the champion: by validation accuracy and its interval alone."""

import math
from dataclasses import replace

import pytest
from synthetic import SEEDS, Jobs, grid

from mnist_exp.comparison.arms import Source
from mnist_exp.comparison.promotion import Decision, decide_by_sweep
from mnist_exp.errors import UserError
from mnist_exp.tracking.base import RunRecord

JOBS = grid(model=["old", "new"], seed=SEEDS)
OLD = f"{0:032x}"  # the id of the first job of the arm `old`


def source(better: float = 0.002, noise: float = 0.0002, jobs: Jobs = JOBS) -> Source:
    """A sweep whose jobs with `new` in each key are better in val/accuracy, and worse in test/accuracy."""
    records = []
    for number, job in jobs.items():
        new, seed = [value for key, value in job.items() if key != "seed"].count("new"), int(job["seed"])
        value = 0.99 + seed / 10_000 + new * (better + noise * (-1) ** seed)
        metrics = {"val/accuracy": value, "test/accuracy": 0.9 - 0.1 * new}
        tags = {"job_num": str(number), "data": "mnist_tuning"}
        digests = {"validation": "d"}
        records.append(
            RunRecord(f"{number:032x}", "1", "run", "FINISHED", number, None, {"p": "1"}, metrics, tags, digests, "", "")
        )
    return Source("sweep", records, jobs, frozenset(jobs))


def changed(found: Source, number: int, **values: object) -> Source:
    """Return a sweep in which one run is another."""
    return replace(found, records=[replace(run, **values) if run.job == number else run for run in found.records])


def promoted(decision: Decision) -> int | None:
    """Return the number of the job that is promoted."""
    return decision.run.job if decision.run else None


def test_the_first_champion_is_the_best_arm_by_validation_and_its_best_run() -> None:
    assert promoted(decide_by_sweep(source(), None)) == 9, "the best run of the arm `new`, although its test accuracy is worse"


def test_a_higher_arm_takes_the_place() -> None:
    chosen = decide_by_sweep(source(), OLD)
    assert promoted(chosen) == 9
    assert chosen.tags == {"arm": "model=new", "verdict": "higher"}


@pytest.mark.parametrize(("better", "noise"), [(0.0005, 0.01), (-0.002, 0.0002), (0.00001, 0.00002), (0.0, 0.0)])
def test_an_arm_that_is_undecided_lower_or_equivalent_changes_nothing(better: float, noise: float) -> None:
    assert promoted(decide_by_sweep(source(better, noise), OLD)) is None


def test_of_several_keys_the_best_combination_is_the_arm() -> None:
    found = source(jobs=grid(model=["old", "new"], seed=SEEDS, batch_size=["512", "new"]))
    chosen = decide_by_sweep(found, None)
    assert chosen.tags == {"arm": "model=new batch_size=new"}
    assert decide_by_sweep(found, OLD).tags == chosen.tags | {"verdict": "higher"}
    assert chosen.run
    assert promoted(decide_by_sweep(found, chosen.run.run_id)) is None, "it is the champion already"


def test_of_equal_arms_the_first_is_promoted() -> None:
    assert decide_by_sweep(source(0, 0), None).tags == {"arm": "model=old"}


@pytest.mark.parametrize(
    "values", [{"status": "FAILED"}, {"status": "RUNNING"}, {"metrics": {}}, {"metrics": {"val/accuracy": math.nan}}]
)
def test_an_arm_with_an_unfinished_or_diverged_seed_does_not_count(values: dict[str, object]) -> None:
    found = changed(source(), 7, **values)
    assert decide_by_sweep(found, None).tags == {"arm": "model=old"}
    assert promoted(decide_by_sweep(found, OLD)) is None
    assert promoted(decide_by_sweep(changed(source(), 0, **values), OLD)) is None, "a seed of the champion's arm"
    with pytest.raises(UserError):
        decide_by_sweep(changed(found, 0, **values), None)


def test_an_arm_without_all_runs_does_not_count() -> None:
    found = source()
    assert decide_by_sweep(replace(found, records=found.records[:-1]), None).tags == {"arm": "model=old"}


def test_of_a_job_that_ran_again_the_last_run_counts() -> None:
    found = source()
    again = replace(found.records[9], run_id="f" * 32, started=100, metrics={"val/accuracy": 0.991})
    assert promoted(decide_by_sweep(replace(found, records=[again, *found.records]), None)) == 7


def test_one_seed_is_enough_for_the_first_champion_only() -> None:
    found = source(jobs=grid(model=["old", "new"], seed=["0"]))
    assert decide_by_sweep(found, None).tags == {"arm": "model=new"}
    assert promoted(decide_by_sweep(found, OLD)) is None


def test_a_sweep_over_seeds_alone_is_one_arm() -> None:
    found = source(jobs=grid(seed=SEEDS))
    assert promoted(decide_by_sweep(found, None)) == 4
    assert promoted(decide_by_sweep(found, OLD)) is None


@pytest.mark.parametrize("champion", ["f" * 32, ""])
def test_a_champion_of_another_sweep_is_not_compared(champion: str) -> None:
    with pytest.raises(UserError) as error:
        decide_by_sweep(source(), champion)
    assert error.value.key == "--sweep"


@pytest.mark.parametrize("digests", [{"test": "d"}, {"validation": "other"}])
@pytest.mark.parametrize("champion", [None, OLD])
def test_runs_without_validation_images_of_their_own_are_refused(digests: dict[str, str], champion: str | None) -> None:
    with pytest.raises(UserError) as error:
        decide_by_sweep(changed(source(), 9, digests=digests), champion)
    assert "data=mnist_tuning" in error.value.remedy
