import json
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MNIST, MNIST_SHAPE, CommandLine, Compose, finished
from omegaconf import OmegaConf

from mnist_exp.errors import MissingDataError, UserError
from mnist_exp.experiment.repeat import with_present_locations
from mnist_exp.learning.data import Dataset
from mnist_exp.learning.training import fit, prepare_phases
from mnist_exp.nodes import build
from mnist_exp.overrides import GROUPS
from mnist_exp.paths import CONF
from mnist_exp.settings import Recipe, Trial, read_recipe

# The files of all groups. A new one is tested without a change here.
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml") if path.parent not in (CONF, CONF / "local"))
LEARNS_FROM_RUNS = re.compile(r"^runs: \[\]|override /teacher: ensemble", re.MULTILINE)


def teachers(path: Path, run: str = "0" * 32) -> list[str]:
    """Return the override that names the runs that a file learns from, if it does."""
    return [f"teacher.runs=[{run}]"] if LEARNS_FROM_RUNS.search((CONF / path).read_text()) else []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_composes_and_trains(
    composed: Compose, path: Path, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, option = str(path.parent), path.stem
    override = f"{group}=[{option}]" if group in ("phase", "callbacks") else f"{group}={option}"
    run = finished(composed("data=digits"), digits, tmp_path) if teachers(path) else ""
    try:
        settings = composed(override, *teachers(path, run))
    except UserError as error:
        if group != "hydra/launcher":
            raise
        pytest.skip(str(error))  # its package is not installed
    Trial().try_out(settings.model_copy(update={"data_description": MNIST}))
    build(settings.tracking, "tracking")
    model = build(settings.model, "model", **MNIST_SHAPE)
    two_steps = replace(digits, splits={name: replace(split, epoch_size=64) for name, split in digits.splits.items()})
    phases = {name: build(node | {"epochs": 1, "batch_size": 32}, f"phases.{name}") for name, node in settings.phases.items()}
    prepared = prepare_phases(model, phases, two_steps, tmp_path)
    reports = list(fit(model, prepared, two_steps, seed=0, precision=torch.float32))
    assert reports[-1].metrics["train/loss"] < 10
    assert {report.phase for report in reports} == set(settings.phases)
    if group in ("data", "experiment"):
        monkeypatch.setattr(socket.socket, "connect", lambda *_: (_ for _ in ()).throw(OSError("no download in a test")))
        try:
            assert "train" in build(settings.data, "data", seed=0).splits
        except UserError as error:
            pytest.skip(str(error))  # the images are not here, or it needs the folder of one's own


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_option_that_a_preset_sweeps_over_exists(path: Path) -> None:
    for key, choices in (OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params") or {}).items():
        if key in GROUPS:
            assert [option for option in str(choices).split(",") if not (CONF / key / f"{option}.yaml").exists()] == []


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_never_falls_back_and_opens_with_its_command(composed: Compose, path: Path) -> None:
    assert composed(f"experiment={path.stem}", *teachers(path)).data.get("fallback") is None
    header = path.read_text().split("\ndefaults:")[0]
    assert "python -m mnist_exp.run" in header
    assert f"experiment={path.stem}" in header
    assert ("teacher.runs=" in header) == bool(teachers(path))


def test_the_scaled_learning_rate_grows_with_the_batch_size(composed: Compose) -> None:
    for batch_size, lr in ((64, 0.05), (512, 0.4), (2048, 1.6)):
        settings = composed("experiment=batch_size_scaled", f"batch_size={batch_size}")
        assert settings.phases["train"]["optimizer"]["lr"] == pytest.approx(lr)


# Each is refused with an error that names its key: the one that is set, unless another is given.
WRONG: dict[str, str] = dict.fromkeys(
    [
        "seed=-1", "seed=true", "batch_size=0", "batch_size=12.5", "batch_size=true", "precision=fp8", "device=tpu",
        "model.parameter_limit=0", "model.parameter_limit=19000", "save_every=0",
        "objective=test/accuracy", "objective=val/hue", "resume=123456", "resume=xyz", "sweep.dry_run=3",
        "tracking.uri=5", "~data", "+sede=1", "+sweep.hue=1",
        "data.finetune_fraction=2", "data.finetune_fraction=nan", "data.subset=0", "data.validation_size=-1", "data.root=''",
        "data.fallback=cifar", "+data.hue=1",
        "model.channels=[8,16]", "model.channels=[8,16,20,24]", "model.kernel_sizes=[3,2,3]", "model.mean_pool=3",
        "model.hidden_features=0", "model.dropout=1", "model.dropout=inf", "model.se.reduction=0", "model.se.reduction=99",
        "+model.hue=1", "+model.se.hue=1",
        "optimizer.lr=high", "optimizer.lr=nan", "optimizer.lr=0 optimizer=muon", "optimizer.momentum=1 optimizer=muon",
        "optimizer.adamw_betas=[0.9] optimizer=muon", "+optimizer.hue=1", "+phases.finetune.optimizer.hue=1",
        "scheduler.pct_start=1", "scheduler.div_factor=0", "scheduler.min_factor=2 scheduler=cosine",
        "scheduler.gamma=0 scheduler=step", "+scheduler.hue=1",
        "augmentation.degrees=-5", "augmentation.degrees=181", "augmentation.scale=[1]", "augmentation.scale=[1.2,1]",
        "augmentation.translate=1", "+augmentation.hue=1", "teacher.runs=[] teacher=ensemble", "+teacher.hue=1",
        "phases.train.epochs=0", "loss.label_smoothing=1 loss=focal", "loss.gamma=-1 loss=focal",
        "phases.train.max_grad_norm=0", "phases.train.split=3",
        "+phases.train.hue=1", "+tracking.hue=1", "phases.train.optimizer=null", "+phase@phases.seed=finetune",
    ],
    "",
) | {
    "augmentation.scale=[0,1]": "augmentation.scale.0",
    "model.depths=[1,0,1]": "model.depths.1",
    "scheduler.milestones=[2] scheduler=step": "scheduler.milestones.0",
    "optimizer.momentum=0": "optimizer",  # which needs one: torch's own rule
    "optimizer.lr=-0.1": "optimizer",
    "phases.finetune.optimizer.lr=-1": "phases.finetune.optimizer",
    "+phases.more.epochs=1": "phases.more",
    "+callbacks.x=1": "phases.train.callbacks",
}  # fmt: skip


@pytest.mark.parametrize("overrides", WRONG)
def test_a_wrong_value_is_named_with_its_key(composed: Compose, overrides: str) -> None:
    with pytest.raises(UserError) as error:
        Trial().try_out(composed(*overrides.split()).model_copy(update={"data_description": MNIST}))
    typed, _, value = overrides.split()[0].lstrip("+~").rpartition("=")
    assert error.value.key == (WRONG[overrides] or typed.rpartition("@")[2] or value)
    if typed.endswith("optimizer.lr"):
        assert value in str(error.value)


def test_images_that_this_machine_lacks_are_an_error_of_the_run_only(composed: Compose) -> None:
    """The head of a cluster may lack them: what can be checked without them is."""
    settings = composed("data.root=/nowhere")
    Trial().try_out(settings, read_data=True)
    with pytest.raises(MissingDataError) as error:
        build(settings.data, "data", seed=0)
    assert error.value.key == "data.root"


def test_the_parameter_limit_does_not_change_the_digest(composed: Compose) -> None:
    settings = composed()
    assert settings.digest() == composed("model.parameter_limit=null").digest()
    with_shape = settings.model_copy(update={"data_description": MNIST})
    assert settings.digest() == with_shape.digest() != composed("seed=1").digest()


# Options of one's own: a file is enough.

LION = "_target_: pytorch_optimizer.Lion\nlr: 1.0e-3\n"


def test_an_optimizer_of_another_package_needs_one_file(in_process: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "options" / "optimizer").mkdir(parents=True)
    (tmp_path / "options" / "optimizer" / "lion.yaml").write_text(LION)
    folder = ("--config-dir", str(tmp_path / "options"))
    short = ("data=digits", "tracking=none", "~phases.train", "optimizer@phases.finetune.optimizer=lion")
    trained = in_process(*folder, *short)
    assert trained.returncode == 0, trained.stderr
    (finished_file,) = (tmp_path / "outputs").glob("*/finished")
    finished_file.unlink()
    refused = in_process("resume=latest", "tracking=none")
    assert refused.returncode == 1
    assert "phases.finetune.optimizer._target_=pytorch_optimizer.Lion" in refused.stderr
    assert "--config-dir" in refused.stderr
    resumed = in_process(*folder, "resume=latest", "tracking=none")
    assert resumed.returncode == 0, resumed.stderr


def test_a_model_of_another_kind_has_arguments_of_its_own(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only CNN asks for three channels."""
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n\n\ndef two_stages(channels: list[int], classes: int, side: int, in_channels: int) -> nn.Module:\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, channels[0], 3), nn.Conv2d(*channels, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = composed().model_copy(update={"data_description": MNIST})
    node = {"_target_": "my_models.two_stages", "channels": [8, 16]}
    Trial().try_out(settings.model_copy(update={"model": node}))
    for key, value in (("channels", ["many"]), ("hue", 1)):
        with pytest.raises(UserError) as error:
            Trial().try_out(settings.model_copy(update={"model": node | {key: value}}))
        assert error.value.key.startswith(f"model.{key}")


# Recipes of earlier versions


def test_a_stored_recipe_that_lacks_a_newer_key_gets_its_default_and_says_so(
    composed: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = composed("data=digits")
    content = json.loads(Recipe(settings).as_json())
    del content["config"]["save_every"], content["config"]["data"]["subset"]
    recipe = with_present_locations(read_recipe(json.dumps(content), "recipe.json"), settings)
    said = capsys.readouterr().err
    assert "save_every" in said
    assert "data.subset" in said
    assert recipe.settings.save_every is None
    assert "train" in build(recipe.settings.data, "data", seed=0).splits
