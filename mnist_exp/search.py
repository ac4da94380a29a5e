"""A search: Optuna proposes the jobs of a sweep by the results of those before, and stops the hopeless ones early."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep

from mnist_exp.errors import PrunedError, UserError
from mnist_exp.sweep import RANKED_BY, GridSweeper, Job, Sweep, by_job
from mnist_exp.workers import cores

if TYPE_CHECKING:
    from optuna import Study, Trial

STUDY = "search"


class OptunaSweeper(GridSweeper):
    """Searches what the command line leaves open: choice(...), range(...), interval(...), tag(log, interval(...)).

    n_trials: jobs in all; at_once: jobs proposed together, which then run in parallel, null: one for each core; params:
    as on the command line.
    The study is kept beside the parent's lock, in its output folder, and is gone on with by `sweep.resume`. TPE proposes
    (Bergstra et al. 2011), and a trial whose validation accuracy lies below the median at the same step is pruned.
    """

    def __init__(self, n_trials: int, at_once: int | None, params: dict[str, str] | None = None) -> None:
        super().__init__(params)
        self.n_trials, self.at_once = n_trials, at_once

    def total(self, jobs: list[Job]) -> int:
        """Return how many jobs there will be."""
        return self.n_trials

    def define(self, overrides: list[str], where: list[str]) -> list[Job]:
        """Return no job: they are proposed one after the other; raises UserError where a search could see the test set."""
        if not self.recipe["data"].get("validation_size"):
            raise UserError("A search must not see the test set: add data=mnist_tuning, which validates on training images.")
        return []

    def varied(self, jobs: list[Job], overrides: list[str]) -> list[str]:
        """Return the keys that are searched."""
        return [key for key, value in self._space(overrides).items() if not isinstance(value, str)]

    def run_jobs(self, sweep: Sweep) -> None:
        """Propose, run and judge until there are n_trials jobs."""
        uri = f"sqlite:///{sweep.folder.absolute()}/optuna.db"
        study = open_study(uri, self.recipe["seed"])
        sweep.told.append(f"sweep.study={uri}")
        space = self._space(sweep.overrides)
        while True:
            super().run_jobs(sweep)
            judge(study, sweep)
            missing = min(self.at_once or cores(), self.n_trials - len(sweep.jobs))
            if missing <= 0:
                return
            for _ in range(missing):
                trial = study.ask()
                proposed = [f"{key}={suggest(trial, key, value)}" for key, value in space.items()]
                sweep.jobs.append(self.job(trial.number, [*proposed, *sweep.where]))
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


def open_study(uri: str, seed: int) -> "Study":
    """Return the study at `uri`, created if it is missing; raises UserError without Optuna."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("hydra/sweeper=optuna needs Optuna: pip install -e '.[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=STUDY,
        storage=uri,
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(),
    )


def suggest(trial: "Trial", key: str, value: Any) -> object:
    """Return the trial's value of `key`, as it is written on a command line."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return trial.suggest_categorical(key, value)
    return trial.suggest_float(key, float(value.start), float(value.end), log="log" in value.tags)


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
        else:
            study.tell(trial.number, state=TrialState.FAIL)


def follow(uri: str, number: int) -> Callable[[int, dict[str, float]], None]:
    """Return what a job calls with examples seen and metrics of a report; it raises PrunedError when the trial is hopeless."""
    import optuna

    study = open_study(uri, seed=0)
    (trial_id,) = [trial._trial_id for trial in study.get_trials() if trial.number == number]
    trial = optuna.trial.Trial(study, trial_id)

    def report(examples_seen: int, metrics: dict[str, float]) -> None:
        if RANKED_BY in metrics:
            trial.report(metrics[RANKED_BY], examples_seen)
            if trial.should_prune():
                raise PrunedError(
                    f"pruned at {examples_seen:,} examples: {RANKED_BY} {metrics[RANKED_BY]:.2%} is below the median"
                )

    return report
