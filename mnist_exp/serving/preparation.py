"""Turns a picture of a digit, such as a photo, into an image as MNIST's authors prepared theirs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage

from mnist_exp.errors import UserError
from mnist_exp.learning.pictures import flatten

BOX = 20 / 28  # the side of the box that the digit fills, as a share of the side of the image
LARGEST = 400  # pixels on the longer side of the picture that is analyzed
MIN_CONTRAST = 0.06  # between digit and background, from 0 to 1: less is noise
FAINT = 0.1  # less than this share of the full contrast is background
WINDOW = 0.25  # the thickest line of a photo, as a share of its shorter side
BLOCKS = 8  # in each direction: in a smaller one, a line could cover half
SHARP = 0.3  # the edges of a digit, as a share of the sharpest in the picture
BLANK = "no digit found: the picture is blank, or its contrast is too low"
MIN_COMPONENT = 0.05  # less than this share of the largest component's sum is dirt


def prepare(picture: Image.Image, side: int) -> NDArray[np.uint8]:
    """Return a digit as a light figure on black: uint8 (side, side).

    The digit may be darker or lighter than its background. It is cropped, scaled to a box of 20/28 of the side with its aspect
    ratio kept, and centered by its center of mass.

    Args:
        picture: Of any size and mode.
        side: Height and width of the result.

    Raises:
        UserError: The picture is blank.

    Source: LeCun, Bottou, Bengio and Haffner, Gradient-Based Learning Applied to Document Recognition, 1998, section III.A.
    """
    foreground = _without_dirt(_foreground(_pixels(picture)))
    rows, columns = (np.flatnonzero((foreground > 0).any(axis)) for axis in (1, 0))
    digit = foreground[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = round(side * BOX) / max(digit.shape)
    height, width = (max(1, round(length * scale)) for length in digit.shape)
    # Pillow's bilinear filter averages over all pixels that fall into one.
    small = np.asarray(Image.fromarray(digit.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
    small = small / small.max()  # thin strokes of a large picture would be faint
    middle = (side - 1) / 2
    top, left = (round(middle - center) for center in ndimage.center_of_mass(small))
    return _placed((small * 255).round().astype(np.uint8), top, left, side)


def _pixels(picture: Image.Image) -> NDArray[np.float32]:
    """Return the picture with values from 0 to 1: float32 (h, w, 3), at most `LARGEST` on a side."""
    factor = max(picture.size) // (4 * LARGEST)
    if factor > 1 and picture.mode in ("L", "RGB", "RGBA"):  # conversions of a large picture take gigabytes
        picture = (ImageOps.exif_transpose(picture) or picture).reduce(factor)
    flat = flatten(picture)
    flat.thumbnail((LARGEST, LARGEST), Image.Resampling.BOX)
    pixels: NDArray[np.float32] = (np.asarray(flat) / 255).astype(np.float32)
    return pixels


def _foreground(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how much each pixel belongs to the digit: 0 to 1, float32 (h, w)."""
    difference = (pixels - np.median(_border(pixels), axis=0)).astype(np.float32)
    if _is_uneven(difference):
        return _foreground_of_photo(pixels)
    foreground = _foreground_on_plane(difference)
    return _foreground_of_photo(pixels) if _edge_components(_components(foreground)) else foreground


