import io
import logging
import sys

import pytest
from hydra import compose, initialize_config_dir

from mnist_exp import CONF
from mnist_exp.cli import SafeOutput, safe_output
from mnist_exp.overrides import command
from mnist_exp.redaction import MASK, redact, redact_all, without_credentials
from mnist_exp.tracking.definition import Definition
from mnist_exp.tracking.provenance import command_line

MASKED = {
    "postgresql://user:password@host/db": "postgresql://***@host/db",
    "http://user:pa/ss@wo'rd@host:5000/#/x": "http://***@host:5000/#/x",
    "see http://token@host, or x@y": "see http://***@host, or x@y",
    "['tracking.uri=http://user:123@host']": "['tracking.uri=http://***@host']",
    '{"uri": "http://host:5000", "mail": "a@b"}': '{"uri": "http://host:5000", "mail": "a@b"}',
    "sqlite:////home/a@b/mlflow.db": "sqlite:////home/a@b/mlflow.db",
    "http://127.0.0.1:5000/#/experiments/1": "http://127.0.0.1:5000/#/experiments/1",
    "git@github.com:x/y": "git@github.com:x/y",
}


@pytest.mark.parametrize("text", MASKED)
def test_the_user_part_of_an_address_is_masked(text: str) -> None:
    assert redact(text) == MASKED[text]
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "GITHUB_TOKEN", "my_secret", "AWS_ACCESS_KEY_ID"])
def test_values_of_secret_variables_are_masked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "hunter/22")
    assert redact("it is hunter/22, or hunter%2F22") == f"it is {MASK}, or {MASK}"
    monkeypatch.setenv(name, "short")
    assert redact("short") == "short"


def test_nested_values_are_masked_and_others_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hunter22")
    value = {"a": ["http://u:p@h", 1, None, 0.5, True], "hunter22": ("x",)}
    assert redact_all(value) == {"a": ["http://***@h", 1, None, 0.5, True], MASK: ("x",)}


def test_an_address_can_be_had_without_its_user() -> None:
    assert without_credentials("http://user:password@host:5000") == "http://host:5000"
    assert without_credentials("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_output_and_logs_are_masked(capsys: pytest.CaptureFixture[str]) -> None:
    with safe_output():
        print("http://user:password@host")
        logger = logging.getLogger("test_redaction")
        logger.propagate = False  # others' handlers may hold the closed streams of other tests
        handler = logging.StreamHandler()
        logger.addHandler(handler)
        logger.warning("http://user:password@host")
        logger.removeHandler(handler)
    printed = capsys.readouterr()
    assert printed.out == printed.err == "http://***@host\n"


def test_a_closed_stream_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Closed())
    with safe_output():
        print("x", flush=True)
    assert SafeOutput(Closed()).write("abc") == 3


def test_ray_is_sent_no_credentials() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["hydra/launcher=ray_cluster", "tracking.uri='http://user:password@host:5000'"]
        config = compose("config", overrides, return_hydra_config=True)
    assert config.hydra.launcher.ray.init.runtime_env.env_vars.MLFLOW_TRACKING_URI == "http://host:5000"


@pytest.mark.parametrize("value", ["pass'word9", 'pass"word9', "p\u00e4ssword9", "first-line9\nsecond-line9", "trailing9\n"])
def test_values_are_masked_before_they_are_quoted_or_escaped(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", value)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "mnist_exp.run", f"output_dir={value}"])
    definition = Definition("Grid", 1, [f"output_dir={value}"], {}, [])
    patch = "".join(f"+{line}\n" for line in value.splitlines())
    for text in (command("run", f"output_dir={value}"), command_line(), definition.as_json(), redact(patch)):
        assert "word9" not in text
        assert "line9" not in text
        assert "trailing9" not in text
