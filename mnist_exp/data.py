"""Raw files to fixed uint8 tensors, cut into splits by seed; and the seeds that all randomness derives from."""

import gzip
import hashlib
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_exp.errors import UserError

SIDE = 28
CLASSES = 10
MNIST_EPOCH = 60_000

# SHA-256 of the four files' unpacked content; yann.lecun.com publishes the MD5 sums of the .gz files, from which these follow.
MNIST_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def derive_seed(*parts: object) -> int:
    """Return the 63-bit seed that belongs to `parts`, such as (seed, phase, epoch): equal parts, equal randomness."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded with `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@dataclass(frozen=True)
class Split:
    """Labelled images in memory, and how many of them make an epoch.

    images: (n, 1, 28, 28) uint8; labels: (n,) int64, 0 to 9; digest: hexadecimal, of the content.
    An `epoch_size` above n goes through the images more than once, each time in a new order.
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
        """Yield an epoch of (images, labels), less its first `skip` batches, in the order that `order` draws."""
        passes = -(-self.epoch_size // len(self))
        indices = torch.cat([torch.randperm(len(self), generator=order) for _ in range(passes)])
        for batch in indices[skip * batch_size : self.epoch_size].to(self.labels.device).split(batch_size):  # type: ignore[no-untyped-call]  # torch's
            yield self.images[batch], self.labels[batch]

    def to(self, device: torch.device) -> "Split":
        """Return the split with its tensors on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Named splits of one source, among them `validation`, which validates every phase before it is trained on.

    `test` is absent where the test set is out of bounds (`data=mnist_tuning`). `notice` says what the user must hear.
    """

    name: str
    source: str
    splits: dict[str, Split]
    validation: str
    notice: str | None = None

    def to(self, device: torch.device) -> "Dataset":
        """Return the data set with its splits on `device`."""
        return replace(self, splits={name: split.to(device) for name, split in self.splits.items()})


def load_mnist(root: str, fallback: str | None, finetune_fraction: float, validation_size: int, seed: int) -> Dataset:
    """Load MNIST from the torchvision root `root`, downloading it where the root has none of it.

    The 60,000 training images become `train`, `finetune` (`finetune_fraction` of them) and, with a `validation_size`,
    `validation` (the last ones, the same for every seed); the 10,000 test images become `test` without one.
    Where MNIST can be neither found nor downloaded, `fallback="digits"` loads `load_digits` instead.
    Raises UserError on files that are not MNIST's or cannot be read, and on nothing found with `fallback=None`.
    """
    folder = Path(root).absolute() / "MNIST" / "raw"
    try:
        if not all(_find(folder, name) for name in MNIST_FILES):
            _download(folder)
    except Exception as error:  # torchvision raises URLError, RuntimeError or OSError, by mirror and mood
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = f"MNIST is not in data.root={root} (MNIST_ROOT) and could not be downloaded into it: {reason}"
        if fallback is None:
            remedy = "Set MNIST_ROOT to a folder that holds MNIST/raw/*-ubyte.gz, or data.fallback=digits, or data=digits."
            raise UserError(f"{problem}.\n{remedy}") from error
        notice = f"{problem}.\nUSING THE EMBEDDED digits INSTEAD: 1,797 images, not MNIST; data.fallback=null forbids it."
        return replace(load_digits(finetune_fraction, seed), notice=notice)

    images, labels = _images(folder, "train-images-idx3-ubyte"), _labels(folder, "train-labels-idx1-ubyte")
    held_out = len(labels) - validation_size
    splits = _train_and_finetune(images[:held_out], labels[:held_out], finetune_fraction, seed, held_out)
    if validation_size:
        splits["validation"] = _split(images[held_out:], labels[held_out:], validation_size)
        return Dataset("mnist", str(folder), splits, validation="validation")
    test = _images(folder, "t10k-images-idx3-ubyte"), _labels(folder, "t10k-labels-idx1-ubyte")
    splits["test"] = _split(*test, len(test[1]))
    return Dataset("mnist", str(folder), splits, validation="finetune")


def load_digits(finetune_fraction: float, seed: int) -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits, brought to MNIST's form and to the length of MNIST's epochs.

    8x8 images of 16 grey levels are enlarged to 20x20 and framed in black, as MNIST's are. 1,437 train, 360 test.
    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    from sklearn.datasets import load_digits as read_digits  # half a second, for this data set only

    raw = read_digits()
    small = torch.from_numpy(raw.images).float().unsqueeze(1) * (255 / 16)
    large = F.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    images = F.pad(large, (4, 4, 4, 4)).round().to(torch.uint8)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=generator("digits", "test"))  # the same test set for every seed
    test, train = order[:360], order[360:]
    splits = _train_and_finetune(images[train], labels[train], finetune_fraction, seed, MNIST_EPOCH)
    splits["test"] = _split(images[test], labels[test], len(test))
    return Dataset("digits", "sklearn.datasets.load_digits", splits, validation="finetune")


