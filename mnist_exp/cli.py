"""Shared by the commands: exit codes, error messages, and output without credentials."""

import atexit
import gc
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mnist_exp.config import did_you_mean, nodes
from mnist_exp.errors import UserError
from mnist_exp.overrides import GROUPS, PARTS
from mnist_exp.redaction import redact
from mnist_exp.signals import Interrupted


class SafeOutput:
    """A text stream that masks credentials and ignores that its reader, a pipe or a terminal, was closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` without credentials."""
        with self._ignore_closed():
            self._stream.write(redact(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._ignore_closed():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _ignore_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # the pipe or the terminal was closed, or the disk is full
            with suppress(OSError, ValueError):
                devnull = os.open(os.devnull, os.O_WRONLY)  # for the buffer, which Python would write when it exits
                os.dup2(devnull, self._stream.fileno())
                os.close(devnull)


@contextmanager
def safe_output() -> Iterator[None]:
    """Send the output of the block through SafeOutput."""
    original = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = SafeOutput(sys.stdout), SafeOutput(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = original


def tune_garbage_collection() -> None:
    """Avoid searching a million imported objects for garbage: it took a quarter of the start, and two seconds at exit."""
    gc.set_threshold(100_000, 50)
    atexit.register(gc.freeze)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Run the block of a command without Hydra; a user's mistake ends with a message and status 1."""
    tune_garbage_collection()
    with safe_output():
        try:
            yield
        except UserError as error:
            print("\n".join([str(error), *_notes(error)]), file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)


def run_command(task: Callable[[], Any], *, multirun: bool = True) -> None:
    """Run a task of `hydra.main`; a user's mistake ends with a message and status 1, a signal with 128 + its number.

    The message includes the notes of the exception (`add_note`), which name the next step.

    Args:
        task: The task.
        multirun: Whether it can be run with -m.
    """
    if not multirun and {"-m", "--multirun"} & set(sys.argv):
        print("-m is invalid: this command runs once. Leave it out, and give each key one value.", file=sys.stderr)
        sys.exit(1)
    tune_garbage_collection()
    wants_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra pass on exceptions; its own messages suggest wrong remedies
    with safe_output():
        try:
            task()
        except Interrupted as interrupted:
            print("\n" + "\n".join([str(interrupted), *_notes(interrupted)]), file=sys.stderr)
            sys.exit(interrupted.exit_status)
        except Exception as error:
            if wants_trace or not (isinstance(error, UserError) or _out_of_memory(error) or _while_composing(error, task)):
                traceback.print_exception(error)  # to SafeOutput, which masks credentials
            else:
                lines = [explain(error), *_notes(error), "", "Set HYDRA_FULL_ERROR=1 to see the stack trace."]
                print("\n".join(lines), file=sys.stderr)
            sys.exit(1)
        finally:
            if not wants_trace:
                del os.environ["HYDRA_FULL_ERROR"]


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def _while_composing(error: Exception, task: Callable[[], Any]) -> bool:
    """Return whether Hydra raised `error` while it composed the configuration, before the task started."""
    code = inspect.unwrap(task).__code__
    return not any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))


def _out_of_memory(error: Exception) -> bool:
    """Return whether `error` is an out-of-memory error of Python, or of torch on a CPU or a GPU."""
    messages = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(text in str(error) for text in messages))


# Names that people know from elsewhere, and ours.
SYNONYMS = {
    "learning_rate": "lr", "num_epochs": "epochs", "max_epochs": "epochs", "bs": "batch_size", "batchsize": "batch_size",
    "wd": "weight_decay", "random_seed": "seed", "random_state": "seed", "train_batch_size": "batch_size",
}  # fmt: skip


def _hint(full_key: str, node: DictConfig) -> str:
    """Return ' (did you mean ...?)' for an unknown key of `node`: a synonym, a key further down, or one of similar spelling."""
    path, _, name = full_key.rpartition(".")
    name = SYNONYMS.get(name, name)
    prefix = f"{path}." if path else ""
    if name in node:
        return f" (did you mean {prefix}{name}?)"
    content = OmegaConf.to_container(node, resolve=False)
    below = [f"{prefix}{key}" for key, _ in nodes(content) if key.rpartition(".")[2] == name]
    first = " in the first phase" if name == "lr" and not path else ""
    if below:
        return f" (did you mean {f'{first} or '.join(below[:2])}?)"
    similar = did_you_mean(name, {str(key) for key in node})
    return similar.replace("did you mean ", f"did you mean {prefix}")


def explain(error: Exception) -> str:
    """Return the message for the user: the problem and the remedy."""
    if _out_of_memory(error):
        return (
            f"Out of memory: {str(error).strip() or type(error).__name__}\nChoose a smaller batch_size or model, or stop other "
            "programs."
        )
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        shared = re.match(rf"phases\.\w+\.(({'|'.join(PARTS)})\..+)", cause.full_key)
        if shared:
            return f"{cause.full_key} refers to a key at the top level: override {shared[1]} instead."
        if isinstance(cause.parent_node, DictConfig):
            known = sorted(map(str, cause.parent_node))
            hint = _hint(cause.full_key, cause.parent_node)
            return f"{cause.full_key} is not a key of the configuration{hint}. Expected one of: {', '.join(known)}."
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = ", ".join(sorted(error.options))
        return f"{group}={option} is invalid: expected one of {options}{did_you_mean(option, set(error.options))}."
    ambiguous = re.match(r"Ambiguous value for argument '([^=']+)=(.*)'", str(error).strip())
    if ambiguous:
        key, values = ambiguous.groups()
        if key.partition("@")[0] in GROUPS:
            return f"{key}={values} chooses several options: add -m to run one job for each, or choose one."
        return (
            f"{key}={values} gives several values: add -m to run one job for each, or write {key}=[{values}] for a list, "
            f"\"{key}='{values}'\" for a string."
        )
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        return f"{error}\n{cause}"
    return (
        str(error)
        if isinstance(error, UserError | HydraException)
        else f"{error}\nThe command line was: {' '.join(sys.argv[1:])}"
    )
