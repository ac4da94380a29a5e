"""The commands from Python: train a run, load its model, and read a sweep as a data frame.

Only `load` prints something: a line that names the model and its result.

Mistakes raise `mnist_exp.errors.UserError`, whose fields `key`, `value`, `expected` and `remedy` say what to change.
"""

import io
import warnings
from contextlib import redirect_stdout
from dataclasses import replace

import pandas as pd

from mnist_exp.cli import default_settings, find_store, leave_credentials
from mnist_exp.comparison.history import add_mistakes, read_histories
from mnist_exp.composing import compose_recipe
from mnist_exp.console import show_lines
from mnist_exp.errors import UserError
from mnist_exp.experiment.repeat import request
from mnist_exp.experiment.runner import RunResult, run
from mnist_exp.nodes import is_location, remember_locations
from mnist_exp.overrides import JOB_KEY, section_of
from mnist_exp.paths import NAME, take_credentials
from mnist_exp.serving.classifier import Classifier, load_from
from mnist_exp.storage.checkpoint import Checkpoint
from mnist_exp.tracking.frame import FIRST, SEED
from mnist_exp.tracking.frame import frame as sweep_frame

__all__ = ["frame", "load", "train"]


def train(*overrides: str) -> RunResult:
    """Train, score and record one run: `train("optimizer=adam", "seed=1")`.

    Args:
        overrides: The overrides, as on the command line.

    Returns:
        The id (`run_id`), the last value of each metric (`metrics`), the reports (`history`) and the trained `model` of the run.

    Raises:
        UserError: The configuration, the data or the store cannot be used, or the training diverges.
    """
    leave_credentials()
    typed = [take_credentials(override) for override in overrides]
    remember_locations(typed, None)
    if repeated := [override for override in typed if section_of(override) in ("resume", "rerun", "sweep", JOB_KEY)]:
        raise UserError(
            f"train trains a new run: {repeated[0]} is for the command line.",
            key=repeated[0],
            remedy=f"Use python -m {NAME}.run.",
        )
    recipe = compose_recipe(*typed)
    kept = [override for override in typed if not is_location(override)]
    with redirect_stdout(io.StringIO()):  # warnings are in the result
        return run(request(Checkpoint("", replace(recipe, overrides=kept)), quiet=True))


def load(model: str = "latest") -> Classifier:
    """Return a trained model: the id of a run or its start, `latest`, `models:/NAME@ALIAS`, `models:/ID`, or a folder.

    Raises:
        UserError: There is no such model, or it cannot be used.
    """
    leave_credentials()
    classifier = load_from(default_settings(), model)
    if classifier.warning:
        warnings.warn(classifier.warning, stacklevel=2)
    show_lines([f"Model: {classifier.summary}"])
    return classifier


def frame(sweep: str = "latest", *, images: bool = False) -> pd.DataFrame:
    """Return the jobs of a sweep, one per row.

    Args:
        sweep: The id of a sweep, its start, or `latest`.
        images: Whether to add the columns `size`, the number of images that scored a run, and `mistakes`, the indices of those
            that it misread, separated by spaces.

    Returns:
        The columns of `mnist_exp.tracking.frame.frame`: among them the keys that vary, such as `model`, and `seed`, with numbers
        where all values are, `run`, `status`, and each metric as recorded. Missing metrics are NaN.

    Raises:
        UserError: There is no such sweep.
    """
    leave_credentials()
    store = find_store()
    found = store.find_sweep(sweep)
    jobs = store.children(found.run_id)
    table = sweep_frame([(found, jobs)])
    for name in list(table)[len(FIRST) : list(table).index(SEED) + 1]:  # the keys
        numbers = pd.to_numeric(table[name], errors="coerce")
        if numbers.notna().all():
            table[name] = numbers
    return add_mistakes(table, read_histories(store, {job.run_id: job for job in jobs})) if images else table
