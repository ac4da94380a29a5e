"""What a person sees in the terminal: warnings, the progress of training, the table at the end."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mnist_exp.data import Dataset
    from mnist_exp.training import Report, Stage


class Display:
    """A progress bar for each phase, with loss, accuracy and examples per second; a context manager around training.

    examples_seen: before this process, where a run is gone on with; quiet: show warnings alone.
    """

    def __init__(self, stages: "list[Stage]", data: "Dataset", examples_seen: int, *, quiet: bool) -> None:
        self.console = Console()
        self.quiet = quiet
        self.progress = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[measured]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=quiet,
        )
        self.examples_seen = examples_seen
        self.tasks = {}
        for stage in stages:
            total = data.splits[stage.phase.split].epoch_size * stage.phase.epochs
            done = min(total, examples_seen)
            examples_seen -= done
            self.tasks[stage.name] = self.progress.add_task(stage.name, total=total, completed=done, measured="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def update(self, report: "Report") -> None:
        """Advance the bar of the report's phase."""
        self.progress.update(
            self.tasks[report.phase],
            advance=report.examples_seen - self.examples_seen,
            measured="loss {train/loss:.4f}  accuracy {train/accuracy:.4f}  {train/examples_per_second:,.0f} examples/s".format(
                **report.metrics
            ),
        )
        self.examples_seen = report.examples_seen

    def warn(self, message: str) -> None:
        """Show what must not be missed."""
        self.console.print(Panel(Text(message), style="bold red"))

    def results(self, rows: Mapping[str, str], how_to_open: str | None) -> None:
        """Show the table at the end, and how the run is opened in the UI."""
        if self.quiet:
            return
        table = Table(show_header=False)
        for name, value in rows.items():
            table.add_row(name, Text(value, overflow="fold"))  # not as markup: a path may hold brackets
        self.console.print(table)
        if how_to_open:
            self.console.print(f"Open it in the MLflow UI: {how_to_open}", markup=False, highlight=False, soft_wrap=True)


class SweepDisplay:
    """A progress bar for a whole sweep, and the table of its jobs at the end."""

    def __init__(self, jobs: int) -> None:
        self.console = Console()
        self.jobs = jobs

    @contextmanager
    def following(self, look: Callable[[], tuple[int, int, float | None]]) -> Iterator[None]:
        """Show what `look` returns (jobs finished, jobs failed, best accuracy) while the block runs, looking now and then."""
        left = threading.Event()
        progress = Progress(
            TextColumn("sweep"),
            BarColumn(),
            TextColumn(
                "{task.completed:.0f} of {task.total} jobs  {task.fields[failed]} failed or stopped  best {task.fields[best]}"
            ),
            TimeRemainingColumn(compact=True),
            console=self.console,
        )
        bar = progress.add_task("", total=self.jobs, failed=0, best="-")

        def update() -> None:
            with suppress(Exception):  # a store that does not answer now may answer the next time
                finished, failed, best = look()
                progress.update(bar, completed=finished, failed=failed, best="-" if best is None else f"{best:.2%}")

        def follow() -> None:
            pause = 2.0
            while not left.wait(pause):
                began = time.monotonic()
                update()
                pause = max(2.0, 100 * (time.monotonic() - began))  # what looks takes from the jobs

        thread = threading.Thread(target=follow, daemon=True)
        with progress:
            thread.start()
            try:
                yield
            finally:
                left.set()
                thread.join(timeout=5)
                update()

    def results(self, rows: list[dict[str, str]], how_to_open: str | None) -> None:
        """Show the table of all jobs, and how the sweep is opened in the UI."""
        show_jobs([{key: value for key, value in row.items() if key != "run"} for row in rows], self.console)
        if how_to_open:
            self.console.print(f"Open it in the MLflow UI: {how_to_open}", markup=False, highlight=False, soft_wrap=True)


def show_jobs(rows: list[dict[str, str]], console: Console | None = None) -> None:
    """Show a table of runs, red what has not finished; columns that are empty are left out."""
    console = console or Console()
    table = Table()
    shown = [key for key in rows[0] if any(row[key] for row in rows)] if rows else []
    for key in shown:
        table.add_column(key, no_wrap=key in ("run", "metric", "arm"))
    for row in rows:
        style = None if row.get("status", "FINISHED") == "FINISHED" else "red"
        table.add_row(*(Text(row[key], overflow="fold") for key in shown), style=style)
    console.print(table if rows else "There are no runs yet.")


def show_comparison(rows: list[dict[str, str]], answer: str, notes: list[str]) -> None:
    """Show the answer, the numbers behind it, and what is to be borne in mind."""
    console = Console()
    show_jobs(rows, console)
    console.print(Text(answer, style="bold"))
    for note in notes:
        console.print(Text(f"- {note}"))
