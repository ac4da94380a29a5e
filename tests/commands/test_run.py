import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import CommandLine
from mlflow import MlflowClient
from mlflow.entities import Run
from mnist_exp.config import build
from mnist_exp.redaction import redact
from mnist_exp.serving.loading import load_model

from mnist_exp.learning.datasets import load_digits
from mnist_exp.learning.evaluation import evaluate
from mnist_exp.paths import CHECKOUT
from mnist_exp.storage import checkpoint, run_dir
from mnist_exp.tracking.provenance import uncommitted
from mnist_exp.tracking.tags import BRANCH, DIRTY

Refuse = Callable[..., str]


def runs(store: str) -> list[Run]:
    client = MlflowClient(store)
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


@pytest.fixture(scope="module")
def finished(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, MlflowClient, str]:
    """One whole run on digits through the real command line: its record, a client, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    store = f"sqlite:///{folder}/mlflow.db"
    (folder / "mlflow.db").write_bytes(template_database.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "mnist_exp.run", "data=digits", "optimizer=adam", f"output_dir={folder}/outputs"],
        capture_output=True,
        text=True,
        env=os.environ | {"MLFLOW_TRACKING_URI": store, "COLUMNS": "160"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (run,) = runs(store)
    return run, MlflowClient(store), done.stdout + done.stderr


def test_the_run_is_recorded_under_its_name(finished) -> None:
    run, _, _ = finished
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "se_cnn digits adam"
    assert run.data.tags["data"] == "digits"
    assert run.data.tags["overrides"].startswith("data=digits optimizer=adam")


def test_metrics(finished) -> None:
    run, client, _ = finished
    metrics = run.data.metrics
    assert metrics["test/accuracy"] > 0.80
    assert metrics["model/parameters"] == 19_674
    assert metrics["time/total_seconds"] > metrics["time/train_seconds"] > metrics["time/finetune_seconds"] > 0
    assert {"test/loss", "val/loss", "val/accuracy", "train/lr", "train/grad_norm", "train/examples_per_second"} <= set(metrics)
    for key in ("train/loss", "train/accuracy", "epoch"):
        history = client.get_metric_history(run.info.run_id, key)
        steps = [point.step for point in history]
        assert steps == sorted(set(steps)), "by examples seen, each once"
        assert (len(steps), steps[-1]) == (30, 60_000)
    assert history[-1].value == 2.0, "epochs of both phases"
    assert len(client.get_metric_history(run.info.run_id, "test/accuracy")) == 1


def test_parameters_are_flat_and_readable(finished) -> None:
    params = finished[0].data.params
    assert params["model"] == "se_cnn"
    assert params["optimizer"] == "adam"
    assert params["train.optimizer.lr"] == "0.01"
    assert params["finetune.batch_size"] == "128"
    assert params["model.channels"] == "[8, 16, 20]"
    assert params["device"] == "cpu"
    assert not any("_target_" in key for key in params)


def artifact(finished, path: str) -> Path:
    run, client, _ = finished
    return Path(client.download_artifacts(run.info.run_id, path))


def test_the_stored_configuration_is_resolved_and_whole(finished) -> None:
    config = yaml.safe_load(artifact(finished, "config.yaml").read_text())
    assert config["phases"]["train"]["optimizer"]["_target_"] == "torch.optim.Adam"
    assert "${" not in str(config)


def test_data_sets_are_recorded_with_their_digests(finished) -> None:
    inputs = {item.tags[0].value: item.dataset for item in finished[0].inputs.dataset_inputs}
    splits = load_digits(0.02, seed=0).splits
    assert set(inputs) == {"train", "finetune", "test"}
    for name, dataset in inputs.items():
        assert (dataset.name, dataset.digest) == (f"digits-{name}", splits[name].digest)


def test_pictures_are_there(finished) -> None:
    run, client, _ = finished
    pictures = {Path(item.path).stem: item.file_size for item in client.list_artifacts(run.info.run_id, "pictures")}
    assert set(pictures) == {"confusion_matrix", "learning_curves", "learning_rate", "augmented_digits", "worst_mistakes"}
    assert min(pictures.values()) > 5_000


def test_provenance(finished) -> None:
    run, _, _ = finished
    tags = run.data.tags
    assert (
        tags["mlflow.source.git.commit"]
        == subprocess.check_output(["git", "-C", CHECKOUT, "rev-parse", "HEAD"], text=True).strip()
    )
    assert tags[DIRTY] in ("true", "false")
    assert tags[BRANCH]
    assert "-m mnist_exp.run data=digits optimizer=adam" in tags["mlflow.source.name"]
    assert tags["torch"] == importlib.metadata.version("torch")
    assert tags["cpu"]
    assert f"mlflow=={importlib.metadata.version('mlflow')}" in artifact(finished, "provenance/packages.txt").read_text()
    patch, unrecorded = uncommitted(CHECKOUT)
    assert artifact(finished, "provenance/uncommitted.diff").read_text() == redact(patch)
    assert artifact(finished, "provenance/unrecorded.txt").read_text() == redact(unrecorded)
    assert bool(patch + unrecorded) == (tags[DIRTY] == "true")


def test_the_description_can_be_read(finished) -> None:
    note = finished[0].data.tags["mlflow.note.content"]
    accuracy = finished[0].data.metrics["test/accuracy"]
    assert f"| test/accuracy | {100 * accuracy:.2f} % |" in note
    assert "Repeat it: `python -m mnist_exp.run data=digits optimizer=adam" in note


def test_the_terminal_shows_table_id_and_how_to_open(finished) -> None:
    run, _, output = finished
    for part in ("test/accuracy", "19,674", "time/train_seconds", "digits: train 1,408", run.info.run_id, "examples/s"):
        assert part in output
    assert f"python -m mnist_exp.ui {run.info.run_id}" in output


def test_checkpoint_and_logged_model_predict_what_was_scored(finished) -> None:
    """Batch sizes 1 and 7, through MLflow's own loader, against the model rebuilt from the checkpoint."""
    import mlflow

    run, client, _ = finished
    saved = checkpoint.load(artifact(finished, run_dir.CHECKPOINT))
    assert saved.run_id == run.info.run_id
    model = build(saved.config["model"], "model", **saved.config["shape"])
    model.load_state_dict(saved.state["model"])
    test = load_digits(0.02, seed=0).splits["test"]
    evaluation = evaluate(model, test)
    assert evaluation.metrics["accuracy"] == run.data.metrics["test/accuracy"]

    mlflow.set_tracking_uri(client.tracking_uri)
    served = mlflow.pyfunc.load_model(f"models:/{run.outputs.model_outputs[0].model_id}")
    assert served.metadata.signature is not None
    assert served.metadata.saved_input_example_info is not None
    for batch in (1, 7):
        logits = served.predict(test.images[:batch].numpy())
        assert logits.shape == (batch, 10)
        np.testing.assert_allclose(logits, evaluation.logits[:batch], atol=1e-4)
    ours = load_model(f"models:/{run.outputs.model_outputs[0].model_id}")  # to whose folder MLflow has added a file of its own
    assert ours(test.images[:7]).equal(model.eval()(test.images[:7]))


