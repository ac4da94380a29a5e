"""The data sets: MNIST, Fashion-MNIST, scikit-learn's digits. A new one is a function here and a file in conf/data/."""

import gzip
import hashlib
import re
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, MinLen
from torch import Tensor

from mnist_exp.errors import Count, Fraction, MissingDataError, UserError
from mnist_exp.learning.data import Dataset, Split, generator

MNIST_EPOCH = 60_000
CLASSES = 10
MNIST_SHAPE = {"classes": CLASSES, "side": 28, "in_channels": 1}

# MD5 of the .gz files, as torchvision publishes them.
MNIST_FILES = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
FASHION_MNIST_FILES = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}

Folder = Annotated[str, MinLen(1)]


@dataclass(frozen=True)
class _Source:
    """A data set that torchvision can download, in MNIST's file format.

    Attributes:
        torchvision: Name of the data set's class in torchvision, and of its folder.
        files: MD5 of each file.
    """

    torchvision: str
    files: dict[str, str]

    def folder(self, root: str) -> Path:
        """Return the folder of the files below a root in torchvision's layout."""
        return Path(root).absolute() / self.torchvision / "raw"

    def read(self, root: str, part: str) -> tuple[Tensor, Tensor]:
        """Return the images (n, 1, h, w) uint8 and the labels (n,) int64 of a part."""
        names = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
        pixels, labels = (_read(self.folder(root) / f"{name}.gz", self.files[name]) for name in names)
        height, width = pixels[8:16].view(">i4").tolist()  # the header has 16 bytes, that of the labels 8
        images = torch.from_numpy(pixels[16:]).view(-1, 1, height, width)  # (n * h * w,) -> (n, 1, h, w)
        return images, torch.from_numpy(labels[8:]).long()

    def test(self, root: str) -> Split:
        """Return the test split."""
        images, labels = self.read(root, "t10k")
        return _split(images, labels, len(labels))

    def download(self, root: str) -> None:
        """Download the files; each appears complete or not at all."""
        from torchvision import datasets  # 4 s to import, for the very first run only

        folder = self.folder(root)
        parent = next(parent for parent in folder.parents if parent.exists())
        with tempfile.TemporaryDirectory(prefix=".mnist-", dir=parent) as staging:
            getattr(datasets, self.torchvision)(staging, download=True)
            folder.mkdir(parents=True, exist_ok=True)
            for name in self.files:
                (self.folder(staging) / f"{name}.gz").replace(folder / f"{name}.gz")


SOURCES = {"mnist": _Source("MNIST", MNIST_FILES), "fashion_mnist": _Source("FashionMNIST", FASHION_MNIST_FILES)}


def load_mnist(
    root: Folder | None,
    default_root: Folder,
    fallback: Literal["digits"] | None,
    finetune_fraction: Fraction,
    validation_size: Annotated[int, Ge(0)],
    seed: int,
    subset: Count | None = None,
    source: Literal["mnist", "fashion_mnist"] = "mnist",
) -> Dataset:
    """Load MNIST, or a data set in its form; download it first if it is missing.

    The 60,000 training images become `train` and `finetune`, the 10,000 test images become `test`.

    Args:
        root: Folder of the user in torchvision's layout, with the files in MNIST/raw, or None for `default_root`.
        default_root: Folder in the same layout that is created if it is missing.
        fallback: `digits` to load `load_digits` if `root` is None and MNIST is missing and cannot be downloaded, or None to
            raise an error.
        finetune_fraction: Share of the training images in `finetune`, at least one image.
        validation_size: Number of training images at the end, the same for every seed, that become `validation`.
            If it is above 0, the test set is not read.
        seed: Decides which images fine-tune.
        subset: Number of images to leave in `train`, with epochs of that length, or None for all.
        source: The data set: MNIST, or Fashion-MNIST with its files in FashionMNIST/raw (Xiao et al., Fashion-MNIST: a Novel
            Image Dataset for Benchmarking Machine Learning Algorithms, 2017).

    Raises:
        UserError: An argument does not fit the images, `root` does not exist, a file is damaged or unreadable, or MNIST is
            missing and no fallback is allowed.
    """
    files = SOURCES[source]
    if root is not None and not Path(root).is_dir():
        raise MissingDataError.invalid("root", root, "a folder that exists", "Set MNIST_ROOT or data.root to one.")
    used_root = default_root if root is None else root
    try:
        if not all((files.folder(used_root) / f"{name}.gz").exists() for name in files.files):
            files.download(used_root)
    except Exception as error:  # torchvision raises URLError, RuntimeError or OSError, depending on the mirror
        reason = " ".join(str(error).split()) or type(error).__name__
        missing = MissingDataError(
            f"{files.torchvision} is not in {used_root} and could not be downloaded: {reason}.",
            remedy=f"Set MNIST_ROOT or data.root to a folder with {files.torchvision}/raw/*-ubyte.gz, or choose data=digits.",
        )
        if root is not None or fallback is None:
            raise missing from error
        warning = (
            f"{missing}\nUSING THE EMBEDDED digits INSTEAD: 1,797 images, not {files.torchvision}. "
            "data.fallback=null turns this warning into an error."
        )
        return replace(load_digits(finetune_fraction, seed, subset), warning=warning)
    images, labels = files.read(used_root, "train")
    train_size = len(labels) - validation_size
    if train_size <= 0:
        raise UserError.invalid("validation_size", validation_size, f"an integer >= 0 and < {len(labels)}")
    splits = _train_and_finetune(images[:train_size], labels[:train_size], finetune_fraction, seed, subset, train_size)
    if validation_size:
        splits["validation"] = _split(images[train_size:], labels[train_size:], validation_size)
    else:
        splits["test"] = files.test(used_root)
    validation = "validation" if validation_size else "finetune"
    return Dataset(_name(source, subset), str(files.folder(used_root)), CLASSES, splits, validation)


