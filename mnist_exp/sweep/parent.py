"""The parent run of a sweep: define it, resume it, finalize it."""

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus

from mnist_exp.errors import ResumableError, UserError
from mnist_exp.overrides import command, key_of, quoted
from mnist_exp.settings import JobContext, Settings
from mnist_exp.signals import Interrupted, defer_signals
from mnist_exp.storage import run_dir
from mnist_exp.sweep.jobs import Job, common_data, failure_reason, job_colors
from mnist_exp.sweep.summary import describe_sweep, job_table, sweep_metrics
from mnist_exp.tracking import provenance
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import DeniedError, RunInfo, RunRecord, Store, Sweep, Tracker, grids_text, latest_run_per_job
from mnist_exp.tracking.frame import frame

ORPHAN_PATIENCE = 60.0  # seconds for the jobs of a killed parent to end


@dataclass
class Parent:
    """The parent of a sweep: its jobs, the overrides that define them, and its own run.

    Args:
        store: Holds the runs of the jobs.
        settings: The settings of the command line.
        sweeper: The name of what proposes the jobs.
        grids: The overrides of each grid.
        jobs: The jobs that are known so far; a search appends those that it proposes.
        total: The number of jobs, including those that a search has not proposed yet.
        swept_keys: The keys that differ between jobs.
        locations: The overrides of locations on the command line, which every job receives.
        selecting_overrides: The overrides that select the sweeper and the launcher.
        objective: The metric that decides.

    Attributes:
        tracker: Of the parent's own run, once it is open.
        results: The reports of the launcher, by job.
    """

    store: Store
    settings: Settings
    sweeper: str
    grids: list[list[str]]
    jobs: list[Job]
    total: int
    swept_keys: list[str]
    locations: list[str]
    selecting_overrides: list[str]
    objective: str
    tracker: Tracker = field(init=False)
    results: dict[int, JobReturn] = field(default_factory=dict, init=False)

    @property
    def folder(self) -> Path:
        """The sweep's own folder."""
        return self.settings.output_dir / self.tracker.run_id

    @property
    def resume_command(self) -> str:
        """The command that resumes the sweep."""
        return command("run", "-m", *self.selecting_overrides, f"sweep.resume={quoted(self.tracker.run_id)}")

    @contextmanager
    def open(self, stored: Sweep | None) -> Iterator[None]:
        """Start the run for the block, or resume that of `stored`, whose folder the caller has locked."""
        output_dir, first = self.settings.output_dir, self.grids[0]
        process_tags = provenance.process_tags(output_dir)
        sweep_tags = {
            tag.GRIDS: grids_text(self.grids),
            tag.SWEEPER: self.sweeper,
            tag.SWEEP_JOBS: str(self.total),
            tag.OBJECTIVE: self.objective,
            tag.KEYS: " ".join(self.swept_keys),
            tag.FINISHED: "",
        }
        tags = provenance.git_tags() | provenance.software() | process_tags | sweep_tags | {tag.OVERRIDES: shlex.join(first)}
        name = f"sweep {' by '.join(self.swept_keys) or 'of one'}"
        info = RunInfo(name, command("run", "-m", *self.selecting_overrides, *first), tags)
        with ExitStack() as lock, ExitStack() as running:  # the lock outlasts the final status
            self.store.open()  # may take long and be interrupted
            with defer_signals():  # a sweep that has started must get a final status
                self.tracker = running.enter_context(self.store.start(info, stored.run_id if stored else None))
            lock.enter_context(_resume_advice(self.resume_command))
            if stored:
                # Before the first job starts. Answers from fewer jobs no longer hold.
                answers = {name: "" for name in stored.tags if name.partition(".")[0] == tag.ANSWER}
                self.store.set_tags(stored.run_id, process_tags | sweep_tags | answers)
            else:
                lock.enter_context(run_dir.lock_run(self.folder))
                self.store.reap(output_dir)
            yield

    def children(self) -> list[RunRecord]:
        """Return the runs of the jobs."""
        return self.store.children(self.tracker.run_id)

    def missing(self, jobs: Sequence[Job]) -> dict[int, list[str]]:
        """Return the overrides of those of `jobs` that have not finished; each resumes its last checkpoint if it has one."""
        children, colors = self.children(), job_colors(self.jobs)
        runs = latest_run_per_job(children)
        data = None if self.settings.sweep.force else common_data(children, self.swept_keys)
        missing = {}
        for job in jobs:
            child, result = runs.get(job.number), self.results.get(job.number)
            if child.is_done if child else result and result.status == JobStatus.COMPLETED:
                continue
            overrides = job.overrides
            if child and run_dir.has_checkpoint(self.settings.output_dir / child.run_id):
                overrides = [f"resume={quoted(child.run_id)}"]
            elif child:
                with suppress(DeniedError):  # the new run of the job counts, being newer
                    self.store.delete(child.run_id)
            context = JobContext(
                sweep_id=self.tracker.run_id,
                number=job.number,
                color=colors[job.number],
                varied=self.swept_keys,
                objective=self.objective,
                data=data,
                in_search=self.sweeper != "grid",
            )
            missing[job.number] = [*overrides, *self.locations, context.as_override()]
        return missing

    def mark_killed(self, numbers: Sequence[int]) -> None:
        """Set the runs of jobs that are still RUNNING to KILLED: they have ended without a record of it."""
        for number, child in latest_run_per_job(self.children()).items():
            if number in numbers and child.status in ("RUNNING", "KILLED"):
                self.store.mark_killed(child.run_id, failure_reason(self.results.get(number)) or provenance.PROCESS_DIED)

    def wait_for_running_jobs(self) -> None:
        """Wait for jobs of a killed parent, which end by themselves; raises UserError if one does not."""
        deadline = time.monotonic() + ORPHAN_PATIENCE
        while True:
            self.store.reap(self.settings.output_dir)
            alive = [child for child in self.children() if child.status == "RUNNING"]
            if not alive:
                return
            if time.monotonic() > deadline:
                raise UserError(
                    f"Run {alive[0].run_id} of this sweep still seems to be running, as process {alive[0].tags.get(tag.PID)} on "
                    f"{alive[0].tags.get(tag.HOST)}. Wait for it or stop it. If it is dead, run `{command('runs', 'reap')}` on "
                    "that machine, or continue with sweep.force=true."
                )
            time.sleep(1)

    def finalize(self) -> list[dict[str, str]]:
        """Record the results of all jobs; return them as the rows of a table."""
        self.store.reap(self.settings.output_dir)
        children = self.children()
        rows = job_table(self.jobs, children, self.results, self.objective)
        if rows and self.tracker.is_recording:
            sweep = self.store.find_sweep(self.tracker.run_id)
            self.tracker.log_text(frame([(sweep, children)]).to_csv(index=False), "results.csv")
            self.tracker.log_results(sweep_metrics(children, self.objective))
            finished = sum(row["status"] == "FINISHED" for row in rows)
            data = common_data(children, self.swept_keys)
            self.tracker.set_tags({tag.FINISHED: f"{finished} of {self.total}"} | ({tag.DATA: data} if data else {}))
            self.tracker.set_description(describe_sweep(rows, children, self.store, sweep, self.resume_command))
        return rows


@contextmanager
def _resume_advice(resume_command: str) -> Iterator[None]:
    """Add the command that resumes the sweep to an error that leaves it unfinished."""
    try:
        yield
    except (Interrupted, ResumableError) as error:
        error.add_note(f"`{resume_command}` resumes the sweep.")
        raise


def check_output_dir(parent: RunRecord, output_dir: Path, locations: Sequence[str], key: str) -> None:
    """Raise UserError if the sweep's checkpoints are in another folder, unless the command line names output_dir.

    The tag alone is never trusted: anyone who can write to the store could redirect a sweep with it.
    """
    stored = parent.tags.get(tag.OUTPUT_DIR, "")
    if stored != str(output_dir.absolute()) and not any(key_of(override) == "output_dir" for override in locations):
        raise UserError(
            f"{key}={parent.run_id}: the sweep was not started with output_dir={output_dir.absolute()}, but with "
            f"{stored!r}, according to its parent. If its checkpoints are there, add "
            f"{shlex.quote(f'output_dir={quoted(stored)}')}."
        )
