"""The exported model's folder: written aside, sealed with its checksums and its configuration, renamed; checked when read."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mnist_exp.errors import UserError
from mnist_exp.output import sync, unwritable

FORMAT_VERSION = 1
SEAL = "mnist_exp.json"


def save(folder: Path, config: dict[str, Any], write: Callable[[Path], object]) -> None:
    """Have `write` fill a folder, and put it in the place of `folder` once it is whole and on the disk; raises UserError."""
    aside = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        write(aside)
        seal = {"format_version": FORMAT_VERSION, "sha256": _digests(aside), "config": config}
        (aside / SEAL).write_text(json.dumps(seal, indent=2))
        for path in (*aside.rglob("*"), aside):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)
        sync(folder.parent)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise unwritable(folder, error) from error


def verify(folder: Path) -> dict[str, Any]:
    """Return the configuration of the model in `folder`; raises UserError that says what is wrong with the folder."""
    try:
        seal = json.loads((folder / SEAL).read_bytes())
        version, noted, config = seal["format_version"], seal["sha256"], seal["config"]
        if not isinstance(noted, dict) or not isinstance(config, dict):
            raise TypeError
    except OSError as error:
        raise UserError(f"{folder} is not a model exported by this program: {SEAL} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} is damaged: its {SEAL} cannot be understood.") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} has format version {version}: this program reads {FORMAT_VERSION}. Use the version that wrote it."
        )
    there = _digests(folder)  # what the seal names is never opened: it could name anything
    for name in sorted(there.keys() | noted.keys()):
        if there.get(name) != noted.get(name):
            what = "was changed" if name in there and name in noted else "is missing" if name in noted else "was added"
            raise UserError(f"{folder} was changed after it was written: {name!r} {what}.")
    return dict(config)


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in `folder` but the seal, by its path within."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name != SEAL}
