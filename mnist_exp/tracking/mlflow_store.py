"""Opens an MLflow store, starts runs, and reads and corrects those that are stored."""

import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, Run, RunTag
from mlflow.exceptions import MlflowException
from pydantic import Field
from sqlalchemy.exc import SQLAlchemyError

from mnist_exp.errors import NonNegative, UserError
from mnist_exp.overrides import command
from mnist_exp.settings import ID, read_recipe
from mnist_exp.signals import defer_signals
from mnist_exp.storage import run_dir
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import (
    MAX_TAG,
    PROCESS_DIED,
    RECIPE,
    Answer,
    RunInfo,
    RunRecord,
    Store,
    StoredRun,
    StoreUnavailableError,
    Sweep,
    read_sweep,
)
from mnist_exp.tracking.connection import Result, check_uri, connect, first_line, is_refusal, restore_command, retry, terminate
from mnist_exp.tracking.views import CURVES, VIEW_PREFIX, artifact_path, curves_tag, run_path, surplus_curves, view_path

if TYPE_CHECKING:
    from mnist_exp.tracking.mlflow_tracker import MLflowTracker

MAX_ANSWER = 1000  # characters of an answer in a description, of which MLflow keeps 8,000
RUN_ID = re.compile("[0-9a-f]{32}")
PROCESS_LEFT = "the process released its lock"


