"""Sweeps that run: parent, children, failures, resume, signals."""

import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from conftest import Call, CommandLine, exit_status
from kill_sweeps import processes_of, server
from mlflow import MlflowClient
from mlflow.entities import Run

from mnist_exp import compare
from mnist_exp.run import main
from mnist_exp.settings import read_recipe
from mnist_exp.signals import SIGNALS
from mnist_exp.tracking.base import RECIPE, RunRecord
from mnist_exp.tracking.mlflow_store import MLflowStore

SHORT = ("-m", "data=digits", "~phases.train", "phases.finetune.epochs=1")
RATE = "phases.finetune.optimizer.lr"
FAILING = f"{RATE}=0.001,0.002,1e29"  # the last ends with a loss that is not finite
LONG = ("-m", "data=digits", "~phases.train", "phases.finetune.epochs=60", "seed=range(0,4)")


def parent_and_children(store: str) -> tuple[Run, list[RunRecord]]:
    records = MLflowStore(store, "mnist_exp").runs()
    (parent,) = [record for record in records if "sweep_jobs" in record.tags]
    children = [record for record in records if record.tags.get("sweep_id") == parent.run_id]
    return MlflowClient(store).get_run(parent.run_id), sorted(children, key=lambda child: child.job or 0)


@dataclass
class Swept:
    """A sweep that has run: six tiny jobs, two of which failed."""

    store: str
    status: int
    printed: str
    parent: Run
    children: list[RunRecord]

    def artifact(self, name: str) -> str:
        return Path(MlflowClient(self.store).download_artifacts(self.parent.info.run_id, name)).read_text()


@pytest.fixture(scope="module")
def swept(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    folder = tmp_path_factory.mktemp("swept")
    shutil.copyfile(template_database, folder / "mlflow.db")
    store, printed = f"sqlite:///{folder}/mlflow.db", folder / "printed.txt"
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    with pytest.MonkeyPatch.context() as patch, printed.open("w") as stream:
        patch.setattr(sys, "argv", ["mnist-exp", *SHORT, FAILING, "seed=0,1", f"output_dir={folder}/outputs"])
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        patch.setenv("MLFLOW_TRACKING_URI", store)
        patch.setenv("COLUMNS", "200")
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, stream)
        status = exit_status(main)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    return Swept(store, status, printed.read_text(), *parent_and_children(store))


@pytest.mark.parametrize(
    ("swept_over", "following"),
    [
        (("model=se_cnn,plain_cnn", "data.subset=256"), "mnist_exp.compare "),
        (("seed=0,1", "data.subset=256"), "mnist_exp.runs best "),
        (("data.subset=256,512", "seed=0"), ""),
        (("data.subset=256,512", "model=se_cnn,plain_cnn"), "mnist_exp.compare "),
    ],
)
def test_a_sweep_ends_with_a_command_that_answers(
    swept_over: tuple[str, ...], following: str, call: Call, command_line: CommandLine, store: str
) -> None:
    """Runs on different data are not compared."""
    done = command_line(*SHORT, "phases.finetune.split=train", *swept_over)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("Next: ")]
    assert len(printed) == bool(following)
    for line in printed:
        assert following in line
        module, *arguments = shlex.split(line)[3:]
        assert call(import_module(module).main, *arguments).returncode == 0


def test_a_sweep_has_a_parent_and_a_child_for_every_job(swept: Swept) -> None:
    parent, children = swept.parent, swept.children
    assert (swept.status, parent.info.status) == (1, "FAILED"), "as soon as one job fails"
    assert [child.status for child in children] == ["FINISHED"] * 4 + ["FAILED"] * 2
    assert parent.info.run_name == f"sweep {RATE} by seed"
    assert [child.name for child in children][::3] == [
        "se_cnn digits finetune.lr=0.001 seed=0",
        "se_cnn digits finetune.lr=0.002 seed=1",
    ]
    for number, child in enumerate(children):
        assert child.tags["mlflow.parentRunId"] == child.tags["sweep_id"] == parent.info.run_id
        assert child.job == number
        assert child.overrides[-1] == f"seed={number % 2}"
    recipes = MLflowStore(swept.store, "mnist_exp").read_artifacts(children, RECIPE)
    assert len({read_recipe(content, "").settings.digest() for content in recipes.values()}) == 6


def test_jobs_that_differ_in_the_seed_alone_share_a_color(swept: Swept) -> None:
    colors = [child.tags["mlflow.runColor"] for child in swept.children]
    assert colors[::2] == colors[1::2]
    assert len(set(colors)) == 3


def test_its_results_are_printed_stored_as_a_table_and_described(swept: Swept) -> None:
    rows = list(csv.DictReader(swept.artifact("results.csv").splitlines()))
    assert [row["run"] for row in rows] == [child.run_id for child in swept.children]
    assert [row["status"] for row in rows] == ["FINISHED"] * 4 + ["DIVERGED"] * 2
    assert [float(row["test/loss"]) for row in rows[:4]] == [child.metrics["test/loss"] for child in swept.children[:4]]
    assert all("learning rate" in row["error"] for row in rows[4:])
    assert "Traceback" not in swept.printed
    assert f"sweep.resume={swept.parent.info.run_id}" in swept.printed
    note = swept.parent.data.tags["mlflow.note.content"]
    for child in swept.children:
        assert f"{child.name} | {child.status}" in note
        assert child.name in swept.printed


