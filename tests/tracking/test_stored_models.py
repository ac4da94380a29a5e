"""A model on the disk: MLflow reads what we write, damage is found, and nothing that others forge runs code."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pytest
import torch
import yaml
from conftest import MNIST, MNIST_SHAPE, Bomb, Compose
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mnist_exp.composing import compose_recipe
from mnist_exp.errors import UserError
from mnist_exp.nodes import build
from mnist_exp.paths import CONF
from mnist_exp.settings import Settings
from mnist_exp.tracking import mlflow_models, models
from mnist_exp.tracking.mlflow_store import MLflowStore

METRICS = {"test/loss": 0.05, "test/accuracy": 0.9862}


def save_model(folder: Path, network: torch.nn.Module, settings: Settings) -> None:
    """Write a model as MLflow's tracker does."""
    models.save_model(folder, network, settings, METRICS)
    mlflow_models.write_mlmodel(folder, settings)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    settings = compose_recipe().settings.model_copy(update={"data_description": MNIST})
    network = build(settings.model, "model", **MNIST_SHAPE)
    network.blocks[0].norm.running_mean.add_(1)  # a buffer that training moves
    save_model(folder, network, settings)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def images_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 1, 28, 28), np.uint8)


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_mlflow_s_loader_gives_the_logits_of_the_network(original: Path, count: int) -> None:
    network, data, metrics = models.read_model(original)
    assert data == MNIST
    assert list(metrics.items()) == list(METRICS.items()), "that of the objective stays first"
    assert network.blocks[0].norm.running_mean.eq(1).all()
    images = images_of(count)
    logits = mlflow.pyfunc.load_model(str(original)).predict(images)
    assert (logits.shape, logits.dtype) == ((count, 10), np.float32)
    with torch.no_grad():
        np.testing.assert_array_equal(logits, network(torch.from_numpy(images)).numpy())


@pytest.mark.parametrize("option", sorted(path.stem for path in CONF.glob("model/*.yaml")))
def test_mlflow_s_loader_reads_every_architecture(option: str, composed: Compose, tmp_path: Path) -> None:
    settings = composed(f"model={option}").model_copy(update={"data_description": MNIST})
    network = build(settings.model, "model", **MNIST_SHAPE).eval()
    save_model(tmp_path / "model", network, settings)
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    for count in (1, 7):
        with torch.no_grad():
            expected = network(torch.from_numpy(images_of(count))).numpy()
        np.testing.assert_array_equal(loaded.predict(images_of(count)), expected)


WRONG = {
    "without channels": images_of(7)[:, 0],
    "another side": images_of(7)[..., :27],
    "two channels": images_of(7).repeat(2, axis=1),
    "fractions": images_of(7) / 255,
    "int64": images_of(7).astype(np.int64),
    "text": np.full((7, 1, 28, 28), "a"),
}


@pytest.mark.parametrize("images", WRONG.values(), ids=WRONG.keys())
def test_mlflow_s_loader_refuses_another_shape_or_type(original: Path, images: np.ndarray) -> None:
    with pytest.raises(MlflowException):
        mlflow.pyfunc.load_model(str(original)).predict(images)


