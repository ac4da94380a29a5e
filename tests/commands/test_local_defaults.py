from collections.abc import Iterator

import pytest
from conftest import CommandLine
from hydra import compose, initialize_config_dir

from mnist_exp.overrides import default_store, store_uri
from mnist_exp.paths import CONF


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file with defaults of one's own."""
    file = CONF / "local" / "test.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        "# @package _global_\n"
        "data: {root: /data/mnist}\n"
        "tracking: {uri: 'sqlite:////data/mlflow.db'}\n"
        "hydra: {launcher: {processes: 3}}\n"
    )
    monkeypatch.setenv("MNIST_EXP_LOCAL", "test")
    yield
    file.unlink()
    if not list(file.parent.iterdir()):
        file.parent.rmdir()


def test_a_local_file_sets_defaults_that_the_command_line_overrides(local: None) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["data.root=/other"], return_hydra_config=True)
        assert (config.data.root, config.tracking.uri, config.hydra.launcher.processes) == (
            "/other",
            "sqlite:////data/mlflow.db",
            3,
        )
        assert compose("compare").tracking.uri == "sqlite:////data/mlflow.db"
    assert store_uri() == "sqlite:////data/mlflow.db"


def test_without_the_file_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store_uri() == default_store()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert store_uri() == "http://host"


def test_compare_ignores_the_keys_of_the_run_command(local: None, in_process: CommandLine, capfd) -> None:
    import sys

    from mnist_exp.compare import main

    for arguments, expected in ((["x=1"], "x is not a key"), (["+x=1"], "x=1 is invalid"), (["~sweep"], "removes sweep")):
        sys.argv = ["compare", *arguments]
        with pytest.raises(SystemExit):
            main()
        assert expected in capfd.readouterr().err
