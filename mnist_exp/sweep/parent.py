"""The parent run of a sweep: define it, resume it, conclude it."""

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from mnist_exp.errors import ResumableError, UserError
from mnist_exp.overrides import command, key_of, location_overrides, quoted
from mnist_exp.signals import Interrupted, defer_signals
from mnist_exp.storage import run_dir
from mnist_exp.sweep.jobs import by_job, common_data, failure_reason, job_colors
from mnist_exp.sweep.summary import describe_sweep, job_table, results_csv, sweep_metrics
from mnist_exp.tracking import provenance
from mnist_exp.tracking.base import PROCESS_DIED, RunInfo, RunRecord, Store, Tracker
from mnist_exp.tracking.definition import Definition, Job, JobContext, sweep_params
from mnist_exp.tracking.tags import ANSWER, HOST, OUTPUT_DIR, OVERRIDES, PID, SWEEP_JOBS

ORPHAN_PATIENCE = 60.0  # seconds for the jobs of a killed parent to end


@dataclass
class Parent:
    """The parent of a sweep that is running.

    Args:
        store: Holds the runs of the jobs.
        tracker: Of the parent's own run.
        output_dir: The folder of all runs.
        definition: The sweep's definition; a search appends its jobs.
        varied: The keys that differ between jobs.
        locations: The overrides of locations on the command line, which every job receives.
        resume_command: The command that resumes the sweep.
        force: Whether to skip the checks for changes and for running jobs.
        in_search: Whether a search proposes the jobs.
        returns: The reports of the launcher, by job.
    """

    store: Store
    tracker: Tracker
    output_dir: Path
    definition: Definition
    varied: list[str]
    locations: list[str]
    resume_command: str
    force: bool
    in_search: bool = False
    returns: dict[int, JobReturn] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The sweep's own folder."""
        return self.output_dir / self.tracker.run_id

    def children(self) -> list[RunRecord]:
        """Return the runs of the jobs."""
        return self.store.children(self.tracker.run_id)

    def define(self) -> None:
        """Record the definition, which `sweep.resume` reads."""
        self.tracker.log_text(self.definition.as_json(), "sweep.json")
        self.tracker.set_tags({SWEEP_JOBS: str(self.definition.total)})
        self.tracker.log_params(sweep_params(self.definition))

    def confirm(self) -> None:
        """Raise ResumableError unless the store has the definition: jobs that it does not know would be lost to `compare`."""
        self.tracker.flush()
        if self.tracker.is_recording:
            _, stored = self.store.find_sweep(self.tracker.run_id, finished_too=True)
            if stored.as_json() != self.definition.as_json():
                raise ResumableError("The store has not recorded the definition of the sweep, so no job was started. Try again.")

    def missing(self, jobs: Sequence[Job]) -> dict[int, list[str]]:
        """Return the overrides of those of `jobs` that have not finished; each resumes its last checkpoint if it has one."""
        children = self.children()
        runs, colors = by_job(children), job_colors(self.definition.jobs)
        data = None if self.force else common_data(children, self.varied)
        missing = {}
        for job in jobs:
            child, returned = runs.get(job.number), self.returns.get(job.number)
            if child.is_done if child else returned and returned.status == JobStatus.COMPLETED:
                continue
            overrides = job.overrides
            if child and run_dir.has_checkpoint(self.output_dir / child.run_id):
                overrides = [f"resume={child.run_id}"]
            elif child:
                self.store.delete(child.run_id)
            context = JobContext(self.tracker.run_id, job.number, colors[job.number], self.varied, data, self.in_search)
            missing[job.number] = [*overrides, *self.locations, context.as_override()]
        return missing

    def mark_dead(self, numbers: Sequence[int]) -> None:
        """Set the runs of jobs that are still RUNNING to KILLED; the launcher has returned without them."""
        for number, child in by_job(self.children()).items():
            if number in numbers and child.status in ("RUNNING", "KILLED"):
                self.store.mark_killed(child.run_id, failure_reason(self.returns[number]) or PROCESS_DIED)

    def wait_for_orphans(self) -> None:
        """Wait for jobs of a killed parent, which end by themselves; raises UserError if one does not."""
        deadline = time.monotonic() + ORPHAN_PATIENCE
        while True:
            self.store.reap(self.output_dir)
            alive = [child for child in self.children() if child.status == "RUNNING"]
            if not alive:
                return
            if time.monotonic() > deadline:
                raise UserError(
                    f"Run {alive[0].run_id} of this sweep still seems to be running, as process {alive[0].tags.get(PID)} on "
                    f"{alive[0].tags.get(HOST)}. Wait for it or stop it. If it is dead, run `{command('runs', 'reap')}` on "
                    "that machine, or continue with sweep.force=true."
                )
            time.sleep(1)

    def conclude(self) -> list[dict[str, str]]:
        """Record the results of all jobs; return them as the rows of a table."""
        self.store.reap(self.output_dir)
        children = self.children()
        rows = job_table(self.definition.jobs, children, self.returns)
        if rows:
            self.tracker.log_text(results_csv(self.definition.jobs, children, self.returns), "results.csv")
            self.tracker.log_results(sweep_metrics(rows, children))
            sweep_id, resume = self.tracker.run_id, self.resume_command
            self.tracker.set_description(describe_sweep(rows, children, self.store, sweep_id, resume, self.definition))
        return rows