def test_a_full_disk_is_reported(composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_disk(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:815] unexpected pos")

    monkeypatch.setattr(torch, "save", fill_disk)
    settings = composed().model_copy(update={"data_description": MNIST})
    with pytest.raises(UserError):
        models.save_model(tmp_path / "model", torch.nn.Identity(), settings, {})


def test_a_changed_bit_changes_no_answer(folder: Path) -> None:
    """It is refused, or lies where no value is."""
    weights = folder / models.WEIGHTS
    content, expected = weights.read_bytes(), models.read_model(folder)[0].state_dict()
    refused = 0
    for place in np.random.default_rng(0).integers(0, len(content), 60):
        weights.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        try:
            found = models.read_model(folder)[0].state_dict()
        except UserError:
            refused += 1
        else:
            assert all(found[name].equal(value) for name, value in expected.items())
    assert refused > 30


def edit_settings(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    settings = json.loads((folder / models.SETTINGS).read_text())
    edit(settings)
    (folder / models.SETTINGS).write_text(json.dumps(settings))


def edit_model(folder: Path, **changes: object) -> None:
    edit_settings(folder, lambda settings: settings["model"].update(changes))


def test_predicting_needs_the_model_and_the_data_only(folder: Path) -> None:
    """A model of an older or a newer version has other keys."""
    settings = json.loads((folder / models.SETTINGS).read_text())
    kept = {key: settings[key] for key in ("format", "model", "data_description")}
    (folder / models.SETTINGS).write_text(json.dumps(kept | {"newer": "${x}", "seed": "another type"}))
    assert models.read_model(folder)[1:] == (MNIST, {})


def compress(folder: Path) -> None:
    with zipfile.ZipFile(folder / models.WEIGHTS) as original:
        entries = {entry.filename: original.read(entry) for entry in original.infolist()}
    with zipfile.ZipFile(folder / models.WEIGHTS, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name, content in entries.items():
            compressed.writestr(name, content)


def link_to(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/etc/hostname")


REFUSED: dict[str, Callable[[Path], object]] = {
    "no settings": lambda folder: (folder / models.SETTINGS).unlink(),
    "no weights": lambda folder: (folder / models.WEIGHTS).unlink(),
    "truncated weights": lambda folder: (folder / models.WEIGHTS).write_bytes((folder / models.WEIGHTS).read_bytes()[:-100]),
    "compressed weights": compress,
    "no JSON": lambda folder: (folder / models.SETTINGS).write_text("["),
    "other JSON": lambda folder: (folder / models.SETTINGS).write_text("[]"),
    "nested JSON": lambda folder: (folder / models.SETTINGS).write_text("[" * 10**6),
    "no model": lambda folder: edit_settings(folder, lambda settings: settings.pop("model")),
    "no data": lambda folder: edit_settings(folder, lambda settings: settings.update(data_description=None)),
    "another network": lambda folder: edit_model(folder, channels=[9, 16, 20]),
    "a network of 80 GB": lambda folder: edit_model(folder, hidden_features=10**9),
    "a pickle": lambda folder: torch.save({"": Bomb(), "filler": torch.zeros(10**5)}, folder / models.WEIGHTS),
    "a foreign target": lambda folder: edit_model(folder, _target_="os.system", command="touch exploded"),
    "a target in an argument": lambda folder: edit_model(folder, dropout={"_target_": "os.system", "command": "touch exploded"}),
    "metrics that are no numbers": lambda folder: edit_settings(folder, lambda settings: settings.update(metrics={"x": [""]})),
    "a resolver": lambda folder: edit_model(folder, dropout="${oc.create:{_target_:os.system}}"),
    "linked weights": lambda folder: link_to(folder, models.WEIGHTS),
    "linked settings": lambda folder: link_to(folder, models.SETTINGS),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_damaged_or_forged_model_is_refused_and_runs_nothing(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    REFUSED[kind](folder)
    with pytest.raises(UserError):
        models.read_model(folder)
    assert not (tmp_path / "exploded").exists()


def edit_flavors(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    described = yaml.safe_load((folder / mlflow_models.MLMODEL).read_text())
    edit(described["flavors"])
    (folder / mlflow_models.MLMODEL).write_text(yaml.safe_dump(described))


def edit_flavor(folder: Path, **changes: str) -> None:
    edit_flavors(folder, lambda flavors: flavors["python_function"].update(changes))


# With these, MLflow's own loader, which trusts a folder, would run code of others.
UNPROMOTED: dict[str, Callable[[Path], object]] = {
    "code in the folder": lambda folder: (folder / "code.py").touch(),
    "code in a subfolder": lambda folder: ((folder / "code").mkdir(), (folder / "code" / "mnist_exp.py").touch()),
    "code elsewhere": lambda folder: edit_flavor(folder, code="../code"),
    "an environment": lambda folder: edit_flavor(folder, env="conda.yaml"),
    "a loader": lambda folder: edit_flavor(folder, loader_module="antigravity"),
    "another flavor": lambda folder: edit_flavors(folder, lambda flavors: flavors.update(pytorch={"model_data": "data"})),
    "a tag": lambda folder: (folder / mlflow_models.MLMODEL).write_text("!!python/object/apply:os.system [touch exploded]"),
    "no MLmodel": lambda folder: (folder / mlflow_models.MLMODEL).unlink(),
    "no weights": lambda folder: (folder / models.WEIGHTS).unlink(),
}


@pytest.mark.parametrize("kind", UNPROMOTED)
def test_only_a_model_as_we_write_it_can_be_promoted(
    kind: str, stored_run: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    opened = MLflowStore(store, "mnist_exp")
    record = opened.get_run(stored_run)
    (model,) = MlflowClient(store).search_logged_models(["1"])
    folder = Path(model.artifact_location.removeprefix("file://"))
    mlflow.pyfunc.load_model(f"models:/{model.model_id}")  # leaves a file of MLflow's own there
    assert opened.register(record, "as-written", "champion", "For a test.", {}) == "1"
    UNPROMOTED[kind](folder)
    with pytest.raises(UserError):
        opened.register(record, "changed", "champion", "For a test.", {})
    assert [found.name for found in MlflowClient(store).search_registered_models()] == ["as-written"]
    assert not (tmp_path / "exploded").exists()


def test_weights_in_a_file(tmp_path: Path) -> None:
    """Of any type and layout; but a small file does not fill the memory, and no other content is taken."""
    file = tmp_path / "weights.pt"
    written = {"a": torch.randn(2, 3).bfloat16().t(), "count": torch.tensor(3), "b": torch.nn.Parameter(torch.ones(2))}
    torch.save(written, file)
    found = models.read_weights(file)
    assert all(found[name].equal(value) for name, value in written.items())
    assert models.digest_of(found) == models.digest_of(models.read_weights(file))
    for content in ([1], {"a": 1}, {"a": torch.zeros(1).expand(10**7, 1000)}, {"a": torch.zeros(2).to_sparse()}):
        torch.save(content, file)
        with pytest.raises(UserError):
            models.read_weights(file)
