"""Sweeps through the real command line: parent, children, failures, resume, rerun, other launchers."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import CommandLine
from hydra.core.utils import JobReturn, JobStatus
from mlflow import MlflowClient
from mlflow.entities import Run

from mnist_exp.experiment.summary import shorten
from mnist_exp.sweep.summary import describe_sweep, job_table
from mnist_exp.tracking.base import NullStore, RunInfo, RunRecord, StoreGoneError
from mnist_exp.tracking.definition import Definition, Job
from mnist_exp.tracking.mlflow_store import PROCESS_DIED, MLflowStore

SHORT = ("-m", "data=digits", "~phases.train", "phases.finetune.epochs=1")
FAILING = "phases.finetune.optimizer.lr=0.001,1e29"  # the second ends with a loss that is not finite


def parent_and_children(store: str) -> tuple[Run, list[RunRecord]]:
    client = MlflowClient(store)
    records = MLflowStore(store, "mnist_exp").runs()
    (parent,) = [record for record in records if "sweep_jobs" in record.tags]
    children = [record for record in records if record.tags.get("sweep_id") == parent.run_id]
    return client.get_run(parent.run_id), sorted(children, key=lambda child: int(child.tags["job_num"]))


def artifact(parent: Run, store: str, tmp_path: Path, name: str) -> str:
    return Path(MlflowClient(store).download_artifacts(parent.info.run_id, name, str(tmp_path))).read_text()


def results(parent: Run, store: str, tmp_path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(artifact(parent, store, tmp_path, "results.csv").splitlines()))


def test_a_sweep_has_a_parent_and_a_child_for_every_job(
    command_line: CommandLine, in_process: CommandLine, store: str, tmp_path: Path
) -> None:
    done = command_line(*SHORT, "model=se_cnn,plain_cnn", FAILING)
    assert done.returncode == 1
    assert "2 of 4 jobs did not finish; the first of them, job 1: The loss became" in done.stderr
    assert "Traceback" not in done.stderr
    parent, children = parent_and_children(store)
    definition = json.loads(artifact(parent, store, tmp_path, "sweep.json"))
    hashes = [job["config_hash"] for job in definition["jobs"]]
    assert hashes == [child.tags["config_hash"] for child in children], "composed in the parent as by Hydra"
    assert [child.status for child in children] == ["FINISHED", "FAILED", "FINISHED", "FAILED"]
    assert parent.info.status == "FAILED"
    assert parent.info.run_name == "sweep model by phases.finetune.optimizer.lr"
    assert [child.name for child in children][:2] == ["se_cnn digits lr=0.001", "se_cnn digits lr=1e+29"]
    for number, child in enumerate(children):
        assert child.tags["mlflow.parentRunId"] == child.tags["sweep_id"] == parent.info.run_id
        assert child.tags["job_num"] == str(number)
        assert child.tags["differs"] == f"model={child.params['model']} {child.tags['overrides'].split()[-1]}"
    assert len({child.tags["config_hash"] for child in children}) == 4
    rows = results(parent, store, tmp_path)
    assert [(row["status"], row["run"]) for row in rows] == [(child.status, child.run_id) for child in children]
    note = parent.data.tags["mlflow.note.content"]
    assert "4 jobs: 2 FINISHED, 2 FAILED." in note
    assert "| 3 | plain_cnn digits lr=1e+29 | FAILED |" in note
    for row in rows:
        assert row["status"] in done.stdout

    refused = in_process("-m", "sweep.resume=latest", *SHORT[1:], "model=se_cnn")
    assert refused.returncode == 1
    assert "the sweep differs from its start" in refused.stderr
    assert "the command line was data=digits ~phases.train" in refused.stderr
    assert "sweep.force=true" in refused.stderr
    unchanged, same = parent_and_children(store)
    assert (unchanged.data.tags, same) == (parent.data.tags, children), "a refusal changes nothing"


def test_names_are_short() -> None:
    choices = {"optimizer": "adam", "model": "se_cnn"}
    shown = {"optimizer=adam": "adam", "batch_size=64": "bs=64", "seed=3": "seed=3", "optimizer.lr=0.1": "lr=0.1"}
    assert {override: shorten(override, choices) for override in shown} == shown


def test_runs_that_tie_are_named_together() -> None:
    def child(number: int, accuracy: float) -> RunRecord:
        metrics, tags = {"val/accuracy": accuracy}, {"job_num": str(number)}
        return RunRecord(str(number), "1", f"seed={number}", "FINISHED", 0, 1, {}, metrics, tags, {}, "", "")

    def description(*accuracies: float) -> str:
        children = [child(number, accuracy) for number, accuracy in enumerate(accuracies)]
        rows = job_table([Job(number, [], "") for number in range(len(accuracies))], children, {})
        return describe_sweep(rows, children, NullStore(), "1", "resume", Definition("GridSweeper", len(rows), [], {}, []))

    assert "Best by val/accuracy, 100.00 %: 4 tie: [seed=0](), [seed=2](), [seed=3]() and 1 more." in description(
        1, 0.99, 1, 1, 1
    )
    assert "Best by val/accuracy, 99.00 %: [seed=0]()." in description(0.99)


@pytest.mark.parametrize(("tag", "shown"), [(PROCESS_DIED, "the store is gone"), ("Stopped by SIGINT.", "the store is gone")])
def test_the_reason_that_a_job_returned_comes_before_the_reaper_s(tag: str, shown: str) -> None:
    tags = {"job_num": "0", "error": tag}
    child = RunRecord("0" * 32, "1", "name", "KILLED", 0, 1, {}, {}, tags, {}, "", "")
    returned = JobReturn(status=JobStatus.FAILED)
    returned.return_value = StoreGoneError("the store is gone\nand more")
    (row,) = job_table([Job(0, [], "")], [child], {0: returned})
    assert row["error"] == shown
    (row,) = job_table([Job(0, [], "")], [child], {})
    assert row["error"] == tag


def test_a_known_reason_replaces_that_of_the_reaper(store: str) -> None:
    opened = MLflowStore(store, "mnist_exp")
    run_id = opened.start(RunInfo("name", "")).run_id
    assert opened.mark_killed(run_id, PROCESS_DIED)
    assert not opened.mark_killed(run_id, "the store was gone")
    (record,) = opened.runs()
    assert (record.status, record.tags["error"]) == ("KILLED", "the store was gone")
    opened.mark_killed(run_id, PROCESS_DIED)
    (record,) = opened.runs()
    assert record.tags["error"] == "the store was gone"


def test_resume_without_m_says_what_is_missing(in_process: CommandLine, store: str) -> None:
    done = in_process("sweep.resume=latest")
    assert done.returncode == 1
    assert "needs a sweep: add -m before it" in done.stderr


def test_a_sweep_with_a_mistake_in_one_job_does_not_start(in_process: CommandLine, store: str) -> None:
    done = in_process(*SHORT, "batch_size=64,0")
    assert done.returncode == 1
    assert "batch_size=0 is invalid" in done.stderr
    assert not MlflowClient(store).search_experiments(filter_string="name = 'mnist_exp'")


@pytest.mark.parametrize(
    ("key", "good", "bad", "message"),
    [
        ("seed", range(120), "-1", "seed=-1 is invalid"),
        ("model.hidden_features", range(10, 80), "500", "parameters: at most 25,000 are allowed"),
        ("model.se.reduction", range(1, 16), "17", "model.se.reduction=17 is invalid: expected an integer from 1 to 16"),
        ("phases.finetune.optimizer.betas", ("[0.9,0.99]", "[0.8,0.9]"), "[0.9]", "betas=[0.9] is invalid"),
    ],
)
def test_a_mistake_in_a_late_job_is_found_before_the_first(
    in_process: CommandLine, store: str, key: str, good: Sequence[object], bad: str, message: str
) -> None:
    done = in_process(*SHORT, f"{key}={','.join(map(str, good))},{bad}")
    assert done.returncode == 1
    assert message in done.stderr
    assert not MlflowClient(store).search_experiments(filter_string="name = 'mnist_exp'")


def test_a_sweep_that_is_not_there(in_process: CommandLine, store: str) -> None:
    assert "There is no unfinished sweep latest in" in in_process("-m", "sweep.resume=latest").stderr


@pytest.mark.slow
def test_stop_starts_nothing_after_a_failure(command_line: CommandLine, store: str, tmp_path: Path) -> None:
    seeds = "seed=range(0,3)"
    done = command_line(*SHORT, "phases.finetune.optimizer.lr=1e29", seeds, "sweep.on_failure=stop", "hydra.launcher.processes=1")
    assert done.returncode == 1
    parent, children = parent_and_children(store)
    assert [child.status for child in children] == ["FAILED"]
    assert [row["status"] for row in results(parent, store, tmp_path)] == ["FAILED", "NOT STARTED", "NOT STARTED"]


@pytest.mark.slow
def test_a_failed_job_is_repeated_in_the_same_run(command_line: CommandLine, store: str) -> None:
    done = command_line(*SHORT, FAILING, "sweep.retries=2")
    assert done.returncode == 1
    _, children = parent_and_children(store)
    assert [child.status for child in children] == ["FINISHED", "FAILED"]
    assert "resumed" in children[1].tags


LONG = ("-m", "data=digits", "~phases.train", "phases.finetune.epochs=60", "seed=range(0,4)")


def begin(store: str, tmp_path: Path, *overrides: str, jobs: int) -> subprocess.Popen[str]:
    """Start a sweep and wait until `jobs` of its jobs have reported something."""
    command = [sys.executable, "-m", "mnist_exp.run", *overrides, f"output_dir={tmp_path}/outputs"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    client = MlflowClient(store)
    deadline = time.monotonic() + 120
    while True:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        running = [run for run in client.search_runs(experiments) if run.data.metrics and run.info.status == "RUNNING"]
        if len(running) >= jobs:
            return process
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_can_be_resumed(command_line: CommandLine, store: str, tmp_path: Path, signum: signal.Signals) -> None:
    process = begin(store, tmp_path, *LONG, jobs=2)
    process.send_signal(signum)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signum
    assert f"Stopped by {signum.name}" in error
    assert "Traceback" not in error
    parent, children = parent_and_children(store)
    assert parent.info.status == "KILLED"
    assert {child.status for child in children} == {"KILLED"}
    assert command_line("-m", "sweep.resume=latest").returncode == 0
    resumed_parent, resumed = parent_and_children(store)
    assert resumed_parent.info.run_id == parent.info.run_id
    assert resumed_parent.info.status == "FINISHED"
    assert [child.status for child in resumed] == ["FINISHED"] * 4
    assert {child.run_id for child in children} <= {child.run_id for child in resumed}


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_job_repeated(store: str, tmp_path: Path) -> None:
    process = begin(store, tmp_path, *LONG, "sweep.retries=1", jobs=2)
    _, children = parent_and_children(store)
    os.kill(int(children[0].tags["pid"]), signal.SIGKILL)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    parent, children = parent_and_children(store)
    assert parent.info.status == "FINISHED"
    assert [child.status for child in children] == ["FINISHED"] * 4


@pytest.mark.slow
def test_a_parent_that_is_killed_leaves_nothing_running(store: str, tmp_path: Path) -> None:
    process = begin(store, tmp_path, *LONG, jobs=2)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while any(child.status == "RUNNING" for child in parent_and_children(store)[1]):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    listed = subprocess.run([sys.executable, "-m", "mnist_exp.runs", "list"], capture_output=True, text=True, check=True)
    assert "its process is dead, now KILLED" in listed.stdout
    parent, children = parent_and_children(store)
    assert parent.info.status == "KILLED"
    assert {child.status for child in children} == {"KILLED"}


@pytest.mark.slow
def test_a_live_run_is_not_reaped_and_a_repeated_run_is_identical(store: str, tmp_path: Path) -> None:
    process = begin(store, tmp_path, *LONG[1:-1], jobs=1)
    reaped = subprocess.run([sys.executable, "-m", "mnist_exp.runs", "reap"], capture_output=True, text=True, check=True)
    assert reaped.stdout == "0 reaped\n"
    assert process.communicate(timeout=120)[1] is not None
    assert process.returncode == 0
    (record,) = MLflowStore(store, "mnist_exp").runs()
    rerun = [sys.executable, "-m", "mnist_exp.run", f"rerun={record.run_id}", f"output_dir={tmp_path}/outputs"]
    done = subprocess.run(rerun, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"is identical to run {record.run_id} in every metric" in done.stdout


@pytest.mark.slow
def test_a_search_proposes_prunes_and_can_be_resumed(command_line: CommandLine, store: str, mnist_root: Path) -> None:
    pytest.importorskip("optuna")
    search = ("-m", "hydra/sweeper=optuna", "data=mnist_tuning", "phases.train.epochs=2", "~phases.finetune", "augmentation=none")
    space = ("optimizer.lr=tag(log,interval(0.0001,0.4))", "model=choice(se_cnn,plain_cnn)")
    refused = command_line(*search[:2], "data=mnist", *space)
    assert "A search must not see the test set: add data=mnist_tuning" in refused.stderr
    done = command_line(*search, *space, "hydra.sweeper.n_trials=6")
    assert done.returncode == 0, done.stderr
    parent, children = parent_and_children(store)
    assert parent.info.status == "FINISHED"
    assert len(children) == 6
    assert not any(key.startswith("test/") for child in children for key in child.metrics)
    more = command_line(*search[:2], "sweep.resume=" + parent.info.run_id, "hydra.sweeper.n_trials=8")
    assert more.returncode == 0, more.stderr
    _, children = parent_and_children(store)
    assert [child.tags["job_num"] for child in children] == [str(number) for number in range(8)]
    assert all(child.status == "FINISHED" or "pruned" in child.tags for child in children)
    assert any("pruned" in child.tags for child in children)
