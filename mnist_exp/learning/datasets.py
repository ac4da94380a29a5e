"""The data sets: MNIST, Fashion-MNIST, scikit-learn's digits. A new one is a function here and a file in conf/data/."""

import gzip
import hashlib
import re
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_exp.errors import ArgumentError, UserError
from mnist_exp.learning.arguments import is_integer, is_number, require
from mnist_exp.learning.data import Dataset, Split
from mnist_exp.learning.seeds import generator

MNIST_EPOCH = 60_000
CLASSES = 10
MNIST_SHAPE = {"classes": CLASSES, "side": 28, "in_channels": 1}

# SHA-256 of the unpacked files. They match the MD5 sums that yann.lecun.com publishes for the .gz files.
MNIST_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
# MD5 of the .gz files, as torchvision publishes them.
FASHION_MNIST_FILES = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}


@dataclass(frozen=True)
class _Source:
    """Files in the format of MNIST, with 10 classes; raises UserError if one is damaged.

    Args:
        name: Name of the data set.
        torchvision: Name of its class in torchvision, and of its folder.
        files: Checksum of each file: the SHA-256 of its content, or the MD5 of its .gz.
        root: Folder in torchvision's layout.
    """

    name: str
    torchvision: str
    files: Mapping[str, str]
    root: str

    @property
    def folder(self) -> Path:
        return Path(self.root).absolute() / self.torchvision / "raw"

    def has(self, part: str = "") -> bool:
        """Return whether all files of a part (train, t10k) are there."""
        return all(self.find(name) for name in self.files if name.startswith(part))

    def find(self, name: str) -> Path | None:
        suffixes = (".gz",) if len(self.files[name]) == 32 else (".gz", "")
        return next((path for suffix in suffixes if (path := self.folder / f"{name}{suffix}").exists()), None)

    def images(self, part: str) -> Tensor:
        """Return the images of a part: (n, 1, h, w) uint8."""
        content = self._read(f"{part}-images-idx3-ubyte")
        height, width = content[8:16].view(">i4").tolist()
        return torch.from_numpy(content[16:]).view(-1, 1, height, width)  # (n * h * w,) -> (n, 1, h, w)

    def labels(self, part: str) -> Tensor:
        """Return the labels of a part: (n,) int64."""
        return torch.from_numpy(self._read(f"{part}-labels-idx1-ubyte")[8:]).long()

    def test(self) -> Split:
        """Return the test split."""
        labels = self.labels("t10k")
        return _split(self.images("t10k"), labels, len(labels))

    def _read(self, name: str) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        path = self.find(name)
        assert path is not None
        return _read(path, self.torchvision, self.files[name])

    def download(self) -> None:
        """Download the .gz files; each appears complete or not at all."""
        from torchvision import datasets  # 4 s to import, for the very first run only

        parent = next(parent for parent in self.folder.parents if parent.exists())
        with tempfile.TemporaryDirectory(prefix=".mnist-", dir=parent) as staging:
            getattr(datasets, self.torchvision)(staging, download=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in self.files:
                (Path(staging) / self.torchvision / "raw" / f"{name}.gz").replace(self.folder / f"{name}.gz")

    def load(self, finetune_fraction: float, validation_size: int, seed: int, subset: int | None) -> Dataset:
        """Return the data set, split as `load_mnist` describes."""
        images, labels = self.images("train"), self.labels("train")
        train_size = len(labels) - validation_size
        require(train_size > 0, "validation_size", validation_size, f"an integer >= 0 and < {len(labels)}")
        splits = _train_and_finetune(images[:train_size], labels[:train_size], finetune_fraction, seed, subset, train_size)
        if validation_size:
            splits["validation"] = _split(images[train_size:], labels[train_size:], validation_size)
        else:
            splits["test"] = self.test()
        validation = "validation" if validation_size else "finetune"
        return Dataset(_name(self.name, subset), str(self.folder), CLASSES, splits, validation)


def load_mnist(
    root: str, fallback: str | None, finetune_fraction: float, validation_size: int, seed: int, subset: int | None = None
) -> Dataset:
    """Load MNIST, or download it first if `root` lacks it.

    The 60,000 training images become `train` and `finetune`, the 10,000 test images become `test`.

    Args:
        root: Folder in torchvision's layout, with the files in MNIST/raw.
        fallback: `digits` to load `load_digits` if MNIST is neither there nor can be downloaded, or None to raise an error.
        finetune_fraction: Share of the training images in `finetune`, between 0 and 1.
        validation_size: Number of training images at the end, the same for every seed, that become `validation`.
            If it is above 0, the test set is not read.
        seed: Decides which images fine-tune.
        subset: Number of images to leave in `train`, with epochs of that length, or None for all.

    Raises:
        UserError: An argument is invalid, a file is damaged or unreadable, or MNIST is missing and `fallback` is None.
    """
    check_arguments(
        root=root, fallback=fallback, finetune_fraction=finetune_fraction, validation_size=validation_size, subset=subset
    )
    source = _Source("mnist", "MNIST", MNIST_FILES, root)
    try:
        _make_available(source, ", or choose data.fallback=digits or data=digits")
    except UserError as error:
        if fallback is None:
            raise
        notice = (
            f"{str(error).splitlines()[0]}\nUSING THE EMBEDDED digits INSTEAD: 1,797 images, not MNIST. "
            "data.fallback=null turns this warning into an error."
        )
        return replace(load_digits(finetune_fraction, seed, subset), notice=notice)
    return source.load(finetune_fraction, validation_size, seed, subset)


def load_fashion_mnist(
    root: str, finetune_fraction: float, validation_size: int, seed: int, subset: int | None = None
) -> Dataset:
    """Load Fashion-MNIST, or download it first if `root` lacks it: `load_mnist` with the files in FashionMNIST/raw.

    Args:
        root: As in `load_mnist`.
        finetune_fraction: As in `load_mnist`.
        validation_size: As in `load_mnist`.
        seed: As in `load_mnist`.
        subset: As in `load_mnist`.

    Source: Xiao et al., Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, 2017.
    """
    check_arguments(root=root, finetune_fraction=finetune_fraction, validation_size=validation_size, subset=subset)
    source = _Source("fashion_mnist", "FashionMNIST", FASHION_MNIST_FILES, root)
    _make_available(source)
    return source.load(finetune_fraction, validation_size, seed, subset)


def load_digits(finetune_fraction: float, seed: int, subset: int | None = None) -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits (1,437 train, 360 test) in MNIST's form, with epochs of MNIST's length.

    The 8x8 images of 16 gray levels are enlarged to 20x20 and framed in black, like those of MNIST.

    Args:
        finetune_fraction: As in `load_mnist`.
        seed: As in `load_mnist`.
        subset: As in `load_mnist`.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    from sklearn.datasets import load_digits as read_digits  # half a second, for this data set only

    check_arguments(finetune_fraction=finetune_fraction, subset=subset)
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


def check_arguments(**arguments: object) -> None:
    """Raise ArgumentError on the first invalid argument of a data set; those of other names are not checked."""
    expectations: dict[str, tuple[Callable[[Any], bool], str]] = {
        "root": (lambda value: isinstance(value, str) and value != "", "a folder"),
        "fallback": (lambda value: value is None or value == "digits", "digits or null"),
        "finetune_fraction": (lambda value: is_number(value, 0, 1) and 0 < value < 1, "a number between 0 and 1"),
        "validation_size": (lambda value: is_integer(value, 0), "an integer >= 0"),
        "subset": (lambda value: value is None or is_integer(value, 1), "an integer >= 1, or null for all images"),
    }
    for name, value in arguments.items():
        if name in expectations:
            valid, expected = expectations[name]
            require(valid(value), name, value, expected)


def find_test_images(data: str, root: str, digest: str) -> Tensor | None:
    """Return the test images of a data set, without downloading them.

    Args:
        data: `mnist`, `fashion_mnist` or `digits`, perhaps with the size of a subset: `mnist_1000`.
        root: Folder in torchvision's layout.
        digest: Digest that the test split must have.

    Returns:
        Images (n, 1, 28, 28) uint8, or None if they are missing or have another digest.
    """
    name = re.sub(r"_\d+$", "", data)
    sources = [_Source("mnist", "MNIST", MNIST_FILES, root), _Source("fashion_mnist", "FashionMNIST", FASHION_MNIST_FILES, root)]
    found = [source.test() for source in sources if source.name == name and source.has("t10k")]
    if name == "digits":
        found = [load_digits(0.02, seed=0).splits["test"]]
    return next((test.images for test in found if test.digest == digest), None)


def _name(data: str, subset: int | None) -> str:
    return data if subset is None else f"{data}_{subset}"


def _make_available(source: _Source, alternative: str = "") -> None:
    """Download the files unless they are there; raises UserError, with the alternative for the user, if that fails."""
    try:
        if not source.has():
            source.download()
    except Exception as error:  # torchvision raises URLError, RuntimeError or OSError, depending on the mirror
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{source.torchvision} is not in data.root={source.root} (MNIST_ROOT) and could not be downloaded: {reason}.\n"
            f"Set MNIST_ROOT to a folder with {source.torchvision}/raw/*-ubyte.gz{alternative}."
        ) from error


