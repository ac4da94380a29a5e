"""What is stored may be written by others: it runs no code, and opens or changes nothing outside the command's own folders.

First the guards of configurations, each with the attacks that it stops (those of overrides are in test_overrides.py, those of
weights in test_checkpoint.py and test_stored_models.py). Then whole commands: each attack stores a value that points to a bait, a
folder next to the output folder and the store, and then reads the store.
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
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Call, CommandLine, Compose
from mlflow import MlflowClient

from mnist_exp import paths
from mnist_exp.errors import UserError
from mnist_exp.run import main
from mnist_exp.settings import Recipe, Settings, read_recipe
from mnist_exp.storage import checkpoint, run_dir
from mnist_exp.storage.checkpoint import Checkpoint
from mnist_exp.tracking.base import RunInfo
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.provenance import software

SHORT = ("data=digits", "~phases.train", "phases.finetune.epochs=1")

# Only plain JSON, and only calls that a file names at the same place

CALL = {"_target_": "os.system", "command": "touch exploded"}
LOADER = {"_target_": "mnist_exp.learning.datasets.load_mnist", "download_root": "/tmp/evil"}
CREATE = "${oc.create:{_target_:os.getcwd}}"
ATTACKS: dict[str, tuple[str, Any]] = {  # the key of the error: where what is stored
    "model._target_": ("model", CALL),
    "data._target_": ("data", CALL),
    "tracking._target_": ("tracking", CALL),
    "optimizer._target_": ("optimizer", CALL),
    "phases.finetune._target_": ("phases.finetune._target_", "os.system"),
    "phases.finetune.teacher._target_": ("phases.finetune.teacher", CALL),
    "model.se._target_": ("model.se", CALL),
    "model.hue.0._target_": ("model.hue", [CALL]),
    "model.hue.deep.0.0.er._target_": ("model.hue", {"deep": [[{"er": CALL}]]}),
    "model._args_.0._target_": ("model._args_", [CALL]),
    "phases.finetune.teacher.optimizer.inner._target_": ("phases.finetune.teacher.optimizer", {"inner": CALL}),
    "augmentation.degrees._target_": ("augmentation.degrees", {"_target_": ["os.system"]}),
    # Of another group, and below another call of its own group: its folder would be opened.
    "scheduler._target_": ("scheduler", LOADER),
    "data.fallback._target_": ("data.fallback", LOADER),
    # Hydra would resolve these when it calls, and could create a call.
    "device": ("device", "${oc.env:HOME}"),
    "model.hue": ("model.hue", CREATE),
    "model.hue.0.x": ("model.hue", [{"x": CREATE}]),
    "phases.finetune.split": ("phases.finetune.split", "${seed}"),
}


def with_attack(recipe: Recipe, place: str, value: Any) -> str:
    """Return a recipe as JSON, with a value at a dotted key."""
    content = json.loads(recipe.as_json())
    *path, last = place.split(".")
    node = content["config"]
    for part in path:
        node = node[part]
    node[last] = value
    return json.dumps(content)


@pytest.fixture
def recipe(composed: Compose) -> Recipe:
    return Recipe(composed(*SHORT), {"model": "se_cnn", "data": "digits"}, list(SHORT))


@pytest.mark.parametrize("key", ATTACKS)
def test_a_stored_configuration_calls_only_what_files_name(key: str, recipe: Recipe) -> None:
    with pytest.raises(UserError) as refused:
        read_recipe(with_attack(recipe, *ATTACKS[key]), "recipe.json")
    assert refused.value.key == key


def test_a_file_of_one_s_own_allows_its_target_at_its_place_only(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("_target_: os.getpid\n")
    stored = {place: with_attack(recipe, place, {"_target_": "os.getpid"}) for place in ("optimizer", "model")}
    with pytest.raises(UserError):
        read_recipe(stored["optimizer"], "recipe.json")
    paths.typed[paths.CONFIG_DIR] = str(tmp_path)
    assert read_recipe(stored["optimizer"], "recipe.json").settings.optimizer == {"_target_": "os.getpid"}
    with pytest.raises(UserError):
        read_recipe(stored["model"], "recipe.json")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "9" * 5000, "[" * 5000, '{"config": 1, "choices": {}, "overrides": []}',
     '{"config": {}, "choices": {}, "overrides": []}', '{"config": {}, "choices": {"model": ["a"]}, "overrides": []}'],
    ids=range(8),
)  # fmt: skip
def test_a_recipe_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        read_recipe(text, "recipe.json")


@pytest.mark.parametrize("stored", [({"config": CALL},), {"config": CALL}, [CALL], None], ids=["tuple", "dict", "list", "none"])
def test_a_checkpoint_contains_its_recipe_as_text(stored: Any, tmp_path: Path) -> None:
    """`weights_only` lets tuples through, in which Hydra finds targets."""
    values: Any = SimpleNamespace(as_json=lambda: stored)
    checkpoint.save(tmp_path, Checkpoint("0" * 32, values, {}, None, [], {}, 0.0))
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / run_dir.CHECKPOINT)


# Whole commands

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

    def store_sweep(*overrides: str, output_dir: Path = tmp_path / "outputs", sweeper: str = "grid") -> str:
        tags = {"sweep_jobs": "2", "sweeper": sweeper, "grids": json.dumps([overrides]), "output_dir": str(output_dir)}
        tracker = MLflowStore(store, "mnist_exp").start(RunInfo("sweep", "", tags | software()))
        tracker.client.set_terminated(tracker.run_id, "KILLED")
        return tracker.run_id

    return store_sweep


def check_refused(done: Any) -> None:
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr


def test_a_run_that_answers_for_another(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id would become the name of a folder, which `runs delete` removes."""
    opened = MLflowStore(store, "mnist_exp")
    run_id = opened.start(RunInfo("run", "")).run_id
    forged = opened.client.get_run(run_id)
    monkeypatch.setattr(type(forged.info), "run_id", "../../bait")
    monkeypatch.setattr(opened.client, "get_run", lambda _: forged)
    with pytest.raises(UserError):
        opened.get_run(run_id)


