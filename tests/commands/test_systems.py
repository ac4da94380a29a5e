"""Calls that other systems lack: without each, a run trains as with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import SHORT

pytestmark = pytest.mark.slow

# How to take a call away in a new process, before anything is imported.
NO_AFFINITY = "import os; del os.sched_getaffinity"
NO_HANGUP = "import signal; del signal.SIGHUP"
NO_FORKSERVER = "from multiprocessing import reduction; reduction.HAVE_SEND_HANDLE = False"
NO_SIGMASK = "import signal; del signal.pthread_sigmask"
NO_SYSCONF = "import os; del os.sysconf"
NO_GLIBC = """
import ctypes
class CDLL(ctypes.CDLL):
    def __init__(self, name, *args, **named):
        if name == "libc.so.6":
            raise OSError(name)
        super().__init__(name, *args, **named)
ctypes.CDLL = CDLL
"""
NO_PROC = """
import pathlib
read_text = pathlib.Path.read_text
def refuse(path, *args, **named):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(path)
    return read_text(path, *args, **named)
pathlib.Path.read_text = refuse
"""
NO_OPEN_FOLDERS = """
import os, sys
open_any = os.open
def refuse(path, *args, **named):
    if "/mnist_exp/storage/" in sys._getframe(1).f_code.co_filename and os.path.isdir(path):
        raise PermissionError(path)
    return open_any(path, *args, **named)
os.open = refuse
"""
WINDOWS = "\n".join([NO_AFFINITY, NO_HANGUP, NO_SIGMASK, NO_SYSCONF, NO_PROC, NO_OPEN_FOLDERS, NO_FORKSERVER])


def run(removed: str, here: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a new process without a call."""
    start = "import sys; sys.argv[0] = 'mnist-exp'\nfrom mnist_exp.run import main\nmain()"
    command = [sys.executable, "-c", f"{removed}\n{start}", *overrides, f"output_dir={here / 'outputs'}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=os.environ)


@pytest.mark.parametrize(
    "removed", [NO_HANGUP, NO_SYSCONF, NO_GLIBC, NO_PROC, NO_OPEN_FOLDERS, NO_FORKSERVER, WINDOWS],
    ids=["SIGHUP", "sysconf", "glibc", "proc", "open_folders", "forkserver", "windows"],
)  # fmt: skip
def test_a_run_trains_without(removed: str, store: str, tmp_path: Path) -> None:
    done = run(removed, tmp_path, *SHORT)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("outputs/*/checkpoint.pt"))


@pytest.mark.parametrize(
    ("removed", "more"), [(NO_AFFINITY, ()), (NO_HANGUP, ()), (WINDOWS, ("hydra/launcher=basic",))],
    ids=["sched_getaffinity", "SIGHUP", "windows"],
)  # fmt: skip
def test_a_sweep_runs_without(removed: str, more: tuple[str, ...], store: str, tmp_path: Path) -> None:
    done = run(removed, tmp_path, "-m", *SHORT, "seed=0,1", *more)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("outputs/*/checkpoint.pt"))) == 2


def test_without_forkserver_the_workers_name_the_remedy(store: str, tmp_path: Path) -> None:
    done = run(NO_FORKSERVER, tmp_path, "-m", *SHORT, "seed=0,1")
    assert done.returncode == 1
    assert "hydra/launcher=basic" in done.stderr
    assert "Traceback" not in done.stderr
