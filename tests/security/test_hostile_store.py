"""What is stored may be written by others: nothing outside the command line's own folders is opened, created or changed by it.

Each test stores a value that points to a bait, a folder next to the output folder and the store, and then reads the store.
"""

import json
import os
import platform
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from mlflow import MlflowClient
from test_overrides import HOSTILE

from mnist_exp.storage import checkpoint, run_dir
from mnist_exp.tracking.base import RunInfo
from mnist_exp.tracking.definition import Definition, Job
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.provenance import software

pytestmark = pytest.mark.slow  # two minutes
SHORT = ("data=digits", "~phases.train", "phases.finetune.epochs=1")
touched: list[str] | None = None  # events that name the watched folder, while there is one
watched = ""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if touched is not None and event.partition(".")[0] in ("open", "os", "shutil", "sqlite3", "subprocess"):
        touched.extend(f"{event} {item}" for item in arguments if watched in os.fsdecode(item if is_path(item) else str(item)))


def is_path(item: object) -> bool:
    return isinstance(item, str | bytes | os.PathLike)


sys.addaudithook(_watch)  # cannot be removed again, but costs nothing while nothing is watched


@pytest.fixture
def bait(tmp_path: Path) -> Iterator[Path]:
    """A folder that must be left alone, with a file and a lock in it."""
    global touched, watched
    folder = tmp_path / "bait"
    folder.mkdir()
    (folder / "file").write_text("untouched")
    before = snapshot(folder)
    touched, watched = [], str(folder)
    yield folder
    seen, touched = touched, None
    assert seen == []
    assert snapshot(folder) == before


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files} | {str(folder): (len(files), b"")}


def unwatched(write: Callable[[], object]) -> None:
    """Store a hostile value."""
    global touched
    before, touched = touched, None
    write()
    touched = before


def test_the_watch_sees_what_it_must(tmp_path: Path) -> None:
    global touched, watched
    touched, watched = [], str(tmp_path)
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").mkdir()
    sqlite3.connect(tmp_path / "c.db").close()
    seen, touched = touched, None
    assert {event.split()[0] for event in seen} >= {"open", "os.mkdir", "sqlite3.connect"}


@pytest.fixture
def sweep(store: str, tmp_path: Path) -> Callable[..., str]:
    """Store the parent of a sweep that was stopped: `sweep(overrides, output_dir=..., sweeper=...)` returns its id."""

    def store_sweep(*overrides: str, output_dir: Path = tmp_path / "outputs", sweeper: str = "Grid") -> str:
        jobs = [Job(0, list(overrides), "0")] if sweeper == "Grid" else []
        definition = Definition(sweeper, 2, list(overrides), software(), jobs)
        tags = {"sweep_jobs": "1", "output_dir": str(output_dir)}
        tracker = MLflowStore(store, "mnist_exp").start(RunInfo("sweep", "", tags))
        tracker.log_text(definition.as_json(), "sweep.json")
        tracker.client.set_terminated(tracker.run_id, "KILLED")
        return tracker.run_id

    return store_sweep


@pytest.mark.parametrize("override", HOSTILE)
@pytest.mark.parametrize("flags", [(), ("sweep.force=true",)], ids=["", "force"])
def test_overrides_in_a_sweep(
    override: str, flags: tuple[str, ...], sweep: Callable[..., str], bait: Path, in_process: CommandLine
) -> None:
    unwatched(lambda: sweep(*SHORT, override.replace("/tmp", str(bait))))
    done = in_process("-m", "sweep.resume=latest", *flags)
    assert done.returncode == 1
    assert "contains the override" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_output_folder_of_a_sweep_is_asked_for(sweep: Callable[..., str], bait: Path, in_process: CommandLine) -> None:
    unwatched(lambda: sweep(*SHORT, output_dir=bait))
    done = in_process("-m", "sweep.resume=latest", "sweep.force=true")
    assert done.returncode == 0, "output_dir was typed: the tag is not followed"


def test_the_output_folder_of_a_sweep_is_not_followed(
    sweep: Callable[..., str], bait: Path, monkeypatch: pytest.MonkeyPatch, handlers_put_back: None, capfd: Any
) -> None:
    from mnist_exp.run import main

    unwatched(lambda: sweep(*SHORT, output_dir=bait))
    monkeypatch.setattr(sys, "argv", ["mnist-exp", "-m", "sweep.resume=latest", "sweep.force=true"])
    with pytest.raises(SystemExit):
        main()
    assert f"add output_dir={bait}." in capfd.readouterr().err


