"""Entry point: from a sweep to an answer: python -m mnist_exp.compare sweep=latest factor=model baseline=plain_cnn."""

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from mnist_exp import ROOT
from mnist_exp.command_line import answer
from mnist_exp.config import as_dict, build, check_target, nodes
from mnist_exp.config import check as check_run
from mnist_exp.errors import UserError
from mnist_exp.signals import raise_interrupted
from mnist_exp.sweep import key_of

if TYPE_CHECKING:
    import numpy as np

    from mnist_exp.comparison import Row
    from mnist_exp.tracking import NoTracker

REPORT = "report.html"


def main() -> None:
    """Run the command line; a user's mistake ends with a message and status 1."""
    answer(task)


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="compare")
def task(composed: DictConfig) -> None:
    """Read a sweep's runs, compare them, show the answer and leave a report in the sweep's parent run."""
    raise_interrupted()
    from mnist_exp import comparison, report
    from mnist_exp.console import show_comparison

    config = as_dict(composed)
    check(config)
    tracker = build(config["tracking"], "tracking")
    parent, definition = tracker.find_sweep(config["sweep"], finished_too=True)
    jobs = {job["number"]: dict(split(override) for override in job["overrides"]) for job in definition["jobs"]}
    arms = comparison.arrange(tracker.children(parent.run_id), jobs, config["factor"], config["baseline"])
    rows = comparison.rows(arms, comparison.choose_metrics(arms, config["metrics"]))
    said = comparison.answer(arms, rows)
    notes = [*comparison.unknowns(arms, rows), *comparison.cautions(rows), *arms.flags]
    commands = [
        f"python -m mnist_exp.run -m {' '.join(definition['overrides'])}",
        f"python -m mnist_exp.compare sweep={parent.run_id} factor={arms.factor} baseline={arms.baseline}",
    ]
    outcomes = dict(zip((record.run_id for record in arms.records), tracker.outcomes(arms.records), strict=True))
    images = images_of(tracker, arms.records[0].run_id)
    page = report.render(arms, rows, said, notes, outcomes, parent, commands, images)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / REPORT
        file.write_text(page, encoding="utf-8")
        note = re.sub(r"\A\*\*Answer\*\*.*?\n\n", "", parent.tags.get("mlflow.note.content", ""), flags=re.DOTALL)
        headline = f"**Answer** {said} The whole of it is in `{REPORT}`, under Artifacts.\n\n"
        lies = tracker.publish(parent.run_id, file, {"answer": said, "mlflow.note.content": headline + note})
    show_comparison(as_table(rows), said, notes, lies)


def check(config: dict[str, Any]) -> None:
    """Raise UserError on what the command line must not say."""
    for key, value in nodes(config):
        check_target(key, value)
    if not re.fullmatch("latest|[0-9a-f]{32}", str(config["sweep"])):
        raise UserError(f"sweep={config['sweep']} is not valid: allowed is a sweep's id of 32 hexadecimal digits, or latest.")
    metrics = config["metrics"]
    if metrics is not None and not (isinstance(metrics, list) and metrics and all(isinstance(item, str) for item in metrics)):
        raise UserError(f"metrics={metrics} is not valid: allowed is a list such as metrics=[test/accuracy,test/loss], or null.")
    for key in ("factor", "baseline"):
        config[key] = None if config[key] is None else str(config[key])


def images_of(tracker: "NoTracker", run_id: str) -> "Callable[[int], np.ndarray[Any, Any]] | None":
    """Return what gives an image of the split that a run was scored on; None where its recipe or its data are not at hand."""
    try:
        config = tracker.read(run_id).config
        check_run(config)
        data = build(config["data"], "data", seed=config["seed"])
    except UserError:
        return None
    judge = data.splits["test" if "test" in data.splits else data.validation]
    return lambda index: judge.images[index, 0].numpy()


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
    shown = None
    for row in rows:
        found = row.values
        untold = {"difference (95 %)": "", "p: t / flip": "", "differs": ""}
        if row.metric != shown:
            table.append(line(row.metric, row.baseline, found.n, found.baseline_mean, found.baseline_std) | untold)
        shown = row.metric
        told = {
            "difference (95 %)": row.difference,
            "p: t / flip": f"{number(row.p_t)} / {number(row.p_sign_flip)}",
            "differs": "yes" if row.is_detected else "not shown",
        }
        table.append(line(row.metric, row.arm, found.n, found.mean, found.std) | {"metric": ""} | told)
    return table


if __name__ == "__main__":
    main()
