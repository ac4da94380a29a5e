"""Where a run comes from: the code, the command, the packages, the machine."""

import getpass
import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_exp import ROOT

if TYPE_CHECKING:
    import torch


def command_line() -> str:
    """Return the command that started this process, as one would type it."""
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


def user() -> str:
    """Return the name of the user, or of nobody where the system knows none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


@cache  # of the code that this process has imported
def git_tags() -> dict[str, str]:
    """Return commit, branch and whether the tree differs from the commit; empty outside of a git checkout."""
    commit = _git("rev-parse", "HEAD").strip()
    if not commit:
        return {}
    return {
        "mlflow.source.git.commit": commit,
        "git.branch": _git("rev-parse", "--abbrev-ref", "HEAD").strip(),
        "git.dirty": str(bool(_git("status", "--porcelain"))).lower(),
    }


def software() -> dict[str, str]:
    """Return what, beside configuration and data, decides a run's outcome: the digest of this package, and torch's version."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return {"code": digest.hexdigest()[:12], "torch": importlib.metadata.version("torch")}


@cache
def uncommitted() -> str:
    """Return what differs from the commit as a patch for `git apply`, untracked files included, non-UTF-8 bytes escaped."""
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"  # a copy, in which untracked files can be announced without touching the user's own
        git_dir = _git("rev-parse", "--absolute-git-dir").strip()
        if not git_dir or not (Path(git_dir) / "index").exists():
            return ""
        shutil.copyfile(Path(git_dir) / "index", index)
        _git("add", "--intent-to-add", "--all", index=index)
        return _git("diff", "--binary", "--no-color", "--no-ext-diff", "HEAD", index=index)


@cache
def packages() -> str:
    """Return every installed distribution as name==version, a line each."""
    installed = {f"{dist.metadata['Name']}=={dist.version}" for dist in importlib.metadata.distributions()}
    return "\n".join(sorted(installed, key=str.lower)) + "\n"


def owner_tags(output_dir: Path) -> dict[str, str]:
    """Return which process works on a run, where, and by which command: what tells later whether it still lives."""
    return {
        "host": platform.node(),
        "pid": str(os.getpid()),
        "output_dir": str(output_dir.absolute()),
        "mlflow.user": user(),
        "mlflow.source.name": command_line(),
    }


def machine_tags(device: "torch.device") -> dict[str, str]:
    """Return versions, processor, cores, threads, memory and accelerator."""
    import torch

    tags = {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "mlflow", "hydra-core")},
        "os": platform.platform(),
        "cpu": _processor(),
        "cpu.cores": str(os.cpu_count()),
        "cpu.threads": str(torch.get_num_threads()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
    }
    if device.type == "cuda":
        tags["gpu"] = torch.cuda.get_device_name(device)
    return tags


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str, index: Path | None = None) -> str:
    environment = os.environ | ({"GIT_INDEX_FILE": str(index)} if index else {})
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="backslashreplace")