def load_digits(finetune_fraction: Fraction, seed: int, subset: Count | None = None) -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits (1,437 train, 360 test) in MNIST's form, with epochs of MNIST's length.

    The 8x8 images of 16 gray levels are enlarged to 20x20 and framed in black, like those of MNIST.

    Args:
        finetune_fraction: As in `load_mnist`.
        seed: As in `load_mnist`.
        subset: As in `load_mnist`.

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
    splits = _train_and_finetune(images[train], labels[train], finetune_fraction, seed, subset, MNIST_EPOCH)
    splits["test"] = _split(images[test], labels[test], len(test))
    return Dataset(_name("digits", subset), "sklearn.datasets.load_digits", CLASSES, splits, validation="finetune")


def find_test_images(data: str, root: str | None, digest: str) -> Tensor | None:
    """Return the test images of a data set, without downloading them.

    Args:
        data: `mnist`, `fashion_mnist` or `digits`, perhaps with the size of a subset: `mnist_1000`.
        root: Folder in torchvision's layout, or None to find only `digits`.
        digest: Digest that the test split must have.

    Returns:
        Images (n, 1, 28, 28) uint8, or None if they have another digest.

    Raises:
        UserError: A file is missing or damaged.
    """
    name = re.sub(r"_\d+$", "", data)
    if name == "digits":
        test = load_digits(0.02, seed=0).splits["test"]
    elif name in SOURCES and root is not None:
        test = SOURCES[name].test(root)
    else:
        return None
    return test.images if test.digest == digest else None


def _name(data: str, subset: int | None) -> str:
    return data if subset is None else f"{data}_{subset}"


def _train_and_finetune(
    images: Tensor, labels: Tensor, finetune_fraction: float, seed: int, subset: int | None, epoch_size: int
) -> dict[str, Split]:
    order = torch.randperm(len(labels), generator=generator(seed, "split"))
    finetune_size = round(len(labels) * finetune_fraction)
    finetune_epoch = round(epoch_size * finetune_fraction)
    if not 0 < finetune_size < len(labels):
        expected = f"a fraction that leaves images for both phases, not {finetune_size} of {len(labels)} for fine-tuning"
        raise UserError.invalid("finetune_fraction", finetune_fraction, expected)
    finetune, train = order[:finetune_size], order[finetune_size:]
    train_epoch = epoch_size - finetune_epoch
    if subset is not None:
        if subset > len(train):
            raise UserError.invalid("subset", subset, f"at most {len(train)}, the number of training images")
        ranks = torch.randperm(len(labels), generator=generator("subset"))  # the seed changes the subset through the split only
        train, train_epoch = train[ranks[train].argsort()[:subset]], subset
    return {
        "train": _split(images[train], labels[train], train_epoch),
        "finetune": _split(images[finetune], labels[finetune], finetune_epoch),
    }


def _split(images: Tensor, labels: Tensor, epoch_size: int) -> Split:
    digest = hashlib.sha256(images.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return Split(images, labels, epoch_size, digest.hexdigest()[:16])


@cache  # the jobs of a sweep share a process
def _read(path: Path, md5: str) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """Return the unpacked bytes of a .gz file; raises UserError if it is damaged or unreadable."""
    remedy = "Delete the file to download it on the next run, or set MNIST_ROOT or data.root to another copy."
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise MissingDataError(f"{path} cannot be read: {error}.", remedy=remedy) from error
    if hashlib.md5(packed, usedforsecurity=False).hexdigest() != md5:
        raise UserError(
            f"{path} is truncated or corrupted: its {len(packed)} bytes do not have the published MD5.", remedy=remedy
        )
    return np.frombuffer(bytearray(gzip.decompress(packed)), dtype=np.uint8)
