from pathlib import Path

import pytest
import torch
from conftest import finished

from mnist_exp.errors import UserError
from mnist_exp.learning import models
from mnist_exp.learning.data import Dataset
from mnist_exp.learning.datasets import MNIST_SHAPE
from mnist_exp.learning.models import count_parameters
from mnist_exp.learning.training import fit, prepare_phases
from mnist_exp.paths import CONF
from mnist_exp.settings import bind, build, check, digest

CLUSTERS = {"ray_cluster": "hydra_plugins.hydra_ray_launcher", "slurm": "hydra_plugins.hydra_submitit_launcher"}
TAUGHT = {"ensemble", "record", "under_10k"}  # files that need finished runs to learn from
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml") if path.parent not in (CONF, CONF / "local"))


def teachers(option: str, run: str = "0" * 32) -> list[str]:
    """Return the override that names what a file learns from, if it does."""
    return [f"teacher.runs=[{run}]"] if option in TAUGHT else []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_composes_and_runs(
    composed, path: Path, short_digits: Dataset, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    group, option = str(path.parent), path.stem
    if option in CLUSTERS:
        pytest.importorskip(CLUSTERS[option])
    override = f"+phase@phases.more={option}" if group == "phase" else f"{group}={option}"
    run = finished(composed("data=digits"), short_digits, tmp_path) if option in TAUGHT else ""
    config = composed(override, *teachers(option, run))
    model = build(config.model, "model", **MNIST_SHAPE)
    bind(config | {"shape": MNIST_SHAPE})
    count_parameters(model, config.parameter_limit)
    if group in ("data", "experiment") and option != "fashion_mnist":  # tests/learning/test_datasets.py loads a small copy of it
        if option != "digits":
            request.getfixturevalue("mnist_root")
        assert "train" in build(config.data, "data", seed=0).splits
    build(config.tracking | ({"uri": f"sqlite:///{tmp_path}/mlflow.db"} if option == "mlflow" else {}), "tracking")
    phases = {name: build(node | {"epochs": 1}, name) for name, node in config.phases.items()}
    reports = list(
        fit(model, prepare_phases(model, phases, short_digits, tmp_path), short_digits, seed=0, precision=torch.float32)
    )
    assert reports[-1].metrics["train/loss"] < 10
    assert {report.phase for report in reports} == set(config.phases)


def test_every_option_of_a_group_learns_something_else(composed) -> None:
    for group in ("model", "optimizer", "scheduler", "augmentation", "teacher", "data", "tracking"):
        options = [path.stem for path in FILES if str(path.parent) == group]
        assert len({str(composed(f"{group}={option}", *teachers(option))[group]) for option in options}) == len(options) > 1


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_never_falls_back_and_opens_with_its_command(composed, path: Path) -> None:
    assert composed(f"experiment={path.stem}", *teachers(path.stem)).data.get("fallback") is None
    header = path.read_text().split("\ndefaults:")[0]
    assert "python -m mnist_exp.run" in header
    assert f"experiment={path.stem}" in header
    assert ("teacher.runs=" in header) == (path.stem in TAUGHT)


def test_the_scaled_learning_rate_grows_with_the_batch_size(composed) -> None:
    for batch_size, lr in ((64, 0.05), (512, 0.4), (2048, 1.6)):
        config = composed("experiment=batch_size_scaled", f"batch_size={batch_size}")
        assert config.phases["train"]["optimizer"]["lr"] == pytest.approx(lr)


WRONG = {
    "batch_size=0": "batch_size=0 is invalid: expected an integer >= 1",
    "batch_size=12.5": "batch_size=12.5 is invalid",
    "seed=-1": "seed=-1 is invalid",
    "seed=true": "seed=True is invalid",
    "optimizer.lr=-0.1": r"phases\.train\.optimizer\.lr=-0\.1 is invalid: expected a number > 0|^optimizer\.lr=-0\.1",
    "phases.finetune.optimizer.lr=-1": r"phases\.finetune\.optimizer\.lr=-1 is invalid",
    "optimizer.lr=high": "lr=high is invalid",
    "precision=fp8": "precision=fp8 is invalid: expected auto, fp32, bf16 or fp16",
    "device=tpu": "device=tpu is invalid",
    "phases.train.epochs=0": r"phases\.train\.epochs=0 is invalid: expected an integer >= 1\. Set it with phases\.train\.epochs=",
    "phases.train.label_smoothing=1": r"phases\.train\.label_smoothing=1 is invalid",
    "parameter_limit=0": r"parameter_limit=0 is invalid: expected an integer >= 1, or null",
    "parameter_limit=19000": r"The model has 19,674 parameters: at most 19,000 are allowed",
    "~parameter_limit": r"parameter_limit is missing",
    "data.subset=0": r"^data\.subset=0 is invalid: expected an integer >= 1, or null",
    "data.finetune_fraction=2": r"^data\.finetune_fraction=2 is invalid: expected a number between 0 and 1",
    "+data.hue=1": r"^data cannot be built: .*'hue'",
    "+model.hue=1": r"^model cannot be built: .*'hue'",
    "+optimizer.hue=1": r"^optimizer cannot be built: .*'hue'",
    "+phases.finetune.optimizer.hue=1": r"^phases\.finetune\.optimizer cannot be built: .*'hue'",
    "+augmentation.hue=1": r"^augmentation cannot be built: .*'hue'",
    "+teacher.hue=1": r"^teacher cannot be built: .*'hue'",
    "+tracking.hue=1": r"^tracking cannot be built: .*'hue'",
    "+phases.train.hue=1": r"^phases\.train cannot be built: .*'hue'",
    "optimizer.momentum=0": r"^optimizer cannot be built: Nesterov momentum requires a momentum",
    "scheduler.pct_start=1": r"^scheduler\.pct_start=1 is invalid: expected a number between 0 and 1",
    "model.se.reduction=99": r"^model\.se\.reduction=99 is invalid: expected an integer from 1 to 16",
    "augmentation.degrees=-5": r"^augmentation\.degrees=-5 is invalid: expected a number from 0 to 180",
    "model.depths=[1,0,1]": r"model\.depths=\[1, 0, 1\] is invalid: expected three integers >= 1",
    "model.mean_pool=3": r"model\.mean_pool=3 is invalid: expected true or false",
    "model.channels=[8,16]": r"model\.channels=\[8, 16\] is invalid: expected three integers",
    "data.fallback=cifar": r"data\.fallback=cifar is invalid: expected digits or null",
    "+sede=1": r"sede is not a key of the configuration \(did you mean seed\?\)",
    "~data": "data is missing",
    "+phases.more.epochs=1": r"phases\.more is not a phase: add one with \+phase@phases\.more=finetune",
}


@pytest.mark.parametrize("override", WRONG, ids=str)
def test_a_wrong_value_is_named(composed, override: str) -> None:
    with pytest.raises(UserError, match=WRONG[override]):
        bind(composed(override) | {"shape": MNIST_SHAPE})


def test_a_model_of_two_stages_is_accepted(composed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `channels` are its own: only CNN asks for three."""

    class TwoStages(torch.nn.Module):
        def __init__(self, channels: list[int], classes: int, side: int, in_channels: int) -> None:
            super().__init__()
            self.stages = torch.nn.Sequential(torch.nn.Conv2d(in_channels, channels[0], 3), torch.nn.Conv2d(*channels, 3))

    TwoStages.__module__ = "mnist_exp.learning.models"
    monkeypatch.setattr(models, "TwoStages", TwoStages, raising=False)
    config = composed() | {"model": {"_target_": "mnist_exp.learning.models.TwoStages", "channels": [8, 16]}}
    check(config)
    bind(config | {"shape": MNIST_SHAPE})
    config.model["hue"] = 1
    with pytest.raises(UserError, match=r"model cannot be built: .*'hue'"):
        bind(config | {"shape": MNIST_SHAPE})


def test_the_parameter_limit_does_not_change_the_outcome(composed) -> None:
    assert digest(composed()) == digest(composed("parameter_limit=null")) == digest(composed() | {"shape": MNIST_SHAPE})
    bind(composed("parameter_limit=null", "model.hidden_features=300") | {"shape": MNIST_SHAPE})


@pytest.mark.parametrize(
    "target", ["os.system", "torch.os.system", "torch.hub.load", "torch.nn.modules.os", "mnist_exp.run.sys.exit", "builtins.eval"]
)
def test_a_foreign_target_is_refused(composed, target: str) -> None:
    config = composed()
    config.model["_target_"] = target
    with pytest.raises(UserError, match=rf"model\._target_={target} is not allowed"):
        check(config)


def test_a_stored_configuration_is_not_resolved_again(composed) -> None:
    config = composed()
    config.model["hue"] = "${oc.create:{_target_:os.getcwd}}"
    with pytest.raises(UserError, match=r"model\.hue=.* is invalid: expected a plain value"):
        check(config)


def test_an_error_of_a_constructor_names_its_key() -> None:
    with pytest.raises(UserError, match=r"model cannot be built: .*unexpected keyword argument 'hue'"):
        build({"_target_": "mnist_exp.learning.models.SqueezeExcite", "channels": 8, "reduction": 4, "hue": 1}, "model")


@pytest.mark.parametrize(
    "nested",
    [
        {"data": {"inner": {"_target_": "mnist_exp.learning.datasets.load_mnist", "root": "/tmp/new"}}},
        {"tracking": {"inner": {"_target_": "mnist_exp.tracking.mlflow_store.MLflowStore", "uri": "sqlite:////tmp/x"}}},
        {"teacher": {"inner": {"_target_": "mnist_exp.experiment.teachers.ensemble", "runs": []}}},
        {"augmentation": {"inner": {"_target_": "mnist_exp.learning.augmentation.Unchanged"}}},
    ],
    ids=lambda nested: next(iter(nested)),
)
def test_a_target_below_another_is_refused(composed, nested: dict) -> None:
    config = composed()
    ((key, inner),) = nested.items()
    with pytest.raises(UserError, match=rf"{key}\.inner\._target_=.* is not allowed"):
        check(config | {key: config[key] | inner})


def test_a_target_that_a_module_only_imports_is_refused() -> None:
    target = {"_target_": "mnist_exp.experiment.teachers.build", "node": {}, "key": "x"}
    with pytest.raises(UserError, match=r"expected a class or function that mnist_exp\.experiment\.teachers defines"):
        build(target, "teacher")
