"""Time the training of the reference recipe against the same recipe through DataLoader and per-image transforms.

    python scripts/benchmark.py [--rounds 5]

Each round trains all of them once, in turn, in this one process; the table gives medians, and ratios within a round.
The yardsticks are the recipe as a tutorial writes it: torch's own layers, torchvision's MNIST, one random_split, a DataLoader
without workers (on two cores, workers take from the training what they give to the loading), transforms image by image:
`v2 tensor` as torchvision's documentation recommends, `PIL` in the older form, which is faster on images this small.
Initial weights, phases, optimizers, schedules and precision are those of the default configuration for all.
"""

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, random_split
from torchvision import datasets
from torchvision.transforms import v2

import mnist_exp.run  # noqa: F401  # registers the resolver that conf/ uses
from mnist_exp import ROOT
from mnist_exp.config import build, resolve
from mnist_exp.data import MNIST_FILES, Dataset, derive_seed
from mnist_exp.evaluation import evaluate
from mnist_exp.training import Phase, choose_precision, fit, plan

AFFINE = v2.RandomAffine(degrees=5, translate=(0.03, 0.03), scale=(0.98, 1.02))
TRANSFORMS = {
    "DataLoader, v2 tensor": v2.Compose([v2.ToImage(), AFFINE, v2.ToDtype(torch.float32)]),
    "DataLoader, PIL": v2.Compose([AFFINE, v2.PILToTensor(), v2.ToDtype(torch.float32)]),
}
OURS = "mnist_exp"


def tutorial_model(ours: nn.Module) -> nn.Module:
    """Return the default network written with torch's own layers, with the same weights as `ours`."""

    def block(source: nn.Module) -> list[nn.Module]:
        attention = [] if source.attention is None else [source.attention]
        return [source.conv, source.norm, nn.LeakyReLU(0.1), nn.MaxPool2d(2), *attention]

    blocks = [layer for source in ours.blocks for layer in block(source)]
    return nn.Sequential(Scale(), *blocks, nn.Flatten(), ours.hidden, nn.LeakyReLU(0.1), ours.dropout, ours.output)


class Scale(nn.Module):
    """Bring grey values to 0 to 1, as ToTensor does."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float() / 255


def dataloader_training(
    model: nn.Module, phases: dict[str, Phase], images: datasets.MNIST, seed: int, precision: torch.dtype
) -> None:
    """Train as a tutorial does: two subsets, two loops over a DataLoader."""
    torch.manual_seed(seed)
    for phase, subset in zip(phases.values(), random_split(images, [58_800, 1_200]), strict=True):
        batches = DataLoader(subset, phase.batch_size, shuffle=True)
        optimizer = phase.optimizer(model.parameters())
        scheduler = phase.scheduler(optimizer, total_steps=len(batches) * phase.epochs)
        for _ in range(phase.epochs):
            for batch, labels in batches:
                with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                    loss = F.cross_entropy(model(batch), labels)
                optimizer.zero_grad()
                loss.backward()
                if phase.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), phase.max_grad_norm)
                optimizer.step()
                scheduler.step()


def main() -> None:
    """Parse the command line, train in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = resolve(compose("config", ["data.fallback=null", "device=cpu", "tracking=none"]))
    precision = choose_precision(config["precision"], torch.device("cpu"))
    seconds: dict[str, list[float]] = {name: [] for name in (*TRANSFORMS, OURS)}
    accuracy: dict[str, list[float]] = {name: [] for name in seconds}
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root) / "MNIST" / "raw"  # torchvision unpacks into its root, which may be read-only
        raw.mkdir(parents=True)
        for name in MNIST_FILES:
            shutil.copyfile(Path(config["data"]["root"]) / "MNIST" / "raw" / f"{name}.gz", raw / f"{name}.gz")
        loaders = {name: datasets.MNIST(root, download=True, transform=transform) for name, transform in TRANSFORMS.items()}
        for seed in range(rounds):
            data: Dataset = build(config["data"], "data", seed=seed)
            for name in seconds:
                torch.manual_seed(derive_seed(seed, "weights"))
                model: nn.Module = build(config["model"], "model")
                phases = {key: build(node, key) for key, node in config["phases"].items()}
                started = time.perf_counter()
                if name == OURS:
                    for _ in fit(model, plan(model, phases, data), data, seed=seed, precision=precision):
                        pass
                else:
                    model = tutorial_model(model)
                    dataloader_training(model, phases, loaders[name], seed, precision)
                seconds[name].append(time.perf_counter() - started)
                accuracy[name].append(evaluate(model, data.splits["test"]).accuracy)

    table = Table("training", "seconds, median (min to max)", "ratio", "test accuracy, mean")
    for name, values in seconds.items():
        ratio = statistics.median(other / ours for other, ours in zip(values, seconds[OURS], strict=True))
        table.add_row(
            name,
            f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})",
            "" if name == OURS else f"{ratio:.1f} times slower",
            f"{statistics.mean(accuracy[name]):.2%}",
        )
    Console().print(table)
    print(
        f"n = {rounds} seeds; {os.cpu_count()} cores, {torch.get_num_threads()} threads, {precision}, "
        f"{platform.machine()}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
