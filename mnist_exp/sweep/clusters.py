"""Waits for jobs on clusters, whose launchers return or are stopped while jobs still wait or run."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module

from hydra.plugins.launcher import Launcher

from mnist_exp.paths import NAME
from mnist_exp.signals import Interrupted

PATIENCE = 120.0  # seconds for SLURM to answer


def until_all_ended(launcher: Launcher, sweep_id: str) -> AbstractContextManager[None]:
    """Leave the block when all jobs that it starts have ended; if it is stopped, cancel them, and raise Interrupted."""
    kind = type(launcher).__name__
    if kind == "SlurmLauncher":
        return _on_slurm(launcher, f"{NAME}_{sweep_id[:8]}")
    return _on_ray() if kind == "RayLauncher" else nullcontext()


@contextmanager
def _on_slurm(launcher: Launcher, name: str) -> Iterator[None]:
    launcher.params["name"] = name  # type: ignore[attr-defined]  # submitit's
    try:
        try:
            yield
        except Exception:  # of the first job that failed: others may still run
            _wait_on_slurm(name)
            raise
    except Interrupted:
        subprocess.run(["scancel", "--name", name], check=False)
        _wait_on_slurm(name)
        raise


def _wait_on_slurm(name: str) -> None:
    """Wait until no job has the name, or SLURM has not answered for a while."""
    answered = time.monotonic()
    while time.monotonic() < answered + PATIENCE:
        listed = subprocess.run(["squeue", "--noheader", "--name", name], capture_output=True, check=False)
        if listed.returncode == 0:
            answered = time.monotonic()
            if not listed.stdout:
                return
        time.sleep(1)


@contextmanager
def _on_ray() -> Iterator[None]:
    """Ray replaces the handlers of signals, and ends the jobs of a process that leaves it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stopped:
        import_module("ray").shutdown()
        signum = signal.SIGINT if isinstance(stopped, KeyboardInterrupt) else signal.SIGTERM
        raise (stopped if isinstance(stopped, Interrupted) else Interrupted(signum)) from None
