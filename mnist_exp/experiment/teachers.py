"""Teachers: the training targets that conf/teacher/ offers, built from the data set and the folder of all runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from mnist_exp.errors import UserError
from mnist_exp.learning.data import Dataset
from mnist_exp.learning.distillation import Ensemble, Targets
from mnist_exp.overrides import command
from mnist_exp.settings import DataDescription, RunId
from mnist_exp.storage import run_dir
from mnist_exp.tracking.models import read_model

RUNS = "teacher.runs"  # the key in messages


def labels(data: Dataset, output_dir: Path) -> Targets:
    """Return the labels as targets."""
    return Targets()


def ensemble(data: Dataset, output_dir: Path, runs: Annotated[Sequence[RunId], Field(min_length=1)]) -> Ensemble:
    """Return the mean predictions of finished runs as targets.

    Args:
        data: The data set, on the device of the training.
        output_dir: Folder of all runs.
        runs: Ids of the runs, at least one.

    Raises:
        UserError: A run is not finished, may have been trained on the split that `data` tests on, or has another network.
    """
    if len(set(runs)) < len(runs):
        raise UserError.invalid(RUNS, list(runs), "different runs")
    eval_split, own = data.eval_split, DataDescription(**data.description)
    teachers = [_load(run, output_dir) for run in runs]
    for run, (_, described) in zip(runs, teachers, strict=True):
        if (described.class_names, described.shape) != (own.class_names, own.shape):
            raise UserError.invalid(RUNS, run, f"runs on images of the same shape and classes, {own.class_names}")
        if described.may_have_trained_on(own, eval_split):
            raise UserError.invalid(
                RUNS,
                run,
                f"runs that were not trained on the {eval_split} split of this data, and that run may have been",
                "Choose a run with the same data=, not trained on that split.",
            )
    device = data.splits[eval_split].labels.device
    networks = [network.to(device).to(memory_format=torch.channels_last) for network, _ in teachers]
    return Ensemble(networks, any(described.may_have_trained_on(own, data.validation) for _, described in teachers))


def _load(run: str, output_dir: Path) -> tuple[nn.Module, DataDescription]:
    """Return the model of a run and the description of its data; raises UserError unless it was trained to its end."""
    folder = output_dir / run_dir.expand_id(output_dir, run)
    if not (run_dir.is_complete(folder) and (folder / "model").exists()):  # a run that a search stopped has no model
        raise UserError.invalid(
            RUNS,
            run,
            f"a run in output_dir={output_dir} that was trained to its end",
            f"List the runs with `{command('runs', 'list')}`, or set output_dir to their folder.",
        )
    try:
        return read_model(folder / "model")[:2]
    except UserError as error:
        raise UserError(f"{RUNS}={run} cannot teach: {error}", key=RUNS, value=run) from error
