"""The data sets: MNIST, Fashion-MNIST, scikit-learn's digits, folders of pictures.

A new one is a function and a file in conf/data/.
"""

import gzip
import hashlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from mnist_exp.errors import Count, DownloadFolder, Fraction, Location, MissingDataError, UserError
from mnist_exp.learning.data import Dataset, Split, generator
from mnist_exp.learning.pictures import find_pictures, flatten, open_picture, plain

MNIST_EPOCH = 60_000
DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TEST_SHARE = 5  # of the pictures in a folder without test/, one in this many is a test image

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


@dataclass(frozen=True)
class _Source:
    """A data set that torchvision can download, in MNIST's file format.

    Attributes:
        torchvision: Name of the data set's class in torchvision, and of its folder.
        files: MD5 of each file.
        class_names: Name of each class.
        preparation: As in `Dataset`.
    """

    torchvision: str
    files: dict[str, str]
    class_names: Sequence[str]
    preparation: Literal["handwriting", "plain"]

    def folder(self, root: str) -> Path:
        """Return the folder of the files below a root in torchvision's layout."""
        return Path(root).absolute() / self.torchvision / "raw"

    def are_in(self, root: str) -> bool:
        """Return whether all files are below a root."""
        return all((self.folder(root) / f"{name}.gz").exists() for name in self.files)

    def read(self, root: str, part: str) -> tuple[Tensor, Tensor]:
        """Return the images (n, 1, h, w) uint8 and the labels (n,) int64 of a part."""
        names = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
        pixels, labels = (_read(self.folder(root) / f"{name}.gz", self.files[name]) for name in names)
        height, width = pixels[8:16].view(">i4").tolist()  # the header has 16 bytes, that of the labels 8
        images = torch.from_numpy(pixels[16:]).view(-1, 1, height, width)  # (n * h * w,) -> (n, 1, h, w)
        return images, torch.from_numpy(labels[8:]).long()

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


SOURCES = {
    "mnist": _Source("MNIST", MNIST_FILES, DIGITS, "handwriting"),
    "fashion_mnist": _Source("FashionMNIST", FASHION_MNIST_FILES, CLOTHES, "plain"),
}


def load_mnist(
    root: Location | None,
    finetune_fraction: Fraction,
    validation_size: Annotated[int, Ge(0)],
    seed: int,
    download_root: DownloadFolder | None = None,
    fallback: Literal["digits"] | None = None,
    subset: Count | None = None,
    source: Literal["mnist", "fashion_mnist"] = "mnist",
) -> Dataset:
    """Load MNIST, or a data set in its form; download it first if it is missing.

    The 60,000 training images become `train` and `finetune`, the 10,000 test images become `test`.

    Args:
        root: Folder in torchvision's layout, with the files in MNIST/raw, which is only read; None for `download_root`.
        finetune_fraction: Share of the training images in `finetune`, at least one image.
        validation_size: Number of training images at the end, the same for every seed, that become `validation`.
            If it is above 0, the test set is not read.
        seed: Decides which images fine-tune.
        download_root: Folder in the same layout that is created and filled if it is missing; None to download nothing.
        fallback: `digits` to load `load_digits` if MNIST is in no folder and cannot be downloaded, or None to raise an error.
        subset: Number of images to leave in `train`, with epochs of that length, or None for all.
        source: The data set: MNIST, or Fashion-MNIST with its files in FashionMNIST/raw (Xiao et al., Fashion-MNIST: a Novel
            Image Dataset for Benchmarking Machine Learning Algorithms, 2017).

    Raises:
        UserError: An argument does not fit the images, `root` does not have them, a file is damaged or unreadable, or MNIST is
            missing and no fallback is allowed.
    """
    files = SOURCES[source]
    remedy = f"Set data.root to a folder with {files.torchvision}/raw/*-ubyte.gz, or choose data=digits."
    if root is not None and not files.are_in(root):
        raise MissingDataError.invalid("root", root, f"a folder that contains {files.torchvision}/raw", remedy)
    used_root = root or download_root
    try:
        if used_root is None:
            raise MissingDataError("no folder is named")
        if not files.are_in(used_root):
            files.download(used_root)
    except Exception as error:  # torchvision raises URLError, RuntimeError or OSError, depending on the mirror
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = f"{files.torchvision} is not in {used_root} and could not be downloaded: {reason}."
        missing = MissingDataError(problem, remedy=remedy)
        if fallback is None:
            raise missing from error
        warning = (
            f"{missing} data.fallback=null turns this warning into an error.\n"
            f"USING THE EMBEDDED digits INSTEAD OF {files.torchvision}: 1,797 images."
        )
        return replace(load_digits(finetune_fraction, seed, subset), warning=warning)
    images, labels = files.read(used_root, "train")
    train_size = len(labels) - validation_size
    if train_size <= 0:
        raise UserError.invalid("validation_size", validation_size, f"an integer >= 0 and < {len(labels)}")
    splits = train_and_finetune(images[:train_size], labels[:train_size], finetune_fraction, seed, subset, train_size)
    if validation_size:
        splits["validation"] = make_split(images[train_size:], labels[train_size:], validation_size)
    else:
        test_images, test_labels = files.read(used_root, "t10k")
        splits["test"] = make_split(test_images, test_labels, len(test_labels))
    validation = "validation" if validation_size else "finetune"
    return Dataset(
        source,
        str(files.folder(used_root)),
        files.class_names,
        splits,
        validation,
        files.preparation,
        subset,
        locations={"root": str(Path(used_root).absolute())},
    )


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
    splits = train_and_finetune(images[train], labels[train], finetune_fraction, seed, subset, MNIST_EPOCH)
    splits["test"] = make_split(images[test], labels[test], len(test))
    return Dataset("digits", "sklearn.datasets.load_digits", DIGITS, splits, "finetune", "handwriting", subset)


