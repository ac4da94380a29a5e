"""Train the reference recipe in the style of a tutorial: the baseline of the other benchmarks. Prints one line of JSON.

    python scripts/benchmarks/dataloader.py [--transforms v2|pil] [--seed 0] [--root data]

The script uses torch's own layers, torchvision's MNIST, one random_split and a DataLoader without workers: on two cores, workers
slow the training by as much as they speed up the loading. Transforms run image by image: `v2` on tensors, as torchvision's
documentation recommends, or `pil`, the older form, which is faster on images this small. It has no tracking and no figures, and
uses nothing of this package. Phases, optimizers, schedules and precision are those of conf/config.yaml.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, random_split
from torchvision import datasets
from torchvision.transforms import v2

AFFINE = v2.RandomAffine(degrees=5, translate=(0.03, 0.03), scale=(0.98, 1.02))
TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
TRANSFORMS = {
    "v2": v2.Compose([v2.ToImage(), AFFINE, v2.ToDtype(torch.float32, scale=True)]),
    "pil": v2.Compose([AFFINE, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]),
}
CAPABILITIES = torch.cpu.get_capabilities()
HAS_BF16 = any(CAPABILITIES.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the means of all channels."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.gates = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, channels // reduction),
            nn.ReLU(),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )

    def forward(self, features: Tensor) -> Tensor:
        gates: Tensor = self.gates(features)
        return features * gates[:, :, None, None]


def block(in_channels: int, out_channels: int) -> list[nn.Module]:
    """Return the layers of a convolutional block."""
    return [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.LeakyReLU(0.1), nn.MaxPool2d(2)]


def network() -> nn.Module:
    """Return the default network, with 19,674 parameters."""
    blocks = [*block(1, 8), *block(8, 16), SqueezeExcite(16, 4), *block(16, 20)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(180, 80), nn.LeakyReLU(0.1), nn.Dropout(0.1), nn.Linear(80, 10))


def train(
    model: nn.Module,
    batches: "DataLoader[tuple[Tensor, Tensor]]",
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    max_grad_norm: float | None,
) -> None:
    """Train for one epoch.

    Args:
        model: The network.
        batches: Images (n, 1, 28, 28) from 0 to 1, and labels (n,).
        optimizer: Over the model's parameters.
        scheduler: Stepped every batch; None for a constant learning rate.
        max_grad_norm: Of the whole gradient; None for no limit.
    """
    model.train()
    for images, labels in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BF16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def main() -> None:
    """Parse the command line, train, score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transforms", choices=TRANSFORMS, default="v2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", default="data")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    images = datasets.MNIST(arguments.root, download=True, transform=TRANSFORMS[arguments.transforms])
    train_split, finetune_split = random_split(images, [58_800, 1_200])
    model = network()

    started = time.perf_counter()
    batches = DataLoader(train_split, batch_size=512, shuffle=True)
    sgd = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9, nesterov=True, weight_decay=1e-5)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.4, total_steps=len(batches), div_factor=2, cycle_momentum=False)
    train(model, batches, sgd, scheduler, max_grad_norm=0.5)
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-4)
    train(model, DataLoader(finetune_split, batch_size=128, shuffle=True), adam, None, max_grad_norm=None)
    seconds = time.perf_counter() - started

    model.eval()
    correct = 0
    with torch.no_grad():
        for batch, labels in DataLoader(datasets.MNIST(arguments.root, train=False, transform=TO_TENSOR), batch_size=1000):
            correct += int((model(batch).argmax(1) == labels).sum())
    print(json.dumps({"training": seconds, "accuracy": correct / 10_000}))


if __name__ == "__main__":
    main()
