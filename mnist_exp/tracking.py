"""Where a run is recorded: in MLflow, or nowhere. The only module that imports mlflow, and only once it is needed."""

import base64
import copy
import json
import os
import shlex
import time
import traceback
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit
from uuid import uuid4

from filelock import FileLock

from mnist_exp import ROOT
from mnist_exp.data import SIDE, Dataset
from mnist_exp.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from torch import nn

LEADERBOARD = "leaderboard"
LEADERBOARD_COLUMNS = (
    "metrics.`test/accuracy`",
    "metrics.`test/loss`",
    "metrics.`model/parameters`",
    "tags.`overrides`",
)
BATCH_LIMIT = 1000  # of metrics in one MLflow request


class NoTracker:
    """Records nothing: the interface of a tracker, and `tracking=none`.

    `with tracker.start(name, tags):` spans the run; leaving it tells how the run ended.
    """

    run_id: str

    def start(self, name: str, tags: Mapping[str, str]) -> Self:
        """Begin the run called `name`."""
        self.run_id = uuid4().hex
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the run: FINISHED without an error, KILLED by a KeyboardInterrupt, else FAILED."""

    def params(self, params: Mapping[str, object]) -> None:
        """Record what the run was configured with."""

    def tags(self, tags: Mapping[str, str]) -> None:
        """Record tags; a later value replaces an earlier one."""

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at `step`, examples seen; they may be held back until `flush`."""

    def flush(self) -> None:
        """Send what was held back."""

    def text(self, text: str, path: str) -> None:
        """Record `text` as the artifact `path`."""

    def figure(self, figure: "Figure", path: str) -> None:
        """Record a picture as the artifact `path`."""

    def file(self, file: Path) -> None:
        """Record a file as an artifact of its own name."""

    def dataset(self, data: Dataset, split: str, context: str) -> None:
        """Record that `split` was used for `context` (training, fine-tuning, test, ...)."""

    def model(self, model: "nn.Module", example: Any) -> None:
        """Record the model, ready to be served; example: an input array of two images."""

    def how_to_open(self) -> str | None:
        """Return the command or address that opens the run in the UI."""
        return None


class MLflowTracker(NoTracker):
    """Records the run in the MLflow store at `uri`, in `experiment`; both are created where they are missing.

    uri: sqlite:///path of a database file, or http(s):// of a tracking server.
    Raises UserError from `start` where the store cannot be opened.
    """

    client: "MlflowClient"

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = absolute_uri(uri)
        self.experiment = experiment
        self._held_back: list[Any] = []

    def start(self, name: str, tags: Mapping[str, str]) -> Self:
        self.client, self.experiment_id = open_store(self.uri, self.experiment)
        adopted = os.environ.pop("MLFLOW_RUN_ID", None)  # set by `mlflow run`, which has made a run for this process
        if adopted:
            run = self.client.get_run(adopted)
            self.run_id, self.experiment_id = adopted, run.info.experiment_id
            self.client.update_run(adopted, name=name)
            self.tags(tags)
        else:
            self.run_id = self.client.create_run(self.experiment_id, run_name=name, tags=dict(tags)).info.run_id
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        try:
            self.flush()
            if error is not None:
                self.text("".join(traceback.format_exception(error)), "traceback.txt")
        finally:
            self.client.set_terminated(self.run_id, status)

    def params(self, params: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        self.client.log_batch(self.run_id, params=[Param(key, str(value)) for key, value in params.items()])

    def tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._held_back += [Metric(key, value, now, step) for key, value in metrics.items()]

    def flush(self) -> None:
        while self._held_back:
            self.client.log_batch(self.run_id, metrics=self._held_back[:BATCH_LIMIT])
            del self._held_back[:BATCH_LIMIT]

    def text(self, text: str, path: str) -> None:
        self.client.log_text(self.run_id, text, path)

    def figure(self, figure: "Figure", path: str) -> None:
        self.client.log_figure(self.run_id, figure, path, save_kwargs={"dpi": 110})

    def file(self, file: Path) -> None:
        self.client.log_artifact(self.run_id, str(file))

    def dataset(self, data: Dataset, split: str, context: str) -> None:
        from mlflow.entities import Dataset as DatasetEntity
        from mlflow.entities import DatasetInput, InputTag

        part = data.splits[split]
        schema = {"images": f"uint8 (n, 1, {SIDE}, {SIDE})", "labels": "int64 (n,)"}
        entity = DatasetEntity(
            name=f"{data.name}-{split}",
            digest=part.digest,
            source_type="local",
            source=json.dumps({"uri": data.source}),
            schema=json.dumps(schema),
            profile=json.dumps({"num_rows": len(part), "epoch_size": part.epoch_size}),
        )
        self.client.log_inputs(self.run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])

    def model(self, model: "nn.Module", example: Any) -> None:
        import mlflow.pytorch
        import numpy as np
        import torch
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema, TensorSpec

        mlflow.set_experiment(experiment_id=self.experiment_id)
        Model.log(
            artifact_path=None,
            flavor=mlflow.pytorch,
            name="model",
            run_id=self.run_id,
            # torch.export warns of every weight that is laid out channels_last
            pytorch_model=copy.deepcopy(model).to(memory_format=torch.contiguous_format),
            input_example=example,
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, 1, SIDE, SIDE))]),
                outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 10))]),
            ),
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
        )

    def how_to_open(self) -> str:
        if self.uri.startswith("http"):
            return f"{self.uri}{run_path(self.client, self.run_id)}"
        store = "" if self.uri == f"sqlite:///{ROOT / 'mlflow.db'}" else f"MLFLOW_TRACKING_URI={shlex.quote(self.uri)} "
        return f"{store}{os.path.relpath(ROOT / 'scripts' / 'ui')} {self.run_id}"