def load_folder(
    root: Location | None,
    channels: Literal[1, 3],
    side: Count,
    finetune_fraction: Fraction,
    seed: int,
    subset: Count | None = None,
) -> Dataset:
    """Load the pictures in a folder: ROOT/CLASS/*, or ROOT/train/CLASS/* and ROOT/test/CLASS/*.

    Without a folder test/, the pixels of an image decide whether it is a test image, so that equal pictures never lie in both.

    Args:
        root: The folder.
        channels: 1 for gray values, 3 for colors.
        side: Height and width of the images, into which `pictures.plain` scales the pictures.
        finetune_fraction: Share of the training images in `finetune`, at least one image.
        seed: Decides which images fine-tune.
        subset: Number of images to leave in `train`, with epochs of that length, or None for all.

    Raises:
        UserError: The folder or a file cannot be read, has other classes than train/, or has no test images.
    """
    layout = "a folder of pictures, ROOT/CLASS/*.png, or ROOT/train/CLASS/*.png and ROOT/test/CLASS/*.png"
    if root is None:
        raise UserError.invalid("root", root, layout, "Set it with data.root=FOLDER.")
    if not Path(root).is_dir():
        raise MissingDataError.invalid("root", root, layout, "Name another folder with data.root=FOLDER.")
    parts = {part: Path(root, part) for part in ("train", "test")}
    has_parts = all(folder.is_dir() for folder in parts.values())
    base = parts["train"] if has_parts else Path(root)
    names = sorted(folder.name for folder in base.iterdir() if folder.is_dir() and find_pictures(folder))
    if len(names) < 2:
        raise UserError.invalid("root", root, f"{layout}, with at least two classes", f"Found the classes {names}.")
    images, labels, is_test = _read_classes(base, names, side, channels)
    if has_parts:
        test_images, test_labels, _ = _read_classes(parts["test"], names, side, channels)
    else:
        test_images, test_labels = images[is_test], labels[is_test]
        images, labels = images[~is_test], labels[~is_test]
    if lacking := [name for label, name in enumerate(names) if label not in labels]:
        expected = f"training pictures of each class, also of {', '.join(lacking)}"
        raise UserError.invalid("root", root, expected, "Add more pictures.")
    if not len(test_labels):
        raise UserError.invalid("root", root, "test pictures", "Add more pictures, or ROOT/test/CLASS/*.")
    splits = train_and_finetune(images, labels, finetune_fraction, seed, subset, len(labels))
    splits["test"] = make_split(test_images, test_labels, len(test_labels))
    place = Path(root).absolute()
    title = "folder_" + re.sub(r"\W", "_", place.name)
    return Dataset(title, str(place), names, splits, "finetune", subset=subset, locations={"root": str(place)})


