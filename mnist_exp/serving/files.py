"""Predictions for files: found, classified in batches, and written as tables and as a sheet of pictures."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from mnist_exp.errors import UserError
from mnist_exp.serving.classifier import BATCH_SIZE, Classifier, open_picture
from mnist_exp.serving.preparation import flatten

TILE = 84  # pixels of a picture on the sheet
COLUMNS = 6  # pairs of pictures on a row of the sheet
MAX_ON_SHEET = 600


@dataclass(frozen=True)
class FilePrediction:
    """What a model says of the picture in a file.

    Args:
        file: The path as typed.
        label: The most probable class, None after an error.
        probability: Its probability.
        runner_up: The second most probable class.
        error: The reason why there is no prediction, empty without an error.
        seen: The image as the network sees it: uint8 (side, side).
    """

    file: str
    label: int | None = None
    probability: float | None = None
    runner_up: int | None = None
    error: str = ""
    seen: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)

    @property
    def shown_name(self) -> str:
        """The path as text for the terminal: names of files may contain bytes that are no text."""
        return os.fsencode(self.file).decode("utf-8", "replace")

    def as_row(self) -> dict[str, Any]:
        """Return the prediction without the image."""
        return {key: value for key, value in asdict(self).items() if key != "seen"}


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return files, and the pictures in folders in the order of their names; raises UserError for a folder without any."""
    suffixes = Image.registered_extensions().keys()
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(item for item in path.rglob("*") if item.suffix.lower() in suffixes and item.is_file())
            if not inside:
                raise UserError(f"{path} contains no pictures: expected files such as .png or .jpg.")
            found += inside
        else:
            found.append(path)
    return found


def predict_files(
    classifier: Classifier, files: Iterable[Path], invert: bool | None, advance: Callable[[int], None]
) -> list[FilePrediction]:
    """Classify the pictures in files, in their order; a file that cannot be used has an error and costs no other.

    Args:
        classifier: The model.
        files: The files.
        invert: As for `prepare`.
        advance: Called with the number of files that are done.
    """
    results: list[FilePrediction] = []
    batch: list[FilePrediction] = []
    for path in files:
        try:
            batch.append(FilePrediction(str(path), seen=classifier.prepare(path, invert)[0]))
        except UserError as error:
            batch.append(FilePrediction(str(path), error=str(error)))
        if len(batch) == BATCH_SIZE:
            results += _classified(classifier, batch)
            batch = []
        advance(1)
    return results + _classified(classifier, batch)


def _classified(classifier: Classifier, batch: Sequence[FilePrediction]) -> list[FilePrediction]:
    images = [item.seen for item in batch if item.seen is not None]
    if not images:
        return list(batch)
    found = classifier.classify(np.stack(images))
    ranked = found.probabilities.argsort(1)[:, ::-1]  # (n, classes)
    values = iter(zip(ranked.tolist(), found.probabilities.max(1).tolist(), strict=True))
    results = []
    for item in batch:
        if item.seen is None:
            results.append(item)
        else:
            order, probability = next(values)
            results.append(FilePrediction(item.file, order[0], probability, order[1], "", item.seen))
    return results


def write_table(path: Path, results: Sequence[FilePrediction]) -> None:
    """Write predictions as .csv or .json; raises UserError if the file cannot be written."""
    rows = [item.as_row() for item in results]
    try:
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            if path.suffix.lower() == ".json":
                json.dump(rows, file, indent=1, ensure_ascii=False)
            else:
                writer = csv.DictWriter(file, ["file", "label", "probability", "runner_up", "error"])
                writer.writeheader()
                writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}. Choose another path.") from error


def write_sheet(path: Path, results: Sequence[FilePrediction]) -> None:
    """Write a PNG that shows each picture as given and as the network sees it, with its prediction; raises UserError."""
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
        name = Path(item.shown_name).name[:16]
        draw.text((left + 1, top + 2), f"{item.label} ({item.probability:.0%}) {name}", fill="black")
    try:
        sheet.save(path, format="png")
    except OSError as error:
        raise UserError(f"--sheet {path} cannot be written: {error.strerror}. Choose another path.") from error
