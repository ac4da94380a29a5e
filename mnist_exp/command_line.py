"""What every command does around its task: a mistake ends with words, a signal with its status, a closed pipe with neither."""

import gc
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mnist_exp.config import did_you_mean
from mnist_exp.errors import UserError
from mnist_exp.overrides import PARTS
from mnist_exp.redaction import redact
from mnist_exp.signals import Interrupted


class SafeOutput:
    """A text stream that shows no credentials, and that nobody has to read: a closed pipe or terminal takes what is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` without credentials."""
        with self._unread():
            self._stream.write(redact(text))
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        with self._unread():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _unread(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # the reader of a pipe has left, the terminal was closed, or the disk below a file is full
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is buffered, which Python would try to write at its end
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextmanager
def safe_output() -> Iterator[None]:
    """Have what the block prints go through SafeOutput."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = SafeOutput(sys.stdout), SafeOutput(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def answer(task: Callable[[], Any]) -> None:
    """Run a task of `hydra.main`; a user's mistake ends with a message and status 1, a signal with 128 + its number.

    Notes that were added to the exception (`add_note`) follow the message: what the user can do now.
    """
    gc.set_threshold(100_000, 50)  # to search a million imported objects for garbage, again and again, took a quarter of a start
    wants_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # has Hydra hand over exceptions; its own messages offer the wrong remedies
    with safe_output():
        try:
            task()
        except Interrupted as interrupted:
            print("\n" + "\n".join([str(interrupted), *_notes(interrupted)]), file=sys.stderr)
            sys.exit(interrupted.exit_status)
        except Exception as error:
            if wants_trace or not (isinstance(error, UserError) or _out_of_memory(error) or _while_composing(error, task)):
                traceback.print_exception(error)  # here, where credentials are masked
            else:
                lines = [explain(error), *_notes(error), "", "HYDRA_FULL_ERROR=1 shows the stack trace."]
                print("\n".join(lines), file=sys.stderr)
            sys.exit(1)
        finally:
            if not wants_trace:
                del os.environ["HYDRA_FULL_ERROR"]


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def _while_composing(error: Exception, task: Callable[[], Any]) -> bool:
    """Return whether `error` came before the task itself began, out of Hydra's reading of the command line."""
    code = inspect.unwrap(task).__code__
    return not any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))


def _out_of_memory(error: Exception) -> bool:
    """Return whether `error` is Python's, or torch's on a CPU or a GPU, of having no memory."""
    refused = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(text in str(error) for text in refused))


def explain(error: Exception) -> str:
    """Return what the user can do about `error`: the message of a UserError, or of another's with the likely remedy."""
    if _out_of_memory(error):
        return (
            f"The memory does not suffice: {str(error).strip() or type(error).__name__}\nChoose a smaller batch_size or model, "
            "or stop other programs."
        )
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        shared = re.match(rf"phases\.\w+\.(({'|'.join(PARTS)})\..+)", cause.full_key)
        if shared:
            return f"{cause.full_key} follows the key at the top: override {shared[1]} instead."
        if isinstance(cause.parent_node, DictConfig):
            known = {str(key) for key in cause.parent_node}
            hint = did_you_mean(str(cause.key), known)
            return f"{cause.full_key} is not a key of the configuration{hint}. Allowed here: {', '.join(sorted(known))}."
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        return f"{error}\n{cause}"
    return (
        str(error)
        if isinstance(error, UserError | HydraException)
        else f"{error}\nThe command line was: {' '.join(sys.argv[1:])}"
    )
