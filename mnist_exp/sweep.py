"""A sweep: one parent run in MLflow, a child for every job, under any of Hydra's launchers; Hydra's sweeper for grids."""

import copy
import csv
import io
import json
import re
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mnist_exp import output
from mnist_exp.config import build, digest, resolve
from mnist_exp.definition import Definition, Job
from mnist_exp.errors import ResumableError, UserError
from mnist_exp.overrides import GROUPS, command, is_location, key_of, location_overrides, parse, quoted
from mnist_exp.signals import Interrupted, raise_interrupted, uninterrupted

if TYPE_CHECKING:
    from mnist_exp.tracking import NoTracker, Record

RANKED_BY = "val/accuracy"  # never the test set's
CLOCKS_DIFFER = 60_000  # ms, at most, between the machines of a cluster
ROWS_SHOWN = 50  # MLflow cuts a description at 8,000 characters
BEST_NAMED = 3
# Colours that colour-blind people tell apart (Okabe and Ito, 2008).
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SHOWN = ("val/accuracy", "test/accuracy", "test/loss", "time/total_seconds")


def differing(overrides: Sequence[str], varied: Sequence[str]) -> list[str]:
    """Return those overrides whose keys are `varied` over a sweep."""
    return [override for override in overrides if key_of(override) in varied]


def short(override: str, choices: dict[str, str]) -> str:
    """Return an override as it stands in a run's name: `adam` for optimizer=adam, `bs=64` for batch_size=64, ids cut short."""
    override = re.sub("([0-9a-f]{8})[0-9a-f]{24}", r"\1", override)
    key, _, value = override.partition("=")
    if choices.get(key) == value:
        return value
    return f"{'bs' if key == 'batch_size' else key.rpartition('.')[2]}={value}" if value else override


@dataclass
class Sweep:
    """A sweep while it runs.

    where: the overrides that say where things lie, which a resumed job is given again; told: what every job is told beside its
    own overrides; folder: of the parent; returns: what the launcher has said of jobs, by number.
    """

    tracked: "NoTracker"
    jobs: list[Job]
    total: int
    varied: list[str]
    overrides: list[str]
    where: list[str]
    told: list[str]
    folder: Path
    software: dict[str, str]
    insist: bool
    returns: dict[int, JobReturn] = field(default_factory=dict)

    def store_definition(self, sweeper: str) -> None:
        """Leave in the parent what `sweep.resume` needs."""
        definition = Definition(sweeper, self.total, self.overrides, self.software, self.jobs)
        self.tracked.text(definition.as_json(), "sweep.json")


