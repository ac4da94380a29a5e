"""Checkpoints: a run's configuration and state in one file, written whole or not at all, read without running code."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mnist_exp.errors import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """What it takes to rebuild a run: its id, its resolved configuration, and the state that `training.fit` reported."""

    run_id: str
    config: dict[str, Any]
    state: dict[str, Any]
    format_version: int = FORMAT_VERSION


def make_folder(folder: Path) -> Path:
    """Create `folder` and show that it can be written; raises UserError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` aside, then rename: `path` is always whole. Raises UserError if the disk refuses."""
    aside = path.with_name(f"{path.name}.partial")
    try:
        with aside.open("wb") as file:
            torch.save(asdict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        aside.unlink(missing_ok=True)
        raise _unwritable(path.parent, error) from error


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, its tensors on the CPU; raises UserError on what `save` did not write."""
    try:
        return Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file can fail anywhere within torch
        raise UserError(f"{path} is not a readable checkpoint: {error}") from error


def _unwritable(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"output_dir: {folder} cannot be written: {error}. Allowed is a folder with write permission and free space: "
        "make room there, or choose another with output_dir=/path."
    )
