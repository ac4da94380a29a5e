import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mnist_exp import checkpoint, output
from mnist_exp.checkpoint import Checkpoint
from mnist_exp.config import build
from mnist_exp.errors import UserError
from mnist_exp.output import NAME, PREVIOUS


def one(run_id: str = "abc", config: dict | None = None, state: dict | None = None) -> Checkpoint:
    return Checkpoint(
        run_id, config or {}, {"model": "se_cnn"}, ["seed=1"], {"train": "0"}, {}, state, [(1, {"a": 0.5})], {"train": 1.0}, 2.0
    )


def test_a_model_rebuilt_from_its_checkpoint_predicts_the_same(composed, tmp_path: Path) -> None:
    config = composed()
    model = build(config["model"], "model").eval()
    model.blocks[0].norm.running_mean.uniform_()
    checkpoint.save(tmp_path, one("abc", config, {"model": model.state_dict()}))

    loaded = checkpoint.load(tmp_path / NAME)
    rebuilt = build(loaded.config["model"], "model").eval()
    rebuilt.load_state_dict(loaded.state["model"])
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    assert rebuilt(images).equal(model(images))
    assert (loaded.run_id, loaded.config, loaded.history) == ("abc", config, [(1, {"a": 0.5})])


def test_saving_replaces_the_whole_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, one("first"))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(UserError, match=r"output_dir: .* cannot be written: No space left"):
        checkpoint.save(tmp_path, one("second"))
    assert checkpoint.load(tmp_path / NAME).run_id == "first"
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def forged(content: bytes, version: int = checkpoint.FORMAT_VERSION) -> bytes:
    import hashlib

    header = {"format_version": version, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return checkpoint.MAGIC + json.dumps(header).encode() + b"\n" + content


def bomb() -> bytes:
    buffer = io.BytesIO()
    torch.save({"run_id": Bomb()}, buffer)
    return forged(buffer.getvalue())


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda file: b"", "is not a checkpoint of this program"),
    "foreign": (lambda file: b"PK\x03\x04 something else", "is not a checkpoint of this program"),
    "a pickle": (lambda file: pickle.dumps(Bomb()), "is not a checkpoint of this program"),
    "a forged pickle": (lambda file: forged(pickle.dumps(Bomb())), "does not hold a checkpoint"),
    "forged code": (lambda file: bomb(), "does not hold a checkpoint"),
    "truncated": (lambda file: file[:-100], "is truncated"),
    "cut in the header": (lambda file: file[:40], "its header cannot be read"),
    "tampered with": (lambda file: file[:-50] + bytes([file[-50] ^ 1]) + file[-49:], "was changed after it was written"),
    "of another version": (lambda file: forged(b"", version=0), "has format version 0: this program reads 3"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_wrong_is_said_nothing_runs_and_the_last_good_one_is_used(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path, one("first"))
    checkpoint.save(tmp_path, one("second"))
    damage, message = DAMAGE[kind]
    (tmp_path / NAME).write_bytes(damage((tmp_path / NAME).read_bytes()))
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / NAME)
    good, problem = checkpoint.load_last_good(tmp_path)
    assert good.run_id == "first"
    assert problem is not None
    assert message in problem
    (tmp_path / PREVIOUS).unlink()
    with pytest.raises(UserError, match=message):
        checkpoint.load_last_good(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_good_one_before_it(tmp_path: Path) -> None:
    for name in ("first", "second"):
        checkpoint.save(tmp_path, one(name))
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:-100])
    checkpoint.save(tmp_path, one("third"))
    assert [checkpoint.load(tmp_path / name).run_id for name in (NAME, PREVIOUS)] == ["third", "first"]
    checkpoint.save(tmp_path, one("fourth"))
    assert [checkpoint.load(tmp_path / name).run_id for name in (NAME, PREVIOUS)] == ["fourth", "third"]


def test_no_credentials_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter22")
    checkpoint.save(tmp_path, one("first", {"tracking": {"uri": "http://user:password@host"}, "device": "hunter22"}))
    assert checkpoint.load(tmp_path / NAME).config == {"tracking": {"uri": "http://***@host"}, "device": "***"}
    assert not any(secret in (tmp_path / NAME).read_bytes() for secret in (b"password", b"hunter22"))


def test_a_run_is_held_by_one_process_and_freed_by_its_death(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from mnist_exp import checkpoint, output
with output.hold(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is being worked on by another process"), output.hold(tmp_path):
            pass
        holder.kill()
    with output.hold(tmp_path):
        pass


def test_the_latest_is_the_one_saved_last_that_has_not_finished(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old", "done")):
        (tmp_path / name).mkdir()
        checkpoint.save(tmp_path / name, one(name))
        os.utime(tmp_path / name / NAME, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "done" / NAME)
    output.mark_finished(tmp_path / "done")
    assert output.find(tmp_path, "latest").name == "new"
    with pytest.raises(UserError, match="this run has finished"):
        output.find(tmp_path, "done")
    with pytest.raises(UserError, match=r"there is no such run in .*those with a checkpoint: done, new, old"):
        output.find(tmp_path, "other")
    with pytest.raises(UserError, match="no unfinished run has a checkpoint"):
        output.find(tmp_path / "nowhere", "latest")
