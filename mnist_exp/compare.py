"""Command: from a sweep or a table of runs to an answer.

python -m mnist_exp.compare latest --factor model --baseline plain_cnn
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_exp import cli
from mnist_exp.errors import UserError
from mnist_exp.overrides import command

if TYPE_CHECKING:
    from mnist_exp.comparison.arms import Arms
    from mnist_exp.tracking.base import Store, Sweep

REPORT, PICTURE = "report.html", "differences.png"


def main() -> None:
    """Run the command line."""
    with cli.reported_errors():
        arguments = cli.parse(parser())
        compare(arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = cli.parser("compare", "Compare the runs of sweeps, paired by seed, with an interval and a verdict.")
    result.add_argument("sweeps", nargs="*", metavar="SWEEP", help="the id of a sweep, its start, or latest (default: latest)")
    result.add_argument("--factor", metavar="KEY", help="the key whose values are compared (default: the only one, seeds aside)")
    result.add_argument("--baseline", metavar="VALUE", help="the value that the others are compared with (default: the first)")
    result.add_argument(
        "--metric", dest="metrics", nargs="+", metavar="NAME", help="metrics; the first decides (default: accuracy, loss, times)"
    )
    result.add_argument(
        "--margin",
        type=margin,
        metavar="NUMBER",
        help="the smallest difference that matters, as displayed (accuracy: 0.05)",
    )
    result.add_argument("--results", nargs="+", type=Path, metavar="CSV", help="tables from --export, in place of sweeps")
    result.add_argument("--export", type=cli.file_of(".csv"), metavar="CSV", help="write the runs to a table")
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


def compare(arguments: argparse.Namespace) -> None:
    """Show the answer, and publish a report in the parents of the sweeps."""
    from mnist_exp.comparison import arms, outcomes, report, tables, wording
    from mnist_exp.console import show_comparison, show_lines
    from mnist_exp.learning.datasets import find_test_images
    from mnist_exp.tracking.base import OUTCOME, Answer

    settings = cli.default_settings()
    sweeps: list[Sweep] = []
    if arguments.results:
        sources = tables.read_tables(arguments.results)
    else:
        store = cli.find_store(settings)
        sweeps = find_sweeps(store, arguments.sweeps or ["latest"])
        sources = [arms.source_of(store, sweep) for sweep in sweeps]
    if arguments.export:
        tables.write_table(arguments.export, sources)
    compared = arms.arrange(sources, arguments.factor, arguments.baseline)
    metrics = arms.choose_metrics(compared, arguments.metrics)
    rows = arms.compare_arms(compared, metrics, arguments.margin)
    levels = arms.compare_levels(compared, rows[0].metric)
    headline = wording.headline(compared, rows)
    show_comparison(wording.table(rows), headline, wording.notes(compared, rows, levels))
    if not sweeps:  # a table has neither histories nor a run to publish in
        return
    found = store.read_artifacts(compared.records, OUTCOME)
    parsed = {record.run_id: outcomes.parse_outcome(found.get(record.run_id, b"")) for record in compared.records}
    repeated = commands(sweeps, compared, arguments)
    images, record = None, compared.records[0]
    with suppress(UserError):  # a damaged file
        root = settings.data.get("root") or settings.data.get("default_root")
        images = find_test_images(record.data, root, record.digests.get("test", ""))
    for sweep in sweeps:
        page = report.render(compared, rows, levels, parsed, sweep.record, repeated, images, store.page)
        with tempfile.TemporaryDirectory() as folder:
            answer = Answer(Path(folder) / REPORT, Path(folder) / PICTURE, headline, arms.answer_metrics(compared, rows))
            answer.report.write_text(page, encoding="utf-8")
            report.draw_differences(rows, answer.picture)
            show_lines([f"Report: {store.publish(sweep.run_id, answer)}"])


def find_sweeps(store: "Store", ids: Sequence[str]) -> "list[Sweep]":
    """Return sweeps, each once, in the order of their start."""
    sweeps = {sweep.run_id: sweep for sweep in map(store.find_sweep, ids)}
    return sorted(sweeps.values(), key=lambda sweep: sweep.record.started)


def commands(sweeps: "Sequence[Sweep]", arms: "Arms", arguments: argparse.Namespace) -> list[str]:
    """Return the shell commands that repeat the sweeps, their extensions, and the comparison."""
    repeated = []
    for sweep in sweeps:
        search = ["hydra/sweeper=optuna", f"hydra.sweeper.n_trials={sweep.total}"] if sweep.sweeper == "optuna" else []
        first, *added = sweep.grids
        repeated.append(command("run", "-m", *search, *first))
        repeated += [command("run", "-m", "sweep.extend=latest", *grid) for grid in added]
    options = ["--metric", *arguments.metrics] if arguments.metrics else []
    options += ["--margin", str(arguments.margin)] if arguments.margin else []
    ids = [sweep.run_id for sweep in sweeps]
    return [*repeated, command("compare", *ids, "--factor", arms.factor, "--baseline", arms.baseline, *options)]


if __name__ == "__main__":
    main()
