"""The interface between runs and a store of runs, in plain values; and the store that records nothing."""

import json
import re
import shlex
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, ClassVar, Self
from uuid import uuid4

from pydantic import Field, TypeAdapter, ValidationError

from mnist_exp.errors import DivergedError, PrunedError, ResumableError, UserError
from mnist_exp.nodes import is_location
from mnist_exp.overrides import command
from mnist_exp.paths import TRACKING
from mnist_exp.settings import ID, Recipe, Settings, check_stored, read_recipe
from mnist_exp.signals import defer_signals
from mnist_exp.storage.run_dir import RUN_ID
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.provenance import PROCESS_DIED, abandoned

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from mnist_exp.learning.data import Dataset

# The colors of arms in charts and figures, which color-blind people can distinguish (Okabe and Ito, 2008), with gray in place of
# black, which a dark page hides.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
RECIPE = "recipe.json"  # the artifact with the recipe of a run
TRACEBACK = "traceback.txt"  # the artifact with the stack trace of a failed run
OUTCOME = "outcome.json"  # the artifact with the history and the mistakes of a run
MODELS = "a folder, the id of a run, latest, models:/NAME@ALIAS, models:/NAME/VERSION or models:/ID"
MAX_TAG = 8000  # characters; MLflow cuts a longer value without an error


class StoreUnavailableError(UserError):
    """The store does not answer."""


class StoreLostError(ResumableError):
    """The store did not answer before the end of the run, or refuses a record."""


class DeniedError(StoreLostError):
    """The server does not accept the user, or does not allow a request."""


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

    @property
    def job(self) -> int | None:
        """The number of the run's job in its sweep, None for a single run."""
        number = self.tags.get(tag.JOB, "")
        return int(number) if number.isdecimal() else None

    @property
    def overrides(self) -> list[str]:
        """The overrides of the run's command line, without locations."""
        return shlex.split(self.tags.get(tag.OVERRIDES, ""))

    @property
    def data(self) -> str:
        """The name of the data set, empty if unknown."""
        return self.tags.get(tag.DATA, "")

    @property
    def title(self) -> str:
        """The name by which people know the run's model."""
        return f"run {self.run_id[:8]}, {self.name}" + (f" on {self.data}" if self.data else "")

    @property
    def commit(self) -> str:
        """The commit of the code, empty if unknown."""
        return self.tags.get(tag.COMMIT, "")

    @property
    def objective(self) -> str:
        """The metric that decides."""
        return self.tags.get(tag.OBJECTIVE, str(Settings.model_fields["objective"].default))

    @property
    def is_done(self) -> bool:
        """Whether no work is left: the run has finished, or a search has pruned it."""
        return self.status == "FINISHED" or tag.PRUNED in self.tags


def latest_run_per_job(children: Iterable[RunRecord]) -> dict[int, RunRecord]:
    """Return the run of each job of a sweep: the finished one, else the newest."""
    ordered = sorted(children, key=lambda child: (child.status == "FINISHED", child.started))
    return {child.job: child for child in ordered if child.job is not None}


@dataclass(frozen=True)
class Sweep(RunRecord):
    """The parent of a sweep.

    Args:
        grids: The overrides of each grid: the first from the start, each further one from an extension. Of a search, one.
        total: The number of jobs, including those that a search has not proposed yet.
    """

    grids: list[list[str]]
    total: int

    @property
    def sweeper(self) -> str:
        """The name of what proposes the jobs: `grid` or `optuna`."""
        return self.tags.get(tag.SWEEPER, "")


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
    """Return a sweep, given the record of its parent.

    Raises:
        UserError: Another version recorded it, or it contains overrides that a store must not contain.
    """
    try:
        grids = TypeAdapter(Annotated[list[list[str]], Field(min_length=1)]).validate_json(record.tags.get(tag.GRIDS, ""))
        total = int(record.tags[tag.SWEEP_JOBS])
    except (ValidationError, ValueError) as error:
        raise UserError(
            f"Sweep {record.run_id} has no readable tag {tag.GRIDS}: an earlier version recorded it.",
            key=tag.GRIDS,
            value=record.tags.get(tag.GRIDS),
            remedy="Start it again, or use the version that recorded it.",
        ) from error
    overrides = [override for grid in grids for override in grid]
    check_stored(overrides, f"Sweep {record.run_id}")
    if placed := [override for override in overrides if is_location(override)]:  # it could point anywhere
        raise UserError(f"Sweep {record.run_id} contains the location {placed[0]}.", key=placed[0], remedy="Start it again.")
    return Sweep(**vars(record), grids=grids, total=total)


