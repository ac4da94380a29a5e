"""Searches: Optuna proposes jobs from the results of earlier ones, and prunes those that perform badly."""

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from mnist_exp.errors import UserError
from mnist_exp.metrics import metric_of
from mnist_exp.overrides import key_of, parse
from mnist_exp.sweep import search_report
from mnist_exp.sweep.grid import GridSweep
from mnist_exp.sweep.jobs import Job, failed
from mnist_exp.sweep.parent import Parent
from mnist_exp.sweep.workers import JobError, WorkerPool, cores
from mnist_exp.tracking.base import Sweep, latest_run_per_job
from mnist_exp.tracking.tags import PRUNED

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import BaseTrial, FrozenTrial

STUDY = "search"
DATABASE = "optuna.db"  # in the sweep's folder


class SearchSweep(GridSweep):
    """Searches the values that the command line leaves open: choice(...), range(...), interval(...), tag(log, interval(...)).

    The study is in the parent's output folder, where `sweep.resume` finds it. TPE proposes the trials (Bergstra et al. 2011); one
    that still runs counts as a bad one (constant liar), so that the next is proposed elsewhere. A trial is pruned if its
    objective is worse than the median at the same step. No trial is scored on the test set.

    Args:
        context: As for `GridSweep`.
        task: As for `GridSweep`.
        composed: As for `GridSweep`.
        params: As for `GridSweep`.
        n_trials: The number of jobs.
        at_once: The number of jobs that are proposed together and then run in parallel. None: workers of this machine get the
            next one as soon as they are free; other launchers as many as there are cores.
    """

    selecting_overrides = ("hydra/sweeper=optuna",)
    name = "optuna"

    def __init__(
        self,
        context: HydraContext,
        task: TaskFunction,
        composed: DictConfig,
        params: dict[str, str],
        n_trials: int,
        at_once: int | None,
    ) -> None:
        if find_spec("optuna") is None:
            raise UserError.invalid(
                "hydra/sweeper", "optuna", "an installed package", "Install it with: pip install -e '.[search]'"
            )
        for key, value in {"n_trials": n_trials, "at_once": at_once}.items():
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise UserError.invalid(f"hydra.sweeper.{key}", value, "an integer >= 1")
        self.n_trials, self.at_once = n_trials, at_once
        super().__init__(context, task, composed, params)

    def total(self, stored: Sweep | None, jobs: list[Job]) -> int:
        """Return the number of trials; the command line of a resumed search may change it."""
        changed = any(override.startswith("hydra.sweeper.n_trials=") for override in self.composed.hydra.overrides.hydra)
        return max(len(jobs), stored.total if stored and not changed else self.n_trials)

    def define(self, stored: Sweep | None, grids: list[list[str]]) -> list[Job]:
        """Return the trials of a stored search; Optuna proposes others while it runs."""
        if stored is None:
            self.composer.job(0, [override for override in grids[0] if not parse(override).is_sweep_override()])  # checks it
            return []
        folder = self.settings.output_dir / stored.run_id
        if not (folder / DATABASE).exists():
            raise UserError(f"The study of this search is not in {folder}: set output_dir to the folder it started with.")
        study = open_study(folder, self.settings.seed, stored.objective)
        try:
            return [self._job(_continued(study, trial), grids) for trial in study.trials]
        except ValueError as error:
            raise UserError(f"{folder / DATABASE} is not the study of this search: {error}") from error

    def swept_keys(self, grids: list[list[str]]) -> list[str]:
        """Return the keys that are searched."""
        return [key_of(override) for override in grids[0] if parse(override).is_sweep_override()]

    def run_jobs(self, parent: Parent) -> None:
        """Propose jobs, run them, and report their results to the study, until there are n_trials jobs."""
        self.study = study = open_study(parent.folder, self.settings.seed, parent.objective)
        if self.at_once is None and self.pool:
            self._run_when_free(self.pool, study, parent)
            return
        jobs = list(parent.jobs)
        while True:
            self.launch_missing(parent, jobs)
            tell_study(study, parent)
            missing = min(self.at_once or cores(), parent.total - len(parent.jobs))
            if missing <= 0:
                return
            jobs = [self._job(study.ask(), parent.grids) for _ in range(missing)]
            parent.jobs.extend(jobs)

    def _run_when_free(self, pool: WorkerPool, study: "Study", parent: Parent) -> None:
        """Propose the next job when a worker is free."""
        if not self.settings.sweep.force:
            parent.wait_for_running_jobs()
        tell_study(study, parent)  # of jobs that have ended without their parent
        unfinished = parent.missing(parent.jobs)
        left = len(unfinished) + parent.total - len(parent.jobs)

        def jobs() -> Iterator[tuple[int, list[str]]]:
            yield from unfinished.items()
            while len(parent.jobs) < parent.total:
                parent.jobs.append(self._job(study.ask(), parent.grids))
                yield from parent.missing(parent.jobs[-1:]).items()

        def record(number: int, result: JobReturn) -> None:
            parent.results[number] = result
            if result.status == JobStatus.FAILED:
                parent.mark_killed([number])
            tell_study(study, parent)

        try:
            if left:
                pool.run(jobs(), left, record)
        except JobError as error:
            parent.results |= {job.number: failed(error) for job in parent.jobs if job.number not in parent.results}

    def publish(self, parent: Parent) -> None:
        """Add the report of the search to its parent."""
        search_report.publish(parent.store, parent.tracker.run_id, self.study, parent.objective)

    def _job(self, trial: "BaseTrial", grids: list[list[str]]) -> Job:
        """Return the job of a trial, which gets a value for each searched key that has none."""
        return self.composer.job(trial.number, [suggest(trial, override) for override in grids[0]])


