import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from conftest import exit_status
from mlflow.store.entities import PagedList
from processes import shell

from mnist_exp import runs
from mnist_exp.composing import compose_recipe
from mnist_exp.errors import UserError
from mnist_exp.storage import run_dir
from mnist_exp.tracking.base import DatasetInfo, RunInfo
from mnist_exp.tracking.definition import Definition, Job
from mnist_exp.tracking.housekeeping import delete, gc_command, plan_pruning
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.provenance import ORIGIN, Origin

DAY = 86_400_000
Command = Callable[..., str]


@pytest.fixture
def opened(store: str) -> MLflowStore:
    found = MLflowStore(store, "mnist_exp")
    found.open()
    return found


@pytest.fixture
def command(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `python -m mnist_exp.runs` within this process and return its output."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["runs", *arguments, "--output-dir", str(tmp_path / "outputs")])
        ended = exit_status(runs.main)
        printed = capsys.readouterr()
        assert ended == status, printed.err
        return printed.out + printed.err

    return run


@cache
def recipe(*overrides: str) -> str:
    return compose_recipe(*overrides).as_json()


def record(
    opened: MLflowStore,
    output_dir: Path,
    name: str = "se_cnn",
    *,
    accuracy: float | None = None,
    tags: dict[str, str] | None = None,
    age: float = 0,
    status: str = "FINISHED",
    overrides: tuple[str, ...] = (),
    torch: str = "2.0",
) -> str:
    """Leave a run in the store, the artifact store and the output folder; age: days since its end."""
    tags = {"data": "mnist", "output_dir": str(output_dir), "overrides": ""} | (tags or {})
    with opened.start(RunInfo(name, f"python -m mnist_exp.run name={name}", tags)) as tracker:
        tracker.log_params({"seed": 0, "model": "se_cnn"})
        tracker.log_text(recipe(*overrides), "recipe.json")
        origin = Origin(machine={"cpu": "fast", "memory": torch}, packages={"torch": torch, "rich": "1"})
        tracker.log_text(origin.model_dump_json(), ORIGIN)
        tracker.log_dataset(DatasetInfo(tags["data"], "test", "test", "abc", "somewhere", 10, 10, (1, 28, 28)))
        if accuracy is not None:
            tracker.log_metrics({"val/accuracy": accuracy, "test/accuracy": accuracy, "test/loss": 1 - accuracy}, 1)
    folder = run_dir.ensure_writable_dir(output_dir / tracker.run_id)
    (folder / run_dir.CHECKPOINT).write_bytes(bytes(1000))
    if status == "FINISHED":
        run_dir.mark_complete(folder)
    opened.client.set_terminated(tracker.run_id, status, int(time.time() * 1000 - age * DAY))
    return tracker.run_id


def test_a_start_names_one_run_and_latest_the_newest(opened: MLflowStore, store: str, tmp_path: Path) -> None:
    run_id = record(opened, tmp_path)
    other = MLflowStore(store, "other")
    for text in (run_id[:6], run_id[:10].upper(), run_id, "latest"):
        assert opened.resolve_id(text) == run_id
        if text != "latest":
            assert other.resolve_id(text) == run_id, "in any experiment"
    for text in (run_id[:5], "%%%%%%", "../../", "ffffff" if run_id[0] != "f" else "000000", "nonsense"):
        with pytest.raises(UserError) as error:
            opened.resolve_id(text)
        assert error.value.value == text
    with pytest.raises(UserError):
        other.resolve_id("latest")


def test_an_ambiguous_start_lists_the_candidates(opened: MLflowStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [record(opened, tmp_path, name) for name in ("first", "second")]
    found = opened.runs()
    monkeypatch.setattr(opened, "runs", lambda *_, **__: found)
    with pytest.raises(UserError) as error:
        opened.resolve_id("abcdef")
    assert all(text in str(error.value) for text in (*ids, "first", "second"))


def test_list_sorts_and_filters(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    for name, accuracy, data in (("good", 0.99, "mnist"), ("bad", 0.5, "mnist"), ("other", 0.75, "digits")):
        record(opened, tmp_path, name, accuracy=accuracy, tags={"data": data})
    record(opened, tmp_path, "unscored")
    by_accuracy = command("list", "--sort", "test/accuracy")
    assert by_accuracy.index("good") < by_accuracy.index("other") < by_accuracy.index("bad")
    assert "unscored" not in by_accuracy
    by_loss = command("list", "--sort", "test/loss", "--data", "mnist")
    assert by_loss.index("good") < by_loss.index("bad")
    assert "other" not in by_loss
    assert "0.5000" in by_loss
    last = command("list", "--last", "2")
    assert "other" in last
    assert "unscored" in last
    assert "good" not in last
    for option, value, suggested in (("--data", "mnits", "mnist"), ("--sort", "test/acuracy", "test/accuracy")):
        message = command("list", option, value, status=1)
        assert all(text in message for text in (f"{option} {value}", suggested))


def test_show_prints_everything_about_a_run(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    run_id = record(opened, tmp_path / "outputs", "se_cnn \x1b]0;title\x07", accuracy=0.9867)
    model = opened.client.create_logged_model(opened.experiment_id, "model", run_id)
    shown = command("show", run_id[:8])
    assert command("show", "latest") == shown
    for part in (run_id, "FINISHED", "seed", "98.67 %", f"models:/{model.model_id}", "command: python -m mnist_exp.run name="):
        assert part in shown
    assert f"folder: {tmp_path / 'outputs' / run_id}" in shown
    assert f"artifacts: {(tmp_path / 'mlartifacts' / run_id / 'artifacts').as_uri()}" in shown
    assert "\x1b]" not in shown
    assert "f" * 32 in command("show", "f" * 32, status=1)


def test_diff_shows_only_the_differences(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    first = record(opened, tmp_path, accuracy=0.98, overrides=("optimizer.lr=0.1",))
    record(opened, tmp_path, accuracy=0.99, overrides=("optimizer.lr=0.2",), torch="2.1")
    shown = command("diff", first[:10], "latest")
    for part in ("optimizer.lr", "0.1", "0.2", "torch", "2.1", "memory", "98.00 %", "99.00 %", f"A: {first[:8]}"):
        assert part in shown
    for part in ("seed", "rich", "cpu"):
        assert part not in shown
    assert "Identical: configuration, code, packages, machine, data, metrics." in command("diff", first, first)


def make_sweep(
    opened: MLflowStore, output_dir: Path, accuracies: dict[str, list[float]], status: str = "FINISHED", age: float = 0
) -> str:
    """Leave a sweep over `model` with the validation accuracies of each arm's seeds."""
    pairs = [(arm, seed, value) for arm, values in accuracies.items() for seed, value in enumerate(values)]
    jobs = [Job(number, ["data=mnist", f"model={arm}", f"seed={seed}"], "") for number, (arm, seed, _) in enumerate(pairs)]
    with opened.start(RunInfo("sweep", "", {"sweep_jobs": str(len(jobs)), "output_dir": str(output_dir)})) as parent:
        parent.log_text(Definition("Grid", len(jobs), ["data=mnist"], {}, jobs).as_json(), "sweep.json")
    for job, (arm, seed, value) in zip(jobs, pairs, strict=True):
        tags = {"sweep_id": parent.run_id, "job_num": str(job.number)}
        record(opened, output_dir, f"{arm} seed={seed}", accuracy=value, tags=tags, age=age)
    opened.client.set_terminated(parent.run_id, status, int(time.time() * 1000 - age * DAY))
    return parent.run_id


def test_best_prints_the_command_of_the_best_arm_by_the_mean(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    sweep = make_sweep(opened, tmp_path, {"plain_cnn": [0.90, 0.99], "se_cnn": [0.96, 0.97]})
    for name in (sweep[:8], "latest"):
        shown = command("best", name)
        assert shown.splitlines()[-1].startswith("python -m mnist_exp.run data=mnist model=se_cnn output_dir=")
        assert "96.50 %" in shown
    empty = make_sweep(opened, tmp_path, {})
    assert empty in command("best", empty, status=1)


def test_prune_deletes_old_runs_and_their_folders(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    old = record(opened, outputs, "worst", accuracy=0.1, age=40)
    model = opened.client.create_logged_model(opened.experiment_id, "model", old)
    young = record(opened, outputs, "young", accuracy=0.2, age=20)
    best = record(opened, outputs, "best", accuracy=0.9, age=40)
    options = ("prune", "--older-than", "30d", "--keep-best", "1")
    assert "worst" in command(*options)
    assert {path.name for path in outputs.iterdir()} == {old, young, best}, "without --yes, nothing is deleted"
    assert gc_command(opened) in command(*options, "--yes")
    assert {run.run_id for run in opened.runs()} == {path.name for path in outputs.iterdir()} == {young, best}
    assert not opened.client.search_logged_models([opened.experiment_id], f"model_id='{model.model_id}'")


@pytest.mark.slow
def test_the_printed_command_removes_the_artifacts_of_deleted_runs(opened: MLflowStore, tmp_path: Path) -> None:
    opened.client.delete_run(record(opened, tmp_path))
    assert list(tmp_path.rglob("recipe.json"))
    shell(gc_command(opened))
    assert not list(tmp_path.rglob("recipe.json"))


def test_prune_keeps_what_somebody_needs(opened: MLflowStore, tmp_path: Path) -> None:
    registered = record(opened, tmp_path, "registered", age=90)
    opened.client.create_registered_model("name")
    address = opened.client.get_run(registered).info.artifact_uri
    opened.client.create_model_version("name", f"{address}/model", registered)
    by_model = record(opened, tmp_path, "registered by its model", age=90)
    model = opened.client.create_logged_model(opened.experiment_id, "model", by_model)
    opened.client.create_model_version("name", model.artifact_location, model_id=model.model_id)
    running = opened.start(RunInfo("running", "")).run_id
    resumable = record(opened, tmp_path, "resumable", age=90, status="KILLED")
    elsewhere = record(opened, tmp_path, "elsewhere", age=90, status="KILLED", tags={"output_dir": "/elsewhere"})
    teacher = record(opened, tmp_path, "teacher", age=90)
    student = record(opened, tmp_path, "student", tags={"overrides": f"teacher.runs=[{teacher}]"})
    unfinished = make_sweep(opened, tmp_path, {"a": [0.5]}, "FAILED", age=90)
    done = make_sweep(opened, tmp_path, {"a": [0.6]}, age=90)
    pruned = record(opened, tmp_path, "pruned by a search", age=90, status="KILLED", tags={"pruned": "early"})
    plan = plan_pruning(opened, tmp_path, 30, 1, "val/accuracy")
    assert [run.run_id for run in plan.runs] == [pruned]
    assert sum(plan.kept.values()) == 11
    kept = {run.run_id for run in opened.runs()} - {pruned}
    assert {registered, by_model, running, resumable, elsewhere, teacher, student, unfinished, done} <= kept
    plan = plan_pruning(opened, tmp_path, 30, 0, "val/accuracy")
    assert {run.name for run in plan.runs} == {"pruned by a search", "a seed=0", "sweep"}, "a sweep goes with its last job"
    assert [run.name for run in plan_pruning(opened, tmp_path, 30, 1, "test/calibration_error").runs] == ["pruned by a search"]
    with pytest.raises(UserError):
        plan_pruning(opened, tmp_path, 30, 1, "train/lr")


def test_the_last_page_of_a_registry_ends_the_search(
    opened: MLflowStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP, its token is empty instead of None."""
    pages = iter([PagedList([], "next"), PagedList([], "")])
    monkeypatch.setattr(type(opened.client), "search_model_versions", lambda *_, **__: next(pages))
    assert plan_pruning(opened, tmp_path, 30, 1, "val/accuracy").runs == []
    assert next(pages, None) is None


def test_prune_leaves_a_run_alone_that_a_process_works_on(opened: MLflowStore, tmp_path: Path) -> None:
    run_id = record(opened, tmp_path, age=40)
    (run,) = opened.runs()
    with run_dir.lock_run(tmp_path / run_id):
        assert delete(opened, run, tmp_path) == "a process works on it"
    opened.client.update_run(run_id, status="RUNNING")
    assert delete(opened, run, tmp_path) == "it was resumed in the meantime"
    assert (tmp_path / run_id / run_dir.CHECKPOINT).exists()


def test_prune_removes_a_link_but_not_its_target(opened: MLflowStore, tmp_path: Path) -> None:
    run_id = record(opened, tmp_path, age=40)
    (tmp_path / run_id).rename(tmp_path / "target")
    (tmp_path / run_id).symlink_to(tmp_path / "target")
    (run,) = opened.runs()
    assert delete(opened, run, tmp_path) is None
    assert not os.path.lexists(tmp_path / run_id)
    assert (tmp_path / "target" / run_dir.CHECKPOINT).exists()


def test_ages() -> None:
    assert [runs.days(text) for text in ("30d", "12h", "4w")] == [30, 0.5, 28]
    for text in ("30", "d", "-1d", "1.5d", "30 d", "1y"):
        with pytest.raises(argparse.ArgumentTypeError):
            runs.days(text)


def test_every_table_of_runs_fits_80_columns(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    long_id = record(opened, tmp_path, "se_cnn_separable_small bs=256 optimizer.lr=0.012345", accuracy=0.98765)
    other_id = record(opened, tmp_path, accuracy=0.97654, overrides=("seed=1", f"phases.train.split={'a' * 90}"))
    make_sweep(opened, tmp_path, {"se_cnn_separable_small": [0.9], "plain_cnn": [0.8]}, age=1)
    for arguments in (
        ["list"],
        ["list", "--sort", "test/loss"],
        ["show", long_id],
        ["diff", long_id, other_id],
        ["best", "latest"],
        ["prune", "--older-than", "1h", "--keep-best", "1"],
    ):
        shown = command(*arguments)
        assert max(len(line) for line in shown.splitlines() if line[:1] in "│┃┏┡└┌") <= 80, shown