def test_it_can_be_compared(swept: Swept, call: Call) -> None:
    done = call(compare.main, "--tracking-uri", swept.store, "--baseline", "0.002", "--metric", "test/loss")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 seeds of" in done.stdout, "of the arm that diverged"
    first, second = (sum(child.metrics["test/loss"] for child in swept.children[start : start + 2]) / 2 for start in (0, 2))
    assert f"{first - second:+.4f}" in done.stdout


def test_its_recorded_mistakes_give_the_interval_for_new_images(swept: Swept, call: Call, tmp_path: Path) -> None:
    options = ("--metric", "test/accuracy", "--images", "--baseline", "0.002")
    table, report = tmp_path / "runs.csv", tmp_path / "report.html"
    done = call(compare.main, "--tracking-uri", swept.store, *options, "--export", str(table), "--report", str(report))
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(table.read_text().splitlines()))
    for row in rows[:4]:
        assert 1 - len(row["mistakes"].split()) / int(row["size"]) == pytest.approx(float(row["test/accuracy"]), abs=1e-6)
    assert [row["size"] for row in rows[4:]] == ["", ""]
    from_store = report.read_text()
    again = call(compare.main, "--results", str(table), *options, "--report", str(report))
    assert again.returncode == 0, again.stderr
    assert "New images" in again.stdout
    assert done.stdout.startswith(again.stdout.partition("Report: ")[0])
    assert report.with_suffix(".png").stat().st_size > 1000
    tables = [re.findall("<td.*?</td>", page)[:6] for page in (from_store, report.read_text())]
    assert tables[0] == tables[1], "a table gives the same report"


def test_a_resume_with_another_command_line_changes_nothing(
    swept: Swept, in_process: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", swept.store)
    before = parent_and_children(swept.store)
    output_dir = swept.children[0].tags["output_dir"]
    refused = in_process("-m", "sweep.resume=latest", *SHORT[1:], f"output_dir={output_dir}", "model=plain_cnn")
    assert refused.returncode == 1
    assert "model=plain_cnn" in refused.stderr
    after = parent_and_children(swept.store)
    assert (after[0].data.tags, after[1]) == (before[0].data.tags, before[1])


def begin(store: str, tmp_path: Path, *overrides: str, jobs: int) -> subprocess.Popen[str]:
    """Start a sweep and wait until `jobs` of its jobs have reported something."""
    command = [sys.executable, "-m", "mnist_exp.run", *overrides, f"output_dir={tmp_path}/outputs"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
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


def assert_none_left(store: str) -> None:
    """All processes of the sweep have ended, or do so once the server of the workers has finished its imports."""
    deadline = time.monotonic() + 60
    while left := processes_of(store):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.mark.slow
def test_a_resume_repeats_what_failed_and_skips_what_finished(command_line: CommandLine, store: str) -> None:
    assert command_line(*SHORT, FAILING, "hydra.launcher.processes=1").returncode == 1
    before = parent_and_children(store)
    preview = command_line("-m", "sweep.resume=latest", "sweep.dry_run=true")
    assert preview.returncode == 0
    assert preview.stdout.count("skip") == 2
    assert parent_and_children(store)[1] == before[1], "a dry run changes nothing"
    assert command_line("-m", "sweep.resume=latest").returncode == 1
    parent, children = parent_and_children(store)
    assert parent.info.run_id == before[0].info.run_id
    assert children[:2] == before[1][:2]
    assert [child.status for child in children] == ["FINISHED", "FINISHED", "FAILED"]
    assert "resumed" in children[2].tags


@pytest.mark.slow
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_stopped_sweep_can_be_resumed(command_line: CommandLine, store: str, tmp_path: Path, signum: signal.Signals) -> None:
    process = begin(store, tmp_path, *LONG, "hydra.launcher.processes=2", jobs=2)
    process.send_signal(signum)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 128 + signum
    assert signum.name in error
    assert "Traceback" not in error
    parent, children = parent_and_children(store)
    assert parent.info.status == "KILLED"
    assert {child.status for child in children} == {"KILLED"}
    assert len(children) == 2, "no worker starts another job"
    assert all(signum.name in child.tags["error"] for child in children)
    assert_none_left(store)
    assert command_line("-m", "sweep.resume=latest").returncode == 0
    resumed_parent, resumed = parent_and_children(store)
    assert resumed_parent.info.run_id == parent.info.run_id
    assert resumed_parent.info.status == "FINISHED"
    assert [child.status for child in resumed] == ["FINISHED"] * 4
    assert {child.run_id for child in children} <= {child.run_id for child in resumed}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "group"),  # a terminal signals all processes
    [(signal.SIGINT, True), (signal.SIGHUP, True), (signal.SIGTERM, False), (signal.SIGKILL, False)],
)
def test_a_signal_while_the_workers_start_leaves_no_process_and_no_stack_trace(
    store: str, tmp_path: Path, signum: signal.Signals, group: bool
) -> None:
    process = begin(store, tmp_path, *LONG, jobs=0)
    while not MLflowStore(store, "mnist_exp").runs():
        assert process.poll() is None
    (os.killpg if group else os.kill)(process.pid, signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum)
    assert "Traceback" not in error
    assert_none_left(store)


