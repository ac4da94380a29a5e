"""Entry point: compose, check, train one run, score it, and leave it in MLflow."""

# torch and mlflow are imported inside functions: --help, --cfg job and tab completion must answer at once.
import os
import re
import shlex
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Never

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mnist_exp import ROOT
from mnist_exp.config import build, did_you_mean, leaves, resolve
from mnist_exp.errors import UserError

if TYPE_CHECKING:
    from mnist_exp.data import Dataset

OmegaConf.register_new_resolver("root", lambda path: str(ROOT / path), replace=True)

PARAM_GROUPS = ("model", "data", "optimizer", "scheduler", "augmentation")


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"Stopped by {signal.Signals(signum).name}.")
        self.exit_status = 128 + signum


def main() -> None:
    """Run the command line; a user's mistake ends with a message and status 1, a signal with 128 + its number."""
    wants_trace = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # has Hydra hand over exceptions; its own messages offer the wrong remedies
    try:
        task()
    except Interrupted as interrupted:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(interrupted.exit_status)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if wants_trace:
            raise
        print(f"{explain(error)}\n\nHYDRA_FULL_ERROR=1 shows the stack trace.", file=sys.stderr)
        sys.exit(1)
    finally:
        if not wants_trace:
            del os.environ["HYDRA_FULL_ERROR"]


def explain(error: Exception) -> str:
    """Return what the user can do about `error`: the message of a UserError, or of Hydra's with the likely remedy."""
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        shared = re.match(r"phases\.\w+\.((optimizer|scheduler|augmentation)\..+)", cause.full_key)
        if shared:
            return f"{cause.full_key} follows the key at the top: override {shared[1]} instead."
        if isinstance(cause.parent_node, DictConfig):
            known = {str(key) for key in cause.parent_node}
            hint = did_you_mean(str(cause.key), known)
            return f"{cause.full_key} is not a key of the configuration{hint}. Allowed here: {', '.join(sorted(known))}."
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        return f"{error}\n{cause}"
    return str(error)


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def task(composed: DictConfig) -> float | None:
    """Train, score and record one run; return its last validation accuracy, for Hydra's sweepers."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupt)
    job = HydraConfig.get()
    return run(resolve(composed), dict(job.runtime.choices), list(job.overrides.task))


def _interrupt(signum: int, frame: FrameType | None) -> Never:
    for repeated in (signal.SIGINT, signal.SIGTERM):  # the run's status is to be written in peace
        signal.signal(repeated, signal.SIG_IGN)
    raise Interrupted(signum)


def run(config: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> float | None:
    """Train, score and record what a resolved configuration describes; return the last validation accuracy.

    choices: the option of each group; overrides: as given on the command line. Raises UserError before anything is
    recorded where the configuration, the data, the folder or the store will not do.
    """
    started = time.perf_counter()
    import torch

    from mnist_exp import checkpoint, pictures, provenance
    from mnist_exp.console import Display
    from mnist_exp.data import derive_seed, generator
    from mnist_exp.evaluation import evaluate
    from mnist_exp.models import count_parameters
    from mnist_exp.training import choose_device, choose_precision, fit, plan

    seed = config["seed"]
    device = choose_device(config["device"])
    precision = choose_precision(config["precision"], device)
    output_dir = checkpoint.make_folder(Path(config["output_dir"]))
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "weights"))
        model = build(config["model"], "model").to(device)
    parameters = count_parameters(model)
    phases = {name: build(node, f"phases.{name}") for name, node in config["phases"].items()}
    data = build(config["data"], "data")(seed=seed).to(device)
    stages = plan(model, phases, data)
    tracker = build(config["tracking"], "tracking")

    display = Display(stages, data)
    if data.notice:
        display.warn(data.notice)
    tags = {
        **provenance.git_tags(),
        **provenance.machine_tags(device),
        "mlflow.user": provenance.user(),
        "mlflow.source.name": provenance.command_line(),
        "mlflow.source.type": "LOCAL",
        "data": data.name,
        "overrides": " ".join(overrides),
    }
    with tracker.start(run_name(choices, overrides, data.name), tags) as tracked:
        actual = {"precision": str(precision).removeprefix("torch."), "device": device.type, "data": data.name}
        tracked.params(selection(config, choices) | actual)
        tracked.text(OmegaConf.to_yaml(config), "config.yaml")
        tracked.text(provenance.packages(), "provenance/packages.txt")
        tracked.text(provenance.uncommitted(), "provenance/uncommitted.diff")
        for stage in stages:
            tracked.dataset(data, stage.phase.split, stage.name)

        folder = checkpoint.make_folder(output_dir / tracked.run_id)
        history: list[tuple[int, dict[str, float]]] = []
        seconds: dict[str, float] = defaultdict(float)
        with display:
            for report in fit(model, stages, data, seed=seed, precision=precision):
                display.update(report)
                history.append((report.examples_seen, report.metrics))
                seconds[report.phase] += report.seconds
                tracked.metrics(report.metrics, report.examples_seen)
                if report.state:
                    checkpoint.save(folder / "checkpoint.pt", checkpoint.Checkpoint(tracked.run_id, config, report.state))
                    tracked.flush()
        tracked.file(folder / "checkpoint.pt")

        # The test set is scored once, here. Without one (data=mnist_tuning) the pictures show the validation split.
        judge = "test" if "test" in data.splits else data.validation
        evaluation = evaluate(model, data.splits[judge])
        results = {f"time/{phase}_seconds": spent for phase, spent in seconds.items()}
        results["model/parameters"] = parameters
        if judge == "test":
            tracked.dataset(data, "test", "test")
            results |= {"test/accuracy": evaluation.accuracy, "test/loss": evaluation.loss}

        sample, augment = data.splits[stages[0].phase.split].images[:8], stages[0].phase.augmentation
        for name, figure in {
            "confusion_matrix": pictures.confusion_matrix(evaluation, f"{judge}, accuracy {evaluation.accuracy:.2%}"),
            "worst_mistakes": pictures.worst_mistakes(evaluation, data.splits[judge].images),
            "learning_curves": pictures.learning_curves(history),
            "learning_rate": pictures.learning_rate(history),
            "augmented_digits": pictures.augmented_digits(sample, augment, generator(seed, "picture")),
        }.items():
            tracked.figure(figure, f"pictures/{name}.png")
        tracked.model(model.eval(), data.splits[judge].images[:2].cpu().numpy())

        results["time/total_seconds"] = time.perf_counter() - started
        tracked.metrics(results, history[-1][0])
        validation = {key: value for _, metrics in history for key, value in metrics.items() if key.startswith("val/")}
        rows = result_rows(validation | results, data)
        tracked.tags({"mlflow.note.content": description(rows, overrides, data.notice)})
    display.results(rows | {"run": tracked.run_id, "checkpoint": os.path.relpath(folder / "checkpoint.pt")}, tracked.how_to_open())
    return validation.get("val/accuracy")


def run_name(choices: dict[str, str], overrides: list[str], data: str) -> str:
    """Return the run's name: its model, its data, and what else of the recipe was overridden."""
    elsewhere = re.compile(r"(model|data|output_dir|tracking(\..*)?)=|hydra[./]")
    rest = [override for override in overrides if not elsewhere.match(override)]
    return " ".join([choices["model"], data, *rest])[:200]


