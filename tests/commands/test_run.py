"""One whole run through the real command line: its record, its output, and the commands that it prints."""

import importlib.metadata
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import Call, CommandLine
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from processes import SECRET, SHORT, assert_nowhere

from mnist_exp import cli, draw, predict, runs, ui
from mnist_exp.api import load
from mnist_exp.learning.datasets import load_digits
from mnist_exp.learning.evaluation import evaluate
from mnist_exp.metrics import format_metric
from mnist_exp.nodes import build
from mnist_exp.paths import CHECKOUT
from mnist_exp.storage import checkpoint, run_dir
from mnist_exp.tracking import mlflow_ui
from mnist_exp.tracking.provenance import ORIGIN, PATCH, changed_files, uncommitted
from mnist_exp.tracking.tags import BRANCH, DIRTY

RECIPE = ("data=digits", "optimizer=adam", "data.subset=1000", "batch_size=32", "phases.train.epochs=2")
COMMANDS = {"draw": draw.main, "predict": predict.main, "runs": runs.main, "ui": ui.main}


def all_runs(store: str) -> list[Run]:
    client = MlflowClient(store)
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


@pytest.fixture(scope="module")
def finished(template_database: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, MlflowClient, str]:
    """The record of a run in an experiment of its own, a client, and what it printed.

    The command line contains a password: that of a server which a later override replaces.
    """
    folder = tmp_path_factory.mktemp("finished")
    store = f"sqlite:///{folder}/mlflow.db"
    (folder / "mlflow.db").write_bytes(template_database.read_bytes())
    uris = [f"tracking.uri='http://user:{SECRET}@127.0.0.1:9'", f"tracking.uri={store}"]
    locations = [*uris, "tracking.experiment=mine", f"output_dir={folder}/outputs"]
    done = subprocess.run(
        [sys.executable, "-m", "mnist_exp.run", *RECIPE, *locations],
        capture_output=True,
        text=True,
        env=os.environ | {"MLFLOW_TRACKING_URI": "sqlite:////proc/nowhere.db", "COLUMNS": "160"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (run,) = all_runs(store)
    return run, MlflowClient(store), done.stdout + done.stderr


def test_the_run_is_recorded_under_its_name(finished) -> None:
    run, _, _ = finished
    assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith("se_cnn digits_1000 adam")
    assert run.data.tags["data"] == "digits_1000"
    assert run.data.tags["overrides"] == " ".join(RECIPE)


def test_metrics(finished) -> None:
    run, client, _ = finished
    metrics = run.data.metrics
    assert metrics["test/accuracy"] > 0.5
    assert metrics["model/parameters"] == 19_674
    assert metrics["time/total_seconds"] > metrics["time/train_seconds"] + metrics["time/finetune_seconds"] > 0
    assert {"test/loss", "val/loss", "val/accuracy", "train/lr", "train/grad_norm", "train/examples_per_second"} <= set(metrics)
    for key in ("train/loss", "train/accuracy", "epoch"):
        steps = [point.step for point in client.get_metric_history(run.info.run_id, key)]
        assert steps == sorted(set(steps)), "by examples seen, each once"
        assert len(steps) >= 3
    assert metrics["epoch"] == 3.0, "epochs of both phases"
    assert len(client.get_metric_history(run.info.run_id, "test/accuracy")) == 1


def test_parameters_are_flat_and_readable(finished) -> None:
    params = finished[0].data.params
    expected = {"model": "se_cnn", "optimizer": "adam", "train.optimizer.lr": "0.01", "model.channels": "[8, 16, 20]"}
    assert expected.items() <= params.items()
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
    splits = load_digits(0.02, seed=0, subset=1000).splits
    assert set(inputs) == {"train", "finetune", "test"}
    for name, dataset in inputs.items():
        assert (dataset.name, dataset.digest) == (f"digits_1000-{name}", splits[name].digest)


def test_pictures_are_there(finished) -> None:
    run, client, _ = finished
    pictures = {Path(item.path).stem: item.file_size for item in client.list_artifacts(run.info.run_id, "pictures")}
    assert set(pictures) == {"confusion_matrix", "learning_curves", "augmented_images", "worst_mistakes"}
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
    assert f"-m mnist_exp.run {' '.join(RECIPE)}" in tags["mlflow.source.name"]
    assert tags["torch"] == importlib.metadata.version("torch")
    assert tags["cpu"]
    assert {"pid", "host", "output_dir", "mlflow.user"} <= tags.keys()
    origin = json.loads(artifact(finished, ORIGIN).read_text())
    assert origin["command"] == tags["mlflow.source.name"]
    assert origin["packages"]["mlflow"] == importlib.metadata.version("mlflow")
    assert origin["machine"]["cpu"] == tags["cpu"]
    assert {"host", "os", "python", "threads", "cores", "memory"} <= origin["machine"].keys()
    assert origin["changed_files"] == changed_files()
    names = {item.path for item in finished[1].list_artifacts(run.info.run_id)}
    assert (artifact(finished, PATCH).read_text() if PATCH in names else "") == uncommitted()


def test_description_and_terminal_show_the_result(finished) -> None:
    run, _, output = finished
    note = run.data.tags["mlflow.note.content"]
    assert f"python -m mnist_exp.run {' '.join(RECIPE)}" in note
    for name in ("test/accuracy", "val/loss", "model/parameters"):
        for text in (note, output):
            assert name in text
            assert format_metric(name, run.data.metrics[name]) in text
    assert run.info.run_id in output


def test_without_a_terminal_each_epoch_prints_a_line(finished) -> None:
    for phase, epochs in (("train", 2), ("finetune", 1)):
        lines = [line for line in finished[2].splitlines() if line.startswith(f"{phase}: ")]
        assert len(lines) == epochs
        assert all("examples/s" in line for line in lines)


def test_a_password_on_the_command_line_is_neither_printed_nor_recorded(finished) -> None:
    run, client, output = finished
    assert_nowhere(SECRET, Path(client.tracking_uri.removeprefix("sqlite:///")).parent, output, str(run.to_dictionary()))


def test_every_printed_command_works_when_copied(finished, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the store and the experiment were typed on the command line of the run."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/nowhere.db")
    monkeypatch.setattr(mlflow_ui, "serves", lambda *_: True)
    monkeypatch.setattr(cli, "listen", lambda _: socket.socket())
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    Image.fromarray(load_digits(0.02, seed=0).splits["test"].images[0, 0].numpy()).save(tmp_path / "digit.png")
    run_id, printed = finished[0].info.run_id, re.findall(r"python -m mnist_exp\.(\w+) (.*)", finished[2])
    assert {module for module, _ in printed} == {"ui", "predict", "draw"}
    for module, line in printed:
        arguments = [str(tmp_path / "digit.png") if word == "FILE" else word for word in shlex.split(line)]
        done = call(COMMANDS[module], *arguments)
        assert done.returncode == 0, done.stderr
        assert run_id[:8] in done.stdout
    refused = call(predict.main, *shlex.split(line), "--model", "0" * 6, str(tmp_path / "digit.png"))
    (listing,) = re.findall(r"`python -m mnist_exp\.runs ([^`]*)`", refused.stderr)
    assert run_id[:8] in call(runs.main, *shlex.split(listing)).stdout


def test_latest_is_repeated_and_its_start_is_found_in_any_experiment(
    finished, in_process: CommandLine, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, client, _ = finished
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    assert load(run.info.run_id[:8]).source.run_id == run.info.run_id
    assert run.info.run_id in call(runs.main, "show", run.info.run_id[:6]).stdout
    assert run.info.run_id in call(runs.main, "show", "latest", "--experiment", "mine").stdout
    done = in_process("rerun=latest", "tracking.experiment=mine")
    assert done.returncode == 0, done.stderr
    (repeated,) = [other for other in all_runs(client.tracking_uri) if other.info.run_id != run.info.run_id]
    for name in ("test/loss", "val/loss", "train/loss"):
        assert repeated.data.metrics[name] == run.data.metrics[name]
    assert repeated.data.tags["rerun_of"] == run.info.run_id
    client.delete_run(repeated.info.run_id)


def test_checkpoint_and_logged_model_predict_what_was_scored(finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch sizes 1 and 7, through MLflow's own loader, against the model rebuilt from the checkpoint."""
    import mlflow

    run, client, _ = finished
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    saved = checkpoint.load(artifact(finished, run_dir.CHECKPOINT))
    assert saved.run_id == run.info.run_id
    settings = saved.recipe.settings
    model = build(settings.model, "model", **settings.data_description.shape)
    model.load_state_dict(saved.state["model"])
    test = load_digits(0.02, seed=0).splits["test"]  # the same for every subset
    evaluation = evaluate(model, test)
    assert evaluation.metrics["accuracy"] == run.data.metrics["test/accuracy"]

    mlflow.set_tracking_uri(client.tracking_uri)
    served = mlflow.pyfunc.load_model(f"models:/{run.outputs.model_outputs[0].model_id}")
    assert served.metadata.signature is not None
    for batch in (1, 7):
        logits = served.predict(test.images[:batch].numpy())
        assert logits.shape == (batch, 10)
        np.testing.assert_allclose(logits, evaluation.logits[:batch], atol=1e-4)
    ours = load(f"models:/{run.outputs.model_outputs[0].model_id}")  # to whose folder MLflow has added a file of its own
    assert ours.model(test.images[:7]).equal(model.eval()(test.images[:7]))


def test_a_changed_module_of_ones_own_is_noticed(command_line: CommandLine, store: str, tmp_path: Path) -> None:
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    (tmp_path / "conf" / "optimizer" / "mine.yaml").write_text("_target_: my_layers.Adam\nlr: 0.001\n")
    (tmp_path / "my_layers.py").write_text("from torch.optim import Adam\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    def run(*arguments: str) -> str:
        done = command_line(f"--config-dir={tmp_path / 'conf'}", *arguments, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    run("data=digits", "~phases.train", "optimizer@phases.finetune.optimizer=mine")
    (tmp_path / "my_layers.py").write_text("from torch.optim import Adam  # of torch\n")
    assert "code was" in run("rerun=latest")
    for marker in tmp_path.glob(f"outputs/*/{run_dir.FINISHED}"):
        marker.unlink()
    assert "code was" in run(f"resume={all_runs(store)[-1].info.run_id}")


def test_tracking_can_be_turned_off(in_process: CommandLine, tmp_path: Path, store: str) -> None:
    done = in_process(*SHORT, "tracking=none")
    assert done.returncode == 0, done.stderr
    assert not all_runs(store)
    assert len(list((tmp_path / "outputs").glob("*/checkpoint.pt"))) == 1


def test_tuning_scores_validation_only(in_process: CommandLine, store: str, mnist_root: Path) -> None:
    done = in_process("data=mnist_tuning", "~phases.train")
    assert done.returncode == 0, done.stderr
    (run,) = all_runs(store)
    assert "val/accuracy" in run.data.metrics
    assert not any(key.startswith("test/") for key in run.data.metrics)
    assert {item.tags[0].value for item in run.inputs.dataset_inputs} == {"finetune", "validation"}


def test_without_mnist_the_run_warns_that_it_uses_digits(
    in_process: CommandLine, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MNIST_ROOT", raising=False)
    done = in_process("~phases.train", "data.download_root=/proc/nowhere")
    assert done.returncode == 0, done.stderr
    (run,) = all_runs(store)
    assert run.data.tags["data"] == run.data.params["data"] == "digits"
    assert "digits" in run.info.run_name
    for text in (done.stdout, run.data.tags["mlflow.note.content"]):
        assert "digits INSTEAD" in text


def test_a_run_that_diverges_is_recorded_and_not_resumed(in_process: CommandLine, store: str, tmp_path: Path) -> None:
    done = in_process("data=digits", "optimizer.lr=1e29", "scheduler=constant")
    assert done.returncode == 1
    assert "phase train, epoch 1, step" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Error executing job" not in done.stderr
    (run,) = all_runs(store)
    assert run.info.status == "FAILED"
    assert "DivergedError" in Path(MlflowClient(store).download_artifacts(run.info.run_id, "traceback.txt")).read_text()
    assert (tmp_path / "outputs" / run.info.run_id / run_dir.CHECKPOINT).exists()
    done = in_process("resume=latest")
    assert done.returncode == 1
    assert "resume=latest" in done.stderr


def test_a_signal_before_anything_is_recorded_advises_nothing(in_process: CommandLine, store: str, monkeypatch) -> None:
    monkeypatch.setattr(run_dir, "ensure_writable_dir", lambda _: signal.raise_signal(signal.SIGINT))
    done = in_process("data=digits")
    assert done.returncode == 128 + signal.SIGINT
    assert "`" not in done.stderr


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
    (run,) = all_runs(store)
    assert (run.info.status, run.data.params["model"]) == ("FINISHED", "plain_cnn")
    assert run.data.params["finetune.optimizer.betas"] == "[0.8, 0.9]"
    assert "test/accuracy" in run.data.metrics
