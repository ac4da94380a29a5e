import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import MNIST, Compose, one_split
from mlflow import MlflowClient
from mlflow.data import from_numpy
from torch import nn

from mnist_exp.errors import UserError
from mnist_exp.tracking.base import RunInfo
from mnist_exp.tracking.connection import connect
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.mlflow_tracker import MLflowTracker
from mnist_exp.tracking.tags import DESCRIPTION
from mnist_exp.tracking.views import VIEW_PREFIX, fixed_views


def status(tracker: MLflowTracker) -> str:
    return MlflowClient(tracker.uri).get_run(tracker.run_id).info.status


def test_a_run_is_finished_only_if_it_finished(store: str) -> None:
    with MLflowStore(store, "test").start(RunInfo("name", "", {"tag": "value"})) as tracker:
        assert status(tracker) == "RUNNING"
    run = MlflowClient(store).get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name, run.data.tags["tag"]) == ("FINISHED", "name", "value")


@pytest.mark.parametrize(("error", "expected"), [(ValueError("broken <b>"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_an_exception_ends_the_run_truly_and_keeps_what_was_held_back(
    store: str, error: BaseException, expected: str, tmp_path: Path
) -> None:
    tracker = MLflowStore(store, "test").start(RunInfo("name", ""))

    def fail() -> None:
        with tracker:
            tracker.log_metrics({"train/loss": 1.5}, step=100)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert status(tracker) == expected
    assert tracker.client.get_metric_history(tracker.run_id, "train/loss")[0].step == 100
    text = Path(tracker.client.download_artifacts(tracker.run_id, "traceback.txt", str(tmp_path))).read_text()
    assert type(error).__name__ in text
    assert "raise error" in text


def test_two_thousand_metrics_arrive_once_each(store: str) -> None:
    with MLflowStore(store, "test").start(RunInfo("name", "")) as tracker:
        for step in range(2_000):
            tracker.log_metrics({"value": step}, step)
            tracker.log_metrics({"value": -1}, step)
        tracker.flush()
        tracker.flush()
    assert [point.value for point in tracker.client.get_metric_history(tracker.run_id, "value")] == list(range(2_000))


def test_the_store_is_opened_once_and_artifacts_lie_beside_it(store: str, tmp_path: Path) -> None:
    client, first = connect(store, "test")
    assert connect(store, "test")[1] == first
    assert client.get_experiment(first).artifact_location == (tmp_path / "mlartifacts").as_uri()


def test_an_experiment_gets_its_views_and_its_description(store: str) -> None:
    client, experiment_id = connect(store, "test")
    tags = client.get_experiment(experiment_id).tags
    assert {VIEW_PREFIX + key for key in fixed_views()} | {DESCRIPTION} <= tags.keys()
    client.set_experiment_tag(experiment_id, DESCRIPTION, "mine")
    connect(store, "test")
    assert client.get_experiment(experiment_id).tags[DESCRIPTION] == "mine"


def test_final_metrics_are_linked_to_the_model_and_recorded_once(store: str, tmp_path: Path, composed: Compose) -> None:
    settings = composed().model_copy(update={"data_description": MNIST})
    with MLflowStore(store, "test").start(RunInfo("name", "")) as tracker:
        tracker.log_dataset(one_split(split="finetune", digest="cd34"), "finetune", "validation")
        tracker.log_dataset(one_split(), "test", "test")
        for step in (10, 20):
            tracker.log_metrics({"val/accuracy": step / 100, "train/loss": 1.0}, step)
        tracker.log_model("my/cnn: 1-mnist", nn.Identity(), settings, {}, tmp_path / "model")
        tracker.log_results({"test/accuracy": 0.5, "model/parameters": 7})
    client = MlflowClient(store)
    (model,) = client.search_logged_models([tracker.experiment_id])
    found = {metric.key: (metric.value, metric.dataset_name, metric.dataset_digest) for metric in model.metrics}
    assert found == {
        "val/accuracy": (0.2, "mnist-finetune", "cd34"),
        "test/accuracy": (0.5, "mnist-test", "ab12"),
        "model/parameters": (7, None, None),
    }
    assert model.name == "my-cnn-1-mnist"
    assert [point.step for point in client.get_metric_history(tracker.run_id, "val/accuracy")] == [10, 20]
    assert [point.step for point in client.get_metric_history(tracker.run_id, "test/accuracy")] == [0]


def test_a_data_set_has_the_schema_of_an_array(store: str) -> None:
    with MLflowStore(store, "test").start(RunInfo("name", "")) as tracker:
        tracker.log_dataset(one_split(shape=(3, 8, 8)), "test", "test")
    (stored,) = MlflowClient(store).get_run(tracker.run_id).inputs.dataset_inputs
    images, labels = np.zeros((2, 3, 8, 8), np.uint8), np.zeros(2, np.int64)
    assert json.loads(stored.dataset.schema) == from_numpy(images, targets=labels).schema.to_dict()


def test_the_run_that_mlflow_run_made_is_used(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client, experiment_id = connect(store, "test")
    made = client.create_run(experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    with MLflowStore(store, "test").start(RunInfo("name", "")) as tracker:
        assert tracker.run_id == made
    assert "MLFLOW_RUN_ID" not in os.environ, "the next run of this process must not share it"
    assert MlflowClient(store).get_run(made).info.run_name == "name"


@pytest.mark.parametrize("uri", ["file:./mlruns", "postgres", "", "ftp://host"])
def test_a_store_of_another_kind_is_refused(uri: str) -> None:
    with pytest.raises(UserError) as error:
        MLflowStore(uri, "test")
    assert (error.value.key, error.value.value) == ("uri", uri)


def test_a_store_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database, but long enough to be looked at" * 10)
    for uri in ("sqlite:////proc/nowhere/mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"):
        with pytest.raises(UserError) as error:
            MLflowStore(uri, "test").open()
        assert uri in str(error.value)


def test_a_database_of_an_older_mlflow_is_answered_with_how_to_upgrade_it(store: str, tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '5b0e9adcef9c'")  # of MLflow 2.5
        connection.commit()
    with pytest.raises(UserError) as refused:
        connect(store, "test")
    assert f"`cp {database} {database}.backup && mlflow db upgrade {store}`" in str(refused.value)


def test_a_resumed_run_loses_the_error_of_its_earlier_end(store: str) -> None:
    def stop(tracker: MLflowTracker) -> None:
        with tracker:
            raise KeyboardInterrupt("Stopped by SIGINT.")

    tracker = MLflowStore(store, "test").start(RunInfo("name", ""))
    with pytest.raises(KeyboardInterrupt):
        stop(tracker)
    assert MlflowClient(store).get_run(tracker.run_id).data.tags["error"] == "Stopped by SIGINT."
    with MLflowStore(store, "test").start(RunInfo("name", ""), tracker.run_id):
        pass
    run = MlflowClient(store).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert "error" not in run.data.tags


def test_a_deleted_experiment_is_named_with_the_remedy(store: str) -> None:
    client, experiment_id = connect(store, "test")
    client.delete_experiment(experiment_id)
    with pytest.raises(UserError, match=rf"mlflow experiments restore --experiment-id {experiment_id}"):
        connect(store, "test")


@pytest.mark.parametrize("elsewhere", ["another experiment", "another store"])
def test_a_run_that_mlflow_run_made_elsewhere_is_left_alone(store: str, monkeypatch: pytest.MonkeyPatch, elsewhere: str) -> None:
    made = MlflowClient(store).create_run("0").info.run_id if elsewhere == "another experiment" else "0" * 32
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    with MLflowStore(store, "test").start(RunInfo("name", "")) as tracker:
        assert tracker.run_id != made


def test_a_run_id_that_could_leave_the_output_folder_is_refused(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = MLflowStore(store, "test")
    opened.open()
    run = opened.client.create_run(opened.experiment_id)
    run.info._run_id = "../outside"
    monkeypatch.setattr(type(opened.client), "create_run", lambda *_, **__: run)
    with pytest.raises(UserError):
        opened.start(RunInfo("name", ""))
