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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_exp.nodes import targets
from mnist_exp.paths import CHECKOUT, NAME, PACKAGE, config_dirs, without_credentials
from mnist_exp.storage import run_dir
from mnist_exp.tracking.tags import BRANCH, COMMIT, CPU, DIRTY, GPU, HOST, OUTPUT_DIR, PID, REPOSITORY, USER

if TYPE_CHECKING:
    import torch

ORIGIN, PATCH = "provenance.json", "uncommitted.diff"  # artifacts of a run; the second, if there are changes
SECRETS = (".env*", "*.pem", "*.key", "id_*", "*credentials*")  # never recorded, tracked or not
MAX_PATCH = 1_000_000  # bytes
PROCESS_DIED = "no process works on it any more"  # the reason of a run that was KILLED, which a better known one may replace


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
def git_tags(checkout: Path | None = CHECKOUT) -> dict[str, str]:
    """Return commit, branch and whether there are uncommitted changes; empty outside a git checkout of this project.

    An untracked file is a change if it is in the package or in conf/.
    """
    if not _head(checkout):
        return {}
    commit, _, branch = _head(checkout)
    address = without_credentials("".join(_lines(checkout, "config", "--get", "remote.origin.url")))
    has_address = re.match(r"(https?|ssh)://|[\w.-]+@[\w.-]+:", address)  # not the path of a folder
    changes = [line for line in changed_files(checkout) if re.match(rf'[^?]|\?\? "?({NAME}|conf)/', line)]
    tags = {COMMIT: commit, BRANCH: branch, DIRTY: str(bool(changes)).lower()}
    return tags | ({REPOSITORY: address} if has_address else {})


@cache
def changed_files(checkout: Path | None = CHECKOUT) -> list[str]:
    """Return the changed and untracked files of a checkout of this project, as `git status --porcelain` prints them."""
    return _lines(checkout, "status", "--porcelain") if _head(checkout) else []


def software() -> dict[str, str]:
    """Return the versions that affect a run's results: the digest of the code, and torch's version.

    The code is this package and the modules outside of site-packages that files of options name as targets.
    """
    return {"code": code_digest(tuple(config_dirs())), "torch": importlib.metadata.version("torch")}


