"""A trained model that classifies pictures: from a run, a registered model or a folder."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mnist_exp.errors import UserError
from mnist_exp.overrides import store_uri
from mnist_exp.serving import preparation
from mnist_exp.serving.loading import read_model
from mnist_exp.tracking.mlflow_store import MLflowStore
from mnist_exp.tracking.registry import ModelSource, find_model

BATCH_SIZE = 250


@dataclass(frozen=True)
class Predictions:
    """What a model says of n images.

    Args:
        labels: The most probable class of each image: int64 (n,).
        probabilities: The probability of each class: float32 (n, classes).
        images: The images as the network sees them: uint8 (n, side, side).
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    images: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.labels)


class Classifier:
    """A trained model. Call it with images.

    Args:
        model: Maps uint8 images (n, 1, side, side) to logits (n, classes).
        shape: Class count, side and channels of the images, as in the configuration.
        source: Where the model comes from.

    Attributes:
        side: Height and width of the images.
    """

    def __init__(self, model: torch.nn.Module, shape: dict[str, int], source: ModelSource) -> None:
        self.model, self.source = model, source
        self.shape, self.side = shape, shape["side"]

    def __call__(self, images: Any, invert: bool | None = None) -> Predictions:
        """Classify images.

        Args:
            images: A path, a Pillow image, an array, or a sequence of those. An array of gray images that have the model's size,
                light digits on black, is taken as it is; everything else is prepared as MNIST's authors prepared theirs.
            invert: Whether the digits are darker than their background; None detects it. Ignored for arrays of the model's size.

        Raises:
            UserError: An image cannot be read, is blank, or has no usual shape.
        """
        return self.classify(self.prepare(images, invert))

    def prepare(self, images: Any, invert: bool | None = None) -> NDArray[np.uint8]:
        """Return what the network sees of images: uint8 (n, side, side). Args and Raises as for a call."""
        if not (isinstance(images, Sequence) and not isinstance(images, str)):
            return self._prepare(images, invert)
        if not images:
            raise UserError("no images: expected at least one")
        prepared = []
        for number, image in enumerate(images):
            try:
                prepared.append(self._prepare(image, invert))
            except UserError as error:
                name = f" ({image})" if isinstance(image, str | Path) else ""
                raise UserError(f"image {number}{name}: {error}") from error
        return np.concatenate(prepared)

    def _prepare(self, image: Any, invert: bool | None) -> NDArray[np.uint8]:
        if isinstance(image, str | Path):
            image = open_picture(Path(image))
        if isinstance(image, Image.Image):
            return preparation.prepare(image, self.side, invert)[None]
        arrays = preparation.as_images(_as_array(image), self.side)
        if arrays[0].shape == (self.side, self.side):
            return np.stack([preparation.to_bytes(array) for array in arrays])
        pictures = (Image.fromarray(preparation.to_bytes(array)) for array in arrays)
        return np.stack([preparation.prepare(picture, self.side, invert) for picture in pictures])

    @torch.no_grad()
    def classify(self, images: NDArray[np.uint8]) -> Predictions:
        """Classify prepared images, uint8 (n, side, side)."""
        batch = torch.from_numpy(images)[:, None]  # (n, 1, side, side)
        logits = torch.cat([self.model(part) for part in batch.split(BATCH_SIZE)])  # type: ignore[no-untyped-call]  # torch's
        probabilities = logits.float().softmax(1).numpy()  # (n, classes)
        return Predictions(probabilities.argmax(1), probabilities, images)


def load(model: str | Path = "latest") -> Classifier:
    """Return a trained model.

    Args:
        model: The id of a run or its first 6 or more digits, `latest`, `models:/NAME@ALIAS`, `models:/ID`, or a folder. Runs and
            registered models are those of the store that the commands use (`MLFLOW_TRACKING_URI`).

    Raises:
        UserError: There is no such model; it is not a complete, unchanged export of this program; or it expects colors.
    """
    classifier = load_from(MLflowStore(store_uri(), "mnist_exp"), str(model))
    if (channels := classifier.shape["in_channels"]) != 1:
        raise UserError(f"model {model} expects images of {channels} channels: expected 1, as pictures are prepared in gray.")
    return classifier


def load_from(store: MLflowStore, model: str) -> Classifier:
    """Return a trained model of a store; the rest as for `load`."""
    source = find_model(store, model)
    network, config = read_model(source.address)
    return Classifier(network, config["shape"], source)


def open_picture(path: Path) -> Image.Image:
    """Return the picture in a file; raises UserError if Pillow cannot read it, or if it is suspiciously large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()
                return picture.copy()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"the picture is too large: more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise UserError("no picture that Pillow can read") from error
    except FileNotFoundError as error:
        raise UserError("no such file") from error
    except Exception as error:  # a damaged file can fail anywhere within Pillow
        raise UserError(f"the picture cannot be read: {error}") from error


def _as_array(values: Any) -> NDArray[Any]:
    """Return a tensor, or an object that NumPy understands, as an array; raises UserError."""
    try:
        if isinstance(values, torch.Tensor):
            values = (values.float() if values.is_floating_point() else values).detach().cpu().numpy()
        return np.asarray(values)
    except Exception as error:  # tensors have many layouts, and objects of any class may come here
        raise UserError(f"{type(values).__name__} is no image: expected a path, a Pillow image or an array") from error
