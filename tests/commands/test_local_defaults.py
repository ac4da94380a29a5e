import pytest
from processes import local_defaults

from mnist_exp.cli import default_settings, find_store
from mnist_exp.composing import compose_recipe
from mnist_exp.paths import HOME, typed


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
