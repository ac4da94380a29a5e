"""Trained models: save, load, find and register them.

A model is a folder of three files: the weights; the node of the model and the description of its data; and an `MLmodel`, through
which MLflow's own loader and server call `_load_pyfunc`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import numpy as np
import torch
import yaml
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import add_to_model
from mlflow.types import Schema, TensorSpec
from numpy.typing import NDArray
from torch import nn

from mnist_exp.errors import UserError
from mnist_exp.metrics import format_metric
from mnist_exp.nodes import build
from mnist_exp.overrides import command
from mnist_exp.settings import FORMAT, DataDescription, Settings, check_format, stored_node
from mnist_exp.storage.checkpoint import read_archive
from mnist_exp.storage.run_dir import disk_error, remove_folder
from mnist_exp.tracking.base import RunRecord
from mnist_exp.tracking.connection import first_line
from mnist_exp.tracking.views import run_path

if TYPE_CHECKING:
    from mnist_exp.tracking.mlflow_store import MLflowStore

WEIGHTS, SETTINGS, MLMODEL = "weights.pt", "settings.json", "MLmodel"  # the last is MLflow's name
FILES = {WEIGHTS, SETTINGS, MLMODEL}
FLAVORS = {"python_function": {"loader_module": __name__}}  # with further keys, such as `code`, MLflow would import other files
DOWNLOADED = "registered_model_meta"  # a file that MLflow adds to a registered model that it downloads


def save_model(folder: Path, model: nn.Module, settings: Settings) -> None:
    """Write a model to `folder`, which is replaced.

    Args:
        folder: The folder.
        model: Maps uint8 images (n, channels, side, side) to logits (n, classes).
        settings: The settings of the model's run, with the description of the data.

    Raises:
        UserError: The disk refuses.
    """
    data = settings.data_description
    assert data
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, data.channels, data.side, data.side))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(data.class_names)))]),
    )
    content = {"format": FORMAT, "model": settings.model, "data_description": data.model_dump()}
    try:
        remove_folder(folder)
        folder.mkdir()
        torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
        (folder / SETTINGS).write_text(json.dumps(content, indent=2))
        description = Model(signature=signature)
        add_to_model(description, loader_module=__name__)  # type: ignore[no-untyped-call]  # MLflow's
        description.save(str(folder / MLMODEL))
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        raise disk_error(folder, error) from error


def read_model(uri: str) -> tuple[nn.Module, DataDescription]:
    """Return a model in evaluation mode, and the description of its data. No file of its folder can run code.

    Args:
        uri: A folder, or MLflow's `models:/...` in the store that MLFLOW_TRACKING_URI names.

    Raises:
        UserError: The folder has no model of this program, or a damaged one.
    """
    folder = _download(uri)
    try:
        content = json.loads((folder / SETTINGS).read_bytes())
        check_format(content, f"{folder / SETTINGS}")
        data = DataDescription.model_validate_json(json.dumps(content["data_description"]))
        node = stored_node("model", content["model"], str(folder))
        weights = torch.load(read_archive(folder / WEIGHTS), map_location="cpu", weights_only=True)
        with torch.device("meta"):  # a network of another size is refused before it takes memory
            build(node, "model", **data.shape).load_state_dict(weights, assign=True)
        model: nn.Module = build(node, "model", **data.shape)
        model.load_state_dict(weights)
    except UserError:
        raise
    except Exception as error:  # a forged file can fail anywhere within torch
        raise UserError(f"{folder} is not a model of this program, or is damaged: {first_line(error)}.") from error
    return model.eval(), data


class PyfuncModel:
    """A model as MLflow's loader and server call it."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @torch.inference_mode()
    def predict(self, model_input: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the logits (n, classes) of images (n, channels, side, side)."""
        logits: torch.Tensor = self.network(torch.from_numpy(model_input))
        return logits.float().numpy()


def _load_pyfunc(path: str) -> PyfuncModel:
    return PyfuncModel(read_model(path)[0])


def _download(uri: str) -> Path:
    try:
        return Path(uri) if Path(uri).is_dir() else Path(download_artifacts(uri))
    except Exception as error:  # stores and disks raise exceptions of their own
        raise UserError(f"{uri} cannot be loaded as a model: {first_line(error)}") from error


@dataclass(frozen=True)
class ModelSource:
    """Where a model is.

    Args:
        address: A folder, or MLflow's `models:/...`.
        title: What people know the model by: its run, its registered name, or its folder.
        model_id: The id of the logged model, None without one.
        run_id: The run that trained it, None if unknown.
    """

    address: str
    title: str
    model_id: str | None = None
    run_id: str | None = None


def find_model(store: "MLflowStore", text: str) -> ModelSource:
    """Return a model that a user names: a folder, a run's id or prefix, `latest`, `models:/NAME@ALIAS`, or `models:/ID`.

    Raises:
        UserError: There is no such model.
    """
    if text and Path(text).is_dir():
        return ModelSource(text, f"folder {text}")
    if not re.fullmatch("latest|[0-9a-fA-F]{6,32}|models:/(m-[0-9a-f]{32}|[^/@]+[/@].+)", text):
        raise UserError.invalid(
            "model",
            text,
            "a folder, the id of a run, latest, models:/NAME@ALIAS, models:/NAME/VERSION or models:/ID",
            f"`{command('runs', 'list')}` lists the runs.",
        )
    store.open()
    if not text.startswith("models:/"):
        return _of_run(store, text)
    name, _, alias = text.removeprefix("models:/").partition("@")
    try:
        if "/" not in name and not alias:
            run_id = store.client.get_logged_model(name).source_run_id
            return ModelSource(text, f"model {name} of run {(run_id or 'unknown')[:8]}", name, run_id)
        if alias:
            version = store.client.get_model_version_by_alias(name, alias)
        else:
            version = store.client.get_model_version(*name.rsplit("/", 1))
    except MlflowException as error:
        raise UserError(f"model {text} is not in {store.uri}: {first_line(error)}") from error
    logged = re.fullmatch("models:/(m-[0-9a-f]{32})", version.source or "")  # MLflow's stores do not fill in version.model_id
    return ModelSource(text, f"{version.name}, version {version.version}", logged[1] if logged else None, version.run_id)


def _of_run(store: "MLflowStore", text: str) -> ModelSource:
    """Return the model of a run, or of the newest run that has one: a single run, or without any a job of a sweep."""
    if text == "latest":
        finished = store.runs("attributes.status = 'FINISHED'")
        records = sorted(finished, key=lambda record: record.job is not None)  # keeps the order by time
        problem = f"experiment {store.experiment} of {store.uri} has no finished run with a model"
    else:
        records = [store.get_run(store.resolve_id(text))]
        problem = "the run has no model"
    for record in records:
        if models := store.logged_models(record):
            title = f"run {record.run_id[:8]}, {record.name}" + (f" on {record.data}" if record.data else "")
            return ModelSource(f"models:/{models[0].model_id}", title, models[0].model_id, record.run_id)
    remedy = f"Train one with `{command('run')}`, set MLFLOW_TRACKING_URI to its store, or name its experiment with --experiment."
    raise UserError(f"model {text}: {problem}.", key="model", value=text, remedy=remedy)


def find_champion(store: "MLflowStore", name: str, alias: str) -> str | None:
    """Return the id of the run whose model an alias points to, empty if unknown; None without such a model."""
    store.open()
    try:
        return store.client.get_model_version_by_alias(name, alias).run_id or ""
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the model, or its alias
            return None
        raise UserError(f"{name}@{alias} cannot be read from {store.uri}: {first_line(error)}") from error


def register(store: "MLflowStore", record: RunRecord, name: str, alias: str, reason: str, tags: dict[str, str]) -> str:
    """Register the model of a run and point an alias to it, which comes last; return the number of the new version.

    Args:
        store: The store.
        record: The run.
        name: The name of the registered model, created if missing.
        alias: The alias.
        reason: The sentence that says why, for the version's description.
        tags: Tags of the version.

    Raises:
        UserError: The model is missing or damaged, or not as `save_model` writes it; or the store refuses.
    """
    source = _of_run(store, record.run_id)
    _check_written_by_us(_download(source.address))
    link = f"[Run {record.run_id[:8]}]({run_path(record.experiment_id, record.run_id)[1:]})"
    scores = sorted(item for item in record.metrics.items() if item[0].startswith(("test/", "val/")))
    results = [f"{metric} {format_metric(metric, value)}" for metric, value in scores]
    description = f"{reason}\n\n{', '.join([f'{link} on {record.data}', *results])}."
    try:
        version = mlflow.register_model(source.address, name, tags=tags)  # also links the logged model to the version
        store.client.update_model_version(name, version.version, description)
        store.client.set_registered_model_alias(name, alias, version.version)
    except MlflowException as error:
        raise UserError(f"{name} cannot be registered in {store.uri}: {first_line(error)}") from error
    return str(version.version)


def _check_written_by_us(folder: Path) -> None:
    """Raise UserError on a damaged model, or on files or flavors that `save_model` does not write: MLflow could run them."""
    read_model(str(folder))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - {DOWNLOADED}
    try:
        flavors = yaml.safe_load((folder / MLMODEL).read_bytes())["flavors"]
        flavors["python_function"].pop("python_version")
    except Exception as error:  # a forged file can fail anywhere within yaml
        raise UserError(f"{folder} is damaged: its {MLMODEL} is unreadable.") from error
    if files != FILES or flavors != FLAVORS:
        foreign = ", ".join(sorted(files - FILES)) or f"other flavors in {MLMODEL}"
        raise UserError(f"{folder} is not as this program writes a model: it contains {foreign}.", remedy="Promote another run.")
