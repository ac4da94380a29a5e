"""`runs promote`: a model becomes the champion of MLflow's registry, by hand or because a sweep's validation supports it."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Call, CommandLine
from mlflow import MlflowClient

from mnist_exp import runs
from mnist_exp.errors import UserError
from mnist_exp.serving import load
from mnist_exp.tracking import models
from mnist_exp.tracking.mlflow_store import MLflowStore, record_of

SHORT = ("data=mnist_tuning", "data.subset=1000", "~phases.finetune", "phases.train.epochs=1", "batch_size=32")


def versions(store: str) -> list[str]:
    return [str(version.version) for version in MlflowClient(store).search_model_versions()]


def test_a_run_is_promoted_by_hand(call: Call, stored_run: str, store: str) -> None:
    done = call(runs.main, "promote", "--run", stored_run[:8], "--name", "Mary's digits")
    assert done.returncode == 0, done.stderr
    version = MlflowClient(store).get_model_version_by_alias("Mary's digits", "champion")
    assert version.run_id == stored_run
    assert version.tags["promotion"] == "complete"
    assert load("models:/Mary's digits@champion").source.run_id == stored_run
    assert call(runs.main, "promote", "--sweep", "latest", "--name", "mnist").returncode == 1, "there is no sweep"


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


def test_a_champion_that_changes_in_between_stays(call: Call, stored_run: str, store: str) -> None:
    opened = MLflowStore(store, "mnist_exp")
    source = models.verified_model(opened, record_of(opened.get_run(stored_run)))
    models.register(opened, source, "mnist", "champion", "the first", {}, None)
    with pytest.raises(UserError) as error:
        models.register(opened, source, "mnist", "champion", "decided when there was none", {}, None)
    assert "mnist@champion" in str(error.value)
    client = MlflowClient(store)
    assert client.get_model_version_by_alias("mnist", "champion").version == 1
    left = client.get_model_version("mnist", "2")
    assert left.tags["promotion"] == "incomplete"
    assert left.aliases == []


@pytest.mark.slow
def test_a_sweep_decides_by_its_validation_images(
    call: Call, command_line: CommandLine, store: str, mnist_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_ROOT", str(mnist_root.absolute()))

    def sweep(*overrides: str) -> None:
        done = command_line("-m", *SHORT, "seed=0,1,2", *overrides)
        assert done.returncode == 0, done.stderr

    def promote() -> subprocess.CompletedProcess[str]:
        return call(runs.main, "promote", "--sweep", "latest", "--name", "mnist")

    client = MlflowClient(store)
    sweep("optimizer.lr=0.1,0.0001")  # the second learns next to nothing
    assert "The first champion: optimizer.lr=0.1 has the highest mean val/accuracy" in promote().stdout
    first = client.get_model_version_by_alias("mnist", "champion")
    assert first.tags["arm"] == "optimizer.lr=0.1"
    assert "The champion stays: no arm has a higher mean val/accuracy than optimizer.lr=0.1" in promote().stdout

    sweep("optimizer.lr=0.0001,0.0002")
    refused = promote()
    assert refused.returncode == 1
    explanation, extend = refused.stderr.strip().rsplit("\n", 1)
    assert "The champion's arm, optimizer.lr=0.1, is not in sweep" in explanation
    done = subprocess.run(shlex.split(extend), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The champion stays" in promote().stdout

    sweep("optimizer.lr=0.0001,0.1", "phases.train.epochs=2")
    refused = promote()
    assert refused.returncode == 1
    assert "differs from the runs of sweep" in refused.stderr
    assert "train.epochs (1 and 2)" in refused.stderr
    assert versions(store) == ["1"]

    call(runs.main, "promote", "--run", worst_run(store), "--name", "mnist")
    sweep("optimizer.lr=0.0001,0.1")
    done = promote()
    assert "higher by more than the margin" in done.stdout, done.stdout + done.stderr
    version = client.get_model_version_by_alias("mnist", "champion")
    assert version.version == 3
    assert version.tags["verdict"] == "higher"
    assert version.tags["against"] == "optimizer.lr=0.0001"
    assert version.tags["interval"].removesuffix(" points") in version.description


def worst_run(store: str) -> str:
    """The id of a run of one epoch with the smallest learning rate."""
    found = MLflowStore(store, "mnist_exp").runs()
    return next(
        run.run_id for run in found if run.params.get("train.optimizer.lr") == "0.0001" and run.params["train.epochs"] == "1"
    )
