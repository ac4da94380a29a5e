import pytest
from hydra import compose, initialize_config_dir

from mnist_exp import CONF, HOME
from mnist_exp.errors import UserError
from mnist_exp.overrides import check_stored, command, location_overrides, parse, quoted

STORABLE = [
    "model=se_cnn", "model=plain_cnn,se_cnn", "model=glob(*)", "seed=range(0,3)", "seed=1", "~phases.train", "optimizer=null",
    "+phase@phases.polish=finetune", "optimizer@phases.finetune.optimizer=adamw", "experiment=quick", "save_every=3",
    "optimizer.lr=tag(log,interval(0.1,1))", "model.channels=[8,16,20],[4,4,4]", "phases.train.epochs=2", "optimizer.lr=${seed}",
]  # fmt: skip
HOSTILE = {
    "hydra.job_logging.handlers.file.filename=/tmp/x": "names no key of the recipe",
    "hydra/job_logging=default": "names no key of the recipe",
    "hydra.searchpath=[file:///tmp]": "names no key of the recipe",
    "+hydra.x=1": "adds to the configuration",
    "++x=1": "adds to the configuration",
    "+experiment=quick": "adds to the configuration",
    "+phases.train.colour=1": "adds to the configuration",
    "+phase@hydra.launcher=finetune": "puts an option at hydra.launcher",
    "model@hydra=se_cnn": "puts an option at hydra",
    "--config-dir=/tmp": "is none that Hydra can read",
    "--multirun": "is none that Hydra can read",
    "": "is none that Hydra can read",
    "model=../../tmp/evil": "names an option outside conf/",
    "model=se_cnn,/tmp/evil": "names an option outside conf/",
    "output_dir=/tmp": "names no key of the recipe",
    "tracking=none": "names no key of the recipe",
    "tracking.uri=sqlite:////tmp/x.db": "names no key of the recipe",
    "data.root=/tmp": "names no key of the recipe",
    "sweep.id=0": "names no key of the recipe",
    "resume=latest": "names no key of the recipe",
    "seed=${oc.env:HOME}": "calls a resolver",
    "batch_size=${ oc.env:HOME }": "calls a resolver",
}


@pytest.mark.parametrize("override", STORABLE)
def test_choices_of_a_recipe_may_come_out_of_a_store(override: str) -> None:
    check_stored([override], "sweep.json")


@pytest.mark.parametrize("override", HOSTILE)
def test_all_else_may_not(override: str) -> None:
    with pytest.raises(UserError) as refused:
        check_stored(["seed=1", override], "sweep.json of run 0")
    assert f"sweep.json of run 0 holds the override {override!r}, which {HOSTILE[override]}" in str(refused.value)


@pytest.mark.parametrize(
    "value", ["/a/b", "/a b/c'd", "sqlite:////a/b.db", "x,y", "\\", "a\\'b", "5", "null", "True", "/a (1)/ü=ä", "a\\b", "{a: 1}"]
)
def test_a_quoted_value_is_read_back_as_it_was(value: str) -> None:
    (parsed,) = parse([f"output_dir={quoted(value)}"])
    assert parsed.value() == value
    assert isinstance(parsed.value(), str)


def test_a_command_names_the_places_that_are_not_the_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MNIST_ROOT"):
        monkeypatch.delenv(name, raising=False)

    def places(*overrides: str) -> list[str]:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return location_overrides(compose("config", list(overrides)))

    assert places() == places(f"output_dir={HOME}/outputs") == []
    assert places("output_dir='/a b'") == ["output_dir='/a b'"]
    assert places("tracking=none") == ["tracking=none"]
    assert places("tracking.uri=sqlite:////a/b.db", "tracking.experiment=other") == [
        "tracking.uri=sqlite:////a/b.db",
        "tracking.experiment=other",
    ]
    assert places("data.root=/a/b") == ["data.root=/a/b"]
    assert places("tracking.uri='http://user:password@host'") == [], "credentials are left to the environment"
    assert command("run", "output_dir='/a b'") == "python -m mnist_exp.run 'output_dir='\"'\"'/a b'\"'\"''"
