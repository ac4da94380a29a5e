"""SIGINT, SIGTERM and SIGHUP: raised once, wherever they arrive, and never within what must be written whole."""

import itertools
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from mnist_exp.signals import SIGNALS, Interrupted, defer_signals, install_signal_handlers
from mnist_exp.tracking.base import RunInfo
from mnist_exp.tracking.mlflow_store import MLflowStore


@pytest.fixture(autouse=True)
def _signals_raise(handlers_put_back: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    install_signal_handlers()


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_is_raised(signum: signal.Signals) -> None:
    with pytest.raises(Interrupted) as raised:
        signal.raise_signal(signum)
    assert (raised.value.signum, raised.value.exit_status) == (signum, 128 + signum)


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    install_signal_handlers()
    signal.raise_signal(signal.SIGHUP)
    with pytest.raises(Interrupted) as raised:
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.signum == signal.SIGTERM
    signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_signal_is_raised_at_the_end_of_the_outermost_block_that_must_be_whole() -> None:
    done = []

    def work() -> None:
        with defer_signals():
            with defer_signals():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")
        done.append("never")

    with pytest.raises(Interrupted) as raised:
        work()
    assert raised.value.signum == signal.SIGINT
    assert done == ["inner", "outer"]
    signal.raise_signal(signal.SIGTERM)  # a second one does not disturb the writing of the end


def test_a_signal_is_raised_also_where_an_error_leaves_the_block() -> None:
    def work() -> None:
        with defer_signals():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError

    with pytest.raises(Interrupted) as raised:
        work()
    assert isinstance(raised.value.__context__, ValueError)


def test_a_signal_that_arrives_where_nothing_can_be_raised_is_not_lost() -> None:
    class Unlucky:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def work() -> None:
        Unlucky()
        time.sleep(10)

    with pytest.raises(Interrupted) as raised:
        work()
    assert raised.value.signum == signal.SIGTERM


def test_a_run_that_is_stopped_while_it_reads_or_writes_keeps_no_lock_on_the_store(store: str) -> None:
    def work(store: MLflowStore, seconds: float) -> None:
        with store.start(RunInfo("name", "")) as tracker:
            runs.append(tracker.run_id)
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()
            for step in itertools.count():
                tracker.log_metrics({"value": step}, step)
                tracker.flush()
                store.reap(Path())

    runs: list[str] = []
    for attempt in range(5):
        install_signal_handlers()
        opened = MLflowStore(store, "test")
        with pytest.raises(Interrupted):
            work(opened, 0.02 + 0.001 * attempt)
        assert opened.client.get_run(runs[-1]).info.status == "KILLED"
