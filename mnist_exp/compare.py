"""Command: from a sweep or a table of runs to an answer.

python -m mnist_exp.compare latest --factor model --baseline plain_cnn
"""

import argparse
import math
from pathlib import Path

from mnist_exp import cli


def main() -> None:
    """Run the command line."""
    with cli.reported_errors():
        arguments = cli.parse(parser())
        from mnist_exp.comparison.answers import compare  # after the command line is parsed: it takes seconds to import

        compare(arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = cli.parser("compare", "Compare the runs of sweeps, paired by seed, with an interval and a verdict.")
    result.add_argument("sweeps", nargs="*", metavar="SWEEP", help="the id of a sweep, its start, or latest (default: latest)")
    result.add_argument(
        "--factor", metavar="KEY", help="the key whose values are compared (default: each that varies, seeds aside)"
    )
    result.add_argument("--baseline", metavar="VALUE", help="the value that the others are compared with (default: the first)")
    result.add_argument(
        "--metric",
        dest="metrics",
        nargs="+",
        metavar="NAME",
        help="metrics; the first is compared, of the others the means are shown (default: accuracy, loss, time and parameters)",
    )
    result.add_argument(
        "--margin",
        type=margin,
        metavar="NUMBER",
        help="the smallest difference that matters, as displayed (accuracy: 0.05)",
    )
    result.add_argument("--pairs", choices=["all"], help="compare all pairs of values, not only with the baseline")
    result.add_argument(
        "--results", nargs="+", type=Path, metavar="CSV", help="tables of runs, such as those of --export, in place of sweeps"
    )
    result.add_argument(
        "--images", action="store_true", help="give the interval for new images, too, from the mistakes of every run"
    )
    result.add_argument("--export", type=cli.file_to_write(".csv"), metavar="CSV", help="write the runs to a table")
    result.add_argument(
        "--report", type=cli.file_to_write(".html"), metavar="HTML", help="write the report to a file, and its picture beside it"
    )
    return result


def margin(text: str) -> float:
    """Return a margin of the command line."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected a number > 0")
    return number


if __name__ == "__main__":
    main()