class MLflowStore(Store):
    """The experiment `experiment` of the MLflow store at `uri`. Both are created if missing.

    Args:
        uri: `sqlite:///` and the path of a database file, or the http(s) address of a tracking server.
        experiment: The name of the experiment.
        patience: Seconds to wait for a store that is unreachable, at the end of a run and before a job of a sweep.
    """

    client: MlflowClient

    def __init__(self, uri: str, experiment: Annotated[str, Field(min_length=1)], patience: NonNegative = 120.0) -> None:
        self.uri = check_uri(uri)
        self.experiment = experiment
        self.patience = patience

    def open(self, *, wait: bool = False) -> None:
        deadline = time.monotonic() + (self.patience if wait else 0.0)
        while not hasattr(self, "client"):
            try:
                self.client, self.experiment_id = connect(self.uri, self.experiment)
            except StoreUnavailableError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(1)

    def start(self, info: RunInfo, run_id: str | None = None) -> "MLflowTracker":
        from mnist_exp.tracking.mlflow_tracker import MLflowTracker  # with torch, which commands that only read do not need

        self.open()
        if run_id:
            return self._retry(lambda: MLflowTracker(self.client, self.uri, self._reopen(run_id), self.patience))
        # The UI cuts the source of a LOCAL run at its last slash. It shows that of a JOB whole.
        tags = {**info.tags, tag.COMMAND_TYPE: "JOB", tag.COMMAND: info.command}
        try:
            run = _project_run(self.client, self.experiment_id, info.name, tags)
            run = run or self.client.create_run(self.experiment_id, run_name=info.name, tags=tags)
        except (MlflowException, SQLAlchemyError, OSError) as error:  # not repeated: the store may have created the run
            raise UserError(
                f"{self.uri} cannot start a run: {first_line(error)}",
                key="tracking.uri",
                value=self.uri,
                remedy="Make sure that the server answers and that its disk has space, or use another tracking.uri.",
            ) from error
        if not RUN_ID.fullmatch(run.info.run_id):  # it becomes the name of a folder
            raise UserError(f"{self.uri} created a run with the id {run.info.run_id!r}, expected 32 hexadecimal digits.")
        return MLflowTracker(self.client, self.uri, run, self.patience)

    def _retry(self, operation: Callable[[], Result]) -> Result:
        return retry(operation, self.uri, self.patience)

    def _reopen(self, run_id: str) -> Run:
        run = self._stored_run(run_id)
        self.experiment_id = run.info.experiment_id
        for key in {tag.ERROR, tag.PRUNED, tag.DIVERGED} & run.data.tags.keys():  # they describe an end that no longer holds
            self.client.delete_tag(run_id, key)
        self.client.update_run(run_id, status="RUNNING")
        return run

    def get_run(self, run_id: str) -> RunRecord:
        """Return a run; raises UserError if the store has none of that id."""
        return record_of(self._stored_run(run_id))

    @defer_signals()
    def _stored_run(self, run_id: str) -> Run:
        self.open()
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if not is_refusal(error):
                raise
            raise UserError(
                f"There is no run {run_id} in {self.uri}: set MLFLOW_TRACKING_URI or tracking.uri to its store, or use "
                "tracking=none for a run that was started with it."
            ) from error
        if run.info.run_id != run_id:  # it becomes the name of a folder
            raise UserError(f"{self.uri} answers with another run than {run_id}.")
        if run.info.lifecycle_stage == "deleted":
            restore = restore_command(self.client, self.uri, run.info.experiment_id, run_id)
            raise UserError(f"Run {run_id} was deleted in {self.uri}.", remedy=f"Restore it with `{restore}`.")
        return run

    @defer_signals()
    def runs(self, query: str = "", *, everywhere: bool = False) -> list[RunRecord]:
        """Return the runs of this experiment, or of all, for which MLflow's filter `query` holds, the newest first.

        A run whose id does not have MLflow's form is left out, because ids become the names of folders.
        """
        self.open()
        experiments = [item.experiment_id for item in self.client.search_experiments()] if everywhere else [self.experiment_id]
        runs: list[Run] = []
        token: str | None = ""
        while token is not None:
            page = self.client.search_runs(experiments, query, max_results=1000, page_token=token or None)
            runs += page
            token = page.token
        return [record_of(run) for run in runs if RUN_ID.fullmatch(run.info.run_id)]

    def children(self, sweep_id: str, ended_after: int = 0) -> list[RunRecord]:
        ended = f" and attributes.end_time > {ended_after}" if ended_after else ""
        return self._retry(lambda: self.runs(f"tags.{tag.SWEEP} = '{sweep_id}'{ended}"))

    def delete(self, run_id: str) -> None:
        def delete() -> None:
            for model in self.logged_models(record_of(self.client.get_run(run_id))):
                self.client.delete_logged_model(model.model_id)
            self.client.delete_run(run_id)  # last: what is left of an interrupted deletion can be deleted again

        self._retry(delete)

    def logged_models(self, record: RunRecord) -> list[LoggedModel]:
        """Return the models that a run has recorded."""
        self.open()
        return list(self.client.search_logged_models([record.experiment_id], f"source_run_id='{record.run_id}'"))

    def mark_killed(self, run_id: str, reason: str, was: str = "RUNNING") -> bool:
        def mark() -> bool:
            run = self.client.get_run(run_id)
            applies = bool(run.info.status == was)  # it may have ended in the meantime
            if applies or run.data.tags.get(tag.ERROR) in (PROCESS_DIED, PROCESS_LEFT):
                self.client.set_tag(run_id, tag.ERROR, reason)
            if applies:
                terminate(self.client, run_id, "KILLED")
            return applies

        return self._retry(mark)

    def reap(self, output_dir: Path) -> list[RunRecord]:
        running = self._retry(lambda: self.runs("attributes.status = 'RUNNING'"))
        reaped = []
        for record in running:
            with _abandoned(record, output_dir.absolute()) as reason:
                if reason and self.mark_killed(record.run_id, reason):
                    reaped.append(record)
        return reaped

    def read(self, run_id: str) -> StoredRun:
        record = self.get_run(run_id)
        if tag.SWEEP_JOBS in record.tags:
            raise UserError(
                f"Run {run_id} is a sweep: choose one of its jobs, which `{command('runs', 'list', '--jobs')}` shows."
            )
        try:
            recipe = read_recipe(self.download(record, RECIPE), f"{RECIPE} of run {run_id}")
        except OSError as error:
            raise UserError(f"Run {run_id} has no readable {RECIPE}: {first_line(error)}") from error
        histories = {key: self.client.get_metric_history(run_id, key) for key in record.metrics}
        points = {key: {point.step: point.value for point in history} for key, history in histories.items()}
        return StoredRun(record, recipe, points)

    def resolve_id(self, text: str, *, finished: bool = False) -> str:
        if RUN_ID.fullmatch(text):
            return text
        if text == "latest":
            newest = self.runs("attributes.status = 'FINISHED'" if finished else "")
            trained = [run for run in newest if not {tag.SWEEP_JOBS, tag.MODEL} & run.tags.keys()]  # no sweeps and evaluations
            found = trained[:1]
        else:
            prefix = text.lower() if re.fullmatch(ID, text.lower()) else None
            found = self.runs(f"attributes.run_id LIKE '{prefix}%'", everywhere=True) if prefix else []
        if len(found) == 1:
            return found[0].run_id
        raise _unresolved(text, self.uri, found)

    def find_sweep(self, sweep: str, *, unfinished: bool = False) -> Sweep:
        if sweep != "latest":
            record = self.get_run(self.resolve_id(sweep))
            if tag.SWEEP_JOBS not in record.tags:
                raise UserError.invalid("sweep", sweep, "the id of a sweep", f"`{command('runs', 'list')}` lists them.")
        else:
            sweeps = self.runs(f"tags.{tag.SWEEP_JOBS} LIKE '%'")
            left = [record for record in sweeps if not (unfinished and record.status == "FINISHED")]
            if not left:
                problem = f"all {len(sweeps)} sweeps have finished" if sweeps else "there is no sweep"
                raise UserError(
                    f"sweep latest: {problem} in {self.uri}, experiment {self.experiment}.",
                    key="sweep",
                    value=sweep,
                    remedy="Set MLFLOW_TRACKING_URI to the store with your sweeps, or name one by its id.",
                )
            record = left[0]
        self.experiment_id = record.experiment_id
        return read_sweep(record)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self._retry(lambda: self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()]))

    def read_artifacts(self, records: Sequence[RunRecord], path: str, *, strict: bool = False) -> dict[str, bytes]:
        self.open()

        def read(record: RunRecord) -> bytes | None:
            try:
                return self.download(record, path)
            except OSError as error:
                if strict and path in [file.path for file in self.client.list_artifacts(record.run_id)]:
                    raise UserError(f"{path} of run {record.run_id} cannot be read: {error}") from error
                return None  # most such runs ended before they recorded one

        with ThreadPoolExecutor(8) as pool:  # over a network, most of the time is waiting
            found = zip(records, pool.map(read, records), strict=True)
            return {record.run_id: content for record, content in found if content is not None}

    def download(self, record: RunRecord, path: str) -> bytes:
        """Return the content of an artifact of a run; raises OSError if it cannot be read."""
        try:
            with TemporaryDirectory() as folder:
                address = f"{record.artifacts}/{path}"
                return Path(download_artifacts(address, dst_path=folder, tracking_uri=self.uri)).read_bytes()
        except Exception as error:  # stores raise exceptions of their own
            raise OSError(str(error)) from error

    def publish(self, run_id: str, answer: Answer) -> str:
        name = answer.report.name
        try:
            address = f"{_publish(self.client, run_id, answer)}/{name}"
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise UserError(f"{name} cannot be added to run {run_id} of {self.uri}: {first_line(error)}") from error
        if not address.startswith("file:"):
            return f"{name}, under Artifacts of {self.uri}{run_path(self.experiment_id, run_id)}"
        return unquote(urlsplit(address).path)

    def link(self, run_id: str) -> str:
        return run_path(self.experiment_id, run_id).removeprefix("/")

    def page(self, run_id: str) -> str | None:
        path = run_path(self.experiment_id, run_id)
        return f"{self.uri}{path}" if self.uri.startswith("http") else None

    def link_curves(self, sweep_id: str, finished: int) -> str:
        key = f"{CURVES}-{sweep_id[:8]}"
        try:  # each time, because the name of the view counts the runs
            self.client.set_experiment_tag(self.experiment_id, VIEW_PREFIX + key, curves_tag(sweep_id, finished))
            for name in surplus_curves(self.client.get_experiment(self.experiment_id).tags):
                self.client.delete_experiment_tag(self.experiment_id, name)
        except MlflowException:  # the sweep has its results without a view
            return ""
        return view_path(self.experiment_id, key).removeprefix("/")


