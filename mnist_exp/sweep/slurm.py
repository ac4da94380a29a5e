"""What submitit leaves open for sweeps on SLURM: it returns, or is stopped, while jobs still wait or run."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.plugins.launcher import Launcher

from mnist_exp.paths import NAME
from mnist_exp.signals import Interrupted


@contextmanager
def until_all_ended(launcher: Launcher, sweep_id: str) -> Iterator[None]:
    """Name the jobs that the block submits after their sweep, and leave it when all have ended.

    If the sweep is stopped, its jobs are cancelled. Does nothing for another launcher than submitit's for SLURM.
    """
    if type(launcher).__name__ != "SlurmLauncher":
        yield
        return
    name = f"{NAME}_{sweep_id[:8]}"
    launcher.params["name"] = name  # type: ignore[attr-defined]  # submitit's
    try:
        yield
    except Interrupted:
        subprocess.run(["scancel", "--name", name], check=False)
        raise
    finally:
        while subprocess.run(["squeue", "--noheader", "--name", name], capture_output=True, check=False).stdout:
            time.sleep(1)
