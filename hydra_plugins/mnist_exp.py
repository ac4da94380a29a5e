"""The one place where Hydra looks for sweepers and launchers that are not its own."""

from mnist_exp.search import OptunaSweeper
from mnist_exp.sweep import GridSweeper
from mnist_exp.workers import WorkersLauncher


class Grid(GridSweeper):
    """`hydra/sweeper=grid`."""


class Optuna(OptunaSweeper):
    """`hydra/sweeper=optuna`."""


class Workers(WorkersLauncher):
    """`hydra/launcher=workers`."""
