"""Predictions for files: find them, classify them, write a table and a sheet of pictures."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from mnist_exp.errors import UserError
from mnist_exp.learning.pictures import FORMATS, find_pictures, flatten, open_picture
from mnist_exp.serving.classifier import Classifier

TILE = 84  # pixels of a picture on the sheet
COLUMNS = 6  # pairs of pictures on a row of the sheet
MAX_ON_SHEET = 600


@dataclass
class FilePrediction:
    """The prediction for the picture in a file.

    Args:
        file: The path as typed.
        label: The name of the most probable class, empty after an error.
        probability: Its probability.
        runner_up: The name of the second most probable class.
        error: The reason why there is no prediction, empty without an error.
        seen: The image as the network sees it: uint8 (side, side), or with several channels (side, side, channels).
    """

    file: str
    label: str = ""
    probability: float | None = None
    runner_up: str = ""
    error: str = ""
    seen: NDArray[np.uint8] | None = None


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return files, and the pictures in folders in the order of their names; raises UserError for a folder without any."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = find_pictures(path, "**/*")
            if not inside:
                raise UserError(f"{path} contains no pictures: expected files in the formats {', '.join(FORMATS)}.")
            files += inside
        else:
            files.append(path)
    return files


def predict_files(classifier: Classifier, files: Iterable[Path], as_is: bool) -> list[FilePrediction]:
    """Classify the pictures in files, in their order; a file that cannot be used has an error and costs no other.

    Args:
        classifier: The model.
        files: The files.
        as_is: As for `Classifier.prepare_picture`.
    """
    results = []
    for path in files:
        try:
            results.append(FilePrediction(str(path), seen=classifier.prepare_picture(path, as_is)))
        except UserError as error:
            results.append(FilePrediction(str(path), error=str(error)))
    read = [item for item in results if not item.error]
    images = [item.seen for item in results if item.seen is not None]
    if images:
        predictions = classifier.classify(np.stack(images))
        ranked = predictions.probabilities.argsort(1)[:, ::-1]  # (n, classes)
        for item, order, probability in zip(read, ranked.tolist(), predictions.probabilities.max(1).tolist(), strict=True):
            item.label, item.runner_up = (classifier.data.class_names[index] for index in order[:2])
            item.probability = probability
    return results


def write_table(path: Path, results: Sequence[FilePrediction]) -> None:
    """Write predictions as CSV."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "probability", "runner_up", "error"])
        writer.writerows([item.file, item.label, item.probability, item.runner_up, item.error] for item in results)


def write_sheet(path: Path, results: Sequence[FilePrediction]) -> None:
    """Write a PNG that shows each picture as given and as the network sees it, with its prediction."""
    shown = [item for item in results if item.seen is not None][:MAX_ON_SHEET]
    rows = max(1, -(-len(shown) // COLUMNS))
    cell = (2 * TILE + 12, TILE + 22)
    sheet = Image.new("RGB", (COLUMNS * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for position, item in enumerate(shown):
        assert item.seen is not None
        left, top = (position % COLUMNS) * cell[0], (position // COLUMNS) * cell[1]
        picture = flatten(open_picture(Path(item.file)))
        seen = Image.fromarray(item.seen).resize((TILE, TILE), Image.Resampling.NEAREST)
        sheet.paste(ImageOps.pad(picture, (TILE, TILE), color="#dddddd"), (left, top + 16))
        sheet.paste(seen, (left + TILE + 2, top + 16))
        name = Path(item.file).name[:16].encode(errors="replace").decode()  # it may contain bytes that are no text
        draw.text((left + 1, top + 2), f"{item.label} ({item.probability:.0%}) {name}", fill="black")
    sheet.save(path, format="png")