def _publish(client: MlflowClient, run_id: str, answer: Answer) -> str:
    """Add an answer to the parent of a sweep; return the address of the run's artifacts."""
    for path in (answer.report, answer.picture):
        client.log_artifact(run_id, str(path))
    run = client.get_run(run_id)
    text = " ".join([f"{answer.title}.", *answer.notes])
    # One paragraph for each factor, which its next comparison replaces.
    mark = f"**{answer.factor}**: "
    others = re.sub(
        rf"^{re.escape(mark)}.*?(\n\n|\Z)", "", run.data.tags.get(tag.DESCRIPTION, ""), flags=re.DOTALL | re.MULTILINE
    )
    description = (
        f"{mark}{shorten(text, MAX_ANSWER, placeholder=' ...')} See `{answer.report.name}` under Artifacts for the full report.\n"
        f"![The comparison by {answer.factor}]({artifact_path(run_id, answer.picture.name)})\n\n{others}"
    )
    tags = {tag.ANSWER: answer.title, f"{tag.ANSWER}.{answer.factor}": text[:MAX_TAG], tag.DESCRIPTION: description}
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    return str(run.info.artifact_uri)


def _project_run(client: MlflowClient, experiment_id: str, name: str, tags: Mapping[str, str]) -> Run | None:
    """Return the run that `mlflow run` has created for this process, if it belongs to this experiment."""
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException:  # of another store
        return None
    if run.info.experiment_id != experiment_id:
        return None
    client.update_run(run_id, name=name)
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    return run


