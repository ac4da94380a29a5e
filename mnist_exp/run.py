"""Command: train one run, resume or repeat one, or (with -m) run a sweep."""

# torch and mlflow are imported inside functions: --help, --cfg job and tab completion must answer at once.
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from mnist_exp import CONF, HOME
from mnist_exp.cli import run_command
from mnist_exp.config import as_list, build, check, resolve
from mnist_exp.errors import UserError
from mnist_exp.metrics import metric_of
from mnist_exp.overrides import JOB_KEY, command, is_location, keep_ids, key_of
from mnist_exp.signals import install_signal_handlers
from mnist_exp.storage import run_dir

if TYPE_CHECKING:
    from mnist_exp.experiment.runner import Outcome, RunRequest
    from mnist_exp.tracking.base import Store
    from mnist_exp.tracking.definition import JobContext


def main() -> None:
    """Run the command line; a user's mistake ends with a message and status 1, a signal with 128 + its number."""
    run_command(task)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def task(composed: DictConfig) -> float | None:
    """Run the composed configuration; return its last validation accuracy, for Hydra's sweepers."""
    install_signal_handlers()
    job = HydraConfig.get()
    task_overrides = as_list(job.overrides.task)
    keep_ids(composed, task_overrides)
    config, context = take_job_context(composed, is_job=job.mode == RunMode.MULTIRUN)
    overrides = [override for override in task_overrides if key_of(override).partition(".")[0] not in ("sweep", "plan", JOB_KEY)]
    typed_plan = [override for override in task_overrides if key_of(override).partition(".")[0] == "plan"]
    if typed_plan and context is None:
        raise UserError(f"{' '.join(typed_plan)} needs a sweep, whose comparison it plans: add -m before it.")
    for key in ("resume", "extend"):
        if config["sweep"][key]:
            raise UserError(f"sweep.{key}={config['sweep'][key]} needs a sweep: add -m before it.")
    if config["resume"]:
        outcome = resume(config, overrides, context)
    elif config["rerun"]:
        outcome = rerun(config, overrides, context)
    else:
        choices = {group: option for group, option in job.runtime.choices.items() if option and not group.startswith("hydra/")}
        outcome = _run(config, choices, [override for override in overrides if not is_location(override)], context)
    return outcome.last.get("val/accuracy")


def take_job_context(composed: DictConfig, *, is_job: bool) -> "tuple[dict[str, Any], JobContext | None]":
    """Return the resolved configuration, and the context of a job of a sweep, which is no part of it."""
    if not is_job or JOB_KEY not in composed:  # typed by a user, the key is refused like any unknown one
        return resolve(composed), None
    from mnist_exp.tracking.definition import parse_job_context

    rest = composed.copy()
    with open_dict(rest):
        context = parse_job_context(rest.pop(JOB_KEY))
    return resolve(rest), context


def _run(
    config: dict[str, Any], choices: dict[str, str], overrides: list[str], job: "JobContext | None", **options: Any
) -> "Outcome":
    """Run a configuration; options: further arguments of `RunRequest`."""
    from mnist_exp.experiment import runner
    from mnist_exp.sweep.search import make_pruning_callback
    from mnist_exp.tracking import provenance

    make_should_prune = None
    repeat = command("run", *overrides) if job else provenance.command_line()
    request: RunRequest = runner.RunRequest(config, choices, overrides, repeat, job=job, **options)
    if job and job.in_search:
        make_should_prune = partial(make_pruning_callback, Path(config["output_dir"]) / job.sweep_id, job.number)
    return runner.run(request, make_should_prune)


def resume(config: dict[str, Any], overrides: list[str], job: "JobContext | None") -> "Outcome":
    """Resume the run `config["resume"]` from its last intact checkpoint, with the configuration that it contains."""
    from mnist_exp.storage import checkpoint
    from mnist_exp.tracking.definition import parse_job_context

    refuse_changes(f"resume={config['resume']}", overrides)
    folder = run_dir.find_run(Path(config["output_dir"]), config["resume"])
    with run_dir.lock_run(folder):  # before reading: another process may be about to finish the run
        run_dir.refuse_finished(folder)
        saved, problem = checkpoint.load_last_good(folder)
        if problem:
            print(f"{problem}\nResuming from the checkpoint before it.", file=sys.stderr)
        if saved.run_id != folder.name:
            raise UserError(f"{folder} contains the checkpoint of run {saved.run_id}: expected a folder named like its run.")
        check(saved.config)
        stored = with_locations(saved.config, config) | {"resume": config["resume"]}
        if job is None and saved.job:  # a job of a sweep that is resumed alone still belongs to its sweep
            job = replace(parse_job_context(saved.job), data=None, in_search=False)
        threads = saved.software.get("threads", "")
        return _run(
            stored, saved.choices, saved.overrides, job, checkpoint=saved, threads=int(threads) if threads.isdecimal() else None
        )


def with_locations(stored: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with all locations, and the settings of the sweep, taken from the present one."""
    data = stored["data"]
    if "root" in data:
        data = data | {"root": config["data"].get("root") or os.environ.get("MNIST_ROOT", str(HOME / "data"))}
    return stored | {key: config[key] for key in ("output_dir", "tracking", "sweep", "plan", "resume", "rerun")} | {"data": data}


def refuse_changes(chosen: str, overrides: list[str]) -> None:
    """Raise UserError if `overrides` change more than locations, while the run brings its own configuration."""
    changed = [override for override in overrides if not is_location(override) and key_of(override) not in ("resume", "rerun")]
    if changed:
        raise UserError(
            f"{chosen} uses the run's own configuration: {' '.join(changed)} cannot change it. Expected at most the locations "
            "output_dir, tracking and data.root. Start a new run for another recipe."
        )


def rerun(config: dict[str, Any], overrides: list[str], job: "JobContext | None") -> "Outcome":
    """Repeat the stored run `config["rerun"]`; raises UserError if a metric differs."""
    from mnist_exp.tracking import provenance

    refuse_changes(f"rerun={config['rerun']}", overrides)
    store: Store = build(config["tracking"], "tracking")
    config = config | {"rerun": store.resolve_id(config["rerun"])}
    original = store.read(config["rerun"])
    before, recipe = original.record.tags, original.recipe
    if original.record.status != "FINISHED":
        raise UserError(f"rerun={config['rerun']}: the run is {original.record.status}, expected a FINISHED run.")
    check(recipe.config)
    now = provenance.software() | provenance.git_tags()
    changed = [f"{key} was {before.get(key)}, is {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        print(f"The environment differs from the original run's: {'; '.join(changed)}.", file=sys.stderr)
    outcome = _run(
        with_locations(recipe.config, config),
        recipe.choices,
        recipe.overrides,
        job,
        digests=original.record.digests,
        threads=int(before["threads"]) if before.get("threads", "").isdecimal() else None,
    )
    compared = {name: points for name, points in original.points.items() if not metric_of(name).is_measured_time}
    differ = [name for name, points in compared.items() if points != outcome.points.get(name)]
    if differ:
        raise UserError(f"Run {outcome.run_id} differs from run {config['rerun']} in {', '.join(sorted(differ))}.")
    print(f"Run {outcome.run_id} is identical to run {config['rerun']} in every metric except the measured times.")
    return outcome


if __name__ == "__main__":
    from mnist_exp.run import main  # under its own name, so that worker processes can import it

    main()
