"""Command: classify pictures of digits: python -m mnist_exp.predict --model latest FILE..."""

import argparse
import os
import sys
from pathlib import Path

from mnist_exp.cli import open_store, parser, reported_errors
from mnist_exp.errors import UserError

MAX_SHOWN = 50  # rows of the table in the terminal


def main() -> None:
    """Classify the pictures of the command line. Exit with status 1 if one has no prediction."""
    options = parser("predict", __doc__)
    options.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a picture of one digit, or a folder of pictures")
    options.add_argument(
        "--model", default="latest", help="a run (its id or the start of one), latest, models:/NAME@ALIAS, or a folder"
    )
    options.add_argument(
        "--as-is", action="store_true", help="take gray pictures of the model's size, a light digit on black, without preparation"
    )
    options.add_argument("--out", type=Path, metavar="CSV", help="write the predictions to this file")
    options.add_argument("--sheet", type=Path, metavar="PNG", help="show each picture as given and as the network sees it")
    arguments = options.parse_args()
    with reported_errors():
        if predict(arguments):
            sys.exit(1)


def check_output(option: str, path: Path | None, suffix: str) -> None:
    """Raise UserError unless a file can be written, before thousands of pictures are read in vain."""
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise UserError.invalid(option, path, f"a name that ends with {suffix}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError.invalid(option, path, "a file in a folder that exists and can be written")


def predict(arguments: argparse.Namespace) -> int:
    """Classify the files, show and write the predictions; return the number of files without one."""
    from mnist_exp.console import progress, show_lines, show_table
    from mnist_exp.serving.classifier import load_from
    from mnist_exp.serving.files import find_files, predict_files, write_sheet, write_table

    check_output("--out", arguments.out, ".csv")
    check_output("--sheet", arguments.sheet, ".png")
    files = find_files(arguments.files)
    classifier = load_from(open_store(arguments), arguments.model)
    with progress("predict", len(files)) as advance:
        results = predict_files(classifier, files, arguments.as_is, advance)
    read, failed = [[item for item in results if bool(item.error) == is_error] for is_error in (False, True)]
    if read:
        show_table(
            [
                {
                    "file": item.shown_name,
                    "label": str(item.label),
                    "probability": f"{item.probability:.1%}",
                    "runner-up": str(item.runner_up),
                }
                for item in read[:MAX_SHOWN]
            ]
        )
    show_lines([f"{item.shown_name}: {item.error}" for item in failed[:MAX_SHOWN]], stderr=True)
    if len(read) > MAX_SHOWN or len(failed) > MAX_SHOWN:
        remedy = f"{arguments.out} has all of them" if arguments.out else "--out FILE.csv writes all of them to a file"
        show_lines([f"{len(read):,} predictions, {len(failed):,} errors: {remedy}."])
    show_lines([f"Model: {classifier.source.title}"])
    if arguments.out:
        write_table(arguments.out, results)
    if arguments.sheet:
        write_sheet(arguments.sheet, results)
    return len(failed)


if __name__ == "__main__":
    main()
