"""A trained model that classifies pictures: from a run, a registered model or a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from mnist_exp.cli import find_store
from mnist_exp.errors import UserError
from mnist_exp.learning.pictures import open_picture, plain
from mnist_exp.metrics import format_metric
from mnist_exp.serving import preparation
from mnist_exp.settings import DataDescription, Settings
from mnist_exp.tracking.base import ModelSource
from mnist_exp.tracking.models import read_model

BATCH_SIZE = 250

Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Predictions:
    """The classes that a model gives n images.

    Args:
        labels: The most probable class of each image: int64 (n,).
        names: Its name.
        probabilities: The probability of each class: float32 (n, classes).
        images: The images as the network sees them: uint8 (n, side, side), or with several channels (n, side, side, channels).
    """

    labels: NDArray[np.int64]
    names: list[str]
    probabilities: NDArray[np.float32]
    images: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.labels)


class Classifier:
    """A trained model. Call it with images.

    Args:
        model: Maps uint8 images (n, channels, side, side) to logits (n, classes).
        data: The description of the data that it was trained on.
        source: Where the model comes from.
        metrics: The metrics that scored it, the most important first; none of an older model.
    """

    def __init__(self, model: nn.Module, data: DataDescription, source: ModelSource, metrics: Mapping[str, float]) -> None:
        self.model, self.data, self.source, self.metrics = model, data, source, metrics

    @property
    def summary(self) -> str:
        """Such as `run 1a2b3c4d, se_cnn on mnist: test/accuracy 98.62 %`."""
        name = next(iter(self.metrics), "")
        return self.source.title + (f": {name} {format_metric(name, self.metrics[name])}" if name else "")

    @property
    def warning(self) -> str:
        """What to know about the training data before trusting the model, empty without a warning."""
        return f"The model was trained with a warning: {self.data.warning}" if self.data.warning else ""

    def __call__(self, images: Picture | Sequence[Picture] | NDArray[Any]) -> Predictions:
        """Classify images.

        Args:
            images: A path, a Pillow image, or a sequence of those: each is prepared as the images of the training data were. Or
                an array (n, side, side) or (n, side, side, channels) of numbers from 0 to 255, or from 0 to 1: it is taken as it
                is. Digits are light on black.

        Raises:
            UserError: A picture cannot be read or is blank, or an array has another shape.
        """
        return self.classify(self.prepare(images))

    def prepare(self, images: Picture | Sequence[Picture] | NDArray[Any]) -> NDArray[np.uint8]:
        """Return images as the network sees them, as in `Predictions`. Args and Raises as for a call."""
        if isinstance(images, np.ndarray):
            return preparation.as_images(images, self.data.side, self.data.channels)
        if isinstance(images, Picture):
            return self.prepare_picture(images)[None]
        prepared = []
        for number, image in enumerate(images):
            try:
                prepared.append(self.prepare_picture(image))
            except UserError as error:
                name = f" ({image})" if isinstance(image, str | Path) else ""
                raise UserError(f"image {number}{name}: {error}") from error
        if not prepared:
            raise UserError("no images: expected at least one")
        return np.stack(prepared)

    def prepare_picture(self, picture: Picture, as_is: bool = False) -> NDArray[np.uint8]:
        """Return a picture as the network sees it: uint8 (side, side), or with several channels (side, side, channels).

        Args:
            picture: A path or a Pillow image.
            as_is: Take the pixels as they are: of a picture of the model's size and channels.

        Raises:
            UserError: The picture cannot be read or is blank, or does not have that size.
        """
        side, channels = self.data.side, self.data.channels
        if isinstance(picture, str | Path):
            picture = open_picture(Path(picture))
        if not isinstance(picture, Image.Image):
            raise UserError(
                f"{type(picture).__name__} is no picture: expected a path, a Pillow image, or one array of all images"
            )
        modes, kind = (("1", "L"), "gray") if channels == 1 else (("RGB",), "RGB")
        if as_is and (picture.mode not in modes or picture.size != (side, side)):
            width, height = picture.size
            problem = f"the picture has mode {picture.mode} and {width} x {height} pixels"
            raise UserError(f"{problem}: expected {kind}, {side} x {side}, with --as-is")
        is_handwriting = self.data.preparation == "handwriting" and not as_is
        return preparation.prepare(picture, side) if is_handwriting else plain(picture, side, channels)

    @torch.no_grad()
    def classify(self, images: NDArray[np.uint8]) -> Predictions:
        """Classify prepared images: uint8 (n, side, side), or with several channels (n, side, side, channels)."""
        pixels = torch.from_numpy(images)
        batch = pixels[:, None] if images.ndim == 3 else pixels.movedim(3, 1)  # (n, channels, side, side)
        logits = torch.cat([self.model(part) for part in batch.split(BATCH_SIZE)])  # type: ignore[no-untyped-call]  # torch's
        probabilities = logits.float().softmax(1).numpy()  # (n, classes)
        labels = probabilities.argmax(1)
        return Predictions(labels, [self.data.class_names[label] for label in labels], probabilities, images)


def load_from(settings: Settings, model: str) -> Classifier:
    """Return a trained model.

    Args:
        settings: The settings, with the store and the folder of all runs.
        model: The id of a run or the start of one, `latest`, `models:/NAME@ALIAS`, `models:/ID`, or a folder.

    Raises:
        UserError: There is no such model, or it is damaged.
    """
    store = find_store(settings)
    source = store.find_model(model, settings.output_dir)
    network, data, metrics = read_model(store.fetch_model(source))
    return Classifier(network, data, source, metrics)
