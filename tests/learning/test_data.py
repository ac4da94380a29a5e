import gzip
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from mnist_exp.errors import UserError
from mnist_exp.learning.data import derive_seed, generator
from mnist_exp.learning.datasets import MNIST_FILES, load_digits, load_mnist

NOWHERE = "/proc/nowhere"  # nothing can be downloaded into it
load = partial(load_mnist, root=None, download_root=NOWHERE, fallback=None, finetune_fraction=0.02, validation_size=0, seed=0)


@pytest.fixture
def copy(mnist_root: Path, tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_FILES:
        shutil.copyfile(mnist_root / "MNIST" / "raw" / f"{name}.gz", raw / f"{name}.gz")
    return tmp_path


def test_mnist_is_split_as_the_recipe_says(mnist_root: Path) -> None:
    data = load(root=str(mnist_root))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 58_800, "finetune": 1_200, "test": 10_000}
    assert data.splits["train"].images.shape == (58_800, 1, 28, 28)
    assert data.splits["train"].images.dtype == torch.uint8
    together = torch.cat([data.splits["train"].labels, data.splits["finetune"].labels])
    assert together.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.splits["test"].labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_the_split_depends_on_the_seed_alone(mnist_root: Path) -> None:
    first, repeated, other = (load(root=str(mnist_root), seed=seed) for seed in (0, 0, 1))
    for name in ("train", "finetune"):
        assert first.splits[name].digest == repeated.splits[name].digest != other.splits[name].digest
    assert first.splits["test"].digest == other.splits["test"].digest


def test_tuning_never_reads_the_test_set(copy: Path) -> None:
    for name in MNIST_FILES:
        if name.startswith("t10k"):
            (copy / "MNIST" / "raw" / f"{name}.gz").write_bytes(b"not MNIST")
    data = load(root=str(copy), validation_size=5000)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 53_900,
        "finetune": 1_100,
        "validation": 5_000,
    }
    assert data.validation == "validation"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_a_damaged_file_is_named(copy: Path, damage: str) -> None:
    path = copy / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    plain = bytearray(gzip.decompress(content))
    plain[-1] ^= 1
    path.write_bytes({"truncated": content[:-100], "flipped": gzip.compress(plain), "foreign": b"hello", "empty": b""}[damage])
    with pytest.raises(UserError) as error:
        load(download_root=str(copy), fallback="digits")
    assert str(path) in str(error.value)
    assert error.value.remedy


@pytest.mark.parametrize("fallback", ["digits", None])
def test_a_root_that_does_not_exist_is_named(tmp_path: Path, fallback: str | None) -> None:
    root = str(tmp_path / "nothing")
    with pytest.raises(UserError) as error:
        load(root=root, download_root=str(tmp_path), fallback=fallback)
    assert (error.value.key, error.value.value) == ("root", root)
    assert "data.root" in error.value.remedy
    assert not Path(root).exists()


@pytest.mark.parametrize("arguments", [{"root": "/proc", "fallback": "digits"}, {"download_root": NOWHERE}], ids=str)
def test_missing_files_are_an_error_in_a_root_of_the_user_or_without_fallback(arguments: dict[str, str]) -> None:
    with pytest.raises(UserError) as error:
        load(**arguments)
    assert "MNIST/raw" in error.value.remedy


def test_digits_take_the_place_of_missing_files_with_a_warning() -> None:
    data = load(fallback="digits", subset=64)
    assert data.name == "digits_64"
    assert NOWHERE in (data.warning or "")
    kept = data.description["warning"]
    assert "digits INSTEAD OF MNIST" in kept, "the users of the model learn it, too"
    assert "limited to 64" in kept
    assert NOWHERE not in kept


@pytest.mark.parametrize(("name", "value"), [("finetune_fraction", 0.0), ("finetune_fraction", 0.9999), ("subset", 2_000)])
def test_a_size_that_does_not_fit_the_images_is_named(name: str, value: float) -> None:
    with pytest.raises(UserError) as error:
        load_digits(**({"finetune_fraction": 0.02, "seed": 0} | {name: value}))
    assert (error.value.key, error.value.value) == (name, value)


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