@cache  # this process keeps the code that it has imported
def code_digest(folders: tuple[Path, ...]) -> str:
    """Return the digest of the code, given the folders with files of options."""
    digest = hashlib.sha256()
    for path in _sources(folders):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _sources(folders: tuple[Path, ...]) -> Iterator[Path]:
    yield from sorted(PACKAGE.rglob("*.py"))
    named = {found[0] for _, target in targets(folders) if (found := re.match(r"\w+(?=\.)", target))}
    for module in sorted(named - {NAME, "__main__"} - sys.stdlib_module_names):
        spec = find_spec(module)  # imports nothing
        places = (spec.submodule_search_locations or [spec.origin or module]) if spec else []
        for place in map(Path, places):
            if not {"site-packages", "dist-packages"} & set(place.parts):
                yield from filter(Path.is_file, [place, *sorted(place.rglob("*.py"))])


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return in words which of the present values differ from earlier ones, empty without a difference."""
    return "; ".join(f"{name} was {before.get(name)}, is {value}" for name, value in now.items() if before.get(name) != value)


@cache
def uncommitted(checkout: Path | None = CHECKOUT) -> str:
    """Return the changes of tracked files and the untracked .py and .yaml files as a patch for `git apply`.

    It omits files that usually hold secrets (SECRETS), and whole files after MAX_PATCH bytes. Other text than UTF-8 is escaped.
    """
    if not changed_files(checkout) or not (index := Path(_head(checkout)[1])).exists():
        return ""
    no_secrets = [f":(exclude,icase,glob)**/{pattern}{below}" for pattern in SECRETS for below in ("", "/**")]
    added = _git(checkout, "ls-files", "--others", "--exclude-standard", "-z", "--", "*.py", "*.yaml", *no_secrets)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(index, folder))  # the user's own index must not change
        literal = ("--literal-pathspecs", "add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul")
        _git(checkout, *literal, index=copy, text=added)
        flags = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--binary")
        patch = _git(checkout, "diff", *flags, "HEAD", "--", ".", *no_secrets, index=copy)
    if len(patch) > MAX_PATCH:
        patch = patch[: patch.rfind(b"\ndiff --git ", 0, MAX_PATCH) + 1]
    return without_credentials(patch.decode(errors="backslashreplace"))


def process_tags(output_dir: Path) -> dict[str, str]:
    """Return the process that works on a run, so that others can later find out whether it is alive."""
    return {HOST: platform.node(), PID: str(os.getpid()), OUTPUT_DIR: str(output_dir.absolute()), USER: user()}


@contextmanager
def abandoned(run_id: str, tags: Mapping[str, str], output_dir: Path) -> Iterator[bool]:
    """Yield whether nobody works on a RUNNING run, as far as this machine knows; the run stays locked for the block.

    Args:
        run_id: The id of the run.
        tags: Its tags, with those of `process_tags`.
        output_dir: The absolute path of the folder of all runs. A lock is examined only there: the tag could name any folder.
    """
    folder = output_dir / run_id
    if tags.get(HOST) != platform.node() or not {PID, OUTPUT_DIR} <= tags.keys():
        yield False
    elif tags[OUTPUT_DIR] == str(output_dir) and (folder / run_dir.LOCK).exists():
        with run_dir.try_lock(folder) as is_free:
            yield is_free
    else:
        yield not _is_alive(tags[PID])


def _is_alive(pid: str) -> bool:
    """Return whether this machine has the process; an invalid number counts as alive."""
    try:
        os.kill(int(pid), 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError, OverflowError):
        pass
    return True


def machine_tags(device: "torch.device") -> dict[str, str]:
    """Return processor, threads and accelerator: only runs with the same ones are equal in their last bits."""
    import torch  # takes seconds that reading commands do not need

    # The same name may have different instructions.
    tags = {CPU: f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}", "threads": str(torch.get_num_threads())}
    return tags | ({GPU: torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def origin(command: str, device: "torch.device") -> dict[str, Any]:
    """Return how a run of this process on a device came about, as the artifact ORIGIN holds it.

    Its keys are the whole command (the tag of a long one is cut), the machine, the changed and untracked files as `git status
    --porcelain` prints them, and the version of every installed distribution.
    """
    machine = {
        "host": platform.node(),
        "os": platform.platform(),
        "python": platform.python_version(),
        **machine_tags(device),
        "cores": str(os.cpu_count()),
    }
    if hasattr(os, "sysconf"):  # not on Windows
        machine["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    # The names of the folders say it (PEP 427). importlib.metadata would parse all files in them, which takes half a second.
    folders = [path.name.removesuffix(".dist-info") for entry in sys.path for path in Path(entry).glob("*.dist-info")]
    packages = {name: version for name, _, version in sorted(name.rpartition("-") for name in folders)}
    return {"command": command, "machine": machine, "changed_files": changed_files(), "packages": packages}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def _head(checkout: Path | None) -> list[str]:
    """Return commit, index file and branch; empty unless `checkout` is the top of a checkout: it may be in another project's."""
    revisions = ("HEAD", "--path-format=absolute", "--git-path", "index", "--abbrev-ref", "HEAD")
    below, *head = _lines(checkout, "rev-parse", "--show-prefix", *revisions) or [""]
    return [] if below else head


def _lines(checkout: Path | None, *arguments: str) -> list[str]:
    return _git(checkout, *arguments).decode(errors="backslashreplace").splitlines()


def _git(checkout: Path | None, *arguments: str, index: Path | None = None, text: bytes = b"") -> bytes:
    """Return the output of a git command, which reads `text`; empty if the command fails."""
    if checkout is None:
        return b""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of another repository
    if index:
        environment["GIT_INDEX_FILE"] = str(index)
    command = ["git", "-C", str(checkout), *arguments]
    try:
        return subprocess.run(command, input=text, capture_output=True, timeout=30, check=True, env=environment).stdout
    except (OSError, subprocess.SubprocessError):
        return b""