@pytest.mark.parametrize("override", ["output_dir={}", "data.root={}", "model={}/evil", "hydra.searchpath=[file://{}]"])
def test_overrides_in_a_sweep(override: str, sweep: Callable[..., str], bait: Path, in_process: CommandLine) -> None:
    unwatched(lambda: sweep(*SHORT, override.format(bait)))
    check_refused(in_process("-m", "sweep.resume=latest", "sweep.force=true"))


def test_the_output_folder_of_a_sweep_is_asked_for(sweep: Callable[..., str], bait: Path, call: Call) -> None:
    unwatched(lambda: sweep(*SHORT, output_dir=bait))
    done = call(main, "-m", "sweep.resume=latest", "sweep.force=true")
    check_refused(done)
    assert f"output_dir={bait}" in done.stderr


@pytest.mark.slow
def test_the_output_folder_of_a_sweep_is_not_followed(sweep: Callable[..., str], bait: Path, in_process: CommandLine) -> None:
    unwatched(lambda: sweep(*SHORT, output_dir=bait))
    assert in_process("-m", "sweep.resume=latest", "sweep.force=true").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("grids", ["[]", "{", '{"jobs": 1}', '[["seed=0"], [1]]', "9" * 5000, "[" * 5000], ids=range(6))
def test_grids_of_another_form(grids: str, sweep: Callable[..., str], store: str, in_process: CommandLine) -> None:
    MlflowClient(store).set_tag(sweep(*SHORT), "grids", grids)
    check_refused(in_process("-m", "sweep.resume=latest"))


@pytest.mark.parametrize("place", ["data.download_root", "+data.root", "output_dir"])
def test_a_stored_grid_names_no_place(
    place: str, sweep: Callable[..., str], store: str, bait: Path, in_process: CommandLine
) -> None:
    grid = json.dumps([["data=mnist", f"{place}={bait}", "seed=0,1"]])
    MlflowClient(store).set_tag(sweep(*SHORT), "grids", grid)
    check_refused(in_process("-m", "sweep.resume=latest"))


@pytest.fixture
def unfinished(composed: Compose, store: str, tmp_path: Path) -> Callable[..., Path]:
    """Store a run before its first step, whose checkpoint has other values, and return its folder."""

    def store_run(make: Callable[[Settings], Recipe] = Recipe, **changes: Any) -> Path:
        recipe = make(composed(*SHORT))
        run_id = MLflowStore(store, "mnist_exp").start(RunInfo("run", "")).run_id
        folder = run_dir.ensure_writable_dir(tmp_path / "outputs" / run_id)
        first = Checkpoint(run_id, recipe, {}, None, [], {}, 0.0)
        checkpoint.save(folder, replace(first, **changes))
        return folder

    return store_run


def test_the_locations_of_a_checkpoint_are_not_followed(
    unfinished: Callable[..., Path], bait: Path, tmp_path: Path, in_process: CommandLine
) -> None:
    def elsewhere(settings: Settings) -> Recipe:
        tracking = settings.tracking | {"uri": f"sqlite:///{bait}/x.db"}
        return Recipe(settings.model_copy(update={"output_dir": bait, "tracking": tracking}))

    unwatched(lambda: unfinished(elsewhere))
    done = in_process("resume=latest")
    assert done.returncode == 0, done.stderr


