"""Terminal output: warnings, progress bars and tables."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mnist_exp.redaction import redact


def plain(text: str) -> Text:
    """Return a text without markup, credentials and control characters; rich wraps lines before `SafeOutput` sees them."""
    return Text("".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in redact(text)), overflow="fold")


class Display:
    """A progress bar for each phase, with loss, accuracy and examples per second; a context manager for training.

    Args:
        totals: The number of examples of each phase, by name.
        examples_seen: The examples of all phases that a resumed run has already seen.
        quiet: Show only warnings.
    """

    def __init__(self, totals: Mapping[str, int], examples_seen: int, *, quiet: bool) -> None:
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
        for name, total in totals.items():
            done = min(total, examples_seen)
            examples_seen -= done
            self.tasks[name] = self.progress.add_task(name, total=total, completed=done, measured="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def update(self, phase: str, examples_seen: int, metrics: Mapping[str, float]) -> None:
        """Advance the bar of a phase."""
        form = "loss {train/loss:.4f}  accuracy {train/accuracy:.4f}  {train/examples_per_second:,.0f} examples/s"
        self.progress.update(self.tasks[phase], advance=examples_seen - self.examples_seen, measured=form.format(**metrics))
        self.examples_seen = examples_seen

    def warn(self, message: str) -> None:
        """Show a prominent warning."""
        self.console.print(Panel(plain(message), style="bold red"))

    def results(self, rows: Mapping[str, str], ui_command: str | None) -> None:
        """Show the results, and the command that opens the run in the UI."""
        if self.quiet:
            return
        table = Table(show_header=False)
        for name, value in rows.items():
            table.add_row(name, plain(value))
        self.console.print(table)
        _show_ui_command(self.console, ui_command)


class SweepDisplay:
    """A progress bar for a sweep, and the table of its jobs."""

    def __init__(self, jobs: int) -> None:
        self.console = Console()
        self.jobs = jobs

    @contextmanager
    def polling(self, read: Callable[[], tuple[int, int, float | None]]) -> Iterator[None]:
        """Show the result of `read` (jobs finished, jobs failed, best accuracy) repeatedly while the block runs."""
        stopped = threading.Event()
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
            with suppress(Exception):  # the store may answer the next time
                finished, failed, best = read()
                progress.update(bar, completed=finished, failed=failed, best="-" if best is None else f"{best:.2%}")

        def poll() -> None:
            pause = 2.0
            while not stopped.wait(pause):
                started = time.monotonic()
                update()
                pause = max(2.0, 100 * (time.monotonic() - started))  # reading slows down the jobs

        thread = threading.Thread(target=poll, daemon=True)
        with progress:
            thread.start()
            try:
                yield
            finally:
                stopped.set()
                thread.join(timeout=5)
                update()

    def results(self, rows: list[dict[str, str]], ui_command: str | None) -> None:
        """Show the table of all jobs, and the command that opens the sweep in the UI."""
        show_table([{key: value for key, value in row.items() if key != "run"} for row in rows], self.console)
        _show_ui_command(self.console, ui_command)


def _show_ui_command(console: Console, ui_command: str | None) -> None:
    if ui_command:
        console.print(f"Open it in the MLflow UI: {ui_command}", markup=False, highlight=False, soft_wrap=True)


def show_table(rows: list[dict[str, str]], console: Console | None = None) -> None:
    """Show a table of runs without its empty columns; unfinished runs are red."""
    console = console or Console()
    table = Table()
    shown = [key for key in rows[0] if any(row[key] for row in rows)] if rows else []
    for key in shown:
        table.add_column(key, no_wrap=key in ("run", "metric", "arm"))
    for row in rows:
        style = None if row.get("status", "FINISHED") == "FINISHED" else "red"
        table.add_row(*(plain(row[key]) for key in shown), style=style)
    console.print(table if rows else "There are no runs yet.")


def show_comparison(rows: list[dict[str, str]], headline: str, notes: list[str]) -> None:
    """Show the numbers of a comparison, its headline, and notes on its validity."""
    console = Console()
    show_table(rows, console)
    console.print(plain(headline), style="bold")
    for note in notes:
        console.print(plain(f"- {note}"))


def show_report(address: str) -> None:
    """Show the address of a report."""
    Console().print(plain(f"Report: {address}"), soft_wrap=True)