@pytest.mark.slow
def test_nohup_survives_the_end_of_the_terminal(store: str, tmp_path: Path) -> None:
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; the command inherits it
    try:
        process = begin(store, tmp_path, *LONG[:-2], "phases.finetune.epochs=10", "seed=0,1", jobs=2)
    finally:
        signal.signal(signal.SIGHUP, handler)
    os.killpg(process.pid, signal.SIGHUP)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert [child.status for child in parent_and_children(store)[1]] == ["FINISHED"] * 2


@pytest.mark.slow
def test_a_killed_worker_fails_its_job_alone(command_line: CommandLine, store: str, tmp_path: Path) -> None:
    process = begin(store, tmp_path, *LONG, jobs=2)
    _, children = parent_and_children(store)
    os.kill(int(children[0].tags["pid"]), signal.SIGKILL)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "SIGKILL" in error
    _, children = parent_and_children(store)
    assert [child.status for child in children] == ["KILLED"] + ["FINISHED"] * 3
    assert command_line("-m", "sweep.resume=latest").returncode == 0
    parent, children = parent_and_children(store)
    assert parent.info.status == "FINISHED"
    assert [child.status for child in children] == ["FINISHED"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [0, 2], ids=["before the workers", "during jobs"])
def test_a_sweep_whose_forking_server_is_killed_ends_and_can_be_resumed(
    command_line: CommandLine, store: str, tmp_path: Path, jobs: int
) -> None:
    """As a machine that runs out of memory does."""
    process = begin(store, tmp_path, *LONG[:-2], "phases.finetune.epochs=10", LONG[-1], jobs=jobs)
    while not (forking := server(process.pid)):
        assert process.poll() is None
    os.kill(forking, signal.SIGKILL)
    _, error = process.communicate(timeout=240)
    assert "Traceback" not in error
    assert_none_left(store)
    parent, children = parent_and_children(store)
    assert (process.returncode, parent.info.status) in [(0, "FINISHED"), (1, "FAILED")]
    assert "RUNNING" not in {child.status for child in children}
    if process.returncode == 1:
        assert command_line("-m", "sweep.resume=latest").returncode == 0
    assert [child.status for child in parent_and_children(store)[1]] == ["FINISHED"] * 4


@pytest.mark.slow
def test_a_parent_that_is_killed_leaves_nothing_running(store: str, tmp_path: Path) -> None:
    process = begin(store, tmp_path, *LONG, jobs=2)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while any(child.status == "RUNNING" for child in parent_and_children(store)[1]):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    subprocess.run([sys.executable, "-m", "mnist_exp.runs", "list", "--output-dir", f"{tmp_path}/outputs"], check=True)
    parent, children = parent_and_children(store)
    assert parent.info.status == "KILLED"
    assert {child.status for child in children} == {"KILLED"}
    assert_none_left(store)


@pytest.mark.slow
def test_a_live_run_is_not_reaped_and_a_repeated_run_is_identical(command_line: CommandLine, store: str, tmp_path: Path) -> None:
    process = begin(store, tmp_path, *LONG[1:-1], jobs=1)
    subprocess.run([sys.executable, "-m", "mnist_exp.runs", "reap", "--output-dir", f"{tmp_path}/outputs"], check=True)
    assert [record.status for record in MLflowStore(store, "mnist_exp").runs()] == ["RUNNING"]
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert command_line("rerun=latest").returncode == 0, "1 if a metric differs"


@pytest.mark.slow
def test_a_search_proposes_prunes_and_can_be_resumed(command_line: CommandLine, store: str, mnist_root: Path) -> None:
    pytest.importorskip("optuna")
    search = ("-m", "hydra/sweeper=optuna", "data=mnist_tuning", "phases.train.epochs=2", "~phases.finetune", "augmentation=none")
    space = ("optimizer.lr=tag(log,interval(0.0001,0.4))", "model=choice(se_cnn,plain_cnn)")
    done = command_line(*search, *space, "hydra.sweeper.n_trials=6")
    assert done.returncode == 0, done.stderr
    parent, children = parent_and_children(store)
    assert parent.info.status == "FINISHED"
    assert len(children) == 6
    assert not any(key.startswith("test/") for child in children for key in child.metrics)
    more = command_line(*search[:2], "sweep.resume=" + parent.info.run_id, "hydra.sweeper.n_trials=8")
    assert more.returncode == 0, more.stderr
    _, children = parent_and_children(store)
    assert [child.job for child in children] == list(range(8))
    assert all(child.status == "FINISHED" or "pruned" in child.tags for child in children)
    assert any("pruned" in child.tags for child in children)
