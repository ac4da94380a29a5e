"""A sweep: one parent run in MLflow, a child for every job, under any of Hydra's launchers; Hydra's sweeper for grids."""

import csv
import io
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from mnist_exp import output
from mnist_exp.config import build, digest, resolve
from mnist_exp.errors import UserError
from mnist_exp.signals import raise_interrupted

if TYPE_CHECKING:
    from mnist_exp.tracking import NoTracker, Record

RANKED_BY = "val/accuracy"  # never the test set's
SHOWN = ("val/accuracy", "test/accuracy", "test/loss", "time/total_seconds")


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its number, its overrides, and the digest of the configuration that they compose."""

    number: int
    overrides: list[str]
    config_hash: str


def key_of(override: str) -> str:
    """Return what an override overrides."""
    return override.partition("=")[0].lstrip("+~")


def differing(overrides: Sequence[str], varied: Sequence[str]) -> list[str]:
    """Return those overrides whose keys are `varied` over a sweep."""
    return [override for override in overrides if key_of(override) in varied]


def short(override: str, choices: dict[str, str]) -> str:
    """Return an override as it stands in a run's name: `adam` for optimizer=adam, `bs=64` for batch_size=64."""
    key, _, value = override.partition("=")
    if choices.get(key) == value:
        return value
    return f"{'bs' if key == 'batch_size' else key.rpartition('.')[2]}={value}" if value else override