def find_images(data: str, root: str, digest: str) -> Tensor | None:
    """Return the test images (n, 1, 28, 28) of the data set called `data` whose digest this is, None where they are not here."""
    if data == "digits":
        test = load_digits(0.02, seed=0).splits["test"]
    else:
        folder = Path(root).absolute() / "MNIST" / "raw"
        names = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
        if not all(_find(folder, name) for name in names):
            return None
        labels = _labels(folder, names[1])
        test = _split(_images(folder, names[0]), labels, len(labels))
    return test.images if test.digest == digest else None


def _train_and_finetune(images: Tensor, labels: Tensor, finetune_fraction: float, seed: int, epoch_size: int) -> dict[str, Split]:
    order = torch.randperm(len(labels), generator=generator(seed, "split"))
    finetune_size = round(len(labels) * finetune_fraction)
    finetune_epoch = round(epoch_size * finetune_fraction)
    if not 0 < finetune_size < len(labels):
        raise UserError(
            f"data.finetune_fraction={finetune_fraction} leaves {finetune_size} of {len(labels)} images for fine-tuning: "
            "allowed is a fraction that leaves some for either phase, such as 0.02."
        )
    finetune, train = order[:finetune_size], order[finetune_size:]
    return {
        "train": _split(images[train], labels[train], epoch_size - finetune_epoch),
        "finetune": _split(images[finetune], labels[finetune], finetune_epoch),
    }


def _split(images: Tensor, labels: Tensor, epoch_size: int) -> Split:
    digest = hashlib.sha256(images.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return Split(images, labels, epoch_size, digest.hexdigest()[:16])


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.exists()), None)


def _images(folder: Path, name: str) -> Tensor:
    return torch.from_numpy(_read(folder, name)[16:]).view(-1, 1, SIDE, SIDE)


def _labels(folder: Path, name: str) -> Tensor:
    return torch.from_numpy(_read(folder, name)[8:]).long()


@cache  # for the jobs of a sweep
def _read(folder: Path, name: str) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """Return a file's bytes, its header of 8 (labels) or 16 bytes (images) included, checked against MNIST's own."""
    path = _find(folder, name)
    assert path is not None
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        problem = f"{path} cannot be read: {error}"
    else:
        if hashlib.sha256(content).hexdigest() == MNIST_FILES[name]:
            return np.frombuffer(bytearray(content), dtype=np.uint8)
        problem = f"{path} is truncated or corrupted: its content is not MNIST's ({len(content)} bytes unpacked)"
    raise UserError(f"{problem}.\nDelete the file to have MNIST downloaded anew, or set MNIST_ROOT to another copy.")


def _download(folder: Path) -> None:
    """Bring MNIST's four .gz files into `folder`, each whole or not at all."""
    from torchvision.datasets import MNIST  # 4 s to import, for the very first run only

    there = next(parent for parent in folder.parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=".mnist-", dir=there) as staging:
        MNIST(staging, download=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name in MNIST_FILES:
            (Path(staging) / "MNIST" / "raw" / f"{name}.gz").replace(folder / f"{name}.gz")
