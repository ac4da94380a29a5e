from hydra.core.utils import JobReturn, JobStatus

from mnist_exp.sweep.jobs import common_data, failed, failure_reason, job_colors, return_value
from mnist_exp.tracking.base import RunRecord
from mnist_exp.tracking.definition import Job


def test_the_private_attribute_of_hydra_holds_the_exception() -> None:
    """`return_value` depends on it: Hydra's public property raises the exception."""
    error = ValueError("first\nsecond")
    assert return_value(failed(error)) is error
    assert failure_reason(failed(error)) == "first"
    result = JobReturn(status=JobStatus.COMPLETED)
    result.return_value = 0.5
    assert return_value(result) == 0.5
    assert failure_reason(result) == failure_reason(None) == ""


def test_jobs_that_differ_in_the_seed_alone_share_a_color() -> None:
    jobs = [Job(number, [f"model={model}", f"seed={seed}"], "") for number, (model, seed) in enumerate(("a0", "a1", "b0"))]
    colors = job_colors(jobs)
    assert colors[0] == colors[1] != colors[2]


def test_the_common_data_of_finished_jobs() -> None:
    def finished(data: str) -> RunRecord:
        return RunRecord("0" * 32, "1", "name", "FINISHED", 0, 1, {}, {}, {"data": data}, {}, "", "")

    assert common_data([finished("mnist"), finished("mnist")], ["seed"]) == "mnist"
    assert common_data([finished("mnist"), finished("digits")], ["seed"]) is None
    assert common_data([finished("mnist")], ["data"]) is None
    assert common_data([finished("${oc.env:HOME}")], ["seed"]) is None
