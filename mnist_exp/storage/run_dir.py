"""A run's folder below output_dir: find it, lock it against other processes, and write to it safely."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from mnist_exp.errors import ResumableError, UserError

CHECKPOINT = "checkpoint.pt"
PREVIOUS_CHECKPOINT = "checkpoint.previous.pt"
FINISHED = "finished"
DIVERGED = "diverged"
LOCK = "lock"
RUN_ID = re.compile("[0-9a-f]{32}")


def ensure_writable_dir(folder: Path) -> Path:
    """Create `folder` if it is missing; raises UserError unless it is writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        try:
            with create(probe) as file:
                file.write(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    return folder


def find_run(output_dir: Path, run: str) -> Path:
    """Return the folder of an unfinished run.

    Args:
        output_dir: The folder of all runs.
        run: The id of the run, a unique prefix of it, or `latest` for the run that was saved last and has not diverged: another
            training from its checkpoint would diverge again.

    Raises:
        UserError: There is no such run, or it has finished.
    """
    if run == "latest":
        saved = [path for name in (CHECKPOINT, PREVIOUS_CHECKPOINT) for path in output_dir.glob(f"*/{name}")]
        saved = [path for path in saved if not (is_complete(path.parent) or (path.parent / DIVERGED).exists())]
        saved = [path for path in saved if RUN_ID.fullmatch(path.parent.name)]  # no copies
        if not saved:
            raise UserError(
                f"resume=latest: no run in output_dir={output_dir} has a checkpoint to resume.",
                key="resume",
                value=run,
                remedy="Start a new run. One that diverged can be resumed by its id only.",
            )
        return max(saved, key=lambda path: path.stat().st_mtime).parent
    folder = output_dir / expand_id(output_dir, run)
    check_unfinished(folder)
    if not has_checkpoint(folder):
        found = ", ".join(sorted(path.parent.name for path in output_dir.glob(f"*/{CHECKPOINT}"))[:5]) or "none"
        raise UserError(
            f"resume={run}: output_dir={output_dir} has no such run with a checkpoint. Some that have one: {found}.",
            key="resume",
            value=run,
            remedy=f"If {run} is a sweep, use -m sweep.resume={run}.",
        )
    return folder


def expand_id(output_dir: Path, prefix: str) -> str:
    """Return the id of the run below `output_dir` that starts with `prefix`, or `prefix` if there is none.

    Raises UserError if several runs do.
    """
    found = sorted(path.name for path in output_dir.glob(f"{prefix}*") if RUN_ID.fullmatch(path.name))
    if len(found) > 1:
        raise UserError(f"{prefix} is ambiguous: it is the start of {', '.join(found[:5])}. Type more digits.")
    return found[0] if found else prefix


def is_complete(folder: Path) -> bool:
    """Return whether the run in `folder` is complete: finished, or pruned by a search."""
    return (folder / FINISHED).exists()


def check_unfinished(folder: Path) -> None:
    """Raise UserError if the run in `folder` is complete."""
    if is_complete(folder):
        raise UserError(
            f"resume={folder.name}: this run has finished; nothing is left to do.",
            key="resume",
            value=folder.name,
            remedy="Start a new run.",
        )


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Lock the run in `folder` until the block ends or this process dies; raises UserError if another process has it."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a symbolic link: expected a folder of the run itself, in output_dir.")
    ensure_writable_dir(folder)
    try:
        held = FileLock(folder / LOCK).acquire(timeout=1)  # not 0: `try_lock` takes the lock for a moment
    except Timeout as error:
        raise UserError(f"Another process works on run {folder.name}. Wait until it ends, or stop it.") from error
    with held:
        yield


@contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Yield whether the run in `folder` could be locked for the block: no process of this machine works on it."""
    try:
        held = FileLock(folder / LOCK).acquire(timeout=0)
    except (Timeout, OSError):  # in use, or the file of another user
        yield False
        return
    with held:
        yield True


def has_checkpoint(folder: Path) -> bool:
    """Return whether the run in `folder` can be resumed."""
    return (folder / CHECKPOINT).exists() or (folder / PREVIOUS_CHECKPOINT).exists()


def mark_complete(folder: Path) -> None:
    """Note that the run in `folder` is complete."""
    create(folder / FINISHED).close()


def mark_diverged(folder: Path) -> None:
    """Note that the training in `folder` has diverged."""
    create(folder / DIVERGED).close()


def create(path: Path) -> BinaryIO:
    """Open a new file for writing. An existing one is removed, so that nothing is written through a link."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def remove_folder(folder: Path) -> None:
    """Remove a folder with its content, or a link."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(folder: Path, error: Exception) -> ResumableError:
    """Return the error for a folder that cannot be written."""
    return ResumableError(
        f"output_dir: {folder} cannot be written: {error}. Expected a writable folder with free space: free some, or choose "
        "another folder with output_dir=/path."
    )
