"""Checkpoints: all that a run needs to resume, in one file that is written atomically and read without executing code.

A file is `torch.save` of plain values and tensors, a zip archive whose checksums find damage. The last two files are kept, so
that a damaged one costs an epoch and not the run.
"""

import io
import os
import pickle
import re
import sys
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from mnist_exp.errors import UserError
from mnist_exp.settings import Recipe, read_recipe
from mnist_exp.storage.run_dir import CHECKPOINT, PREVIOUS_CHECKPOINT, create, disk_error, sync


@dataclass(frozen=True)
class Checkpoint:
    """A run between two steps.

    Args:
        run_id: The id of the run, empty for a new one.
        recipe: The recipe, in the file as JSON.
        software: The versions and the threads that affect the outcome, from `provenance.software`; empty for a new run.
        state: The state in the last report of `training.fit`, None before the first.
        history: (examples seen, metrics) of every report.
        seconds: Seconds of training by phase.
        elapsed: Seconds of the whole run.
        phase_starts: The examples seen at the start of each phase.
    """

    run_id: str
    recipe: Recipe
    software: dict[str, str] = field(default_factory=dict)
    state: dict[str, Any] | None = None
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    elapsed: float = 0.0
    phase_starts: dict[str, int] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `folder`, and keep the previous good one; raises UserError."""
    values = vars(checkpoint) | {"recipe": checkpoint.recipe.as_json()}
    buffer = io.BytesIO()
    torch.save(values, buffer)
    try:  # what could not be read would be found when all is lost
        torch.load(io.BytesIO(buffer.getvalue()), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UserError(
            f"The state of the training could not be read from a checkpoint: it contains {found[1] if found else 'an object'}.",
            remedy="Let state_dict of your callback, optimizer or scheduler return plain values and tensors only.",
        ) from error
    tmp_path = folder / f"{CHECKPOINT}.partial"
    try:
        with create(tmp_path) as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        with suppress(UserError):  # a damaged one must not replace the previous good one
            read_archive(folder / CHECKPOINT)
            (folder / CHECKPOINT).replace(folder / PREVIOUS_CHECKPOINT)
        tmp_path.replace(folder / CHECKPOINT)
        sync(folder)
    except OSError as error:
        tmp_path.unlink(missing_ok=True)
        raise disk_error(folder, error) from error


def load_latest_intact(folder: Path) -> Checkpoint:
    """Return the newest intact checkpoint in `folder`, with a warning if a newer one is damaged; raises UserError without one."""
    try:
        return load(folder / CHECKPOINT)
    except UserError as error:
        if not (folder / PREVIOUS_CHECKPOINT).exists():
            raise
        previous = load(folder / PREVIOUS_CHECKPOINT)
        print(f"{error}\nResuming from the checkpoint before it.", file=sys.stderr)
        return previous


def load(path: Path) -> Checkpoint:
    """Return a checkpoint with its tensors on the CPU; raises UserError with its problem."""
    archive = read_archive(path)
    try:
        values = torch.load(archive, map_location="cpu", weights_only=True)
        recipe = read_recipe(values["recipe"], str(path))
        return TypeAdapter(Checkpoint).validate_python(values | {"recipe": recipe})
    except UserError:
        raise
    except Exception as error:  # only a forged file gets here, and it can fail anywhere within torch
        raise UserError(f"{path} does not contain a checkpoint: {type(error).__name__}.") from error


def read_archive(path: Path) -> io.BytesIO:
    """Return a copy of a file that `torch.save` has written, for `torch.load`, after its checksums are found right.

    Nothing is decompressed: a small file could fill the memory. torch gets a copy because it may find other entries in a forged
    file than `zipfile`, which checks them.

    Raises:
        UserError: The file cannot be read, is damaged, or has compressed or overlapping entries.
    """
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as copied:
            entries = archive.infolist()
            is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not is_stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise zipfile.BadZipFile("it has compressed or overlapping entries")
            for entry in entries:
                copied.writestr(entry.filename, archive.read(entry))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # zipfile raises exceptions of several kinds
        raise UserError(f"{path} is damaged: {error}.") from error
    copy.seek(0)
    return copy
