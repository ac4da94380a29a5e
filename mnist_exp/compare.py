"""Entry point: from a sweep to an answer: python -m mnist_exp.compare sweep=latest factor=model baseline=plain_cnn."""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mnist_exp import CONF, HOME
from mnist_exp.command_line import answer
from mnist_exp.config import as_dict, build, check_target, nodes
from mnist_exp.errors import UserError
from mnist_exp.overrides import command, key_of
from mnist_exp.redaction import redact
from mnist_exp.signals import raise_interrupted

if TYPE_CHECKING:
    from torch import Tensor

    from mnist_exp.comparison import Arms, Row
    from mnist_exp.definition import Definition
    from mnist_exp.tracking import Record

KEYS = {"sweep", "factor", "baseline", "metrics", "tracking"}
REPORT = "report.html"


def main() -> None:
    """Run the command line; a user's mistake ends with a message and status 1."""
    answer(task)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="compare")
def task(composed: DictConfig) -> None:
    """Read a sweep's runs, compare them, show the answer and leave a report in the sweep's parent run."""
    raise_interrupted()
    from mnist_exp import comparison, report
    from mnist_exp.console import show_comparison

    config = as_dict(composed)
    check(config)
    # As it was typed: [8,16,20] and null are values of an arm, and not yet a list and nothing.
    typed = dict(split(override) for override in HydraConfig.get().overrides.task)
    tracker = build(config["tracking"], "tracking")
    parent, definition = tracker.find_sweep(config["sweep"], finished_too=True)
    jobs = {job.number: dict(split(override) for override in job.overrides) for job in definition.jobs}
    arms = comparison.arrange(tracker.children(parent.run_id), jobs, typed.get("factor"), typed.get("baseline"))
    rows = comparison.rows(arms, comparison.choose_metrics(arms, config["metrics"]))
    said = comparison.answer(arms, rows)
    notes = [*comparison.unknowns(arms, rows), *comparison.cautions(rows), *arms.flags]
    show_comparison(as_table(rows), said, notes)

    outcomes = {record.run_id: report.understood(outcome) for record, outcome in tracker.outcomes(arms.records)}
    page = report.render(arms, rows, said, notes, outcomes, parent, commands(parent, definition, arms, typed), images_of(arms))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / REPORT
        file.write_text(redact(page), encoding="utf-8")
        note = re.sub(r"\A\*\*Answer\*\*.*?\n\n", "", parent.tags.get("mlflow.note.content", ""), flags=re.DOTALL)
        headline = f"**Answer** {said} The whole of it is in `{REPORT}`, under Artifacts.\n\n"
        print(f"Report: {tracker.publish(parent.run_id, file, {'answer': said, 'mlflow.note.content': headline + note})}")


def check(config: dict[str, Any]) -> None:
    """Raise UserError on what the command line must not say."""
    if config.keys() != KEYS:
        wrong = ", ".join(sorted(config.keys() ^ KEYS))
        raise UserError(f"The command line adds or removes {wrong}: allowed are values for {', '.join(sorted(KEYS))}.")
    for key, value in nodes(config):
        check_target(key, value)
    if not re.fullmatch("latest|[0-9a-f]{32}", str(config["sweep"])):
        raise UserError(f"sweep={config['sweep']} is not valid: allowed is a sweep's id of 32 hexadecimal digits, or latest.")
    metrics = config["metrics"] = [config["metrics"]] if isinstance(config["metrics"], str) else config["metrics"]
    if metrics is not None and not (isinstance(metrics, list) and metrics and all(isinstance(item, str) for item in metrics)):
        raise UserError(
            f"metrics={metrics} is not valid: allowed is a name, a list such as metrics=[test/accuracy,test/loss], or null."
        )


def commands(parent: "Record", definition: "Definition", arms: "Arms", typed: dict[str, str]) -> list[str]:
    """Return the commands that repeat the sweep and the comparison."""
    is_search = "Optuna" in definition.sweeper
    search = ["hydra/sweeper=optuna", f"hydra.sweeper.n_trials={definition.total}"] if is_search else []
    metrics = [f"metrics={typed['metrics']}"] if "metrics" in typed else []
    chosen = [f"sweep={parent.run_id}", f"factor={arms.factor}", f"baseline={arms.baseline}", *metrics]
    return [
        command("run", "-m", *search, *definition.overrides),
        command("compare", *chosen),
    ]


def images_of(arms: "Arms") -> "Tensor | None":
    """Return the test images that the runs were scored on, None where this machine does not have them."""
    from mnist_exp.data import find_images

    record = arms.records[0]
    try:
        root = os.environ.get("MNIST_ROOT", str(HOME / "data"))
        return find_images(record.tags.get("data", ""), root, record.digests.get("test", ""))
    except UserError:  # a file that is damaged
        return None


def split(override: str) -> tuple[str, str]:
    """Return the key and the value of an override."""
    return key_of(override), override.partition("=")[2]


def as_table(rows: "Sequence[Row]") -> list[dict[str, str]]:
    """Return comparisons as the rows of a table: for each metric the baseline, then every arm."""
    from mnist_exp.comparison import amount, number

    def line(metric: str, arm: str, n: int, mean: float, std: float) -> dict[str, str]:
        spread = amount(metric, std, bare=True)
        return {"metric": metric, "arm": arm, "n": str(n), "mean (sd)": f"{amount(metric, mean)} ({spread})"}

    table: list[dict[str, str]] = []
    shown: tuple[object, ...] = ()
    for row in rows:
        found = row.values
        untold = {"difference (95 %)": "", "p: t / flip": "", "differs": ""}
        if shown != (row.metric, found.n, found.baseline_mean):  # an arm may have fewer pairs than another
            table.append(line(row.metric, row.baseline, found.n, found.baseline_mean, found.baseline_std) | untold)
        shown = row.metric, found.n, found.baseline_mean
        told = {
            "difference (95 %)": row.difference,
            "p: t / flip": f"{number(row.p_t)} / {number(row.p_sign_flip)}",
            "differs": row.verdict,
        }
        table.append(line(row.metric, row.arm, found.n, found.mean, found.std) | {"metric": ""} | told)
    return table


if __name__ == "__main__":
    main()
