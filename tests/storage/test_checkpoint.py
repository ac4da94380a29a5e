import io
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MNIST, MNIST_SHAPE, Bomb, Compose

from mnist_exp.composing import compose_recipe
from mnist_exp.errors import ResumableError, UserError
from mnist_exp.nodes import build
from mnist_exp.settings import Recipe
from mnist_exp.storage import checkpoint, run_dir
from mnist_exp.storage.checkpoint import Checkpoint
from mnist_exp.storage.run_dir import CHECKPOINT, PREVIOUS_CHECKPOINT


@cache
def default_recipe() -> Recipe:
    return Recipe(compose_recipe().settings, {"model": "se_cnn"}, ["seed=1"])


def one(run_id: str = "abc", recipe: Recipe | None = None, state: dict | None = None) -> Checkpoint:
    return Checkpoint(run_id, recipe or default_recipe(), {}, state, [(1, {"a": 0.5})], {"train": 1.0}, 2.0)


def test_a_model_rebuilt_from_its_checkpoint_predicts_the_same(composed: Compose, tmp_path: Path) -> None:
    recipe = Recipe(composed().model_copy(update={"data_description": MNIST}))
    model = build(recipe.settings.model, "model", **MNIST_SHAPE).eval()
    model.blocks[0].norm.running_mean.uniform_()
    checkpoint.save(tmp_path, one("abc", recipe, {"model": model.state_dict()}))

    loaded = checkpoint.load(tmp_path / CHECKPOINT)
    rebuilt = build(loaded.recipe.settings.model, "model", **loaded.recipe.settings.data_description.shape).eval()
    rebuilt.load_state_dict(loaded.state["model"])
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    assert rebuilt(images).equal(model(images))
    assert (loaded.run_id, loaded.recipe, loaded.history) == ("abc", recipe, [(1, {"a": 0.5})])


def test_saving_replaces_the_whole_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, one("first"))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(ResumableError):
        checkpoint.save(tmp_path, one("second"))
    assert checkpoint.load(tmp_path / CHECKPOINT).run_id == "first"
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]


def forged(**values: object) -> bytes:
    """A file with a right format and checksums, and other values."""
    buffer = io.BytesIO()
    torch.save(vars(one()) | {"recipe": default_recipe().as_json()} | values, buffer)
    return buffer.getvalue()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda file: b"",
    "foreign": lambda file: b"PK\x03\x04 something else",
    "a pickle": lambda file: pickle.dumps(Bomb()),
    "forged code": lambda file: forged(run_id=Bomb()),
    "without values": lambda file: forged(history=None),
    "truncated": lambda file: file[:-100],
    "tampered with": lambda file: file.replace(b"first phase", b"other phase"),
    "of another version": lambda file: forged(recipe=json.dumps(json.loads(default_recipe().as_json()) | {"format": 7})),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_or_forged_checkpoint_runs_nothing_and_the_previous_one_is_used(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path, one("first"))
    checkpoint.save(tmp_path, one("second", state={"phase": "first phase"}))
    (tmp_path / CHECKPOINT).write_bytes(DAMAGE[kind]((tmp_path / CHECKPOINT).read_bytes()))
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path / CHECKPOINT)
    assert checkpoint.load_latest_intact(tmp_path).run_id == "first"
    assert str(error.value) in capsys.readouterr().err
    (tmp_path / PREVIOUS_CHECKPOINT).unlink()
    with pytest.raises(UserError):
        checkpoint.load_latest_intact(tmp_path)
    assert not (tmp_path / "exploded").exists()


def archive(values: object, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return what `torch.save` writes, with compressed entries if wanted."""
    buffer, result = io.BytesIO(), io.BytesIO()
    torch.save(values, buffer)
    with zipfile.ZipFile(buffer) as original, zipfile.ZipFile(result, "w", compression) as copy:
        for entry in original.infolist():
            copy.writestr(entry.filename, original.read(entry))
    return result.getvalue()


def overlapping() -> bytes:
    """Return an archive that names one entry many times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as result:
        result.writestr("zeros", bytes(10**6))
        result.filelist *= 1000
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["compressed", "overlapping"])
def test_a_small_file_does_not_fill_the_memory(kind: str, tmp_path: Path) -> None:
    zeros = {"zeros": torch.zeros(10**8, dtype=torch.uint8)}
    (tmp_path / CHECKPOINT).write_bytes(archive(zeros, zipfile.ZIP_DEFLATED) if kind == "compressed" else overlapping())
    tracemalloc.start()
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / CHECKPOINT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7


