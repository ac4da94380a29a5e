"""Hydra's sweeper for searches: Optuna proposes jobs from the results of earlier ones, and prunes those that perform badly."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep

from mnist_exp.errors import UserError
from mnist_exp.sweep.grid import GridSweeper
from mnist_exp.sweep.jobs import by_job
from mnist_exp.sweep.parent import Parent
from mnist_exp.sweep.summary import RANKED_BY
from mnist_exp.sweep.workers import cores
from mnist_exp.tracking.definition import Definition, Job
from mnist_exp.tracking.tags import PRUNED

if TYPE_CHECKING:
    from optuna import Study, Trial

STUDY = "search"
DATABASE = "optuna.db"  # in the sweep's folder


class OptunaSweeper(GridSweeper):
    """Searches the values that the command line leaves open: choice(...), range(...), interval(...), tag(log, interval(...)).

    The study is in the parent's output folder, where `sweep.resume` finds it. TPE proposes the trials (Bergstra et al. 2011). A
    trial is pruned if its validation accuracy is below the median at the same step.

    Args:
        n_trials: The number of jobs.
        at_once: The number of jobs that are proposed together and then run in parallel; null: one for each core.
        params: Values by key, as on the command line, for presets.
    """

    flags = ("hydra/sweeper=optuna",)

    def __init__(self, n_trials: int, at_once: int | None, params: dict[str, str] | None = None) -> None:
        super().__init__(params)
        if n_trials < 1 or (at_once is not None and at_once < 1):
            raise UserError(f"hydra.sweeper: n_trials={n_trials}, at_once={at_once} is invalid: expected integers >= 1.")
        self.n_trials, self.at_once = n_trials, at_once

    def total(self, jobs: list[Job]) -> int:
        return self.n_trials

    def resumed(self, stored: Definition) -> Definition:
        """Return the stored definition; the command line may change the number of jobs."""
        changed = any(override.startswith("hydra.sweeper.n_trials=") for override in self.composed.hydra.overrides.hydra)
        return replace(stored, total=self.n_trials) if changed else stored

    def check(self, config: dict[str, Any]) -> None:
        """Raise UserError if the search could see the test set."""
        if not config["data"].get("validation_size"):
            raise UserError("A search must not see the test set: add data=mnist_tuning, which validates on training images.")

    def define(self, overrides: list[str]) -> list[Job]:
        """Return no job: Optuna proposes them during the sweep."""
        self.check(self.run_config)
        return []

    def varied(self, definition: Definition) -> list[str]:
        """Return the keys that are searched."""
        return [key for key, value in self._space(definition.overrides).items() if not isinstance(value, str)]

    def run_jobs(self, parent: Parent) -> None:
        """Propose jobs, run them, and report their results to the study, until there are n_trials jobs."""
        definition = parent.definition
        if definition.jobs and not (parent.folder / DATABASE).exists():
            raise UserError(f"The study of this search is not in {parent.folder}: set output_dir to the folder it started with.")
        study = open_study(parent.folder, self.run_config["seed"])
        parent.in_search = True
        space = self._space(definition.overrides)
        jobs = list(definition.jobs)
        while True:
            self.launch_missing(parent, jobs)
            tell_study(study, parent)
            missing = min(self.at_once or cores(), definition.total - len(definition.jobs))
            failed = not all(child.is_done for child in parent.children())
            if missing <= 0 or (failed and self.run_config["sweep"]["on_failure"] == "stop"):
                return
            jobs = []
            for _ in range(missing):
                trial = study.ask()
                overrides = [f"{key}={suggest(trial, key, value)}" for key, value in space.items()]
                jobs.append(self.composer.job(trial.number, overrides))
            definition.jobs.extend(jobs)
            parent.define()

    def _space(self, overrides: list[str]) -> dict[str, Any]:
        """Return the values of each key: a single one, a list, or an interval."""
        space: dict[str, Any] = {}
        for override in self.composer.parse(overrides):
            if not override.is_sweep_override():
                value: Any = override.get_value_element_as_str()
            elif override.is_discrete_sweep():
                value = list(override.sweep_string_iterator())
            else:
                value = override.value()
                if not isinstance(value, IntervalSweep):
                    raise UserError(f"{override.input_line} is invalid: expected choice, range, interval or tag(log, interval).")
            space[override.get_key_element()] = value
        return space


def open_study(folder: Path, seed: int) -> "Study":
    """Return the study in a sweep's folder, created if missing; raises UserError if Optuna is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("hydra/sweeper=optuna needs Optuna: pip install -e '.[search]'.") from error
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database = folder.absolute() / DATABASE
    try:
        study = optuna.create_study(
            study_name=STUDY,
            storage=f"sqlite:///{database}",
            load_if_exists=True,
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(),
        )
        done = len(study.trials)
    except (RuntimeError, ValueError, KeyError, SQLAlchemyError) as error:
        raise UserError(f"{database} cannot be read as the study of a search: {str(error).splitlines()[0]}") from error
    study.sampler = optuna.samplers.TPESampler(seed=seed + 1000 * done)  # a fixed seed would repeat the first trials
    return study


def suggest(trial: "Trial", key: str, value: Any) -> object:
    """Return the trial's value of `key`, as written on a command line.

    Raises UserError if the value is outside the search space: anyone who can write to the study can enqueue one.
    """
    if isinstance(value, str):
        return value
    try:
        if isinstance(value, list):
            proposed: object = trial.suggest_categorical(key, value)
            is_allowed = proposed in value
        else:
            start, end = float(value.start), float(value.end)
            proposed = trial.suggest_float(key, start, end, log="log" in value.tags)
            is_allowed = start <= proposed <= end
    except (TypeError, ValueError) as error:
        raise UserError(f"The study of this search is damaged: its value of {key} is unusable: {error}") from error
    if not is_allowed:
        raise UserError(f"The study of this search is damaged: it proposes {key}={proposed}, outside the search space.")
    return proposed


def tell_study(study: "Study", parent: Parent) -> None:
    """Report the results of the jobs that have ended to the study."""
    from optuna.trial import TrialState

    children = by_job(parent.children())
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        child = children.get(trial.number)
        if child and child.status == "FINISHED" and RANKED_BY in child.metrics:
            study.tell(trial.number, child.metrics[RANKED_BY])
        elif child and PRUNED in child.tags:
            study.tell(trial.number, state=TrialState.PRUNED)
        elif child:
            study.tell(trial.number, state=TrialState.FAIL)


def make_pruning_callback(folder: Path, number: int) -> Callable[[int, Mapping[str, float]], bool]:
    """Return the function that decides whether to prune a job, called with the examples seen and the metrics of each report.

    Args:
        folder: The folder of the sweep.
        number: The number of the job.
    """
    import optuna

    study = open_study(folder, seed=0)
    (frozen,) = [trial for trial in study.get_trials() if trial.number == number]
    # Optuna has no public way to continue a trial in another process. tests/sweep/test_search.py fails if this changes.
    trial = optuna.trial.Trial(study, frozen._trial_id)

    def should_prune(examples_seen: int, metrics: Mapping[str, float]) -> bool:
        if RANKED_BY not in metrics or frozen.state.is_finished():  # finished: the job failed and is repeated
            return False
        trial.report(metrics[RANKED_BY], examples_seen)
        return trial.should_prune()

    return should_prune