def _foreground_on_plane(difference: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how much each pixel differs from a background of one color, toward the color of the digit."""
    strength = np.abs(difference).max(2)
    contrast = float(np.quantile(strength, 0.995)) if strength.size > 1000 else float(strength.max())
    contrast = max(contrast, float(strength.max()) * 0.5)
    if contrast < MIN_CONTRAST:
        raise UserError(BLANK)
    direction = difference[strength > 0.5 * contrast].mean(0)  # (channels,): from the background to the digit
    foreground = (difference @ direction) / float(direction @ direction)
    shown: NDArray[np.float32] = np.where(foreground > FAINT, foreground.clip(0, 1), 0).astype(np.float32)
    return shown


def _is_uneven(difference: NDArray[np.float32]) -> bool:
    """Return whether the border, and so the background, has noise or shadows, as that of a photo has."""
    border = _border(difference)  # (n, channels)
    gray = border.mean(1)
    noise = float(np.median(np.abs(gray - np.median(gray))))
    strongest = float(np.quantile(np.abs(difference).max(2), 0.995))
    size = np.abs(border).max(1)
    shaded = float(((size > 0.05) & (size < 0.5 * strongest)).mean())  # neither background nor a digit that touches the border
    return noise > 0.003 or shaded > 0.05


def _foreground_of_photo(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how much each pixel differs from the background around it, which may have shadows of any shape.

    A morphological closing removes dark lines, an opening light ones, if they are thinner than the window. Shadows are larger.
    """
    gray = pixels.mean(2)
    if min(gray.shape) > 100:
        gray = ndimage.gaussian_filter(gray, 1)  # against noise
    is_dark = _is_dark(gray)
    window = max(3, round(WINDOW * min(gray.shape)))
    padded = np.pad(gray, window, mode="edge")  # a strip at the border is part of something larger
    remove_lines = ndimage.grey_closing if is_dark else ndimage.grey_opening
    background = remove_lines(padded, size=(window, window))[window:-window, window:-window]
    # Light multiplies what paper and ink reflect.
    foreground = 1 - gray / np.maximum(background, 0.05) if is_dark else gray - background
    contrast = max(float(np.quantile(foreground, 0.995)), 0.5 * float(foreground.max()))  # a thin digit covers less than 0.5 %
    if contrast < MIN_CONTRAST:
        raise UserError(BLANK)
    foreground = foreground / contrast
    middle = np.median(foreground)
    noise = 4 * 1.4826 * float(np.median(np.abs(foreground - middle)))  # robust standard deviation
    floor = min(0.5, max(0.25, float(middle) + noise))
    return _sharp(np.where(foreground > floor, foreground.clip(0, 1), 0).astype(np.float32), gray)


def _is_dark(gray: NDArray[np.float32]) -> bool:
    """Return whether the digit is darker than its background.

    In a small block, lines cover less than half of the area, so that the median is the background's. Edges of shadows vote for
    both sides. The blocks at the border may show a table.
    """
    votes = 0.0
    for rows in np.array_split(gray, BLOCKS, axis=0)[1:-1]:
        for block in np.array_split(rows, BLOCKS, axis=1)[1:-1]:
            if block.size:
                low, middle, high = np.quantile(block, (0.02, 0.5, 0.98))
                votes += (middle - low) - (high - middle)
    return votes > 0


def _sharp(foreground: NDArray[np.float32], gray: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the foreground without components that have no sharp edge, such as the core of a shadow."""
    components = _components(foreground)
    edges = np.asarray(ndimage.maximum(ndimage.gaussian_gradient_magnitude(gray, 1), components, range(1, components.max() + 1)))
    return _keep_components(foreground, components, np.flatnonzero(edges >= SHARP * edges.max(initial=0)) + 1)


def _border(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the outermost pixels of (h, w, ...): (n, ...)."""
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def _components(foreground: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return the number of the connected component that each pixel belongs to, 0 for the background: (h, w)."""
    components, _ = ndimage.label(foreground > 0, structure=np.ones((3, 3)))
    return np.asarray(components)


def _keep_components(
    foreground: NDArray[np.float32], components: NDArray[np.int32], kept: NDArray[np.int64]
) -> NDArray[np.float32]:
    return np.where(np.isin(components, kept), foreground, 0).astype(np.float32)


def _edge_components(components: NDArray[np.int32]) -> set[int]:
    """Return the components that cover more than half of a side of the border: the edge of a table, or of a shadow."""
    at_edge: set[int] = set()
    for side in (components[0], components[-1], components[:, 0], components[:, -1]):
        numbers, counts = np.unique(side[side > 0], return_counts=True)
        at_edge |= {int(number) for number, count in zip(numbers, counts, strict=True) if count > 0.5 * len(side)}
    return at_edge


def _without_dirt(foreground: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the foreground without dirt: components along the border, and small ones."""
    components = _components(foreground)
    at_edge = _edge_components(components)
    numbers = np.array([number for number in range(1, components.max() + 1) if number not in at_edge] or sorted(at_edge))
    if not numbers.size:
        raise UserError(BLANK)
    amounts = np.asarray(ndimage.sum(foreground, components, numbers))
    return _keep_components(foreground, components, numbers[amounts >= MIN_COMPONENT * amounts.max()])


def _placed(small: NDArray[np.uint8], top: int, left: int, side: int) -> NDArray[np.uint8]:
    """Return `small` on black at a position that is moved as little as possible so that all of it is visible."""
    height, width = small.shape
    top, left = min(max(top, 0), side - height), min(max(left, 0), side - width)
    image = np.zeros((side, side), dtype=np.uint8)
    image[top : top + height, left : left + width] = small
    return image


def as_images(array: NDArray[Any], side: int, channels: int) -> NDArray[np.uint8]:
    """Return images of the model's size as bytes: uint8 (n, side, side), or with several channels (n, side, side, channels).

    Args:
        array: Numbers from 0 to 255, or from 0 to 1: (n, side, side) or (n, side, side, channels).
        side: Height and width of the model's images.
        channels: Channels of the model's images.

    Raises:
        UserError: The array has another shape, is empty, or contains other values.
    """
    shapes = [(side, side), (side, side, 1)] if channels == 1 else [(side, side, channels)]
    if array.dtype.kind not in "buif" or array.size == 0 or array.shape[1:] not in shapes:
        expected = " or ".join(f"(n, {', '.join(map(str, shape))})" for shape in shapes)
        remedy = "Make Pillow images of pictures of another size: Image.fromarray(array)."
        raise UserError.invalid("images", f"{array.dtype} {array.shape}", f"numbers of shape {expected}", remedy)
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 255):  # also not a number
        raise UserError.invalid("images", f"{low:g} to {high:g}", "numbers from 0 to 255, or from 0 to 1")
    if high <= 1:
        array = array * 255.0
    images: NDArray[np.uint8] = array.round().astype(np.uint8).reshape(-1, *shapes[0])
    return images
