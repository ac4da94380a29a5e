"""Pictures of any size, mode and color become images as MNIST's authors prepared theirs."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from preparation import SCENES, photo

from mnist_exp.errors import UserError
from mnist_exp.serving.preparation import as_images, prepare

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
    expected, image = prepare(seven(), SIDE), prepare(seven(mode=mode), SIDE)
    assert image.shape == (SIDE, SIDE)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected.astype(int)).mean() < 4


@pytest.mark.parametrize(("ink", "paper"), [("white", "black"), ("red", "green"), ("#777", "#bbb"), ("yellow", "navy")])
def test_colors_and_polarity_do_not_matter(ink: str, paper: str) -> None:
    image = prepare(seven(ink=ink, paper=paper), SIDE)
    assert np.abs(image.astype(int) - prepare(seven(), SIDE).astype(int)).mean() < 4


def test_the_digit_fills_a_box_of_20_pixels_and_is_centered_by_mass() -> None:
    image = prepare(seven(), SIDE)
    assert max(ink_box(image)) == 20
    y, x = np.indices(image.shape)
    center = [float((axis * image).sum() / image.sum()) for axis in (y, x)]
    assert center == pytest.approx([13.5, 13.5], abs=0.6)


def test_a_shadow_noise_and_specks_are_no_ink() -> None:
    pixels = np.asarray(seven()).astype(float)
    shadow = np.linspace(0.6, 1, pixels.shape[1])[None, :, None]
    noisy = pixels * shadow + np.random.default_rng(0).normal(0, 3, pixels.shape)
    picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    picture.putpixel((290, 190), (0, 0, 0))
    assert np.abs(prepare(picture, SIDE).astype(int) - prepare(seven(), SIDE).astype(int)).mean() < 6


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (1000, 3)])
def test_a_blank_picture_has_no_digit(size: tuple[int, int]) -> None:
    with pytest.raises(UserError):
        prepare(Image.new("RGB", size, "gray"), SIDE)


def test_arrays_of_the_models_size_are_taken_as_they_are() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE)).astype(np.uint8)
    for form in (images, images[..., None], images.astype(float), images / 255):
        assert (as_images(form, SIDE, 1) == images).all()
    assert as_images(images > 100, SIDE, 1).max() == 255
    color = np.stack([images] * 3, axis=3)
    assert (as_images(color, SIDE, 3) == color).all()


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(shape)
        for shape in ((), (5,), (SIDE, SIDE), (2, 1, SIDE, SIDE), (2, 30, 30), (2, SIDE, SIDE, 3), (2, 784), (0, SIDE, SIDE))
    ]
    + [np.full((1, SIDE, SIDE), value) for value in (-1.0, 256, np.nan, "x")],
    ids=lambda values: f"{values.shape} {values.flat[0] if values.size else ''}",
)
def test_other_arrays_are_refused(values: np.ndarray) -> None:
    with pytest.raises(UserError) as error:
        as_images(values, SIDE, 1)
    assert error.value.key == "images"


@pytest.mark.parametrize("scene", SCENES)
def test_shadows_and_tables_are_none_of_the_digit(scene: str) -> None:
    digit = np.asarray(seven((100, 100), "white", "black", "L").resize((SIDE, SIDE)))
    expected, image = (prepare(photo(digit, name, np.random.default_rng(1)), SIDE).astype(int) for name in ("even", scene))
    assert np.abs(image - expected).mean() < 12, "of 255; a shadow that counts as ink makes it 40"


def test_a_light_digit_on_transparent_background_is_read() -> None:
    expected = prepare(seven(), SIDE)
    for ink in ("white", "black"):
        picture = Image.new("RGBA", seven().size)
        picture.paste(ink, mask=seven(ink="white", paper="black", mode="L"))
        assert np.abs(prepare(picture, SIDE).astype(int) - expected).mean() < 6
