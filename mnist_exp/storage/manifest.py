"""A folder's manifest: a format version, the checksum of every file, and the configuration that produced them.

The checksums detect damage. They are no signature: anyone who changes a file can write new ones.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from mnist_exp.errors import UserError

MANIFEST = "mnist_exp.json"
FORMAT_VERSION = 2
UNREAD = {"registered_model_meta"}  # MLflow adds it to a model that it downloads; this program never reads it
MAX_FILE_SIZE = 50_000_000  # bytes; our files have some 100,000
MAX_TEXT_SIZE = 1_000_000  # bytes


def write_manifest(folder: Path, config: dict[str, Any]) -> None:
    """Write the manifest of the files in `folder`."""
    manifest = {"format_version": FORMAT_VERSION, "sha256": _checksums(folder), "config": config}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


def verify_manifest(folder: Path, files: set[str], kind: str = "a model", limit: int = MAX_TEXT_SIZE) -> dict[str, Any]:
    """Return the configuration in the manifest of `folder`.

    Args:
        folder: The folder. Files that its manifest lists are never opened by that name, which could be any path.
        files: The paths of the files that the folder must consist of, besides the manifest.
        kind: What the folder contains, for messages.
        limit: The largest manifest, in bytes.

    Raises:
        UserError: The folder has other files, a file was changed, or the manifest is of another version.
    """
    try:
        manifest = json.loads(read_text_file(folder / MANIFEST, limit))
        version, expected, config = manifest["format_version"], manifest["sha256"], manifest["config"]
        if not isinstance(expected, dict) or not isinstance(config, dict):
            raise TypeError
    except OSError as error:
        raise UserError(f"{folder} is not {kind} exported by this program: {MANIFEST}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} is damaged: its {MANIFEST} is unreadable.") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has format version {version}, expected {FORMAT_VERSION}. Use the version that wrote it.")
    folders = {parent.as_posix() for name in files for parent in Path(name).parents}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_expected = path.is_dir() if name in folders else name in files | {MANIFEST} | UNREAD and path.is_file()
        if path.is_symlink() or not is_expected or (path.is_file() and path.stat().st_size > MAX_FILE_SIZE):
            raise UserError(f"{folder} is not {kind} exported by this program: {name!r} does not belong to one.")
    actual = _checksums(folder)
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            problem = "was added" if name not in expected else "is missing" if name not in actual else "was changed"
            raise UserError(f"{folder} was changed after it was written: {name!r} {problem}.")
    for name in sorted(files - actual.keys()):
        raise UserError(f"{folder} is not {kind} exported by this program: {name!r} is missing.")
    return config


def read_text_file(path: Path, limit: int = MAX_TEXT_SIZE) -> bytes:
    """Return the content of a file; raises ValueError if it is a link or larger than `limit` bytes."""
    if path.is_symlink() or path.stat().st_size > limit:
        raise ValueError
    return path.read_bytes()


def _checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in `folder` except the manifest and `UNREAD`, by relative path."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name not in {MANIFEST} | UNREAD
    }
