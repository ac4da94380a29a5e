"""Mistakes on the command line: each gets one message that names the key, the value and the remedy, and leaves no trace."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import omegaconf
import pytest
from conftest import CommandLine

from mnist_exp.errors import UserError
from mnist_exp.storage import run_dir

Refuse = Callable[..., str]

UNKNOWN = {  # keys, and those that the message suggests
    "bs=64": ["batch_size"],
    "epochs=2": ["phases.train.epochs", "phases.finetune.epochs"],
    "learning_rate=0.01": ["optimizer.lr"],
    "dropout=0.2": ["model.dropout"],
    "optimzer=adam": ["optimizer"],
    **({"phases.train.optimizer.lr=0.1": [" optimizer.lr"]} if omegaconf.__version__ < "2.4" else {}),  # 2.4 sets optimizer.lr
    "+hue=1": ["batch_size"],
    "+optimizer.hue=blue": ["momentum"],
    "phases.finetune.augmentation=null": ["+augmentation@phases.finetune.augmentation="],
    "+phase@phases.total=finetune": ["phases.total"],
}
WRONG = {  # overrides that the message repeats, and the values that it expects
    "optimizer=adamm": ["adam", "sgd_nesterov"],
    "model=se_cnn,plain_cnn": ["-m"],
    "seed=1,2": ["-m", "seed=[1,2]"],
    "seed=range(0,3)": ["-m"],
    "optimizer=null": [],
    "optimizer=[[]]": ["option"],
    "phase=[train,train]": ["different"],
    "model=[1]": ["option"],
    "batch_size=0": ["greater than or equal to 1"],
    "batch_size=100000": ["58800"],
    "optimizer.lr=inf": ["a finite number"],
    "model.dropout=1": ["less than 1"],
    "augmentation.scale=1": ["array"],
    "resume=nonsense": ["latest"],
    "tracking.uri=ftp://host": ["sqlite:///", "tracking=none"],
    "tracking.uri=http://127.0.0.1:9": ["tracking=none"],
    "optimizer = adam": ["KEY=VALUE", "optimizer=adam"],  # this and the next three are Hydra's own errors
    "output_dir='a b": ["KEY=VALUE", "quotes"],
    "optimizer=[adam": ["KEY=VALUE", "brackets"],
    "adam": ["KEY=VALUE"],
}
OTHERS = {
    "~model._target_": ["model", "conf/"],
    "+model.side=3": ["model", "side"],
    "+data.seed=3": ["data", "seed"],
    "callbacks.early_stopping.patience=2": ["callbacks.early_stopping", "callbacks=[...,early_stopping]"],
    "optimizer.lr=-0.1": ["optimizer", "lr=-0.1", "torch.optim.SGD"],
    "optimizer.momentum=0": ["optimizer", "momentum=0", "Nesterov"],
    "model.channels=[30000,30000,30000]": ["25000", "model.parameter_limit=null"],
    "tracking.uri=postgresql://user:password@host": ["tracking.uri=postgresql://", "sqlite:///", "tracking=none"],
    "tracking.uri=http://user:password@127.0.0.1:9": ["tracking.uri=http://127.0.0.1:9"],
}
MISTAKES = {
    **{override: [override.lstrip("+~").partition("=")[0].rpartition("@")[2], *words] for override, words in UNKNOWN.items()},
    **{override: [override, *words] for override, words in WRONG.items()},
    **OTHERS,
}


@pytest.mark.parametrize("override", MISTAKES, ids=str)
def test_a_mistake_gets_one_message(refuse: Refuse, override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    message = refuse("data=digits", override)
    for word in MISTAKES[override]:
        assert word in message
    assert "password" not in message
    assert "Error executing job" not in message
    assert len(message.strip().splitlines()) <= 2


def test_a_flag_between_overrides_is_put_first(refuse: Refuse) -> None:
    assert "mnist_exp.run -m optimizer=adam seed=1" in refuse("optimizer=adam", "-m", "seed=1")


@pytest.mark.parametrize(
    ("override", "package", "extra"),
    [
        ("hydra/launcher=slurm", "hydra_plugins.hydra_submitit_launcher", "slurm"),
        ("hydra/launcher=ray_cluster", "hydra_plugins.hydra_ray_launcher", "ray"),
        ("hydra/sweeper=optuna", "optuna", "search"),
    ],
)
def test_a_missing_package_is_named_with_its_pip_line(
    refuse: Refuse, override: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch, mnist_root: Path
) -> None:
    if package == "optuna":
        monkeypatch.setitem(sys.modules, package, None)
    elif importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    assert f"pip install -e '.[{extra}]'" in refuse("-m", override, "data=mnist_tuning", "seed=0,1")


@pytest.mark.parametrize("override", ["resume=1234e567", "rerun=123456", "sweep.resume=1e5"])
def test_an_id_that_looks_like_a_number_is_to_be_quoted(refuse: Refuse, override: str) -> None:
    key, _, value = override.partition("=")
    assert f"\"{key}='{value}'\"" in refuse(*(["-m"] if "sweep" in key else []), override)


@pytest.mark.parametrize("override", ["rerun=latest", "resume=abcdef", "seed=range(0,2),5", "batch_size=range(3,1)"])
def test_a_mistake_in_a_sweep_is_found_before_it_starts(refuse: Refuse, override: str) -> None:
    assert override in refuse("-m", "data=digits", override)


def test_a_file_of_options_that_is_not_yaml(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("lr: [1")
    for option in ("mine", "adam"):
        assert "mine.yaml" in refuse("--config-dir", str(tmp_path), "data=digits", f"optimizer={option}")


def test_an_ambiguous_start_of_an_id_lists_the_candidates(tmp_path: Path) -> None:
    ids = ["a" * 31 + end for end in "01"]
    for run_id in ids:
        (tmp_path / run_id).mkdir()
    with pytest.raises(UserError) as error:
        run_dir.find_run(tmp_path, "aaaaaa")
    assert all(run_id in str(error.value) for run_id in ids)


def test_a_device_that_is_missing(refuse: Refuse) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "device=cuda" in refuse("data=digits", "device=cuda")


def test_a_folder_of_images_that_the_user_set_must_have_them(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "data.root=/proc/nowhere" in refuse("data.root=/proc/nowhere")
    monkeypatch.setenv("MNIST_ROOT", "/proc/nowhere")
    assert "/proc/nowhere" in refuse("data.fallback=null")
    assert "data.root=None" in refuse("data=folder")


def test_mnist_that_is_damaged(refuse: Refuse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mnist_root: Path) -> None:
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (mnist_root / "MNIST" / "raw").glob("*.gz"):
        (raw / path.name).write_bytes(path.read_bytes()[: 10_000 if "train-images" in path.name else None])
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path / "root"))
    assert str(raw / "train-images-idx3-ubyte.gz") in refuse()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system of one's own takes root")
@pytest.mark.parametrize("options", ["ro", "size=8k"])
def test_an_output_folder_that_is_read_only_or_full(refuse: Refuse, tmp_path: Path, options: str) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        if options != "ro":
            with pytest.raises(OSError, match="No space left"):
                (folder / "filler").write_bytes(bytes(100_000))
        message = refuse("data=digits")
    finally:
        subprocess.run(["umount", folder], check=True)
    assert f"output_dir: {folder}" in message


def test_the_stack_trace_is_there_for_those_who_ask(command_line: CommandLine) -> None:
    done = command_line("batch_size=0", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "batch_size=0" in done.stderr
    assert "Error executing job" not in done.stderr