class GridSweeper(Sweeper):
    """Runs every combination of a command line's choices, each once; what a sweep lacks when it is resumed, and no more.

    params: choices by key, as on the command line, for presets.
    """

    chosen: tuple[str, ...] = ()  # what the command line needs to have this sweeper

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands over."""
        from hydra.core.plugins import Plugins

        self.loader, self.composed = hydra_context.config_loader, config
        self._bases: dict[tuple[str, ...], DictConfig] = {}
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs that `arguments` define, or those that the sweep `sweep.resume` still lacks; raises UserError."""
        from mnist_exp import provenance
        from mnist_exp.console import SweepDisplay

        raise_interrupted()
        self.recipe = config = resolve(_without_hydra(self.composed))
        wishes = config["sweep"]
        if wishes["on_failure"] == "stop" and not hasattr(self.launcher, "stops_on_failure"):
            raise UserError("sweep.on_failure=stop needs hydra/launcher=workers: other launchers start all jobs at once.")
        tracker = build(config["tracking"], "tracking")
        output_dir = output.make_folder(Path(config["output_dir"]))
        given = [override for override in arguments if key_of(override).partition(".")[0] != "sweep"]
        where = [override for override in given if is_location(override)]
        overrides = [f"{key}={value}" for key, value in self.params.items()]
        overrides += [override for override in given if override not in where]
        software = provenance.software()
        sweep_id, definition = None, None
        if wishes["resume"]:
            tracker.reap(output_dir)
            parent, definition = tracker.find_sweep(wishes["resume"], finished_too=False)
            self._refuse_elsewhere(parent, output_dir, where)
            composed = [self.job(stored.number, stored.overrides) for stored in definition.jobs]
            if not wishes["insist"]:
                self._refuse_changes(definition, composed, overrides, software)
            sweep_id, overrides, jobs = parent.run_id, definition.overrides, definition.jobs
        else:
            jobs = self.define(overrides)
        getattr(self.launcher, "warm_up", lambda: None)()  # now that nothing is left to be refused
        varied = self.varied(jobs, overrides)
        owner = provenance.owner_tags(output_dir)
        tags = provenance.git_tags() | software | owner | {"overrides": " ".join(overrides)}
        tags["mlflow.source.name"] = command("run", "-m", *self.chosen, *overrides)
        total = self.total(jobs, definition)
        tags["sweep_jobs"] = str(total)
        with ExitStack() as lock, ExitStack() as held:  # the lock is let go when the sweep's end is written, not before
            if sweep_id:
                lock.enter_context(output.hold(output_dir / sweep_id))
            tracker.open()  # which may have to wait, and can be stopped
            with uninterrupted():  # what has begun is told how it ended
                tracked = held.enter_context(tracker.start(f"sweep {' by '.join(varied) or 'of one'}", tags, sweep_id))
            folder = output_dir / tracked.run_id
            again = command("run", "-m", *self.chosen, f"sweep.resume={tracked.run_id}", *location_overrides(config))
            lock.enter_context(how_to_go_on(again))
            told = [f"sweep.id={tracked.run_id}", f"sweep.varied={json.dumps(varied)}"]
            sweep = Sweep(tracked, jobs, total, varied, overrides, where, told, folder, software, wishes["insist"])
            if sweep_id:
                tracked.tags(owner)
            else:
                lock.enter_context(output.hold(folder))
                tracked.reap(output_dir)
                sweep.store_definition(type(self).__name__)
            display = SweepDisplay(total)

            def conclude() -> list[dict[str, str]]:
                tracked.reap(output_dir)
                rows = table(sweep.jobs, tracked.children(), sweep.returns)
                if rows:
                    tracked.text(as_csv(rows), "results.csv")
                    tracked.tags({"mlflow.note.content": description(rows, tracked, again)})
                    display.results(rows, tracked.how_to_open())
                return rows

            try:
                with display.following(Progress(tracked).look):
                    self.run_jobs(sweep)
            except BaseException:
                with suppress(Exception):  # what ended the sweep is to be told, not that the store is gone, too
                    conclude()
                raise
            rows = conclude()
            failed = [row for row in rows if row["status"] not in ("FINISHED", "PRUNED")]
            if failed:
                first = failed[0]
                raise UserError(
                    f"{len(failed)} of {len(rows)} jobs did not finish; the first of them, job {first['job']}: "
                    f"{first['error'] or first['status']}\n"
                    f"Once the cause is mended, `{again}` does the rest."
                )

    def define(self, overrides: list[str]) -> list[Job]:
        """Return every combination of the choices in `overrides`, composed and checked before any of them runs."""
        (combinations,) = BasicSweeper.split_arguments(self.parse(overrides), max_batch_size=None)
        jobs: dict[tuple[str, ...], Job] = {}
        for combination in combinations:
            job = self.job(len(jobs), combination)
            runs = (override for override in combination if key_of(override) in ("resume", "rerun"))
            jobs.setdefault((job.config_hash, *runs), job)  # two combinations can come to the same
        return list(jobs.values())

    def parse(self, overrides: list[str]) -> list[Override]:
        """Return what Hydra makes of a command line."""
        return OverridesParser.create(config_loader=self.loader).parse_overrides(overrides)

    def job(self, number: int, overrides: list[str]) -> Job:
        """Return a job, composed and checked; raises UserError."""
        config = resolve(self._compose(overrides))
        self.check(config)
        return Job(number, list(overrides), digest(config))

    def _compose(self, overrides: list[str]) -> DictConfig:
        """Return what the overrides compose, as Hydra does it, but for plain values without composing all else again.

        Hydra takes a fifth of a second for each: too long to find a mistake in the last of hundreds of jobs.
        """
        plain = {override: parsed for override in overrides if (parsed := _plain_value(override))}
        rest = tuple(override for override in overrides if override not in plain)
        if rest not in self._bases:
            self._bases[rest] = _without_hydra(self.loader.load_sweep_config(self.composed, list(rest)))
        config = copy.deepcopy(self._bases[rest])
        try:
            for parsed in plain.values():
                OmegaConf.update(config, parsed.key_or_group, parsed.value(), merge=True)
        except OmegaConfBaseException:  # Hydra says what is wrong, or it was the order
            return _without_hydra(self.loader.load_sweep_config(self.composed, overrides))
        return config

    def check(self, config: dict[str, Any]) -> None:
        """Raise UserError on the configuration of a job that this sweeper must not run."""

    def total(self, jobs: list[Job], definition: Definition | None) -> int:
        """Return how many jobs there will be; definition: of the sweep that is gone on with, if one is."""
        return len(jobs)

    def varied(self, jobs: list[Job], overrides: list[str]) -> list[str]:
        """Return the keys that not all jobs override with the same value, in the order of the command line."""
        values: dict[str, set[str]] = {}
        for job in jobs:
            for override in job.overrides:
                values.setdefault(key_of(override), set()).add(override)
        return [key for key, seen in values.items() if len(seen) > 1]

    def run_jobs(self, sweep: Sweep) -> None:
        """Run the jobs, and those again that did not finish, as often as `sweep.retries` says."""
        self.launch_missing(sweep, sweep.jobs)

    def launch_missing(self, sweep: Sweep, jobs: list[Job]) -> None:
        """Run those of `jobs` that have not finished, and again, as often as `sweep.retries` says."""
        for _ in range(1 + self.recipe["sweep"]["retries"]):
            self._launch_missing(sweep, jobs)

    def _launch_missing(self, sweep: Sweep, jobs: list[Job]) -> None:
        """Have the launcher run what has not finished: from its last checkpoint, where it has one, else from the start."""
        if not sweep.insist:
            wait_for_orphans(sweep.tracked, sweep.folder.parent)
        children = sweep.tracked.children()
        latest = by_job(children)
        data = {child.tags.get("data", "") for child in children if child.status == "FINISHED"}
        one_data = len(data) == 1 and not any(re.match(r"data\b", key) for key in sweep.varied)
        expected = [f"sweep.data={quoted(data.pop())}"] if one_data and not sweep.insist else []
        painted = colours(sweep.jobs)
        todo: dict[int, list[str]] = {}
        for job in jobs:
            child, returned = latest.get(job.number), sweep.returns.get(job.number)
            if is_done(child) if child else returned and returned.status == JobStatus.COMPLETED:
                continue
            overrides = job.overrides
            if child and output.has_checkpoint(sweep.folder.parent / child.run_id):
                overrides = [f"resume={child.run_id}"]
            elif child:
                sweep.tracked.delete(child.run_id)
            place = [f"sweep.job={job.number}", f"sweep.colour={quoted(painted[job.number])}"]
            todo[job.number] = [*overrides, *sweep.where, *sweep.told, *expected, *place]
        if not todo:
            return
        try:
            results = self.launcher.launch(list(todo.values()), initial_job_idx=min(todo))
        except UserError:
            raise
        except Exception as error:  # some launchers raise what their first job raised, after all have run
            results = [_failed(error) for _ in todo]
        sweep.returns |= dict(zip(todo, results, strict=True))
        for number, child in by_job(sweep.tracked.children()).items():
            if number in todo and child.status in ("RUNNING", "KILLED"):  # wherever it ran, its launcher has returned without it
                sweep.tracked.close(child.run_id, reason(sweep.returns[number]) or "its process died")

    def _refuse_elsewhere(self, parent: "Record", output_dir: Path, where: list[str]) -> None:
        """Raise UserError if a sweep says that its checkpoints lie elsewhere, and the command line does not say where.

        The tag is never followed by itself: whoever can write to the store could send a sweep anywhere with it.
        """
        there = parent.tags.get("output_dir", "")
        if there != str(output_dir.absolute()) and not any(key_of(override) == "output_dir" for override in where):
            raise UserError(
                f"sweep.resume={parent.run_id}: the sweep was begun with another output_dir than {output_dir.absolute()}: its "
                f"parent says {there!r}. If its checkpoints lie there, add {shlex.quote(f'output_dir={quoted(there)}')}."
            )

    def _refuse_changes(
        self, definition: Definition, composed: list[Job], overrides: list[str], software: dict[str, str]
    ) -> None:
        """Raise UserError if what the sweep was defined by has changed since; composed: its jobs as they are composed now."""
        then = definition.software
        changed = [f"{key} was {then.get(key)}, is {value}" for key, value in software.items() if then.get(key) != value]
        if type(self).__name__ != definition.sweeper:
            changed.append(f"the sweeper was {definition.sweeper.lower()}: hydra/sweeper={definition.sweeper.lower()}")
        if overrides and overrides != definition.overrides:
            changed.append(f"the command line was {' '.join(definition.overrides)}, is {' '.join(overrides)}")
        for stored, job in zip(definition.jobs, composed, strict=True):
            if job.config_hash != stored.config_hash:
                changed.append(f"the configuration of job {stored.number} ({' '.join(stored.overrides)}) is another")
                break
        if changed:
            raise UserError(
                f"sweep.resume: this is not what the sweep was begun with: {'; '.join(changed)}. "
                "Start a new sweep, or go on all the same, by the stored definition, with sweep.insist=true."
            )


