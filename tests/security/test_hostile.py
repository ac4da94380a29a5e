"""Input that nobody sends by mistake: each ends in a UserError or a correct result, writes nothing, and runs no code."""

import contextlib
from pathlib import Path

import pytest
from conftest import CommandLine
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mnist_exp.composing import compose_recipe
from mnist_exp.errors import UserError
from mnist_exp.settings import Recipe
from mnist_exp.storage import checkpoint
from mnist_exp.storage.checkpoint import Checkpoint
from mnist_exp.storage.run_dir import CHECKPOINT

pytestmark = pytest.mark.slow  # 700 inputs in a minute
PATIENT = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
EDITS = st.lists(st.tuples(st.integers(0, 10**7), st.binary(min_size=0, max_size=4), st.integers(0, 4)), min_size=1, max_size=4)


def edited(content: bytes, edits: list[tuple[int, bytes, int]]) -> bytes:
    """Replace some bytes at each of the positions by others, of perhaps another length."""
    for position, replacement, length in edits:
        start = position % (len(content) + 1)
        content = content[:start] + replacement + content[start + length :]
    return content


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("saved")
    checkpoint.save(folder, Checkpoint("abc", Recipe(compose_recipe().settings), {}, None, [(1, {"a": 0.5})], {}, 0.0))
    return (folder / CHECKPOINT).read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=PATIENT)
@given(edits=EDITS)
def test_edited_checkpoints(saved: bytes, tmp_path: Path, edits: list[tuple[int, bytes, int]]) -> None:
    """Each is refused, or differs where no value is."""
    (tmp_path / "saved").write_bytes(saved)
    (tmp_path / CHECKPOINT).write_bytes(edited(saved, edits))
    with contextlib.suppress(UserError):
        assert checkpoint.load(tmp_path / CHECKPOINT) == checkpoint.load(tmp_path / "saved")


@settings(max_examples=200, deadline=None, suppress_health_check=PATIENT)
@given(content=st.binary(max_size=300))
@example(content=b"PK\x05\x06" + bytes(18))  # an empty archive
def test_any_bytes_as_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / CHECKPOINT)


KEYS = st.sampled_from(
    ["seed", "batch_size", "optimizer.lr", "optimizer", "model", "model.channels", "data.root", "phases", "phases.train.split",
     "phases.train", "precision", "resume", "tracking.uri", "+phases.x", "++model._target_", "~data", "+x", "save_every"]
)  # fmt: skip
VALUES = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["null", "[]", "{}", "{a:1}", "[[1]]", "${seed}", "${oc.env:HOME}", "${nope}", "os.system", "../..", "''", "1e999"]
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=PATIENT)
@given(overrides=st.lists(st.one_of(st.builds("{}={}".format, KEYS, VALUES), st.text(max_size=15)), min_size=1, max_size=3))
def test_any_command_line(overrides: list[str]) -> None:
    """Composed, or refused by us, or with one of the exceptions by which Hydra refuses a value."""
    with contextlib.suppress(UserError, ValueError, AttributeError, TypeError):
        assert compose_recipe(*overrides).settings.batch_size >= 1


@settings(max_examples=40, deadline=None, suppress_health_check=PATIENT)
@given(overrides=st.lists(st.builds("{}={}".format, KEYS, VALUES), min_size=1, max_size=2))
def test_any_run(overrides: list[str], in_process: CommandLine, store: str, tmp_path: Path, monkeypatch) -> None:
    """From the command line to its end: status 0 or 1, no stack trace, and not a file outside the output folder and the store."""
    here = tmp_path / "here"
    here.mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    done = in_process("data=digits", "~phases.train", "phases.finetune.epochs=1", *overrides)
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr
    assert not list(here.iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {"here", "outputs", "mlartifacts", "mlflow.db", "mlflow.db.lock"}