@pytest.mark.parametrize("definition", ["[]", "{", '{"jobs": 1}', '{"sweeper": "Grid"}', "9" * 5000, "[" * 5000])
def test_a_definition_of_another_form(definition: str, sweep: Callable[..., str], store: str, in_process: CommandLine) -> None:
    MlflowClient(store).log_text(sweep(*SHORT), definition, "sweep.json")
    done = in_process("-m", "sweep.resume=latest")
    assert "has no readable sweep.json" in done.stderr


@pytest.fixture
def run(in_process: CommandLine, store: str, tmp_path: Path) -> Path:
    """The folder of a short run, which needs but its end recorded again."""
    assert in_process(*SHORT).returncode == 0
    (folder,) = [path.parent for path in (tmp_path / "outputs").glob("*/finished")]
    return folder


def hostile_configs(config: dict[str, Any], bait: Path) -> dict[str, dict[str, Any]]:
    """Configurations that are refused, or run without what they ask for."""
    opener = {"_target_": "mnist_exp.tracking.connection.connect", "uri": f"sqlite:///{bait}/x.db", "experiment": "x"}
    reader = {"_target_": "mnist_exp.experiment.teachers.load_finished", "run": "file", "output_dir": str(bait)}
    mnist = {"_target_": "mnist_exp.learning.datasets.load_mnist", "root": str(bait), "fallback": None, "finetune_fraction": 0.02}
    phase = config["phases"]["finetune"]
    return {
        "output_dir": config | {"output_dir": str(bait)},
        "tracking": config | {"tracking": config["tracking"] | {"uri": f"sqlite:///{bait}/x.db"}},
        "data.root": config | {"data": mnist | {"validation_size": 0}},
        "sweep_job": config | {"sweep_job": "{}"},
        "model": config | {"model": opener},
        "data": config | {"data": opener},
        "tracking target": config | {"tracking": opener},
        "teacher": config | {"phases": {"finetune": phase | {"teacher": reader}}},
        "optimizer": config | {"phases": {"finetune": phase | {"optimizer": opener}}},
        "nested": config | {"model": config["model"] | {"se": opener}},
        "tuple": config | {"model": config["model"] | {"other": ({"inner": opener},)}},
        "instruction": config | {"model": config["model"] | {"_args_": [(opener,)]}},
        "dotted": config | {"phases": {"finetune": phase | {"teacher.optimizer": {"inner": opener}}}},
        "interpolated": config | {"device": "${oc.env:HOME}"},
        "nested data": config | {"data": config["data"] | {"inner": mnist | {"validation_size": 0, "seed": 0}}},
        "nested tracking": config | {"tracking": config["tracking"] | {"inner": opener}},
        "nested teacher": config | {"phases": {"finetune": phase | {"teacher": phase["teacher"] | {"inner": reader}}}},
    }


EMPTY: dict[str, Any] = {"sweep": {}, "tracking": {}, "model": {}, "data": {}, "phases": {"finetune": {"teacher": {}}}}
KINDS = list(hostile_configs(EMPTY, Path()))
ACCEPTED = {"output_dir", "tracking"}  # the command line sets these keys


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_in_a_checkpoint(kind: str, run: Path, bait: Path, in_process: CommandLine) -> None:
    (run / run_dir.FINISHED).unlink()
    saved = checkpoint.load(run / run_dir.CHECKPOINT)
    unwatched(lambda: checkpoint.save(run, replace(saved, config=hostile_configs(saved.config, bait)[kind])))
    done = in_process("resume=latest")
    assert done.returncode == (0 if kind in ACCEPTED else 1), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_in_a_recipe(kind: str, run: Path, bait: Path, store: str, in_process: CommandLine) -> None:
    client = MlflowClient(store)
    recipe = json.loads(Path(client.download_artifacts(run.name, "recipe.json")).read_text())
    hostile = recipe | {"config": hostile_configs(recipe["config"], bait)[kind]}
    unwatched(lambda: client.log_text(run.name, json.dumps(hostile), "recipe.json"))
    done = in_process(f"rerun={run.name}")
    assert done.returncode == (0 if kind in ACCEPTED else 1), done.stderr
    assert "Traceback" not in done.stderr


CHANGES: dict[str, dict[str, Any]] = {
    "run_id": {"run_id": "../../bait"},
    "overrides": {"overrides": ["hydra.run.dir=x"]},
    "choices": {"choices": {}},
    "threads": {"software": {"threads": "-1"}},
    "a phase": {"state": {"phase": "x", "steps": 1, "examples_seen": 1}},
    "no state": {"state": {}},
    "a job": {"job": {"sweep_id": "../../bait", "number": 0, "color": "#000000", "varied": [], "data": None, "in_search": True}},
    "another type": {"seconds": {"train": "x"}},
    "another network": {"state": {"phase": "finetune", "steps": 1, "examples_seen": 1, "model": {}, "optimizer": 1}},
}


