"""A sweep in words: its progress, the table of its jobs, and the description of its parent."""

import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence

from hydra.core.utils import JobStatus

from mnist_exp.metrics import SHOWN, best_first, format_metric
from mnist_exp.overrides import key_of
from mnist_exp.sweep.jobs import Job, JobResults, failure_reason, result_of
from mnist_exp.tracking.base import RunRecord, Store, Sweep, latest_run_per_job
from mnist_exp.tracking.tags import ERROR, PRUNED
from mnist_exp.tracking.views import link_line

ROWS_SHOWN = 50  # MLflow truncates descriptions after 8,000 characters
BEST_SHOWN = 3


def progress(children: Sequence[RunRecord], objective: str) -> tuple[int, int, str]:
    """Return jobs finished, jobs failed, and the best result, given the runs of the jobs and the metric that decides."""
    statuses = Counter(child.status for child in latest_run_per_job(children).values())
    best = _ranked(children, objective)
    shown = f"{objective} {format_metric(objective, best[0].metrics[objective])}" if best else "-"
    return statuses["FINISHED"], statuses["FAILED"] + statuses["KILLED"], shown


def preview(jobs: Sequence[Job], done: Container[int | None], total: int) -> tuple[list[dict[str, str]], list[str]]:
    """Return the jobs of a sweep that has not started, as the rows of a table, and notes.

    Args:
        jobs: The jobs that are known so far.
        done: The numbers of the jobs that a resumed sweep skips.
        total: The number of jobs, including those that a search has not proposed yet.
    """
    plan = {job.number: "skip: finished" if job.number in done else "run" for job in jobs}
    rows = [{"job": str(job.number), "plan": plan[job.number], "overrides": " ".join(job.overrides)} for job in jobs]
    skipped = sum(job.number in done for job in jobs)
    notes = [f"{total} jobs, {total - skipped} to run." if skipped else f"{total} jobs."]
    if len(jobs) < total:
        notes.append("The search proposes its jobs while it runs.")
    return rows, [*notes, "Nothing was recorded: sweep.dry_run=true."]


def rank_arms(children: Iterable[RunRecord], objective: str) -> list[tuple[list[str], list[float]]]:
    """Return the overrides of each arm and the objective of its finished jobs, the best mean first, else in the sweep's order."""
    arms = defaultdict[tuple[str, ...], list[float]](list)
    for child in _scored(children, objective):
        arms[tuple(item for item in child.overrides if key_of(item) != "seed")].append(child.metrics[objective])
    ranked = [(list(overrides), values) for overrides, values in arms.items()]
    return best_first(objective, ranked, lambda arm: statistics.mean(arm[1]))


def job_table(jobs: list[Job], children: list[RunRecord], results: JobResults, objective: str) -> list[dict[str, str]]:
    """Return a row for each job: number, name, status, metrics, run, error.

    Args:
        jobs: The jobs.
        children: The runs of the jobs.
        results: The reports of the launcher.
        objective: The metric that decides.
    """
    latest = latest_run_per_job(children)
    rows = []
    for job in jobs:
        child, returned = latest.get(job.number), results.get(job.number)
        value, error = result_of(returned), failure_reason(returned)
        if child:
            status = "PRUNED" if PRUNED in child.tags else child.status
            error = (error or child.tags.get(ERROR, "")) if status != "FINISHED" else ""
        elif returned and returned.status == JobStatus.COMPLETED:
            status = "FINISHED"
        else:
            status = "NOT STARTED" if returned is None or returned.status == JobStatus.UNKNOWN else "FAILED"
        metrics = child.metrics if child else {objective: value} if isinstance(value, float) else {}
        name = child.name if child else " ".join(job.overrides)
        rows.append(
            {"job": str(job.number), "name": name, "status": status}
            | {key: format_metric(key, metrics[key]) if key in metrics else "" for key in (objective, *SHOWN)}
            | {"run": child.run_id if child else "", "error": error}
        )
    return rows


def sweep_metrics(children: list[RunRecord], objective: str) -> dict[str, float]:
    """Return the metrics of a sweep's parent; none has the name of a run's, so that charts keep them apart."""
    best = _ranked(children, objective)
    return {"sweep/best_objective": best[0].metrics[objective]} if best else {}


def _scored(children: Iterable[RunRecord], objective: str) -> list[RunRecord]:
    """Return the finished runs of the jobs with an objective, in the order of their jobs."""
    runs = [child for _, child in sorted(latest_run_per_job(children).items())]
    return [child for child in runs if child.status == "FINISHED" and objective in child.metrics]


def _ranked(children: Iterable[RunRecord], objective: str) -> list[RunRecord]:
    """Return the finished runs of the jobs with an objective, the best first, equal ones in the order of their jobs."""
    return best_first(objective, _scored(children, objective), lambda child: child.metrics[objective])


def describe_sweep(rows: list[dict[str, str]], children: list[RunRecord], store: Store, sweep: Sweep, resume_command: str) -> str:
    """Return the parent's description in Markdown: counts by status, the best jobs by the objective, history, the table.

    Args:
        rows: From `job_table`.
        children: The runs of the jobs.
        store: The store, for links.
        sweep: The sweep.
        resume_command: The command that resumes the sweep.
    """
    objective = sweep.objective
    statuses = Counter(row["status"] for row in rows)
    counts = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    lines = [f"{len(rows)} jobs: {counts}."]
    if ranked := _ranked(children, objective):
        highest = ranked[0].metrics[objective]
        best = [child for child in ranked if child.metrics[objective] == highest]
        links = ", ".join(
            f"[{child.name}]({link})" if (link := store.link(child.run_id)) else child.name for child in best[:BEST_SHOWN]
        )
        more = f" and {len(best) - BEST_SHOWN} more" if len(best) > BEST_SHOWN else ""
        tied = f"{len(best)} tie: " if len(best) > 1 else ""
        lines.append(f"Best by {objective}, {format_metric(objective, highest)}: {tied}{links}{more}.")
    if pages := store.sweep_links(sweep, children):
        lines += ["", link_line(pages)]
    if statuses.keys() - {"FINISHED", "PRUNED"}:
        lines += ["", f"`{resume_command}` runs the jobs that have not finished."]
    if len(sweep.grids) > 1:
        lines += ["", "Its grids:", *(f"- `{shlex.join(grid)}`" for grid in sweep.grids)]
    shown = ("job", "name", "status", objective, *SHOWN)
    lines += ["", f"| {' | '.join(shown)} |", f"|{' --- |' * len(shown)}"]
    lines += [f"| {' | '.join(row[key] for key in shown)} |" for row in rows[:ROWS_SHOWN]]
    lines += [f"\n... and {len(rows) - ROWS_SHOWN} more, in `results.csv`."] if len(rows) > ROWS_SHOWN else []
    return "\n".join(lines)
