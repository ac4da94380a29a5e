"""Hydra finds its plugins in this package only. It imports them even for --help, so they import the sweeps when one starts."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Grid(Sweeper):
    """`hydra/sweeper=grid`.

    Args:
        params: Choices by key, as on the command line, for presets.
    """

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from mnist_exp.sweep.grid import GridSweep

        self.sweeper = GridSweep(hydra_context, task_function, config, self.params)

    def sweep(self, arguments: list[str]) -> Any:
        self.sweeper.sweep(arguments)


class Optuna(Grid):
    """`hydra/sweeper=optuna`.

    Args:
        n_trials: The number of jobs.
        at_once: The number of jobs that are proposed together and then run in parallel; null: the next one when a worker is free.
        params: Values by key, as on the command line, for presets.
    """

    def __init__(self, n_trials: int, at_once: int | None, params: dict[str, str] | None = None) -> None:
        super().__init__(params)
        self.n_trials, self.at_once = n_trials, at_once

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from mnist_exp.sweep.search import SearchSweep

        self.sweeper = SearchSweep(hydra_context, task_function, config, self.params, self.n_trials, self.at_once)


class Workers(Launcher):
    """`hydra/launcher=workers`.

    Args:
        processes: The number of jobs at once; null: one for each GPU, without any one for each core that this process may use.
        gpus: `all`, `none`, or a list of GPUs, which workers get in turn.
    """

    def __init__(self, processes: int | None = None, gpus: Any = "all") -> None:
        self.processes, self.gpus = processes, gpus

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from mnist_exp.sweep.workers import WorkerPool

        self.pool = WorkerPool(hydra_context, task_function, config, self.processes, self.gpus)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self.pool.launch(job_overrides, initial_job_idx)
