"""Trained models: save, load, find and register them.

A model is a folder of three files: the weights, the settings of its run, and an `MLmodel`, through which MLflow's own loader and
server call `_load_pyfunc`.
"""

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import add_to_model
from mlflow.types import Schema, TensorSpec
from numpy.typing import NDArray
from torch import nn

from mnist_exp.errors import UserError
from mnist_exp.overrides import command
from mnist_exp.settings import Settings, build, stored_node
from mnist_exp.storage.run_dir import disk_error, remove_folder
from mnist_exp.tracking.base import RunRecord
from mnist_exp.tracking.connection import first_line
from mnist_exp.tracking.housekeeping import logged_models
from mnist_exp.tracking.mlflow_store import MLflowStore, record_of

WEIGHTS, SETTINGS, MLMODEL = "weights.pt", "settings.json", "MLmodel"  # the last is MLflow's name
FILES = {WEIGHTS, SETTINGS, MLMODEL}
FLAVORS = {"python_function": {"loader_module": __name__}}  # with further keys, such as `code`, MLflow would import other files
DOWNLOADED = "registered_model_meta"  # a file that MLflow adds to a registered model that it downloads


def save_model(folder: Path, model: nn.Module, settings: Settings) -> None:
    """Write a model to `folder`, which is replaced.

    Args:
        folder: The folder.
        model: Maps uint8 images (n, channels, side, side) to logits (n, classes).
        settings: The settings of the model's run, with the `shape` of the data.

    Raises:
        UserError: The disk refuses.
    """
    assert settings.shape
    side = settings.shape["side"]
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, settings.shape["in_channels"], side, side))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, settings.shape["classes"]))]),
    )
    try:
        remove_folder(folder)
        folder.mkdir()
        torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
        (folder / SETTINGS).write_text(settings.model_dump_json(indent=2))
        description = Model(signature=signature)
        add_to_model(description, loader_module=__name__)  # type: ignore[no-untyped-call]  # MLflow's
        description.save(str(folder / MLMODEL))
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        raise disk_error(folder, error) from error


def read_model(uri: str) -> tuple[nn.Module, dict[str, int]]:
    """Return a model in evaluation mode, and the shape of its data. No file of its folder can run code.

    Args:
        uri: A folder, or MLflow's `models:/...` in the store that MLFLOW_TRACKING_URI names.

    Raises:
        UserError: The folder has no model of this program, or a damaged one.
    """
    folder = _download(uri)
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
        shape = {key: int(settings["shape"][key]) for key in ("classes", "side", "in_channels")}
        node = stored_node("model", settings["model"], str(folder))
        with zipfile.ZipFile(folder / WEIGHTS) as archive:
            if archive.testzip():  # torch itself does not notice changed bits
                raise zipfile.BadZipFile
        with torch.device("meta"):  # without memory
            skeleton: nn.Module = build(node, "model", **shape)
        if sum(value.nbytes for value in skeleton.parameters()) > (folder / WEIGHTS).stat().st_size:
            raise UserError(f"{folder} is invalid: its {SETTINGS} describe a larger network than its {WEIGHTS} contains.")
        model: nn.Module = build(node, "model", **shape)
        model.load_state_dict(torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{folder} is not a model of this program: {error}.") from error
    except Exception as error:  # a forged file can fail anywhere within torch
        raise UserError(f"{folder} is not a model of this program, or is damaged: {type(error).__name__}.") from error
    return model.eval(), shape


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
        model_id: The id of the logged model, None for a folder.
        run_id: The run that trained it, None if unknown.
    """

    address: str
    title: str
    model_id: str | None = None
    run_id: str | None = None


def find_model(store: MLflowStore, text: str) -> ModelSource:
    """Return a model that a user names: a folder, a run's id or prefix, `latest`, `models:/NAME@ALIAS`, or `models:/ID`.

    Raises:
        UserError: There is no such model.
    """
    if text and Path(text).is_dir():
        return ModelSource(text, f"folder {text}")
    if not re.fullmatch("latest|[0-9a-fA-F]{6,32}|models:/.+", text):
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
        if alias:
            version = store.client.get_model_version_by_alias(name, alias)
            return ModelSource(text, f"{name}@{alias}, version {version.version}", version.model_id, version.run_id)
        if re.fullmatch("m-[0-9a-f]{32}", name):
            run_id = store.client.get_logged_model(name).source_run_id
            return ModelSource(text, f"model {name} of run {(run_id or 'unknown')[:8]}", name, run_id)
        if "/" in name:
            version = store.client.get_model_version(*name.rsplit("/", 1))
            return ModelSource(text, name, version.model_id, version.run_id)
        return ModelSource(text, name)
    except MlflowException as error:
        raise UserError(f"model {text} is not in {store.uri}: {first_line(error)}") from error


def _of_run(store: MLflowStore, text: str) -> ModelSource:
    """Return the model of a run, or of the newest run that has one: a single run, or without any a job of a sweep."""
    if text == "latest":
        records = sorted(
            store.runs("attributes.status = 'FINISHED'"), key=lambda record: record.job is not None
        )  # keeps the order by time
    else:
        records = [record_of(store.get_run(store.resolve_id(text)))]
    for record in records:
        if models := logged_models(store, record):
            title = f"run {record.run_id[:8]}, {record.name}" + (f" on {record.data}" if record.data else "")
            return ModelSource(f"models:/{models[0].model_id}", title, models[0].model_id, record.run_id)
    problem = "the run has no model"
    if text == "latest":
        problem = f"experiment {store.experiment} of {store.uri} has no finished run with a model"
    remedy = f"Train one with `{command('run')}`, set MLFLOW_TRACKING_URI to its store, or name its experiment with --experiment."
    raise UserError(f"model {text}: {problem}.", key="model", value=text, remedy=remedy)


def find_champion(store: MLflowStore, name: str, alias: str) -> ModelVersion | None:
    """Return the version of a registered model that an alias points to, None without one."""
    store.open()
    try:
        return store.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the model, or its alias
            return None
        raise UserError(f"{name}@{alias} cannot be read from {store.uri}: {first_line(error)}") from error


def verified_model(store: MLflowStore, record: RunRecord) -> ModelSource:
    """Return the model of a run.

    Raises:
        UserError: It is missing or damaged, or has files or flavors that `save_model` does not write: MLflow could run them.
    """
    source = _of_run(store, record.run_id)
    folder = _download(source.address)
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
    return source


def register(store: MLflowStore, source: ModelSource, name: str, alias: str, reason: str, tags: dict[str, str]) -> str:
    """Register a verified model and point the alias to it, which comes last; return the number of the new version.

    Args:
        store: The store.
        source: The model.
        name: The name of the registered model, created if missing.
        alias: The alias.
        reason: Why the model is promoted, for the version's description.
        tags: Tags of the version.

    Raises:
        UserError: The store refuses.
    """
    client = store.client
    try:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = client.create_model_version(
            name, source.address, source.run_id, tags, description=reason, model_id=source.model_id
        )
        client.set_registered_model_alias(name, alias, version.version)
    except MlflowException as error:
        raise UserError(f"{name} cannot be registered in {store.uri}: {first_line(error)}") from error
    return str(version.version)
