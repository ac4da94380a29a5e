"""Answer a command line of `compare`: read its sweeps or tables, show the comparisons and publish their reports."""

import argparse
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, product
from pathlib import Path

import pandas as pd

from mnist_exp import cli
from mnist_exp.comparison import pairs, wording
from mnist_exp.comparison.history import add_mistakes, read_histories
from mnist_exp.comparison.pairs import Comparison
from mnist_exp.comparison.tables import read_tables
from mnist_exp.console import show_comparison, show_lines
from mnist_exp.errors import UserError
from mnist_exp.overrides import command, quoted
from mnist_exp.tracking.base import Answer, RunRecord, Store, Sweep, report_name
from mnist_exp.tracking.frame import SEED, frame
from mnist_exp.tracking.tags import COMMAND


def compare(arguments: argparse.Namespace) -> None:
    """Show an answer for each factor, of the sweeps or of the tables that the command line names."""
    if arguments.results and arguments.sweeps:
        raise UserError.invalid("--results", arguments.results[0], "no SWEEP besides it", "Compare either sweeps or tables.")
    if arguments.results:
        compare_tables(arguments)
    else:
        compare_sweeps(arguments)


def compare_tables(arguments: argparse.Namespace) -> None:
    """Show the answers of tables, and write the report that the command line asks for."""
    runs, remarks = read_tables(arguments.results, arguments.metrics or ())
    comparisons = show_answers(runs, arguments, remarks=remarks)
    if arguments.report:
        from mnist_exp.comparison import report  # takes a second to import

        write = partial(report.write, parent=None, records={}, histories={}, class_names=[], page=lambda _: None)
        write_report(write, [], comparisons, arguments)


def compare_sweeps(arguments: argparse.Namespace) -> None:
    """Show the answers of sweeps, publish a report of each in their parents, and write the one that the command line asks for."""
    store = cli.find_store()
    sweeps = find_sweeps(store, arguments.sweeps or ["latest"])
    jobs = [store.children(sweep.run_id) for sweep in sweeps]
    runs = frame(zip(sweeps, jobs, strict=True))
    records = {run.run_id: run for run in chain(*jobs) if run.status == "FINISHED"}
    histories = read_histories(store, records)
    if arguments.images:
        runs = add_mistakes(runs, histories)
    comparisons = show_answers(runs, arguments, objective=sweeps[0].objective)
    from mnist_exp.comparison import report  # takes a second to import

    names = class_names(store, records.values())
    write = partial(report.write, records=records, histories=histories, class_names=names, page=store.page)
    if arguments.report:
        write_report(partial(write, parent=sweeps[0]), sweeps, comparisons, arguments)
    show_lines(publish(store, sweeps, comparisons, write, arguments))
    show_lines(next_steps(store, sweeps, comparisons))


def show_answers(
    runs: pd.DataFrame, arguments: argparse.Namespace, *, objective: str = "", remarks: Sequence[str] = ()
) -> list[Comparison]:
    """Show and return the comparison of each factor, and write the table that the command line asks for.

    Args:
        runs: The table of runs.
        arguments: The command line.
        objective: The metric that decides the sweep; empty without one.
        remarks: Notes on the table.
    """
    if arguments.export:
        runs.to_csv(arguments.export, index=False)
    metrics = pairs.choose_metrics(runs, arguments.metrics, objective)
    comparisons, refusals = compare_factors(runs, arguments, metrics, remarks)
    if arguments.report and len(comparisons) > 1:
        factors = ", ".join(comparison.factor for comparison in comparisons)
        raise UserError.invalid("--report", arguments.report, f"one comparison, not those of {factors}", "Add --factor KEY.")
    for comparison in comparisons:
        show_comparison(
            wording.title(comparison),
            wording.subtitle(comparison),
            [wording.differences_table(comparison), wording.means_table(comparison)],
            wording.notes(comparison),
        )
    show_lines([f"{factor} is not compared: {refusal}" for factor, refusal in refusals.items()])
    return comparisons


def write_report(
    write: Callable[..., Path], sweeps: Sequence[Sweep], comparisons: Sequence[Comparison], arguments: argparse.Namespace
) -> None:
    """Write the report of the only comparison to the file that the command line names; the arguments are as in `publish`."""
    (comparison,) = comparisons
    write(arguments.report, comparison, commands=commands(sweeps, comparison, arguments))
    show_lines([f"Report: {arguments.report}"])


def find_sweeps(store: Store, ids: Sequence[str]) -> list[Sweep]:
    """Return sweeps, each once, in the order of their start; raises UserError on a search."""
    sweeps = {sweep.run_id: sweep for sweep in map(store.find_sweep, ids)}
    for sweep in sweeps.values():
        if sweep.sweeper != "grid":
            rank = command("runs", "best", sweep.run_id)
            raise UserError.invalid("sweep", sweep.run_id, "a grid: the trials of a search do not pair", f"`{rank}` ranks them.")
    return sorted(sweeps.values(), key=lambda sweep: sweep.started)