def colours(jobs: Sequence[Job]) -> dict[int, str]:
    """Return each job's colour in the UI's charts, by number: the same for jobs that differ in the seed alone."""
    arms = {job.number: tuple(override for override in job.overrides if key_of(override) != "seed") for job in jobs}
    places = {arm: place for place, arm in enumerate(dict.fromkeys(arms.values()))}
    return {number: COLOURS[places[arm] % len(COLOURS)] for number, arm in arms.items()}


def as_csv(rows: list[dict[str, str]]) -> str:
    """Return a table as comma-separated values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def is_done(child: "Record") -> bool:
    """Return whether nothing is left to do for a job: it has finished, or a search has given it up."""
    return child.status == "FINISHED" or "pruned" in child.tags


@cache
def _plain_value(override: str) -> Override | None:
    """Return an override as parsed if all that it does is to set a key to a value, else None."""
    (parsed,) = parse([override])
    key = parsed.key_or_group
    is_change = not (parsed.is_add() or parsed.is_force_add() or parsed.is_delete() or parsed.is_sweep_override())
    return parsed if is_change and parsed.package is None and key not in GROUPS and "/" not in key else None


def _failed(error: Exception) -> JobReturn:
    result = JobReturn()
    result.return_value, result.status = error, JobStatus.FAILED
    return result


def _without_hydra(composed: DictConfig) -> DictConfig:
    config = composed.copy()
    with open_dict(config):
        config.pop("hydra", None)
    return config


def by_job(children: list["Record"]) -> dict[int, "Record"]:
    """Return the child that stands for each job: the finished one, else the newest."""
    ordered = sorted(children, key=lambda child: (child.status == "FINISHED", child.started))
    return {child.job: child for child in ordered if child.job is not None}


def wait_for_orphans(tracked: "NoTracker", output_dir: Path, patience: float = 60.0) -> None:
    """Wait for the jobs that a killed parent has left behind: they end themselves. Raises UserError if one does not."""
    deadline = time.monotonic() + patience
    while True:
        tracked.reap(output_dir)
        alive = [child for child in tracked.children() if child.status == "RUNNING"]
        if not alive:
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"Run {alive[0].run_id} of this sweep is still worked on, as far as can be seen, by process "
                f"{alive[0].tags.get('pid')} on {alive[0].tags.get('host')}. Wait for it or stop it; if it is dead, "
                f"`{command('runs', 'reap')}` on that machine says so, or go on with sweep.insist=true."
            )
        time.sleep(1)


@dataclass
class Progress:
    """What has become of a sweep's jobs so far; ended: status and validation accuracy by job; until: ms, when the last ended."""

    tracked: "NoTracker"
    ended: dict[int, tuple[str, float | None]] = field(default_factory=dict)
    until: int = 0

    def look(self) -> tuple[int, int, float | None]:
        """Read what has ended since the last look: return jobs finished, jobs failed, and the best validation accuracy."""
        children = self.tracked.children(ended_after=self.until - CLOCKS_DIFFER if self.until else 1)
        for number, child in by_job(children).items():
            self.ended[number] = child.status, child.metrics.get(RANKED_BY)
            self.until = max(self.until, child.ended or 0)
        statuses = Counter(status for status, _ in self.ended.values())
        best = [accuracy for status, accuracy in self.ended.values() if status == "FINISHED" and accuracy is not None]
        return statuses["FINISHED"], statuses["FAILED"] + statuses["KILLED"], max(best, default=None)