def record_of(run: Run) -> RunRecord:
    """Return a run of MLflow's form as a record."""
    info, data = run.info, run.data
    inputs = run.inputs.dataset_inputs if run.inputs else []
    digests = {item.dataset.name.rpartition("-")[2]: item.dataset.digest for item in inputs}
    description = data.tags.get(tag.DESCRIPTION, "")
    return RunRecord(
        info.run_id, info.experiment_id, info.run_name, info.status, info.start_time, info.end_time, dict(data.params),
        dict(data.metrics), dict(data.tags), digests, info.artifact_uri, description,
    )  # fmt: skip


def _unresolved(text: str, uri: str, found: list[RunRecord]) -> UserError:
    """Return the error for the start of an id that several runs share, or none has."""
    if found:
        listed = "".join(f"\n{record.run_id}  {record.name} ({record.status})" for record in found[:10])
        return UserError(f"{text} is ambiguous: it is the start of {len(found)} ids. Type more digits of one of them:{listed}")
    return UserError(
        f"There is no run {text} in {uri}: expected latest, an id, or its first 6 or more hexadecimal digits.",
        key="id",
        value=text,
        remedy=f"`{command('runs', 'list')}` lists the runs; set MLFLOW_TRACKING_URI to their store.",
    )


@contextmanager
def _abandoned(record: RunRecord, output_dir: Path) -> Iterator[str | None]:
    """Yield the reason why nobody works on a RUNNING run, None if somebody may; the run stays locked for the block."""
    if record.tags.get(tag.HOST) != platform.node() or not {tag.PID, tag.OUTPUT_DIR} <= record.tags.keys():
        yield None
        return
    reason = PROCESS_LEFT if _is_alive(record.tags[tag.PID]) else PROCESS_DIED
    folder = output_dir / record.run_id
    # The tag could name any folder: a lock is examined only below the command's own output_dir.
    if record.tags[tag.OUTPUT_DIR] != str(output_dir) or not (folder / run_dir.LOCK).exists():
        yield reason if reason == PROCESS_DIED else None
        return
    with run_dir.try_lock(folder) as locked:
        yield reason if locked else None


def _is_alive(pid: str) -> bool:
    """Return whether this machine has the process; an invalid number counts as alive."""
    if not (pid.isdecimal() and 0 < int(pid) < 2**31):
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
