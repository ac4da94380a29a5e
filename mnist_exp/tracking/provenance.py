"""The origin of a run: its code, command, packages and machine."""

import getpass
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from mnist_exp.paths import CHECKOUT, PACKAGE, without_credentials
from mnist_exp.tracking.tags import BRANCH, COMMIT, DIRTY, HOST, OUTPUT_DIR, PID, REPOSITORY, USER

SECRETS = (".env*", "*.pem", "*.key", "id_*", "*credentials*")  # never recorded, tracked or not
MAX_PATCH = 1_000_000  # bytes


def command_line() -> str:
    """Return the shell command that started this process."""
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


def user() -> str:
    """Return the name of the user, or `unknown`, such as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


@cache  # this process keeps the code that it has imported
def git_tags() -> dict[str, str]:
    """Return commit, branch and whether there are uncommitted changes; empty outside a git checkout of this project."""
    if CHECKOUT is None or not _is_top(CHECKOUT):
        return {}
    commit = _line(CHECKOUT, "rev-parse", "HEAD")
    if not commit:
        return {}
    repository = without_credentials(_line(CHECKOUT, "config", "--get", "remote.origin.url"))
    has_address = re.match(r"(https?|ssh)://|[\w.-]+@[\w.-]+:", repository)  # not the path of a folder
    return ({REPOSITORY: repository} if has_address else {}) | {
        COMMIT: commit,
        BRANCH: _line(CHECKOUT, "rev-parse", "--abbrev-ref", "HEAD"),
        DIRTY: str(bool(_git(CHECKOUT, "status", "--porcelain"))).lower(),
    }


def software() -> dict[str, str]:
    """Return the versions that affect a run's outcome: the digest of this package's code, and torch's version."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return {"code": digest.hexdigest()[:12], "torch": importlib.metadata.version("torch")}


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return in words which of the present values differ from earlier ones, empty without a difference."""
    return "; ".join(f"{name} was {before.get(name)}, is {value}" for name, value in now.items() if before.get(name) != value)


class Uncommitted(NamedTuple):
    """The difference between a checkout and its commit.

    Args:
        patch: For `git apply`, with bytes escaped that are not UTF-8.
        status: The names of all changed and untracked files, as `git status --porcelain` prints them.
    """

    patch: str
    status: str


@cache
def uncommitted(repository: Path | None = CHECKOUT) -> Uncommitted:
    """Return the changes of tracked files and the untracked .py and .yaml files as a patch, and the status of all files.

    The patch omits files that usually hold secrets (SECRETS), and whole files after MAX_PATCH bytes.
    """
    if repository is None or not _is_top(repository):
        return Uncommitted("", "")
    index = Path(_line(repository, "rev-parse", "--absolute-git-dir")) / "index"
    if not index.exists():
        return Uncommitted("", "")
    no_secrets = [f":(exclude,icase,glob)**/{pattern}{below}" for pattern in SECRETS for below in ("", "/**")]
    added = _git(repository, "ls-files", "--others", "--exclude-standard", "-z", "--", "*.py", "*.yaml", *no_secrets)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(index, folder))  # the user's own index must not change
        if added:
            literal = ("--literal-pathspecs", "add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul")
            _git(repository, *literal, index=copy, text=added)
        flags = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--binary")
        patch = _git(repository, "diff", *flags, "HEAD", "--", ".", *no_secrets, index=copy)
    if len(patch) > MAX_PATCH:
        patch = patch[: patch.rfind(b"\ndiff --git ", 0, MAX_PATCH) + 1]
    status = _git(repository, "status", "--porcelain")
    return Uncommitted(*(without_credentials(content.decode(errors="backslashreplace")) for content in (patch, status)))


@cache
def packages() -> str:
    """Return every installed distribution as name==version, a line each."""
    # The names of the folders say it (PEP 427). importlib.metadata would parse all files in them, which takes half a second.
    folders = [path.name.removesuffix(".dist-info") for entry in sys.path for path in Path(entry).glob("*.dist-info")]
    return "".join(f"{name}=={version}\n" for name, _, version in sorted({name.rpartition("-") for name in folders}))


def process_tags(output_dir: Path) -> dict[str, str]:
    """Return the process that works on a run, so that others can later find out whether it is alive."""
    return {
        HOST: platform.node(),
        PID: str(os.getpid()),
        OUTPUT_DIR: str(output_dir.absolute()),
        USER: user(),
    }


def machine_tags(device: torch.device) -> dict[str, str]:
    """Return versions, processor, cores, threads, memory and accelerator."""
    tags = {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "mlflow", "hydra-core")},
        "os": platform.platform(),
        # The same name may have different instructions, and then different last bits.
        "cpu": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
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


@cache
def _is_top(folder: Path) -> bool:
    """Return whether `folder` is the top of a git checkout, not a folder within another project's."""
    return _line(folder, "rev-parse", "--show-toplevel") == str(folder.resolve())


def _line(repository: Path, *arguments: str) -> str:
    return os.fsdecode(_git(repository, *arguments)).strip()


def _git(repository: Path, *arguments: str, index: Path | None = None, text: bytes = b"") -> bytes:
    """Return the output of a git command, which reads `text`; empty if the command fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of another repository
    if index:
        environment["GIT_INDEX_FILE"] = str(index)
    command = ["git", "-C", str(repository), *arguments]
    try:
        return subprocess.run(command, input=text, capture_output=True, timeout=30, check=True, env=environment).stdout
    except (OSError, subprocess.SubprocessError):
        return b""
