"""Checkpoints: what it takes to go on with a run, in one file, written whole or not at all, read without running code.

A file is a line of magic, a line of JSON (format version, length and SHA-256 of the rest), then `torch.save` of plain values
and tensors. The last two are kept, so that a damaged one costs an epoch and not the run.
"""

import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mnist_exp.errors import UserError
from mnist_exp.output import NAME, PREVIOUS, sync, unwritable
from mnist_exp.overrides import check_stored
from mnist_exp.redaction import redact_all

MAGIC = b"mnist_exp checkpoint\n"
FORMAT_VERSION = 3


@dataclass(frozen=True)
class Checkpoint:
    """A run between two steps: its resolved configuration, and what `training.fit` reported up to here.

    choices: the option of each group; overrides: as given on the command line; digests: of the data's splits;
    software: what else decides the outcome, from `provenance.software`; state: of the last report, None before the first;
    history: (examples seen, metrics) of every report; seconds: of training by phase; elapsed: seconds of the whole run.
    """

    run_id: str
    config: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str]
    digests: dict[str, str]
    software: dict[str, str]
    state: dict[str, Any] | None
    history: list[tuple[int, dict[str, float]]]
    seconds: dict[str, float]
    elapsed: float


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` into `folder`, without credentials, and keep the good one before it.

    Raises UserError if the disk refuses.
    """
    buffer = io.BytesIO()
    texts = {name: redact_all(getattr(checkpoint, name)) for name in ("config", "choices", "overrides")}
    torch.save(asdict(checkpoint) | texts, buffer)
    content = buffer.getvalue()
    header = {"format_version": FORMAT_VERSION, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    aside = folder / f"{NAME}.partial"
    try:
        with aside.open("wb") as file:
            file.write(MAGIC + json.dumps(header).encode() + b"\n" + content)
            file.flush()
            os.fsync(file.fileno())
        if _is_whole(folder / NAME):  # a damaged one must not take the place of the good one before it
            (folder / NAME).replace(folder / PREVIOUS)
        aside.replace(folder / NAME)
        sync(folder)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise unwritable(folder, error) from error


def load_last_good(folder: Path) -> tuple[Checkpoint, str | None]:
    """Read the newest readable checkpoint in `folder`, and say what is wrong with a newer one; raises UserError on none."""
    problems: list[str] = []
    for name in (NAME, PREVIOUS):
        try:
            return load(folder / name), "\n".join(problems) or None
        except UserError as error:
            problems.append(str(error))
    raise UserError("\n".join(problems))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, its tensors on the CPU; raises UserError that says what is wrong with it."""
    from pydantic import TypeAdapter

    content = _content(path)
    try:
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        loaded = TypeAdapter(Checkpoint).validate_python(values)
    except Exception as error:  # only a forged file comes here, and it can fail anywhere within torch
        raise UserError(f"{path} does not hold a checkpoint: {type(error).__name__}.") from error
    check_stored(loaded.overrides, str(path))
    return loaded


def _content(path: Path) -> bytes:
    """Return what follows the header, checked against it; raises UserError."""
    try:
        file = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    magic, _, rest = file.partition(b"\n")
    if magic + b"\n" != MAGIC:
        raise UserError(f"{path} is not a checkpoint of this program: it does not begin with {MAGIC.decode().strip()!r}.")
    line, _, content = rest.partition(b"\n")
    try:
        header = json.loads(line)
        version, length, digest = header["format_version"], header["bytes"], header["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its header cannot be read.") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}: this program reads {FORMAT_VERSION}. Use the version that wrote it."
        )
    if len(content) != length:
        raise UserError(f"{path} is truncated: {len(content):,} of {length} bytes are there.")
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{path} was changed after it was written: its SHA-256 is not the one in its header.")
    return content


def _is_whole(path: Path) -> bool:
    try:
        _content(path)
    except UserError:
        return False
    return True
