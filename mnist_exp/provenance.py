"""Where a run comes from: the code, the command, the packages, the machine."""

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
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mnist_exp import CHECKOUT, PACKAGE

if TYPE_CHECKING:
    import torch

SOURCES = (
    "mnist_exp",
    "conf",
    "scripts",
    "tests",
)  # untracked files in these folders are recorded whole, if they are source code
SOURCE_SUFFIXES = (".py", ".yaml", ".yml", ".html", ".sh", ".toml")
SECRETS = (".env*", "*.pem", "*.key", "id_*", "*credentials*")  # never recorded, tracked or not
MOST_PATCH = 1_000_000  # bytes in all
MOST_NOTEBOOK = 100_000  # bytes
MOST_DIGESTED = 100_000_000  # bytes in all
MOST_LISTED = 1_000  # files


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
    """Return commit, branch and whether the tree differs from the commit; empty outside of a git checkout of this project."""
    if CHECKOUT is None or not _is_top(CHECKOUT):
        return {}
    commit = _line(CHECKOUT, "rev-parse", "HEAD")
    if not commit:
        return {}
    return {
        "mlflow.source.git.commit": commit,
        "git.branch": _line(CHECKOUT, "rev-parse", "--abbrev-ref", "HEAD"),
        "git.dirty": str(bool(_git(CHECKOUT, "status", "--porcelain"))).lower(),
    }


def software() -> dict[str, str]:
    """Return what, beside configuration and data, decides a run's outcome: the digest of this package, and torch's version."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.glob("*.py")):
        digest.update(path.read_bytes())
    return {"code": digest.hexdigest()[:12], "torch": importlib.metadata.version("torch")}


class Uncommitted(NamedTuple):
    """How a checkout differs from its commit.

    patch: for `git apply`, bytes that are not UTF-8 escaped; unrecorded: the files that it leaves out, and why, a line each.
    """

    patch: str
    unrecorded: str


@cache
def uncommitted(repository: Path | None = CHECKOUT) -> Uncommitted:
    """Return the changes of tracked files and the untracked source files as a patch, and the names of all that it leaves out.

    Files that may hold secrets (SECRETS) are never part of it, nor are large notebooks, nor more than MOST_PATCH bytes.
    """
    if repository is None or not _is_top(repository):
        return Uncommitted("", "")
    git_dir = Path(_line(repository, "rev-parse", "--absolute-git-dir"))
    if not (git_dir / "index").exists():
        return Uncommitted("", "")
    untracked = _paths(repository, "ls-files", "--others", "--exclude-standard", "-z")
    tracked = _paths(repository, "diff", "--name-only", "--no-renames", "-z", "HEAD")
    left_out = {name: why for name in untracked if (why := _why_left_out(repository, name, is_tracked=False))}
    added = [name for name in untracked if name not in left_out]
    too_large = {name: why for name in tracked if (why := _why_left_out(repository, name, is_tracked=True))}
    wanted = [".", *(f":(exclude,icase,glob)**/{pattern}{below}" for pattern in SECRETS for below in ("", "/**"))]
    wanted += [f":(exclude,literal){name}" for name in too_large]
    left_out |= too_large
    flags = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-renames")
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"  # a copy, in which untracked files can be announced without touching the user's own
        shutil.copyfile(git_dir / "index", index)
        if added:
            announce = ("add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul")
            _git(repository, "--literal-pathspecs", *announce, index=index, paths=added)
        changed = _paths(repository, "diff", *flags, "--name-only", "-z", "HEAD", "--", *wanted, index=index)
        content = _git(repository, "diff", *flags, "--binary", "HEAD", "--", *wanted, index=index, most=MOST_PATCH + 1)
    if len(content) > MOST_PATCH:
        content = content[: content.rfind(b"\ndiff --git ") + 1]  # the last file may be cut off
        kept = len(re.findall(rb"^diff --git ", content, re.MULTILINE))
        left_out |= dict.fromkeys(changed[kept:], f"the patch would exceed {MOST_PATCH:,} bytes")
    patch = content.decode(errors="backslashreplace")
    return Uncommitted(patch, "".join(_described(repository, left_out)))


def _why_left_out(repository: Path, name: str, *, is_tracked: bool) -> str | None:
    """Return why the content of a changed file must not be recorded, None if it may."""
    path = repository / name
    if any(fnmatch(part.lower(), pattern) for part in Path(name).parts for pattern in SECRETS):
        return "may hold a secret"
    if not is_tracked and not (name.startswith(tuple(f"{folder}/" for folder in SOURCES)) and path.suffix in SOURCE_SUFFIXES):
        return "untracked, and no source file of this project"
    size = _size(path)
    if path.suffix == ".ipynb" and size > MOST_NOTEBOOK:
        return f"a notebook of more than {MOST_NOTEBOOK:,} bytes"
    return f"larger than {MOST_PATCH:,} bytes" if size > MOST_PATCH else None


def _described(repository: Path, left_out: dict[str, str]) -> Iterable[str]:
    """Yield a line for each file that is left out: its name, its size, its digest unless that could tell a secret, and why."""
    budget = MOST_DIGESTED
    for name, why in list(left_out.items())[:MOST_LISTED]:
        path, digest = repository / name, "-"
        size = _size(path)
        if size <= budget and "secret" not in why and path.is_file() and not path.is_symlink():
            budget -= size
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        shown = os.fsencode(name).decode(errors="backslashreplace")
        yield f"{shown}\t{size} bytes\tsha256 {digest}\t{why}\n"
    if len(left_out) > MOST_LISTED:
        yield f"... and {len(left_out) - MOST_LISTED:,} more files\n"


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # deleted, or not to be looked at
        return 0


@cache
def packages() -> str:
    """Return every installed distribution as name==version, a line each."""
    installed = {f"{dist.metadata['Name']}=={dist.version}" for dist in importlib.metadata.distributions()}
    return "\n".join(sorted(installed, key=str.lower)) + "\n"


def owner_tags(output_dir: Path) -> dict[str, str]:
    """Return which process works on a run, and where: what tells later whether it still lives."""
    return {
        "host": platform.node(),
        "pid": str(os.getpid()),
        "output_dir": str(output_dir.absolute()),
        "mlflow.user": user(),
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


@cache
def _is_top(folder: Path) -> bool:
    """Return whether `folder` is the top of a git checkout: not a folder in somebody else's."""
    return _line(folder, "rev-parse", "--show-toplevel") == str(folder.resolve())


def _line(repository: Path, *arguments: str) -> str:
    return os.fsdecode(_git(repository, *arguments)).strip()


def _paths(repository: Path, *arguments: str, index: Path | None = None) -> list[str]:
    return [os.fsdecode(name) for name in _git(repository, *arguments, index=index).split(b"\0") if name]


def _git(
    repository: Path, *arguments: str, index: Path | None = None, paths: Iterable[str] = (), most: int | None = None
) -> bytes:
    """Return what a git command prints, or the first `most` bytes of it; nothing where it fails; paths: for it to read."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of another repository
    if index:
        environment["GIT_INDEX_FILE"] = str(index)
    command = ["git", "-C", str(repository), *arguments]
    try:
        with tempfile.TemporaryFile() as read, tempfile.TemporaryFile() as written:
            read.write(b"\0".join(map(os.fsencode, paths)))
            read.seek(0)
            subprocess.run(
                command, stdin=read, stdout=written, stderr=subprocess.DEVNULL, timeout=30, check=True, env=environment
            )
            written.seek(0)
            return written.read(most)
    except (OSError, subprocess.SubprocessError):
        return b""
