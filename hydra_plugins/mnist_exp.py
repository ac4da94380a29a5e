"""Hydra finds its plugins in this package only."""

from mnist_exp.sweep.grid import GridSweeper
from mnist_exp.sweep.search import OptunaSweeper
from mnist_exp.sweep.workers import WorkersLauncher


class Grid(GridSweeper):
    """`hydra/sweeper=grid`."""


class Optuna(OptunaSweeper):
    """`hydra/sweeper=optuna`."""


class Workers(WorkersLauncher):
    """`hydra/launcher=workers`."""
