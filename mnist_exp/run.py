"""Entry point: compose, check, train one run, score it, and leave it in MLflow."""

# torch and mlflow are imported inside functions: --help, --cfg job and tab completion must answer at once.
import json
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mnist_exp import CONF, HOME, output
from mnist_exp.command_line import answer
from mnist_exp.config import build, check, digest, nodes, resolve
from mnist_exp.errors import PrunedError, ResumableError, UserError
from mnist_exp.overrides import PARTS, command, is_location, is_neutral, key_of, location_overrides
from mnist_exp.signals import Interrupted, raise_interrupted, uninterrupted
from mnist_exp.sweep import differing, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mnist_exp.checkpoint import Checkpoint
    from mnist_exp.data import Dataset
    from mnist_exp.evaluation import Evaluation
    from mnist_exp.pictures import History
    from mnist_exp.training import Stage, State

MEASURED = ("time/", "train/examples_per_second")  # metrics that differ from run to run


def main() -> None:
    """Run the command line; a user's mistake ends with a message and status 1, a signal with 128 + its number."""
    answer(task)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def task(composed: DictConfig) -> float | None:
    """Train, score and record one run, or go on with one; return its last validation accuracy, for Hydra's sweepers."""
    raise_interrupted()
    job = HydraConfig.get()
    config = resolve(composed)
    overrides = [override for override in job.overrides.task if key_of(override).partition(".")[0] != "sweep"]
    if config["sweep"]["resume"]:
        raise UserError(f"sweep.resume={config['sweep']['resume']} goes on with a sweep: put -m before it.")
    if config["resume"]:
        outcome = resume(config, overrides)
    elif config["rerun"]:
        outcome = rerun(config, overrides)
    else:
        choices = {group: option for group, option in job.runtime.choices.items() if option and not group.startswith("hydra/")}
        outcome = run(config, choices, [override for override in overrides if not is_location(override)])
    return outcome.last.get("val/accuracy")


def resume(config: dict[str, Any], overrides: list[str]) -> "Outcome":
    """Go on with the run that `config["resume"]` names, with the recipe in its last good checkpoint."""
    from mnist_exp import checkpoint

    only_places(f"resume={config['resume']}", overrides)
    folder = output.find(Path(config["output_dir"]), config["resume"])
    with output.hold(folder):  # before it is read: another process may be about to finish the run
        output.refuse_finished(folder)
        saved, problem = checkpoint.load_last_good(folder)
        if problem:
            print(f"{problem}\nGoing on from the checkpoint before it.", file=sys.stderr)
        if saved.run_id != folder.name:
            raise UserError(
                f"{folder} holds the checkpoint of another run, {saved.run_id}: each run has a folder of its own name."
            )
        check(saved.config)
        stored = here(saved.config, config) | {"resume": config["resume"]}
        if not config["sweep"]["id"]:  # a job that is gone on with by itself remains what the sweep had made it
            stored["sweep"] = saved.config["sweep"] | {"data": None, "search": False}
        threads = saved.software.get("threads", "")
        return run(stored, saved.choices, saved.overrides, saved, threads=int(threads) if threads.isdecimal() else None)