def reason(returned: JobReturn | None) -> str:
    """Return in one line why a job did not finish, as it has told its launcher; empty where it has not."""
    value = returned._return_value if returned else None
    return str(value).splitlines()[0] if isinstance(value, BaseException) and str(value) else ""


@contextmanager
def how_to_go_on(again: str) -> Iterator[None]:
    """Add the command `again` to an exception that leaves a sweep unfinished."""
    try:
        yield
    except (Interrupted, ResumableError) as error:
        error.add_note(f"`{again}` goes on with the sweep.")
        raise


def table(jobs: list[Job], children: list["Record"], returns: dict[int, JobReturn]) -> list[dict[str, str]]:
    """Return a row for each job: number, name, status, metrics, run, error."""
    latest = by_job(children)
    rows = []
    for job in jobs:
        child, returned = latest.get(job.number), returns.get(job.number)
        value = returned._return_value if returned else None
        error = reason(returned)
        if child:
            status = "PRUNED" if "pruned" in child.tags else child.status
            error = (error or child.tags.get("error", "")) if status != "FINISHED" else ""
        elif returned and returned.status == JobStatus.COMPLETED:
            status = "FINISHED"
        else:
            status = "NOT STARTED" if returned is None or returned.status == JobStatus.UNKNOWN else "FAILED"
        metrics = child.metrics if child else {RANKED_BY: value} if isinstance(value, float) else {}
        name = child.name if child else " ".join(job.overrides)
        rows.append(
            {"job": str(job.number), "name": name, "status": status}
            | {key: f"{metrics[key]:.5g}" if key in metrics else "" for key in SHOWN}
            | {"run": child.run_id if child else "", "error": error}
        )
    return rows