def absolute_uri(uri: str) -> str:
    """Return `uri` with a relative SQLite path made absolute; raises UserError on a scheme that is not supported."""
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    if urlsplit(uri).scheme in ("http", "https"):
        return uri.rstrip("/")
    raise UserError(
        f"tracking.uri={uri} (MLFLOW_TRACKING_URI) is not supported: allowed are sqlite:////absolute/path.db and "
        "http(s)://host:port of an MLflow server. Unset MLFLOW_TRACKING_URI for the default, or use tracking=none."
    )


def open_store(uri: str, experiment: str) -> tuple["MlflowClient", str]:
    """Return a client of the store at `uri` and the id of `experiment`, creating database and experiment if missing.

    A lock file beside a SQLite database keeps several first runs from creating it at once. Raises UserError.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default of 7 waits four minutes for a dead server
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        if not uri.startswith("sqlite:"):
            return _open_experiment(mlflow, uri, experiment, artifact_location=None)
        database = Path(uri.removeprefix("sqlite:///"))
        with FileLock(f"{database}.lock"):
            return _open_experiment(mlflow, uri, experiment, (database.parent / "mlartifacts").as_uri())
    except UserError:
        raise
    except (MlflowException, SQLAlchemyError, OSError, ValueError) as error:
        raise UserError(
            f"tracking.uri={uri} (MLFLOW_TRACKING_URI) cannot be opened: {str(error).splitlines()[0]}\n"
            "Allowed are a SQLite file in a folder that can be written, and a tracking server that answers. "
            "Start the server, name another store, or use tracking=none."
        ) from error


def _open_experiment(mlflow: Any, uri: str, experiment: str, artifact_location: str | None) -> tuple["MlflowClient", str]:
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        experiment_id = client.create_experiment(experiment, artifact_location)
    elif found.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment={experiment} was deleted in {uri}. Restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or name another."
        )
    else:
        experiment_id = found.experiment_id
    if found is None or f"mlflow.sharedViewState.{LEADERBOARD}" not in found.tags:
        client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{LEADERBOARD}", leaderboard_view())
    return client, experiment_id


def leaderboard_view() -> str:
    """Return the saved view of the run table that `leaderboard_path` opens, in the UI's own (undocumented) form."""
    state = {
        "selectedColumns": LEADERBOARD_COLUMNS,
        "orderByKey": LEADERBOARD_COLUMNS[0],
        "orderByAsc": False,
        "searchFilter": "",
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    now = int(time.time() * 1000)
    return json.dumps({"name": "Leaderboard", "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"})


def leaderboard_path(experiment_id: str) -> str:
    """Return the part of a UI address that opens the experiment's runs with the leaderboard's columns."""
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={LEADERBOARD}"


def run_path(client: "MlflowClient", run_id: str) -> str:
    """Return the part of a UI address that opens the run; raises UserError where the store has none of that id."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise UserError(f"There is no run {run_id} in {client.tracking_uri}: MLFLOW_TRACKING_URI names the store.") from error
    return f"/#/experiments/{run.info.experiment_id}/runs/{run_id}?workflowType=machine_learning"
