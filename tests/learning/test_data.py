import gzip
import shutil
from pathlib import Path

import pytest
import torch

from mnist_exp.errors import UserError
from mnist_exp.learning.datasets import MNIST_FILES, find_test_images, load_digits, load_mnist
from mnist_exp.learning.seeds import derive_seed, generator


@pytest.fixture
def copy(mnist_root: Path, tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_FILES:
        shutil.copyfile(mnist_root / "MNIST" / "raw" / f"{name}.gz", raw / f"{name}.gz")
    return tmp_path


def test_mnist_is_split_as_the_recipe_says(mnist_root: Path) -> None:
    data = load_mnist(str(mnist_root), None, 0.02, 0, seed=0)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 58_800, "finetune": 1_200, "test": 10_000}
    assert data.splits["train"].images.shape == (58_800, 1, 28, 28)
    assert data.splits["train"].images.dtype == torch.uint8
    together = torch.cat([data.splits["train"].labels, data.splits["finetune"].labels])
    assert together.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.splits["test"].labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_the_split_depends_on_the_seed_alone(mnist_root: Path) -> None:
    first, repeated, other = (load_mnist(str(mnist_root), None, 0.02, 0, seed=seed) for seed in (0, 0, 1))
    for name in ("train", "finetune"):
        assert first.splits[name].digest == repeated.splits[name].digest != other.splits[name].digest
    assert first.splits["test"].digest == other.splits["test"].digest


def test_tuning_never_reads_the_test_set(copy: Path) -> None:
    for name in MNIST_FILES:
        if name.startswith("t10k"):
            (copy / "MNIST" / "raw" / f"{name}.gz").write_bytes(b"not MNIST")
    data = load_mnist(str(copy), None, 0.02, 5000, seed=0)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 53_900,
        "finetune": 1_100,
        "validation": 5_000,
    }
    assert data.validation == "validation"


def test_unpacked_files_are_read_too(copy: Path) -> None:
    packed = load_mnist(str(copy), None, 0.02, 0, seed=0)
    for name in MNIST_FILES:
        path = copy / "MNIST" / "raw" / f"{name}.gz"
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    unpacked = load_mnist(str(copy), None, 0.02, 0, seed=0)
    assert packed.splits["train"].digest == unpacked.splits["train"].digest


def test_test_images_are_found_by_their_digest(copy: Path) -> None:
    test = load_mnist(str(copy), None, 0.02, 0, seed=0).splits["test"]
    digits = load_digits(0.5, seed=1).splits["test"]
    assert find_test_images("mnist", str(copy), test.digest).equal(test.images)
    assert find_test_images("digits", str(copy), digits.digest).equal(digits.images)
    assert find_test_images("mnist", str(copy), digits.digest) is None
    assert find_test_images("mnist", str(copy / "nothing"), test.digest) is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_a_damaged_file_is_named(copy: Path, damage: str) -> None:
    path = copy / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    plain = bytearray(gzip.decompress(content))
    plain[-1] ^= 1
    path.write_bytes({"truncated": content[:-100], "flipped": gzip.compress(plain), "foreign": b"hello", "empty": b""}[damage])
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz .*\n.*Delete the file"):
        load_mnist(str(copy), "digits", 0.02, 0, seed=0)


def test_missing_without_fallback_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MNIST_ROOT.*could not be downloaded"):
        load_mnist("/proc/nowhere", None, 0.02, 0, seed=0)


def test_missing_with_fallback_says_so(tmp_path: Path) -> None:
    data = load_mnist("/proc/nowhere", "digits", 0.02, 0, seed=0)
    assert data.name == "digits"
    assert data.notice is not None
    assert "USING THE EMBEDDED digits" in data.notice


def test_digits_take_as_many_steps_as_mnist() -> None:
    data = load_digits(0.02, seed=0)
    assert sum(len(data.splits[name]) for name in ("train", "finetune")) == 1_437
    assert len(data.splits["test"]) == 360
    assert data.splits["train"].steps(512) == 115
    assert data.splits["finetune"].steps(128) == 10
    images = data.splits["test"].images
    assert images.shape == (360, 1, 28, 28)
    assert int(images.max()) == 255
    assert not images[:, :, :4].any(), "framed in black"


def test_an_epoch_shows_every_image_equally_often() -> None:
    split = load_digits(0.02, seed=0).splits["finetune"]  # 29 images, 1,200 per epoch
    shown = torch.cat([images.flatten(1) for images, _ in split.batches(128, generator("order"))])
    assert len(shown) == split.epoch_size == 1_200
    counts = shown.unique(dim=0, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


def test_seeds_differ_by_every_part() -> None:
    parts = [(seed, phase, epoch) for seed in range(10) for phase in ("train", "finetune") for epoch in range(10)]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
    assert derive_seed(0, "train", 1) == derive_seed(0, "train", 1)
