"""The data sets: MNIST, read or downloaded, and scikit-learn's digits. A new one is a function here and a file in conf/data/."""

import gzip
import hashlib
import tempfile
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_exp.errors import UserError
from mnist_exp.learning.data import SIDE, Dataset, Split
from mnist_exp.learning.seeds import generator

MNIST_EPOCH = 60_000

# SHA-256 of the unpacked files. They match the MD5 sums that yann.lecun.com publishes for the .gz files.
MNIST_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def load_mnist(root: str, fallback: str | None, finetune_fraction: float, validation_size: int, seed: int) -> Dataset:
    """Load MNIST, or download it first if `root` lacks it.

    The 60,000 training images become `train` and `finetune`, the 10,000 test images become `test`.

    Args:
        root: Folder in torchvision's layout, with the files in MNIST/raw.
        fallback: `digits` to load `load_digits` if MNIST is neither there nor can be downloaded, or None to raise an error.
        finetune_fraction: Share of the training images in `finetune`, between 0 and 1.
        validation_size: Number of training images at the end, the same for every seed, that become `validation`.
            If it is above 0, the test set is not read.
        seed: Decides which images fine-tune.

    Raises:
        UserError: A file is damaged or unreadable, or MNIST is missing and `fallback` is None.
    """
    folder = _raw_folder(root)
    try:
        if not all(_find(folder, name) for name in MNIST_FILES):
            _download(folder)
    except Exception as error:  # torchvision raises URLError, RuntimeError or OSError, depending on the mirror
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = f"MNIST is not in data.root={root} (MNIST_ROOT) and could not be downloaded: {reason}"
        if fallback is None:
            remedy = "Set MNIST_ROOT to a folder with MNIST/raw/*-ubyte.gz, or choose data.fallback=digits or data=digits."
            raise UserError(f"{problem}.\n{remedy}") from error
        notice = (
            f"{problem}.\nUSING THE EMBEDDED digits INSTEAD: 1,797 images, not MNIST. "
            "data.fallback=null turns this warning into an error."
        )
        return replace(load_digits(finetune_fraction, seed), notice=notice)

    images, labels = _images(folder, "train"), _labels(folder, "train")
    train_size = len(labels) - validation_size
    splits = _train_and_finetune(images[:train_size], labels[:train_size], finetune_fraction, seed, train_size)
    if validation_size:
        splits["validation"] = _split(images[train_size:], labels[train_size:], validation_size)
        return Dataset("mnist", str(folder), splits, validation="validation")
    splits["test"] = _mnist_test(folder)
    return Dataset("mnist", str(folder), splits, validation="finetune")


def load_digits(finetune_fraction: float, seed: int) -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits (1,437 train, 360 test) in MNIST's form, with epochs of MNIST's length.

    The 8x8 images of 16 gray levels are enlarged to 20x20 and framed in black, like those of MNIST.
    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    from sklearn.datasets import load_digits as read_digits  # half a second, for this data set only

    raw = read_digits()
    small = torch.from_numpy(raw.images).float().unsqueeze(1) * (255 / 16)  # (n, 8, 8) -> (n, 1, 8, 8)
    large = F.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)  # (n, 1, 20, 20)
    images = F.pad(large, (4, 4, 4, 4)).round().to(torch.uint8)  # (n, 1, 28, 28)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=generator("digits", "test"))  # the same test set for every seed
    test, train = order[:360], order[360:]
    splits = _train_and_finetune(images[train], labels[train], finetune_fraction, seed, MNIST_EPOCH)
    splits["test"] = _split(images[test], labels[test], len(test))
    return Dataset("digits", "sklearn.datasets.load_digits", splits, validation="finetune")


def find_test_images(data: str, root: str, digest: str) -> Tensor | None:
    """Return the test images of a data set, without downloading them.

    Args:
        data: `mnist` or `digits`.
        root: MNIST's folder, as in `load_mnist`.
        digest: Digest that the test split must have.

    Returns:
        Images (n, 1, 28, 28) uint8, or None if they are missing or have another digest.
    """
    folder = _raw_folder(root)
    if data == "digits":
        test = load_digits(0.02, seed=0).splits["test"]
    elif all(_find(folder, name) for name in MNIST_FILES if name.startswith("t10k")):
        test = _mnist_test(folder)
    else:
        return None
    return test.images if test.digest == digest else None


def _train_and_finetune(images: Tensor, labels: Tensor, finetune_fraction: float, seed: int, epoch_size: int) -> dict[str, Split]:
    order = torch.randperm(len(labels), generator=generator(seed, "split"))
    finetune_size = round(len(labels) * finetune_fraction)
    finetune_epoch = round(epoch_size * finetune_fraction)
    if not 0 < finetune_size < len(labels):
        raise UserError(
            f"data.finetune_fraction={finetune_fraction} is invalid: expected a fraction that leaves images for both phases, "
            f"but fine-tuning would get {finetune_size} of {len(labels)} images. Choose a fraction such as 0.02."
        )
    finetune, train = order[:finetune_size], order[finetune_size:]
    return {
        "train": _split(images[train], labels[train], epoch_size - finetune_epoch),
        "finetune": _split(images[finetune], labels[finetune], finetune_epoch),
    }


def _mnist_test(folder: Path) -> Split:
    labels = _labels(folder, "t10k")
    return _split(_images(folder, "t10k"), labels, len(labels))


def _split(images: Tensor, labels: Tensor, epoch_size: int) -> Split:
    digest = hashlib.sha256(images.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return Split(images, labels, epoch_size, digest.hexdigest()[:16])


def _raw_folder(root: str) -> Path:
    return Path(root).absolute() / "MNIST" / "raw"


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.exists()), None)


def _images(folder: Path, part: str) -> Tensor:
    return torch.from_numpy(_read(folder, f"{part}-images-idx3-ubyte")[16:]).view(-1, 1, SIDE, SIDE)  # (n, 1, 28, 28)


def _labels(folder: Path, part: str) -> Tensor:
    return torch.from_numpy(_read(folder, f"{part}-labels-idx1-ubyte")[8:]).long()  # (n,)


@cache  # the jobs of a sweep share a process
def _read(folder: Path, name: str) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """Return the bytes of a file, including its header of 8 (labels) or 16 bytes (images); raises UserError if it is damaged."""
    path = _find(folder, name)
    assert path is not None
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        problem = f"{path} cannot be read: {error}"
    else:
        if hashlib.sha256(content).hexdigest() == MNIST_FILES[name]:
            return np.frombuffer(bytearray(content), dtype=np.uint8)
        problem = f"{path} is truncated or corrupted: its {len(content)} unpacked bytes are not those of MNIST"
    raise UserError(f"{problem}.\nDelete the file to download MNIST on the next run, or set MNIST_ROOT to another copy.")


def _download(folder: Path) -> None:
    """Download the four .gz files of MNIST into `folder`; each appears complete or not at all."""
    from torchvision.datasets import MNIST  # 4 s to import, for the very first run only

    parent = next(parent for parent in folder.parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=".mnist-", dir=parent) as staging:
        MNIST(staging, download=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name in MNIST_FILES:
            (_raw_folder(staging) / f"{name}.gz").replace(folder / f"{name}.gz")
