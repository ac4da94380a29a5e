import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from conftest import exit_status, one_split
from mlflow.store.entities import PagedList
from processes import shell

from mnist_exp import runs
from mnist_exp.composing import compose_recipe
from mnist_exp.errors import UserError
from mnist_exp.storage import run_dir
from mnist_exp.tracking.base import RunInfo
from mnist_exp.tracking.connection import gc_command
from mnist_exp.tracking.housekeeping import delete, plan_pruning
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.tables import group_by_sweep

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
    params: dict[str, str] | None = None,
) -> str:
    """Leave a run in the store, the artifact store and the output folder; age: days since its end."""
    tags = {"data": "mnist", "output_dir": str(output_dir), "overrides": "", "torch": torch, "cpu": "fast"} | (tags or {})
    with opened.start(RunInfo(name, f"python -m mnist_exp.run name={name}", tags)) as tracker:
        tracker.log_params({"seed": 0, "model": "se_cnn"} | (params or {}))
        tracker.log_text(recipe(*overrides), "recipe.json")
        tracker.log_dataset(one_split(tags["data"]), "test", "test")
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
        assert opened.find_run(text).run_id == run_id
        if text != "latest":
            assert other.find_run(text).run_id == run_id, "in any experiment"
    for text in (run_id[:5], "%%%%%%", "../../", "ffffff" if run_id[0] != "f" else "000000", "nonsense"):
        with pytest.raises(UserError) as error:
            opened.find_run(text)
        assert error.value.value == text
    with pytest.raises(UserError):
        other.find_run("latest")


