"""SIGINT, SIGTERM and SIGHUP as an exception, so that a run or a sweep that is stopped can write down how it ended."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
_holds = 0  # blocks of `uninterrupted` that are open
_arrived: int | None = None  # the signal that waits for their end
_hook_before = sys.unraisablehook


class Interrupted(KeyboardInterrupt):
    """One of SIGNALS arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"Stopped by {signal.Signals(signum).name}.")
        self.signum = signum
        self.exit_status = 128 + signum


def raise_interrupted() -> None:
    """Have the first of SIGNALS raise Interrupted, and further ones ignored while the end is written.

    A SIGHUP that is ignored, as `nohup` has it, stays ignored.
    """
    global _hook_before
    for signum in SIGNALS:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _interrupt)
    if sys.unraisablehook is not _raise_again:
        _hook_before, sys.unraisablehook = sys.unraisablehook, _raise_again


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Have a signal that arrives within the block raise Interrupted at its end, so that what is written there is whole.

    A transaction that an exception cuts off anywhere may keep the lock on a SQLite database until its process ends.
    """
    global _holds, _arrived
    if threading.current_thread() is not threading.main_thread():  # signals arrive in that one alone
        yield
        return
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1
        if _arrived and not _holds:
            signum, _arrived = _arrived, None
            raise Interrupted(signum)  # also where an error leaves the block, which a sweep would outlive


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _arrived
    for repeated in SIGNALS:
        if signal.getsignal(repeated) == _interrupt:
            signal.signal(repeated, _ignore)  # not SIG_IGN: Python complains of one that has arrived already
    if not _holds:
        raise Interrupted(signum)
    _arrived = signum


def _ignore(signum: int, frame: FrameType | None) -> None:
    pass


def _raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send the signal again where Interrupted was raised in a destructor or a callback, out of which nothing comes."""
    if isinstance(unraisable.exc_value, Interrupted):
        raise_interrupted()
        threading.Timer(0.01, os.kill, (os.getpid(), unraisable.exc_value.signum)).start()
    else:
        _hook_before(unraisable)