def test_tracking_can_be_turned_off(in_process: CommandLine, tmp_path: Path, store: str) -> None:
    done = in_process("data=digits", "tracking=none", "~phases.train")
    assert done.returncode == 0, done.stderr
    assert not runs(store)
    assert len(list((tmp_path / "outputs").glob("*/checkpoint.pt"))) == 1


def test_tuning_scores_validation_only(in_process: CommandLine, store: str, mnist_root: Path) -> None:
    done = in_process("data=mnist_tuning", "~phases.train")
    assert done.returncode == 0, done.stderr
    (run,) = runs(store)
    assert "val/accuracy" in run.data.metrics
    assert not any(key.startswith("test/") for key in run.data.metrics)
    assert {item.tags[0].value for item in run.inputs.dataset_inputs} == {"finetune", "validation"}


def test_without_mnist_the_run_warns_that_it_uses_digits(
    in_process: CommandLine, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_ROOT", "/proc/nowhere")
    done = in_process("~phases.train")
    assert done.returncode == 0, done.stderr
    assert "USING THE EMBEDDED digits INSTEAD" in done.stdout
    (run,) = runs(store)
    assert run.data.tags["data"] == run.data.params["data"] == "digits"
    assert "digits" in run.info.run_name
    assert "USING THE EMBEDDED digits INSTEAD" in run.data.tags["mlflow.note.content"]


@pytest.mark.slow
def test_a_signal_kills_the_run_truly(store: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mnist_exp.run", "data=digits", "~phases.train", "phases.finetune.epochs=100000"]
    processes = {
        signum: subprocess.Popen(
            [*command, f"output_dir={tmp_path}"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for signum in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        deadline = time.monotonic() + 120
        while len([run for run in runs(store) if run.data.metrics]) < 2:
            assert time.monotonic() < deadline, "no epoch was reported in two minutes"
            assert all(process.poll() is None for process in processes.values())
            time.sleep(0.2)
        for signum, process in processes.items():
            process.send_signal(signum)
            _, message = process.communicate(timeout=30)
            assert process.returncode == 128 + signum
            assert f"Stopped by {signum.name}" in message
            assert "Traceback" not in message
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    for run in runs(store):
        assert run.info.status == "KILLED"
        assert run.data.metrics["train/loss"] > 0, "what was reported before is kept"


def test_a_failure_is_recorded_with_its_traceback(in_process: CommandLine, store: str) -> None:
    done = in_process("data=digits", "optimizer.lr=1e29", "scheduler=constant")
    assert done.returncode == 1
    assert "The loss became" in done.stderr
    assert "phase train, epoch 1, step" in done.stderr
    assert "Traceback" not in done.stderr
    (run,) = runs(store)
    assert run.info.status == "FAILED"
    assert "NonFiniteLossError" in Path(MlflowClient(store).download_artifacts(run.info.run_id, "traceback.txt")).read_text()


# Bad input, and the parts of the message for each.

MISTYPED = {
    "batchsize=64": ["batchsize is not a key", "did you mean batch_size?"],
    "optimizer.momentun=0.5": ["optimizer.momentun is not a key", "did you mean optimizer.momentum?"],
    "optimzer=adam": ["optimzer", "did you mean optimizer?"],
    "optimizer=adamm": ["adamm", "adam", "sgd_nesterov"],
    "phases.train.optimizer.lr=0.1": ["override optimizer.lr instead"],
    "model=transformer": ["transformer", "plain_cnn"],
    "batch_size=": ["batch_size is missing: set it"],
    "batch_size=0": ["\nbatch_size=0 is invalid", "an integer >= 1"],
    "optimizer.lr=-0.1": ["\noptimizer.lr=-0.1 is invalid", "a number > 0"],
    "+optimizer.hue=blue": ["optimizer cannot be built", "hue"],
    "model.hidden_features=200": ["parameters: at most 25,000 are allowed", "Lower model.channels"],
    "optimizer.momentum=0": ["optimizer cannot be built", "Nesterov momentum requires a momentum"],
    "augmentation.scale=1": ["augmentation.scale=1", "[smallest, largest], both > 0"],
    "+batch_size={a:1}": ["batch_size={'a': 1} is invalid"],
    "optimizer=null": ["optimizer"],
    "~model._target_": ["model=", "conf/model/"],
    "+phase@phases.total=finetune": ["phases.total is invalid: expected a word"],
    "scheduler.div_factor=0": ["scheduler.div_factor=0", "a number > 0"],
    "phases.finetune.augmentation=null": ["phases.finetune.augmentation is missing"],
    "model.channels=[30000,30000,30000]": ["parameters: at most 25,000 are allowed"],
    "+data.hue=1": ["data cannot be built", "hue"],
    "resume=nonsense": ["resume=nonsense is invalid", "latest"],
    "augmentation.degrees=-5": ["augmentation.degrees=-5", "a number from 0 to 180"],
    "batch_size=100000": ["phases.train.batch_size=100000 is invalid", "58800"],
    "tracking.uri=postgresql://user:password@host": ["tracking.uri=postgresql://***@host", "is invalid"],
    "tracking.uri=http://user:password@127.0.0.1:9": ["tracking.uri=http://***@127.0.0.1:9", "cannot be opened"],
    "tracking.uri=ftp://host": ["tracking.uri=ftp://host", "expected sqlite:////"],
}


@pytest.mark.parametrize("override", MISTYPED, ids=str)
def test_a_mistake_gets_one_message(refuse: Refuse, override: str) -> None:
    message = refuse("data=digits", override)
    for part in MISTYPED[override]:
        assert part in message
    assert "password" not in message


def test_a_device_that_is_missing(refuse: Refuse) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "device=cuda is invalid: expected auto or cpu on this machine" in refuse("data=digits", "device=cuda")


def test_mnist_that_is_missing_without_fallback(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_ROOT", "/proc/nowhere")
    message = refuse("data.fallback=null")
    assert "data.root=/proc/nowhere (MNIST_ROOT)" in message
    assert "Set MNIST_ROOT to a folder" in message


def test_mnist_that_is_damaged(refuse: Refuse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mnist_root: Path) -> None:
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (mnist_root / "MNIST" / "raw").glob("*.gz"):
        (raw / path.name).write_bytes(path.read_bytes()[: 10_000 if "train-images" in path.name else None])
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path / "root"))
    assert "train-images-idx3-ubyte.gz cannot be read" in refuse()


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
    assert f"output_dir: {folder} cannot be written" in message
    assert "choose another folder with output_dir=/path" in message


def test_a_server_that_is_down(refuse: Refuse) -> None:
    message = refuse("data=digits", "tracking.uri=http://127.0.0.1:9")
    assert "tracking.uri=http://127.0.0.1:9 (MLFLOW_TRACKING_URI) cannot be opened" in message
    assert "Start the server" in message


def test_the_stack_trace_is_there_for_those_who_ask(command_line: CommandLine) -> None:
    done = command_line("batch_size=0", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "batch_size=0 is invalid" in done.stderr


def test_a_signal_before_anything_is_recorded_advises_nothing(in_process: CommandLine, store: str, monkeypatch) -> None:
    monkeypatch.setattr(run_dir, "make_folder", lambda _: signal.raise_signal(signal.SIGINT))
    done = in_process("data=digits")
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.strip() == "Stopped by SIGINT."


# Commands that must answer at once.


@pytest.mark.parametrize(
    ("flags", "shown"), [(["--help"], "rmsprop"), (["--cfg", "job"], "nesterov: true"), (["-sc", "query=bash"], "adamw")]
)
def test_help_configuration_and_completion_import_neither_torch_nor_mlflow(flags: list[str], shown: str) -> None:
    code = (
        "import sys; from mnist_exp.run import main; sys.argv = ['mnist-exp', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'mlflow', 'numpy'} & set(sys.modules), 'imported too much'"
    )
    environment = os.environ | {"COMP_LINE": "mnist-exp optimizer=", "COMP_POINT": "20"}
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


def test_the_console_script_completes_in_bash() -> None:
    script = Path(sys.executable).with_name("mnist-exp")
    for shell in ("bash", "zsh", "fish"):
        installed = subprocess.run([script, "-sc", f"install={shell}"], capture_output=True, text=True, check=True)
        assert "mnist-exp" in installed.stdout
    typed = """
        eval "$(mnist-exp -sc install=bash)"
        COMP_LINE="mnist-exp optimizer=sgd_"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=(mnist-exp "optimizer=sgd_"); COMP_CWORD=1
        hydra_bash_completion
        echo "${COMPREPLY[@]}"
    """
    environment = os.environ | {"PATH": f"{script.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, env=environment, check=False)
    assert "sgd_nesterov" in done.stdout, done.stderr


@pytest.mark.slow
def test_as_an_mlflow_project(store: str, tmp_path: Path) -> None:
    mlflow = Path(sys.executable).with_name("mlflow")
    overrides = f"data=digits ~phases.train model=plain_cnn 'phases.finetune.optimizer.betas=[0.8, 0.9]' output_dir={tmp_path}"
    done = subprocess.run(
        [mlflow, "run", CHECKOUT, "--env-manager", "local", "--experiment-name", "mnist_exp", "-P", f"overrides={overrides}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{mlflow.parent}:{os.environ['PATH']}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (run,) = runs(store)
    assert (run.info.status, run.data.params["model"]) == ("FINISHED", "plain_cnn")
    assert run.data.params["finetune.optimizer.betas"] == "[0.8, 0.9]"
    assert "test/accuracy" in run.data.metrics
