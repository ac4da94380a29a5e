"""Command: list, show, compare, move and delete runs.

python -m mnist_exp.runs list | show | diff | best | prune | export | import | promote | reap | rerun
"""

import argparse
import os
import re
import sys
from pathlib import Path

from mnist_exp import HOME
from mnist_exp.cli import reported_errors
from mnist_exp.console import show_lines, show_pairs, show_table
from mnist_exp.errors import UserError
from mnist_exp.metrics import format_metric
from mnist_exp.overrides import command, store_uri
from mnist_exp.redaction import redact
from mnist_exp.tracking import tables
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.mlflow_store import MLflowStore, record_of

DAYS = {"h": 1 / 24, "d": 1.0, "w": 7.0}


def main() -> None:
    """Parse the command line and run the command; a user's mistake ends with a message and status 1."""
    arguments = parser().parse_args()
    if arguments.command == "rerun":
        os.execv(sys.executable, [sys.executable, "-m", "mnist_exp.run", f"rerun={arguments.run_id}"])
    with reported_errors():
        store = MLflowStore(store_uri(), arguments.experiment)
        arguments.run(store, arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Every command sets the function `run`, except rerun."""
    result = argparse.ArgumentParser(prog="python -m mnist_exp.runs", description=__doc__)
    result.add_argument("--experiment", default="mnist_exp", help="the MLflow experiment (default: mnist_exp)")
    result.add_argument("--output-dir", type=Path, default=HOME / "outputs", help="the folder of the runs' checkpoints")
    commands = result.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="list sweeps, their jobs, and single runs, the newest last")
    listing.add_argument("--sort", metavar="METRIC", help="list the runs that have this metric, the best first")
    listing.add_argument("--data", metavar="NAME", help="only runs on this data set")
    listing.add_argument("--last", type=positive, metavar="N", help="only the N newest runs")
    listing.set_defaults(run=list_runs)
    show = commands.add_parser("show", help="show a run's command, settings, metrics, model and paths")
    show.add_argument("run_id", metavar="ID", help="an id, or its first 6 or more digits")
    show.set_defaults(run=show_run)
    diff = commands.add_parser("diff", help="show how two runs differ: configuration, code, packages, machine, data, metrics")
    diff.add_argument("first", metavar="A")
    diff.add_argument("second", metavar="B")
    diff.set_defaults(run=diff_runs)
    best = commands.add_parser("best", help="print the command that trains the best arm of a sweep, by validation accuracy")
    best.add_argument("sweep", metavar="SWEEP", help="the id of a sweep, or latest")
    best.set_defaults(run=best_arm)
    prune = commands.add_parser("prune", help="show which old runs can be deleted; --yes deletes them and their files")
    prune.add_argument("--older-than", type=days, required=True, metavar="AGE", help="such as 30d, 12h or 4w, since their end")
    prune.add_argument("--keep-best", type=positive, default=5, metavar="N", help="keep the N best of each data set (default: 5)")
    prune.add_argument(
        "--by", default=tables.METRICS[0], metavar="METRIC", help=f"the metric of --keep-best (default: {tables.METRICS[0]})"
    )
    prune.add_argument("--yes", action="store_true", help="delete; this cannot be undone")
    prune.set_defaults(run=prune_runs)
    commands.add_parser(
        "reap", help="set runs to KILLED that are RUNNING in the store although their process is dead"
    ).set_defaults(run=reap_runs)
    export = commands.add_parser("export", help="write a sweep with its jobs, files and models to a new folder")
    export.add_argument("sweep", metavar="SWEEP", help="the id of a sweep, or latest")
    export.add_argument("folder", type=Path, metavar="FOLDER")
    export.set_defaults(run=export_sweep)
    importing = commands.add_parser("import", help="bring an exported sweep into this store as new runs")
    importing.add_argument("folder", type=Path, metavar="FOLDER")
    importing.set_defaults(run=import_sweep)
    promote = commands.add_parser("promote", help="register a model under a name, and point an alias to it")
    which = promote.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", dest="run_id", metavar="ID", help="the model of this run")
    which.add_argument("--sweep", metavar="ID", help="the best arm of this sweep (an id, or latest), if it beats the champion")
    promote.add_argument("--name", type=model_name, required=True, help="the name of the registered model")
    promote.add_argument("--alias", type=alias, default="champion", help="the alias (default: champion)")
    promote.set_defaults(run=promote_model)
    rerun = commands.add_parser("rerun", help="repeat a recorded run and compare the metrics")
    rerun.add_argument("run_id", metavar="ID")
    return result


def positive(text: str) -> int:
    """Return an integer >= 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected an integer >= 1")
    return int(text)


def model_name(text: str) -> str:
    """Return the name of a registered model."""
    if not (re.fullmatch(r"[^/:\s]([^/:]{0,98}[^/:\s])?", text) and text.isprintable()):
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected at most 100 characters, without / and :")
    return text


def alias(text: str) -> str:
    """Return an alias. MLflow reserves `latest` and the names of versions."""
    if not re.fullmatch(r"[\w-]{1,100}", text, re.ASCII) or re.fullmatch(r"latest|v\d+", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected a word such as champion, but not latest or v1")
    return text


def days(text: str) -> float:
    """Return an age such as 30d, 12h or 4w in days."""
    if not (found := re.fullmatch(r"(\d{1,5})([hdw])", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected a number and h, d or w, such as 30d")
    return int(found[1]) * DAYS[found[2]]


def reap_runs(store: MLflowStore, arguments: argparse.Namespace) -> None:
    """Correct the status of dead runs."""
    print(f"{reap(store, arguments.output_dir)} reaped")


def reap(store: MLflowStore, output_dir: Path) -> int:
    """Correct the status of dead runs, report them, and return their number."""
    reaped = store.reap(output_dir)
    show_lines([f"{record.run_id} ({record.name}): its process is dead, now KILLED" for record in reaped])
    return len(reaped)


def list_runs(store: MLflowStore, arguments: argparse.Namespace) -> None:
    """Show a table of the chosen runs."""
    reap(store, arguments.output_dir)
    records = store.runs()
    if not records:
        raise UserError(
            f"Experiment {arguments.experiment} in {redact(store.uri)} has no runs. Set MLFLOW_TRACKING_URI to the store with "
            "your runs, or start one: python -m mnist_exp.run."
        )
    if arguments.data or arguments.last:
        records = tables.choose(records, arguments.data, arguments.last)
    if arguments.sort:
        show_table(tables.ranking(records, arguments.sort), optional=tables.METRICS)
    else:
        show_table(tables.tree(records), optional=tables.METRICS[:1])


def show_run(store: MLflowStore, arguments: argparse.Namespace) -> None:
    """Show one run."""
    from mnist_exp.tracking.housekeeping import logged_models

    record = record_of(store.get_run(store.resolve_id(arguments.run_id)))
    show_pairs("Run", tables.overview(record))
    show_pairs("Settings", dict(sorted(record.params.items())))
    show_pairs("Metrics", {name: format_metric(name, value) for name, value in sorted(record.metrics.items())})
    folder = arguments.output_dir.absolute() / record.run_id
    lines = {
        "command": record.tags.get(tag.COMMAND, ""),
        "model": " ".join(f"models:/{model.model_id}" for model in logged_models(store, record)),
        "artifacts": record.artifacts,
        "folder": str(folder) if folder.is_dir() else "",
    }
    show_lines([f"{name}: {text}" for name, text in lines.items() if text])


def diff_runs(store: MLflowStore, arguments: argparse.Namespace) -> None:
    """Show the differences between two runs."""
    from mnist_exp.tracking.differences import differences

    first, second = (store.resolve_id(text) for text in (arguments.first, arguments.second))
    found = differences(store, first, second)
    for name, section in found.items():
        if section:
            columns = (name, f"A: {first[:8]}", f"B: {second[:8]}")
            show_table([dict(zip(columns, (key, *values), strict=True)) for key, values in section.items()])
    same = [name for name, section in found.items() if not section]
    show_lines([f"Identical: {', '.join(same)}."] if same else [])


def named_sweep(store: MLflowStore, text: str) -> str:
    """Return the id of a sweep that a user names by the start of its id, or latest."""
    return text if text == "latest" else store.resolve_id(text)


def best_arm(store: MLflowStore, arguments: argparse.Namespace) -> None:
    """Show the arms of a sweep, and the command that trains the best one."""
    from mnist_exp.sweep.summary import RANKED_BY, rank_arms

    sweep = named_sweep(store, arguments.sweep)
    parent, definition = store.find_sweep(sweep, finished_too=True)
    arms = rank_arms(definition.jobs, store.children(parent.run_id))
    if not arms:
        raise UserError(
            f"Sweep {parent.run_id} has no finished job with {RANKED_BY}, by which arms are ranked. Finish it, or start one with "
            "validation images, such as data=mnist_tuning."
        )
    rows = [{"arm": " ".join(arm.overrides), "n": str(arm.count), RANKED_BY: format_metric(RANKED_BY, arm.mean)} for arm in arms]
    show_table(rows)
    show_lines([command("run", *arms[0].overrides)])


def export_sweep(store: MLflowStore, arguments: argparse.Namespace) -> None:
    """Write a sweep to a folder."""
    from mnist_exp.tracking import transfer

    sweep = named_sweep(store, arguments.sweep)
    count = transfer.export_sweep(store, sweep, arguments.folder)
    show_lines([f"{count} runs and their sweep are in {arguments.folder}.", command("runs", "import", str(arguments.folder))])


def import_sweep(store: MLflowStore, arguments: argparse.Namespace) -> None:
    """Bring an exported sweep into the store."""
    from mnist_exp.tracking import transfer

    sweep_id, count = transfer.import_sweep(store, arguments.folder)
    show_lines([f"Sweep {sweep_id}: {count} runs added." if count else f"Sweep {sweep_id} is complete: nothing added."])


def promote_model(store: MLflowStore, arguments: argparse.Namespace) -> None:
    """Register a model and point the alias to it, or say why the champion stays."""
    from mnist_exp.tracking import registry

    before = registry.find_champion(store, arguments.name, arguments.alias)
    if arguments.run_id:
        record = record_of(store.get_run(store.resolve_id(arguments.run_id)))
        reason, tags = f"Promoted by hand: run {record.run_id}.", {}
    else:
        from mnist_exp.comparison.promotion import decide_by_sweep

        if before and not before.run_id:
            raise UserError(
                f"{arguments.name}@{arguments.alias}, version {before.version}, names no run, so that no arm can be compared "
                "with it. Promote a run of your choice with --run."
            )
        sweep = named_sweep(store, arguments.sweep)
        parent, definition = store.find_sweep(sweep, finished_too=True)
        decision = decide_by_sweep(store, parent, definition, before.run_id if before else None)
        if decision.run is None:
            show_lines([decision.reason])
            return
        record, reason, tags = decision.run, decision.reason, decision.tags | {"sweep": parent.run_id}
    source = registry.verified_model(store, record)
    version = registry.register(store, source, arguments.name, arguments.alias, reason, tags, before)
    show_lines([reason, f"models:/{arguments.name}@{arguments.alias} is version {version}, of run {record.run_id}."])


def prune_runs(store: MLflowStore, arguments: argparse.Namespace) -> None:
    """Show the runs that can be deleted, or delete them."""
    from mnist_exp.tracking import housekeeping

    output_dir = arguments.output_dir.absolute()
    reap(store, output_dir)
    plan = housekeeping.plan_pruning(store, output_dir, arguments.older_than, arguments.keep_best, arguments.by)
    sizes = {record.run_id: housekeeping.size(store, record, output_dir) for record in plan.runs}
    left = {}
    for record in plan.runs if arguments.yes else []:
        if reason := housekeeping.delete(store, record, output_dir):
            left[record.run_id] = reason
    rows = [
        tables.row(record.name, record) | {"MB": f"{sizes[record.run_id] / 1e6:.1f}", "error": left.get(record.run_id, "")}
        for record in plan.runs
    ]
    if rows:
        show_table(rows, optional=tables.METRICS)
    kept = "; ".join(f"{reason} ({count})" for reason, count in plan.kept.items()) or "none"
    freed = sum(size for run_id, size in sizes.items() if run_id not in left) / 1e6
    done = "deleted" if arguments.yes else "would be deleted; add --yes to delete them"
    show_lines([f"Kept: {kept}.", f"{len(plan.runs) - len(left)} runs, {freed:,.1f} MB: {done}."])
    if left:
        raise UserError(f"{len(left)} runs could not be deleted.")


if __name__ == "__main__":
    main()
