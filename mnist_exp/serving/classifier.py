"""A trained model that classifies pictures: from a run, a registered model or a folder."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import nn

from mnist_exp.cli import find_store
from mnist_exp.errors import UserError
from mnist_exp.serving import preparation
from mnist_exp.settings import Settings
from mnist_exp.tracking.base import ModelSource
from mnist_exp.tracking.models import read_model

BATCH_SIZE = 250
# Pillow decodes these itself. It recognizes a format by the content of a file, and passes some, such as EPS, to other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Predictions:
    """The classes that a model gives n images.

    Args:
        labels: The most probable class of each image: int64 (n,).
        probabilities: The probability of each class: float32 (n, classes).
        images: The images as the network sees them: uint8 (n, side, side), or with several channels (n, side, side, channels).
    """

    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    images: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.labels)


class Classifier:
    """A trained model. Call it with images.

    Args:
        model: Maps uint8 images (n, channels, side, side) to logits (n, classes).
        shape: `classes`, `side` and `in_channels`, as in the configuration.
        source: Where the model comes from.
    """

    def __init__(self, model: nn.Module, shape: dict[str, int], source: ModelSource) -> None:
        self.model, self.shape, self.source = model, shape, source

    def __call__(self, images: Picture | Sequence[Picture] | NDArray[Any]) -> Predictions:
        """Classify images.

        Args:
            images: A path, a Pillow image, or a sequence of those: each is prepared as MNIST's authors prepared theirs. Or an
                array (n, side, side) or (n, side, side, channels) of numbers from 0 to 255, or from 0 to 1, of light digits on
                black: it is taken as it is.

        Raises:
            UserError: A picture cannot be read or is blank, or an array has another shape.
        """
        return self.classify(self.prepare(images))

    def prepare(self, images: Picture | Sequence[Picture] | NDArray[Any]) -> NDArray[np.uint8]:
        """Return images as the network sees them: uint8 (n, side, side). Args and Raises as for a call."""
        if isinstance(images, np.ndarray):
            return preparation.as_images(images, self.shape["side"], self.shape["in_channels"])
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
        """Return a picture as the network sees it: uint8 (side, side).

        Args:
            picture: A path or a Pillow image.
            as_is: Take the pixels as they are: of a gray picture of the model's size, a light digit on black.

        Raises:
            UserError: The picture cannot be read or is blank, or does not have that size; or the model expects colors.
        """
        side = self.shape["side"]
        if self.shape["in_channels"] != 1:
            raise UserError("the model expects images in color, but pictures are prepared in gray: expected an array")
        if isinstance(picture, str | Path):
            picture = open_picture(Path(picture))
        if not isinstance(picture, Image.Image):
            raise UserError(
                f"{type(picture).__name__} is no picture: expected a path, a Pillow image, or one array of all images"
            )
        if not as_is:
            return preparation.prepare(picture, side)
        if picture.mode not in ("1", "L") or picture.size != (side, side):
            width, height = picture.size
            raise UserError(
                f"the picture has mode {picture.mode} and {width} x {height} pixels: expected gray, {side} x {side}, with --as-is"
            )
        return np.asarray(picture.convert("L"))

    @torch.no_grad()
    def classify(self, images: NDArray[np.uint8]) -> Predictions:
        """Classify prepared images: uint8 (n, side, side), or with several channels (n, side, side, channels)."""
        pixels = torch.from_numpy(images)
        batch = pixels[:, None] if images.ndim == 3 else pixels.movedim(3, 1)  # (n, channels, side, side)
        logits = torch.cat([self.model(part) for part in batch.split(BATCH_SIZE)])  # type: ignore[no-untyped-call]  # torch's
        probabilities = logits.float().softmax(1).numpy()  # (n, classes)
        return Predictions(probabilities.argmax(1), probabilities, images)


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
    return Classifier(*read_model(store.fetch_model(source)), source)


def open_picture(file: Path | BinaryIO, formats: tuple[str, ...] = FORMATS, max_pixels: float = math.inf) -> Image.Image:
    """Return the picture in a file; raises UserError if it has none of the formats, or is suspiciously large or damaged.

    Args:
        file: A path, or the content.
        formats: Names of Pillow.
        max_pixels: A limit in addition to Pillow's.
    """
    try:
        if isinstance(file, Path) and file.exists() and not file.is_file():
            raise UserError("no picture: expected a file, not a folder, a pipe or a device")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=formats) as picture:
                if picture.width * picture.height > max_pixels:
                    raise UserError(f"the picture has more than {max_pixels:,} pixels")
                picture.load()
                return picture.copy()
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"no picture: expected {', '.join(formats)}") from error
    except Exception as error:  # a damaged file can fail anywhere within Pillow
        raise UserError(f"the picture cannot be read: {error}") from error
