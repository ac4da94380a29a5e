"""Pictures in files, and the plain way to make images of them. `data=folder` and predictions for its models use the same."""

import math
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_exp.errors import UserError

# Pillow decodes these itself. It recognizes a format by the content of a file, and passes some, such as EPS, to other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def find_pictures(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the files in a folder whose names match and end like those of pictures, in the order of their names."""
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    return sorted(path for path in folder.glob(pattern) if path.suffix.lower() in suffixes and path.is_file())


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


def plain(picture: Image.Image, side: int, channels: int) -> NDArray[np.uint8]:
    """Return a picture upright, scaled into a square with its aspect ratio kept, black outside.

    Args:
        picture: Of any size and mode.
        side: Height and width of the result.
        channels: 1 for gray values, 3 for colors.

    Returns:
        uint8 (side, side), or (side, side, channels) with several channels.

    Raises:
        UserError: The picture contains numbers that are not finite.
    """
    upright = flatten(picture).convert("L" if channels == 1 else "RGB")
    if upright.size != (side, side):
        upright = ImageOps.pad(upright, (side, side), Image.Resampling.BILINEAR)
    return np.asarray(upright)


def flatten(picture: Image.Image) -> Image.Image:
    """Return a picture upright, in RGB, and without transparency: on white, or on black if what is opaque is light.

    Raises:
        UserError: The picture contains numbers that are not finite.
    """
    upright = ImageOps.exif_transpose(picture) or picture
    if upright.mode.startswith(("I", "F")):  # 16 bits, or any numbers
        values = np.asarray(upright, dtype=np.float64)
        if not np.isfinite(values).all():
            raise UserError("the picture contains values that are not finite")
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) / (high - low) * 255 if high > low else np.zeros_like(values)
        upright = Image.fromarray(scaled.astype(np.uint8))
    if "A" not in upright.getbands() and "transparency" not in upright.info:
        return upright.convert("RGB")
    color = upright.convert("RGBA")
    *channels, alpha = np.moveaxis(np.asarray(color, dtype=np.float32), 2, 0)
    is_light = float((np.mean(channels, axis=0) * alpha).sum()) > 127.5 * float(alpha.sum())
    paper = Image.new("RGBA", color.size, "black" if is_light and alpha.min() < 255 else "white")
    return Image.alpha_composite(paper, color).convert("RGB")