def selection(config: dict[str, Any], choices: dict[str, str]) -> dict[str, object]:
    """Return the flat, readable part of a configuration that becomes the run's parameters."""
    nodes = {**config["phases"], "model": config["model"]}
    return {
        **{group: choices[group] for group in PARAM_GROUPS},
        **{key: config[key] for key in ("seed", "batch_size")},
        **{key: value for key, value in leaves(nodes) if not key.rsplit(".", 1)[-1].startswith("_")},
    }


def result_rows(results: dict[str, float], data: "Dataset") -> dict[str, str]:
    """Return what a run came to, as the rows of a table: name, value with its unit."""
    formats = {
        "test/accuracy": "{:.2%}",
        "test/loss": "{:.4f}",
        "val/accuracy": "{:.2%}",
        "val/loss": "{:.4f}",
        "model/parameters": "{:,.0f}",
    }
    rows = {name: form.format(results[name]) for name, form in formats.items() if name in results}
    rows |= {name: f"{value:.1f} s" for name, value in sorted(results.items()) if name.startswith("time/")}
    return rows | {"data": f"{data.name}: " + ", ".join(f"{name} {len(split):,}" for name, split in data.splits.items())}


def description(rows: dict[str, str], overrides: list[str], notice: str | None) -> str:
    """Return the run's description in Markdown, which the MLflow UI shows above everything else."""
    command = shlex.join(["python", "-m", "mnist_exp.run", *overrides])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    warning = f"**{notice}**\n\n" if notice else ""
    return (
        f"{warning}| | |\n| --- | --- |\n{table}\n\nRepeat it: `{command}`\n\n"
        "Pictures, configuration, checkpoint and the uncommitted changes are under Artifacts."
    )


if __name__ == "__main__":
    main()
