"""Jobs in parallel on this machine: one worker process for each GPU or core, each with its share of the threads.

All are forked from one server process, which imports their modules once, while the sweep is still being composed.
"""

import inspect
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import islice
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock, Timeout
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, env_override, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, open_dict
from pebble import CONSTS, ProcessExpired, ProcessPool

from mnist_exp.cli import safe_output
from mnist_exp.errors import UserError
from mnist_exp.paths import NAME
from mnist_exp.signals import SIGNALS, Interrupted, defer_signals
from mnist_exp.sweep.jobs import failed, result_of
from mnist_exp.tracking.base import Store

CONSTS.term_timeout = 60.0  # seconds for a worker to record the end of its job
DIED = "its process died; the machine may have run out of memory"
SERVER_DIED = 255  # the exit code that multiprocessing reports if the server has died
TERMINAL = {*SIGNALS} - {signal.SIGTERM}  # sent to the whole group; the server blocks them, and ends after its last worker
HAS_FORKSERVER = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
CONTEXT = multiprocessing.get_context("forkserver" if HAS_FORKSERVER else None)
# The imports of a job, which the server preloads; torch imports its dynamo with any optimizer. Preloading is only faster:
# multiprocessing ignores a name that cannot be imported. Not run.py: a worker imports it as its main module.
PRELOADED = [f"{NAME}.sweep.search", f"{NAME}.experiment.runner", "torch._dynamo"]

_worker: tuple[HydraContext, DictConfig, TaskFunction]  # of a worker process
_place: FileLock  # of a worker process, until it ends


class JobError(Exception):
    """A job has failed in its worker process, or the process has died."""


