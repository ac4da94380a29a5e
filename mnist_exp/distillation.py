"""What a network is trained towards, image by image: its label, or what networks trained before say of it.

A teacher is made with the data and the folder of runs, and called with images as augmented and their labels.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mnist_exp import checkpoint, output
from mnist_exp.config import build, check
from mnist_exp.data import Dataset
from mnist_exp.errors import UserError


class NoTeacher:
    """Train towards the labels."""

    def __init__(self, data: Dataset, output_dir: Path) -> None:
        pass

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the labels, (n,) int64."""
        return labels


class Ensemble:
    """Train towards the mean of the class probabilities that the networks of finished runs give to an image.

    runs: their ids; they lie in `output_dir`, and must not have seen what `data` holds out. Raises UserError.
    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2, at temperature 1, without the labels.
    """

    def __init__(self, data: Dataset, output_dir: Path, runs: Sequence[str]) -> None:
        self.networks = [network(run, data, output_dir) for run in runs]

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return probabilities, (n, 10) float32."""
        return torch.stack([network(images).float().softmax(1) for network in self.networks]).mean(0)


def network(run: str, data: Dataset, output_dir: Path) -> nn.Module:
    """Return the network of a finished run, for evaluation; raises UserError where it cannot teach on `data`."""
    folder = output_dir / run
    if not (folder / output.FINISHED).exists():
        raise UserError(
            f"teacher.runs: {run} is no finished run in output_dir={output_dir}. "
            "`python -m mnist_exp.runs list` shows those that there are; output_dir says where they lie."
        )
    saved = checkpoint.load(folder / output.NAME)
    held_out = "test" if "test" in data.splits else data.validation
    if saved.state is None or saved.digests.get(held_out) != data.splits[held_out].digest:
        raise UserError(
            f"teacher.runs: {run} was trained on other data, of which the {held_out} split may be a part. Train one on this data."
        )
    check(saved.config)
    teacher: nn.Module = build(saved.config["model"], "model")
    teacher.load_state_dict(saved.state["model"])
    return teacher.to(data.splits[held_out].labels.device).to(memory_format=torch.channels_last).eval()
