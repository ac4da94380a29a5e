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
from mnist_exp.nodes import build
from mnist_exp.overrides import command
from mnist_exp.settings import DataDescription, RunId
from mnist_exp.storage import run_dir
from mnist_exp.storage.checkpoint import Checkpoint, load

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
    teachers = [_load_finished(run, output_dir) for run in runs]
    if len(set(runs)) < len(runs):
        raise UserError.invalid(RUNS, list(runs), "different runs")
    eval_split, own = data.eval_split, DataDescription(**data.description)
    for saved, described in teachers:
        if (described.class_names, described.shape) != (own.class_names, own.shape):
            raise UserError.invalid(RUNS, saved.run_id, f"runs on images of the same shape and classes, {own.class_names}")
        if described.may_have_trained_on(own, eval_split):
            raise UserError.invalid(
                RUNS,
                saved.run_id,
                f"runs that were not trained on the {eval_split} split of this data, and that run may have been",
                "Choose a run with the same data=, not trained on that split.",
            )
    device = data.splits[eval_split].labels.device
    networks = [_load_network(saved, described.shape, device) for saved, described in teachers]
    return Ensemble(networks, any(described.may_have_trained_on(own, data.validation) for _, described in teachers))


def _load_finished(run: str, output_dir: Path) -> tuple[Checkpoint, DataDescription]:
    """Return the last checkpoint of a run and the description of its data; raises UserError unless it was trained to its end."""
    folder = output_dir / run_dir.expand_id(output_dir, run)
    if not run_dir.is_complete(folder):
        raise UserError.invalid(
            RUNS,
            run,
            f"a finished run in output_dir={output_dir}",
            f"List the runs with `{command('runs', 'list')}`, or set output_dir to their folder.",
        )
    saved = load(folder / run_dir.CHECKPOINT)
    settings, state = saved.recipe.settings, saved.state or {}
    if settings.data_description is None:
        raise UserError.invalid(RUNS, run, "a run whose checkpoint describes its data")
    has_ended = state.get("ended") and state.get("phase") == list(settings.phases)[-1]
    if not has_ended:  # a run that a search stopped is complete, too
        raise UserError.invalid(RUNS, run, "a run that was trained to its end", "Choose another run.")
    return saved, settings.data_description


def _load_network(saved: Checkpoint, shape: dict[str, int], device: torch.device) -> nn.Module:
    """Return the network in a checkpoint, ready for evaluation; raises UserError if this version builds another."""
    assert saved.state is not None
    network: nn.Module = build(saved.recipe.settings.model, "model", **shape)
    try:
        network.load_state_dict(saved.state["model"])
    except RuntimeError as error:
        raise UserError.invalid(
            RUNS,
            saved.run_id,
            "a network as this version builds it from the run's configuration",
            "Train a teacher with this version.",
        ) from error
    return network.eval().to(device).to(memory_format=torch.channels_last)
