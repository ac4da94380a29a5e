"""SIGINT and SIGTERM as an exception, so that a run or a sweep that is stopped can write down how it ended."""

import signal
from types import FrameType
from typing import Never


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"Stopped by {signal.Signals(signum).name}.")
        self.exit_status = 128 + signum


def raise_interrupted() -> None:
    """Have the first of either signal raise Interrupted, and further ones ignored while the end is written."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupt)


def _interrupt(signum: int, frame: FrameType | None) -> Never:
    for repeated in (signal.SIGINT, signal.SIGTERM):
        signal.signal(repeated, lambda *_: None)  # not SIG_IGN: Python complains of one that has arrived already
    raise Interrupted(signum)