def here(stored: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with all that says where things lie, and what a sweep says, from the present one."""
    data = stored["data"]
    if "root" in data:
        data = data | {"root": config["data"].get("root") or os.environ.get("MNIST_ROOT", str(HOME / "data"))}
    return stored | {key: config[key] for key in ("output_dir", "tracking", "sweep", "resume", "rerun")} | {"data": data}


def only_places(chosen: str, overrides: list[str]) -> None:
    """Raise UserError if `overrides` say more than where things lie, beside what takes a run's own recipe."""
    changed = [override for override in overrides if not is_location(override) and key_of(override) not in ("resume", "rerun")]
    if changed:
        raise UserError(
            f"{chosen} takes the run's own configuration: {' '.join(changed)} cannot change it. Allowed beside it are "
            "output_dir, tracking and data.root, which say where things lie. Start a new run for another recipe."
        )


def rerun(config: dict[str, Any], overrides: list[str]) -> "Outcome":
    """Run again what MLflow holds of the run `config["rerun"]`; raises UserError if its metrics do not come out identical."""
    from mnist_exp import provenance

    only_places(f"rerun={config['rerun']}", overrides)
    original = build(config["tracking"], "tracking").read(config["rerun"])
    if original.record.status != "FINISHED":
        raise UserError(f"rerun={config['rerun']}: the run is {original.record.status}; only a FINISHED one can be compared.")
    check(original.recipe.config)
    stored = here(original.recipe.config, config)
    now = provenance.software() | provenance.git_tags()
    before = original.record.tags
    changed = [f"{key} was {before.get(key)}, is {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        print(f"Not all is as it was: {'; '.join(changed)}.", file=sys.stderr)
    threads = int(before["threads"]) if before.get("threads", "").isdecimal() else None
    recipe = original.recipe
    outcome = run(stored, recipe.choices, recipe.overrides, digests=original.record.digests, threads=threads)
    differ = [
        key for key, points in original.points.items() if not key.startswith(MEASURED) and points != outcome.points.get(key)
    ]
    if differ:
        raise UserError(f"Run {outcome.run_id} differs from run {config['rerun']} in {', '.join(sorted(differ))}.")
    print(f"Run {outcome.run_id} came out identical to run {config['rerun']} in every metric but the measured times.")
    return outcome


def run(
    config: dict[str, Any],
    choices: dict[str, str],
    overrides: list[str],
    saved: "Checkpoint | None" = None,
    digests: dict[str, str] | None = None,
    threads: int | None = None,
) -> "Outcome":
    """Train, score and record what a resolved configuration describes.

    choices: the option of each group; overrides: as given on the command line; saved: the checkpoint to go on from;
    digests: that splits of the data must have; threads: of torch, on which a result's last bit depends.
    Raises UserError before anything is recorded where the configuration, the data, the folder or the store will not do.
    """
    started = time.perf_counter() - (saved.elapsed if saved else 0.0)
    if not {"model", "data"} <= choices.keys():
        raise UserError("The stored recipe does not say which options of the groups model and data were chosen.")
    import torch

    from mnist_exp import checkpoint, provenance
    from mnist_exp.console import Display
    from mnist_exp.data import derive_seed
    from mnist_exp.evaluation import evaluate
    from mnist_exp.models import count_parameters
    from mnist_exp.search import follow
    from mnist_exp.tracking import OUTCOME
    from mnist_exp.training import choose_device, choose_precision, fit, hold_freed_memory, plan

    seed, sweep = config["seed"], config["sweep"]
    hold_freed_memory()
    usual = default_threads()
    torch.set_num_threads(threads or usual)
    device = choose_device(config["device"])
    precision = choose_precision(config["precision"], device)
    with torch.device("meta"):  # counted before any memory is taken
        parameters = count_parameters(build(config["model"], "model"))
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "weights"))
        model = build(config["model"], "model").to(device)
    phases = {name: build(node, f"phases.{name}") for name, node in config["phases"].items()}
    data = build(config["data"], "data", seed=seed).to(device)
    found = {name: split.digest for name, split in data.splits.items()}
    expected = saved.digests if saved else digests or {}
    if any(found.get(name) != digest for name, digest in expected.items()):
        raise UserError(
            f"The run was trained on other data: it saw {expected}, here is {found}. "
            "Point MNIST_ROOT to the data that it was started with."
        )
    if sweep["data"] not in (None, data.name):
        raise UserError(
            f"The sweep was begun on {sweep['data']}, here is {data.name}. Point MNIST_ROOT to the data that it was begun "
            "with, or go on all the same with sweep.insist=true."
        )
    stages = plan(model, phases, data, Path(config["output_dir"]))
    tracker = build(config["tracking"], "tracking")
    output_dir = output.make_folder(Path(config["output_dir"]))

    state = saved.state if saved else None
    display = Display(stages, data, state["examples_seen"] if state else 0, quiet=bool(sweep["id"]))
    software = provenance.software() | {"threads": str(torch.get_num_threads())}
    before = saved.software if saved else software
    changed = "; ".join(f"{name} was {before.get(name)}, is {now}" for name, now in software.items() if before.get(name) != now)
    if changed:
        display.warn(f"Since the run was begun, {changed}: it need not end as it would have ended uninterrupted.")
    if data.notice:
        display.warn(data.notice)
    owner = provenance.owner_tags(output_dir)
    tags = {
        **provenance.git_tags(),
        **software,
        **provenance.machine_tags(device),
        **owner,
        "mlflow.source.type": "LOCAL",
        "data": data.name,
        "config_hash": digest(config),
        "overrides": " ".join(overrides),
        "mlflow.source.name": command("run", *overrides) if sweep["id"] else provenance.command_line(),
    }
    told = [override for override in overrides if not is_neutral(override)]
    if sweep["id"]:
        told = differing(told, sweep["varied"])
        tags |= {"mlflow.parentRunId": sweep["id"], "sweep_id": sweep["id"], "job_num": str(sweep["job"])}
        tags |= {"differs": " ".join(told), "mlflow.runColor": sweep["colour"]}
    if config["rerun"]:
        tags["rerun_of"] = config["rerun"]
    history = list(saved.history) if saved else []
    seconds = defaultdict(float, saved.seconds if saved else {})
    run_id = saved.run_id if saved else None
    with ExitStack() as lock, ExitStack() as held:  # the lock is let go when the run's end is written, not before
        # Which may have to wait, and can be stopped; a job waits for a store that is away, or a sweep would lose all the rest.
        tracker.open(waits=bool(sweep["id"]))
        with uninterrupted():  # what has begun is told how it ended
            tracked = held.enter_context(tracker.start(run_name(choices, told, data.name), tags, run_id))
        folder = output_dir / tracked.run_id
        if not run_id:
            lock.enter_context(output.hold(folder))
        lock.enter_context(how_to_go_on(folder, config))
        if not sweep["id"]:
            tracked.reap(output_dir)
        actual = {"precision": str(precision).removeprefix("torch."), "device": device.type, "data": data.name}
        tracked.params(selection(config, choices) | actual)
        tracked.text(OmegaConf.to_yaml(config), "config.yaml")
        tracked.text(json.dumps({"config": config, "choices": choices, "overrides": overrides}), "recipe.json")
        if not saved:
            tracked.text(provenance.packages(), "provenance/packages.txt")
            uncommitted = provenance.uncommitted()
            tracked.text(uncommitted.patch, "provenance/uncommitted.diff")
            tracked.text(uncommitted.unrecorded, "provenance/unrecorded.txt")
        else:
            tracked.tags(owner | {"resumed": f"at {display.examples_seen:,} examples" + (f"; {changed}" if changed else "")})
        for stage in stages:
            tracked.dataset(data, stage.phase.split, stage.name)
        tracked.dataset(data, data.validation, "validation")
        for examples_seen, metrics in history:
            tracked.metrics(metrics, examples_seen)

        def save(state: "State | None") -> None:
            reached = (state, history, dict(seconds), time.perf_counter() - started)
            checkpoint.save(folder, checkpoint.Checkpoint(tracked.run_id, config, choices, overrides, found, software, *reached))

        if not saved:
            save(None)
        told_search = follow(output_dir / sweep["id"], sweep["job"]) if sweep["search"] and sweep["id"] else None
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
                if told_search and told_search(report.examples_seen, report.metrics):
                    output.mark_finished(folder)
                    raise PrunedError(f"pruned at {report.examples_seen:,} examples: others do better by validation")
        tracked.file(folder / output.NAME)

        # The test set is scored once, here. Without one (data=mnist_tuning) the pictures show the validation split.
        # The jobs of a sweep share most of their recipe: it is not drawn again for each.
        judge = "test" if "test" in data.splits else data.validation
        evaluation = evaluate(model, data.splits[judge])
        results = {f"time/{phase}_seconds": spent for phase, spent in seconds.items()}
        results["model/parameters"] = parameters
        if judge == "test":
            tracked.dataset(data, "test", "test")
            results |= {"test/accuracy": evaluation.accuracy, "test/loss": evaluation.loss}
        for name, drawing in drawings(evaluation, judge, data, stages, history, seed, recipe=not sweep["id"]).items():
            tracked.figure(drawing, f"pictures/{name}.png")
        tracked.text(json.dumps({"split": judge, "history": history, "mistakes": evaluation.mistakes}), OUTCOME)
        tracked.model(model.eval(), data.splits[judge].images[:2].cpu().numpy(), folder / "model", config)

        results["time/total_seconds"] = time.perf_counter() - started
        tracked.metrics(results, history[-1][0])
        outcome = Outcome(tracked.run_id, [*history, (history[-1][0], results)])
        rows = result_rows(outcome.last, data)
        tracked.tags({"mlflow.note.content": description(rows, overrides, data.notice)})
        with uninterrupted():  # finished in the store and on the disk, or in neither
            held.close()
            output.mark_finished(folder)
    rows |= {"run": tracked.run_id, "checkpoint": os.path.relpath(folder / output.NAME)}
    display.results(rows, tracked.how_to_open())
    return outcome


