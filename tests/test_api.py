"""The commands from Python: only `load` prints, and mistakes raise UserError."""

import shutil
from pathlib import Path

import pytest

from mnist_exp import api, paths
from mnist_exp.errors import UserError
from mnist_exp.experiment.runner import RunResult
from mnist_exp.learning.datasets import load_digits
from mnist_exp.metrics import format_metric
from mnist_exp.tracking.base import RunInfo
from mnist_exp.tracking.mlflow_store import MLflowStore


@pytest.fixture(scope="module")
def uri(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    database = tmp_path_factory.mktemp("api") / "mlflow.db"
    shutil.copyfile(template_database, database)
    return f"sqlite:///{database}"


@pytest.fixture(scope="module")
def trained(uri: str) -> RunResult:
    locations = (f"tracking.uri={uri}", f"output_dir={Path(uri.removeprefix('sqlite:///')).parent}")
    return api.train("data=digits", "~phases.train", "seed=1", *locations)


@pytest.fixture(autouse=True)
def silent(uri: str, trained: RunResult, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    yield
    assert tuple(capfd.readouterr()) == ("", ""), "nothing else is printed"


def test_train_returns_the_run_and_load_its_model(
    uri: str, trained: RunResult, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    record, *_ = MLflowStore(uri, "mnist_exp").runs()
    assert (record.run_id, record.status, record.params["seed"]) == (trained.run_id, "FINISHED", "1")
    assert record.metrics["test/loss"] == trained.metrics["test/loss"]
    assert [seen for seen, metrics in trained.history if "train/loss" in metrics][-1] == 1200
    images = load_digits(0.02, seed=0).splits["test"].images[:5]
    assert "phases.finetune.batch_size=128" in (trained.warning or ""), "ten steps are few"
    for model in ("latest", trained.run_id[:6]):
        assert api.load(model).model(images).allclose(trained.model(images), atol=1e-5)
        assert format_metric("test/accuracy", trained.metrics["test/accuracy"]) in capfd.readouterr().out
    assert not [warning for warning in recwarn if "version_base" not in str(warning.message)]  # which Hydra 1.4 deprecates


def test_load_warns_of_a_model_of_few_images(uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    locations = (f"tracking.uri={uri}", "tracking.experiment=few", f"output_dir={Path(uri.removeprefix('sqlite:///')).parent}")
    run = api.train("data=digits", "~phases.train", "data.subset=100", *locations)
    with pytest.warns(UserWarning, match="limited to 100"):
        api.load(run.run_id)
    capfd.readouterr()


def test_frame_has_a_row_for_each_job(uri: str, trained: RunResult) -> None:
    store = MLflowStore(uri, "sweeps")
    grid = '[["optimizer.lr=0.1,0.2", "seed=0"]]'
    with store.start(RunInfo("sweep", "", {"sweep_jobs": "2", "sweeper": "grid", "grids": grid})) as parent:
        pass
    ids = []
    for number, (rate, accuracy) in enumerate([(0.1, 0.5), (0.2, 0.25)]):
        tags = {"sweep_id": parent.run_id, "job_num": str(number), "data": "digits"}
        tags["overrides"] = f"optimizer.lr={rate} seed=0"
        with store.start(RunInfo("job", "", tags)) as job:
            job.log_metrics({"val/accuracy": accuracy}, 1)
        ids.append(job.run_id)
    table = api.frame(parent.run_id[:8])
    assert table["optimizer.lr"].tolist() == [0.1, 0.2]
    assert table["val/accuracy"].tolist() == [0.5, 0.25]
    assert table["seed"].tolist() == [0, 0]
    assert table["seed"].dtype.kind == "i"
    assert set(table["status"]) == {"FINISHED"}
    assert table["run"].tolist() == ids
    assert set(table["data"]) == {"digits"}
    paths.typed["tracking.experiment"] = "sweeps"
    assert api.frame().equals(table)


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: api.train("model.dropout=2"), "model.dropout"),
        (lambda: api.train("+hue=1"), "hue"),
        (lambda: api.train("optimizer = adam"), "optimizer = adam"),
        (lambda: api.train("optimizer=adamm"), "optimizer"),
        (lambda: api.train("hue=1"), "hue"),
        (lambda: api.train("seed=1,2"), "seed"),
        (lambda: api.train("resume=latest"), "resume=latest"),
        (lambda: api.load("ffffff"), "id"),
        (lambda: api.frame("ffffff"), "id"),
    ],
)
def test_a_mistake_raises_an_error_with_its_key(call, key: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert error.value.key == key
    assert error.value.remedy or error.value.expected
