"""Keeps the exported graph of each architecture on disk: tracing takes seconds, and the graph does not depend on the weights.

MLflow's loaders evaluate expressions that a graph contains. The folder therefore belongs to the user alone, and this module
never reads a graph: it replaces the weights in the archive.
"""

import hashlib
import io
import json
import os
import platform
import stat
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from mnist_exp.paths import PACKAGE

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 32 * 2**20  # bytes of all files
WEIGHTS_CONFIG = "data/weights/model_weights_config.json"


def cache_folder() -> Path | None:
    """Return the folder of the cache, None if it cannot be created or if others can read or write it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnist_exp" / "graphs"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        shared = hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o077)
        return None if shared or not stat.S_ISDIR(status.st_mode) or not os.access(folder, os.W_OK) else folder
    except OSError:
        return None


def cache_key(architecture: str, example: bytes) -> str:
    """Return the name of a graph in the cache.

    Args:
        architecture: The configuration of the model and the shape of the data.
        example: The example that the export contains.
    """
    digest = hashlib.sha256(example)
    for path in sorted((PACKAGE / "learning").rglob("*.py")):
        digest.update(path.read_bytes())
    software = [version("torch"), version("mlflow"), sys.version, platform.machine()]
    digest.update(json.dumps([architecture, software]).encode())
    return digest.hexdigest()[:32]


@contextmanager
def lock_graph(key: str) -> Iterator[Path | None]:
    """Yield the file of a graph, which may be missing; None without a cache. Other processes wait instead of tracing, too."""
    folder = cache_folder()
    lock = FileLock(folder / "lock") if folder else None
    with ExitStack() as stack:
        try:
            if lock:
                stack.enter_context(lock)
        except (OSError, NotImplementedError):  # a full disk, or a file system without locks
            lock = None
        yield folder / f"{key}.zip" if folder and lock else None


def read_files(file: Path | None, names: set[str]) -> dict[str, bytes] | None:
    """Return the content of the files `names` of a cached export, None if it is missing or damaged."""
    if file is None:
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            files = {name: archive.read(name) for name in names}
        os.utime(file)  # the least recently used are deleted first
    except (OSError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError):
        return None
    return files


def write_files(file: Path | None, files: Mapping[str, bytes]) -> None:
    """Add an export to the cache, and delete the least recently used ones above `LIMIT`. A full disk is ignored."""
    if file is None:
        return
    tmp_path = file.with_suffix(".partial")
    with suppress(OSError):
        with zipfile.ZipFile(tmp_path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        tmp_path.replace(file)
        cached = sorted(file.parent.glob("*.zip"), key=lambda path: path.stat().st_mtime)
        size = sum(path.stat().st_size for path in cached)
        while size > LIMIT and len(cached) > 1:
            size -= cached[0].stat().st_size
            cached.pop(0).unlink()


def with_weights(graph: bytes, weights: "Mapping[str, Tensor]") -> bytes:
    """Return an archive of torch.export with other weights of the same shapes.

    Args:
        graph: The archive, in which each weight is a file of its own with the raw values.
        weights: The new weights by name, as in `state_dict`.

    Raises:
        KeyError: The archive contains a weight that `weights` lacks.
        ValueError: A shape differs.
    """
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(graph)) as old, zipfile.ZipFile(result, "w") as new:
        config = next(name for name in old.namelist() if name.endswith(WEIGHTS_CONFIG))
        folder = config.rpartition("/")[0]
        names = {f"{folder}/{entry['path_name']}": name for name, entry in json.loads(old.read(config))["config"].items()}
        for file in old.namelist():
            content = old.read(file)
            if file in names:
                values = weights[names[file]].detach().cpu().contiguous().numpy().tobytes()
                if len(values) != len(content):
                    raise ValueError(f"{names[file]} has {len(values)} bytes, expected {len(content)}.")
                content = values
            new.writestr(file, content)
    return result.getvalue()