def description(rows: list[dict[str, str]], tracked: "NoTracker", again: str) -> str:
    """Return the parent's description in Markdown: counts by status, the best by validation, the table."""
    counts = ", ".join(f"{count} {status}" for status, count in Counter(row["status"] for row in rows).most_common())
    scored = [row for row in rows if row["status"] == "FINISHED" and row[RANKED_BY]]
    lines = [f"{len(rows)} jobs: {counts}."]
    if scored:
        highest = max(float(row[RANKED_BY]) for row in scored)
        best = [row for row in scored if float(row[RANKED_BY]) == highest]
        named = ", ".join(f"[{row['name']}]({tracked.link(row['run'])})" for row in best[:BEST_NAMED])
        more = f" and {len(best) - BEST_NAMED} more" if len(best) > BEST_NAMED else ""
        tied = f"{len(best)} tie: " if len(best) > 1 else ""
        lines.append(f"Best by {RANKED_BY}, {highest:.2%}: {tied}{named}{more}.")
    shown = ("job", "name", "status", *SHOWN)
    lines += ["", f"| {' | '.join(shown)} |", f"|{' --- |' * len(shown)}"]
    lines += [f"| {' | '.join(row[key] for key in shown)} |" for row in rows[:ROWS_SHOWN]]
    lines += [f"\n... and {len(rows) - ROWS_SHOWN} more, in `results.csv`."] if len(rows) > ROWS_SHOWN else []
    lines += ["", f"`{again}` does what has not finished."]
    return "\n".join(lines)
