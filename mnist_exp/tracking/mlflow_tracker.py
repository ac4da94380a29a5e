"""Writes one run into an MLflow store. Records wait while the store is unreachable: no training ends because of it."""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow import MlflowClient, entities
from mlflow.data.schema import TensorDatasetSchema
from mlflow.types import Schema, TensorSpec
from torch import nn

from mnist_exp.learning.data import Dataset
from mnist_exp.settings import Settings
from mnist_exp.signals import defer_signals
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import DeniedError, StoreLostError, Tracker
from mnist_exp.tracking.connection import is_refusal, restore_command, retry, terminate
from mnist_exp.tracking.mlflow_models import write_mlmodel
from mnist_exp.tracking.views import model_name, run_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The context of the data set that metrics are measured on, by the first part of their names.
MEASURED_ON = {"test": "test", "val": "validation", "evaluate": "evaluate"}
RETRY_AFTER = 10.0  # seconds between two attempts to reach a store that is unreachable


class Outbox:
    """Operations on a store, sent in order. Those that fail stay."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._next_attempt = 0.0

    def add(self, operation: Callable[[], object]) -> None:
        """Append an operation and send all, at once or, while the store is unreachable, every `RETRY_AFTER` seconds."""
        self._waiting.append(operation)
        if time.monotonic() >= self._next_attempt:
            try:
                self.send()
            except Exception:  # servers, databases and disks raise exceptions of their own
                self._next_attempt = time.monotonic() + RETRY_AFTER

    def send(self) -> None:
        """Send all operations; raises the error of the first that fails."""
        while self._waiting:
            with defer_signals():
                self._waiting[0]()
                self._waiting.popleft()


class MLflowTracker(Tracker):
    """A run in an MLflow store.

    Args:
        client: Of the store.
        uri: The address of the store, for messages.
        run: The run as stored. A resumed run sends the metrics again that it already has; they are skipped.
        patience: Seconds to wait, at the end, for a store that is unreachable.
    """

    is_recording = True

    def __init__(self, client: MlflowClient, uri: str, run: entities.Run, patience: float) -> None:
        self.client, self.uri, self.patience = client, uri, patience
        super().__init__(run.info.run_id)
        self.experiment_id = run.info.experiment_id
        histories = {key: client.get_metric_history(self.run_id, key) for key in run.data.metrics}
        self._logged = {(key, point.step): point for key, points in histories.items() for point in points}
        self._datasets = {item.dataset.name for item in run.inputs.dataset_inputs} if run.inputs else set()
        self._contexts: dict[str, tuple[str, str]] = {}  # name and digest of the data that a part of the metrics was measured on
        self._params = set(run.data.params)
        self._model_id: str | None = None
        self._metrics: list[Any] = []  # since the last flush
        self._outbox = Outbox()

    def end(self, status: str) -> None:
        self.flush()
        self._outbox.add(partial(terminate, self.client, self.run_id, status))
        try:
            retry(self._outbox.send, self.uri, self.patience)
        except StoreLostError as lost:
            advice = "Nothing is lost: the files on the disk are kept."
            if is_refusal(lost.__cause__) and not isinstance(lost, DeniedError):
                restore = restore_command(self.client, self.uri, self.experiment_id, self.run_id)
                advice = f"The files on the disk are kept. If the run was deleted, restore it with `{restore}`."
            raise StoreLostError(f"Run {self.run_id}: {lost}\n{advice}") from lost

    def artifact_page(self, path: str) -> str:
        return run_path(self.experiment_id, self.run_id, path).removeprefix("/")

    def _send(self, method: str, *values: object, **named: object) -> None:
        """Add a call of the client for this run."""
        self._outbox.add(partial(getattr(self.client, method), self.run_id, *values, **named))

    def log_params(self, params: Mapping[str, object]) -> None:
        # MLflow refuses a second value, which a run that is resumed on another device has.
        new = [entities.Param(key, str(value)) for key, value in params.items() if key not in self._params]
        self._params |= params.keys()
        self._send("log_batch", params=new)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._send("log_batch", tags=[entities.RunTag(key, value) for key, value in tags.items()])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        for key, value in metrics.items():
            if (key, step) not in self._logged:
                self._logged[key, step] = entities.Metric(key, value, now, step)
                self._metrics.append(self._logged[key, step])

    def use_model(self, model_id: str) -> None:
        self._model_id = model_id
        self._send("log_inputs", models=[entities.LoggedModelInput(model_id)])

    def log_results(self, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        # The UI compares runs by bars where every run has one value, at step 0, and draws lonely points otherwise.
        points = [
            old if (old := self._logged.get((key, 0))) and old.value == value else entities.Metric(key, value, now, 0)
            for key, value in metrics.items()
        ]
        last = {key: point for (key, step), point in sorted(self._logged.items()) if key.startswith("val/")}
        linked = (*points, *last.values())
        self.flush()
        self._outbox.add(lambda: self.client.log_batch(self.run_id, [self._linked(point) for point in linked]))

    def _linked(self, point: Any) -> Any:
        """Return a metric with the model and the data set that it belongs to; the run keeps each point once."""
        name, digest = self._contexts.get(MEASURED_ON.get(point.key.partition("/")[0], ""), (None, None))
        links = {"model_id": self._model_id, "dataset_name": name, "dataset_digest": digest, "run_id": self.run_id}
        return entities.Metric(point.key, point.value, point.timestamp, point.step, **links)

    def flush(self) -> None:
        # The store treats a point that it has, with the same millisecond, as the same point: metrics may be sent twice.
        metrics, self._metrics = self._metrics, []
        self._send("log_batch", metrics)

    def log_text(self, text: str, path: str) -> None:
        self._send("log_text", text, path)

    def log_file(self, file: Path) -> None:
        self._send("log_artifact", str(file))

    def log_figure(self, figure: "Figure", path: str) -> None:
        figure.patch.set(edgecolor="0.8", linewidth=2)  # a border on a dark page
        # Stronger compression takes longer than drawing.
        self._send("log_figure", figure, path, save_kwargs={"dpi": 150, "pil_kwargs": {"compress_level": 1}})

    def log_dataset(self, data: Dataset, split: str, context: str) -> None:
        name, part = f"{data.name}-{split}", data.splits[split]
        self._contexts[context] = name, part.digest
        if name in self._datasets:  # MLflow may refuse to record one twice
            return
        self._datasets.add(name)
        images = Schema([TensorSpec(np.dtype(np.uint8), (-1, *part.images.shape[1:]))])
        labels = Schema([TensorSpec(np.dtype(np.int64), (-1,))])
        entity = entities.Dataset(
            name=name,
            digest=part.digest,
            source_type="local",
            source=json.dumps({"uri": data.source}),
            schema=json.dumps(TensorDatasetSchema(images, labels).to_dict()),
            profile=json.dumps({"num_rows": len(part), "epoch_size": part.epoch_size}),
        )
        self._send("log_inputs", [entities.DatasetInput(entity, [entities.InputTag(tag.DATASET_CONTEXT, context)])])

    def log_model(self, name: str, model: nn.Module, settings: Settings, metrics: Mapping[str, float], folder: Path) -> None:
        super().log_model(name, model, settings, metrics, folder)
        write_mlmodel(folder, settings)
        self._outbox.add(lambda: self._log_model(folder, model_name(name)))

    def _log_model(self, folder: Path, name: str) -> None:
        """Record the model in `folder`; continue a record that an earlier, interrupted attempt has left."""
        run = self.client.get_run(self.run_id)
        stored = self.client.search_logged_models([self.experiment_id], f"source_run_id='{self.run_id}'")
        model = next(iter(stored), None) or self.client.create_logged_model(
            self.experiment_id, name, self.run_id, params=run.data.params
        )
        self._model_id = model.model_id
        if model.status == entities.LoggedModelStatus.READY:
            return
        if not run.outputs or model.model_id not in {output.model_id for output in run.outputs.model_outputs}:
            self.client.log_outputs(self.run_id, [entities.LoggedModelOutput(model.model_id, step=0)])
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, entities.LoggedModelStatus.READY)
