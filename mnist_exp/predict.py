"""Command: classify pictures of digits: python -m mnist_exp.predict --model latest FILE..."""

import argparse
import os
import sys
from pathlib import Path

from mnist_exp.cli import reported_errors
from mnist_exp.errors import UserError

MAX_SHOWN = 50  # rows of the table in the terminal
INVERT = {"auto": None, "yes": True, "no": False}


def main() -> None:
    """Parse the command line, classify, print; the status is 1 if a file has no prediction."""
    arguments = parser().parse_args()
    with reported_errors():
        if predict(arguments):
            sys.exit(1)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(prog="python -m mnist_exp.predict", description=__doc__)
    result.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a picture of one digit, or a folder of pictures")
    result.add_argument(
        "--model", default="latest", help="a run (its id, or the first 6 or more digits), latest, models:/NAME@ALIAS, or a folder"
    )
    result.add_argument("--invert", choices=INVERT, default="auto", help="whether the digits are darker than their background")
    result.add_argument("--out", type=table_path, metavar="FILE", help="write the predictions to a .csv or .json file")
    result.add_argument(
        "--sheet", type=sheet_path, metavar="FILE", help="write a PNG with each picture as given and as the network sees it"
    )
    return result


def table_path(text: str) -> Path:
    """Return the path of a table."""
    if not text.lower().endswith((".csv", ".json")):
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected a name that ends with .csv or .json")
    return Path(text)


def sheet_path(text: str) -> Path:
    """Return the path of a sheet."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected a name that ends with .png")
    return Path(text)


def refuse_unwritable(option: str, path: Path | None) -> None:
    """Raise UserError if a file cannot be written, before thousands of pictures are read in vain."""
    if path and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise UserError(f"{option} {path} is invalid: it cannot be written. Choose a file in a folder that exists.")


def predict(arguments: argparse.Namespace) -> int:
    """Classify the files, show and write the predictions; return the number of files without one."""
    from mnist_exp.console import progress, show_lines, show_table
    from mnist_exp.serving import load
    from mnist_exp.serving.files import find_files, predict_files, write_sheet, write_table

    files = find_files(arguments.files)
    for option, path in (("--out", arguments.out), ("--sheet", arguments.sheet)):
        refuse_unwritable(option, path)
    classifier = load(arguments.model)
    with progress("predict", len(files)) as advance:
        results = predict_files(classifier, files, INVERT[arguments.invert], advance)
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
