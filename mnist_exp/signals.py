"""Turns SIGINT, SIGTERM and SIGHUP into an exception, so that a stopped run or sweep can record its end."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
SIGNALS = tuple(signum for signum in (signal.SIGINT, signal.SIGTERM, HANGUP) if signum)
_blocks = 0  # open blocks of `defer_signals`
_pending: int | None = None  # the signal to raise at the end of the last block


class Interrupted(KeyboardInterrupt):
    """The process received one of SIGNALS."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"Stopped by {signal.Signals(signum).name}.")
        self.signum = signum
        self.exit_status = 128 + signum


def install_signal_handlers() -> None:
    """Make the first of SIGNALS raise Interrupted; later ones are ignored while the run records its end.

    A SIGHUP that is already ignored, as under `nohup`, stays ignored.
    """
    for signum in SIGNALS:
        if signum != HANGUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _interrupt)
    sys.unraisablehook = _raise_again


@contextmanager
def defer_signals() -> Iterator[None]:
    """Raise Interrupted at the end of the block if a signal arrives within it, so that the block completes.

    A transaction that an exception interrupts may keep a SQLite database locked until the process ends.
    """
    global _blocks, _pending
    if threading.current_thread() is not threading.main_thread():  # only that thread receives signals
        yield
        return
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        if _pending and not _blocks:
            signum, _pending = _pending, None
            raise Interrupted(signum)  # even if an error leaves the block: a sweep would continue after the error


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _pending
    for repeated in SIGNALS:
        if signal.getsignal(repeated) == _interrupt:
            signal.signal(repeated, _ignore)  # not SIG_IGN: Python reports an error if the signal has already arrived
    if not _blocks:
        raise Interrupted(signum)
    _pending = signum


def _ignore(signum: int, frame: FrameType | None) -> None:
    pass


def _raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send the signal again if its exception was lost."""
    # Python discards an exception that leaves a destructor or a callback ("Exception ignored in ..."), even one that a signal
    # handler raised there. The timer fires after the destructor: a signal raised here would be lost, too.
    if isinstance(unraisable.exc_value, Interrupted):
        install_signal_handlers()
        threading.Timer(0.01, os.kill, (os.getpid(), unraisable.exc_value.signum)).start()
    else:
        sys.__unraisablehook__(unraisable)