def compare_factors(
    runs: pd.DataFrame, arguments: argparse.Namespace, metrics: Sequence[str], remarks: Sequence[str]
) -> tuple[list[Comparison], dict[str, UserError]]:
    """Return the comparison of each factor, or of the chosen one, and the reasons why others cannot be compared.

    Raises:
        UserError: There is no factor, or none can be compared.
    """
    keys = pairs.varied_keys(runs, metrics)
    if not keys:
        remedy = "Sweep over one: model=se_cnn,plain_cnn."
        raise UserError("Nothing can be compared: no key varies besides the seed.", remedy=remedy)
    baseline, all_pairs, comparisons, refusals = arguments.baseline, arguments.pairs == "all", [], {}
    if baseline and not arguments.factor and not any((runs[key] == baseline).any() for key in keys):
        raise UserError.invalid("--baseline", baseline, f"a value of {' or '.join(keys)}")
    for factor in [arguments.factor] if arguments.factor else keys:
        own = baseline if arguments.factor or (runs[factor] == baseline).any() else None
        try:
            found = pairs.compare(
                runs, factor, own, metrics, arguments.margin, all_pairs=all_pairs, new_images=arguments.images, remarks=remarks
            )
            comparisons.append(found)
        except UserError as error:
            refusals[factor] = error
    if not comparisons:
        raise next(iter(refusals.values()))
    return comparisons, refusals


def class_names(store: Store, records: Iterable[RunRecord]) -> list[str]:
    """Return the names of the classes that runs distinguish, none if unknown."""
    with suppress(UserError, StopIteration):  # an unreadable recipe, or no finished run
        described = store.recipe(next(iter(records))).settings.data_description
        return described.class_names if described else []
    return []


def publish(
    store: Store,
    sweeps: Sequence[Sweep],
    comparisons: Sequence[Comparison],
    write: Callable[..., Path],
    arguments: argparse.Namespace,
) -> list[str]:
    """Add a report of each comparison to the parents of the sweeps; return a line for each.

    Args:
        store: The store of the sweeps.
        sweeps: The sweeps.
        comparisons: The comparisons.
        write: `report.write`, given the runs.
        arguments: The command line.
    """
    lines = []
    for comparison, sweep in product(comparisons, sweeps):
        with tempfile.TemporaryDirectory() as folder:
            factor = re.sub(r"[^-.\w]", "_", comparison.factor)
            file = Path(folder, report_name(factor))
            picture = write(file, comparison, commands=commands(sweeps, comparison, arguments), parent=sweep)
            title, subtitle, notes = wording.title(comparison), wording.subtitle(comparison), wording.notes(comparison)
            answer = Answer(factor, title, subtitle, notes, file, picture)
            lines.append(f"Report: {store.publish(sweep.run_id, answer)}")
    return lines


def next_steps(store: Store, sweeps: Sequence[Sweep], comparisons: Sequence[Comparison]) -> list[str]:
    """Return the commands that are the next step: the UI, and to finish the sweeps, to add seeds or to choose an arm."""
    hint, runs = store.ui_hint(sweeps[-1].run_id), comparisons[0].runs
    if any(sweep.status == "RUNNING" for sweep in sweeps):
        return [hint]
    ended = runs["status"].isin(["FINISHED", "DIVERGED"])
    if missing := [sweep for sweep in sweeps if sweep.run_id in set(runs["sweep"][~ended])]:
        return [hint, *(f"Next: {resume_command(sweep)}" for sweep in missing)]
    if len(sweeps) > 1:
        return [hint]
    (sweep,) = sweeps
    needed = [found[0] for comparison in comparisons if (found := wording.seeds_needed(comparison))]
    seeds = {int(seed or 0) for seed in runs[SEED] if not seed or seed.isdecimal()}
    more = max((number for number in needed if number), default=0) - len(seeds)
    if seeds and more > 0 and None not in needed:
        first = max(seeds) + 1
        grid = f"sweep.extend={quoted(sweep.run_id)}", f"seed=range({first},{first + more})"
        return [hint, f"Next: {command('run', '-m', *grid)}"]
    is_ranked = sweep.objective in runs and runs[sweep.objective].notna().any()
    return [hint, f"Next: {command('runs', 'best', sweep.run_id)}"] if is_ranked else [hint]


def resume_command(sweep: Sweep) -> str:
    """Return the command that resumes a sweep, with its launcher; no other option of Hydra is taken from a store."""
    launcher = re.findall(r"(?<= )hydra/launcher=\w+(?= )", sweep.tags.get(COMMAND, ""))
    return command("run", "-m", *launcher, f"sweep.resume={quoted(sweep.run_id)}")


def commands(sweeps: Iterable[Sweep], comparison: Comparison, arguments: argparse.Namespace) -> list[str]:
    """Return the shell commands that repeat the sweeps, their extensions, and the comparison."""
    repeated = []
    for sweep in sweeps:
        first, *added = sweep.grids
        repeated.append(command("run", "-m", *first))
        repeated += [command("run", "-m", "sweep.extend=latest", *grid) for grid in added]
    options = ["--metric", *arguments.metrics] if arguments.metrics else []
    options += ["--margin", str(arguments.margin)] if arguments.margin else []
    options += ["--pairs", "all"] if arguments.pairs else []
    options += ["--images"] if arguments.images else []
    runs = [sweep.run_id for sweep in sweeps] or ["--results", *map(str, arguments.results)]
    return [*repeated, command("compare", *runs, "--factor", comparison.factor, "--baseline", comparison.baseline, *options)]
