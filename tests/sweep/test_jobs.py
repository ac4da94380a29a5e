"""Jobs, their reports and their runs in the store, without a sweep that runs."""

from dataclasses import replace

import pytest
from hydra.core.utils import JobReturn, JobStatus

from mnist_exp.sweep.jobs import Job, common_data, failed, failure_reason, result_of
from mnist_exp.sweep.summary import describe_sweep, job_table
from mnist_exp.tracking.base import RunInfo, RunRecord, Store, StoreLostError, Sweep
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.provenance import PROCESS_DIED

JOB = Job(0, [], "")


def record(number: int, status: str = "FINISHED", *, data: str = "", error: str = "", **metrics: float) -> RunRecord:
    tags = {"job_num": str(number), "data": data, "error": error}
    return RunRecord(
        f"{number:032x}", "1", f"seed={number}", status, 0, 1, {}, {"val/" + key: value for key, value in metrics.items()},
        tags, {}, "",
    )  # fmt: skip


def test_the_private_attribute_of_hydra_holds_the_exception() -> None:
    """`result_of` depends on it: Hydra's public property raises the exception."""
    error = ValueError("first\nsecond")
    assert result_of(failed(error)) is error
    assert failure_reason(failed(error)) == "first"
    result = JobReturn(status=JobStatus.COMPLETED)
    result.return_value = 0.5
    assert result_of(result) == 0.5
    assert failure_reason(result) == failure_reason(None) == ""


@pytest.mark.parametrize(
    ("data", "varied", "common"),
    [
        (["mnist", "mnist"], "seed", "mnist"),
        (["mnist", "digits"], "seed", None),
        (["mnist"], "data", None),
        (["${oc.env:HOME}"], "seed", None),
    ],
)
def test_the_common_data_of_finished_jobs(data: list[str], varied: str, common: str | None) -> None:
    assert common_data([record(number, data=name) for number, name in enumerate(data)], [varied]) == common


@pytest.mark.parametrize("tag", [PROCESS_DIED, "Stopped by SIGINT."])
def test_the_reason_that_a_job_returned_comes_before_the_reaper_s(tag: str) -> None:
    child = record(0, "KILLED", error=tag)
    (row,) = job_table([JOB], [child], {0: failed(StoreLostError("the store is gone\nand more"))}, "val/accuracy")
    assert row["error"] == "the store is gone"
    (row,) = job_table([JOB], [child], {}, "val/accuracy")
    assert row["error"] == tag


def test_a_known_reason_replaces_that_of_the_reaper(store: str) -> None:
    opened = MLflowStore(store, "mnist_exp")
    run_id = opened.start(RunInfo("name", "")).run_id
    assert opened.mark_killed(run_id, PROCESS_DIED)
    for reason in ("the store was gone", PROCESS_DIED):
        opened.mark_killed(run_id, reason)
        (stored,) = opened.runs()
        assert (stored.status, stored.tags["error"]) == ("KILLED", "the store was gone")


class Linked(Store):
    def link(self, run_id: str, path: str = "") -> str:
        return "page"


def test_runs_that_tie_are_named_together() -> None:
    def named(*accuracies: float) -> list[int]:
        children = [record(number, accuracy=accuracy) for number, accuracy in enumerate(accuracies)]
        jobs = [replace(JOB, number=number) for number in range(len(accuracies))]
        rows = job_table(jobs, children, {}, "val/accuracy")
        text = describe_sweep(rows, children, Linked(), Sweep(**vars(record(len(jobs))), grids=[[]], total=len(jobs)), "resume")
        return [number for number in range(len(jobs)) if f"[seed={number}]" in text]

    assert named(1, 0.99, 1) == [0, 2]
    assert named(0.99) == [0]
    assert named(1, 0.99, 1, 1, 1) == [0, 2, 3], "and the number of the others"