CHANGES: dict[str, dict[str, Any]] = {
    "run_id": {"run_id": "../../bait"},
    "a phase": {"state": {"phase": "x", "steps": 1, "examples_seen": 1}},
    "no state": {"state": {}},
    "a job": {"recipe": ("sweep_job", {
        "sweep_id": "../../bait", "number": 0, "color": "#000000", "varied": [], "objective": "val/loss", "data": None,
        "in_search": True})},
    "another type": {"seconds": {"train": "x"}},
    "another network": {"state": {"phase": "finetune", "steps": 1, "examples_seen": 1, "model": {}, "optimizer": 1}},
    "a teacher": {"recipe": ("phases.finetune.teacher", {
        "_target_": "mnist_exp.experiment.teachers.ensemble", "_partial_": True, "runs": ["../bait"]})},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGES)
def test_hostile_values_in_a_checkpoint(
    kind: str, recipe: Recipe, unfinished: Callable[..., Path], bait: Path, in_process: CommandLine
) -> None:
    changes = dict(CHANGES[kind])
    if "recipe" in changes:
        text = with_attack(recipe, *changes["recipe"]).replace("BAIT", str(bait))
        changes["recipe"] = SimpleNamespace(as_json=lambda: text)
    unwatched(lambda: unfinished(**changes))
    check_refused(in_process("resume=latest"))


@pytest.mark.slow
def test_a_checkpoint_does_not_say_where_to_download(
    unfinished: Callable[..., Path], bait: Path, mnist_root: Path, in_process: CommandLine
) -> None:
    def elsewhere(settings: Settings) -> Recipe:
        data = LOADER | {"root": None, "finetune_fraction": 0.02, "validation_size": 0, "download_root": str(bait)}
        return Recipe(settings.model_copy(update={"data": data}))

    unwatched(lambda: unfinished(elsewhere))
    done = in_process("resume=latest")
    assert done.returncode == 0, done.stderr


def test_a_hostile_recipe_in_the_store(recipe: Recipe, store: str, in_process: CommandLine) -> None:
    with MLflowStore(store, "mnist_exp").start(RunInfo("run", "")) as tracker:
        tracker.log_text(with_attack(recipe, "model", CALL), "recipe.json")
    done = in_process(f"rerun='{tracker.run_id}'")
    check_refused(done)
    assert "model._target_" in done.stderr


@pytest.mark.parametrize("pid", ["1", "-1", "0", "x", "9" * 30, "2147483646", ""])
@pytest.mark.parametrize("host", ["", "elsewhere"])
def test_the_tags_that_say_who_works_on_a_run(pid: str, host: str, bait: Path, store: str, tmp_path: Path) -> None:
    tags = {"host": host or platform.node(), "pid": pid, "output_dir": str(bait)}
    opened = MLflowStore(store, "mnist_exp")
    run_id = opened.start(RunInfo("hostile", "", tags)).run_id

    def lure() -> None:
        (bait / run_id).mkdir()
        (bait / run_id / run_dir.LOCK).write_text("untouched")

    unwatched(lure)
    opened.reap(tmp_path / "outputs")
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
    check_refused(in_process("-m", "sweep.resume=latest"))


@pytest.mark.slow
def test_the_name_of_the_data_of_a_finished_job(
    sweep: Callable[..., str], store: str, in_process: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is passed on to the other jobs, in whose configuration a resolver could read the environment."""
    monkeypatch.setenv("INNOCENT", "value-of-the-environment")
    parent = sweep(*SHORT)
    tags = {"sweep_id": parent, "job_num": "5", "data": "${oc.env:INNOCENT}", "mlflow.parentRunId": parent}
    with MLflowStore(store, "mnist_exp").start(RunInfo("hostile", "", tags)):
        pass
    done = in_process("-m", f"sweep.resume='{parent}'")
    assert "value-of-the-environment" not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"value-of-the-environment" in path.read_bytes()]


@pytest.mark.slow
def test_the_study_of_a_search(
    sweep: Callable[..., str], bait: Path, mnist_root: Path, tmp_path: Path, in_process: CommandLine
) -> None:
    pytest.importorskip("optuna")
    from mnist_exp.sweep.search import open_study

    search = ("data=mnist_tuning", "optimizer.lr=interval(0.1,0.4)", "model=choice(se_cnn,plain_cnn)")
    parent = sweep(*search, sweeper="Optuna")
    folder = run_dir.ensure_writable_dir(tmp_path / "outputs" / parent)
    resume = ("-m", "hydra/sweeper=optuna", f"sweep.resume='{parent}'", "sweep.force=true")
    for prescribed in ({"optimizer.lr": 1e29}, {"optimizer.lr": f"0.1,output_dir={bait}"}, {"model": f"{bait}/evil"}):
        unwatched(lambda prescribed=prescribed: open_study(folder, 0, "val/accuracy").enqueue_trial(prescribed))
        check_refused(in_process(*resume))
        (folder / "optuna.db").unlink()
    (folder / "optuna.db").write_bytes(b"no database" * 100)
    check_refused(in_process(*resume))
