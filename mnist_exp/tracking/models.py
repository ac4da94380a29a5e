"""Trained models on disk: save and load them.

A model is a folder with the weights, the node of the model, the description of its data and its metrics. The `MLmodel`
that `mlflow_models.py` adds to it names this module, whose `_load_pyfunc` MLflow's loader and server call.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import nn

from mnist_exp.errors import UserError, first_line
from mnist_exp.learning.models import without_values
from mnist_exp.nodes import build, check_nodes
from mnist_exp.settings import FORMAT, ID, DataDescription, Settings, check_format
from mnist_exp.storage.checkpoint import read_archive
from mnist_exp.storage.run_dir import disk_error, remove_folder

if TYPE_CHECKING:
    from mnist_exp.tracking.base import Store

WHOLE = r"(.+):([0-9a-f]{12})"  # the full id of a model, and the digest of its weights
WEIGHTS, SETTINGS = "weights.pt", "settings.json"


def save_model(folder: Path, model: nn.Module, settings: Settings, metrics: Mapping[str, float]) -> None:
    """Write a model to `folder`, which is replaced.

    Args:
        folder: The folder.
        model: Maps uint8 images (n, channels, side, side) to logits (n, classes).
        settings: The settings of the model's run, with the description of the data.
        metrics: The metrics that scored the model, that of the objective first.

    Raises:
        UserError: The disk refuses.
    """
    data = settings.data_description
    assert data
    described = data.model_dump(exclude={"locations": True, "before": {"__all__": {"locations"}}})
    content = {"format": FORMAT, "model": settings.model, "data_description": described, "metrics": dict(metrics)}
    try:
        remove_folder(folder)
        folder.mkdir()
        torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
        (folder / SETTINGS).write_text(json.dumps(content, indent=2))
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        raise disk_error(folder, error) from error


def read_model(folder: Path) -> tuple[nn.Module, DataDescription, dict[str, float]]:
    """Return a model in evaluation mode, the description of its data, and its metrics. No file of its folder can run code.

    Raises:
        UserError: The folder has no model of this program, or a damaged one.
    """
    try:
        content = json.loads((folder / SETTINGS).read_bytes())
        check_format(content, f"{folder / SETTINGS}")
        data = DataDescription.model_validate_json(json.dumps(content["data_description"]))
        metrics = TypeAdapter(dict[str, float]).validate_python(content.get("metrics", {}))  # an older model has none
        node = content["model"]
        check_nodes({"model": node})
        weights = torch.load(read_archive(folder / WEIGHTS), map_location="cpu", weights_only=True)
        with without_values():  # a network of another size is refused before it takes memory
            build(node, "model", **data.shape).load_state_dict(weights, assign=True)
        model: nn.Module = build(node, "model", **data.shape)
        model.load_state_dict(weights)
    except UserError:
        raise
    except Exception as error:  # a forged file can fail anywhere within torch
        raise UserError(f"{folder} is not a model of this program, or is damaged: {first_line(error)}.") from error
    return model.eval(), data, metrics


def whole_id(store: "Store", text: str, output_dir: Path) -> str:
    """Return the full id of a model and the digest of its weights, `ID:DIGEST`, as records contain it.

    Args:
        store: The store.
        text: A model as `Store.find_model` takes it, or a file as `read_weights` takes it.
        output_dir: The folder of all runs.

    Raises:
        UserError: There is no such model, or it is damaged.
    """
    if re.fullmatch(WHOLE, text):
        return text
    name, weights, _ = read_initial(store, text, output_dir)
    return f"{name}:{digest_of(weights)}"


def read_initial(store: "Store", text: str, output_dir: Path) -> tuple[str, Mapping[str, torch.Tensor], list[DataDescription]]:
    """Return the full id and the weights of a model, and the description of its data, none for a file of weights.

    Args and Raises as for `whole_id`.
    """
    if Path(text).is_file() and text != "latest" and not re.fullmatch(ID, text):
        return str(Path(text).absolute()), read_weights(Path(text)), []
    try:
        source = store.find_model(text, output_dir)
    except UserError as error:
        raise UserError(f"init={text} names neither a model nor a file of weights. {error}", key="init", value=text) from error
    if text.startswith("models:/"):
        name = f"models:/{source.model_id}" if source.model_id else source.address
    else:
        name = source.run_id or str(Path(source.address).absolute())
    model, described, _ = read_model(store.fetch_model(source))
    return name, model.state_dict(), [described]


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a file that `torch.save(model.state_dict(), file)` has written; raises UserError."""
    try:
        weights = torch.load(read_archive(file), map_location="cpu", weights_only=True)
        for value in weights.values():
            # A small file could fill the memory with one that repeats its values.
            if value.is_meta or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("its tensors must have all their values")
        return {name: value.detach().contiguous() for name, value in weights.items()}
    except UserError:
        raise
    except Exception as error:  # a forged file can fail anywhere within torch
        raise UserError(
            f"{file} contains no weights: {first_line(error)}", remedy="Write torch.save(model.state_dict(), FILE)."
        ) from error


def digest_of(weights: Mapping[str, torch.Tensor]) -> str:
    """Return the digest of weights on the CPU."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()  # numpy has not all of torch's types
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + content)
    return digest.hexdigest()[:12]


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
    return PyfuncModel(read_model(Path(path))[0])
