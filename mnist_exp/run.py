"""Entry point: compose, check, train one run, score it, and leave it in MLflow."""

# torch and mlflow are imported inside functions: --help, --cfg job and tab completion must answer at once.
import os
import re
import shlex
import signal
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import TYPE_CHECKING, Any, Never

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mnist_exp import ROOT
from mnist_exp.config import build, check, did_you_mean, nodes, resolve
from mnist_exp.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mnist_exp.checkpoint import Checkpoint
    from mnist_exp.data import Dataset
    from mnist_exp.evaluation import Evaluation
    from mnist_exp.pictures import History
    from mnist_exp.training import Stage, State

OmegaConf.register_new_resolver("root", lambda path: str(ROOT / path), replace=True)


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"Stopped by {signal.Signals(signum).name}.")
        self.exit_status = 128 + signum


def main() -> None:
    """Run the command line; a user's mistake ends with a message and status 1, a signal with 128 + its number."""
    wants_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # has Hydra hand over exceptions; its own messages offer the wrong remedies
    try:
        task()
    except Interrupted as interrupted:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(interrupted.exit_status)
    except Exception as error:
        if wants_trace or not (isinstance(error, UserError) or _out_of_memory(error) or _while_composing(error)):
            raise
        print(f"{explain(error)}\n\nHYDRA_FULL_ERROR=1 shows the stack trace.", file=sys.stderr)
        sys.exit(1)
    finally:
        if not wants_trace:
            del os.environ["HYDRA_FULL_ERROR"]


def _while_composing(error: Exception) -> bool:
    """Return whether `error` came before our own code began, out of Hydra's reading of the command line."""
    return not any(
        frame.f_code.co_filename == __file__ and frame.f_code.co_name == "task" for frame, _ in walk_tb(error.__traceback__)
    )


def _out_of_memory(error: Exception) -> bool:
    """Return whether `error` is Python's, or torch's on a CPU or a GPU, of having no memory."""
    refused = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(text in str(error) for text in refused))


