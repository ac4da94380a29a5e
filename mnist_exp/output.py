"""A run's folder under output_dir: finding it, keeping other processes off it, writing into it safely."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mnist_exp.errors import ResumableError, UserError

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
FINISHED = "finished"
LOCK = "lock"


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
        raise unwritable(folder, error) from error
    return folder


def find(output_dir: Path, run: str) -> Path:
    """Return the folder of the run with id `run`; `latest` is the one saved last that has not finished. Raises UserError."""
    if run == "latest":
        saved = [path for name in (NAME, PREVIOUS) for path in output_dir.glob(f"*/{name}")]
        saved = [path for path in saved if not is_finished(path.parent)]
        if not saved:
            raise UserError(f"resume=latest: no unfinished run has a checkpoint in output_dir={output_dir}. Start a new one.")
        return max(saved, key=lambda path: path.stat().st_mtime).parent
    folder = output_dir / run
    refuse_finished(folder)
    if not folder.is_dir():
        there = ", ".join(sorted(path.parent.name for path in output_dir.glob(f"*/{NAME}"))[:5]) or "none"
        raise UserError(f"resume={run}: there is no such run in output_dir={output_dir}; those with a checkpoint: {there}.")
    return folder


def is_finished(folder: Path) -> bool:
    """Return whether nothing is left to do for the run in `folder`."""
    return (folder / FINISHED).exists()


def refuse_finished(folder: Path) -> None:
    """Raise UserError if nothing is left to do for the run in `folder`."""
    if is_finished(folder):
        raise UserError(f"resume={folder.name}: this run has finished, so that nothing is left to do. Start a new one.")


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep every other process off the run in `folder`, until the block is left or this process dies. Raises UserError."""
    make_folder(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=1)  # not 0: `idle` takes the lock for a moment
    except Timeout as error:
        raise UserError(f"Run {folder.name} is being worked on by another process. Wait for it, or stop it first.") from error
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def idle(folder: Path) -> Iterator[bool]:
    """Yield whether no living process works on the run in `folder`, as far as this machine can see; none begins meanwhile."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # held, or another user's
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def has_checkpoint(folder: Path) -> bool:
    """Return whether the run in `folder` can be gone on with."""
    return (folder / NAME).exists() or (folder / PREVIOUS).exists()


def mark_finished(folder: Path) -> None:
    """Note that nothing is left to do for the run in `folder`."""
    (folder / FINISHED).touch()


def sync(path: Path) -> None:
    """Have the disk take what was written to a file, or which files a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable(folder: Path, error: Exception) -> ResumableError:
    """Return what to say of an output folder that refused a write."""
    return ResumableError(
        f"output_dir: {folder} cannot be written: {error}. Allowed is a folder with write permission and free space: "
        "make room there, or choose another with output_dir=/path."
    )
