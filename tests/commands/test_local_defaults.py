from pathlib import Path

import pytest
from conftest import CommandLine
from mlflow import MlflowClient
from processes import SHORT, local_defaults

from mnist_exp.cli import default_settings, find_store
from mnist_exp.composing import compose_recipe
from mnist_exp.paths import CONFIG_DIR, HOME, typed


def test_a_local_file_sets_defaults_that_the_command_line_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    content = "data: {root: /data/mnist}\ntracking: {uri: 'sqlite:////data/mlflow.db', experiment: mine}\noutput_dir: /data/runs"
    with local_defaults(content) as name:
        monkeypatch.setenv("MNIST_EXP_LOCAL", name)
        settings = compose_recipe("data.root=/other").settings
        assert settings.data["root"] == "/other"
        typed["output_dir"] = "/typed"
        for found in (settings, default_settings()):
            store = find_store(found)
            assert (store.uri, store.experiment) == ("sqlite:////data/mlflow.db", "mine")
        assert [str(found.output_dir) for found in (settings, default_settings())] == ["/data/runs", "/typed"]


def test_without_the_file_the_environment_and_the_repository_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert find_store().uri == f"sqlite:///{HOME / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert find_store().uri == "http://host"


def test_presets_and_the_command_line_override_the_tracker_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = tmp_path / "experiment" / "recorded.yaml"
    preset.parent.mkdir()
    preset.write_text("# @package _global_\ndefaults:\n  - override /tracking: mlflow\n")
    typed[CONFIG_DIR] = str(tmp_path)
    monkeypatch.setenv("MNIST_EXP_TRACKING", "none")
    chosen = [
        compose_recipe(*overrides).choices["tracking"] for overrides in ((), ("tracking=mlflow",), ("experiment=recorded",))
    ]
    assert chosen == ["none", "mlflow", "mlflow"]


def test_the_jobs_of_a_sweep_have_the_local_defaults(command_line: CommandLine, store: str) -> None:
    with local_defaults("seed: 7") as name:
        done = command_line("-m", *SHORT, "model=se_cnn,plain_cnn", MNIST_EXP_LOCAL=name)
    assert done.returncode == 0, done.stderr
    runs = MlflowClient(store).search_runs(["1"])
    assert [run.data.params["seed"] for run in runs if "model" in run.data.params] == ["7", "7"]
