from pathlib import Path

import pytest
import torch

from mnist_exp import checkpoint
from mnist_exp.checkpoint import Checkpoint
from mnist_exp.config import build
from mnist_exp.errors import UserError


def test_a_model_rebuilt_from_its_checkpoint_predicts_the_same(composed, tmp_path: Path) -> None:
    config = composed()
    model = build(config["model"], "model").eval()
    model.blocks[0].norm.running_mean.uniform_()
    checkpoint.save(tmp_path / "checkpoint.pt", Checkpoint("abc", config, {"model": model.state_dict()}))

    loaded = checkpoint.load(tmp_path / "checkpoint.pt")
    rebuilt = build(loaded.config["model"], "model").eval()
    rebuilt.load_state_dict(loaded.state["model"])
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    assert rebuilt(images).equal(model(images))
    assert (loaded.run_id, loaded.config) == ("abc", config)


def test_saving_replaces_the_whole_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, Checkpoint("first", {}, {}))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(UserError, match=r"output_dir: .* cannot be written: No space left"):
        checkpoint.save(path, Checkpoint("second", {}, {}))
    assert checkpoint.load(path).run_id == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 nor this"])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(UserError, match="is not a readable checkpoint"):
        checkpoint.load(tmp_path / "checkpoint.pt")
