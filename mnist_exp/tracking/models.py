"""Trained models on disk: save and load them.

A model is a folder with the weights and the settings of its run. The `MLmodel` that `mlflow_models.py` adds to it names this
module, whose `_load_pyfunc` MLflow's loader and server call.
"""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mnist_exp.errors import UserError, first_line
from mnist_exp.settings import Settings, build, stored_node
from mnist_exp.storage.checkpoint import read_archive
from mnist_exp.storage.run_dir import disk_error, remove_folder

WEIGHTS, SETTINGS = "weights.pt", "settings.json"


def save_model(folder: Path, model: nn.Module, settings: Settings) -> None:
    """Write a model to `folder`, which is replaced.

    Args:
        folder: The folder.
        model: Maps uint8 images (n, channels, side, side) to logits (n, classes).
        settings: The settings of the model's run, with the `shape` of the data.

    Raises:
        UserError: The disk refuses.
    """
    try:
        remove_folder(folder)
        folder.mkdir()
        torch.save({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
        (folder / SETTINGS).write_text(settings.model_dump_json(indent=2))
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        raise disk_error(folder, error) from error


def read_model(folder: Path) -> tuple[nn.Module, dict[str, int]]:
    """Return a model in evaluation mode, and the shape of its data. No file of its folder can run code.

    Raises:
        UserError: The folder has no model of this program, or a damaged one.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
        shape = {key: int(settings["shape"][key]) for key in ("classes", "side", "in_channels")}
        node = stored_node("model", settings["model"], str(folder))
        weights = torch.load(read_archive(folder / WEIGHTS), map_location="cpu", weights_only=True)
        with torch.device("meta"):  # a network of another size is refused before it takes memory
            build(node, "model", **shape).load_state_dict(weights, assign=True)
        model: nn.Module = build(node, "model", **shape)
        model.load_state_dict(weights)
    except UserError:
        raise
    except Exception as error:  # a forged file can fail anywhere within torch
        raise UserError(f"{folder} is not a model of this program, or is damaged: {first_line(error)}.") from error
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
    return PyfuncModel(read_model(Path(path))[0])