def open_study(folder: Path, seed: int, objective: str) -> "Study":
    """Return the study in a sweep's folder, which is created if missing.

    Args:
        folder: The folder of the sweep.
        seed: The seed of the proposals.
        objective: The metric that decides.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database = folder.absolute() / DATABASE
    if database.is_symlink():
        raise UserError(f"{database} is a symbolic link: expected a file of the sweep itself.")
    try:
        study = optuna.create_study(
            study_name=STUDY,
            storage=f"sqlite:///{database}",
            load_if_exists=True,
            direction="minimize" if metric_of(objective).higher_is_better is False else "maximize",
            pruner=optuna.pruners.MedianPruner(),
        )
        done = len(study.trials)
    except (RuntimeError, ValueError, KeyError, SQLAlchemyError) as error:
        raise UserError(f"{database} cannot be read as the study of a search: {str(error).splitlines()[0]}") from error
    # A fixed seed would repeat the first trials.
    study.sampler = optuna.samplers.TPESampler(seed=seed + 1000 * done, constant_liar=True)
    return study


def _continued(study: "Study", trial: "FrozenTrial") -> "BaseTrial":
    """Return a trial that another process may have started: one that still runs can be reported and gets missing values."""
    import optuna

    if trial.state.is_finished():
        return trial
    # Optuna has no public way to continue a trial in another process. tests/sweep/test_search.py fails if this changes.
    return optuna.trial.Trial(study, trial._trial_id)  # noqa: SLF001  # see above


def suggest(trial: "BaseTrial", override: str) -> str:
    """Return an override with the trial's value of its key, if it leaves that open."""
    parsed = parse(override)
    if not parsed.is_sweep_override():
        return override
    key = parsed.get_key_element()
    if parsed.is_discrete_sweep():
        return f"{key}={trial.suggest_categorical(key, list(parsed.sweep_string_iterator()))}"
    interval: Any = parsed.value()
    return f"{key}={trial.suggest_float(key, float(interval.start), float(interval.end), log='log' in interval.tags)}"


def tell_study(study: "Study", parent: Parent) -> None:
    """Report the results of the jobs that have ended to the study; one that failed in an earlier attempt is repeated."""
    from optuna.trial import TrialState

    children, objective = latest_run_per_job(parent.children()), parent.objective
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        child = children.get(trial.number)
        if child and child.status == "FINISHED" and objective in child.metrics:
            study.tell(trial.number, child.metrics[objective])
        elif child and PRUNED in child.tags:
            study.tell(trial.number, state=TrialState.PRUNED)
        elif child and trial.number in parent.results:
            study.tell(trial.number, state=TrialState.FAIL)


def make_pruning_callback(folder: Path, number: int, objective: str) -> Callable[[int, Mapping[str, float]], bool]:
    """Return the function that decides whether to prune a job, called with the examples seen and the metrics of each report.

    Args:
        folder: The folder of the sweep.
        number: The number of the job.
        objective: The metric that decides.
    """
    study = open_study(folder, seed=0, objective=objective)
    (frozen,) = [trial for trial in study.get_trials() if trial.number == number]
    trial = _continued(study, frozen)

    def should_prune(examples_seen: int, metrics: Mapping[str, float]) -> bool:
        if objective not in metrics or frozen.state.is_finished():  # finished: the job failed and is repeated
            return False
        trial.report(metrics[objective], examples_seen)
        return trial.should_prune()

    return should_prune
