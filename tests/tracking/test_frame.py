"""Sweeps as tables: a row for each job, with or without a run."""

import json
import math
import shlex
from dataclasses import replace

import pandas as pd

from mnist_exp.tracking.base import RunRecord, Sweep
from mnist_exp.tracking.frame import frame

PARENT = RunRecord("f" * 32, "1", "sweep", "FINISHED", 0, 1, {}, {}, {"sweeper": "grid", "sweep_jobs": "4"}, {}, "")


def run(job: int, *overrides: str, status: str = "FINISHED", **tags: str) -> RunRecord:
    found = {"job_num": str(job), "overrides": shlex.join(overrides), "data": "digits", "torch": "2", "cpu": "Xeon"} | tags
    params = {"precision": "float32", "seed": str(job)} | {"model": overrides[0]}
    metrics = {"test/accuracy": 0.9 + job / 100} if status == "FINISHED" else {}
    return RunRecord(f"{job:032x}", "1", "run", status, job, None, params, metrics, found, {"test": "d"}, "")


def sweep(*grids: list[str], total: int = 4, sweeper: str = "grid", run_id: str = "f" * 32) -> Sweep:
    tags = {"sweeper": sweeper, "sweep_jobs": str(total), "grids": json.dumps(grids)}
    return Sweep(**vars(replace(PARENT, run_id=run_id, tags=tags)), grids=list(grids), total=total)


GRID = ["model=a,b", "batch_size=64", "seed=0,1"]


def test_the_columns_have_one_order() -> None:
    first, second = run(0, "model=a", "seed=0"), run(1, "model=a", "seed=1")
    orders = [list(frame([(sweep(["model=a", "seed=0,1"], total=2), runs)])) for runs in ([first], [second], [first, second])]
    assert orders[0] == orders[1] == orders[2]
    assert orders[0][:4] == ["sweep", "look", "seed", "run"]


def test_every_job_has_a_row_also_without_a_run() -> None:
    runs = [run(0, "model=a", "seed=0"), run(2, "model=b", "seed=0", status="FAILED", error="no disk", diverged="true")]
    table = frame([(sweep(GRID), runs)])
    assert table["model"].tolist() == ["a", "a", "b", "b"]
    assert table["seed"].tolist() == ["0", "1", "0", "1"]
    assert table["status"].tolist() == ["FINISHED", "NOT STARTED", "DIVERGED", "NOT STARTED"]
    assert table["error"].tolist() == ["", "", "no disk", ""]
    assert "batch_size" not in table, "it does not vary"
    assert math.isnan(table["test/accuracy"][1])
    fixed = {"sweep": "f" * 32, "look": 1, "run": f"{0:032x}", "data": "digits", "torch": "2", "processor": "Xeon"}
    assert table.loc[0, list(fixed)].to_dict() == fixed
    assert table.loc[0, ["precision", "digest/test", "test/accuracy"]].tolist() == ["float32", "d", 0.9]


def test_the_digest_is_that_of_the_settings_without_the_seed() -> None:
    table = frame([(sweep(GRID), [run(number, f"model={'ab'[number // 2]}", f"seed={number % 2}") for number in range(4)])])
    digests = table.groupby("model")["digest"].unique()
    assert [len(found) for found in digests] == [1, 1]
    assert digests["a"][0] != digests["b"][0]


def test_each_recorded_grid_and_each_further_sweep_is_a_look() -> None:
    extended = sweep(GRID, ["model=a,b", "batch_size=64", "seed=0,1,2"], total=6)
    other = sweep(["model=a,b", "batch_size=128", "seed=0"], total=2, run_id="e" * 32)
    table = frame([(extended, []), (other, [])])
    assert table["look"].tolist() == [1, 1, 1, 1, 2, 2, 3, 3]
    assert table["batch_size"].tolist() == ["64"] * 6 + ["128"] * 2, "it varies between the sweeps"


def test_combinations_that_compose_one_job_have_one_row() -> None:
    same = sweep(["model=a,'a'", "seed=0,1"], total=2)
    table = frame([(same, [run(1, "model=a", "seed=1")])])
    assert len(table) == 2
    assert table["status"].tolist() == ["FINISHED", "NOT STARTED"]


def test_a_key_that_only_some_jobs_set_has_the_default_in_the_others() -> None:
    table = frame([(sweep(["seed=0"], ["seed=0", "optimizer.lr=2"], total=2), [])])
    assert table["optimizer.lr"].tolist() == ["default", "2"]


def test_a_swept_precision_is_shown_as_typed_before_the_seed() -> None:
    table = frame([(sweep(["precision=fp32,bf16", "seed=0"], total=2), [run(0, "precision=fp32", "seed=0")])])
    assert table["precision"].tolist() == ["fp32", "bf16"]
    assert list(table).index("precision") < list(table).index("seed")


def test_a_job_without_a_seed_has_that_of_its_run() -> None:
    seedless, seeded = sweep(["model=a"], total=1), sweep(["model=b", "seed=0"], total=1, run_id="e" * 32)
    runs = [run(0, "model=a"), run(0, "model=b", "seed=0")]
    table = frame([(seedless, runs[:1]), (seeded, runs[1:])])
    assert table["seed"].tolist() == ["0", "0"], "so that they pair"


def test_looks_follow_the_start_of_their_first_jobs() -> None:
    """A sweep that is extended after another one does not change the looks of that one."""
    extended = sweep(["model=a", "seed=0"], ["model=a", "seed=0,1"], total=2)
    other = sweep(["model=b", "seed=0"], total=1, run_id="e" * 32)
    late = replace(run(1, "model=a", "seed=1"), started=99)
    table = frame([(extended, [run(0, "model=a", "seed=0"), late]), (other, [replace(run(0, "model=b", "seed=0"), started=50)])])
    assert table["look"].tolist() == [1, 3, 2]


def test_only_names_with_a_slash_are_metrics() -> None:
    """Training records `epoch`, which would else be a key that varies."""
    measured = run(0, "model=a", "seed=0")
    measured.metrics["epoch"] = 2.0
    assert "epoch" not in frame([(sweep(["model=a", "seed=0"], total=1), [measured])])


def test_a_search_has_the_jobs_that_it_has_proposed() -> None:
    trials = [run(1, "optimizer.lr=0.2"), run(0, "optimizer.lr=0.1")]
    table = frame([(sweep(["optimizer.lr=interval(0,1)"], total=20, sweeper="optuna"), trials)])
    assert table["optimizer.lr"].tolist() == ["0.1", "0.2"]
    assert frame([(sweep(["optimizer.lr=interval(0,1)"], sweeper="optuna"), [])]).empty


def test_the_finished_run_of_a_job_counts_else_the_newest() -> None:
    runs = [run(0, "model=a"), replace(run(0, "model=a", status="KILLED"), run_id="d" * 32, started=9)]
    assert frame([(sweep(["model=a"], total=1), runs)])["run"].tolist() == [f"{0:032x}"]
    assert isinstance(frame([]), pd.DataFrame)