def explain(error: Exception) -> str:
    """Return what the user can do about `error`: the message of a UserError, or of another's with the likely remedy."""
    if _out_of_memory(error):
        return (
            f"The memory does not suffice: {str(error).strip() or type(error).__name__}\nChoose a smaller batch_size or model, "
            "or stop other programs; what has a checkpoint goes on with `python -m mnist_exp.run resume=latest`."
        )
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
    return (
        str(error)
        if isinstance(error, UserError | HydraException)
        else f"{error}\nThe command line was: {' '.join(sys.argv[1:])}"
    )


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def task(composed: DictConfig) -> float | None:
    """Train, score and record one run, or go on with one; return its last validation accuracy, for Hydra's sweepers."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupt)
    job = HydraConfig.get()
    config = resolve(composed)
    if config["resume"]:
        return resume(config, list(job.overrides.task))
    return run(config, dict(job.runtime.choices), list(job.overrides.task))


def _interrupt(signum: int, frame: FrameType | None) -> Never:
    for repeated in (signal.SIGINT, signal.SIGTERM):  # the run's status is to be written in peace
        signal.signal(repeated, signal.SIG_IGN)
    raise Interrupted(signum)


def resume(config: dict[str, Any], overrides: list[str]) -> float | None:
    """Go on with the run that `config["resume"]` names, with the configuration in its last good checkpoint."""
    from mnist_exp import checkpoint

    where = re.compile(r"(resume|output_dir|tracking(\..*)?)=")
    changed = [override for override in overrides if not where.match(override)]
    if changed:
        raise UserError(
            f"resume={config['resume']} goes on with the run's own configuration: {' '.join(changed)} cannot change it. "
            "Allowed beside it are output_dir and tracking, which say where the run lies. Start a new run for another recipe."
        )
    folder = checkpoint.find(Path(config["output_dir"]), config["resume"])
    saved, problem = checkpoint.load_last_good(folder)
    if problem:
        print(f"{problem}\nGoing on from the checkpoint before it.", file=sys.stderr)
    check(saved.config)
    stored = saved.config | {"output_dir": config["output_dir"]}
    if any(override.startswith("tracking") for override in overrides):
        stored["tracking"] = config["tracking"]
    return run(stored, saved.choices, saved.overrides, saved)


def run(config: dict[str, Any], choices: dict[str, str], overrides: list[str], saved: "Checkpoint | None" = None) -> float | None:
    """Train, score and record what a resolved configuration describes; return the last validation accuracy.

    choices: the option of each group; overrides: as given on the command line; saved: the checkpoint to go on from.
    Raises UserError before anything is recorded where the configuration, the data, the folder or the store will not do.
    """
    started = time.perf_counter() - (saved.elapsed if saved else 0.0)
    import torch

    from mnist_exp import checkpoint, provenance
    from mnist_exp.console import Display
    from mnist_exp.data import derive_seed
    from mnist_exp.evaluation import evaluate
    from mnist_exp.models import count_parameters
    from mnist_exp.training import choose_device, choose_precision, fit, plan

    seed = config["seed"]
    device = choose_device(config["device"])
    precision = choose_precision(config["precision"], device)
    with torch.device("meta"):  # counted before any memory is taken
        parameters = count_parameters(build(config["model"], "model"))
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "weights"))
        model = build(config["model"], "model").to(device)
    phases = {name: build(node, f"phases.{name}") for name, node in config["phases"].items()}
    data = build(config["data"], "data", seed=seed).to(device)
    digests = {name: split.digest for name, split in data.splits.items()}
    if saved and saved.digests != digests:
        raise UserError(
            f"Run {saved.run_id} was trained on other data: it saw {saved.digests}, here is {digests}. "
            "Point MNIST_ROOT to the data that it was started with."
        )
    stages = plan(model, phases, data)
    tracker = build(config["tracking"], "tracking")
    output_dir = checkpoint.make_folder(Path(config["output_dir"]))

    state = saved.state if saved else None
    display = Display(stages, data, examples_seen=state["examples_seen"] if state else 0)
    software = provenance.software()
    before = saved.software if saved else software
    changed = "; ".join(f"{name} was {before.get(name)}, is {now}" for name, now in software.items() if before.get(name) != now)
    if changed:
        display.warn(f"Since the run was begun, {changed}: it need not end as it would have ended uninterrupted.")
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
    history = list(saved.history) if saved else []
    seconds = defaultdict(float, saved.seconds if saved else {})
    run_id = saved.run_id if saved else None
    with ExitStack() as held:
        if run_id:
            held.enter_context(checkpoint.hold(output_dir / run_id))
        tracked = held.enter_context(tracker.start(run_name(choices, overrides, data.name), tags, run_id))
        folder = output_dir / tracked.run_id
        if not run_id:
            held.enter_context(checkpoint.hold(folder))
        actual = {"precision": str(precision).removeprefix("torch."), "device": device.type, "data": data.name}
        tracked.params(selection(config, choices) | actual)
        tracked.text(OmegaConf.to_yaml(config), "config.yaml")
        if not saved:
            tracked.text(provenance.packages(), "provenance/packages.txt")
            tracked.text(provenance.uncommitted(), "provenance/uncommitted.diff")
        else:
            tracked.tags({"resumed": f"at {display.examples_seen:,} examples" + (f"; {changed}" if changed else "")})
        for stage in stages:
            tracked.dataset(data, stage.phase.split, stage.name)
        for examples_seen, metrics in history:
            tracked.metrics(metrics, examples_seen)

        def save(state: "State | None") -> None:
            reached = (state, history, dict(seconds), time.perf_counter() - started)
            checkpoint.save(
                folder, checkpoint.Checkpoint(tracked.run_id, config, choices, overrides, digests, software, *reached)
            )

        if not saved:
            save(None)
        with display:
            for report in fit(
                model, stages, data, seed=seed, precision=precision, save_every=config["save_every"], resume_from=state
            ):
                display.update(report)
                history.append((report.examples_seen, report.metrics))
                seconds[report.phase] += report.seconds
                tracked.metrics(report.metrics, report.examples_seen)
                if report.state:
                    save(report.state)
                    tracked.flush()
        tracked.file(folder / checkpoint.NAME)

        # The test set is scored once, here. Without one (data=mnist_tuning) the pictures show the validation split.
        judge = "test" if "test" in data.splits else data.validation
        evaluation = evaluate(model, data.splits[judge])
        results = {f"time/{phase}_seconds": spent for phase, spent in seconds.items()}
        results["model/parameters"] = parameters
        if judge == "test":
            tracked.dataset(data, "test", "test")
            results |= {"test/accuracy": evaluation.accuracy, "test/loss": evaluation.loss}
        for name, figure in draw(evaluation, judge, data, stages, history, seed).items():
            tracked.figure(figure, f"pictures/{name}.png")
        tracked.model(model.eval(), data.splits[judge].images[:2].cpu().numpy(), folder / "model", config)

        results["time/total_seconds"] = time.perf_counter() - started
        tracked.metrics(results, history[-1][0])
        validation = {key: value for _, metrics in history for key, value in metrics.items() if key.startswith("val/")}
        rows = result_rows(validation | results, data)
        tracked.tags({"mlflow.note.content": description(rows, overrides, data.notice)})
    checkpoint.mark_finished(folder)
    rows |= {"run": tracked.run_id, "checkpoint": os.path.relpath(folder / checkpoint.NAME)}
    display.results(rows, tracked.how_to_open())
    return validation.get("val/accuracy")


def draw(
    evaluation: "Evaluation", judge: str, data: "Dataset", stages: "list[Stage]", history: "History", seed: int
) -> "dict[str, Figure]":
    """Return the pictures of a run by name."""
    from mnist_exp import pictures
    from mnist_exp.data import generator

    first = stages[0].phase
    sample = data.splits[first.split].images[:8]
    return {
        "confusion_matrix": pictures.confusion_matrix(evaluation, f"{judge}, accuracy {evaluation.accuracy:.2%}"),
        "worst_mistakes": pictures.worst_mistakes(evaluation, data.splits[judge].images),
        "learning_curves": pictures.learning_curves(history),
        "learning_rate": pictures.learning_rate(history),
        "augmented_digits": pictures.augmented_digits(sample, first.augmentation, generator(seed, "picture")),
    }


def run_name(choices: dict[str, str], overrides: list[str], data: str) -> str:
    """Return the run's name: its model, its data, and what else of the recipe was overridden."""
    elsewhere = re.compile(r"(model|data|output_dir|tracking(\..*)?)=|hydra[./]")
    rest = [override for override in overrides if not elsewhere.match(override)]
    return " ".join([choices["model"], data, *rest])[:200]


def selection(config: dict[str, Any], choices: dict[str, str]) -> dict[str, object]:
    """Return the flat, readable part of a configuration that becomes the run's parameters."""
    shared: dict[str, object] = {
        group: choices[group] for group in ("optimizer", "scheduler", "augmentation") if group in choices
    }
    parts = {**config["phases"], "model": config["model"]}
    return {
        **{group: choices[group] for group in ("model", "data")},
        **({**shared, "batch_size": config["batch_size"]} if "train" in config["phases"] else {}),  # those are phase train's
        "seed": config["seed"],
        **{key: value for key, value in nodes(parts) if not isinstance(value, dict) and not re.search(r"\._|\.\d", key)},
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
