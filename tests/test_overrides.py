import shlex

import pytest
from omegaconf import OmegaConf

from mnist_exp.errors import UserError
from mnist_exp.nodes import remember_locations
from mnist_exp.overrides import command, parse, quoted
from mnist_exp.settings import check_stored

STORABLE = [
    "model=se_cnn", "model=plain_cnn,se_cnn", "model=glob(*)", "seed=range(0,3)", "seed=1", "~phases.train", "optimizer=null",
    "+phase@phases.polish=finetune", "optimizer@phases.finetune.optimizer=adamw", "experiment=quick", "save_every=3",
    "optimizer.lr=tag(log,interval(0.1,1))", "model.channels=[8,16,20],[4,4,4]", "phases.train.epochs=2", "optimizer.lr=${seed}",
    "rerun=1234e567,00123456", "+optimizer.eps=1e-7", "+experiment=quick",
]  # fmt: skip
HOSTILE = [
    "hydra.job_logging.handlers.file.filename=/tmp/x", "hydra/job_logging=default", "hydra.searchpath=[file:///tmp]",
    "+hydra.x=1", "++x=1", "+phase@hydra.launcher=finetune", "model@hydra=se_cnn", "--config-dir=/tmp", "--multirun", "",
    "model=../../tmp/evil", "model=se_cnn,/tmp/evil", "output_dir=/tmp", "tracking=none", "tracking.uri=sqlite:////tmp/x.db",
    "sweep.force=true", "+sweep_job=x", "resume=latest", "rerun=../x",
    "model='..'", "+model=a/b", "data@_global_=mnist", "model@tracking=se_cnn", "+tracking.x=1", "++hydra.x=x",
    "data={root:x}", "+local=default", "model.hue='\\${oc.create:{_target_:os.getcwd}}'",
    "seed=${oc.env:HOME}", "batch_size=${ oc.env:HOME }", "phases.train.split='${${phases.finetune.split}:HOME}'",
]  # fmt: skip


@pytest.mark.parametrize("override", STORABLE)
def test_a_store_may_contain_choices_of_a_recipe(override: str) -> None:
    check_stored([override], "a sweep")


@pytest.mark.parametrize("override", HOSTILE)
def test_a_store_may_contain_nothing_else(override: str) -> None:
    with pytest.raises(UserError) as error:
        check_stored(["seed=1", override], "recipe.json of run 0")
    assert error.value.key == override
    assert "recipe.json of run 0" in str(error.value)


VALUES = [
    "/a/b", "/a b/c'd", "sqlite:////a/b.db", "x,y", "\\", "a\\'b", "5", "null", "True", "/a (1)/ü=ä", "a\\b", "{a: 1}",
    "${oc.env:HOME}",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_a_quoted_value_is_read_back_unchanged(value: str) -> None:
    parsed = parse(f"output_dir={quoted(value)}").value()
    assert OmegaConf.create({"key": parsed}).key == value
    assert isinstance(parsed, str)


def test_a_command_repeats_the_locations_that_were_typed() -> None:
    assert command("ui", "0" * 8) == f"python -m mnist_exp.ui {'0' * 8}"
    remember_locations(["seed=1", "output_dir='/a b'", "tracking.experiment=mine", "tracking.patience=10"], "/tmp")
    *_, locations = command("run", "seed=1").partition("seed=1 ")
    expected = ["output_dir='/a b'", "tracking.experiment=mine", "tracking.patience=10", "--config-dir", "/tmp"]
    assert shlex.split(locations) == expected
    expected = ["ui", "--experiment", "mine", "--output-dir", "/a b", "--config-dir", "/tmp"]
    assert shlex.split(command("ui"))[2:] == ["mnist_exp.ui", *expected[1:]]
    remember_locations(["tracking=mine"], None)
    assert command("run", "seed=1") == "python -m mnist_exp.run seed=1 tracking=mine"
    assert command("ui") == "MNIST_EXP_TRACKING=mine python -m mnist_exp.ui"
