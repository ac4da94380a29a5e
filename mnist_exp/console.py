"""Terminal output: warnings, progress bars and tables."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mnist_exp.metrics import format_metric
from mnist_exp.redaction import redact

SHORT_ID = 8  # characters
OPTIONAL = ("time/total_seconds", "test/loss")  # columns of a sweep's table that a narrow terminal omits
LONGEST_PART = 24  # characters of a word or a path that a narrow table keeps on one line
BETWEEN_NUMBERS = r"(?<= )(?=\()|(?<=/ )|(?<= to )"  # the positions in a cell at which a line may end
BETWEEN_WORDS = r"(?<=\S )|(?<=\n)"
WITHIN_WORDS = r"(?<=\w[/=])(?=\S)"
NUMBER = re.compile(r"[-+(]?\d|- ?/|\(")


def plain(text: str) -> Text:
    """Return a text without markup, credentials and control characters; rich wraps lines before `SafeOutput` sees them."""
    return Text(_clean(text), overflow="fold")


def _clean(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in redact(text))


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
        loss, accuracy, speed = (
            format_metric(name, metrics[name]) for name in ("train/loss", "train/accuracy", "train/examples_per_second")
        )
        measured = f"loss {loss}  accuracy {accuracy}  {speed}"
        self.progress.update(self.tasks[phase], advance=examples_seen - self.examples_seen, measured=measured)
        self.examples_seen = examples_seen

    def warn(self, message: str) -> None:
        """Show a prominent warning."""
        self.console.print(Panel(plain(message), style="bold red"))

    def results(self, rows: Mapping[str, str], ui_command: str | None, use_commands: Mapping[str, str]) -> None:
        """Show the results, the command that opens the run in the UI, and those that use its model, by purpose."""
        if self.quiet:
            return
        self.console.print(_pairs(self.console, rows))
        _show_ui_command(self.console, ui_command)
        for purpose, line in use_commands.items():
            self.console.print(f"{purpose}: {line}", markup=False, highlight=False, soft_wrap=True)


class SweepDisplay:
    """A progress bar for a sweep, and the table of its jobs."""

    def __init__(self, jobs: int) -> None:
        self.console = Console()
        self.jobs = jobs

    @contextmanager
    def polling(self, read: Callable[[], tuple[int, int, str]]) -> Iterator[None]:
        """Show the result of `read` (jobs finished, jobs failed, best result) repeatedly while the block runs."""
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
                progress.update(bar, completed=finished, failed=failed, best=best)

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
        show_table([{key: value for key, value in row.items() if key != "run"} for row in rows], self.console, OPTIONAL)
        _show_ui_command(self.console, ui_command)


def _show_ui_command(console: Console, ui_command: str | None) -> None:
    if ui_command:
        console.print(f"Open it in the MLflow UI: {ui_command}", markup=False, highlight=False, soft_wrap=True)


def show_table(rows: list[dict[str, str]], console: Console | None = None, optional: Sequence[str] = ()) -> None:
    """Show a table of runs without its empty columns, as wide as the terminal; unfinished runs are red.

    A narrow terminal shows the first 8 characters of ids, and cells on several lines, which never break a number.

    Args:
        rows: The cells by column. Texts of the column `error` come below the table.
        console: The terminal.
        optional: The columns that a narrow terminal omits, the least important first.
    """
    console = console or Console()
    if not rows:
        console.print("No runs.")
        return
    # Before lines are broken: half of a secret would not be masked.
    rows = [{key: _clean(text) for key, text in row.items()} for row in rows]
    columns = [key for key in rows[0] if key != "error" and any(row[key] for row in rows)]
    cells = [[row[key] for row in rows] for key in columns]
    if _room(console, columns) < sum(_natural(column, cell) for column, cell in zip(columns, cells, strict=True)):
        cells = [
            [text[:SHORT_ID] for text in texts] if key == "run" else texts for key, texts in zip(columns, cells, strict=True)
        ]
    for key in optional:
        narrowest = sum(_narrowest(column, cell) for column, cell in zip(columns, cells, strict=True))
        if key in columns and narrowest > _room(console, columns):
            del cells[columns.index(key)]
            columns.remove(key)
    styles = [None if row.get("status", "FINISHED") == "FINISHED" else "red" for row in rows]
    console.print(_table(console, columns, cells, styles))
    for row in rows:
        if row.get("error"):
            console.print(plain(f"{columns[0]} {row[columns[0]]}: {row['error']}"), style="red")


def show_pairs(title: str, pairs: Mapping[str, str]) -> None:
    """Show names and values under a title."""
    console = Console()
    if pairs:
        console.print(plain(title), style="bold")
        console.print(_pairs(console, pairs))


def show_lines(lines: Sequence[str], *, stderr: bool = False) -> None:
    """Show lines that are copied from the terminal, such as commands and paths, without breaking them."""
    console = Console(stderr=stderr)
    for line in lines:
        console.print(plain(line), soft_wrap=True)


def show_comparison(rows: list[dict[str, str]], headline: str, notes: list[str]) -> None:
    """Show the numbers of a comparison, its headline, and notes on its validity."""
    console = Console()
    lines = []
    for row in rows:  # the name of a metric has a line of its own above its arms
        if row["metric"]:
            lines.append(dict.fromkeys(row, "") | {"arm": row["metric"]})
        lines.append(row | {"metric": "", "arm": f"  {row['arm']}"})
    show_table(lines, console, ("effect", "p"))
    console.print(plain(headline), style="bold")
    for note in notes:
        console.print(plain(f"- {note}"))


def _pairs(console: Console, pairs: Mapping[str, str]) -> Table:
    cells = [[_clean(text) for text in texts] for texts in (pairs, pairs.values())]
    return _table(console, ["", ""], cells, [None] * len(pairs))


def _table(console: Console, columns: Sequence[str], cells: Sequence[Sequence[str]], styles: Sequence[str | None]) -> Table:
    """Return a table that fits the terminal if the longest unbreakable parts of its cells do."""
    widths = [_natural(column, texts) for column, texts in zip(columns, cells, strict=True)]
    for longest in (LONGEST_PART, SHORT_ID):  # break words only if the table does not fit otherwise
        narrowest = [_narrowest(column, texts, longest) for column, texts in zip(columns, cells, strict=True)]
        for _ in range(sum(widths) - _room(console, columns)):
            spare = [width if width > least else 0 for width, least in zip(widths, narrowest, strict=True)]
            if any(spare):
                widths[spare.index(max(spare))] -= 1
    table = Table(show_header=any(columns))
    for column, width in zip(columns, widths, strict=True):
        table.add_column(Text(_wrap(column, width)), width=width, overflow="fold")
    for row, style in zip(zip(*cells, strict=True), styles, strict=True):
        table.add_row(*(Text(_wrap(text, width), overflow="fold") for text, width in zip(row, widths, strict=True)), style=style)
    return table


def _room(console: Console, columns: Sequence[str]) -> int:
    """Return the characters that a table leaves for the cells of a line: each column has two spaces and a border."""
    return console.width - 3 * len(columns) - 1


def _natural(column: str, texts: Sequence[str]) -> int:
    return max(len(line) for text in (column, *texts) for line in text.split("\n"))


def _narrowest(column: str, texts: Sequence[str], longest: int = LONGEST_PART) -> int:
    """Return the width of the longest part that a column should not break; words count as at most `longest`."""
    parts = [part.rstrip() for text in (column, *texts) for part in _parts(text)]
    return max(len(part) if NUMBER.match(part) else min(len(part), longest) for part in parts)


def _parts(text: str, between: str = f"{BETWEEN_WORDS}|{WITHIN_WORDS}") -> list[str]:
    """Return the parts of a cell that should stay on one line: parts of words, or numbers with their units."""
    return re.split(BETWEEN_NUMBERS if NUMBER.match(text) else between, text)


def _wrap(text: str, width: int) -> str:
    """Return a cell with line breaks between its parts, so that lines have at most `width` characters where possible."""
    lines = [""]
    words = _parts(text, BETWEEN_WORDS)
    for part in (part for word in words for part in (_parts(word) if len(word.rstrip()) > width else [word])):
        if lines[-1].strip() and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def show_plan(rows: list[dict[str, str]], notes: list[str]) -> None:
    """Show the jobs that a sweep would run, and notes on their number and time."""
    console = Console()
    if rows:
        show_table(rows, console)
    for note in notes:
        console.print(plain(note))


def show_report(address: str) -> None:
    """Show the address of a report."""
    Console().print(plain(f"Report: {address}"), soft_wrap=True)


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar while the block runs; yield the function that advances it by a number of steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f}"))
    with Progress(*columns, TimeRemainingColumn(compact=True), console=Console(), transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda steps: bar.advance(task, steps)