class WorkerPool:
    """Runs jobs in worker processes, which run one job after the other and are replaced if they die.

    Args:
        context: Hydra's context.
        task: The function that runs a job.
        config: The composed configuration, with Hydra's node.
        processes: The number of jobs at once; None: one for each GPU, without any one for each core that this process may use.
        gpus: `all`, `none`, or a list of GPUs, which workers get in turn.
    """

    def __init__(self, context: HydraContext, task: TaskFunction, config: DictConfig, processes: int | None, gpus: Any) -> None:
        if not HAS_FORKSERVER:
            raise UserError.invalid("hydra/launcher", "workers", "basic on this system", "Add hydra/launcher=basic.")
        if processes is not None and processes < 1:
            raise UserError.invalid("hydra.launcher.processes", processes, "an integer >= 1, or null for all cores")
        self.context, self.task_function, self.config = context, task, config
        listed = [] if config.get("device") == "cpu" else list_gpus(gpus)
        self.processes = processes or len(listed) or cores()
        self.gpus = [listed[place % len(listed)] if listed else "" for place in range(self.processes)]
        threads = max(1, cores() // self.processes)  # the same for a job that is resumed alone
        self.environment = {"OMP_NUM_THREADS": str(threads)}  # imports read it

    def warm_up(self) -> None:
        """Start the server of the workers, which begins its imports, unless it runs."""
        store: type[Store] = get_class(self.config.tracking._target_)
        CONTEXT.set_forkserver_preload([*PRELOADED, store.__module__, *store.preloaded])
        try:
            with env_override(self.environment):
                for start in (resource_tracker.ensure_running, forkserver.ensure_running):
                    signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL)  # each time: to start the tracker unblocks SIGINT
                    start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINAL)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; return their results in the same order."""
        results: dict[int, JobReturn] = {}
        jobs = dict(enumerate(map(list, job_overrides), initial_job_idx))
        try:
            self.run(jobs.items(), len(jobs), results.__setitem__)
        except JobError as error:
            return [results.get(number, failed(error)) for number in jobs]
        return [results[number] for number in jobs]

    def run(self, jobs: Iterable[tuple[int, list[str]]], most: int, ended: Callable[[int, JobReturn], None]) -> None:
        """Run the jobs that an iterable yields; it is asked for the next one when a worker is free.

        Args:
            jobs: The number and the overrides of each job.
            most: The number of jobs that it yields at most.
            ended: Called with the number and the result of each job that has ended.

        Raises:
            JobError: No worker can start.
        """
        self.warm_up()
        theirs, lifeline = CONTEXT.Pipe(duplex=False)
        places = TemporaryDirectory()
        task = self.task_function.__module__, self.task_function.__name__
        arguments = theirs, places.name, self.gpus, self.context, self.config, *task
        pool = ProcessPool(min(self.processes, most), initializer=start_worker, initargs=arguments, context=CONTEXT)
        remaining, running = iter(jobs), dict[Future[Any], int]()
        try:
            with env_override(self.environment):  # Pebble restarts a server that has died
                with starting_workers():
                    CONTEXT.Process(target=int).start()  # returns after the imports of the server
                while True:
                    for job in islice(remaining, self.processes - len(running)):
                        with starting_workers(), defer_signals():  # a worker that starts needs its parent
                            running[pool.schedule(run_job_here, job)] = job[0]
                    if not running:
                        return
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        ended(running.pop(done), report(done))
        except Interrupted as interrupted:
            pool.stop()  # before workers that end are replaced
            workers = multiprocessing.active_children()
            for process in workers:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, interrupted.signum)  # type: ignore[arg-type]  # it has started
            time.sleep(0.1)  # a job records the first signal that it receives
            for process in workers:
                process.terminate()  # which ends those that have no job yet
            raise
        finally:
            pool.stop()
            lifeline.close()
            pool.join()
            places.cleanup()


@contextmanager
def starting_workers() -> Iterator[None]:
    """Raise JobError if the block cannot start a process."""
    try:
        yield
    except (EOFError, OSError, RuntimeError) as error:
        raise JobError("no worker could start; the machine may have run out of memory") from error


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def list_gpus(gpus: Any) -> list[str]:
    """Return the GPUs that `hydra.launcher.gpus` names, as CUDA_VISIBLE_DEVICES does; raises UserError."""
    if gpus == "none":
        return []
    if gpus == "all":
        count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        return visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    if not isinstance(gpus, ListConfig) or not all(isinstance(number, int) and number >= 0 for number in gpus):
        raise UserError.invalid("hydra.launcher.gpus", gpus, "all, none, or a list of numbers such as [0,1]")
    return [str(number) for number in gpus]


def take_gpu(places: str, gpus: Sequence[str]) -> None:
    """Take a free place of a worker, and the GPU that belongs to it.

    The system unlocks the place of a worker that dies, so that the one that replaces it finds it free.

    Args:
        places: The folder of the places' locks.
        gpus: The GPU of each place, empty without one.
    """
    global _place
    while True:
        for place, gpu in enumerate(gpus):
            with suppress(Timeout):
                _place = FileLock(f"{places}/{place}")
                _place.acquire(blocking=False)
                os.environ["CUDA_VISIBLE_DEVICES"] = gpu
                return
        time.sleep(0.1)


def report(job: "Future[Any]") -> JobReturn:
    """Wait for a job and return its result."""
    try:
        status, value = job.result()
    except ProcessExpired as died:
        if died.exitcode == SERVER_DIED:  # the process may still run the job
            with suppress(ProcessLookupError):
                os.kill(died.pid, signal.SIGKILL)
        how = signal.Signals(-died.exitcode).name if died.exitcode < 0 else f"status {died.exitcode}"
        return failed(JobError(f"{DIED} ({how})"))
    except BrokenProcessPool:  # the server died, or a worker died while no other ran a job
        return failed(JobError(DIED))
    return JobReturn(status=status, _return_value=value) if status == JobStatus.COMPLETED else failed(JobError(value))


def start_worker(
    lifeline: "Connection[Any, Any]",
    places: str,
    gpus: Sequence[str],
    context: HydraContext,
    config: DictConfig,
    module: str,
    name: str,
) -> None:
    """Prepare this process for jobs.

    Args:
        lifeline: Closed when the pool ends or its process dies.
        places: As in `take_gpu`.
        gpus: As in `take_gpu`.
        context: Hydra's context.
        config: The composed configuration, with Hydra's node.
        module: The module of the function that runs a job, which `hydra.main` decorates.
        name: The name of the function.
    """
    global _worker
    take_gpu(places, gpus)
    setup_globals()
    Plugins.instance()
    JobRuntime.instance().set("name", config.hydra.job.name)
    _worker = context, config, inspect.unwrap(getattr(import_module(module), name))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINAL)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def run_job_here(number: int, overrides: list[str]) -> tuple[JobStatus, Any]:
    """Run a job in this worker; return its status with its value, or with the message of its failure."""
    context, config, task = _worker
    try:
        try:
            with safe_output():
                composed = context.config_loader.load_sweep_config(config, overrides)
                with open_dict(composed):
                    composed.hydra.job.id, composed.hydra.job.num = str(number), number
                result = run_job(task, composed, "hydra.sweep.dir", "hydra.sweep.subdir", context)
        finally:
            let_end()
    except Interrupted as interrupted:
        signal.raise_signal(interrupted.signum)  # ends this process, which would run the next job
    except BaseException as error:  # also SystemExit
        return JobStatus.FAILED, str(error)
    value = result_of(result)
    return result.status, str(value) if isinstance(value, Exception) else value  # an exception may contain any object


def let_end() -> None:
    """Let each of SIGNALS end this process at once, without a stack trace; under `nohup`, SIGHUP stays ignored."""
    for signum in SIGNALS:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, signal.SIG_DFL)


def _end_with(lifeline: "Connection[Any, Any]") -> None:
    """End this process when `lifeline` is closed, or as soon as its job has recorded its end."""
    lifeline.poll(None)
    while True:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
