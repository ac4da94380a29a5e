"""A trained model by every name, for every kind of image; and the commands predict, evaluate and runs promote."""

import csv
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Call, CommandLine
from mlflow import MlflowClient
from PIL import EpsImagePlugin, Image, ImageDraw

from mnist_exp import evaluate, predict
from mnist_exp.api import load
from mnist_exp.errors import UserError
from mnist_exp.learning.data import Dataset
from mnist_exp.learning.pictures import open_picture
from mnist_exp.serving.classifier import Classifier
from mnist_exp.settings import DataDescription
from mnist_exp.tracking.base import ModelSource


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[Path]:
    """A folder with a picture under a difficult name, one that is blank, and one that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(picture).line([(100, 30), (100, 170)], fill="black", width=16)
    picture.save(folder / "a=one [ü] (1).png")
    Image.new("L", (50, 50), 255).save(folder / "blank.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no")
    (folder / "notes.txt").write_text("not a picture")
    os.mkfifo(folder / "pipe.png")
    return folder


def test_one_bad_file_costs_no_other(call: Call, stored_run: str, pictures: Path, tmp_path: Path) -> None:
    table, sheet = tmp_path / "out.csv", tmp_path / "sheet.png"
    done = call(predict.main, "--model", stored_run[:8], str(pictures), "--out", str(table), "--sheet", str(sheet))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    rows = list(csv.DictReader(table.open()))
    assert [Path(row["file"]).name for row in rows] == ["a=one [ü] (1).png", "blank.png", "broken.jpg"]
    assert rows[0].keys() == {"file", "label", "probability", "runner_up", "error"}
    assert [row["label"].isdecimal() for row in rows] == [True, False, False]
    assert [bool(row["error"]) for row in rows] == [False, True, True]
    assert Image.open(sheet).size[0] > 200


def test_hundreds_of_files_are_classified_in_order(
    call: Call, stored_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # short names: the terminal breaks long ones
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(260):
        picture = Image.new("L", (40, 40), 255)
        ImageDraw.Draw(picture).line([(20, 5), (20, 34)], fill=0, width=2 + number % 5)
        picture.save(folder / f"{number:03}.png")
    (folder / "100.png").write_bytes(b"")
    done = call(predict.main, "many", "--out", "out.csv")
    assert done.returncode == 1
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [Path(row["file"]).name for row in rows] == [f"{number:03}.png" for number in range(260)]
    assert [number for number, row in enumerate(rows) if row["error"]] == [100]
    assert "049.png" in done.stdout
    assert "060.png" not in done.stdout, "the terminal shows the first ones"


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.png", "--out=nowhere/x.csv"],
        ["a.png", "--out=x.json"],
        ["a.png", "--sheet=nowhere/x.png"],
        ["a.png", "--model=nonsense"],
        ["a.png", "--model=models:/nobody@champion"],
        ["a.png", f"--model={'0' * 32}"],
        ["empty"],
        ["missing.png"],
    ],
    ids=" ".join,
)
def test_mistakes_get_one_message(
    arguments: list[str], call: Call, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    done = call(predict.main, *arguments)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert arguments[-1].removeprefix("--model=").partition("=")[2] in done.stderr or arguments[-1] in done.stderr
    assert "Traceback" not in done.stderr


# Attacks: pictures are untrusted.


def test_no_picture_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow recognizes a file by its content, and gives EPS to Ghostscript, whose language can write files and run for ever."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    picture = tmp_path / "x.png"
    picture.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError):
        open_picture(picture)
    assert not (tmp_path / "started").exists()


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.png", tmp_path / "link.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError):
            open_picture(path)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (4000, 4000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(UserError):
        open_picture(tmp_path / "bomb.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "mpo", "gif", "bmp", "tif", "webp", "ppm"])
def test_usual_formats_are_read(suffix: str, tmp_path: Path) -> None:
    picture = Image.new("RGB", (30, 20), "gray")
    picture.save(tmp_path / f"x.{suffix}", **({"save_all": True, "append_images": [picture]} if suffix == "mpo" else {}))
    assert open_picture((tmp_path / f"x.{suffix}").rename(tmp_path / "photo")).size == (30, 20)


# From Python


def test_pictures_of_every_kind_get_the_same_answer(stored_run: str, pictures: Path) -> None:
    classifier = load("latest")
    path = pictures / "a=one [ü] (1).png"
    expected = classifier(path)
    assert expected.probabilities.shape == (1, 10)
    assert expected.probabilities.sum() == pytest.approx(1, abs=1e-5)
    with Image.open(path) as picture:
        for form in (str(path), picture.copy(), [path], expected.images, expected.images[..., None], expected.images / 255):
            predictions = classifier(form)
            assert (predictions.images == expected.images).all(), "prepared alike"
            assert np.allclose(predictions.probabilities, expected.probabilities)
    assert len(classifier([path, path])) == 2
    for wrong in ([path, "missing.png"], [], [expected.images]):
        with pytest.raises(UserError):
            classifier(wrong)


def test_images_that_are_prepared_already_are_taken_as_they_are(
    call: Call, stored_run: str, pictures: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(image).save(tmp_path / "digit.png")
    assert (load("latest").prepare_picture(tmp_path / "digit.png", as_is=True) == image).all()
    assert call(predict.main, "--as-is", str(tmp_path / "digit.png")).returncode == 0
    for other in (Image.new("L", (27, 28)), Image.new("RGB", (28, 28))):
        with pytest.raises(UserError):
            load("latest").prepare_picture(other, as_is=True)


def test_a_model_of_colors_takes_arrays_and_pictures() -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2)).eval()
    data = DataDescription(class_names=["cat", "dog"], side=8, channels=3)
    classifier = Classifier(lambda images: network(images.float()), data, ModelSource("", ""), {})
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float()).softmax(1).detach()
    predictions = classifier(images)
    assert np.allclose(predictions.probabilities, expected)
    assert predictions.names == [["cat", "dog"][label] for label in predictions.labels]
    pictures = classifier([Image.fromarray(image) for image in images])
    assert np.array_equal(pictures.images, images), "a picture of the model's size is taken as it is"


@pytest.mark.parametrize(
    ("overrides", "result"),
    [
        ([], " on digits: test/accuracy "),
        (["data.subset=64"], " on digits_64: test/accuracy "),
        (["objective=val/loss"], " on digits: test/loss 2."),
    ],
)
def test_a_model_says_how_good_it_is_and_on_which_data(
    overrides: list[str], result: str, call: Call, in_process: CommandLine, store: str, pictures: Path
) -> None:
    trained = in_process("data=digits", "~phases.train", *overrides)
    assert trained.returncode == 0, trained.stderr
    with warnings.catch_warnings(action="ignore"):
        classifier = load("latest")
    assert result in classifier.summary
    shown = call(predict.main, str(pictures / "a=one [ü] (1).png")).stdout
    assert f"Model: {classifier.summary}" in shown
    assert ("limited to 64" in " ".join(shown.replace("│", " ").split())) == ("data.subset=64" in overrides)


def test_an_evaluation_is_a_run_of_its_own(call: Call, stored_run: str, digits: Dataset, store: str) -> None:
    done = call(evaluate.main, stored_run[:8], "--data", "digits")
    assert done.returncode == 0, done.stderr
    client, test = MlflowClient(store), digits.splits["test"]
    (evaluation,) = client.search_runs(["1"], "tags.trained_by LIKE '%'")
    run = client.get_run(evaluation.info.run_id)
    labels = load(stored_run)(test.images[:, 0].numpy()).labels
    assert run.data.metrics["evaluate/accuracy"] == pytest.approx((labels == test.labels.numpy()).mean())
    assert {f"evaluate/class_{label}/accuracy" for label in range(10)} <= run.data.metrics.keys()
    assert all(name.startswith("evaluate/") for name in run.data.metrics)
    assert run.data.tags["trained_by"] == stored_run
    assert run.data.tags["mlflow.user"]
    assert run.info.run_name == "evaluate se_cnn on digits"
    assert [item.path for item in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/confusion_matrix.png"]
    assert run.inputs.dataset_inputs[0].dataset.digest == test.digest
    assert run.inputs.model_inputs[0].model_id in run.data.tags["model"]
    (model,) = client.search_logged_models(["1"])
    assert "evaluate/accuracy" in {metric.key for metric in model.metrics}
    assert load("latest").source.run_id == stored_run, "latest is a run with a model"
