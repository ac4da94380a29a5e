"""Measure how well the preparation of pictures undoes what a user may do to a digit.

    python scripts/preparation.py --model latest [--count 10000] [--sheet FILE] [--photos 500]

Every test image is drawn enlarged, shifted, and colored or inverted, with one transformation per image that the seed fixes. The
script prints the accuracy on the originals, on the prepared drawings, and on drawings that are only scaled to the model's size.
With --photos, it also simulates that many photos of each scene: a pen on paper in uneven light, with noise, as JPEG files.
"""

import argparse
import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mnist_exp.api import load
from mnist_exp.errors import UserError
from mnist_exp.learning.datasets import load_mnist
from mnist_exp.paths import HOME
from mnist_exp.serving.classifier import Classifier, Predictions

SCENES = ("even", "dark corners", "hard shadow", "soft shadow", "round shadow", "lamp", "table", "pencil", "light ink")
FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS)


def transformed(image: NDArray[np.uint8], random: np.random.Generator) -> Image.Image:
    """Return a digit, light on black, as a larger picture in two colors."""
    side = int(random.integers(60, 400))
    digit = Image.fromarray(image).resize((side, side), FILTERS[random.integers(len(FILTERS))])
    size = (side + int(random.integers(0, side)), side + int(random.integers(0, side)))
    corner = (int(random.integers(0, size[0] - side + 1)), int(random.integers(0, size[1] - side + 1)))
    mask = Image.new("L", size)
    mask.paste(digit, corner)
    while True:
        paper, ink = (tuple(int(value) for value in random.integers(0, 256, 3)) for _ in range(2))
        if abs(np.mean(paper) - np.mean(ink)) > 60:  # one that a person can read
            return Image.composite(Image.new("RGB", size, ink), Image.new("RGB", size, paper), mask)


def photo(image: NDArray[np.uint8], scene: str, random: np.random.Generator) -> Image.Image:
    """Return a digit, light on black, as a photo of dark ink on paper, 600 x 800; scene: one of SCENES."""
    width, height = 600, 800
    side = int(random.integers(200, 450))
    top, left = int(random.integers(40, height - side - 40)), int(random.integers(40, width - side - 40))
    digit = np.zeros((height, width))
    digit[top : top + side, left : left + side] = np.asarray(Image.fromarray(image).resize((side, side))) / 255
    is_light = scene == "light ink"
    paper, ink = (0.15, 0.85) if is_light else (0.85, 0.5 if scene == "pencil" else 0.15)
    reflected = paper + (ink - paper) * digit
    if scene == "table":
        reflected[:, : int(random.integers(18, 48))] = 0.35
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    angle, offset, center = random.uniform(0, 2 * np.pi), random.uniform(-0.4, 0.4), random.uniform(-0.5, 0.5, 2)
    across = np.cos(angle) * x + np.sin(angle) * y - offset
    distance = (x - center[0]) ** 2 + (y - center[1]) ** 2
    light = {
        "dark corners": 1 - 0.25 * (x**2 + y**2),
        "pencil": 1 - 0.25 * (x**2 + y**2),
        "hard shadow": np.where(across > 0, 0.6, 1.0),
        "soft shadow": 1 - 0.45 / (1 + np.exp(-across / 0.15)),
        "round shadow": 1 - 0.5 * np.exp(-distance / 0.3),
        "lamp": 0.45 + 0.55 * np.exp(-distance / 0.6),
    }.get(scene, np.ones_like(x))
    gray = reflected * light + random.normal(0, 0.02, light.shape)
    color = (gray[..., None] * [1, 0.98, 0.93]).clip(0, 1) * 255
    file = io.BytesIO()
    Image.fromarray(color.astype(np.uint8)).save(file, "JPEG", quality=85)
    return Image.open(file)


def measure_photos(classifier: Classifier, images: NDArray[np.uint8], labels: NDArray[np.int64], seed: int) -> None:
    """Print the accuracy on photos of every scene."""
    for scene in SCENES:
        random = np.random.default_rng(seed)
        predictions = [label_of(classifier, photo(image, scene, random)) for image in images]
        print(f"{scene}: {(np.array(predictions) == labels).mean():.1%}")
    print(f"n = {len(images)} photos of each scene, seed {seed}")


def label_of(classifier: Classifier, picture: Image.Image) -> int:
    """Return the label of a picture, -1 if no digit is found."""
    try:
        return int(classifier(picture).labels[0])
    except UserError:
        return -1


def naive(picture: Image.Image, side: int) -> NDArray[np.uint8]:
    """Return a picture in the model's size without any other preparation: uint8 (side, side)."""
    return np.asarray(picture.convert("L").resize((side, side)))


def compare(classifier: Classifier, images: NDArray[np.uint8], seed: int) -> dict[str, Predictions]:
    """Return the predictions for n images: of the originals, of the prepared drawings, and of those that are only scaled."""
    random = np.random.default_rng(seed)
    prepared, scaled = [], []
    for image in images:
        picture = transformed(image, random)
        try:
            prepared.append(classifier.prepare_picture(picture))
        except UserError:
            prepared.append(np.zeros_like(image))
        scaled.append(naive(picture, classifier.data.side))
    forms = {"originals": images, "prepared": np.stack(prepared), "only scaled": np.stack(scaled)}
    return {name: classifier.classify(form) for name, form in forms.items()}


def write_worst(
    file: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], predictions: dict[str, Predictions], seed: int
) -> None:
    """Write a sheet of the 20 images whose labels lose most probability by being drawn and prepared.

    It shows the original, the drawing, and the image that the network sees.
    """
    rows = np.arange(len(labels))
    before, after = (predictions[name].probabilities[rows, labels] for name in ("originals", "prepared"))
    random = np.random.default_rng(seed)
    pictures = [transformed(image, random) for image in images]
    sheet = Image.new("RGB", (4 * 270, 5 * 106), "white")
    for position, index in enumerate((after - before).argsort()[:20]):
        left, top = (position % 4) * 270, (position // 4) * 106
        pictures[index].thumbnail((80, 80))
        for column, picture in enumerate((images[index], pictures[index], predictions["prepared"].images[index])):
            shown = picture if isinstance(picture, Image.Image) else Image.fromarray(picture).resize((80, 80))
            sheet.paste(shown, (left + 84 * column, top + 20))
        label = predictions["prepared"].labels[index]
        text = f"{index}: {labels[index]} at {before[index]:.0%}, {label} after, {after[index]:.0%}"
        ImageDraw.Draw(sheet).text((left, top + 4), text, fill="black")
    sheet.save(file)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="latest")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--photos", type=int, default=0)
    arguments = parser.parse_args()
    test = load_mnist(None, 0.02, 0, 0, os.environ.get("MNIST_ROOT", str(HOME / "data"))).splits["test"]
    images, labels = test.images[: arguments.count, 0].numpy(), test.labels[: arguments.count].numpy()
    classifier = load(arguments.model)
    if arguments.photos:
        chosen = np.random.default_rng(arguments.seed).permutation(len(test))[: arguments.photos]
        measure_photos(classifier, test.images[chosen, 0].numpy(), test.labels[chosen].numpy(), arguments.seed)
    predictions = compare(classifier, images, arguments.seed)
    for name, form in predictions.items():
        print(f"{name}: {(form.labels == labels).mean():.2%}")
    print(f"n = {len(images)}, one transformation per image, seed {arguments.seed}, model {arguments.model}")
    if arguments.sheet:
        write_worst(arguments.sheet, images, labels, predictions, arguments.seed)


if __name__ == "__main__":
    main()