class GridSweeper(Sweeper):
    """Runs every combination of a command line's choices, each once; what a sweep lacks when it is resumed, and no more.

    params: choices by key, as on the command line, for presets.
    """

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands over."""
        from hydra.core.plugins import Plugins

        self.context, self.task_function, self.composed = hydra_context, task_function, config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs that `arguments` define, or those that the sweep `sweep.resume` still lacks; raises UserError."""
        from mnist_exp import provenance
        from mnist_exp.console import SweepDisplay

        raise_interrupted()
        config = resolve(_without_hydra(self.composed))
        wishes = config["sweep"]
        if wishes["on_failure"] == "stop" and not hasattr(self.launcher, "stops_on_failure"):
            raise UserError("sweep.on_failure=stop needs hydra/launcher=workers: other launchers start all jobs at once.")
        tracker = build(config["tracking"], "tracking")
        output_dir = output.make_folder(Path(config["output_dir"]))
        overrides = [override for override in arguments if not key_of(override).startswith("sweep.")]
        where = [override for override in overrides if re.match(r"(output_dir|tracking(\..*)?)=", override)]
        software = provenance.software()
        sweep_id = None
        if wishes["resume"]:
            tracker.reap()
            parent, definition = tracker.find_sweep(wishes["resume"])
            sweep_id, jobs = parent.run_id, [Job(**job) for job in definition["jobs"]]
            self._refuse_changes(jobs, definition["software"], overrides if overrides != where else None, software, wishes)
        else:
            jobs = self._jobs(overrides)
        varied = _varied(jobs)
        tags = {
            **provenance.git_tags(),
            **software,
            **provenance.owner_tags(output_dir),
            "overrides": " ".join([*(f"{key}={value}" for key, value in self.params.items()), *overrides]),
            "sweep_jobs": str(len(jobs)),
        }
        with ExitStack() as held:
            if sweep_id:
                held.enter_context(output.hold(output_dir / sweep_id))
            tracked = held.enter_context(tracker.start(f"sweep {' by '.join(varied) or 'of one'}", tags, sweep_id))
            if sweep_id:
                tracked.tags(provenance.owner_tags(output_dir))
            else:
                held.enter_context(output.hold(output_dir / tracked.run_id))
                tracked.reap()
                stored = {"jobs": [vars(job) for job in jobs], "software": software}
                tracked.text(json.dumps(stored, indent=1), "sweep.json")
            returns: dict[int, JobReturn] = {}
            display = SweepDisplay(len(jobs))
            try:
                with display.following(lambda: progress(tracked.children())):
                    for _ in range(1 + wishes["retries"]):
                        todo = self._todo(jobs, tracked, returns, varied, where, output_dir, insist=wishes["insist"])
                        if todo:
                            self._launch(todo, returns)
            finally:
                rows = table(jobs, tracked.children(), returns)
                self._record(tracked, rows, varied)
                display.results(rows, tracked.how_to_open())
            failed = [row for row in rows if row["status"] != "FINISHED"]
            if failed:
                first = failed[0]
                raise UserError(
                    f"{len(failed)} of {len(jobs)} jobs did not finish; the first of them, job {first['job']}: "
                    f"{first['error'] or first['status']}\n"
                    f"Once the cause is mended, `python -m mnist_exp.run -m sweep.resume={tracked.run_id}` does the rest."
                )
        return

    def _jobs(self, overrides: list[str]) -> list[Job]:
        """Return every combination of the choices in `overrides`, composed and checked before any of them runs."""
        arguments = [*(f"{key}={value}" for key, value in self.params.items()), *overrides]
        parsed = OverridesParser.create(config_loader=self.context.config_loader).parse_overrides(arguments)
        (combinations,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        jobs: dict[str, Job] = {}
        for combination in combinations:
            composed = self.context.config_loader.load_sweep_config(self.composed, combination)
            config_hash = digest(resolve(_without_hydra(composed)))
            if config_hash not in jobs:  # two combinations can come to the same
                jobs[config_hash] = Job(len(jobs), list(combination), config_hash)
        return list(jobs.values())

    def _refuse_changes(
        self,
        jobs: list[Job],
        software_then: dict[str, str],
        overrides: list[str] | None,
        software: dict[str, str],
        wishes: dict[str, Any],
    ) -> None:
        """Raise UserError if what the sweep was defined by has changed since."""
        if wishes["insist"]:
            return
        changed = [f"{key} was {software_then[key]}, is {now}" for key, now in software.items() if software_then[key] != now]
        if overrides is not None:
            now, then = ({job.config_hash: job for job in some} for some in (self._jobs(overrides), jobs))
            new, gone = ([some[key].overrides for key in some if key not in other] for some, other in ((now, then), (then, now)))
            changed += [f"{len(new)} jobs are new ({' '.join(new[0])}, ...)"] if new else []
            changed += [f"{len(gone)} jobs are gone ({' '.join(gone[0])}, ...)"] if gone else []
        for job in jobs if overrides is None else []:
            composed = resolve(_without_hydra(self.context.config_loader.load_sweep_config(self.composed, job.overrides)))
            if digest(composed) != job.config_hash:
                changed.append(f"the configuration of job {job.number} ({' '.join(job.overrides)}) was {job.config_hash}")
                break
        if changed:
            raise UserError(
                f"sweep.resume={wishes['resume']}: this is not what the sweep was begun with: {'; '.join(changed)}. "
                "Start a new sweep, or go on all the same, by the stored definition, with sweep.insist=true."
            )

    def _todo(
        self,
        jobs: list[Job],
        tracked: "NoTracker",
        returns: dict[int, JobReturn],
        varied: list[str],
        where: list[str],
        output_dir: Path,
        *,
        insist: bool,
    ) -> list[tuple[int, list[str]]]:
        """Return number and overrides of the jobs that have not finished: to go on from a checkpoint, or from the start."""
        wait_for_orphans(tracked)
        children = tracked.children()
        latest = by_job(children)
        data = {child.tags["data"] for child in children if child.status == "FINISHED"}
        expected = [f"sweep.data={data.pop()}"] if len(data) == 1 and not insist else []
        todo = []
        for job in jobs:
            child, returned = latest.get(job.number), returns.get(job.number)
            if child.status == "FINISHED" if child else returned and returned.status == JobStatus.COMPLETED:
                continue
            told = [f"sweep.id={tracked.run_id}", f"sweep.job={job.number}", f"sweep.varied={json.dumps(varied)}"]
            overrides = job.overrides
            if child and list((output_dir / child.run_id).glob(f"{output.NAME}*")):
                overrides = [f"resume={child.run_id}", *where]
            elif child:
                tracked.delete(child.run_id)
            todo.append((job.number, [*overrides, *told, *expected]))
        return todo

    def _launch(self, todo: list[tuple[int, list[str]]], returns: dict[int, JobReturn]) -> None:
        """Have the launcher run the jobs; what became of them is in MLflow, and, as far as the launcher tells, in `returns`."""
        jobs = [overrides for _, overrides in todo]
        try:
            results = self.launcher.launch(jobs, initial_job_idx=todo[0][0])
        except UserError:
            raise
        except Exception as error:  # some launchers raise what their first job raised, after all have run
            results = [_failed(error) for _ in todo]
        returns |= dict(zip((number for number, _ in todo), results, strict=True))

    def _record(self, tracked: "NoTracker", rows: list[dict[str, str]], varied: list[str]) -> None:
        """Leave the results table in the parent, as an artifact and in its description."""
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        tracked.text(text.getvalue(), "results.csv")
        tracked.tags({"mlflow.note.content": description(rows, tracked)})


def _failed(error: Exception) -> JobReturn:
    result = JobReturn()
    result.return_value, result.status = error, JobStatus.FAILED
    return result


def _without_hydra(composed: DictConfig) -> DictConfig:
    config = composed.copy()
    with open_dict(config):
        config.pop("hydra", None)
    return config


def _varied(jobs: list[Job]) -> list[str]:
    """Return the keys that not all jobs override with the same value, in the order of the command line."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for override in job.overrides:
            values.setdefault(key_of(override), set()).add(override)
    return [key for key, seen in values.items() if len(seen) > 1]


def by_job(children: list["Record"]) -> dict[int, "Record"]:
    """Return the child that stands for each job: the finished one, else the newest."""
    ordered = sorted(children, key=lambda child: (child.status == "FINISHED", child.started))
    return {int(child.tags["job_num"]): child for child in ordered}


def wait_for_orphans(tracked: "NoTracker", patience: float = 60.0) -> None:
    """Wait for the jobs that a killed parent has left behind: they end themselves. Raises UserError if one does not."""
    deadline = time.monotonic() + patience
    while True:
        tracked.reap()
        alive = [child for child in tracked.children() if child.status == "RUNNING"]
        if not alive:
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"Run {alive[0].run_id} of this sweep is still worked on, by process {alive[0].tags.get('pid')} on "
                f"{alive[0].tags.get('host')}. Stop it, or wait for it, before the sweep is resumed."
            )
        time.sleep(1)


def progress(children: list["Record"]) -> tuple[int, int, float | None]:
    """Return how many jobs have finished, how many have failed, and the best validation accuracy of the finished ones."""
    statuses = Counter(child.status for child in children)
    best = [child.metrics[RANKED_BY] for child in children if child.status == "FINISHED" and RANKED_BY in child.metrics]
    return statuses["FINISHED"], statuses["FAILED"] + statuses["KILLED"], max(best, default=None)


def table(jobs: list[Job], children: list["Record"], returns: dict[int, JobReturn]) -> list[dict[str, str]]:
    """Return a row for each job: number, name, status, metrics, run, error."""
    latest = by_job(children)
    rows = []
    for job in jobs:
        child, returned = latest.get(job.number), returns.get(job.number)
        value = returned._return_value if returned else None
        error = str(value).splitlines()[0] if isinstance(value, BaseException) and str(value) else ""
        if child:
            status, error = child.status, child.tags.get("error", "") if child.status != "FINISHED" else ""
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


def description(rows: list[dict[str, str]], tracked: "NoTracker") -> str:
    """Return the parent's description in Markdown: counts by status, the best by validation, the table."""
    counts = ", ".join(f"{count} {status}" for status, count in Counter(row["status"] for row in rows).most_common())
    scored = [row for row in rows if row["status"] == "FINISHED" and row[RANKED_BY]]
    lines = [f"{len(rows)} jobs: {counts}."]
    if scored:
        best = max(scored, key=lambda row: float(row[RANKED_BY]))
        link = tracked.link(best["run"])
        lines.append(f"Best by {RANKED_BY}: [{best['name']}]({link}), {float(best[RANKED_BY]):.2%}.")
    shown = ("job", "name", "status", *SHOWN)
    lines += ["", f"| {' | '.join(shown)} |", f"|{' --- |' * len(shown)}"]
    lines += [f"| {' | '.join(row[key] for key in shown)} |" for row in rows[:200]]
    lines += ["", f"Once more: `python -m mnist_exp.run -m sweep.resume={tracked.run_id}` does what has not finished."]
    return "\n".join(lines)