def test_an_ambiguous_start_lists_the_candidates(opened: MLflowStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [record(opened, tmp_path, name) for name in ("first", "second")]
    found = opened.runs()
    monkeypatch.setattr(opened, "runs", lambda *_, **__: found)
    with pytest.raises(UserError) as error:
        opened.find_run("abcdef")
    assert all(text in str(error.value) for text in (*ids, "first", "second"))


def test_list_sorts_and_filters(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    for name, accuracy, data in (("good", 0.99, "mnist"), ("worst", 0.5, "mnist"), ("other", 0.75, "digits")):
        record(opened, tmp_path, name, accuracy=accuracy, tags={"data": data})
    record(opened, tmp_path, "unscored")
    by_accuracy = command("list", "--sort", "test/accuracy")
    assert by_accuracy.index("good") < by_accuracy.index("other") < by_accuracy.index("worst")
    assert "unscored" not in by_accuracy
    by_loss = command("list", "--sort", "test/loss", "--data", "mnist")
    assert by_loss.index("good") < by_loss.index("worst")
    assert "other" not in by_loss
    assert "0.5000" in by_loss
    last = command("list", "--last", "2")
    assert "other" in last
    assert "unscored" in last
    assert "good" not in last
    for option, value, suggested in (("--data", "mnits", "mnist"), ("--sort", "test/acuracy", "test/accuracy")):
        message = command("list", option, value, status=1)
        assert all(text in message for text in (f"{option} {value}", suggested))


def test_list_folds_sweeps_and_knows_the_day(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    sweep = make_sweep(opened, tmp_path, {"se_cnn": [0.5, 0.6], "plain_cnn": [0.7]})
    last = next(run for run in opened.children(sweep) if run.job == 2)
    opened.client.set_terminated(last.run_id, "KILLED")
    single = record(opened, tmp_path, "single")
    now = time.time()
    old = opened.client.create_run(opened.experiment_id, int(1000 * (now - 3 * 86_400)), run_name="old").info.run_id
    opened.client.set_terminated(old)

    def listed(*options: str) -> list[str]:
        return [line.split()[1] for line in command("list", *options).splitlines() if re.match("│ [0-9a-f]{8} ", line)]

    jobs = [run.run_id[:8] for run in sorted(opened.children(sweep), key=lambda run: run.job or 0)]
    assert listed() == [old[:8], sweep[:8], single[:8]], "the newest last"
    assert listed("--jobs") == [old[:8], sweep[:8], *jobs, single[:8]]
    assert listed("--since", "2d") == listed("--last", "2") == [sweep[:8], single[:8]]
    assert listed("--jobs", "--last", "2") == [sweep[:8], jobs[2], single[:8]]
    shown = command("list", "--last", "2")
    assert "2 of 3 jobs" in shown, "of all jobs, not of the chosen ones"
    assert time.strftime("%Y-%m-%d", time.localtime(now)) in shown
    assert jobs[1] in command("list", "--sort", "val/accuracy"), "a ranking has the jobs"


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
    for part in ("optimizer.lr", "0.1", "0.2", "torch", "2.1", "98.00 %", "99.00 %", f"A: {first[:8]}"):
        assert part in shown
    for part in ("seed", "cpu"):
        assert part not in shown
    assert "Identical: configuration, environment, data, metrics." in command("diff", first, first)


def make_sweep(
    opened: MLflowStore,
    output_dir: Path,
    accuracies: dict[str, list[float]],
    status: str = "FINISHED",
    age: float = 0,
    missing: int = 0,
) -> str:
    """Leave a sweep of models, or of other overrides, with the accuracies of each arm's seeds; missing: of further jobs."""
    pairs = [(arm, seed, value) for arm, values in accuracies.items() for seed, value in enumerate(values)]
    recorded = {"sweep_jobs": str(len(pairs) + missing), "sweeper": "grid", "grids": "[[]]", "output_dir": str(output_dir)}
    with opened.start(RunInfo("sweep", "", recorded)) as parent:
        pass
    for number, (arm, seed, value) in enumerate(pairs):
        tags = {"sweep_id": parent.run_id, "job_num": str(number), "overrides": f"data=mnist model={arm} seed={seed}"}
        if "=" in arm:
            tags["overrides"] = f"{arm} seed={seed}"
        own = tuple(arm.split()) if "=" in arm else ()
        record(
            opened,
            output_dir,
            f"{arm} seed={seed}",
            accuracy=value,
            tags=tags,
            age=age,
            overrides=own,
            params={"seed": str(seed)},
        )
    opened.client.set_terminated(parent.run_id, status, int(time.time() * 1000 - age * DAY))
    return parent.run_id


def test_best_prints_the_command_of_the_best_arm_by_the_mean(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    sweep = make_sweep(opened, tmp_path, {"plain_cnn": [0.90, 0.99], "se_cnn": [0.96, 0.97]})
    for name in (sweep[:8], "latest"):
        shown = command("best", name)
        assert shown.splitlines()[-1].startswith("Next: python -m mnist_exp.run data=mnist model=se_cnn seed=2 output_dir=")
        assert "96.50 %" in shown
    empty = make_sweep(opened, tmp_path, {})
    assert empty in command("best", empty, status=1)


def test_best_prints_the_command_of_the_final_run(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    """On the data that the tuning data belong to, without the keys that divide those, and with a seed of its own."""
    cases = {
        "optimizer.lr=0.2 data=mnist_tuning data.validation_size=10000": "data=mnist optimizer.lr=0.2",
        "data=mnist data.subset=2000": "data=mnist data.subset=2000",
        "model=se_cnn optimizer=adam": "model=se_cnn optimizer=adam",
    }
    for overrides, final in cases.items():
        sweep = make_sweep(opened, tmp_path, {overrides: [0.9]})
        assert f"Next: python -m mnist_exp.run {final} seed=1 output_dir=" in command("best", sweep)


def test_prune_deletes_old_runs_and_their_folders(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    old = record(opened, outputs, "worst", accuracy=0.1, age=40)
    model = opened.client.create_logged_model(opened.experiment_id, "model", old)
    young = record(opened, outputs, "young", accuracy=0.2, age=20)
    best = record(opened, outputs, "best", accuracy=0.9, age=40)
    options = ("prune", "--older-than", "30d", "--keep-best", "1")
    assert "worst" in command(*options)
    assert {path.name for path in outputs.iterdir()} == {old, young, best}, "without --yes, nothing is deleted"
    assert gc_command(opened.uri) in command(*options, "--yes")
    assert {run.run_id for run in opened.runs()} == {path.name for path in outputs.iterdir()} == {young, best}
    assert not opened.client.search_logged_models([opened.experiment_id], f"model_id='{model.model_id}'")


@pytest.mark.slow
def test_the_printed_command_removes_the_artifacts_of_deleted_runs(opened: MLflowStore, tmp_path: Path) -> None:
    opened.client.delete_run(record(opened, tmp_path))
    assert list(tmp_path.rglob("recipe.json"))
    shell(gc_command(opened.uri))
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
    student = record(opened, tmp_path, "student", params={"train.teacher.runs": f"['{teacher[:8]}']"})
    unfinished = make_sweep(opened, tmp_path, {"a": [0.5]}, "FAILED", age=90, missing=1)
    done = make_sweep(opened, tmp_path, {"a": [0.3, 0.6, 0.4]}, age=90)
    pruned = record(opened, tmp_path, "pruned by a search", age=90, status="KILLED", tags={"pruned": "early"})
    diverged = record(opened, tmp_path, "diverged", age=80, status="FAILED")
    run_dir.mark_diverged(tmp_path / diverged)
    old = {"keep_best": 1, "metric": "val/accuracy", "before": 1000 * (time.time() - 30 * 86_400)}
    groups, kept = plan_pruning(opened, tmp_path, **old)
    assert [run.run_id for (run,) in groups] == [pruned, diverged]
    assert sum(kept.values()) == 9, "the single runs and the sweeps"
    names = {run.run_id for run in opened.runs()} - {pruned, diverged}
    assert {registered, by_model, running, resumable, elsewhere, teacher, student, unfinished, done} <= names
    groups, _ = plan_pruning(opened, tmp_path, **(old | {"keep_best": 0}))
    assert [len(group) for group in groups] == [1, 1, 4], "a sweep goes with its last job"
    groups, _ = plan_pruning(opened, tmp_path, **(old | {"metric": "test/calibration_error"}))
    assert [group[0].run_id for group in groups] == [pruned, diverged]
    with pytest.raises(UserError):
        plan_pruning(opened, tmp_path, **(old | {"metric": "train/lr"}))


def test_prune_takes_a_sweep_whole_or_not_at_all(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    best = make_sweep(opened, outputs, {"a": [0.1, 0.9, 0.2]}, age=40)
    young = make_sweep(opened, outputs, {"a": [0.1, 0.3]}, age=40)
    job = opened.children(young)[0].run_id
    opened.client.set_terminated(job, "FINISHED")
    failed = make_sweep(opened, outputs, {"a": [0.4, 0.5]}, "FAILED", age=35)
    diverged = opened.children(failed)[0].run_id
    opened.client.set_terminated(diverged, "FAILED", int(time.time() * 1000 - 35 * DAY))
    run_dir.mark_diverged(outputs / diverged)
    worst = make_sweep(opened, outputs, {"a": [0.2, 0.1]}, age=50)
    stray = record(opened, outputs, "no job any more", accuracy=0.1, tags={"sweep_id": worst}, age=50)
    shown = command("prune", "--older-than", "30d", "--keep-best", "1", "--yes")
    assert shown.index(failed[:8]) < shown.index(worst[:8]), "the failed one first, then the oldest"
    left = {run.run_id for run in opened.runs()}
    assert {best, young} <= left
    assert len(left) == 4 + 3
    assert not {failed, worst, stray} & left
    assert {path.name for path in outputs.iterdir()} == left - {best, young}


def test_delete_takes_runs_and_whole_sweeps(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    sweep, other = (make_sweep(opened, outputs, {"a": [0.1, 0.2]}) for _ in range(2))
    job = opened.children(other)[0].run_id
    kept, first, last = (record(opened, outputs, name) for name in ("kept", "first", "last"))
    model = opened.client.create_logged_model(opened.experiment_id, "model", first)
    before = {run.run_id for run in opened.runs()}
    for mistakes in (["latest", "ffffff" if last[0] != "f" else "000000"], [first, "%"], [sweep, "f" * 32]):
        command("delete", *mistakes, status=1)
    assert {run.run_id for run in opened.runs()} == before, "one wrong name: nothing is deleted"
    gone = {sweep, first, last, job} | {run.run_id for run in opened.children(sweep)}
    shown = command("delete", "latest", first[:6], sweep[:8], sweep, opened.children(sweep)[0].run_id, job)
    assert gc_command(opened.uri) in shown
    assert {run.run_id for run in opened.runs()} == before - gone
    assert kept in before - gone
    assert opened.find_sweep("latest", unfinished=True).run_id == other, "it lacks a job"
    assert {path.name for path in outputs.iterdir()} == before - gone - {other}
    assert not opened.client.search_logged_models([opened.experiment_id], f"model_id='{model.model_id}'")
    command("delete", first, status=1)
    shown = command("delete", kept)
    shell(next(line for line in shown.splitlines() if "mlflow runs restore" in line).partition(": ")[2])
    assert kept in {run.run_id for run in opened.runs()}


def test_delete_leaves_alone_what_is_registered_or_running(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    free = record(opened, outputs, "free")
    sweep = make_sweep(opened, outputs, {"a": [0.1, 0.2]})
    registered, working = (run.run_id for run in opened.children(sweep))
    opened.client.create_registered_model("digits")
    opened.client.create_model_version("digits", opened.client.get_run(registered).info.artifact_uri, registered)
    running = opened.start(RunInfo("running", "")).run_id
    before = {run.run_id for run in opened.runs()}
    for name in (registered, sweep):
        assert "digits" in command("delete", free, name, status=1)
    command("delete", running, status=1)
    assert {run.run_id for run in opened.runs()} == before
    opened.client.delete_model_version("digits", "1")
    with run_dir.lock_run(outputs / working):
        command("delete", sweep, status=1)
        assert {run.run_id for run in opened.runs()} == before, "all of a sweep or nothing"
        command("delete", free, sweep, status=1)
    assert {run.run_id for run in opened.runs()} == before - {free}
    command("delete", sweep)
    assert {run.run_id for run in opened.runs()} == {running}


def test_the_last_page_of_a_registry_ends_the_search(
    opened: MLflowStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP, its token is empty instead of None."""
    pages = iter([PagedList([], "next"), PagedList([], "")])
    monkeypatch.setattr(type(opened.client), "search_model_versions", lambda *_, **__: next(pages))
    assert plan_pruning(opened, tmp_path, 0, 1, "val/accuracy") == ([], {})
    assert next(pages, None) is None


def test_prune_leaves_a_run_alone_that_a_process_works_on(opened: MLflowStore, tmp_path: Path) -> None:
    run_id = record(opened, tmp_path, age=40)
    (group,) = group_by_sweep(opened.runs())
    with run_dir.lock_run(tmp_path / run_id), pytest.raises(UserError):
        delete(opened, group, tmp_path)
    opened.client.update_run(run_id, status="RUNNING")
    with pytest.raises(UserError) as error:
        delete(opened, group, tmp_path)
    assert error.value.value == run_id
    assert (tmp_path / run_id / run_dir.CHECKPOINT).exists()


def test_prune_removes_a_link_but_not_its_target(opened: MLflowStore, tmp_path: Path) -> None:
    run_id = record(opened, tmp_path, age=40)
    (tmp_path / run_id).rename(tmp_path / "target")
    (tmp_path / run_id).symlink_to(tmp_path / "target")
    delete(opened, opened.runs(), tmp_path)
    assert not os.path.lexists(tmp_path / run_id)
    assert (tmp_path / "target" / run_dir.CHECKPOINT).exists()


def test_ages() -> None:
    for text, hours in (("30d", 720), ("12h", 12), ("4w", 672)):
        assert runs.ago(text) == pytest.approx(1000 * (time.time() - 3600 * hours), abs=10_000)
    for text in ("30", "d", "-1d", "1.5d", "30 d", "1y"):
        with pytest.raises(argparse.ArgumentTypeError):
            runs.ago(text)


def test_every_table_of_runs_fits_80_columns(opened: MLflowStore, command: Command, tmp_path: Path) -> None:
    long_id = record(opened, tmp_path, "se_cnn_separable_small bs=256 optimizer.lr=0.012345", accuracy=0.98765)
    other_id = record(opened, tmp_path, accuracy=0.97654, overrides=("seed=1", f"phases.train.split={'a' * 90}"))
    make_sweep(opened, tmp_path, {"se_cnn_separable_small": [0.9], "plain_cnn": [0.8]}, age=1)
    for arguments in (
        ["list"],
        ["list", "--jobs"],
        ["list", "--sort", "test/loss"],
        ["show", long_id],
        ["diff", long_id, other_id],
        ["best", "latest"],
        ["prune", "--older-than", "1h", "--keep-best", "1"],
    ):
        shown = command(*arguments)
        assert max(len(line) for line in shown.splitlines() if line[:1] in "│┃┏┡└┌") <= 80, shown