def _train_and_finetune(
    images: Tensor, labels: Tensor, finetune_fraction: float, seed: int, subset: int | None, epoch_size: int
) -> dict[str, Split]:
    order = torch.randperm(len(labels), generator=generator(seed, "split"))
    finetune_size = round(len(labels) * finetune_fraction)
    finetune_epoch = round(epoch_size * finetune_fraction)
    if not 0 < finetune_size < len(labels):
        raise ArgumentError(
            "finetune_fraction",
            finetune_fraction,
            f"a fraction such as 0.02 that leaves images for both phases, not {finetune_size} of {len(labels)} for fine-tuning",
        )
    finetune, train = order[:finetune_size], order[finetune_size:]
    train_epoch = epoch_size - finetune_epoch
    if subset is not None:
        require(subset <= len(train), "subset", subset, f"at most {len(train)}, the number of training images")
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
def _read(path: Path, source: str, checksum: str) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """Return the bytes of a file, unpacked, including its header of 8 (labels) or 16 bytes (images).

    Args:
        path: The file, packed if its name ends with .gz.
        source: Name of the data set.
        checksum: SHA-256 of the content, or MD5 of the .gz.

    Raises:
        UserError: The file is damaged or unreadable.
    """
    try:
        file = path.read_bytes()
        content = gzip.decompress(file) if path.suffix == ".gz" else file
    except (OSError, EOFError, ValueError, zlib.error) as error:
        problem = f"{path} cannot be read: {error}"
    else:
        if checksum in (hashlib.sha256(content).hexdigest(), hashlib.md5(file, usedforsecurity=False).hexdigest()):
            return np.frombuffer(bytearray(content), dtype=np.uint8)
        problem = f"{path} is truncated or corrupted: its {len(content)} unpacked bytes are not those of {source}"
    raise UserError(f"{problem}.\nDelete the file to download it on the next run, or set MNIST_ROOT to another copy.")
