"""`runs promote`: a model becomes the champion of MLflow's registry, by hand or because a sweep's validation supports it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Call, CommandLine
from mlflow import MlflowClient, register_model

from mnist_exp import runs
from mnist_exp.api import load
from mnist_exp.tracking.mlflow_store import MLflowStore

SHORT = ("data=mnist_tuning", "data.subset=1000", "~phases.finetune", "phases.train.epochs=1")


def versions(store: str) -> list[str]:
    return [str(version.version) for version in MlflowClient(store).search_model_versions()]


def test_a_run_is_promoted_by_hand(call: Call, stored_run: str, store: str) -> None:
    client = MlflowClient(store)
    client.log_metric(stored_run, "test/accuracy", 0.9871)
    for number in (1, 2):
        done = call(runs.main, "promote", "--run", stored_run[:8], "--name", "Mary's digits")
        assert done.returncode == 0, done.stderr
        version = client.get_model_version_by_alias("Mary's digits", "champion")
        assert (version.version, version.run_id) == (number, stored_run)
    for part in ("98.71 %", "mnist", f"](#/experiments/1/runs/{stored_run}"):
        assert part in version.description
    (model,) = client.search_logged_models(["1"])
    for address in ("models:/Mary's digits@champion", "models:/Mary's digits/1", f"models:/{model.model_id}"):
        source = load(address).source
        assert (source.address, source.run_id, source.model_id) == (address, stored_run, model.model_id)
    assert call(runs.main, "promote", "--sweep", "latest", "--name", "mnist").returncode == 1, "there is no sweep"


def test_the_logged_model_names_its_versions_as_after_mlflow_s_own_registration(call: Call, stored_run: str, store: str) -> None:
    client = MlflowClient(store)
    (model,) = client.search_logged_models(["1"])
    assert call(runs.main, "promote", "--run", stored_run, "--name", "ours").returncode == 0
    register_model(f"models:/{model.model_id}", "theirs")
    named = json.loads(client.get_logged_model(model.model_id).tags["mlflow.modelVersions"])
    assert named == [{"name": "ours", "version": 1}, {"name": "theirs", "version": 1}]
    ours, theirs = (client.get_model_version(name, "1") for name in ("ours", "theirs"))
    assert (ours.source, ours.run_id, ours.model_id) == (theirs.source, theirs.run_id, theirs.model_id)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (("--name", "a/b"), "a/b"),
        (("--name", "mnist", "--alias", "v1"), "v1"),
        (("--name", "mnist", "--alias", "Latest"), "Latest"),
        (("--name", "mnist", "--run", "000000"), "--run"),
    ],
)
def test_names_that_mlflow_refuses_are_refused_first(call: Call, store: str, arguments: tuple[str, ...], value: str) -> None:
    done = call(runs.main, "promote", "--sweep", "latest", *arguments)
    assert done.returncode == 2
    assert value in done.stderr
    assert versions(store) == []


def test_a_missing_model_is_refused_before_anything_is_written(call: Call, stored_run: str, store: str) -> None:
    client = MlflowClient(store)
    (model,) = client.search_logged_models(["1"])
    folder = Path(model.artifact_location.removeprefix("file://"))
    for remove in (
        (folder / "weights.pt").unlink,
        lambda: shutil.rmtree(folder),
        lambda: client.delete_logged_model(model.model_id),
    ):
        remove()
        done = call(runs.main, "promote", "--run", stored_run, "--name", "mnist")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
    assert client.search_registered_models() == []


@pytest.mark.slow
def test_a_sweep_decides_by_its_validation_images(
    call: Call, command_line: CommandLine, store: str, mnist_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_ROOT", str(mnist_root.absolute()))

    def sweep(*overrides: str) -> None:
        done = command_line("-m", *SHORT, "seed=0,1,2", *overrides)
        assert done.returncode == 0, done.stderr

    def promote(*options: str) -> subprocess.CompletedProcess[str]:
        return call(runs.main, "promote", "--sweep", "latest", "--name", "mnist", *options)

    client = MlflowClient(store)
    sweep("batch_size=32", "optimizer.lr=0.1,0.0001")  # the second learns next to nothing
    assert promote().returncode == 0
    assert client.get_model_version_by_alias("mnist", "champion").tags["arm"] == "optimizer.lr=0.1"
    assert promote().returncode == 0
    assert versions(store) == ["1"], "no arm is higher than the champion's"

    worst = next(run for run in MLflowStore(store, "mnist_exp").runs() if run.params.get("train.optimizer.lr") == "0.0001")
    call(runs.main, "promote", "--run", worst.run_id, "--name", "mnist")
    assert promote().returncode == 0
    version = client.get_model_version_by_alias("mnist", "champion")
    assert (version.version, version.tags["verdict"]) == (3, "higher")

    sweep("optimizer.lr=0.0001,0.0002", "batch_size=32,64")
    assert promote().returncode == 1, "the champion is no job of this sweep"
    assert client.get_model_version_by_alias("mnist", "champion").version == 3
    assert promote("--alias", "newcomer").returncode == 0
    arm = client.get_model_version_by_alias("mnist", "newcomer").tags["arm"]
    assert re.fullmatch(r"optimizer\.lr=\S+ batch_size=\d+", arm), "a combination"
