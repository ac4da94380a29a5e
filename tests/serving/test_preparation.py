"""Pictures of any size, mode and color become images as MNIST's authors prepared theirs."""

import re

import numpy as np
import pytest
from PIL import Image, ImageDraw
from preparation import SCENES, photo

from mnist_exp.errors import UserError
from mnist_exp.serving.preparation import as_images, prepare, to_bytes

SIDE = 28


def seven(size: tuple[int, int] = (300, 200), ink="black", paper="white", mode: str = "RGB") -> Image.Image:
    """A picture of a 7."""
    picture = Image.new("RGB", size, paper)
    width = max(2, size[1] // 14)
    ImageDraw.Draw(picture).line([(60, 40), (150, 40), (100, 160)], fill=ink, width=width, joint="curve")
    return picture.convert(mode)


def ink_box(image: np.ndarray) -> tuple[int, int]:
    rows, columns = (np.flatnonzero((image > 0).any(axis)) for axis in (1, 0))
    return int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F", "LA"])
def test_every_mode_gives_the_same_image(mode: str) -> None:
    expected, found = prepare(seven(), SIDE), prepare(seven(mode=mode), SIDE)
    assert found.shape == (SIDE, SIDE)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected.astype(int)).mean() < 4


@pytest.mark.parametrize(("ink", "paper"), [("white", "black"), ("red", "green"), ("#777", "#bbb"), ("yellow", "navy")])
def test_colors_and_polarity_do_not_matter(ink: str, paper: str) -> None:
    found = prepare(seven(ink=ink, paper=paper), SIDE)
    assert np.abs(found.astype(int) - prepare(seven(), SIDE).astype(int)).mean() < 4


def test_the_digit_fills_a_box_of_20_pixels_and_is_centered_by_mass() -> None:
    found = prepare(seven(), SIDE)
    assert max(ink_box(found)) == 20
    y, x = np.indices(found.shape)
    center = [float((axis * found).sum() / found.sum()) for axis in (y, x)]
    assert center == pytest.approx([13.5, 13.5], abs=0.6)


def test_a_shadow_noise_and_specks_are_no_ink() -> None:
    pixels = np.asarray(seven()).astype(float)
    shadow = np.linspace(0.6, 1, pixels.shape[1])[None, :, None]
    noisy = pixels * shadow + np.random.default_rng(0).normal(0, 3, pixels.shape)
    picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    picture.putpixel((290, 190), (0, 0, 0))
    assert np.abs(prepare(picture, SIDE).astype(int) - prepare(seven(), SIDE).astype(int)).mean() < 6


def test_the_polarity_can_be_given() -> None:
    assert (prepare(seven(), SIDE, invert=True) == prepare(seven(), SIDE)).mean() > 0.99
    with pytest.raises(UserError, match="no digit found"):
        prepare(seven(), SIDE, invert=False)


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (1000, 3)])
def test_a_blank_picture_has_no_digit(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="no digit found"):
        prepare(Image.new("RGB", size, "gray"), SIDE)


def test_arrays_are_read_in_every_usual_shape() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE)).astype(np.uint8)
    for form in (images, images[:, None], images[..., None], images.reshape(5, -1)):
        assert (np.stack(as_images(form, SIDE)) == images).all()
    for form in (images, images.astype(float), images / 255):
        assert (to_bytes(form) == images).all()
    color = np.zeros((2, 40, 50, 3), np.uint8)
    for form in (color, np.moveaxis(color, 3, 1)):
        assert [image.shape for image in as_images(form, SIDE)] == [(40, 50, 3)] * 2
    assert [image.shape for image in as_images(images[0][..., None], SIDE)] == [(SIDE, SIDE)]
    assert to_bytes(images > 100).max() == 255
    for shape in ((5,), (3, 300, 300), (2, 5, 40, 40)):
        with pytest.raises(UserError, match=re.escape(f"an array of shape {shape} holds no images")):
            as_images(np.zeros(shape), SIDE)


@pytest.mark.parametrize("scene", SCENES)
def test_shadows_and_tables_are_none_of_the_digit(scene: str) -> None:
    digit = np.asarray(seven((100, 100), "white", "black", "L").resize((SIDE, SIDE)))
    random = np.random.default_rng(1)
    expected = prepare(photo(digit, "even", np.random.default_rng(1)), SIDE).astype(int)
    assert (
        np.abs(prepare(photo(digit, scene, random), SIDE) - expected).mean() < 12
    )  # of 255; a shadow that counts as ink makes it 40


def test_a_light_digit_on_transparent_background_is_read() -> None:
    expected = prepare(seven(), SIDE)
    for ink in ("white", "black"):
        picture = Image.new("RGBA", seven().size)
        picture.paste(ink, mask=seven(ink="white", paper="black", mode="L"))
        assert np.abs(prepare(picture, SIDE).astype(int) - expected).mean() < 6


@pytest.mark.parametrize(
    "values", [np.full((SIDE, SIDE), -1.0), np.full((SIDE, SIDE), np.nan), np.array("x"), np.zeros((0, 28, 28))]
)
def test_values_that_are_no_image_are_named(values: np.ndarray) -> None:
    with pytest.raises(UserError, match="expected"):
        to_bytes(as_images(values, SIDE)[0])
