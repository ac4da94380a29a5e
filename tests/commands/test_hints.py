"""What people type first leads to the right key; ids are read as typed, and short ones are enough."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CommandLine
from hydra import compose, initialize_config_dir
from mlflow import MlflowClient

from mnist_exp.errors import UserError
from mnist_exp.overrides import keep_ids
from mnist_exp.paths import CONF
from mnist_exp.storage import run_dir

HINTS = {
    "epochs=2": "epochs is not a key of the configuration (did you mean phases.train.epochs or phases.finetune.epochs?)",
    "lr=0.01": "lr is not a key of the configuration (did you mean optimizer.lr in the first phase or phases.finetune",
    "learning_rate=0.01": "(did you mean optimizer.lr in the first phase",
    "optimizer.learning_rate=0.1": "optimizer.learning_rate is not a key of the configuration (did you mean optimizer.lr?)",
    "bs=64": "(did you mean batch_size?)",
    "dropout=0.2": "(did you mean model.dropout?)",
    "optimizer.momentun=0.5": "(did you mean optimizer.momentum?)",
    "optimizer=adamm": "optimizer=adamm is invalid: expected one of adam, adamw, muon",
    "model=se_cnn,plain_cnn": "model=se_cnn,plain_cnn chooses several options: add -m to run one job for each, or choose one.",
    "seed=1,2": "seed=1,2 gives several values: add -m to run one job for each, or write seed=[1,2] for a list",
}


@pytest.mark.parametrize("override", HINTS)
def test_a_first_try_leads_to_the_right_key(override: str, refuse: Callable[..., str]) -> None:
    assert HINTS[override] in refuse("data=digits", override)


def test_a_misspelled_option_is_recognized(refuse: Callable[..., str]) -> None:
    assert "(did you mean adam?)" in refuse("optimizer=adamm")


@pytest.mark.parametrize("typed", ["1234e567", "00123456", "'00123456'", "123456"])
def test_ids_are_read_as_typed(typed: str) -> None:
    overrides = [f"resume={typed}", f"sweep.resume={typed}", f"teacher.runs=[{typed},abcdef]"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", ["teacher=ensemble", *overrides])
    keep_ids(composed, overrides)
    plain = typed.strip("'")
    assert (composed.resume, composed.sweep.resume, list(composed.teacher.runs)) == (plain, plain, [plain, "abcdef"])


@pytest.mark.parametrize("typed", ["1234e567", "00123456"])
@pytest.mark.parametrize("command", [("resume={}",), ("rerun={}",), ("-m", "sweep.resume={}")], ids=lambda command: command[-1])
def test_an_unknown_id_is_named_as_typed(command: tuple[str, ...], typed: str, in_process: CommandLine, store: str) -> None:
    done = in_process(*[word.format(typed) for word in command])
    assert done.returncode == 1
    assert typed in done.stderr
    assert "inf" not in done.stderr.replace("information", "")


def test_a_prefix_of_an_id_is_enough(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    assert in_process("data=digits", "~phases.train").returncode == 0
    (run,) = MlflowClient(store).search_runs(["1"])
    assert "this run has finished" in in_process(f"resume={run.info.run_id[:6]}").stderr
    done = in_process(f"rerun={run.info.run_id[:8]}")
    assert done.returncode == 0, done.stderr
    assert "is identical to run" in done.stdout
    assert "invalid: expected the id of a run" in in_process(f"resume={run.info.run_id[:5]}").stderr


def test_an_ambiguous_prefix_lists_the_candidates(tmp_path: Path) -> None:
    for end in "01":
        (tmp_path / ("a" * 31 + end)).mkdir()
    with pytest.raises(UserError, match=r"ambiguous: it is the start of a+0, a+1"):
        run_dir.find_run(tmp_path, "aaaaaa")
