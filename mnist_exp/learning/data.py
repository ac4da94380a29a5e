"""Labeled images in memory: a split yields batches, a data set names its splits. Seeds decide their order.

All randomness derives from (seed, phase, epoch, step), so that a resumed run equals one that never stopped.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mnist_exp.errors import UserError


def derive_seed(*parts: object) -> int:
    """Return the 63-bit seed of `parts`, such as (seed, phase, epoch): equal parts, equal seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@dataclass(frozen=True)
class Split:
    """Labeled images and the size of an epoch.

    Attributes:
        images: (n, channels, side, side) uint8.
        labels: (n,) int64, below the number of classes.
        epoch_size: Images per epoch. If larger than n, an epoch reshuffles and repeats the images.
        digest: Hexadecimal hash of the images and labels.
    """

    images: Tensor
    labels: Tensor
    epoch_size: int
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, batch_size: int) -> int:
        """Return the number of batches in an epoch; the last may be smaller."""
        return -(-self.epoch_size // batch_size)

    def batches(self, batch_size: int, order: torch.Generator, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one epoch in random order.

        Args:
            batch_size: Images per batch, at least 1.
            order: Draws the order.
            skip: Number of batches to leave out at the start. The order of the others stays the same.

        Yields:
            Images (b, channels, side, side) uint8 and labels (b,) int64.
        """
        passes = -(-self.epoch_size // len(self))
        indices = torch.cat([torch.randperm(len(self), generator=order) for _ in range(passes)])  # (passes * n,)
        for batch in indices[skip * batch_size : self.epoch_size].to(self.labels.device).split(batch_size):  # type: ignore[no-untyped-call]  # torch's
            yield self.images[batch], self.labels[batch]

    def to(self, device: torch.device) -> "Split":
        """Return the split with its tensors on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """The splits of one source.

    Attributes:
        base: Such as `mnist`. Images of equal names may be the same, those of others are not.
        source: Folder or function that the images come from.
        class_names: Name of each class.
        splits: Splits by name. `test` is absent if the test set must not be read (`data=mnist_tuning`).
        validation: Name of the split that validates each phase, until a phase trains on it.
        preparation: How pictures become images like these: `handwriting` for digits, else `plain`.
        subset: Limit of the number of training images, or None.
        locations: The arguments, by name, that say where the data were found.
        warning: Shown to the user when a run starts, or None. Its last line is also shown to the users of the model.
    """

    base: str
    source: str
    class_names: Sequence[str]
    splits: dict[str, Split]
    validation: str
    preparation: Literal["handwriting", "plain"] = "plain"
    subset: int | None = None
    locations: Mapping[str, str] = field(default_factory=dict)
    warning: str | None = None

    def __post_init__(self) -> None:
        for name, split in self.splits.items():
            if split.images.dtype != torch.uint8 or split.images.shape[1:] != (self.channels, self.side, self.side):
                raise ValueError(
                    f"The split {name} is invalid: expected square uint8 images (n, channels, side, side), all alike."
                )
            if not (len(split) and 0 <= int(split.labels.min()) <= int(split.labels.max()) < self.classes):
                raise ValueError(f"The split {name} is invalid: expected labels from 0 to {self.classes - 1}, at least one.")

    @property
    def name(self) -> str:
        """Such as `mnist`, or `mnist_1000` with a limited number of training images."""
        return self.base if self.subset is None else f"{self.base}_{self.subset}"

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def side(self) -> int:
        """Height and width of the images."""
        return next(iter(self.splits.values())).images.shape[-1]

    @property
    def channels(self) -> int:
        """Channels of the images: 1 for gray values, 3 for colors."""
        return next(iter(self.splits.values())).images.shape[1]

    @property
    def shape(self) -> dict[str, int]:
        """The arguments that every model takes from the data."""
        return {"classes": self.classes, "side": self.side, "in_channels": self.channels}

    @property
    def description(self) -> dict[str, Any]:
        """What models and their users need to know of the data."""
        limited = None if self.subset is None else f"The training images were limited to {self.subset:,}."
        warnings = [*(self.warning or "").splitlines()[-1:], limited]
        names = {"name": self.base, "class_names": list(self.class_names), "preparation": self.preparation}
        names |= {"warning": " ".join(filter(None, warnings))}
        return names | {"side": self.side, "channels": self.channels, "digests": self.digests, "locations": dict(self.locations)}

    @property
    def eval_split(self) -> str:
        """The split that a trained model is scored on: `test`, or that of validation where the test set must not be read."""
        return "test" if "test" in self.splits else self.validation

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each split."""
        return {name: split.digest for name, split in self.splits.items()}

    def check_digests(self, expected: Mapping[str, str]) -> None:
        """Raise UserError unless the splits have the digests that are expected of some of them."""
        if differing := [name for name, digest in expected.items() if self.digests.get(name) != digest]:
            raise UserError(
                f"The data differs from the original run's in {', '.join(differing)}: expected {dict(expected)}, found "
                f"{self.digests}.",
                key="data",
                remedy="Name the folder of the original data, such as data.root=FOLDER, or start a new run.",
            )

    def without_test(self) -> "Dataset":
        """Return the data set without its test images, which a search must not see."""
        return replace(self, splits={name: split for name, split in self.splits.items() if name != "test"})

    def to(self, device: torch.device) -> "Dataset":
        """Return the data set with its splits on `device`."""
        return replace(self, splits={name: split.to(device) for name, split in self.splits.items()})
