"""Shared by the commands: options, the store, exit codes and error messages."""

import argparse
import atexit
import gc
import os
import re
import shlex
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mnist_exp import composing
from mnist_exp.errors import UserError, first_line
from mnist_exp.nodes import build, remember_locations
from mnist_exp.overrides import locations, quoted
from mnist_exp.paths import CONFIG_DIR, LOCATIONS, NAME, take_credentials
from mnist_exp.signals import Interrupted

if TYPE_CHECKING:
    from mnist_exp.settings import Settings
    from mnist_exp.tracking.base import Store

TRACE = os.environ.get("HYDRA_FULL_ERROR") == "1"  # whether the user wants stack traces


class SafeOutput:
    """A text stream that ignores that its reader, a pipe or a terminal, was closed: a training must survive it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`."""
        with self._ignore_closed():
            self._stream.write(text)
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


@contextmanager
def reported_errors() -> Iterator[None]:
    """Run the block of a command; an error ends it with one message and status 1, a signal with 128 + its number.

    The message includes the notes of the exception (`add_note`), which name the next step.
    """
    gc.set_threshold(100_000, 50)  # searching a million imported objects for garbage took a quarter of the start,
    atexit.register(gc.freeze)  # and two seconds at exit
    with safe_output():
        try:
            yield
        except KeyboardInterrupt as interrupted:
            if isinstance(interrupted, Interrupted):
                print("\n".join(["", str(interrupted), *_notes(interrupted)]), file=sys.stderr)
            sys.exit(getattr(interrupted, "exit_status", 128 + signal.SIGINT))
        except Exception as error:
            if TRACE or (message := explain(error)) is None:
                traceback.print_exception(error)
            else:
                from mnist_exp.console import plain  # takes a tenth of a second, which only an error needs

                print(plain("\n".join([message, *_notes(error)])), file=sys.stderr)  # it may quote a file or a server
            sys.exit(1)


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def leave_credentials() -> None:
    """Take the credentials out of the tracking address in the environment and on the command line."""
    for name in ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_URI"):
        if name in os.environ:
            os.environ[name] = take_credentials(os.environ[name])
    for arguments in (sys.argv, sys.orig_argv):
        for position, word in enumerate(arguments):
            if "tracking" in word.lower() or "--tracking-uri" in arguments[position - 1 : position]:
                arguments[position] = take_credentials(word)


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a command, which names the module and has the shared options."""
    return argparse.ArgumentParser(
        prog=f"python -m {NAME}.{module}", description=description, parents=[shared_options()], allow_abbrev=False
    )


def shared_options() -> argparse.ArgumentParser:
    """Return the options that all commands but `run` share."""
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("locations")
    group.add_argument("--tracking-uri", metavar="URI", help="the MLflow store (default: MLFLOW_TRACKING_URI, else ./mlflow.db)")
    group.add_argument("--experiment", metavar="NAME", help=f"the MLflow experiment of `latest` (default: {NAME})")
    group.add_argument("--output-dir", metavar="FOLDER", help="the folder of the runs' checkpoints (default: ./outputs)")
    group.add_argument(CONFIG_DIR, metavar="FOLDER", help="a further folder with options, as of the run")
    return options


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the parsed command line, without credentials, and note its locations."""
    leave_credentials()
    arguments = options.parse_args()
    values = {key: getattr(arguments, option[2:].replace("-", "_"), None) for key, option in LOCATIONS.items() if option}
    remember_locations(
        [f"{key}={quoted(str(value))}" for key, value in values.items() if value is not None], arguments.config_dir
    )
    return arguments


def default_settings(*overrides: str) -> "Settings":
    """Return the settings that a command without keys uses: conf/, conf/local, the environment and the locations typed."""
    return composing.compose_recipe(*locations(), *overrides).settings


def find_store(settings: "Settings | None" = None) -> "Store":
    """Return the store of the settings, by default of `default_settings`. It connects when it is first used."""
    store: Store = build((settings or default_settings()).tracking, "tracking")
    return store


def count(text: str) -> int:
    """Return an integer >= 1 of the command line."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected an integer >= 1")
    return int(text)


def listen(port: int) -> socket.socket:
    """Return a socket that listens at a port of this machine; raises UserError."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        raise UserError.invalid("--port", port, "a free port up to 65535", "Choose another one.") from error


def file_to_write(suffix: str) -> Callable[[str], Path]:
    """Return the type of an option that names a file to write, checked before long work is done in vain."""

    def check(text: str) -> Path:
        path = Path(text)
        can_be_written = not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
        if not (text.lower().endswith(suffix) and can_be_written):
            raise argparse.ArgumentTypeError(f"{text!r} is invalid: expected a {suffix} file in a folder that can be written")
        return path

    return check


def explain(error: Exception) -> str | None:
    """Return the message for the user: the problem and the remedy; None for an error of the program itself."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error)):
        return f"Out of memory: {first_line(error)}\nChoose a smaller batch_size or model, or stop other programs."
    if isinstance(error, composing.COMPOSING_ERRORS):
        return str(composing.explain(error))
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    if isinstance(error, ValueError | RuntimeError | TypeError) and "hydra" in Path(innermost).parts:  # of no class of its own
        return composing.missing_extra(str(error)) or f"The configuration cannot be composed: {error}"
    if isinstance(error, OSError) or any(kind.__module__.startswith(("mlflow.", "sqlalchemy.")) for kind in type(error).__mro__):
        return (
            f"The store, the disk or the network failed: {first_line(error)}\n"
            "Check that the store answers and has space, and that you may write to it (permission EDIT). Then repeat the command."
        )
    return None


def check_order(arguments: Sequence[str]) -> None:
    """Raise UserError if an option stands between overrides, where Hydra's parser would stop to read them."""
    positions = [number for number, word in enumerate(arguments) if re.match(r"[^-].*=|[~+]", word)]
    between = arguments[positions[0] : positions[-1]] if positions else []
    for option in (word for word in between if word.startswith("-")):
        position = arguments.index(option)
        moved = arguments[position : position + (2 if option in (CONFIG_DIR, "-cd") else 1)]
        rest = [*arguments[:position], *arguments[position + len(moved) :]]
        raise UserError(
            f"{option} stands between overrides.",
            key=option,
            expected="it before all overrides",
            remedy=f"Write: {shlex.join(['python', '-m', f'{NAME}.run', *moved, *rest])}",
        )
