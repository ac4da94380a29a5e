import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Bomb
from hydra import compose, initialize_config_dir
from mnist_exp.config import build, resolve
from mnist_exp.serving.loading import load_model

from mnist_exp.errors import UserError
from mnist_exp.learning.datasets import MNIST_SHAPE
from mnist_exp.paths import CONF
from mnist_exp.storage.manifest import MANIFEST, write_manifest
from mnist_exp.tracking.model_export import GRAPH, WEIGHTS, save_model, verify_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve(compose("config")) | {"shape": MNIST_SHAPE}
    model = build(config["model"], "model", **MNIST_SHAPE).eval()
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    save_model(folder, model, images.numpy(), config)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def renew_manifest(folder: Path) -> None:
    """Write the checksums of the folder's present files, as a forger can."""
    write_manifest(folder, json.loads((folder / MANIFEST).read_text())["config"])


def test_an_exported_model_predicts_the_same_and_knows_its_configuration(original: Path) -> None:
    import mlflow.pytorch

    model = build(verify_model(original)["model"], "model", **MNIST_SHAPE).eval()
    model.load_state_dict(torch.load(original / WEIGHTS, weights_only=True))
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    assert load_model(str(original))(images).equal(model(images))
    torch.testing.assert_close(mlflow.pytorch.load_model(str(original))(images), model(images))
    assert [path.name for path in original.parent.iterdir() if "partial" in path.name] == []


def test_models_of_one_architecture_share_a_graph_but_not_their_weights(original: Path, tmp_path: Path) -> None:
    import mlflow.pytorch

    config = verify_model(original)
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    models = [build(config["model"], "model", **MNIST_SHAPE).eval() for _ in range(3)]
    for number, model in enumerate(models):
        model.blocks[0].norm.running_mean.add_(number)  # a buffer that training moves
        save_model(tmp_path / str(number), model, images[:2].numpy(), config)
    for number, model in enumerate(models):
        assert load_model(str(tmp_path / str(number)))(images).equal(model(images))
        torch.testing.assert_close(mlflow.pytorch.load_model(str(tmp_path / str(number)))(images), model(images))


def test_a_failed_export_keeps_the_previous_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_disk(tmp_path: Path, *_: object) -> None:
        tmp_path.mkdir()
        (tmp_path / "half").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr("mnist_exp.tracking.model_export._write_graph", fill_disk)
    with pytest.raises(UserError, match=r"output_dir: .* cannot be written: No space left"):
        save_model(folder, torch.nn.Identity(), None, {"model": {}, "shape": {}})
    verify_model(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def edit_manifest(folder: Path, **changes: object) -> None:
    (folder / MANIFEST).write_text(json.dumps(json.loads((folder / MANIFEST).read_text()) | changes))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "foreign": (lambda folder: (folder / MANIFEST).unlink(), "is not a model exported by this program"),
    "not JSON": (lambda folder: (folder / MANIFEST).write_text("["), "is damaged"),
    "another JSON": (lambda folder: (folder / MANIFEST).write_text("[]"), "is damaged"),
    "older": (lambda folder: edit_manifest(folder, format_version=1), "has format version 1, expected 2"),
    "truncated": (lambda folder: (folder / GRAPH).write_bytes(b"PK"), "'data/model.pt2' was changed"),
    "missing": (lambda folder: (folder / WEIGHTS).unlink(), "'weights.pt' is missing"),
    "added": (lambda folder: (folder / "code.py").touch(), "'code.py' does not belong to one"),
    "climbing": (lambda folder: edit_manifest(folder, sha256={"../../etc/passwd": "0"}), "passwd' is missing"),
    "no model": (lambda folder: edit_manifest(folder, config={}), "is missing: set it"),
    "another network": (lambda folder: edit_manifest(folder, config=wider(folder)), "does not contain the weights of this model"),
    "larger than its weights": (lambda folder: edit_manifest(folder, config=gigantic(folder)), "does not contain the weights"),
    "above its limit": (
        lambda folder: edit_manifest(folder, config=limited(folder)),
        "19,674 parameters: at most 100 are allowed",
    ),
    "without a shape": (lambda folder: edit_manifest(folder, config=shapeless(folder)), "does not contain the shape of the data"),
}


def gigantic(folder: Path) -> dict[str, object]:
    """A forged model of 80 GB, which a forged limit allows."""
    config = json.loads((folder / MANIFEST).read_text())["config"]
    config["model"]["hidden_features"] = 10**8
    return config | {"parameter_limit": None}


def limited(folder: Path) -> dict[str, object]:
    return json.loads((folder / MANIFEST).read_text())["config"] | {"parameter_limit": 100}


def shapeless(folder: Path) -> dict[str, object]:
    config = json.loads((folder / MANIFEST).read_text())["config"]
    del config["shape"]
    return config


def wider(folder: Path) -> dict[str, object]:
    config = json.loads((folder / MANIFEST).read_text())["config"]
    config["model"]["channels"] = [9, 16, 20]
    return config


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_wrong_with_an_exported_model_is_said(kind: str, folder: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_model(str(folder))


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


ATTACKS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "code": (with_code, "'code' does not belong to one"),
    "code outside": (lambda folder: describe(folder, code=".."), r"has the foreign key flavors\.pytorch\.code"),
    "a loader": (lambda folder: describe(folder, loader_module="os"), r"has the foreign key flavors\.pytorch\.loader_module"),
    "another flavor": (with_flavor, r"has the foreign key flavors\.x\.y"),
    "a tag": (lambda folder: (folder / "MLmodel").write_text("!!python/object/apply:os.system [touch exploded]"), "is damaged"),
    "weights": (lambda folder: torch.save(Bomb(), folder / WEIGHTS), "does not contain the weights of this model"),
    "a link": (with_link, "does not belong to one"),
    "expressions in the graph": (with_expression, None),  # which is not read
    "a pickle in the graph": (with_pickle, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", ATTACKS)
def test_a_forged_model_runs_nothing(kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    attack, message = ATTACKS[kind]
    attack(folder)
    renew_manifest(folder)
    if message is None:
        load_model(str(folder))
    else:
        with pytest.raises(UserError, match=message):
            load_model(str(folder))
    assert sys.path == before
    assert not (tmp_path / "exploded").exists()


def test_an_attack_would_succeed_with_mlflow_s_own_loader(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the graph is for those who trust the folder only: with this failing, the other attacks may prove nothing."""
    import mlflow.pytorch

    monkeypatch.chdir(tmp_path)
    with_expression(folder)
    mlflow.pytorch.load_model(str(folder))
    assert (tmp_path / "exploded").exists()
