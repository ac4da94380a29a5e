"""Command: classify pictures: python -m mnist_exp.predict --model latest FILE..."""

import argparse
import sys
from pathlib import Path

from mnist_exp import cli

MAX_SHOWN = 50  # rows of the table in the terminal


def main() -> None:
    """Run the command line; the status is 1 if a file has no prediction."""
    with cli.reported_errors():
        arguments = cli.parse(parser())
        if predict(arguments):
            sys.exit(1)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = cli.parser("predict", "Classify pictures.")
    result.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a picture, or a folder of pictures")
    result.add_argument(
        "--model", default="latest", help="a run (its id or the start of one), latest, models:/NAME@ALIAS, or a folder"
    )
    result.add_argument("--as-is", action="store_true", help="the files are images as the network expects them: change nothing")
    result.add_argument("--out", type=cli.file_to_write(".csv"), metavar="CSV", help="write the predictions to a table")
    result.add_argument(
        "--sheet", type=cli.file_to_write(".png"), metavar="PNG", help="show each picture as given and as the network sees it"
    )
    return result


def predict(arguments: argparse.Namespace) -> int:
    """Classify the files, show and write the predictions; return the number of files without one."""
    from mnist_exp.console import show_lines, show_table, show_warning, tracked
    from mnist_exp.serving.classifier import load_from
    from mnist_exp.serving.files import find_files, predict_files, write_sheet, write_table

    files = find_files(arguments.files)
    classifier = load_from(cli.default_settings(), arguments.model)
    results = predict_files(classifier, tracked(files), arguments.as_is)
    read, failed = [[item for item in results if bool(item.error) == is_error] for is_error in (False, True)]
    if read:
        show_table(
            [
                {
                    "file": item.file,
                    "label": item.label,
                    "probability": f"{item.probability:.1%}",
                    "runner-up": item.runner_up,
                }
                for item in read[:MAX_SHOWN]
            ]
        )
    show_lines([f"{item.file}: {item.error}" for item in failed[:MAX_SHOWN]], stderr=True)
    if len(read) > MAX_SHOWN or len(failed) > MAX_SHOWN:
        remedy = f"{arguments.out} has all of them" if arguments.out else "--out FILE.csv writes all of them to a file"
        show_lines([f"{len(read):,} predictions, {len(failed):,} errors: {remedy}."])
    if classifier.warning:
        show_warning(classifier.warning)
    show_lines([f"Model: {classifier.summary}"])
    if arguments.out:
        write_table(arguments.out, results)
    if arguments.sheet:
        write_sheet(arguments.sheet, results)
    return len(failed)


if __name__ == "__main__":
    main()