def test_torch_reads_the_entries_that_are_checked(tmp_path: Path) -> None:
    """In a file with two directories of entries, torch itself takes the first one, whose entries nobody has checked."""
    unchecked = archive(torch.zeros(10**8, dtype=torch.uint8), zipfile.ZIP_DEFLATED)
    size = 10**5 + len(unchecked) - len(archive(torch.ones(10**5, dtype=torch.uint8)))
    checked = archive(torch.ones(size, dtype=torch.uint8))
    assert len(checked) == len(unchecked), "the end of the second names the place of both directories"
    (tmp_path / CHECKPOINT).write_bytes(unchecked + checked)
    assert torch.load(checkpoint.read_archive(tmp_path / CHECKPOINT), weights_only=True).equal(torch.ones(size))


def test_a_damaged_checkpoint_does_not_replace_the_previous_good_one(tmp_path: Path) -> None:
    for name in ("first", "second"):
        checkpoint.save(tmp_path, one(name))
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:-100])
    checkpoint.save(tmp_path, one("third"))
    assert [checkpoint.load(tmp_path / name).run_id for name in (CHECKPOINT, PREVIOUS_CHECKPOINT)] == ["third", "first"]
    checkpoint.save(tmp_path, one("fourth"))
    assert [checkpoint.load(tmp_path / name).run_id for name in (CHECKPOINT, PREVIOUS_CHECKPOINT)] == ["fourth", "third"]


def test_a_run_is_locked_by_one_process_and_unlocked_by_its_death(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from mnist_exp.storage import run_dir
with run_dir.lock_run(Path({str(tmp_path)!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError), run_dir.lock_run(tmp_path):
            pass
        holder.kill()
    with run_dir.lock_run(tmp_path):
        pass


def test_the_latest_is_the_one_saved_last_that_has_neither_finished_nor_diverged(tmp_path: Path) -> None:
    diverged, done, new, old = (digit * 32 for digit in "abcd")
    for age, name in enumerate(("a copy", diverged, done, new, old)):
        (tmp_path / name).mkdir()
        checkpoint.save(tmp_path / name, one(name))
        os.utime(tmp_path / name / CHECKPOINT, (1e9 - age, 1e9 - age))
    run_dir.mark_complete(tmp_path / done)
    run_dir.mark_diverged(tmp_path / diverged)
    assert run_dir.find_run(tmp_path, "latest").name == new
    assert run_dir.find_run(tmp_path, diverged).name == diverged, "by its id"
    for name in (new, old):
        run_dir.mark_complete(tmp_path / name)
    for folder, name in ((tmp_path, done), (tmp_path, "e" * 32), (tmp_path, "latest"), (tmp_path / "nowhere", "latest")):
        with pytest.raises(UserError) as error:
            run_dir.find_run(folder, name)
        assert (error.value.key, error.value.value) == ("resume", name)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f"{CHECKPOINT}.partial").symlink_to(outside)
    (folder / run_dir.FINISHED).symlink_to(tmp_path / "created")
    checkpoint.save(folder, one())
    run_dir.mark_complete(folder)
    assert outside.read_text() == "untouched"
    assert not (tmp_path / "created").exists()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError), run_dir.lock_run(tmp_path / "link"):
        pass


def test_a_state_that_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    """Not only when the run is resumed, and all is lost."""
    checkpoint.save(tmp_path, one("good"))
    with pytest.raises(UserError) as error:
        checkpoint.save(tmp_path, one("bad", state={"callbacks": {"mine": {"best": np.float64(1.5)}}}))
    assert "state_dict" in error.value.remedy
    assert checkpoint.load(tmp_path / CHECKPOINT).run_id == "good"
