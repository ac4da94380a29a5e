import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from test_checkpoint import Bomb

from mnist_exp import ROOT, exported
from mnist_exp.config import build, resolve
from mnist_exp.errors import UserError
from mnist_exp.exported import SEAL
from mnist_exp.tracking import export, load_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = resolve(compose("config"))
    model = build(config["model"], "model").eval()
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    exported.save(folder, config, partial(export, model, images.numpy(), architecture="original"))
    torch.save(model.state_dict(), folder.with_name("weights.pt"))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    exported.save(tmp_path / "model", exported.verify(original), partial(copied, original))
    return tmp_path / "model"


def copied(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(SEAL))


def test_an_exported_model_predicts_the_same_and_knows_its_configuration(original: Path) -> None:
    model = build(exported.verify(original)["model"], "model").eval()
    model.load_state_dict(torch.load(original.with_name("weights.pt"), weights_only=True))
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(load_model(str(original))(images), model(images))
    assert [path.name for path in original.parent.iterdir() if "partial" in path.name] == []


def test_models_of_one_architecture_share_a_graph_but_not_their_weights(original: Path, tmp_path: Path) -> None:
    node = exported.verify(original)["model"]
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    models = [build(node, "model").eval() for _ in range(3)]
    for number, model in enumerate(models):
        model.blocks[0].norm.running_mean.add_(number)  # a buffer that training moves
        exported.save(tmp_path / str(number), {}, partial(export, model, images[:2].numpy(), architecture="shared"))
    for number, model in enumerate(models):
        torch.testing.assert_close(load_model(str(tmp_path / str(number)))(images), model(images))


def test_a_failed_export_leaves_the_one_before(folder: Path) -> None:
    def full(aside: Path) -> None:
        aside.mkdir()
        (aside / "half").touch()
        raise OSError("No space left on device")

    with pytest.raises(UserError, match=r"output_dir: .* cannot be written: No space left"):
        exported.save(folder, {}, full)
    exported.verify(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def edit_seal(folder: Path, **changes: object) -> None:
    (folder / SEAL).write_text(json.dumps(json.loads((folder / SEAL).read_text()) | changes))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "foreign": (lambda folder: (folder / SEAL).unlink(), "is not a model exported by this program"),
    "not JSON": (lambda folder: (folder / SEAL).write_text("["), "is damaged"),
    "another JSON": (lambda folder: (folder / SEAL).write_text("[]"), "is damaged"),
    "older": (lambda folder: edit_seal(folder, format_version=0), "has format version 0: this program reads 1"),
    "truncated": (lambda folder: (folder / "data/model.pt2").write_bytes(b"PK"), "'data/model.pt2' was changed"),
    "missing": (lambda folder: (folder / "data/model.pt2").unlink(), "'data/model.pt2' is missing"),
    "added": (lambda folder: (folder / "code.py").touch(), "'code.py' was added"),
    "climbing": (lambda folder: edit_seal(folder, sha256={"../../etc/passwd": "0"}), "passwd' is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_wrong_with_an_exported_model_is_said(kind: str, folder: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_model(str(folder))


def test_a_forged_model_with_a_pickle_inside_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    archive = folder / "data" / "model.pt2"
    with zipfile.ZipFile(archive) as whole:
        records = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(archive, "w") as forged:
        for name, content in records.items():
            forged.writestr(name, pickle.dumps(Bomb()) if "sample_inputs" in name or name.endswith(".pt") else content)
    exported.save(folder, {}, partial(copied, folder.rename(tmp_path / "moved")))
    with pytest.raises(UserError, match="Deserializing model using pickle is disallowed"):
        load_model(str(folder))
    assert not (tmp_path / "exploded").exists()
