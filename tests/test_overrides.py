import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mnist_exp.errors import UserError
from mnist_exp.overrides import IDS, check_stored, command, location_overrides, parse, quoted, typed_ids
from mnist_exp.paths import CONF, HOME

STORABLE = [
    "model=se_cnn", "model=plain_cnn,se_cnn", "model=glob(*)", "seed=range(0,3)", "seed=1", "~phases.train", "optimizer=null",
    "+phase@phases.polish=finetune", "optimizer@phases.finetune.optimizer=adamw", "experiment=quick", "save_every=3",
    "optimizer.lr=tag(log,interval(0.1,1))", "model.channels=[8,16,20],[4,4,4]", "phases.train.epochs=2", "optimizer.lr=${seed}",
    "rerun=1234e567,00123456",
]  # fmt: skip
HOSTILE = {
    "hydra.job_logging.handlers.file.filename=/tmp/x": "is not a key of the recipe",
    "hydra/job_logging=default": "is not a key of the recipe",
    "hydra.searchpath=[file:///tmp]": "is not a key of the recipe",
    "+hydra.x=1": "adds to the configuration",
    "++x=1": "adds to the configuration",
    "+experiment=quick": "adds to the configuration",
    "+phases.train.hue=1": "adds to the configuration",
    "+phase@hydra.launcher=finetune": "inserts an option at hydra.launcher",
    "model@hydra=se_cnn": "inserts an option at hydra",
    "--config-dir=/tmp": "Hydra cannot parse",
    "--multirun": "Hydra cannot parse",
    "": "Hydra cannot parse",
    "model=../../tmp/evil": "chooses an option outside conf/",
    "model=se_cnn,/tmp/evil": "chooses an option outside conf/",
    "output_dir=/tmp": "is not a key of the recipe",
    "tracking=none": "is not a key of the recipe",
    "tracking.uri=sqlite:////tmp/x.db": "is not a key of the recipe",
    "data.root=/tmp": "is not a key of the recipe",
    "sweep.force=true": "is not a key of the recipe",
    "+sweep_job=x": "adds to the configuration",
    "resume=latest": "is not a key of the recipe",
    "rerun=../x": "is not a key of the recipe",
    "seed=${oc.env:HOME}": "contains an interpolation other than",
    "batch_size=${ oc.env:HOME }": "contains an interpolation other than",
    "phases.train.split='${${phases.finetune.split}:HOME}'": "contains an interpolation other than",
}


def test_ids_are_read_as_typed_and_sweeps_over_ids_are_left_to_their_jobs() -> None:
    typed = ["resume=1234e567", "phases.train.teacher.runs=[1234e567,00123456]", "rerun=1234e567,00123456", "seed=1e5"]
    assert typed_ids(typed, IDS) == {"resume": "1234e567", "phases.train.teacher.runs": ["1234e567", "00123456"]}


@pytest.mark.parametrize("override", STORABLE)
def test_a_store_may_contain_choices_of_a_recipe(override: str) -> None:
    check_stored([override], "sweep.json")


@pytest.mark.parametrize("override", HOSTILE)
def test_a_store_may_contain_nothing_else(override: str) -> None:
    with pytest.raises(UserError) as refused:
        check_stored(["seed=1", override], "sweep.json of run 0")
    assert f"sweep.json of run 0 contains the override {override!r}, which {HOSTILE[override]}" in str(refused.value)


@pytest.mark.parametrize(
    "value",
    [
        "/a/b",
        "/a b/c'd",
        "sqlite:////a/b.db",
        "x,y",
        "\\",
        "a\\'b",
        "5",
        "null",
        "True",
        "/a (1)/ü=ä",
        "a\\b",
        "{a: 1}",
        "${oc.env:HOME}",
    ],
)
def test_a_quoted_value_is_read_back_unchanged(value: str) -> None:
    (parsed,) = parse([f"output_dir={quoted(value)}"])
    assert OmegaConf.create({"key": parsed.value()}).key == value
    assert isinstance(parsed.value(), str)


def test_a_command_names_locations_other_than_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MNIST_ROOT"):
        monkeypatch.delenv(name, raising=False)

    def locations(*overrides: str) -> list[str]:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return location_overrides(compose("config", list(overrides)))

    assert locations() == locations(f"output_dir={HOME}/outputs") == []
    assert locations("output_dir='/a b'") == ["output_dir='/a b'"]
    assert locations("tracking=none") == ["tracking=none"]
    assert locations("tracking.uri=sqlite:////a/b.db", "tracking.experiment=other") == [
        "tracking.uri=sqlite:////a/b.db",
        "tracking.experiment=other",
    ]
    assert locations("data.root=/a/b") == ["data.root=/a/b"]
    assert locations("tracking.uri='http://user:password@host'") == [], "credentials are left to the environment"
    assert command("run", "output_dir='/a b'") == "python -m mnist_exp.run 'output_dir='\"'\"'/a b'\"'\"''"
