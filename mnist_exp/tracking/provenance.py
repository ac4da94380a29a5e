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
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mnist_exp.paths import CHECKOUT, PACKAGE, without_credentials
from mnist_exp.tracking.tags import BRANCH, COMMIT, DIRTY, HOST, OUTPUT_DIR, PID, REPOSITORY, USER

if TYPE_CHECKING:
    import torch

SOURCES = ("mnist_exp/", "conf/", "scripts/", "tests/")  # untracked source files in these folders are recorded
SOURCE_SUFFIXES = (".py", ".yaml", ".yml", ".html", ".sh", ".toml")
SECRETS = (".env*", "*.pem", "*.key", "id_*", "*credentials*")  # never recorded, tracked or not
MAX_PATCH = 1_000_000  # bytes in total
MAX_NOTEBOOK = 100_000  # bytes
MAX_DIGESTED = 100_000_000  # bytes in total
MAX_LISTED = 1_000  # files


def command_line() -> str:
    """Return the shell command that started this process."""
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


def user() -> str:
    """Return the name of the user, or `unknown`."""
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
        unrecorded: A line for each file that the patch omits, with the reason.
    """

    patch: str
    unrecorded: str


@cache
def uncommitted(repository: Path | None = CHECKOUT) -> Uncommitted:
    """Return the changes of tracked files and the untracked source files as a patch, and the names of all omitted files.

    The patch omits files that may contain secrets (SECRETS), large notebooks, and everything after MAX_PATCH bytes.
    """
    if repository is None or not _is_top(repository):
        return Uncommitted("", "")
    git_dir = Path(_line(repository, "rev-parse", "--absolute-git-dir"))
    if not (git_dir / "index").exists():
        return Uncommitted("", "")
    untracked = _paths(repository, "ls-files", "--others", "--exclude-standard", "-z")
    tracked = _paths(repository, "diff", "--name-only", "--no-renames", "-z", "HEAD")
    omitted = {name: reason for name in untracked if (reason := _omission(repository, name, is_tracked=False))}
    added = [name for name in untracked if name not in omitted]
    excluded = {name: reason for name in tracked if (reason := _omission(repository, name, is_tracked=True))}
    wanted = [".", *(f":(exclude,icase,glob)**/{pattern}{below}" for pattern in SECRETS for below in ("", "/**"))]
    wanted += [f":(exclude,literal){name}" for name in excluded]
    omitted |= excluded
    flags = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-renames")
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"  # a copy: the user's own index must not change
        shutil.copyfile(git_dir / "index", index)
        if added:
            add = ("add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul")
            _git(repository, "--literal-pathspecs", *add, index=index, paths=added)
        changed = _paths(repository, "diff", *flags, "--name-only", "-z", "HEAD", "--", *wanted, index=index)
        content = _git(repository, "diff", *flags, "--binary", "HEAD", "--", *wanted, index=index, limit=MAX_PATCH + 1)
    if len(content) > MAX_PATCH:
        content = content[: content.rfind(b"\ndiff --git ") + 1]  # the last file may be incomplete
        kept = len(re.findall(rb"^diff --git ", content, re.MULTILINE))
        omitted |= dict.fromkeys(changed[kept:], f"the patch would exceed {MAX_PATCH:,} bytes")
    patch = content.decode(errors="backslashreplace")
    return Uncommitted(patch, "".join(_describe(repository, omitted)))


def _omission(repository: Path, name: str, *, is_tracked: bool) -> str | None:
    """Return the reason why the content of a changed file must not be recorded, None if it may be."""
    path = repository / name
    if any(fnmatch(part.lower(), pattern) for part in Path(name).parts for pattern in SECRETS):
        return "may contain a secret"
    if not is_tracked and not (name.startswith(SOURCES) and path.suffix in SOURCE_SUFFIXES):
        return "untracked, not a source file of this project"
    size = _size(path)
    if path.suffix == ".ipynb" and size > MAX_NOTEBOOK:
        return f"a notebook of more than {MAX_NOTEBOOK:,} bytes"
    return f"larger than {MAX_PATCH:,} bytes" if size > MAX_PATCH else None


def _describe(repository: Path, omitted: dict[str, str]) -> Iterable[str]:
    """Yield a line for each omitted file: its name, size, reason, and its digest unless that could reveal a secret."""
    budget = MAX_DIGESTED
    for name, reason in list(omitted.items())[:MAX_LISTED]:
        path, digest = repository / name, "-"
        size = _size(path)
        if size <= budget and "secret" not in reason and path.is_file() and not path.is_symlink():
            budget -= size
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        shown = os.fsencode(name).decode(errors="backslashreplace")
        yield f"{shown}\t{size} bytes\tsha256 {digest}\t{reason}\n"
    if len(omitted) > MAX_LISTED:
        yield f"... and {len(omitted) - MAX_LISTED:,} more files\n"


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # deleted, or not readable
        return 0


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


def machine_tags(device: "torch.device") -> dict[str, str]:
    """Return versions, processor, cores, threads, memory and accelerator."""
    import torch

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


def _paths(repository: Path, *arguments: str, index: Path | None = None) -> list[str]:
    return [os.fsdecode(name) for name in _git(repository, *arguments, index=index).split(b"\0") if name]


def _git(
    repository: Path, *arguments: str, index: Path | None = None, paths: Iterable[str] = (), limit: int | None = None
) -> bytes:
    """Return the output of a git command, at most `limit` bytes, empty if it fails; `paths` are written to its input."""
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
            return written.read(limit)
    except (OSError, subprocess.SubprocessError):
        return b""
