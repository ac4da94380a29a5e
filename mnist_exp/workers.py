"""Jobs in parallel on this machine: one process for each core, each with its share of the threads.

All are forked from one server process, which imports what they need, once, while the sweep is still being composed.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # has no annotations
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from mnist_exp.command_line import safe_output
from mnist_exp.errors import PrunedError, UserError
from mnist_exp.signals import Interrupted

SERVER_DIED = 255  # what multiprocessing calls the exit code of a worker whose server is gone
GRACE = 60.0  # seconds that a worker has to write down how its job ended
FORKS = multiprocessing.get_context("forkserver")
# What a job imports, for the server to have; torch takes its dynamo with any optimizer. Not run.py: a worker imports it as main.
NEEDED = [f"mnist_exp.{module}" for module in ("checkpoint", "console", "models", "search", "tracking", "training")]
NEEDED += ["torch._dynamo"]
NEEDED_TO_TRACK = ["mnist_exp.pictures", "mlflow.pytorch", "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store"]
NEEDED_TO_TRACK += ["alembic.command", "matplotlib.backends.backend_agg", "torch.export._trace"]


class WorkerDiedError(Exception):
    """A worker process was killed."""


class WorkersLauncher(Launcher):
    """Runs jobs in worker processes, which outlive a job and are replaced when they die.

    processes: as many jobs at once; null: one for each core that this process may use.
    """

    stops_on_failure = True

    def __init__(self, processes: int | None = None) -> None:
        if processes is not None and processes < 1:
            raise UserError(f"hydra.launcher.processes={processes}: allowed is an integer of at least 1, or null for all cores.")
        self.processes = processes

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands over."""
        self.context, self.task_function, self.config = hydra_context, task_function, config
        threads = cores() // (self.processes or cores())  # whatever the number of jobs: one that is resumed alone has as many
        self.environment = {"OMP_NUM_THREADS": str(max(1, threads)), "MLFLOW_DISABLE_TELEMETRY": "true"}  # read by imports

    def warm_up(self) -> None:
        """Have the server of the workers begin its imports, unless it has."""
        tracks = str(self.config.tracking.get("_target_", "")).endswith("MLflowTracker")
        FORKS.set_forkserver_preload(NEEDED + NEEDED_TO_TRACK if tracks else NEEDED)
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # or a terminal that is closed would end the server first
        try:
            with environment(self.environment):
                forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGHUP, before)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; those that `sweep.on_failure=stop` keeps from starting come back as UNKNOWN."""
        setup_globals()
        count = min(self.processes or cores(), len(job_overrides))
        ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        payload = cloudpickle.dumps((self.context, self.config, self.task_function, Singleton.get_state(), ignores_hangup))
        stop_on_failure = self.config.sweep.on_failure == "stop"
        waiting = deque(enumerate(map(list, job_overrides), initial_job_idx))
        results = {number: JobReturn() for number, _ in waiting}
        workers: list[Worker] = []
        try:
            while waiting or any(worker.job is not None for worker in workers):
                while waiting and len(workers) < count:
                    self.warm_up()  # where it has not begun, or has died
                    workers.append(Worker(payload))
                for worker in workers:
                    if worker.job is None and waiting:
                        worker.send(*waiting.popleft())
                for worker in ready(workers):
                    number = worker.job
                    result = worker.receive()
                    if result is None:
                        workers.remove(worker)
                        result = worker.died()
                    if number is not None:
                        results[number] = result
                        failed = result.status == JobStatus.FAILED and not isinstance(result._return_value, PrunedError)
                        if failed and stop_on_failure:
                            waiting.clear()
        except Interrupted as interrupted:  # the jobs say that the same signal has stopped them
            for worker in workers:
                worker.stop(interrupted.signum)
            raise
        finally:
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.join()
        return list(results.values())


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that are started within the block."""
    before = os.environ.copy()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def ready(workers: list["Worker"]) -> list["Worker"]:
    """Wait until a worker has something to say, or has died; return those."""
    heard = wait([item for worker in workers for item in (worker.connection, worker.process.sentinel)])
    return [worker for worker in workers if worker.connection in heard or worker.process.sentinel in heard]


class Worker:
    """A process that runs one job after the other; job: the number of the one that it runs now."""

    process: ForkServerProcess
    connection: "Connection[Any, Any]"

    def __init__(self, payload: bytes) -> None:
        self.connection, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=work, args=(theirs, payload))
        self.job: int | None = None
        self.process.start()
        theirs.close()

    def send(self, number: int, overrides: list[str]) -> None:
        """Have the worker run a job."""
        self.job = number
        with suppress(OSError):  # it died, which `receive` will tell
            self.connection.send((number, overrides))

    def receive(self) -> JobReturn | None:
        """Return what became of the job; None if the process died."""
        self.job = None
        try:
            result: JobReturn = cloudpickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return None
        return result

    def died(self) -> JobReturn:
        """Return the result of a job whose worker died."""
        self.process.join()
        code = self.process.exitcode or 0
        if code == SERVER_DIED and self.process.pid:
            with suppress(ProcessLookupError):  # the worker lives on, and would run its job beside its successor
                os.kill(self.process.pid, signal.SIGKILL)
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        result = JobReturn()
        result.return_value = WorkerDiedError(f"its process died ({how}); the system may have lacked memory")
        result.status = JobStatus.FAILED
        return result

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Have the process end; a job that it runs ends as on the signal. Later calls change nothing."""
        self.connection.close()
        if self.job is not None and self.process.pid:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signum)
        self.job = None

    def join(self) -> None:
        """Wait for the end of the process, and enforce it after a while."""
        self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def work(connection: "Connection[Any, Any]", payload: bytes) -> None:
    """Run the jobs that come through `connection`, until it is closed or the parent dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()
    context, config, task_function, state, ignores_hangup = cloudpickle.loads(payload)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores_hangup else signal.SIG_DFL)  # and not the server's
    with safe_output(), suppress(EOFError, ConnectionError, KeyboardInterrupt):  # the end of the sweep, in peace or by a signal
        while True:
            number, overrides = connection.recv()
            setup_globals()
            Singleton.set_state(state)
            composed = context.config_loader.load_sweep_config(config, overrides)
            with open_dict(composed):
                composed.hydra.job.id = composed.hydra.job.num = number
            HydraConfig.instance().set_config(composed)
            result = run_job(
                hydra_context=context,
                task_function=task_function,
                config=composed,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
            result.cfg = result.hydra_cfg = None  # half a megabyte a job, that nobody reads
            connection.send_bytes(_dumped(result))


def _follow(sentinel: int) -> None:
    """End this process when its parent has died, so that nothing is left behind."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _dumped(result: JobReturn) -> bytes:
    """Return the result as bytes; an exception that cannot be sent is sent in words."""
    try:
        dumped = bytes(cloudpickle.dumps(result))
        cloudpickle.loads(dumped)
        return dumped
    except Exception:  # a foreign exception may hold anything
        result.return_value = WorkerDiedError(str(result._return_value))
        return bytes(cloudpickle.dumps(result))
