"""Jobs in parallel on this machine: one worker process for each core, each with its share of the threads.

All are forked from one server process, which imports their modules once, while the sweep is still being composed.
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
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from mnist_exp.cli import safe_output
from mnist_exp.errors import UserError
from mnist_exp.signals import Interrupted
from mnist_exp.sweep.jobs import failed, result_of

SERVER_DIED = 255  # the exit code that multiprocessing reports if the server has died
GRACE = 60.0  # seconds for a worker to record the end of its job
CONTEXT = multiprocessing.get_context("forkserver")
# The imports of a job, which the server preloads; torch imports its dynamo with any optimizer. Preloading is only faster:
# multiprocessing ignores a name that cannot be imported. Not run.py: a worker imports it as its main module.
PRELOADED = ["mnist_exp.sweep.search", "mnist_exp.experiment.runner", "torch._dynamo"]
PRELOADED_FOR_MLFLOW = ["mnist_exp.tracking.mlflow_store", "mlflow.pyfunc"]
PRELOADED_FOR_MLFLOW += ["mlflow.store.tracking.sqlalchemy_store", "alembic.command", "matplotlib.backends.backend_agg"]


class WorkerDiedError(Exception):
    """A worker process was killed."""


class WorkerPool:
    """Runs jobs in worker processes, which run one job after the other and are replaced if they die.

    Args:
        context: Hydra's context.
        task: The function that runs a job.
        config: The composed configuration, with Hydra's node.
        processes: The number of jobs at once; None: one for each core that this process may use.
    """

    def __init__(self, context: HydraContext, task: TaskFunction, config: DictConfig, processes: int | None) -> None:
        if processes is not None and processes < 1:
            raise UserError.invalid("hydra.launcher.processes", processes, "an integer >= 1, or null for all cores")
        self.context, self.task_function, self.config, self.processes = context, task, config, processes
        threads = cores() // (processes or cores())  # the same for a job that is resumed alone
        self.environment = {"OMP_NUM_THREADS": str(max(1, threads)), "MLFLOW_DISABLE_TELEMETRY": "true"}  # imports read it

    def warm_up(self) -> None:
        """Start the server of the workers, which begins its imports, unless it runs."""
        uses_mlflow = str(self.config.tracking.get("_target_", "")).endswith("MLflowStore")
        CONTEXT.set_forkserver_preload(PRELOADED + PRELOADED_FOR_MLFLOW if uses_mlflow else PRELOADED)
        # Ctrl-C, or closing the terminal, must not end the server first, with the stack trace of an import.
        handlers = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGINT, signal.SIGHUP)}
        try:
            with environment(self.environment):
                forkserver.ensure_running()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs."""
        setup_globals()
        count = min(self.processes or cores(), len(job_overrides))
        ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        payload = cloudpickle.dumps((self.context, self.config, self.task_function, Singleton.get_state(), ignores_hangup))
        waiting = deque(enumerate(map(list, job_overrides), initial_job_idx))
        results = {number: JobReturn() for number, _ in waiting}
        workers: list[Worker] = []
        try:
            while waiting or any(worker.job is not None for worker in workers):
                while waiting and len(workers) < count:
                    self.warm_up()  # the server may have died
                    workers.append(Worker(payload))
                for worker in (worker for worker in workers if worker.job is None):
                    if waiting:
                        worker.send(*waiting.popleft())
                for number, result in collect(workers):
                    results[number] = result
        except Interrupted as interrupted:  # the jobs record the same signal
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
    """Set environment variables for processes that the block starts."""
    original = os.environ.copy()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(original)


def collect(workers: list["Worker"]) -> Iterator[tuple[int, JobReturn]]:
    """Wait until a worker sends a result or dies; yield the results by job, and remove the dead from `workers`."""
    objects = wait([item for worker in workers for item in (worker.connection, worker.process.sentinel)])
    for worker in list(workers):
        if worker.connection in objects or worker.process.sentinel in objects:
            number, result = worker.job, worker.receive()
            if result is None:
                workers.remove(worker)
                result = worker.crash_result()
            if number is not None:
                yield number, result


class Worker:
    """A worker process; `job` is the number of the job that it runs."""

    process: ForkServerProcess
    connection: "Connection[Any, Any]"

    def __init__(self, payload: bytes) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=worker_main, args=(theirs,))
        self.job: int | None = None
        self.process.start()
        theirs.close()
        with suppress(OSError):  # it died, which `receive` reports
            # Not an argument of the process, which prints a stack trace if a signal stops us while we write its arguments.
            self.connection.send_bytes(payload)

    def send(self, number: int, overrides: list[str]) -> None:
        """Send a job to the worker."""
        self.job = number
        with suppress(OSError):
            self.connection.send((number, overrides))

    def receive(self) -> JobReturn | None:
        """Return the result of the job, None if the process died."""
        self.job = None
        try:
            result: JobReturn = cloudpickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return None
        return result

    def crash_result(self) -> JobReturn:
        """Return the result of a job whose worker died."""
        self.process.join()
        code = self.process.exitcode or 0
        if code == SERVER_DIED and self.process.pid:
            with suppress(ProcessLookupError):  # the worker may be alive, and would run the job a second time
                os.kill(self.process.pid, signal.SIGKILL)
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return failed(WorkerDiedError(f"its process died ({how}); the machine may have run out of memory"))

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """End the process; its job receives the signal. Later calls do nothing."""
        self.connection.close()
        if self.job is not None and self.process.pid:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signum)
        self.job = None

    def join(self) -> None:
        """Wait for the end of the process, and kill it after `GRACE` seconds."""
        self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def worker_main(connection: "Connection[Any, Any]") -> None:
    """Run the jobs from `connection` until it is closed or the parent dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with_parent, args=(parent.sentinel,), daemon=True).start()
    with safe_output(), suppress(EOFError, ConnectionError, KeyboardInterrupt):  # the sweep has ended
        context, config, task_function, state, ignores_hangup = cloudpickle.loads(connection.recv_bytes())
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores_hangup else signal.SIG_DFL)
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
            result.cfg = result.hydra_cfg = None  # half a megabyte per job, which nobody reads
            connection.send_bytes(_serialize(result))


def _exit_with_parent(sentinel: int) -> None:
    """End this process when its parent dies."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _serialize(result: JobReturn) -> bytes:
    """Return the result as bytes; an exception that cannot be pickled is replaced by its message."""
    try:
        dumped = bytes(cloudpickle.dumps(result))
        cloudpickle.loads(dumped)
        return dumped
    except Exception:  # an exception may contain any object
        result.return_value = WorkerDiedError(str(result_of(result)))
        return bytes(cloudpickle.dumps(result))