def _read_classes(folder: Path, names: Sequence[str], side: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pictures in FOLDER/CLASS/*.

    Returns:
        Images (n, channels, side, side) uint8, labels (n,) int64, and whether the pixels choose an image for the test (n,) bool.
    """
    others = sorted(item.name for item in folder.iterdir() if item.name not in names and item.is_dir() and find_pictures(item))
    if others:
        raise UserError.invalid("root", folder, f"the classes {', '.join(names)}", f"Remove {', '.join(others)}.")
    files = [(path, label) for label, name in enumerate(names) for path in find_pictures(folder / name)]
    read = [_read_picture(path, path.stat().st_mtime_ns, side, channels) for path, _ in files]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0, channels, side, side, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return images, labels, torch.tensor([is_test for _, is_test in read], dtype=torch.bool)


@cache  # the jobs of a sweep share a process
def _read_picture(path: Path, changed: int, side: int, channels: int) -> tuple[Tensor, bool]:
    """Return the image (channels, side, side) uint8 of a picture, and whether its pixels choose it for the test.

    Args:
        path: The file.
        changed: The time of its last change.
        side: Height and width of the image.
        channels: 1 for gray values, 3 for colors.
    """
    try:
        picture = flatten(open_picture(path))
        pixels = torch.from_numpy(plain(picture, side, channels).copy()).view(side, side, channels)
    except UserError as error:
        raise UserError.invalid("root", path, f"a picture that can be read, but: {error}", "Correct or remove it.") from error
    digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()
    return pixels.movedim(2, 0), int.from_bytes(digest[:8]) % TEST_SHARE == 0


def train_and_finetune(
    images: Tensor, labels: Tensor, finetune_fraction: float, seed: int, subset: int | None, epoch_size: int
) -> dict[str, Split]:
    """Divide training images at random into the splits `train` and `finetune`.

    Args:
        images: (n, channels, side, side) uint8.
        labels: (n,) int64.
        finetune_fraction: Share of the images in `finetune`, at least one image.
        seed: Decides which images fine-tune.
        subset: Number of images to leave in `train`, with epochs of that length, or None for all.
        epoch_size: Images per epoch of both splits together.

    Raises:
        UserError: A split would be empty, or `subset` exceeds the number of training images.
    """
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
        "train": make_split(images[train], labels[train], train_epoch),
        "finetune": make_split(images[finetune], labels[finetune], finetune_epoch),
    }


def make_split(images: Tensor, labels: Tensor, epoch_size: int) -> Split:
    """Return a split with the digest of its images (n, channels, side, side) uint8 and labels (n,) int64."""
    digest = hashlib.sha256(images.contiguous().numpy().data)
    digest.update(labels.contiguous().numpy().data)
    return Split(images, labels, epoch_size, digest.hexdigest()[:16])


@cache  # the jobs of a sweep share a process
def _read(path: Path, md5: str) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """Return the unpacked bytes of a .gz file; raises UserError if it is damaged or unreadable."""
    remedy = "Delete the file to download it on the next run, or set data.root to another copy."
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise MissingDataError(f"{path} cannot be read: {error}.", remedy=remedy) from error
    if hashlib.md5(packed, usedforsecurity=False).hexdigest() != md5:
        raise UserError(
            f"{path} is truncated or corrupted: its {len(packed)} bytes do not have the published MD5.", remedy=remedy
        )
    return np.frombuffer(bytearray(gzip.decompress(packed)), dtype=np.uint8)
