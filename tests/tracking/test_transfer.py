"""A sweep moves from one store to another, and back into what the commands read; folders of others are checked first."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.compare import make_sweep
from conftest import CommandLine
from mlflow import MlflowClient

from mnist_exp.errors import UserError
from mnist_exp.storage.manifest import MANIFEST, write_manifest
from mnist_exp.tracking import frame, transfer
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.model_export import download_model, verify_model
from mnist_exp.tracking.tags import DESCRIPTION, HOST, OUTPUT_DIR, PARENT, PID


@pytest.fixture
def other(template_database: Path, tmp_path: Path) -> MLflowStore:
    """Another, empty store."""
    (tmp_path / "other").mkdir()
    shutil.copyfile(template_database, tmp_path / "other" / "mlflow.db")
    return MLflowStore(f"sqlite:///{tmp_path}/other/mlflow.db", "mnist_exp")


@pytest.fixture
def folder_of_sweep(store: str, tmp_path: Path) -> Path:
    """The folder of a synthetic sweep of four runs."""
    sweep = make_sweep(store, ("se_cnn", "plain_cnn"), seeds=2)
    assert transfer.export_sweep(MLflowStore(store, "mnist_exp"), sweep, tmp_path / "FOLDER") == 4
    return tmp_path / "FOLDER"


def test_a_moved_sweep_reads_like_the_original(folder_of_sweep: Path, store: str, other: MLflowStore) -> None:
    sweep_id, count = transfer.import_sweep(other, folder_of_sweep)
    assert count == 5
    moved, original = frame(sweep_id, uri=other.uri), frame(uri=store)
    assert moved.drop(columns="run").equals(original.drop(columns="run"))
    assert not set(moved["run"]) & set(original["run"])
    parent, definition = other.find_sweep("latest", finished_too=True)
    assert parent.run_id == sweep_id
    assert len(definition.jobs) == 4
    for old, new in zip(original["run"], moved["run"], strict=True):
        run, before = other.client.get_run(new), MlflowClient(store).get_run(old)
        assert run.data.tags["imported.run_id"] == old
        assert run.data.tags["imported.by"]
        assert run.info.start_time == before.info.start_time
        assert not run.data.tags.keys() & {HOST, PID, OUTPUT_DIR}
        assert run.inputs.dataset_inputs[0].dataset.digest == before.inputs.dataset_inputs[0].dataset.digest
        histories = [
            client.get_metric_history(i, "train/loss") for client, i in ((other.client, new), (MlflowClient(store), old))
        ]
        assert len({tuple((p.step, p.value, p.timestamp) for p in history) for history in histories}) == 1
    text = other.client.get_run(sweep_id).data.tags[DESCRIPTION]
    assert not any(old in text for old in original["run"])
    assert f"curves-{sweep_id[:8]}" in text


def test_importing_twice_adds_nothing(folder_of_sweep: Path, other: MLflowStore) -> None:
    sweep_id, _ = transfer.import_sweep(other, folder_of_sweep)
    assert transfer.import_sweep(other, folder_of_sweep) == (sweep_id, 0)
    assert len(other.runs()) == 5


def test_an_interrupted_import_is_completed(folder_of_sweep: Path, other: MLflowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    other.open()
    log, calls = other.client.log_batch, []

    def fail(*values: object, **options: object) -> None:
        calls.append(values)
        if len(calls) > 7:
            raise OSError("the disk is full")
        log(*values, **options)

    monkeypatch.setattr(other.client, "log_batch", fail)
    with pytest.raises(UserError, match="adds only what is missing"):
        transfer.import_sweep(other, folder_of_sweep)
    monkeypatch.undo()
    sweep_id, count = transfer.import_sweep(other, folder_of_sweep)
    assert 0 < count < 5
    children = other.children(sweep_id)
    text = other.client.get_run(sweep_id).data.tags[DESCRIPTION]
    assert sum(child.run_id in text for child in children) >= 1, "its links lead to the new runs"
    assert not any(child.tags["imported.run_id"] in text for child in children)
    assert len(other.runs()) == 5
    assert {record.status for record in other.runs()} == {"FINISHED"}


def test_a_sweep_that_was_extended_since_is_refused(folder_of_sweep: Path, other: MLflowStore) -> None:
    transfer.import_sweep(other, folder_of_sweep)
    _edit(_parent(folder_of_sweep) / "artifacts" / "sweep.json", lambda definition: definition.update(total=5))
    _sign(folder_of_sweep)
    with pytest.raises(UserError, match="before it was extended"):
        transfer.import_sweep(other, folder_of_sweep)


def test_an_existing_folder_is_not_touched(folder_of_sweep: Path, store: str) -> None:
    with pytest.raises(UserError, match="exists already"):
        transfer.export_sweep(MLflowStore(store, "mnist_exp"), "latest", folder_of_sweep)


def _edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _sign(folder: Path) -> None:
    """Write fitting checksums, as an attacker can."""
    config = json.loads((folder / MANIFEST).read_text())["config"]
    (folder / MANIFEST).unlink()
    write_manifest(folder, config)


def _a_run(folder: Path) -> Path:
    sweep = json.loads((folder / MANIFEST).read_text())["config"]["sweep"]
    return next(path for path in sorted(folder.iterdir()) if path.is_dir() and path.name != sweep)


def _link(folder: Path) -> None:
    (_a_run(folder) / "artifacts" / "link").symlink_to("/etc/hostname")


def _other_sweep(folder: Path) -> None:
    _edit(_a_run(folder) / "run.json", lambda run: run["tags"].update(sweep_id="f" * 32))


def _other_id(folder: Path) -> None:
    _edit(_a_run(folder) / "run.json", lambda run: run.update(run_id="../../x"))


def _foreign_name(folder: Path) -> None:
    _a_run(folder).rename(folder / "not-an-id")


def _running(folder: Path) -> None:
    _edit(_a_run(folder) / "run.json", lambda run: run.update(status="RUNNING"))


def _parent(folder: Path) -> Path:
    return folder / json.loads((folder / MANIFEST).read_text())["config"]["sweep"]


def _parent_in_another_sweep(folder: Path) -> None:
    _edit(_parent(folder) / "run.json", lambda run: run["tags"].update(sweep_id="f" * 32, job_num="0"))


def _another_parent(folder: Path) -> None:
    _edit(_a_run(folder) / "run.json", lambda run: run["tags"].update({PARENT: "f" * 32}))


def _unknown_job(folder: Path) -> None:
    _edit(_a_run(folder) / "run.json", lambda run: run["tags"].update(job_num="99"))


def _late(folder: Path) -> None:
    _edit(_a_run(folder) / "run.json", lambda run: run.update(started=10**30))


def _dataset_without_a_name(folder: Path) -> None:
    _edit(_a_run(folder) / "run.json", lambda run: run["datasets"][0].pop("name"))


def _name_that_mlflow_refuses(folder: Path) -> None:
    _edit(_a_run(folder) / "run.json", lambda run: run["params"].update({"<b>": "x"}))


def _override(folder: Path) -> None:
    sweep = json.loads((folder / MANIFEST).read_text())["config"]["sweep"]
    change = {"overrides": ["hydra.sweep.dir=/tmp/x"]}
    _edit(folder / sweep / "artifacts" / "sweep.json", lambda definition: definition["jobs"][0].update(change))


def _model_with_code(folder: Path) -> None:
    run = _a_run(folder)
    (run / "model").mkdir()
    (run / "model" / "MLmodel").write_text("flavors: {python_function: {code: code}}")
    _edit(run / "run.json", lambda content: content.update(model="se_cnn-mnist"))


@pytest.mark.parametrize(
    "attack",
    [
        _link,
        _other_sweep,
        _other_id,
        _foreign_name,
        _running,
        _override,
        _model_with_code,
        _parent_in_another_sweep,
        _another_parent,
        _unknown_job,
        _late,
        _dataset_without_a_name,
        _name_that_mlflow_refuses,
    ],
)
def test_a_hostile_folder_is_refused_before_anything_is_recorded(
    attack: Callable[[Path], None], folder_of_sweep: Path, other: MLflowStore
) -> None:
    attack(folder_of_sweep)
    _sign(folder_of_sweep)
    with pytest.raises(UserError):
        transfer.import_sweep(other, folder_of_sweep)
    other.open()
    assert other.runs() == []


def test_a_damaged_folder_is_refused(folder_of_sweep: Path, other: MLflowStore) -> None:
    (_a_run(folder_of_sweep) / "run.json").write_text("{}")
    with pytest.raises(UserError, match="was changed"):
        transfer.import_sweep(other, folder_of_sweep)


@pytest.mark.slow
def test_a_real_sweep_moves_with_its_models(command_line: CommandLine, store: str, tmp_path: Path, other: MLflowStore) -> None:
    assert command_line("-m", "data=digits", "~phases.train", "seed=0,1").returncode == 0
    folder = str(tmp_path / "FOLDER")
    for words in (["export", "latest", folder], ["import", folder], ["import", folder]):
        uri = store if words[0] == "export" else other.uri
        command = [sys.executable, "-m", "mnist_exp.runs", *words]
        done = subprocess.run(command, env=os.environ | {"MLFLOW_TRACKING_URI": uri}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "nothing added" in done.stdout
    other.open()
    (best, *_) = other.client.search_logged_models([other.experiment_id], order_by=[{"field_name": "metrics.test/accuracy"}])
    assert best.name == "se_cnn-digits"
    assert {metric.key for metric in best.metrics} >= {"test/accuracy", "model/parameters"}
    assert verify_model(download_model(f"models:/{best.model_id}"))["model"]
    table = frame(uri=other.uri)
    assert table.drop(columns="run").equals(frame(uri=store).drop(columns="run"))
