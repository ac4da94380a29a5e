"""What every command does around its task: a user's mistake ends with words, a signal with its status."""

import gc
import inspect
import os
import re
import sys
from collections.abc import Callable
from traceback import walk_tb
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mnist_exp.config import PARTS, did_you_mean
from mnist_exp.errors import UserError
from mnist_exp.signals import Interrupted


def answer(task: Callable[[], Any], once_stopped: str = "") -> None:
    """Run a task of `hydra.main`; a user's mistake ends with a message and status 1, a signal with 128 + its number.

    once_stopped: what the user can do after a signal.
    """
    gc.set_threshold(100_000, 50)  # to search a million imported objects for garbage, again and again, took a quarter of a start
    wants_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # has Hydra hand over exceptions; its own messages offer the wrong remedies
    try:
        task()
    except Interrupted as interrupted:
        print(f"\n{interrupted} {once_stopped}".rstrip(), file=sys.stderr)
        sys.exit(interrupted.exit_status)
    except Exception as error:
        if wants_trace or not (isinstance(error, UserError) or _out_of_memory(error) or _while_composing(error, task)):
            raise
        print(f"{explain(error)}\n\nHYDRA_FULL_ERROR=1 shows the stack trace.", file=sys.stderr)
        sys.exit(1)
    finally:
        if not wants_trace:
            del os.environ["HYDRA_FULL_ERROR"]


def _while_composing(error: Exception, task: Callable[[], Any]) -> bool:
    """Return whether `error` came before the task itself began, out of Hydra's reading of the command line."""
    code = inspect.unwrap(task).__code__
    return not any(frame.f_code is code for frame, _ in walk_tb(error.__traceback__))


def _out_of_memory(error: Exception) -> bool:
    """Return whether `error` is Python's, or torch's on a CPU or a GPU, of having no memory."""
    refused = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(text in str(error) for text in refused))


def explain(error: Exception) -> str:
    """Return what the user can do about `error`: the message of a UserError, or of another's with the likely remedy."""
    if _out_of_memory(error):
        return (
            f"The memory does not suffice: {str(error).strip() or type(error).__name__}\nChoose a smaller batch_size or model, "
            "or stop other programs; what has a checkpoint goes on with `python -m mnist_exp.run resume=latest`."
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
