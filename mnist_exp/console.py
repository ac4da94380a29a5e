"""Terminal output: warnings, progress and tables. Text from users and stores is shown as plain text, never as markup."""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, track
from rich.table import Table
from rich.text import Text

from mnist_exp.metrics import SHOWN, format_metric

SHORT_ID = 8  # characters
SHORT_TEXT = 24  # characters a line: a column of text that is narrower makes room by omitting optional columns
NUMBER = re.compile(r"([-+]?\d[\d,.]*(e[-+]?\d+)?%?( \S+)?|-|)$")  # with a unit, missing, or empty


def plain(text: str) -> Text:
    """Return a text without markup and control characters."""
    return Text("".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text))


class Display:
    """The progress of training and its results; a context manager for training.

    A terminal shows a progress bar for each phase. Without one, a line is printed at the end of each epoch.

    Args:
        totals: The number of examples of each phase, by name.
        epochs: The number of epochs of each phase, by name.
        examples_seen: The examples of all phases that a resumed run has already seen.
        objective: The metric that is shown besides those of training.
        quiet: Show only warnings.
    """

    def __init__(
        self, totals: Mapping[str, int], epochs: Mapping[str, int], examples_seen: int, objective: str, *, quiet: bool
    ) -> None:
        self.console = Console()
        self.quiet, self.objective = quiet, objective
        self.progress = Progress(
            TextColumn("{task.description:>10}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[measured]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.epochs = epochs
        self.examples_seen = examples_seen
        self.tasks = {}
        for name, total in totals.items():
            done = min(total, examples_seen)
            examples_seen -= done
            self.tasks[name] = self.progress.add_task(plain(name).plain, total=total, completed=done, measured="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def update(
        self, phase: str, examples_seen: int, metrics: Mapping[str, float], epoch: int | None = None, *, ended: bool = False
    ) -> None:
        """Show the progress of a phase.

        Args:
            phase: The name of the phase.
            examples_seen: The examples of all phases so far.
            metrics: The values by name.
            epoch: The number of complete epochs of the phase, at the end of one.
            ended: Whether the phase has ended.
        """
        loss, accuracy, speed = (
            format_metric(name, metrics[name]) for name in ("train/loss", "train/accuracy", "train/examples_per_second")
        )
        measured = f"loss {loss}  accuracy {accuracy}  {speed}"
        self.progress.update(self.tasks[phase], advance=examples_seen - self.examples_seen, measured=measured)
        self.examples_seen = examples_seen
        if self.quiet or epoch is None:
            return
        if not self.console.is_terminal:
            parts = [f"epoch {epoch} of {self.epochs[phase]}", f"loss {loss}", f"accuracy {accuracy}"]
            if self.objective in metrics:
                parts.append(f"{self.objective} {format_metric(self.objective, metrics[self.objective])}")
            show_lines([f"{phase}: {', '.join([*parts, speed])}"])
        if ended and epoch < self.epochs[phase]:
            show_lines([f"{phase}: a callback ended the phase after epoch {epoch} of {self.epochs[phase]}"])

    def results(self, rows: Mapping[str, str], ui_hint: str, use_commands: Mapping[str, str]) -> None:
        """Show the results, the line on the UI unless it is empty, and the commands that use the model, by purpose."""
        if not self.quiet:
            show_pairs("Results", rows)
            show_lines([ui_hint, *(f"{purpose}: {line}" for purpose, line in use_commands.items())])


@contextmanager
def sweep_progress(jobs: int, read: Callable[[], tuple[int, int, str]]) -> Iterator[None]:
    """Show the progress of a sweep while the block runs.

    A terminal shows a progress bar. Without one, a line is printed when further jobs have ended.

    Args:
        jobs: The number of jobs.
        read: Returns the numbers of jobs that have finished and failed, and the best result.
    """
    console = Console()
    stopped = threading.Event()
    progress = Progress(
        TextColumn("sweep"),
        BarColumn(),
        TextColumn(
            "{task.completed:.0f} of {task.total} jobs  {task.fields[failed]} failed or stopped  best {task.fields[best]}"
        ),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )
    bar = progress.add_task("", total=jobs, failed=0, best="-")
    shown = (0, 0)

    def update() -> None:
        nonlocal shown
        with suppress(Exception):  # the store may answer the next time
            finished, failed, best = read()
            progress.update(bar, completed=finished, failed=failed, best=best)
            if not console.is_terminal and (finished, failed) != shown:
                show_lines([f"{finished} of {jobs} jobs finished, {failed} failed or stopped, best {best}"])
                shown = finished, failed

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


def show_sweep(rows: list[dict[str, str]], ui_hint: str) -> None:
    """Show the table of all jobs of a sweep, and the line on the UI unless it is empty."""
    show_table([{key: value for key, value in row.items() if key != "run"} for row in rows], SHOWN[:0:-1])
    show_lines([ui_hint])


def show_table(rows: list[dict[str, str]], optional: Sequence[str] = ()) -> None:
    """Show a table of runs without its empty columns; unfinished runs are red.

    If the table is wider than the terminal, ids are shortened, headings and intervals have lines of their own, and text is
    wrapped. Numbers with their units stay whole.

    Args:
        rows: The cells by column. Texts of the column `error` come below the table.
        optional: The columns that a narrow terminal omits, the least important first.
    """
    console = Console()
    if not rows:
        console.print("No runs.")
        return
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "error" and any(row[key] for row in rows)}
    styles = [None if row.get("status", "FINISHED") == "FINISHED" else "red" for row in rows]
    table = _table(columns, styles)
    if not _fits(console, table):
        columns = {
            _stack_heading(key): [text[:SHORT_ID] if key == "run" else _stack(text) for text in texts]
            for key, texts in columns.items()
        }
        for key in optional:
            if not _fits(console, _table(columns, styles, SHORT_TEXT)):
                columns.pop(_stack_heading(key), None)
        table = _table(columns, styles)
    console.print(table)
    first = next(iter(rows[0]))
    for row in rows:
        if row.get("error"):
            console.print(plain(f"{first} {row[first]}: {row['error']}"), style="red")


def _stack(text: str) -> str:
    """Return a value and its interval on lines of their own: +0.21 points (+0.10 to +0.32)."""
    return text.replace(" (", "\n(").replace(" to ", " to\n") if text.endswith(")") else text


def _stack_heading(heading: str) -> str:
    return _stack(heading).replace("/", "/\n")


def _table(columns: Mapping[str, Sequence[str]], styles: Sequence[str | None], longest: int | None = None) -> Table:
    """Return a table in which only text is wrapped.

    Args:
        columns: The cells by heading.
        styles: The style of each row.
        longest: The most characters in a line of text, None for no limit.
    """
    table = Table()
    for heading, texts in columns.items():
        if all(map(NUMBER.match, texts)):
            table.add_column(plain(heading), no_wrap=True, justify="right")
        elif heading == "run":
            table.add_column(plain(heading), no_wrap=True)
        else:
            table.add_column(plain(heading), overflow="fold", max_width=longest)
    for texts, style in zip(zip(*columns.values(), strict=True), styles, strict=True):
        table.add_row(*map(plain, texts), style=style)
    return table


def _fits(console: Console, table: Table) -> bool:
    """Return whether a table needs no more lines than its cells have."""
    return console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width


def show_warning(message: str) -> None:
    """Show a prominent warning."""
    Console().print(Panel(plain(message), style="bold red"))


def show_pairs(title: str, pairs: Mapping[str, str]) -> None:
    """Show names and values under a title."""
    if pairs:
        table = Table(show_header=False)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for name, value in pairs.items():
            table.add_row(plain(name), plain(value))
        console = Console()
        console.print(plain(title), style="bold")
        console.print(table)


def show_lines(lines: Sequence[str], *, stderr: bool = False) -> None:
    """Show lines that are copied from the terminal, such as commands and paths, without breaking them; omit empty ones."""
    console = Console(stderr=stderr)
    for line in filter(None, lines):
        console.print(plain(line), soft_wrap=True)


def show_comparison(title: str, subtitle: str, tables: Sequence[list[dict[str, str]]], notes: Sequence[str]) -> None:
    """Show the answer of a comparison, its numbers, and notes on its validity."""
    console = Console()
    console.print(plain(f"\n{title}"), style="bold")
    console.print(plain(subtitle))
    for rows in tables:
        show_table(rows, ("p", "model/parameters", "time/train_seconds"))
    for note in notes:
        console.print(plain(f"- {note}"), soft_wrap=True)  # it may contain a command


def tracked(files: Sequence[Path]) -> Iterable[Path]:
    """Return files for a loop, which shows a progress bar if there is a terminal."""
    console = Console()
    return track(files, "predict", console=console, transient=True, disable=not console.is_terminal)
