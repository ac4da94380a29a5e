"""A trained model by every name, for every kind of image; and the commands predict, evaluate and runs promote."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Call, CommandLine
from mlflow import MlflowClient
from PIL import Image, ImageDraw

from mnist_exp import evaluate, predict
from mnist_exp.errors import UserError
from mnist_exp.serving import load


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
    return folder


def test_one_bad_file_costs_no_other(call: Call, stored_run: str, pictures: Path, tmp_path: Path) -> None:
    tables = [tmp_path / "out.csv", tmp_path / "out.json"]
    for table in tables:
        done = call(
            predict.main, "--model", stored_run[:8], str(pictures), "--out", str(table), "--sheet", str(tmp_path / "sheet.png")
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
    rows = list(csv.DictReader(tables[0].open()))
    assert [Path(row["file"]).name for row in rows] == ["a=one [ü] (1).png", "blank.png", "broken.jpg"]
    assert rows[0].keys() == {"file", "label", "probability", "runner_up", "error"}
    assert rows[0]["label"].isdecimal()
    assert "no digit found" in rows[1]["error"]
    assert "Pillow can read" in rows[2]["error"]
    assert json.loads(tables[1].read_text())[0]["label"] == int(rows[0]["label"])
    assert Image.open(tmp_path / "sheet.png").size[0] > 200


def test_hundreds_of_files_are_classified_in_batches_and_in_order(call: Call, stored_run: str, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(260):
        picture = Image.new("L", (40, 40), 255)
        ImageDraw.Draw(picture).line([(20, 5), (20, 34)], fill=0, width=2 + number % 5)
        picture.save(folder / f"{number:03}.png")
    (folder / "100.png").write_bytes(b"")
    done = call(predict.main, str(folder), "--out", str(tmp_path / "out.csv"))
    assert done.returncode == 1
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [Path(row["file"]).name for row in rows] == [f"{number:03}.png" for number in range(260)]
    assert [number for number, row in enumerate(rows) if row["error"]] == [100]
    assert "049.png" in done.stdout
    assert "060.png" not in done.stdout, "the terminal shows the first ones"
    assert "259 predictions, 1 errors" in done.stdout


def test_outputs_that_cannot_be_written_are_refused_first(call: Call, stored_run: str, pictures: Path, tmp_path: Path) -> None:
    for option in ("--out=nowhere/x.csv", "--sheet=nowhere/x.png"):
        done = call(predict.main, str(pictures), option)
        assert done.returncode == 1
        assert "it cannot be written. Choose a file in a folder that exists." in done.stderr
        assert done.stdout == ""


def test_mistakes_get_one_message(call: Call, stored_run: str, pictures: Path, tmp_path: Path) -> None:
    picture = str(pictures / "a=one [ü] (1).png")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["--model", "nonsense", picture], "expected a folder, the id of a run, latest"),
        (["--model", "models:/nobody@champion", picture], "models:/nobody@champion is not in"),
        (["--model", "0" * 32, picture], "There is no run"),
        ([str(tmp_path / "empty")], "contains no pictures"),
        ([str(tmp_path / "missing.png")], "no such file"),
    ):
        done = call(predict.main, *arguments)
        assert done.returncode == 1
        assert message in done.stderr.replace("\n", " ")
        assert "Traceback" not in done.stderr


def test_a_decompression_bomb_is_refused(call: Call, stored_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (4000, 4000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    done = call(predict.main, str(tmp_path / "bomb.png"))
    assert done.returncode == 1
    assert "too large" in done.stderr


def test_images_of_every_kind_get_the_same_answer(stored_run: str, pictures: Path) -> None:
    classifier = load("latest")
    path = pictures / "a=one [ü] (1).png"
    with Image.open(path) as picture:
        forms = [
            path,
            str(path),
            picture.copy(),
            np.asarray(picture),
            np.asarray(picture) / 255,
            [path],
            np.asarray(picture)[None],
        ]
    expected = classifier(path)
    assert expected.probabilities.shape == (1, 10)
    assert expected.probabilities.sum() == pytest.approx(1, abs=1e-5)
    for form in forms:
        found = classifier(form)
        assert (found.images == expected.images).all(), "prepared alike"
        assert np.allclose(found.probabilities, expected.probabilities)
    assert len(classifier([path, path])) == 2
    assert (classifier(expected.images).labels == expected.labels).all()
    with pytest.raises(UserError, match=r"shape \(5,\)"):
        classifier(np.zeros(5))
    with pytest.raises(UserError, match=r"image 1 \(missing.png\): no such file"):
        classifier([path, "missing.png"])
    assert (classifier.prepare([path, path])[1] == expected.images[0]).all()


def test_an_evaluation_is_a_run_of_its_own(call: Call, in_process: CommandLine, store: str) -> None:
    done = in_process("data=digits", "~phases.train", "phases.finetune.epochs=1")
    assert done.returncode == 0, done.stderr
    (run,) = MlflowClient(store).search_runs(["1"])
    trained = run.info.run_id
    assert f"predict --model {trained[:8]} FILE" in done.stdout
    assert f"draw --model {trained[:8]}" in done.stdout
    done = call(evaluate.main, f"model={trained[:8]}", "data=digits")
    assert done.returncode == 0, done.stderr
    client = MlflowClient(store)
    (found,) = client.search_runs(["1"], "tags.trained_by LIKE '%'")
    run = client.get_run(found.info.run_id)
    before = client.get_run(trained).data.metrics
    assert run.data.metrics["evaluate/accuracy"] == before["test/accuracy"]
    assert {f"evaluate/class_{label}/accuracy" for label in range(10)} <= run.data.metrics.keys()
    assert all(name.startswith("evaluate/") for name in run.data.metrics)
    assert run.data.tags["trained_by"] == trained
    assert run.inputs.dataset_inputs[0].dataset.digest
    assert run.inputs.model_inputs[0].model_id in run.data.tags["model"]
    (model,) = client.search_logged_models(["1"])
    assert "evaluate/accuracy" in {metric.key for metric in model.metrics}
    assert load("latest").source.run_id == trained, "latest is a run with a model"
    done = call(evaluate.main, f"model={trained[:8]}", "data=digits", "lr=1")
    assert done.returncode == 1
    assert "lr is not a key of the configuration" in done.stderr
