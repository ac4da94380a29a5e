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
from PIL import Image

from mnist_exp.errors import UserError
from mnist_exp.learning.data import Dataset, Split
from mnist_exp.learning.datasets import FASHION_MNIST_FILES, MNIST_FILES, load_digits, load_folder, load_mnist
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
    return Dataset("stripes", "made by the test", ("left", "middle", "right"), splits, validation="finetune")


SIZES = {"train": 640, "finetune": 128, "test": 100}
load = partial(
    load_mnist, source="fashion_mnist", fallback=None,
    root=None, download_root="/proc/nowhere", finetune_fraction=0.02, validation_size=0, seed=0,
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
            Dataset("x", "x", "abc", {"test": data.splits["test"], "train": Split(images, labels, 10, "")}, validation="test")


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
    assert data.class_names[9] == "ankle boot"
    assert data.preparation == "plain"
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
    """Into the folder for downloads, which need not exist; never into the root that a user, or a stored run, names."""
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
    own, downloads = tmp_path / "own", tmp_path / "new" / "downloads"
    own.mkdir()
    if has_own_root:
        with pytest.raises(UserError):
            load(root=str(own), download_root=str(downloads))
        assert not list(own.iterdir())
        assert not downloads.exists()
        return
    data = load(download_root=str(downloads))
    assert len(data.splits["test"]) == 100
    assert {path.name for path in (downloads / "FashionMNIST" / "raw").iterdir()} == {
        f"{name}.gz" for name in FASHION_MNIST_FILES
    }
    assert data.locations == {"root": str(downloads)}


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


def rows(data: Dataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in data.splits["train"].images}


def write_pictures(folder: Path, split: Split, names: tuple[str, ...] = ("left", "middle", "right")) -> None:
    """Write the images of a split as PNG files by class."""
    for number, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
        file = folder / names[label] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = image.movedim(0, 2).numpy()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file)


folder = partial(load_folder, side=20, finetune_fraction=0.1, seed=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_pictures_is_read_pixel_by_pixel(tmp_path: Path, channels: int) -> None:
    written = {"train": stripes(100, 1, channels), "test": stripes(30, 2, channels)}
    for part, split in written.items():
        write_pictures(tmp_path / "my pictures" / part, split)
    data = folder(root=str(tmp_path / "my pictures"), channels=channels)
    assert data.name == "folder_my_pictures"
    assert data.class_names == ["left", "middle", "right"]
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 90, "finetune": 10, "test": 30}
    by_label = written["test"].labels.argsort(stable=True)
    order = [
        index for label in range(3) for index in sorted(by_label[written["test"].labels[by_label] == label].tolist(), key=str)
    ]
    assert data.splits["test"].images.equal(written["test"].images[order])
    assert data.splits["test"].labels.equal(written["test"].labels[order])


def test_equal_pictures_never_lie_in_training_and_test(tmp_path: Path) -> None:
    """Without a folder test/, the pixels decide: also for copies in another format and in another class."""
    write_pictures(tmp_path, stripes(200, 0))
    for number, file in enumerate(sorted(tmp_path.glob("*/*.png"))):
        Image.open(file).save(tmp_path / "left" / f"copy {number}.bmp")
    (tmp_path / "left" / "notes.txt").write_text("no picture")
    data = folder(root=str(tmp_path), channels=1)
    test = {image.numpy().tobytes() for image in data.splits["test"].images}
    train = {image.numpy().tobytes() for name in ("train", "finetune") for image in data.splits[name].images}
    assert not test & train
    assert len(test) + len(train) == 200
    assert 20 < len(test) < 60
    again = folder(root=str(tmp_path), channels=1, seed=1)
    assert again.splits["test"].digest == data.splits["test"].digest
    larger = folder(root=str(tmp_path), channels=1, side=40)
    assert larger.splits["test"].labels.equal(data.splits["test"].labels), "the size of the images does not matter"


def test_pictures_of_any_size_are_scaled_with_their_aspect_ratio(tmp_path: Path) -> None:
    for name in ("wide", "high"):
        (tmp_path / name).mkdir()
        for number in range(20):
            size = (40, 20) if name == "wide" else (20, 40)
            Image.new("RGB", size, (250, number, 0)).save(tmp_path / name / f"{number}.png")
    data = folder(root=str(tmp_path), channels=3)
    images = torch.cat([split.images for split in data.splits.values()])
    labels = torch.cat([split.labels for split in data.splits.values()])
    wide, high = images[labels == 1], images[labels == 0]
    assert (wide[:, 0, 6:14] == 250).all()
    assert not wide[:, :, :4].any(), "black above"
    assert not high[:, :, :, :4].any(), "black on the left"


@pytest.mark.parametrize("problem", ["no root", "no folder", "one class", "damaged", "other classes"])
def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, problem: str) -> None:
    for part in ("train", "test"):
        write_pictures(tmp_path / part, stripes(20, 0))
    root = {"no root": None, "no folder": str(tmp_path / "nothing"), "one class": str(tmp_path / "one")}.get(
        problem, str(tmp_path)
    )
    write_pictures(tmp_path / "one", Split(torch.zeros(3, 1, 20, 20, dtype=torch.uint8), torch.zeros(3, dtype=torch.long), 3, ""))
    if problem == "damaged":
        (tmp_path / "train" / "left" / "x.png").write_bytes(b"not a picture")
    if problem == "other classes":
        write_pictures(tmp_path / "test", stripes(20, 0), ("other", "middle", "right"))
    with pytest.raises(UserError) as error:
        folder(root=root, channels=1)
    assert error.value.key == "root"
    assert error.value.remedy
