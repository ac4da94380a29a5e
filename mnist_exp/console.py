"""What a person sees in the terminal: warnings, the progress of training, the table at the end."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mnist_exp.data import Dataset
from mnist_exp.training import Report, Stage


class Display:
    """A progress bar for each phase, with loss, accuracy and examples per second; a context manager around training.

    examples_seen: before this process, where a run is gone on with.
    """

    def __init__(self, stages: list[Stage], data: Dataset, examples_seen: int) -> None:
        self.console = Console()
        self.progress = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn(
                "loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.4f}  {task.fields[speed]:,.0f} examples/s"
            ),
            TimeRemainingColumn(compact=True),
            console=self.console,
        )
        self.examples_seen = examples_seen
        self.tasks = {}
        for stage in stages:
            total = data.splits[stage.phase.split].epoch_size * stage.phase.epochs
            done = min(total, examples_seen)
            examples_seen -= done
            self.tasks[stage.name] = self.progress.add_task(stage.name, total=total, completed=done, loss=0, accuracy=0, speed=0)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def update(self, report: Report) -> None:
        """Advance the bar of the report's phase."""
        self.progress.update(
            self.tasks[report.phase],
            advance=report.examples_seen - self.examples_seen,
            loss=report.metrics["train/loss"],
            accuracy=report.metrics["train/accuracy"],
            speed=report.metrics["train/examples_per_second"],
        )
        self.examples_seen = report.examples_seen

    def warn(self, message: str) -> None:
        """Show what must not be missed."""
        self.console.print(Panel(Text(message), style="bold red"))

    def results(self, rows: Mapping[str, str], how_to_open: str | None) -> None:
        """Show the table at the end, and how the run is opened in the UI."""
        table = Table(show_header=False)
        for name, value in rows.items():
            table.add_row(name, Text(value, overflow="fold"))  # not as markup: a path may hold brackets
        self.console.print(table)
        if how_to_open:
            self.console.print(f"Open it in the MLflow UI: {how_to_open}", markup=False, highlight=False, soft_wrap=True)