@contextmanager
def how_to_go_on(folder: Path, config: dict[str, Any]) -> Iterator[None]:
    """Add the command that goes on with the run in `folder` to an exception from outside that leaves it unfinished.

    A sweep says itself how its jobs are gone on with.
    """
    try:
        yield
    except (Interrupted, ResumableError, MemoryError, RuntimeError) as error:
        if not (config["sweep"]["id"] or output.is_finished(folder)):
            error.add_note(f"`{command('run', f'resume={folder.name}', *location_overrides(config))}` goes on with the run.")
        raise


@cache
def default_threads() -> int:
    """Return the number of threads that torch takes when nobody tells it."""
    import torch

    return torch.get_num_threads()


@dataclass(frozen=True)
class Outcome:
    """What a run came to: (examples seen, metrics) of every report, and of its end."""

    run_id: str
    history: "History"

    @property
    def last(self) -> dict[str, float]:
        """The last value of each metric."""
        return {key: value for _, metrics in self.history for key, value in metrics.items()}

    @property
    def points(self) -> dict[str, dict[int, float]]:
        """The values of each metric, by examples seen."""
        points: dict[str, dict[int, float]] = defaultdict(dict)
        for examples_seen, metrics in self.history:
            for key, value in metrics.items():
                points[key][examples_seen] = value
        return points


