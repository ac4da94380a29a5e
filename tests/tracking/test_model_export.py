import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Bomb

from mnist_exp.composing import compose_recipe
from mnist_exp.errors import ResumableError, UserError
from mnist_exp.learning.datasets import MNIST_SHAPE
from mnist_exp.serving.classifier import read_model
from mnist_exp.settings import build
from mnist_exp.storage.manifest import MANIFEST, write_manifest
from mnist_exp.tracking.model_export import GRAPH, WEIGHTS, save_model, verify_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    settings = compose_recipe().settings.model_copy(update={"shape": MNIST_SHAPE})
    model = build(settings.model, "model", **MNIST_SHAPE).eval()
    save_model(folder, model, torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8).numpy(), settings)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def load_model(folder: Path) -> torch.nn.Module:
    return read_model(str(folder))[0]


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / MANIFEST).read_text())["config"]
    return config


def renew_manifest(folder: Path) -> None:
    """Write the checksums of the folder's present files, as a forger can."""
    write_manifest(folder, config_of(folder))


def test_an_exported_model_predicts_the_same_and_knows_its_configuration(original: Path) -> None:
    import mlflow.pytorch

    model = build(verify_model(original)["model"], "model", **MNIST_SHAPE).eval()
    model.load_state_dict(torch.load(original / WEIGHTS, weights_only=True))
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    assert load_model(original)(images).equal(model(images))
    torch.testing.assert_close(mlflow.pytorch.load_model(str(original))(images), model(images))
    assert [path.name for path in original.parent.iterdir() if "partial" in path.name] == []


def test_models_of_one_architecture_share_a_graph_but_not_their_weights(original: Path, tmp_path: Path) -> None:
    import mlflow.pytorch

    settings = compose_recipe().settings.model_copy(update={"shape": MNIST_SHAPE})
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    models = [build(settings.model, "model", **MNIST_SHAPE).eval() for _ in range(2)]
    for number, model in enumerate(models):
        model.blocks[0].norm.running_mean.add_(number)  # a buffer that training moves
        save_model(tmp_path / str(number), model, images[:2].numpy(), settings)
    for number, model in enumerate(models):
        assert load_model(tmp_path / str(number))(images).equal(model(images))
        torch.testing.assert_close(mlflow.pytorch.load_model(str(tmp_path / str(number)))(images), model(images))


def test_a_failed_export_keeps_the_previous_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_disk(tmp_path: Path, *_: object) -> None:
        tmp_path.mkdir()
        (tmp_path / "half").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr("mnist_exp.tracking.model_export._write_graph", fill_disk)
    with pytest.raises(ResumableError):
        save_model(folder, torch.nn.Identity(), None, compose_recipe().settings)
    verify_model(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_predicting_needs_the_model_and_the_shape_only(folder: Path) -> None:
    """A model of an older or a newer version has other keys."""
    config = config_of(folder)
    write_manifest(folder, {"model": config["model"], "shape": config["shape"], "newer": "${x}", "seed": "another type"})
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    assert load_model(folder)(images).shape == (7, 10)


def edit_manifest(folder: Path, **changes: object) -> None:
    (folder / MANIFEST).write_text(json.dumps(json.loads((folder / MANIFEST).read_text()) | changes))


def edit_model(folder: Path, **changes: object) -> None:
    config = config_of(folder)
    write_manifest(folder, config | {"model": config["model"] | changes})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "foreign": lambda folder: (folder / MANIFEST).unlink(),
    "not JSON": lambda folder: (folder / MANIFEST).write_text("["),
    "another JSON": lambda folder: (folder / MANIFEST).write_text("[]"),
    "older": lambda folder: edit_manifest(folder, format_version=1),
    "truncated": lambda folder: (folder / GRAPH).write_bytes(b"PK"),
    "missing": lambda folder: (folder / WEIGHTS).unlink(),
    "added": lambda folder: (folder / "code.py").touch(),
    "climbing": lambda folder: edit_manifest(folder, sha256={"../../etc/passwd": "0"}),
    "no model": lambda folder: write_manifest(folder, {"shape": MNIST_SHAPE}),
    "no shape": lambda folder: write_manifest(folder, {"model": config_of(folder)["model"]}),
    "another network": lambda folder: edit_model(folder, channels=[9, 16, 20]),
    "80 GB of memory": lambda folder: edit_model(folder, hidden_features=10**8),
    "a foreign target": lambda folder: write_manifest(folder, config_of(folder) | {"model": {"_target_": "os.abort"}}),
    "a nested target": lambda folder: edit_model(folder, hue=[{"_target_": "os.abort"}]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_model_is_refused(kind: str, folder: Path) -> None:
    DAMAGE[kind](folder)
    with pytest.raises(UserError):
        load_model(folder)


# Attacks: what a folder holds, with checksums that fit, never runs.

BOMB = "import os; os.system('touch exploded')\n"


def describe(folder: Path, **flavor: object) -> None:
    """Change the description of the pytorch flavor."""
    described = yaml.safe_load((folder / "MLmodel").read_text())
    described["flavors"]["pytorch"] |= flavor
    (folder / "MLmodel").write_text(yaml.safe_dump(described))


def with_code(folder: Path) -> None:
    (folder / "code").mkdir()
    (folder / "code" / "sympy.py").write_text(BOMB)
    describe(folder, code="code")


def with_flavor(folder: Path) -> None:
    (folder / "MLmodel").write_text((folder / "MLmodel").read_text().replace("flavors:", "flavors:\n  x: {y: 1}"))


def with_expression(folder: Path) -> None:
    edit_archive(folder, "models/model.json", lambda text: text.replace(b'"expr_str": "', b'"expr_str": "' + EXPRESSION, 1))


def with_pickle(folder: Path) -> None:
    edit_archive(folder, "model.pt", lambda _: pickle.dumps(Bomb()))


def with_link(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/etc/hostname")


EXPRESSION = b"__import__('os').system('touch exploded') + "


def edit_archive(folder: Path, ending: str, change: Callable[[bytes], bytes]) -> None:
    with zipfile.ZipFile(folder / GRAPH) as whole:
        records = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(folder / GRAPH, "w") as forged:
        for name, content in records.items():
            forged.writestr(name, change(content) if name.endswith(ending) else content)


ATTACKS: dict[str, Callable[[Path], object]] = {
    "code": with_code,
    "code outside": lambda folder: describe(folder, code=".."),
    "a loader": lambda folder: describe(folder, loader_module="os"),
    "another flavor": with_flavor,
    "a tag": lambda folder: (folder / "MLmodel").write_text("!!python/object/apply:os.system [touch exploded]"),
    "weights": lambda folder: torch.save(Bomb(), folder / WEIGHTS),
    "a link": with_link,
    "expressions in the graph": with_expression,
    "a pickle in the graph": with_pickle,
}
UNREAD = {"expressions in the graph", "a pickle in the graph"}


@pytest.mark.parametrize("kind", ATTACKS)
def test_a_forged_model_runs_nothing(kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    ATTACKS[kind](folder)
    renew_manifest(folder)
    with nullcontext() if kind in UNREAD else pytest.raises(UserError):
        load_model(folder)
    assert sys.path == before
    assert not (tmp_path / "exploded").exists()


def test_an_attack_would_succeed_with_mlflow_s_own_loader(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the graph is for those who trust the folder only: with this failing, the other attacks may prove nothing."""
    import mlflow.pytorch

    monkeypatch.chdir(tmp_path)
    with_expression(folder)
    mlflow.pytorch.load_model(str(folder))
    assert (tmp_path / "exploded").exists()
