"""A search: Optuna proposes the jobs of a sweep by the results of those before, and stops the hopeless ones early."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep

from mnist_exp.definition import Definition, Job
from mnist_exp.errors import UserError
from mnist_exp.sweep import RANKED_BY, GridSweeper, Sweep, by_job, is_done
from mnist_exp.workers import cores

if TYPE_CHECKING:
    from optuna import Study, Trial

STUDY = "search"
DATABASE = "optuna.db"  # in the sweep's folder


class OptunaSweeper(GridSweeper):
    """Searches what the command line leaves open: choice(...), range(...), interval(...), tag(log, interval(...)).

    n_trials: jobs in all; at_once: jobs proposed together, which then run in parallel, null: one for each core; params:
    as on the command line.
    The study is kept beside the parent's lock, in its output folder, and is gone on with by `sweep.resume`. TPE proposes
    (Bergstra et al. 2011), and a trial whose validation accuracy lies below the median at the same step is pruned.
    """

    chosen = ("hydra/sweeper=optuna",)

    def __init__(self, n_trials: int, at_once: int | None, params: dict[str, str] | None = None) -> None:
        super().__init__(params)
        if n_trials < 1 or (at_once is not None and at_once < 1):
            raise UserError(f"hydra.sweeper: n_trials={n_trials} and at_once={at_once} must be at least 1.")
        self.n_trials, self.at_once = n_trials, at_once

    def total(self, jobs: list[Job], definition: Definition | None) -> int:
        """Return how many jobs there will be: as many as the search was begun with, unless the command line says otherwise."""
        told = any(override.startswith("hydra.sweeper.n_trials=") for override in self.composed.hydra.overrides.hydra)
        return definition.total if definition and not told else self.n_trials

    def check(self, config: dict[str, Any]) -> None:
        """Raise UserError where a search could see the test set."""
        if not config["data"].get("validation_size"):
            raise UserError("A search must not see the test set: add data=mnist_tuning, which validates on training images.")

    def define(self, overrides: list[str]) -> list[Job]:
        """Return no job: they are proposed one after the other."""
        self.check(self.recipe)
        return []

    def varied(self, jobs: list[Job], overrides: list[str]) -> list[str]:
        """Return the keys that are searched."""
        return [key for key, value in self._space(overrides).items() if not isinstance(value, str)]

    def run_jobs(self, sweep: Sweep) -> None:
        """Propose, run and judge until there are n_trials jobs."""
        if sweep.jobs and not (sweep.folder / DATABASE).exists():
            raise UserError(f"The study of this search is not in {sweep.folder}: name the output_dir that it was begun with.")
        study = open_study(sweep.folder, self.recipe["seed"])
        sweep.told.append("sweep.search=true")
        space = self._space(sweep.overrides)
        jobs = sweep.jobs
        while True:
            self.launch_missing(sweep, jobs)
            judge(study, sweep)
            missing = min(self.at_once or cores(), sweep.total - len(sweep.jobs))
            failed = not all(map(is_done, sweep.tracked.children()))
            if missing <= 0 or (failed and self.recipe["sweep"]["on_failure"] == "stop"):
                return
            jobs = []
            for _ in range(missing):
                trial = study.ask()
                jobs.append(self.job(trial.number, [f"{key}={suggest(trial, key, value)}" for key, value in space.items()]))
            sweep.jobs += jobs
            sweep.store_definition(type(self).__name__)

    def _space(self, overrides: list[str]) -> dict[str, Any]:
        """Return what each key may be given: one text, a list of them, or an interval."""
        space: dict[str, Any] = {}
        for override in self.parse(overrides):
            if not override.is_sweep_override():
                value: Any = override.get_value_element_as_str()
            elif override.is_discrete_sweep():
                value = list(override.sweep_string_iterator())
            else:
                value = override.value()
                if not isinstance(value, IntervalSweep):
                    raise UserError(
                        f"{override.input_line}: allowed in a search are choice, range, interval, tag(log, interval)."
                    )
            space[override.get_key_element()] = value
        return space


def open_study(folder: Path, seed: int) -> "Study":
    """Return the study in a sweep's `folder`, created if it is missing; raises UserError without Optuna."""
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
    study.sampler = optuna.samplers.TPESampler(seed=seed + 1000 * done)  # or it would propose the first ones again
    return study


def suggest(trial: "Trial", key: str, value: Any) -> object:
    """Return the trial's value of `key`, as it is written on a command line.

    Raises UserError where the study holds another than may be proposed: whoever can write to it can prescribe one.
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
        raise UserError(f"The study of this search is damaged: its value of {key} cannot be used: {error}") from error
    if not is_allowed:
        raise UserError(f"The study of this search is damaged: it prescribes {key}={proposed}, which was not to be searched.")
    return proposed


def judge(study: "Study", sweep: Sweep) -> None:
    """Tell the study what became of the trials whose jobs have ended."""
    from optuna.trial import TrialState

    children = by_job(sweep.tracked.children())
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        child = children.get(trial.number)
        if child and child.status == "FINISHED" and RANKED_BY in child.metrics:
            study.tell(trial.number, child.metrics[RANKED_BY])
        elif child and "pruned" in child.tags:
            study.tell(trial.number, state=TrialState.PRUNED)
        elif child:
            study.tell(trial.number, state=TrialState.FAIL)


def follow(folder: Path, number: int) -> Callable[[int, Mapping[str, float]], bool]:
    """Return what a job calls with examples seen and metrics of each report, to learn whether its trial is hopeless."""
    import optuna

    study = open_study(folder, seed=0)
    (frozen,) = [trial for trial in study.get_trials() if trial.number == number]
    trial = optuna.trial.Trial(study, frozen._trial_id)

    def hopeless(examples_seen: int, metrics: Mapping[str, float]) -> bool:
        if RANKED_BY not in metrics or frozen.state.is_finished():  # finished: it has failed once, and is tried again
            return False
        trial.report(metrics[RANKED_BY], examples_seen)
        return trial.should_prune()

    return hopeless
