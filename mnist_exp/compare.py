"""Command: compare the runs of a sweep: python -m mnist_exp.compare sweep=latest factor=model baseline=plain_cnn."""

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mnist_exp import CONF, HOME
from mnist_exp.cli import run_command
from mnist_exp.config import as_dict, build, check_target, nodes
from mnist_exp.errors import UserError
from mnist_exp.overrides import command, key_of, text_of, typed_ids
from mnist_exp.redaction import redact
from mnist_exp.signals import install_signal_handlers
from mnist_exp.tracking.base import RunRecord, Store
from mnist_exp.tracking.definition import Definition

if TYPE_CHECKING:
    from torch import Tensor

    from mnist_exp.comparison.arms import Arms

KEYS = {"sweep", "factor", "baseline", "metrics", "tracking"}
REPORT = "report.html"


def main() -> None:
    """Run the command line; a user's mistake ends with a message and status 1."""
    run_command(task)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="compare")
def task(composed: DictConfig) -> None:
    """Compare the runs of a sweep, show the answer, and publish a report in the sweep's parent run."""
    install_signal_handlers()
    from mnist_exp.comparison import arms, outcomes, report, wording
    from mnist_exp.console import show_comparison, show_report

    overrides = HydraConfig.get().overrides.task
    added = [override for override in overrides if key_of(override).partition(".")[0] not in KEYS]
    if added:
        raise UserError(f"{' '.join(added)} is invalid: expected keys among {', '.join(sorted(KEYS))}.")
    # conf/local/default.yaml may set keys of the run command as well.
    config = {key: value for key, value in as_dict(composed).items() if key in KEYS} | typed_ids(overrides, ["sweep"])
    check(config)
    # As typed: [8,16,20] and null are values of an arm here, not a list and None.
    typed = dict(split(override) for override in overrides)
    store: Store = build(config["tracking"], "tracking")
    parent, definition = store.find_sweep(config["sweep"], finished_too=True)
    jobs = {job.number: dict(split(override) for override in job.overrides) for job in definition.jobs}
    found = arms.arrange(store.children(parent.run_id), jobs, typed.get("factor"), typed.get("baseline"))
    rows = arms.compare_arms(found, arms.choose_metrics(found, config["metrics"]))
    headline = wording.headline(found, rows)
    show_comparison(wording.table(rows), headline, wording.notes(found, rows))

    parsed = {record.run_id: outcomes.parse_outcome(content) for record, content in store.outcomes(found.records)}
    page = report.render(found, rows, parsed, parent, commands(parent, definition, found, typed), test_images(found))
    show_report(publish(store, parent, headline, page))


def publish(store: Store, parent: RunRecord, headline: str, page: str) -> str:
    """Add the report and the headline to the parent run; return the address of the report."""
    rest = re.sub(r"\A\*\*Answer\*\*.*?\n\n", "", parent.description, flags=re.DOTALL)
    description = f"**Answer** {headline} See `{REPORT}` under Artifacts for the full report.\n\n{rest}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / REPORT
        file.write_text(redact(page), encoding="utf-8")
        return store.publish(parent.run_id, file, {"answer": headline}, description)


def check(config: dict[str, Any]) -> None:
    """Raise UserError if the configuration has wrong keys, targets or values."""
    if not config.keys() >= KEYS:
        raise UserError(f"The command line removes {', '.join(sorted(KEYS - config.keys()))}: expected only changed values.")
    for key, value in nodes(config):
        check_target(key, value)
    if not re.fullmatch("latest|[0-9a-f]{6,32}", str(config["sweep"])):
        raise UserError(
            f"sweep={config['sweep']} is invalid: expected the id of a sweep, a prefix of at least 6 hexadecimal digits, or "
            "latest."
        )
    metrics = config["metrics"] = [config["metrics"]] if isinstance(config["metrics"], str) else config["metrics"]
    if metrics is not None and not (isinstance(metrics, list) and metrics and all(isinstance(item, str) for item in metrics)):
        raise UserError(
            f"metrics={metrics} is invalid: expected a name, a list such as metrics=[test/accuracy,test/loss], or null."
        )


def commands(parent: RunRecord, definition: Definition, arms: "Arms", typed: dict[str, str]) -> list[str]:
    """Return the shell commands that repeat the sweep and the comparison.

    Args:
        parent: The parent run of the sweep.
        definition: The definition of the sweep.
        arms: The compared runs.
        typed: The overrides of this command line, as values by key.
    """
    is_search = "Optuna" in definition.sweeper
    search = ["hydra/sweeper=optuna", f"hydra.sweeper.n_trials={definition.total}"] if is_search else []
    metrics = [f"metrics={typed['metrics']}"] if "metrics" in typed else []
    return [
        command("run", "-m", *search, *definition.overrides),
        command("compare", f"sweep={parent.run_id}", f"factor={arms.factor}", f"baseline={arms.baseline}", *metrics),
    ]


def test_images(arms: "Arms") -> "Tensor | None":
    """Return the test images that the runs were evaluated on, None if this machine lacks them."""
    from mnist_exp.learning.datasets import find_test_images

    record = arms.records[0]
    try:
        root = os.environ.get("MNIST_ROOT", str(HOME / "data"))
        return find_test_images(record.data, root, record.digests.get("test", ""))
    except UserError:  # a damaged file
        return None


def split(override: str) -> tuple[str, str]:
    """Return the key and the value of an override."""
    return key_of(override), text_of(override)


if __name__ == "__main__":
    main()