@contextmanager
def open_parent(
    store: Store,
    definition: Definition,
    config: dict[str, Any],
    *,
    sweep_id: str | None,
    stored: Definition | None,
    varied: list[str],
    locations: list[str],
    flags: Sequence[str],
) -> Iterator[Parent]:
    """Start the parent's run, or resume the run `sweep_id`.

    Args:
        store: The store.
        definition: The sweep's definition.
        config: The resolved configuration of the command line.
        sweep_id: The id of a sweep to resume or to extend.
        stored: Its definition, as read before.
        varied: The keys that differ between jobs.
        locations: The overrides of locations on the command line.
        flags: The overrides that select the sweeper.
    """
    output_dir = run_dir.make_folder(Path(config["output_dir"]))
    process_tags = provenance.process_tags(output_dir)
    tags = provenance.git_tags() | definition.software | process_tags
    tags |= {OVERRIDES: " ".join(definition.overrides), SWEEP_JOBS: str(definition.total)}
    info = RunInfo(f"sweep {' by '.join(varied) or 'of one'}", command("run", "-m", *flags, *definition.overrides), tags)
    with ExitStack() as lock, ExitStack() as running:  # the lock outlasts the final status
        if sweep_id:
            lock.enter_context(run_dir.lock_run(output_dir / sweep_id))
        store.open()  # may take long and be interrupted
        if sweep_id and store.find_sweep(sweep_id, finished_too=True)[1] != stored:
            raise UserError(f"Sweep {sweep_id} was changed by another process since it was read. Repeat the command.")
        with defer_signals():  # a sweep that has started must get a final status
            tracker = running.enter_context(store.start(info, sweep_id))
        resume_command = command("run", "-m", *flags, f"sweep.resume={tracker.run_id}", *location_overrides(config))
        lock.enter_context(_resume_advice(resume_command))
        force = config["sweep"]["force"]
        parent = Parent(store, tracker, output_dir, definition, varied, locations, resume_command, force)
        if sweep_id:
            tracker.set_tags(process_tags | {ANSWER: ""})  # an answer from fewer jobs no longer holds
        else:
            lock.enter_context(run_dir.lock_run(parent.folder))
            store.reap(output_dir)
        yield parent


@contextmanager
def _resume_advice(resume_command: str) -> Iterator[None]:
    """Add the command that resumes the sweep to an error that leaves it unfinished."""
    try:
        yield
    except (Interrupted, ResumableError) as error:
        error.add_note(f"`{resume_command}` resumes the sweep.")
        raise


def refuse_other_output_dir(parent: RunRecord, output_dir: Path, locations: Sequence[str], key: str) -> None:
    """Raise UserError if the sweep's checkpoints are in another folder, unless the command line names output_dir.

    The tag alone is never trusted: anyone who can write to the store could redirect a sweep with it.
    """
    stored = parent.tags.get(OUTPUT_DIR, "")
    if stored != str(output_dir.absolute()) and not any(key_of(override) == "output_dir" for override in locations):
        raise UserError(
            f"{key}={parent.run_id}: the sweep was not started with output_dir={output_dir.absolute()}, but with "
            f"{stored!r}, according to its parent. If its checkpoints are there, add "
            f"{shlex.quote(f'output_dir={quoted(stored)}')}."
        )


def refuse_changed_definition(stored: Definition, current: Definition, key: str) -> None:
    """Raise UserError if a sweep would not be resumed or extended as it was started.

    Args:
        stored: The definition in the store.
        current: The same jobs as composed now, with the sweeper, overrides and software of the present command.
        key: The key that asks for it, sweep.resume or sweep.extend.
    """
    before = stored.software
    changed = [f"{key} was {before.get(key)}, is {value}" for key, value in current.software.items() if before.get(key) != value]
    if current.sweeper != stored.sweeper:
        changed.append(f"the sweeper was {stored.sweeper.lower()}: hydra/sweeper={stored.sweeper.lower()}")
    if current.overrides and current.overrides != stored.overrides:
        changed.append(f"the command line was {' '.join(stored.overrides)}, is {' '.join(current.overrides)}")
    for old, new in zip(stored.jobs, current.jobs, strict=True):
        if new.config_hash != old.config_hash:
            changed.append(f"job {old.number} ({' '.join(old.overrides)}) now composes another configuration")
            break
    if changed:
        raise UserError(
            f"{key}: the sweep differs from its start: {'; '.join(changed)}. "
            "Start a new sweep, or continue by the stored definition with sweep.force=true."
        )
