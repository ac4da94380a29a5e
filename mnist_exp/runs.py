"""Command: list, show, compare, promote and delete runs.

python -m mnist_exp.runs list | show | diff | best | delete | prune | promote | reap
"""

import argparse
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from mnist_exp import cli
from mnist_exp.console import show_lines, show_pairs, show_table
from mnist_exp.errors import UserError
from mnist_exp.metrics import SHOWN, format_metric
from mnist_exp.overrides import command, key_of, section_of
from mnist_exp.paths import NAME, config_dirs
from mnist_exp.settings import Settings
from mnist_exp.sweep.summary import rank_arms
from mnist_exp.tracking import housekeeping, tables
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import RunRecord, Store

HOURS = {"h": 1, "d": 24, "w": 168}
AGE = "such as 7d, 12h or 4w"
RUN = "an id, its first 6 or more digits, or latest"


def main() -> None:
    """Run the command line."""
    with cli.reported_errors():
        arguments = cli.parse(parser())
        settings = cli.default_settings()
        arguments.run(cli.find_store(settings), settings, arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. Every command sets the function `run`."""
    result = argparse.ArgumentParser(prog=f"python -m {NAME}.runs", description=__doc__)
    commands = result.add_subparsers(required=True)

    def add(name: str, help_text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=help_text, description=help_text, parents=[cli.shared_options()], allow_abbrev=False
        )

    listing = add("list", "list sweeps and single runs, the newest last")
    listing.add_argument("--jobs", action="store_true", help="list the jobs of each sweep below it")
    listing.add_argument("--sort", metavar="METRIC", help="list the runs that have this metric, the best first")
    listing.add_argument("--data", metavar="NAME", help="only runs on this data set")
    listing.add_argument("--last", type=cli.count, metavar="N", help="only the N newest runs")
    listing.add_argument("--since", type=ago, default=0, metavar="AGE", help=f"only runs that started within AGE, {AGE}")
    listing.set_defaults(run=list_runs)
    show = add("show", "show a run's command, settings, metrics, model and paths")
    show.add_argument("run_id", metavar="RUN", help=RUN)
    show.set_defaults(run=show_run)
    diff = add("diff", "show how two runs differ: configuration, environment, data, metrics")
    diff.add_argument("first", metavar="A", help=RUN)
    diff.add_argument("second", metavar="B", help=RUN)
    diff.set_defaults(run=diff_runs)
    best = add("best", "print the command that trains the best arm of a sweep, by its objective")
    best.add_argument("sweep", nargs="?", default="latest", metavar="SWEEP", help=RUN)
    best.set_defaults(run=best_arm)
    delete = add("delete", "delete runs and their folders; a sweep with all its jobs")
    delete.add_argument("run_ids", nargs="+", metavar="RUN", help=RUN)
    delete.set_defaults(run=delete_runs)
    prune = add("prune", "show the old runs and sweeps that nothing needs; --yes deletes them and their folders")
    prune.add_argument("--older-than", type=ago, required=True, metavar="AGE", help=f"only runs that ended before AGE, {AGE}")
    prune.add_argument(
        "--keep-best", type=cli.count, default=5, metavar="N", help="keep the N best of each data set (default: 5)"
    )
    prune.add_argument("--by", metavar="METRIC", help="the metric of --keep-best (default: the objective)")
    prune.add_argument("--yes", action="store_true", help="delete them")
    prune.set_defaults(run=prune_runs)
    add("reap", "set runs to KILLED that are RUNNING in the store although their process is dead").set_defaults(run=reap_runs)
    promote = add("promote", "register a model under a name, and point an alias to it")
    which = promote.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", dest="run_id", metavar="RUN", help=f"the model of this run: {RUN}")
    which.add_argument("--sweep", metavar="SWEEP", help="the best arm of this sweep (an id, or latest), if it beats the champion")
    promote.add_argument("--name", type=model_name, required=True, help="the name of the registered model")
    promote.add_argument("--alias", type=alias, default="champion", help="the alias (default: champion)")
    promote.set_defaults(run=promote_model)
    return result


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


def ago(text: str) -> float:
    """Return the time that lies an age such as 30d, 12h or 4w back, in milliseconds since 1970."""
    if not (found := re.fullmatch(r"(\d{1,5})([hdw])", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected a number and h, d or w, such as 30d")
    return 1000 * (time.time() - 3600 * int(found[1]) * HOURS[found[2]])


def reap_runs(store: Store, settings: Settings, arguments: argparse.Namespace) -> None:
    """Correct the status of dead runs."""
    print(f"{reap(store, settings.output_dir)} reaped")


def reap(store: Store, output_dir: Path) -> int:
    """Correct the status of dead runs, report them, and return their number."""
    reaped = store.reap(output_dir)
    show_lines([f"{record.run_id} ({record.name}): its process is dead, now KILLED" for record in reaped])
    return len(reaped)


def list_runs(store: Store, settings: Settings, arguments: argparse.Namespace) -> None:
    """Show a table of the chosen runs."""
    reap(store, settings.output_dir)
    records = store.runs()
    if not records:
        raise UserError(
            f"There are no runs in {store}.",
            key="tracking",
            value=str(store),
            remedy=f"Start one: `{command('run')}`. {store.remedy}",
        )
    chosen = tables.filter_runs(records, arguments.data, arguments.since, arguments.last)
    metrics = settings.objective, *SHOWN
    if arguments.sort:
        rows = tables.ranking(chosen, arguments.sort, metrics)
    else:
        rows = tables.run_tree(records, chosen, metrics, with_jobs=arguments.jobs)
    show_table(rows, optional=[name for name in reversed(metrics) if name != (arguments.sort or SHOWN[0])])


def show_run(store: Store, settings: Settings, arguments: argparse.Namespace) -> None:
    """Show one run."""
    record = store.find_run(arguments.run_id)
    show_pairs("Run", tables.run_details(record))
    show_pairs("Settings", dict(sorted(record.params.items())))
    show_pairs("Metrics", {name: format_metric(name, value) for name, value in sorted(record.metrics.items())})
    folder = settings.output_dir.absolute() / record.run_id
    model = store.run_model(record, settings.output_dir)
    lines = {
        "command": record.tags.get(tag.COMMAND, ""),
        "model": model.address if model else "",
        "artifacts": record.artifacts,
        "folder": str(folder) if folder.is_dir() else "",
    }
    show_lines([f"{name}: {text}" for name, text in lines.items() if text])


def diff_runs(store: Store, settings: Settings, arguments: argparse.Namespace) -> None:
    """Show the differences between two runs."""
    first, second = (store.find_run(text) for text in (arguments.first, arguments.second))
    sections = tables.run_differences(store, first, second)
    for name, section in sections.items():
        if section:
            columns = (name, f"A: {first.run_id[:8]}", f"B: {second.run_id[:8]}")
            show_table([dict(zip(columns, (key, *values), strict=True)) for key, values in section.items()])
    same = [name for name, section in sections.items() if not section]
    show_lines([f"Identical: {', '.join(same)}." if same else "", store.difference_hint(first, second)])


def best_arm(store: Store, settings: Settings, arguments: argparse.Namespace) -> None:
    """Show the arms of a sweep, and the command that trains the best one."""
    sweep = store.find_sweep(arguments.sweep)
    objective = sweep.objective
    children = store.children(sweep.run_id)
    arms = rank_arms(children, objective)
    if not arms:
        raise UserError(
            f"Sweep {sweep.run_id} has no finished job with {objective}, by which arms are ranked.",
            remedy="Finish it, or start one with validation images, such as data=mnist_tuning.",
        )
    show_table(
        [
            {"arm": " ".join(overrides), "n": str(len(values)), objective: format_metric(objective, statistics.mean(values))}
            for overrides, values in arms
        ]
    )
    best = next(child for child in children if child.status == "FINISHED" and set(arms[0][0]) <= set(child.overrides))
    seeds = [int(seed) for child in children if (seed := child.params.get("seed", "")).isdecimal()]
    final = final_recipe(arms[0][0], store.recipe(best).choices.get("data", ""), sweep.tags.get(tag.KEYS, "").split())
    show_lines([f"Next: {command('run', *final, f'seed={max(seeds, default=-1) + 1}')}"])


def final_recipe(overrides: Sequence[str], data: str, varied: Sequence[str]) -> list[str]:
    """Return the overrides of an arm for a final run: of an arm on data=NAME_tuning, on data=NAME, if there is that option.

    Args:
        overrides: The overrides of the arm.
        data: The option of `data` that it was trained on.
        varied: The keys that the sweep varied. Other arguments of the tuning data are left out.
    """
    full = data.removesuffix("_tuning")
    if full == data or not any((folder / "data" / f"{full}.yaml").is_file() for folder in config_dirs()):
        return list(overrides)
    kept = [item for item in overrides if section_of(item) != "data" or key_of(item) in {*varied} - {"data"}]
    return [f"data={full}", *kept]


def promote_model(store: Store, settings: Settings, arguments: argparse.Namespace) -> None:
    """Register a model and point the alias to it, or say why the champion stays."""
    from mnist_exp.comparison.promotion import decide_by_sweep
    from mnist_exp.tracking.frame import frame

    if arguments.run_id:
        record = store.find_run(arguments.run_id, finished=True)
        reason, tags = "Promoted by hand.", {}
    else:
        champion = store.find_champion(arguments.name, arguments.alias)
        sweep = store.find_sweep(arguments.sweep)
        decision = decide_by_sweep(frame([(sweep, store.children(sweep.run_id))]), sweep.objective, champion)
        if decision.run_id is None:
            show_lines([decision.reason])
            return
        record, reason, tags = store.get_run(decision.run_id), decision.reason, decision.tags | {"sweep": sweep.run_id}
    version = store.register(record, arguments.name, arguments.alias, reason, tags)
    show_lines([reason, f"models:/{arguments.name}@{arguments.alias} is version {version}, of run {record.run_id}."])


def delete_runs(store: Store, settings: Settings, arguments: argparse.Namespace) -> None:
    """Delete the runs that the user names."""
    reap(store, settings.output_dir)
    delete_groups(store, housekeeping.find_groups(store, arguments.run_ids), settings.output_dir)


def prune_runs(store: Store, settings: Settings, arguments: argparse.Namespace) -> None:
    """Show the runs that can be deleted, and delete them with --yes."""
    reap(store, settings.output_dir)
    by = arguments.by or settings.objective
    groups, kept = housekeeping.plan_pruning(store, settings.output_dir, arguments.older_than, arguments.keep_best, by)
    if groups:
        metrics = settings.objective, *SHOWN
        show_table([tables.run_row(tables.group_name(group), group[0], metrics) for group in groups], optional=metrics[::-1])
    show_lines([f"Kept: {'; '.join(f'{reason} ({count})' for reason, count in kept.items()) or 'none'}."])
    if arguments.yes:
        delete_groups(store, groups, settings.output_dir)
    else:
        show_lines(["Add --yes to delete these runs and their folders." if groups else "Nothing can be deleted."])


def delete_groups(store: Store, groups: list[tables.Group], output_dir: Path) -> None:
    """Delete single runs and sweeps, and show how to restore them and how to free the disk."""
    deleted: list[RunRecord] = []
    problems = []
    for group in groups:
        try:
            housekeeping.delete(store, group, output_dir)
        except UserError as error:
            problems.append(str(error))
        else:
            deleted += group
            show_lines([f"Deleted {group[0].run_id}: {tables.group_name(group)}"])
    if deleted:
        show_lines(store.after_deletion(deleted))
    if problems:
        raise UserError("\n".join(problems))


if __name__ == "__main__":
    main()
