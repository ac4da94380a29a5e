"""Exports a model as an MLflow model folder, and verifies such a folder.

The folder contains the weights, and a graph for MLflow's own loaders and for serving. Reading a graph evaluates expressions
that it contains, so this program never reads one: `serving.loading` builds the architecture from the manifest's configuration.
"""

import copy
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import yaml
from mlflow.artifacts import download_artifacts
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import nn

from mnist_exp.errors import UserError
from mnist_exp.settings import Settings
from mnist_exp.storage.manifest import read_text_file, verify_manifest, write_manifest
from mnist_exp.storage.run_dir import disk_error, remove_folder, sync
from mnist_exp.tracking import graph_cache
from mnist_exp.tracking.connection import first_line

WEIGHTS = "weights.pt"
GRAPH = "data/model.pt2"  # MLflow's name
FILES = {
    "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "input_example.json", "serving_input_example.json",
    GRAPH, WEIGHTS,
}  # fmt: skip
# The MLmodel that we write. Other keys, above all `code`, would make MLflow import files of the folder.
FLAVORS: dict[str, dict[str, Any]] = {
    "python_function": {
        "config": {"device": None},
        "data": "data",
        "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
        "loader_module": "mlflow.pytorch",
        "pickle_module_name": "mlflow.pytorch.pickle_module",
        "python_version": ...,  # any text
    },
    "pytorch": {"code": None, "model_data": "data", "pytorch_version": ...},
}
MLMODEL_KEYS = {
    "is_signature_from_type_hint", "mlflow_version", "model_id", "model_size_bytes", "model_uuid", "prompts",
    "saved_input_example_info", "signature", "type_hint_from_example", "utc_time_created",
}  # fmt: skip


def save_model(folder: Path, model: nn.Module, example: Any, settings: Settings) -> None:
    """Export a model to `folder`, which appears once all files are on the disk.

    Args:
        folder: The folder; an earlier export is replaced.
        model: Maps images (n, channels, side, side) to logits (n, classes).
        example: A uint8 array (2, channels, side, side).
        settings: The settings, with the `shape` of the data.

    Raises:
        UserError: The disk refuses.
    """
    tmp_path = folder.with_name(f"{folder.name}.partial")
    model_node = {key: value for key, value in settings.model.items() if key != "dropout"}  # not in the graph
    architecture = json.dumps([model_node, settings.shape])
    try:
        remove_folder(tmp_path)
        _write_graph(tmp_path, model, example, architecture)
        torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, tmp_path / WEIGHTS)
        write_manifest(tmp_path, settings.model_dump(mode="json"))
        for path in (*tmp_path.rglob("*"), tmp_path):
            sync(path)
        remove_folder(folder)
        tmp_path.replace(folder)
        sync(folder.parent)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        remove_folder(tmp_path)
        raise disk_error(folder, error) from error


def _write_graph(folder: Path, model: nn.Module, example: Any, architecture: str) -> None:
    """Write the MLflow model. Only the first model of an architecture is traced; later ones take its graph from the cache."""
    key = graph_cache.cache_key(architecture, example.tobytes())
    with graph_cache.lock_graph(key) as file:
        files = graph_cache.read_files(file, FILES - {WEIGHTS})
        if files is None:
            _trace(model, example, folder)
            graph_cache.write_files(file, {name: (folder / name).read_bytes() for name in FILES - {WEIGHTS}})
            return
    files[GRAPH] = graph_cache.with_weights(files[GRAPH], model.state_dict())
    description = yaml.safe_load(files["MLmodel"])
    description |= {"model_uuid": uuid4().hex, "utc_time_created": str(datetime.now(UTC).replace(tzinfo=None))}
    files["MLmodel"] = yaml.safe_dump(description, sort_keys=False).encode()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _trace(model: nn.Module, example: Any, folder: Path) -> None:
    import mlflow.pytorch  # takes seconds, for the first model of an architecture only

    with torch.no_grad():
        classes = model(torch.from_numpy(example).to(next(model.parameters()).device)).shape[1]
    mlflow.pytorch.save_model(
        copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format),  # channels_last makes torch.export warn
        folder,
        input_example=example,
        signature=ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, *example.shape[1:]))]),
            outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, classes))]),
        ),
        pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
    )


def download_model(uri: str) -> Path:
    """Return the folder of the model at `uri`, a path or MLflow's `models:/<model id>`; raises UserError."""
    try:
        return Path(uri) if Path(uri).is_dir() else Path(download_artifacts(uri))
    except Exception as error:  # stores and disks raise exceptions of their own
        raise UserError(f"{uri} cannot be loaded as a model: {first_line(error)}") from error


def verify_model(folder: Path) -> dict[str, Any]:
    """Return the configuration of the exported model in `folder`; raises UserError if any file is not as we write it."""
    config = verify_manifest(folder, FILES)
    try:
        mlmodel = yaml.safe_load(read_text_file(folder / "MLmodel"))
        flavors = mlmodel.pop("flavors")
        foreign = [key for key in mlmodel if key not in MLMODEL_KEYS]
        for name in flavors.keys() | FLAVORS.keys():
            actual, expected = flavors.get(name, {}), FLAVORS.get(name, {})
            for key in actual.keys() | expected.keys():
                value = actual.get(key)
                if not (isinstance(value, str) if expected.get(key) is ... else key in expected and value == expected[key]):
                    foreign.append(f"flavors.{name}.{key}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{folder} is damaged: its MLmodel is unreadable.") from error
    if foreign:
        raise UserError(
            f"{folder} is not a model exported by this program: its MLmodel has the foreign key {sorted(map(str, foreign))[0]}."
        )
    return config
