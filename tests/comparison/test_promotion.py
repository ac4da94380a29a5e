"""Which arm becomes the champion: by validation accuracy and its interval alone."""

from dataclasses import replace

import pytest
from synthetic import SEEDS, grid

from mnist_exp.comparison.arms import Source
from mnist_exp.comparison.promotion import decide_by_sweep
from mnist_exp.errors import UserError
from mnist_exp.tracking.base import RunRecord

JOBS = grid(model=["old", "new"], seed=SEEDS)
OLD = next(f"{number:032x}" for number, job in JOBS.items() if job["model"] == "old")


def source(better: float, noise: float = 0.0002) -> Source:
    """A sweep whose arm `new` is better in val/accuracy and worse in test/accuracy."""
    records = []
    for number, job in JOBS.items():
        is_new, seed = job["model"] == "new", int(job["seed"])
        value = 0.99 + seed / 10_000 + is_new * (better + noise * (-1) ** seed)
        metrics = {"val/accuracy": value, "test/accuracy": 0.5 if is_new else 0.9}
        tags = {"job_num": str(number), "data": "mnist_tuning"}
        digests = {"validation": "d"}
        records.append(
            RunRecord(f"{number:032x}", "1", "run", "FINISHED", number, None, {"p": "1"}, metrics, tags, digests, "", "")
        )
    return Source("sweep", records, JOBS, frozenset(JOBS))


def test_the_first_champion_is_the_best_arm_by_validation_and_its_best_run() -> None:
    chosen = decide_by_sweep(source(0.002), None)
    assert chosen.run is not None
    assert chosen.run.job == 9, "the best run of the arm `new`, although its test accuracy is worse"


def test_a_higher_arm_takes_the_place() -> None:
    chosen = decide_by_sweep(source(0.002), OLD)
    assert chosen.run is not None
    assert chosen.tags == {"arm": "model=new", "verdict": "higher"}


@pytest.mark.parametrize(("better", "noise"), [(0.0005, 0.01), (-0.002, 0.0002), (0.00001, 0.00002)])
def test_an_arm_that_is_undecided_lower_or_equivalent_changes_nothing(better: float, noise: float) -> None:
    assert decide_by_sweep(source(better, noise), OLD).run is None


def test_a_champion_of_another_sweep_is_not_compared() -> None:
    with pytest.raises(UserError) as error:
        decide_by_sweep(source(0.002), "f" * 32)
    assert error.value.key == "--sweep"


def test_runs_without_validation_images_of_their_own_are_refused() -> None:
    found = source(0.002)
    found = replace(found, records=[replace(record, digests={"test": "d"}) for record in found.records])
    with pytest.raises(UserError) as error:
        decide_by_sweep(found, OLD)
    assert "data=mnist_tuning" in str(error.value), "the remedy"