@pytest.mark.parametrize("kind", CHANGES)
def test_the_other_values_of_a_checkpoint(kind: str, run: Path, bait: Path, in_process: CommandLine) -> None:
    (run / run_dir.FINISHED).unlink()
    saved = checkpoint.load(run / run_dir.CHECKPOINT)
    checkpoint.save(run, replace(saved, **CHANGES[kind]))
    (run / run_dir.PREVIOUS_CHECKPOINT).unlink()
    done = in_process("resume=latest")
    assert done.returncode == (0 if kind == "threads" else 1), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "recipe",
    [
        "",
        "[]",
        '{"config": 1, "choices": {}, "overrides": []}',
        '{"config": {}, "choices": {}, "overrides": []}',
        '{"config": {}, "choices": {"model": ["a"]}, "overrides": []}',
        '{"config": {}, "choices": {}, "overrides": ["hydra.run.dir=x"]}',
    ],
)
def test_a_recipe_of_another_form(recipe: str, run: Path, store: str, in_process: CommandLine) -> None:
    MlflowClient(store).log_text(run.name, recipe, "recipe.json")
    done = in_process(f"rerun={run.name}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("pid", ["1", "-1", "0", "x", "9" * 30, "2147483646", ""])
@pytest.mark.parametrize("host", ["", "elsewhere"])
def test_the_tags_that_say_who_works_on_a_run(pid: str, host: str, bait: Path, store: str, in_process: CommandLine) -> None:
    tags = {"host": host or platform.node(), "pid": pid, "output_dir": str(bait)}
    run_id = MLflowStore(store, "mnist_exp").start(RunInfo("hostile", "", tags)).run_id

    def lure() -> None:
        (bait / run_id).mkdir()
        (bait / run_id / run_dir.LOCK).write_text("untouched")

    unwatched(lure)
    assert in_process(*SHORT).returncode == 0  # a run that starts looks for those whose process died
    is_dead = pid == "2147483646" and not host
    assert MlflowClient(store).get_run(run_id).info.status == ("KILLED" if is_dead else "RUNNING")

    def take_back() -> None:
        assert (bait / run_id / run_dir.LOCK).read_text() == "untouched"
        (bait / run_id / run_dir.LOCK).unlink()
        (bait / run_id).rmdir()

    unwatched(take_back)


@pytest.mark.parametrize("run_id", ["../bait", "0" * 31, "ABC"])
def test_the_id_of_a_run(run_id: str, sweep: Callable[..., str], bait: Path, store: str, in_process: CommandLine) -> None:
    stored = sweep(*SHORT)
    with closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as database:
        for table in ("tags", "runs"):
            database.execute(f"UPDATE {table} SET run_uuid = ? WHERE run_uuid = ?", (run_id, stored))
        database.commit()
    done = in_process("-m", "sweep.resume=latest")
    assert "There is no unfinished sweep latest" in done.stderr


def test_the_name_of_the_data_of_a_finished_job(
    sweep: Callable[..., str], store: str, in_process: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is passed on to the other jobs, in whose configuration a resolver could read the environment."""
    monkeypatch.setenv("INNOCENT", "value-of-the-environment")
    parent = sweep(*SHORT)
    tags = {"sweep_id": parent, "job_num": "5", "data": "${oc.env:INNOCENT}"}
    with MLflowStore(store, "mnist_exp").start(RunInfo("hostile", "", tags, parent=parent)):
        pass
    done = in_process("-m", f"sweep.resume={parent}")
    assert "value-of-the-environment" not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"value-of-the-environment" in path.read_bytes()]


def test_the_study_of_a_search(
    sweep: Callable[..., str], bait: Path, mnist_root: Path, tmp_path: Path, in_process: CommandLine
) -> None:
    pytest.importorskip("optuna")
    from mnist_exp.sweep.search import open_study

    search = ("data=mnist_tuning", "optimizer.lr=interval(0.1,0.4)", "model=choice(se_cnn,plain_cnn)")
    parent = sweep(*search, sweeper="Optuna")
    folder = run_dir.make_folder(tmp_path / "outputs" / parent)
    resume = ("-m", "hydra/sweeper=optuna", f"sweep.resume={parent}", "sweep.force=true")
    for prescribed in ({"optimizer.lr": 1e29}, {"optimizer.lr": f"0.1,output_dir={bait}"}, {"model": f"{bait}/evil"}):
        unwatched(lambda prescribed=prescribed: open_study(folder, 0).enqueue_trial(prescribed))
        done = in_process(*resume)
        assert done.returncode == 1
        assert "The study of this search is damaged" in done.stderr
        assert "Traceback" not in done.stderr
        (folder / "optuna.db").unlink()
    (folder / "optuna.db").write_bytes(b"no database" * 100)
    assert "cannot be read as the study of a search" in in_process(*resume).stderr
