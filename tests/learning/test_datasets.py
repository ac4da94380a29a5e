"""Data sets of other shapes, of other names, and of a part of the images."""

import gzip
import hashlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from mnist_exp.errors import UserError
from mnist_exp.learning.data import Dataset, Split
from mnist_exp.learning.datasets import FASHION_MNIST_FILES, MNIST_FILES, find_test_images, load_digits, load_mnist
from mnist_exp.learning.evaluation import evaluate
from mnist_exp.learning.training import fit, prepare_phases
from mnist_exp.nodes import build


def stripes(count: int, seed: int, channels: int = 1) -> Split:
    """Images of 20 x 20 pixels with a bright third: left, middle or right, for the classes 0, 1 and 2."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=draws)
    images = torch.randint(0, 60, (count, channels, 20, 20), generator=draws, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, :, label * 7 : label * 7 + 6] += 150
    return Split(images, labels, count, f"{seed}")


def three_classes(channels: int = 1) -> Dataset:
    splits = {name: stripes(count, seed, channels) for seed, (name, count) in enumerate(SIZES.items())}
    return Dataset("stripes", "made by the test", 3, splits, validation="finetune")


SIZES = {"train": 640, "finetune": 128, "test": 100}
load = partial(
    load_mnist, source="fashion_mnist", fallback=None,
    root=None, default_root="/proc/nowhere", finetune_fraction=0.02, validation_size=0, seed=0,
)  # fmt: skip


@pytest.mark.parametrize(("model", "channels"), [("se_cnn", 1), ("se_cnn_separable_small", 3)])
def test_three_classes_of_20_by_20_are_learned(composed, tmp_path: Path, model: str, channels: int) -> None:
    data = three_classes(channels)
    assert data.shape == {"classes": 3, "side": 20, "in_channels": channels}
    config = composed(f"model={model}", "batch_size=64", "~phases.finetune", "phases.train.epochs=6")
    network = build(config.model, "model", **data.shape)
    phases = prepare_phases(network, {"train": build(config.phases["train"], "phases.train")}, data, tmp_path)
    *_, last = fit(network, phases, data, seed=0, precision=torch.float32)
    evaluation = evaluate(network, data.splits["test"])
    assert evaluation.metrics["accuracy"] > 0.9
    assert last.metrics["val/accuracy"] > 0.9
    assert evaluation.logits.shape == (100, 3)
    assert evaluation.confusion_matrix.shape == (3, 3)


def test_images_and_labels_that_do_not_fit_are_refused() -> None:
    good, data = stripes(10, seed=0), three_classes()
    for images, labels in (
        (good.images.float(), good.labels),
        (good.images[:, :, 1:], good.labels),
        (good.images[:, :, 1:, 1:], good.labels),
        (good.images, good.labels + 1),
    ):
        with pytest.raises(ValueError, match="train"):
            Dataset("x", "x", 3, {"test": data.splits["test"], "train": Split(images, labels, 10, "")}, validation="test")


def write_fashion_mnist(folder: Path) -> dict[str, str]:
    """Write small files in MNIST's format, and return their MD5 sums."""
    draws, folder = np.random.default_rng(0), folder / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    sums = {}
    for part, count in (("train", 500), ("t10k", 100)):
        images = np.array([2051, count, 28, 28], ">i4").tobytes() + draws.bytes(count * 28 * 28)
        labels = np.array([2049, count], ">i4").tobytes() + draws.integers(0, 10, count, np.uint8).tobytes()
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            packed = gzip.compress(content)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(packed)
            sums[f"{part}-{kind}-ubyte"] = hashlib.md5(packed, usedforsecurity=False).hexdigest()
    return sums


@pytest.fixture
def fashion_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, checksum in write_fashion_mnist(tmp_path).items():
        monkeypatch.setitem(FASHION_MNIST_FILES, name, checksum)
    return tmp_path


def test_fashion_mnist_is_read(fashion_root: Path, composed) -> None:
    data = build(composed("data=fashion_mnist", f"data.root={fashion_root}").data, "data", seed=0)
    assert data.name == "fashion_mnist"
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 490, "finetune": 10, "test": 100}
    content = gzip.decompress((fashion_root / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert data.splits["test"].images.flatten().tolist() == list(content[16:])
    test = data.splits["test"]
    assert find_test_images("fashion_mnist", str(fashion_root), test.digest).equal(test.images)
    with pytest.raises(UserError):
        find_test_images("mnist", str(fashion_root), test.digest)
    tuning = load(root=str(fashion_root), validation_size=100)
    assert {name: len(split) for name, split in tuning.splits.items()} == {"train": 392, "finetune": 8, "validation": 100}
    with pytest.raises(UserError) as error:
        load(root=str(fashion_root), validation_size=500)
    assert (error.value.key, error.value.value) == ("validation_size", 500)


def test_the_checksums_are_torchvisions() -> None:
    from torchvision.datasets import MNIST, FashionMNIST

    for source, files in ((MNIST, MNIST_FILES), (FashionMNIST, FASHION_MNIST_FILES)):
        assert dict(source.resources) == {f"{name}.gz": checksum for name, checksum in files.items()}


@pytest.mark.parametrize("has_own_root", [True, False])
def test_missing_files_are_downloaded_by_torchvision(
    has_own_root: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Into the root that the user set, which must exist, or else into the default one, which need not."""
    import torchvision.datasets

    sums = write_fashion_mnist(tmp_path / "mirror")
    for name, checksum in sums.items():
        monkeypatch.setitem(FASHION_MNIST_FILES, name, checksum)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "mirror" / "FashionMNIST" / "raw"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    request.addfinalizer(server.shutdown)
    mirror = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [mirror])
    resources = [(f"{name}.gz", checksum) for name, checksum in sums.items()]
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", resources)
    own, default = tmp_path / "own", tmp_path / "new" / "default"
    own.mkdir()
    data = load(root=str(own) if has_own_root else None, default_root=str(default))
    assert len(data.splits["test"]) == 100
    used = (own if has_own_root else default) / "FashionMNIST" / "raw"
    assert {path.name for path in used.iterdir()} == {f"{name}.gz" for name in FASHION_MNIST_FILES}
    assert default.exists() != has_own_root


def test_a_subset_is_a_fixed_part_of_the_training_images() -> None:
    whole, part = load_digits(0.02, seed=0), load_digits(0.02, seed=0, subset=200)
    assert part.name == "digits_200"
    train = part.splits["train"]
    assert len(train) == train.epoch_size == 200
    assert train.digest == load_digits(0.02, seed=0, subset=200).splits["train"].digest != whole.splits["train"].digest
    for name in ("finetune", "test"):
        assert part.splits[name].digest == whole.splits[name].digest
    images = {seed: rows(load_digits(0.02, seed=seed, subset=200)) for seed in (0, 1)}
    assert len(images[0] & images[1]) > 180, "another seed changes it only where its split does"
    assert images[0] <= rows(whole)
    assert find_test_images("digits_200", None, part.splits["test"].digest) is not None


def rows(data: Dataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in data.splits["train"].images}
