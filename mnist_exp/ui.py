"""Command: start the MLflow UI and print links to its pages: python -m mnist_exp.ui [ID] [--view NAME] [--port PORT]."""

import argparse

from mnist_exp import cli
from mnist_exp.tracking.views import PORT, VIEWS


def main() -> None:
    """Run the command line."""
    with cli.reported_errors():
        arguments = cli.parse(parser())
        cli.find_store().show_ui(arguments.run_id, arguments.view, arguments.port)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = cli.parser("ui", "Start the MLflow UI, and print links to its pages.")
    result.add_argument(
        "run_id",
        nargs="?",
        metavar="ID",
        help="open this run or sweep: its id, the start of it, or latest (default: the newest compared sweep)",
    )
    result.add_argument("--view", choices=VIEWS, help="open this saved view; curves are those of a sweep")
    result.add_argument("--port", type=cli.count, default=PORT)
    return result


if __name__ == "__main__":
    main()