def drawings(
    evaluation: "Evaluation", judge: str, data: "Dataset", stages: "list[Stage]", history: "History", seed: int, *, recipe: bool
) -> "dict[str, Callable[[], Figure]]":
    """Return what draws each picture of a run, by name: those of its result, and, if asked for, those of its `recipe`."""
    from mnist_exp import pictures
    from mnist_exp.data import generator

    first = stages[0].phase
    sample = data.splits[first.split].images[:8]
    title = f"{judge}, accuracy {evaluation.accuracy:.2%}"
    of_result: dict[str, Callable[[], Figure]] = {
        "confusion_matrix": lambda: pictures.confusion_matrix(evaluation, title),
        "worst_mistakes": lambda: pictures.worst_mistakes(evaluation, data.splits[judge].images),
        "learning_curves": lambda: pictures.learning_curves(history),
    }
    of_recipe: dict[str, Callable[[], Figure]] = {
        "learning_rate": lambda: pictures.learning_rate(history),
        "augmented_digits": lambda: pictures.augmented_digits(sample, first.augmentation, generator(seed, "picture")),
    }
    return of_result | of_recipe if recipe else of_result


def run_name(choices: dict[str, str], told: list[str], data: str) -> str:
    """Return the run's name: its model, what else of the recipe is told of it, and its data if it is not the usual."""
    rest = [short(override, choices) for override in told if not re.match("(model|data)=", override)]
    return " ".join([choices["model"], *([] if data == "mnist" else [data]), *rest])[:200]


def selection(config: dict[str, Any], choices: dict[str, str]) -> dict[str, object]:
    """Return the flat, readable part of a configuration that becomes the run's parameters."""
    shared: dict[str, object] = {group: choices[group] for group in PARTS if group in choices}
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
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    warning = f"**{notice}**\n\n" if notice else ""
    return (
        f"{warning}| | |\n| --- | --- |\n{table}\n\nRepeat it: `{command('run', *overrides)}`\n\n"
        "Pictures, configuration, checkpoint and the uncommitted changes are under Artifacts."
    )


if __name__ == "__main__":
    from mnist_exp.run import main  # as a module of its own name, which a worker process can import

    main()
