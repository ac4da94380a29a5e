"""Which arm becomes the champion: by validation accuracy and its interval alone."""

from dataclasses import replace

import pytest
from synthetic import SEEDS, Jobs, grid

from mnist_exp.comparison.arms import Source
from mnist_exp.comparison.promotion import Decision, arrange_arms, decide
from mnist_exp.errors import UserError
from mnist_exp.tracking.base import RunRecord

JOBS = grid(model=["old", "new"], seed=SEEDS)


def source(better: float, noise: float = 0.0002, parameters: float = 100.0, jobs: Jobs = JOBS) -> Source:
    """A sweep whose arm `new` is better in val/accuracy, worse in test/accuracy, and has its own number of parameters."""
    records = []
    for number, job in jobs.items():
        is_new, seed = job["model"] == "new", int(job["seed"])
        value = 0.99 + seed / 10_000 + is_new * (better + noise * (-1) ** seed)
        metrics = {
            "val/accuracy": value,
            "test/accuracy": 0.5 if is_new else 0.9,
            "model/parameters": parameters if is_new else 100,
        }
        tags = {"job_num": str(number), "data": "mnist_tuning"}
        records.append(
            RunRecord(
                f"{number:032x}", "1", "run", "FINISHED", number, None, {"p": "1"}, metrics, tags, {"validation": "d"}, "", ""
            )
        )
    return Source("sweep", records, jobs, frozenset(jobs))


def decision(found: Source, champion: str | None = "old") -> Decision:
    return decide(arrange_arms([found], "model", champion), has_champion=champion is not None)


def test_the_first_champion_is_the_best_arm_by_validation_and_its_best_run() -> None:
    chosen = decision(source(0.002), None)
    assert chosen.run is not None
    assert chosen.run.job == 9, "the best run of the arm `new`, although its test accuracy is worse"


def test_a_higher_arm_takes_the_place() -> None:
    chosen = decision(source(0.002))
    assert chosen.run is not None
    assert chosen.tags["verdict"] == "higher"
    assert chosen.tags["against"] == "model=old"
    assert " to " in chosen.tags["interval"]


@pytest.mark.parametrize(("parameters", "wins"), [(100.0, False), (120.0, False), (80.0, True)])
def test_an_equivalent_arm_needs_fewer_parameters(parameters: float, wins: bool) -> None:
    assert (decision(source(0.00001, noise=0.00002, parameters=parameters)).run is not None) == wins


def test_an_undecided_arm_and_the_champions_own_arm_change_nothing() -> None:
    for found in (source(0.0005, noise=0.01), source(-0.002)):
        assert decision(found).run is None


def test_runs_without_validation_images_of_their_own_are_refused() -> None:
    found = source(0.002)
    found = replace(found, records=[replace(record, digests={"test": "d"}) for record in found.records])
    with pytest.raises(UserError) as error:
        decision(found)
    assert "data=mnist_tuning" in str(error.value), "the remedy"
