"""The interface between runs and a store of runs, in plain values; and the store that records nothing."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self
from uuid import uuid4

from pydantic import Field, TypeAdapter, ValidationError

from mnist_exp.errors import ResumableError, UserError
from mnist_exp.overrides import check_stored
from mnist_exp.settings import Recipe, Settings
from mnist_exp.tracking.tags import COMMIT, DATA, GRIDS, JOB, OBJECTIVE, OVERRIDES, PRUNED, SWEEP_JOBS, SWEEPER

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from mnist_exp.learning.data import Dataset

# The colors of arms in charts and figures, which color-blind people can distinguish (Okabe and Ito, 2008).
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
RECIPE = "recipe.json"  # the artifact with the recipe of a run
OUTCOME = "outcome.json"  # the artifact with the history and the mistakes of a run
MAX_TAG = 8000  # characters; MLflow cuts a longer value without an error
PROCESS_DIED = "the process exited"  # a reason that a better known one may replace


class StoreUnavailableError(UserError):
    """The store does not answer."""


class StoreLostError(ResumableError):
    """The store did not answer before the end of the run, or refuses a record."""


@dataclass(frozen=True)
class RunInfo:
    """The description of a run that is about to start.

    Args:
        name: The name in lists and charts.
        command: The shell command that repeats the run.
        tags: The tags, by MLflow's names or those of `tags.py`.
    """

    name: str
    command: str
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """A stored run.

    Args:
        status: RUNNING, FINISHED, FAILED or KILLED.
        started: Milliseconds since 1970.
        ended: Milliseconds since 1970, None while the run is RUNNING.
        metrics: The last value of each metric.
        digests: The digest of each split of the data.
        artifacts: The address of the folder of the run's files.
        description: The text that the UI shows, in Markdown.
    """

    run_id: str
    experiment_id: str
    name: str
    status: str
    started: int
    ended: int | None
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    digests: dict[str, str]
    artifacts: str
    description: str

    @property
    def job(self) -> int | None:
        """The number of the run's job in its sweep, None for a single run."""
        number = self.tags.get(JOB, "")
        return int(number) if number.isdecimal() else None

    @property
    def overrides(self) -> list[str]:
        """The overrides of the run's command line, without locations."""
        return shlex.split(self.tags.get(OVERRIDES, ""))

    @property
    def data(self) -> str:
        """The name of the data set, empty if unknown."""
        return self.tags.get(DATA, "")

    @property
    def commit(self) -> str:
        """The commit of the code, empty if unknown."""
        return self.tags.get(COMMIT, "")

    @property
    def is_done(self) -> bool:
        """Whether no work is left: the run has finished, or a search has pruned it."""
        return self.status == "FINISHED" or PRUNED in self.tags


def latest_run_per_job(children: Iterable[RunRecord]) -> dict[int, RunRecord]:
    """Return the run of each job of a sweep: the finished one, else the newest."""
    ordered = sorted(children, key=lambda child: (child.status == "FINISHED", child.started))
    return {child.job: child for child in ordered if child.job is not None}


@dataclass(frozen=True)
class Sweep:
    """A sweep as its parent records it.

    Args:
        record: The parent.
        grids: The overrides of each grid: the first from the start, each further one from an extension. Of a search, one.
    """

    record: RunRecord
    grids: list[list[str]]

    @property
    def run_id(self) -> str:
        """The id of the parent."""
        return self.record.run_id

    @property
    def sweeper(self) -> str:
        """The name of what proposes the jobs: `grid` or `optuna`."""
        return self.record.tags.get(SWEEPER, "")

    @property
    def objective(self) -> str:
        """The metric that decides."""
        return self.record.tags.get(OBJECTIVE, str(Settings.model_fields["objective"].default))

    @property
    def total(self) -> int:
        """The number of jobs, including those that a search has not proposed yet."""
        return int(self.record.tags[SWEEP_JOBS])


def grids_text(grids: Sequence[Sequence[str]]) -> str:
    """Return grids as `read_sweep` reads them.

    Raises:
        UserError: They are too long, or contain what could not be read back.
    """
    check_stored([override for grid in grids for override in grid], "The command line")
    text = json.dumps(grids)
    if len(text) > MAX_TAG:
        raise UserError(
            f"The overrides of the sweep have {len(text):,} characters, expected at most {MAX_TAG:,}.",
            key="sweep",
            remedy="Write ranges, such as seed=range(0,300), or start several sweeps: compare takes them together.",
        )
    return text


def read_sweep(record: RunRecord) -> Sweep:
    """Return a sweep, given its parent.

    Raises:
        UserError: Another version recorded it, or it contains overrides that a store must not contain.
    """
    try:
        grids = TypeAdapter(Annotated[list[list[str]], Field(min_length=1)]).validate_json(record.tags.get(GRIDS, ""))
        int(record.tags[SWEEP_JOBS])
    except (ValidationError, ValueError) as error:
        raise UserError(
            f"Sweep {record.run_id} has no readable tag {GRIDS}: an earlier version recorded it.",
            key=GRIDS,
            value=record.tags.get(GRIDS),
            remedy="Start it again, or use the version that recorded it.",
        ) from error
    check_stored([override for grid in grids for override in grid], f"Sweep {record.run_id}")
    return Sweep(record, grids)


