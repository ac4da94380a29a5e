"""Command: compare the runs of a sweep: python -m mnist_exp.compare sweep=latest factor=model baseline=plain_cnn."""

import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mnist_exp import CONF
from mnist_exp.cli import run_command
from mnist_exp.config import as_list, build, check_margin, own_keys
from mnist_exp.errors import UserError
from mnist_exp.overrides import command, data_root, split_override
from mnist_exp.redaction import redact
from mnist_exp.signals import install_signal_handlers
from mnist_exp.tracking.base import Answer, RunRecord, Store
from mnist_exp.tracking.definition import Definition, Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mnist_exp.comparison.arms import Arms

KEYS = {"sweep", "results", "factor", "baseline", "metrics", "margin", "export", "tracking"}
REPORT, PICTURE = "report.html", "differences.png"


def main() -> None:
    """Run the command line; a user's mistake ends with a message and status 1."""
    run_command(task, multirun=False)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="compare")
def task(composed: DictConfig) -> None:
    """Compare the runs of a sweep, show the answer, and publish a report in the sweep's parent run."""
    install_signal_handlers()
    from mnist_exp.comparison import arms, outcomes, report, tables, wording
    from mnist_exp.comparison.sources import source_of
    from mnist_exp.console import show_comparison, show_report

    overrides = as_list(HydraConfig.get().overrides.task)
    config = own_keys(composed, overrides, KEYS, ids={"sweep"})
    check(config)
    # As typed: [8,16,20] and null are values of an arm here, not a list and None.
    typed = dict(split_override(override) for override in overrides)
    store: Store = build(config["tracking"], "tracking")
    sweeps = [] if config["results"] else find_sweeps(store, config["sweep"])
    sources = (
        tables.read_tables(map(Path, config["results"])) if config["results"] else [source_of(store, *item) for item in sweeps]
    )
    if config["export"]:
        tables.write_table(Path(config["export"]), sources)
    plan = arms.by_start(sources)[0].plan or Plan()
    factor = typed.get("factor", plan.factor)
    found = arms.arrange(sources, factor, typed.get("baseline", plan.baseline if factor == plan.factor else None))
    metrics = arms.choose_metrics(found, config["metrics"] or ([plan.metric] if plan.metric else None))
    margin = plan.margin if plan.metric in (None, metrics[0]) else None
    rows = arms.compare_arms(found, metrics, config["margin"] or margin)
    levels = arms.compare_levels(found, rows[0].metric)
    headline = wording.headline(found, rows)
    show_comparison(wording.table(rows), headline, wording.notes(found, rows, levels))
    if not sweeps:  # a table has neither histories nor a run to publish in
        return
    parsed = {record.run_id: outcomes.parse_outcome(content) for record, content in store.outcomes(found.records)}
    repeated, images = commands(sweeps, found, typed), test_images(found)
    for parent, _ in sweeps:
        page = report.render(found, rows, levels, parsed, parent, repeated, images, store.page)
        with tempfile.TemporaryDirectory() as folder:
            answer = Answer(Path(folder) / REPORT, Path(folder) / PICTURE, headline, arms.answer_metrics(found, rows))
            answer.report.write_text(redact(page), encoding="utf-8")
            report.draw_differences(rows, answer.picture)
            show_report(store.publish(parent.run_id, answer))


def find_sweeps(store: Store, ids: str | list[str]) -> list[tuple[RunRecord, Definition]]:
    """Return the parents and definitions of sweeps, each once, in the order of their start."""
    found = {
        parent.run_id: (parent, definition)
        for parent, definition in (
            store.find_sweep(sweep, finished_too=True) for sweep in ([ids] if isinstance(ids, str) else ids)
        )
    }
    return sorted(found.values(), key=lambda item: item[0].started)


def check(config: dict[str, Any]) -> None:
    """Raise UserError if the configuration has wrong values."""
    sweeps = config["sweep"] if isinstance(config["sweep"], list) else [config["sweep"]]
    if not sweeps or not all(re.fullmatch("latest|[0-9a-f]{6,32}", str(sweep)) for sweep in sweeps):
        raise UserError(
            f"sweep={config['sweep']} is invalid: expected the id of a sweep, a prefix of at least 6 hexadecimal digits, latest, "
            "or a list of them, such as 'sweep=[1a2b3c,4d5e6f]'."
        )
    for key, example in (("metrics", "metrics=[test/accuracy,test/loss]"), ("results", "'results=[a.csv,b.csv]'")):
        value = config[key] = [config[key]] if isinstance(config[key], str) else config[key]
        if value is not None and not (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
            raise UserError(f"{key}={value} is invalid: expected a name, a list such as {example}, or null.")
    check_margin("margin", config["margin"])
    if config["export"] is not None and not str(config["export"]).endswith(".csv"):
        raise UserError(f"export={config['export']} is invalid: expected the path of a file that ends with .csv, or null.")


def commands(sweeps: "Sequence[tuple[RunRecord, Definition]]", arms: "Arms", typed: dict[str, str]) -> list[str]:
    """Return the shell commands that repeat the sweeps, their extensions, and the comparison.

    Args:
        sweeps: The parent and the definition of each sweep.
        arms: The compared runs.
        typed: The overrides of this command line, as values by key.
    """
    repeated = []
    for _, definition in sweeps:
        is_search = "Optuna" in definition.sweeper
        search = ["hydra/sweeper=optuna", f"hydra.sweeper.n_trials={definition.total}"] if is_search else []
        plan = asdict(definition.plan) if definition.plan else {}
        planned = [f"plan.{key}={value}" for key, value in plan.items() if value is not None]
        repeated.append(command("run", "-m", *search, *definition.overrides, *planned))
        repeated += [command("run", "-m", "sweep.extend=latest", *step.overrides) for step in definition.extensions]
    ids = [parent.run_id for parent, _ in sweeps]
    sweep = ids[0] if len(ids) == 1 else f"[{','.join(ids)}]"
    options = [f"{key}={typed[key]}" for key in ("metrics", "margin") if key in typed]
    return [*repeated, command("compare", f"sweep={sweep}", f"factor={arms.factor}", f"baseline={arms.baseline}", *options)]


def test_images(arms: "Arms") -> "Tensor | None":
    """Return the test images that the runs were evaluated on, None if this machine lacks them."""
    from mnist_exp.learning.datasets import find_test_images

    record = arms.records[0]
    try:
        return find_test_images(record.data, data_root(), record.digests.get("test", ""))
    except UserError:  # a damaged file
        return None


if __name__ == "__main__":
    main()
