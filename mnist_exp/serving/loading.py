"""Loads an exported model from its weights and its validated configuration. No graph, pickle or code is read."""

import io
from typing import TYPE_CHECKING, Any

import torch

from mnist_exp.config import build, check
from mnist_exp.errors import UserError
from mnist_exp.learning.models import count_parameters
from mnist_exp.tracking.model_export import WEIGHTS, download_model, verify_model

if TYPE_CHECKING:
    from torch import nn


def load_model(uri: str) -> "nn.Module":
    """Return an exported model in evaluation mode: it maps uint8 images (n, channels, side, side) to float32 logits (n, classes).

    Args and Raises as for `read_model`.
    """
    return read_model(uri)[0]


def read_model(uri: str) -> tuple["nn.Module", dict[str, Any]]:
    """Return an exported model in evaluation mode, and the configuration that it was trained with.

    Args:
        uri: A folder, or `models:/<model id>` in the store that MLFLOW_TRACKING_URI names.

    Raises:
        UserError: The folder is not a complete, unchanged export of this program.
    """
    folder = download_model(uri)
    config = verify_model(folder)
    check(config)
    if "shape" not in config:
        raise UserError(f"{folder} does not contain the shape of the data. Use the version that wrote it.")
    with torch.device("meta"):
        skeleton: nn.Module = build(config["model"], "model", **config["shape"])
    count_parameters(skeleton, config["parameter_limit"])
    try:
        weights = torch.load(io.BytesIO((folder / WEIGHTS).read_bytes()), map_location="cpu", weights_only=True)
        skeleton.load_state_dict(weights, assign=True)  # before memory is allocated: the model is no larger than its file
        model: nn.Module = build(config["model"], "model", **config["shape"])
        model.load_state_dict(weights)
    except Exception as error:  # a forged file can fail anywhere within torch
        raise UserError(f"{folder / WEIGHTS} does not contain the weights of this model: {type(error).__name__}.") from error
    return model.eval(), config