@dataclass(frozen=True)
class Answer:
    """The answer of a comparison, for the parent of its sweep.

    Args:
        factor: The key whose values are compared, as a part of names of tags and files. An answer replaces that of the same
            factor only.
        title: The verdict in one line.
        subtitle: The metric, the baseline and the margin.
        notes: The sentences without which the verdict would mislead.
        report: The HTML file.
        picture: The PNG file with the differences.
    """

    factor: str
    title: str
    subtitle: str
    notes: Sequence[str]
    report: Path
    picture: Path


def report_name(factor: str) -> str:
    """Return the name of the report of a comparison, as a file and an artifact; factor: as in `Answer`."""
    return f"compare-{factor}.html"


@dataclass(frozen=True)
class ModelSource:
    """Where a model is.

    Args:
        address: A folder, or an address of the store, such as MLflow's `models:/...`.
        title: What people know the model by: its run, its registered name, or its folder.
        model_id: The id of the logged model, None without one.
        run_id: The run that trained it, None if unknown.
    """

    address: str
    title: str
    model_id: str | None = None
    run_id: str | None = None


class Tracker:
    """Records one run; this one, of `tracking=none`, records nothing.

    A context manager: leaving it sets the final status: FINISHED, FAILED on an error, KILLED on a signal.

    Args:
        run_id: The id of the run.
    """

    is_recording = False

    def __init__(self, run_id: str) -> None:
        self.run_id, self.description = run_id, ""

    def __enter__(self) -> Self:
        return self

    @defer_signals()
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt | PrunedError) else "FAILED"
        if error is not None:
            message = (str(error).strip() or type(error).__name__).splitlines()[0][:250]
            tags, link = {tag.ERROR: message}, ""
            if isinstance(error, PrunedError):
                tags[tag.PRUNED] = message
            else:
                self.log_text("".join(traceback.format_exception(error)), TRACEBACK)
                link = self.artifact_page(TRACEBACK)
            if isinstance(error, DivergedError):
                tags[tag.DIVERGED] = "true"
            self.set_tags(tags)
            self.set_description(describe_failure(status, message, link, self.description))
        self.end(status)

    def end(self, status: str) -> None:
        """Send all records, and set the final status and the time of the end."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record the parameters of the configuration."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record tags; a later value replaces an earlier one."""

    def set_description(self, description: str) -> None:
        """Record the text that the UI shows, in Markdown."""
        self.description = description
        self.set_tags({tag.DESCRIPTION: description})

    def artifact_page(self, path: str) -> str:
        """Return a link to the page of an artifact of the run, for a description; empty if there are no links."""
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at `step` (examples seen); they may be sent as late as `flush`.

        A resumed run sends the metrics again that it already has.
        """

    def use_model(self, model_id: str) -> None:
        """Link the run to a recorded model, to which its results belong."""

    def log_results(self, metrics: Mapping[str, float]) -> None:
        """Record what is measured once, at step 0, and link it and the last validation metrics to the model and the data."""
        self.log_metrics(metrics, 0)

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

    def log_model(self, name: str, model: "nn.Module", settings: Settings, metrics: Mapping[str, float], folder: Path) -> None:
        """Record a model with the settings of its run, which hold the description of the data, and the metrics that scored it.

        It is written to `folder`, too.

        Raises:
            UserError: `folder`, which the model replaces, cannot be written.
        """
        from mnist_exp.tracking.models import save_model  # with torch, which commands that only read do not need

        save_model(folder, model, settings, metrics)


def describe_failure(status: str, error: str, link: str, description: str) -> str:
    """Return the description of a run that has not finished: the error, a link to its traceback, and the earlier description."""
    traceback_link = f" [Traceback]({link})" if link else ""
    return f"**{status}**: {error}{traceback_link}\n\n{description}".rstrip()


class Store:
    """Starts runs, and reads and corrects those that are stored; this one, `tracking=none`, keeps nothing.

    A store of runs overrides `__str__`, `start`, `get_run`, `runs`, `points`, `read_artifacts`, `set_tags`, `set_status`,
    `delete` and `publish`. The other methods use these, or say what the store cannot do.
    """

    # The modules that a job imports, for the process from which the workers of a sweep are forked.
    preloaded: ClassVar[Sequence[str]] = ()
    # The sentence that says how to choose another store, for messages.
    remedy: ClassVar[str] = f"To choose another store, repeat the tracking=... of the run, or set {TRACKING}."

    def __str__(self) -> str:
        """Return the name of the store in messages, such as its address."""
        return "tracking=none"

    def unsupported(self, lack: str) -> UserError:
        """Return the error for a request that the store cannot fulfill, because it `lack`."""
        return UserError(
            f"The store that `tracking` chooses, {self}, {lack}.",
            key="tracking",
            value=str(self),
            remedy=f"Choose another one, such as mlflow, with {TRACKING}=..., or with tracking=... of run.",
        )

    def missing(self, text: str) -> UserError:
        """Return the error for a run that the store does not have."""
        return UserError(
            f"There is no run {text} in {self}: expected latest, an id, or its first 6 or more hexadecimal digits.",
            key="id",
            value=text,
            remedy=f"`{command('runs', 'list')}` lists the runs. {self.remedy}",
        )

    def open(self, *, wait: bool = False) -> None:
        """Connect without starting a run; with `wait`, try for a while before raising UserError."""

    def start(self, info: RunInfo, run_id: str | None = None) -> Tracker:
        """Start a run, or resume the run `run_id`, whose name and tags stay as they are, except for tags of an earlier end."""
        return Tracker(run_id or uuid4().hex)

    # Reading.

    def get_run(self, run_id: str) -> RunRecord:
        """Return a run; raises UserError if the store has none of that id."""
        raise self.unsupported("keeps no runs")

    def runs(self, *, status: str = "", tag: str = "", prefix: str = "", everywhere: bool = False) -> list[RunRecord]:
        """Return runs whose ids have 32 hexadecimal digits, the newest first: ids become the names of folders.

        Args:
            status: Only runs of this status.
            tag: Only runs that have this tag.
            prefix: Only runs whose ids start with it.
            everywhere: Whether to return the runs of all experiments, if the store has several.
        """
        return []

    def points(self, record: RunRecord) -> dict[str, dict[int, float]]:
        """Return the values of each metric of a run by examples seen."""
        raise self.unsupported("keeps no histories of metrics")

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

    def children(self, sweep_id: str) -> list[RunRecord]:
        """Return the runs of a sweep, given the id of its parent, also those that are none of its jobs any more."""
        return [run for run in self.runs(tag=tag.SWEEP, everywhere=True) if run.tags[tag.SWEEP] == sweep_id]

    def find_run(self, text: str, *, finished: bool = False) -> RunRecord:
        """Return a run of any experiment, given its id or the start of it; or the newest run of this one, given `latest`.

        Args:
            text: At least 6 hexadecimal digits, or `latest`.
            finished: Whether `latest` must have finished.

        Raises:
            UserError: There is no such run, or there are several.
        """
        if RUN_ID.fullmatch(text):
            return self.get_run(text)
        if text == "latest":
            newest = self.runs(status="FINISHED" if finished else "")
            found = [run for run in newest if not {tag.SWEEP_JOBS, tag.MODEL} & run.tags.keys()][:1]  # no sweeps and evaluations
        else:
            found = self.runs(prefix=text.lower(), everywhere=True) if re.fullmatch(ID, text.lower()) else []
        if not found:
            raise self.missing(text)
        if len(found) > 1:
            listed = "".join(f"\n{record.run_id}  {record.name} ({record.status})" for record in found[:10])
            raise UserError(f"{text} is ambiguous: it is the start of {len(found)} ids. Type more digits of one of them:{listed}")
        return found[0]

    def recipe(self, record: RunRecord) -> Recipe:
        """Return the recipe of a run; raises UserError if the store lacks it."""
        run_id = record.run_id
        if tag.SWEEP_JOBS in record.tags:
            raise UserError(
                f"Run {run_id} is a sweep: choose one of its jobs, which `{command('runs', 'list', '--jobs')}` shows."
            )
        recipes = self.read_artifacts([record], RECIPE, strict=True)
        if run_id not in recipes:
            raise UserError(f"Run {run_id} has no readable {RECIPE}.")
        return read_recipe(recipes[run_id], f"{RECIPE} of run {run_id}")

    def find_sweep(self, sweep: str, *, unfinished: bool = False) -> Sweep:
        """Return a sweep, by id, the start of one, or `latest`.

        Args:
            sweep: At least 6 hexadecimal digits, or `latest`.
            unfinished: Whether `latest` must not have finished.

        Raises:
            UserError: There is no such sweep, or it cannot be read.
        """
        if sweep != "latest":
            record = self.find_run(sweep)
            if tag.SWEEP_JOBS not in record.tags:
                raise UserError.invalid("sweep", sweep, "the id of a sweep", f"`{command('runs', 'list')}` lists them.")
            return read_sweep(record)
        sweeps = self.runs(tag=tag.SWEEP_JOBS)
        left = [record for record in sweeps if not (unfinished and record.status == "FINISHED")]
        if not left:
            problem = "every sweep has finished" if sweeps else "there is no sweep"
            raise UserError(
                f"sweep latest: {problem} in {self}.", key="sweep", value=sweep, remedy=f"Name one by its id. {self.remedy}"
            )
        return read_sweep(left[0])

    # Correcting.

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Record tags of a run; raises StoreLostError if they cannot be recorded."""

    def set_status(self, run_id: str, status: str) -> None:
        """Set the final status of a run, and the time of its end."""

    def mark_killed(self, run_id: str, reason: str, was: str = "RUNNING") -> bool:
        """Set a run of the status `was` to KILLED with `reason`; return whether it had that status.

        In any case, `reason` replaces a recorded one that says no more than that the process has ended.
        """
        record = self.get_run(run_id)
        applies = record.status == was  # it may have ended in the meantime
        if applies or record.tags.get(tag.ERROR) == PROCESS_DIED:
            earlier = record.tags.get(tag.DESCRIPTION, "").removeprefix(describe_failure("KILLED", PROCESS_DIED, "", ""))
            description = describe_failure("KILLED", reason, "", earlier.lstrip())
            self.set_tags(run_id, {tag.ERROR: reason, tag.DESCRIPTION: description})
        if applies:
            self.set_status(run_id, "KILLED")
        return applies

    def reap(self, output_dir: Path) -> list[RunRecord]:
        """Set RUNNING runs whose process has died to KILLED and return them.

        Only locks below `output_dir` are examined. For runs of other folders only the process id counts.
        """
        reaped = []
        for record in self.runs(status="RUNNING"):
            with abandoned(record.run_id, record.tags, output_dir.absolute()) as is_abandoned:
                if is_abandoned and self.mark_killed(record.run_id, PROCESS_DIED):
                    reaped.append(record)
        return reaped

    def delete(self, run_id: str) -> None:
        """Delete a run; raises DeniedError if the user may not."""

    def after_deletion(self, records: Sequence[RunRecord]) -> list[str]:
        """Return the lines that say how to restore deleted runs, and how to remove their files."""
        return []

    # Models.

    def find_model(self, text: str, output_dir: Path) -> ModelSource:
        """Return a model that a user names.

        Args:
            text: A folder, a run's id or prefix, `latest` for the newest run that has a model: a single run, or without any a job
                of a sweep; or an address of the registry, `models:/NAME@ALIAS` or `models:/ID`.
            output_dir: The folder of all runs.

        Raises:
            UserError: There is no such model.
        """
        if text and Path(text).is_dir():
            return ModelSource(text, f"folder {text}")
        if text.startswith("models:/"):
            return self.registered_model(text)
        if text == "latest":
            finished = self.runs(status="FINISHED")
            records = sorted(finished, key=lambda record: record.job is not None)  # keeps the order by time
        elif re.fullmatch(ID, text.lower()):
            records = [self.find_run(text)]
        else:
            raise UserError.invalid("model", text, MODELS, f"`{command('runs', 'list')}` lists the runs.")
        if found := next(filter(None, (self.run_model(record, output_dir) for record in records)), None):
            return found
        remedy = f"Train one with `{command('run')}`. {self.remedy}"
        raise UserError(f"model {text}: {self} has no such run with a model.", key="model", value=text, remedy=remedy)

    def run_model(self, record: RunRecord, output_dir: Path) -> ModelSource | None:
        """Return the model of a run, None without one."""
        folder = output_dir / record.run_id / "model"
        return ModelSource(str(folder), record.title, run_id=record.run_id) if folder.is_dir() else None

    def fetch_model(self, source: ModelSource) -> Path:
        """Return the folder of a model; raises UserError if it cannot be loaded."""
        return Path(source.address)

    def registered_model(self, address: str) -> ModelSource:
        """Return a model of the registry; raises UserError if there is none."""
        raise self.unsupported("has no model registry")

    def registered_runs(self) -> dict[str, str]:
        """Return the ids of the runs whose models are in the registry, with the name and the version."""
        return {}

    def find_champion(self, name: str, alias: str) -> str | None:
        """Return the id of the run whose model an alias points to, empty if unknown; None without such a model."""
        raise self.unsupported("has no model registry")

    def register(self, record: RunRecord, name: str, alias: str, reason: str, tags: Mapping[str, str]) -> str:
        """Register the model of a run and point an alias to it, which comes last; return the number of the new version.

        Args:
            record: The run.
            name: The name of the registered model, created if missing.
            alias: The alias.
            reason: The sentence that says why, for the version's description.
            tags: Tags of the version.

        Raises:
            UserError: The model is missing or damaged, or not as `Tracker.log_model` writes it.
        """
        raise self.unsupported("has no model registry")

    # The user interface.

    def publish(self, run_id: str, answer: Answer) -> str:
        """Add the answer of a comparison to the parent of its sweep; return where the report is, for people."""
        raise self.unsupported("keeps no reports")

    def show_ui(self, run_id: str | None, view: str | None, port: int) -> None:
        """Serve the UI until it is stopped, and print the links to its pages.

        Args:
            run_id: The run or sweep to open: its id, the start of it, or `latest`; None for the newest sweep with an answer.
            view: The saved view to open, None for the page of the run.
            port: The port on this machine.

        Raises:
            UserError: There is no UI, no such run or view, or the port is in use.
        """
        raise self.unsupported("has no UI")

    def page(self, run_id: str) -> str | None:
        """Return the address of a run's page in the UI, None without one."""
        return None

    def ui_hint(self, run_id: str) -> str:
        """Return the line that says how to open a run in the UI, empty without one."""
        return f"Open it: {page}" if (page := self.page(run_id)) else ""

    def difference_hint(self, first: RunRecord, second: RunRecord) -> str:
        """Return the line that says how to compare two runs in the UI, empty if it cannot."""
        return ""

    def link(self, run_id: str, path: str = "") -> str:
        """Return a link to a run, or to its artifact `path`, for a description; empty if there are no links."""
        return ""

    def sweep_links(self, sweep: RunRecord, children: Sequence[RunRecord]) -> dict[str, str]:
        """Save the view of the runs of a sweep; return links to it by their text, for a description, none if that fails."""
        return {}
