"""What a network is trained towards, image by image: its label, or what networks trained before say of it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mnist_exp import checkpoint, output
from mnist_exp.config import build, check
from mnist_exp.data import Dataset
from mnist_exp.errors import UserError


class NoTeacher:
    """Train towards the labels.

    saw_validation: whether it knows images by which the network that it teaches would be validated.
    """

    saw_validation = False

    def __init__(self, data: Dataset, output_dir: Path) -> None:
        pass

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the targets of a batch: the labels, (n,) int64."""
        return labels


class Ensemble(NoTeacher):
    """Train towards the mean of the class probabilities that the networks of finished runs give to an image.

    runs: their ids; they lie in `output_dir`, and must not have been trained on what `data` tests with. Raises UserError.
    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2, at temperature 1, without the labels.
    """

    def __init__(self, data: Dataset, output_dir: Path, runs: Sequence[str]) -> None:
        finished = [load_finished(run, output_dir) for run in runs]
        held_out = "test" if "test" in data.splits else data.validation
        for saved in finished:
            if saw(saved, data, held_out):
                raise UserError(
                    f"teacher.runs: {saved.run_id} may have been trained on the {held_out} split of this data. "
                    "Take one that was trained with the same data=, and not on that split."
                )
        self.saw_validation = any(saw(saved, data, data.validation) for saved in finished)
        device = data.splits[held_out].labels.device
        self.networks = [load_network(saved).to(device).to(memory_format=torch.channels_last) for saved in finished]

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the targets of a batch: probabilities, (n, 10) float32."""
        return torch.stack([network(images).float().softmax(1) for network in self.networks]).mean(0)


def load_finished(run: str, output_dir: Path) -> checkpoint.Checkpoint:
    """Return the last checkpoint of a run that was trained to its end; raises UserError if it was not."""
    folder = output_dir / run
    if not (folder / output.FINISHED).exists():
        raise UserError(
            f"teacher.runs: {run} is no finished run in output_dir={output_dir}. "
            "`python -m mnist_exp.runs list` shows those that there are; output_dir says where they lie."
        )
    saved = checkpoint.load(folder / output.NAME)
    check(saved.config)
    epochs = sum(phase["epochs"] for phase in saved.config["phases"].values())
    if not saved.history or saved.history[-1][1].get("epoch", 0) < epochs:  # a search stops the hopeless, which are finished, too
        raise UserError(f"teacher.runs: {run} was stopped before its last epoch. Take one that was trained to its end.")
    return saved


def saw(saved: checkpoint.Checkpoint, data: Dataset, split: str) -> bool:
    """Return whether a run was trained on images of a split of `data`, as far as cannot be excluded."""
    same = saved.digests.get(split) == data.splits[split].digest
    return not same or any(phase["split"] == split for phase in saved.config["phases"].values())


def load_network(saved: checkpoint.Checkpoint) -> nn.Module:
    """Return the network in a checkpoint, for evaluation; raises UserError if this version builds another."""
    network: nn.Module = build(saved.config["model"], "model")
    assert saved.state is not None
    try:
        network.load_state_dict(saved.state["model"])
    except RuntimeError as error:
        raise UserError(
            f"teacher.runs: the network of {saved.run_id} is not the one that this version builds from its configuration. "
            "Train a teacher with this version."
        ) from error
    return network.eval()
