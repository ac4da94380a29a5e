"""A sweep in words: its progress, the table of its jobs, and the description of its parent."""

import csv
import io
from collections import Counter
from dataclasses import dataclass, field

from hydra.core.utils import JobStatus

from mnist_exp.sweep.jobs import Returns, by_job, failure_reason, return_value
from mnist_exp.tracking.base import RunRecord, Store
from mnist_exp.tracking.definition import Job
from mnist_exp.tracking.tags import ERROR, PRUNED

RANKED_BY = "val/accuracy"  # never a metric of the test set
SHOWN = ("val/accuracy", "test/accuracy", "test/loss", "time/total_seconds")
ROWS_SHOWN = 50  # MLflow truncates descriptions after 8,000 characters
BEST_SHOWN = 3
MAX_CLOCK_SKEW = 60_000  # ms, between the machines of a cluster


@dataclass
class Progress:
    """The results of a sweep's jobs so far.

    Args:
        ended: The status and the validation accuracy of each ended job.
        until: Milliseconds since 1970 when the last job ended.
    """

    store: Store
    sweep_id: str
    ended: dict[int, tuple[str, float | None]] = field(default_factory=dict)
    until: int = 0

    def read(self) -> tuple[int, int, float | None]:
        """Read the jobs that ended since the last call; return jobs finished, jobs failed, and the best accuracy."""
        children = self.store.children(self.sweep_id, ended_after=self.until - MAX_CLOCK_SKEW if self.until else 1)
        for number, child in by_job(children).items():
            self.ended[number] = child.status, child.metrics.get(RANKED_BY)
            self.until = max(self.until, child.ended or 0)
        statuses = Counter(status for status, _ in self.ended.values())
        best = [accuracy for status, accuracy in self.ended.values() if status == "FINISHED" and accuracy is not None]
        return statuses["FINISHED"], statuses["FAILED"] + statuses["KILLED"], max(best, default=None)


def job_table(jobs: list[Job], children: list[RunRecord], returns: Returns) -> list[dict[str, str]]:
    """Return a row for each job: number, name, status, metrics, run, error."""
    latest = by_job(children)
    rows = []
    for job in jobs:
        child, returned = latest.get(job.number), returns.get(job.number)
        value, error = return_value(returned), failure_reason(returned)
        if child:
            status = "PRUNED" if PRUNED in child.tags else child.status
            error = (error or child.tags.get(ERROR, "")) if status != "FINISHED" else ""
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


def as_csv(rows: list[dict[str, str]]) -> str:
    """Return a table as comma-separated values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def describe_sweep(rows: list[dict[str, str]], store: Store, resume_command: str) -> str:
    """Return the parent's description in Markdown: counts by status, the best jobs by validation, the table."""
    counts = ", ".join(f"{count} {status}" for status, count in Counter(row["status"] for row in rows).most_common())
    scored = [row for row in rows if row["status"] == "FINISHED" and row[RANKED_BY]]
    lines = [f"{len(rows)} jobs: {counts}."]
    if scored:
        highest = max(float(row[RANKED_BY]) for row in scored)
        best = [row for row in scored if float(row[RANKED_BY]) == highest]
        links = ", ".join(f"[{row['name']}]({store.link(row['run'])})" for row in best[:BEST_SHOWN])
        more = f" and {len(best) - BEST_SHOWN} more" if len(best) > BEST_SHOWN else ""
        tied = f"{len(best)} tie: " if len(best) > 1 else ""
        lines.append(f"Best by {RANKED_BY}, {highest:.2%}: {tied}{links}{more}.")
    shown = ("job", "name", "status", *SHOWN)
    lines += ["", f"| {' | '.join(shown)} |", f"|{' --- |' * len(shown)}"]
    lines += [f"| {' | '.join(row[key] for key in shown)} |" for row in rows[:ROWS_SHOWN]]
    lines += [f"\n... and {len(rows) - ROWS_SHOWN} more, in `results.csv`."] if len(rows) > ROWS_SHOWN else []
    lines += ["", f"`{resume_command}` runs the jobs that have not finished."]
    return "\n".join(lines)