@dataclass(frozen=True)
class StoredRun:
    """A run as stored, with its recipe and the points of each metric by examples seen."""

    record: RunRecord
    recipe: Recipe
    points: dict[str, dict[int, float]]


@dataclass(frozen=True)
class Answer:
    """The answer of a comparison, for the parent of its sweep.

    Args:
        factor: The key whose values are compared. An answer replaces that of the same factor only.
        title: The verdict in one line.
        notes: The sentences without which the verdict would mislead.
        report: The HTML file.
        picture: The PNG file with the differences.
    """

    factor: str
    title: str
    notes: Sequence[str]
    report: Path
    picture: Path


class Tracker:
    """Records one run; this one, of `tracking=none`, records nothing.

    A context manager: leaving it sets the final status: FINISHED, FAILED on an error, KILLED on a signal.

    Args:
        run_id: The id of the run.
    """

    is_recording = False

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record the parameters of the configuration."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record tags; a later value replaces an earlier one."""

    def set_description(self, description: str) -> None:
        """Record the text that the UI shows, in Markdown."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at `step` (examples seen); they may be sent as late as `flush`."""

    def use_model(self, model_id: str) -> None:
        """Link the run to a recorded model, to which its results belong."""

    def log_results(self, metrics: Mapping[str, float]) -> None:
        """Record what is measured once, at step 0, and link it and the last validation metrics to the model and the data."""

    def flush(self) -> None:
        """Send all records."""

    def log_text(self, text: str, path: str) -> None:
        """Record `text` as the artifact `path`."""

    def log_file(self, file: Path) -> None:
        """Record a file as an artifact of its own name."""

    def log_figure(self, figure: "Figure", path: str) -> None:
        """Record a figure as the artifact `path`, a PNG file."""

    def log_dataset(self, data: "Dataset", split: str, context: str) -> None:
        """Record a split of the data with its purpose: the name of a phase, validation, test or evaluate.

        The UI shows the first purpose of a split.
        """

    def log_model(self, name: str, model: "nn.Module", settings: Settings, folder: Path) -> None:
        """Record a model with the settings of its run, which hold the `shape` of the data.

        Raises:
            UserError: `folder`, which the model replaces, cannot be written.
        """

    def ui_command(self) -> str | None:
        """Return the command or address that opens the run in the UI."""


class Store:
    """Starts runs, and reads and corrects those that are stored; this one, `tracking=none`, keeps nothing."""

    def open(self, *, wait: bool = False) -> None:
        """Connect without starting a run; with `wait`, try for a while before raising UserError."""

    def start(self, info: RunInfo, run_id: str | None = None) -> Tracker:
        """Start a run, or resume the run `run_id`, whose name and tags stay as they are."""
        return Tracker(run_id or uuid4().hex)

    def children(self, sweep_id: str, ended_after: int = 0) -> list[RunRecord]:
        """Return the runs of a sweep, also those that are none of its jobs any more.

        Args:
            sweep_id: The id of the parent.
            ended_after: Milliseconds since 1970: only runs that ended later; 0 for all runs.
        """
        return []

    def delete(self, run_id: str) -> None:
        """Delete a run that another one replaces."""

    def mark_killed(self, run_id: str, reason: str, was: str = "RUNNING") -> bool:
        """Set a run of the status `was` to KILLED with `reason`; return whether it had that status.

        In any case, `reason` replaces a recorded one that says no more than that the process has ended.
        """
        return False

    def reap(self, output_dir: Path) -> list[RunRecord]:
        """Set RUNNING runs whose process has died to KILLED and return them.

        Only locks below `output_dir` are examined. For runs of other folders only the process id counts.
        """
        return []

    def resolve_id(self, text: str, *, finished: bool = False) -> str:
        """Return the id of a run, given its start, in any experiment; or that of the newest run of this one, given `latest`.

        Args:
            text: At least 6 hexadecimal digits, or `latest`.
            finished: Whether `latest` must have finished.

        Raises:
            UserError: There is no such run, or there are several.
        """
        return text

    def read(self, run_id: str) -> StoredRun:
        """Return a run with its recipe; raises UserError if the store lacks a part."""
        raise UserError("tracking=none stores no runs: set MLFLOW_TRACKING_URI to the store that does.")

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Record tags of a run; raises StoreLostError if they cannot be recorded."""

    def read_artifacts(self, records: Sequence[RunRecord], path: str, *, strict: bool = False) -> dict[str, bytes]:
        """Return an artifact of each run that has it, by the id of the run.

        Args:
            records: The runs.
            path: The name of the artifact, a file at the top level.
            strict: Whether a file that exists but cannot be read is an error; otherwise it is left out.

        Raises:
            UserError: Such a file cannot be read.
        """
        return {}

    def find_sweep(self, sweep: str, *, unfinished: bool = False) -> Sweep:
        """Return a sweep, by id, the start of one, or `latest`.

        Args:
            sweep: At least 6 hexadecimal digits, or `latest`.
            unfinished: Whether `latest` must not have finished.

        Raises:
            UserError: There is no such sweep, or it cannot be read.
        """
        raise UserError("tracking=none stores no sweeps: set MLFLOW_TRACKING_URI to the store that does.")

    def link(self, run_id: str) -> str:
        """Return a link to a run, for a description."""
        return ""

    def link_curves(self, sweep_id: str, finished: int) -> str:
        """Save the view of the curves of a sweep with `finished` finished runs; return a link to it, empty if that fails."""
        return ""
