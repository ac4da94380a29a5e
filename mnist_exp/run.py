"""Command: train one run, resume or repeat one, or (with -m) run a sweep."""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mnist_exp.cli import check_order, leave_credentials, reported_errors
from mnist_exp.composing import choices_of, config_dir_of, from_composed, read_environment
from mnist_exp.errors import UserError
from mnist_exp.nodes import is_location, remember_locations
from mnist_exp.overrides import JOB_KEY, check_groups, check_ids, section_of
from mnist_exp.paths import CONF, NAME
from mnist_exp.settings import Recipe, check_repeats
from mnist_exp.signals import install_signal_handlers


def main() -> None:
    """Run the command line."""
    leave_credentials()
    with reported_errors():
        check_order(sys.argv[1:])
        check_groups(sys.argv[1:])
        read_environment()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra pass on exceptions; its own messages suggest wrong remedies
        task()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def task(composed: DictConfig) -> float | None:
    """Run the composed configuration; return the last value of its objective, for Hydra's sweepers."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:  # a job of a sweep: its error is the sweep's to report
        return run_composed(composed)
    with reported_errors():  # here, because Hydra prints a line of its own before it passes on an exception
        run_composed(composed)
    return None


def run_composed(composed: DictConfig) -> float | None:
    """Train, resume or repeat the run that a composed configuration describes; return its last objective."""
    install_signal_handlers()
    from mnist_exp.experiment import repeat, runner  # after the command line is parsed: they take seconds to import
    from mnist_exp.storage.checkpoint import Checkpoint
    from mnist_exp.sweep.search import make_pruning_callback

    job = HydraConfig.get()
    try:
        overrides = list(job.overrides.task)
    except OmegaConfBaseException as error:
        raise UserError(f"The command line cannot be resolved: {str(error).splitlines()[0]}. Write plain values.") from error
    check_ids(overrides)
    remember_locations(overrides, config_dir_of(job))
    settings = from_composed(composed)
    context = settings.sweep_job
    if context and not (job.mode == RunMode.MULTIRUN and job.sweeper["_target_"].startswith(f"hydra_plugins.{NAME}.")):
        raise UserError(f"{JOB_KEY} is set by sweeps only.", key=JOB_KEY, remedy="Leave it out.")
    typed = [override for override in overrides if section_of(override) not in ("sweep", JOB_KEY)]
    in_sweep_only = [override for override in overrides if section_of(override) == "sweep"]
    if in_sweep_only and job.mode == RunMode.RUN:
        raise UserError(f"{' '.join(in_sweep_only)} needs a sweep.", key=in_sweep_only[0], remedy="Add -m as the first argument.")
    check_repeats(settings, typed)
    prune = None
    if context and context.in_search:
        prune = make_pruning_callback(settings.output_dir / context.sweep_id, context.number, context.objective)
    if context and not settings.resume and job.launcher["_target_"] != f"hydra_plugins.{NAME}.Workers":
        settings = repeat.requeued(settings, context)
    if settings.resume:
        result = repeat.resume(settings, prune)
    elif settings.rerun:
        result = repeat.rerun(settings)
    else:
        recipe = Recipe(settings, choices_of(job), [override for override in typed if not is_location(override)])
        result = runner.run(repeat.request(Checkpoint("", recipe), should_prune=prune))
    return result.metrics.get(settings.objective)


if __name__ == "__main__":
    from mnist_exp.run import main  # under its own name, so that worker processes can import it

    main()
