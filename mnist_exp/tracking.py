"""Where a run is recorded: in MLflow, or nowhere. The only module that imports mlflow, and only once it is needed."""

import base64
import copy
import json
import logging
import os
import platform
import re
import shlex
import time
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from filelock import FileLock

from mnist_exp import exported, output
from mnist_exp.definition import Definition, parse_definition
from mnist_exp.errors import PrunedError, ResumableError, UserError
from mnist_exp.exported import GRAPH
from mnist_exp.overrides import absolute_path, check_stored, command, default_store
from mnist_exp.redaction import has_credentials, redact, redact_all, without_credentials
from mnist_exp.signals import uninterrupted

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from torch import nn
    from torch.export import ExportedProgram

    from mnist_exp.data import Dataset

Result = TypeVar("Result")
LEADERBOARD = "leaderboard"
LEADERBOARD_COLUMNS = (
    "metrics.`test/accuracy`",
    "metrics.`test/loss`",
    "metrics.`model/parameters`",
    "tags.`data`",
    "tags.`overrides`",
)
BATCH_LIMIT = 1000  # of metrics in one MLflow request
OUTCOME = "outcome.json"  # a run's history and mistakes, for comparisons
# By architecture and example: the graph, and the files around it.
_traced: "dict[tuple[str, bytes], tuple[ExportedProgram, dict[Path, bytes]]]" = {}
TRACES_KEPT = 8
RETRY_AFTER = 10.0  # seconds until a store that did not answer is tried again, while training goes on
DIED = "its process died"
LEFT = "its process no longer works on it"


@dataclass(frozen=True)
class Record:
    """A run as the store holds it; started and ended: milliseconds since 1970, ended None while it is on.

    digests: of the data's splits; artifacts: the address of the folder of its files.
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
        """The number of the job of a sweep that the run stands for, None for other runs."""
        number = self.tags.get("job_num", "")
        return int(number) if number.isdecimal() and len(number) < 10 else None


@dataclass(frozen=True)
class Recipe:
    """How a run is made again: its resolved configuration, the option of each group, and the overrides of its command line."""

    config: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str]


@dataclass(frozen=True)
class Original:
    """All that running a run again takes, and what it came to: the points of each metric, by examples seen."""

    record: Record
    recipe: Recipe
    points: dict[str, dict[int, float]]


class StoreAwayError(UserError):
    """The store does not answer."""


class StoreGoneError(ResumableError):
    """The store did not come back before the end of the run, or refuses to take what it records."""


class NoTracker:
    """Records nothing: the interface of a tracker, and `tracking=none`.

    `with tracker.start(name, tags):` spans the run; leaving it tells how the run ended.
    """

    run_id: str

    def open(self, *, waits: bool = False) -> None:
        """Open the store without beginning a run; raises UserError, where it `waits` for one that is away only after a while."""

    def start(self, name: str, tags: Mapping[str, str], run_id: str | None = None) -> Self:
        """Begin the run called `name`, or go on with the run `run_id`, whose tags stay as they are."""
        self.run_id = run_id or uuid4().hex
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the run: FINISHED without an error, KILLED by a KeyboardInterrupt, else FAILED."""

    def params(self, params: Mapping[str, object]) -> None:
        """Record what the run was configured with."""

    def tags(self, tags: Mapping[str, str]) -> None:
        """Record tags; a later value replaces an earlier one."""

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at `step`, examples seen; they may be held back until `flush`."""

    def flush(self) -> None:
        """Send what was held back."""

    def text(self, text: str, path: str) -> None:
        """Record `text` as the artifact `path`."""

    def figure(self, draw: Callable[[], "Figure"], path: str) -> None:
        """Record the picture that `draw` returns as the artifact `path`."""

    def file(self, file: Path) -> None:
        """Record a file as an artifact of its own name."""

    def dataset(self, data: "Dataset", split: str, context: str) -> None:
        """Record that `split` was used for `context` (training, fine-tuning, test, ...), the first one that is told."""

    def model(self, model: "nn.Module", example: Any, folder: Path, config: dict[str, Any]) -> None:
        """Export the model to `folder`, sealed with its configuration, and record it; example: an input array of two images."""

    def children(self, sweep_id: str | None = None, ended_after: int = 0) -> list[Record]:
        """Return the runs of a sweep: the one that this run is the parent of, unless told; ended_after: ms, leaves out others."""
        return []

    def delete(self, run_id: str) -> None:
        """Remove a run that another takes the place of."""

    def close(self, run_id: str, why: str) -> bool:
        """Set a run that nobody works on to KILLED, and note why unless it has said itself; return whether it was RUNNING."""
        return False

    def reap(self, output_dir: Path) -> list[Record]:
        """Set the runs to KILLED that are RUNNING in the store though nobody works on them, and return them.

        output_dir: where locks tell whether somebody does; of runs elsewhere, only the process is looked for.
        """
        return []

    def read(self, run_id: str) -> Original:
        """Return what the store holds of a run; raises UserError where that does not suffice to run it again."""
        raise UserError("tracking=none holds no runs: name the store that does with MLFLOW_TRACKING_URI.")

    def find_sweep(self, sweep: str, *, finished_too: bool) -> tuple[Record, Definition]:
        """Return a sweep's parent and definition by its id, or `latest` for the newest, finished or not. Raises UserError."""
        raise UserError("tracking=none holds no sweeps: name the store that does with MLFLOW_TRACKING_URI.")

    def outcomes(self, records: list[Record]) -> list[tuple[Record, Any]]:
        """Return each run with its outcome.json, None where there is none that could be read; its content is not checked."""
        return [(record, None) for record in records]

    def publish(self, run_id: str, file: Path, tags: Mapping[str, str]) -> str:
        """Add a file and tags to a run that has ended; return where the file lies. Raises UserError where the store refuses."""
        return ""

    def link(self, run_id: str) -> str:
        """Return the link to another run, for a description that the UI shows."""
        return ""

    def how_to_open(self) -> str | None:
        """Return the command or address that opens the run in the UI."""
        return None


class MLflowTracker(NoTracker):
    """Records the run in the MLflow store at `uri`, in `experiment`; both are created where they are missing.

    uri: sqlite:///path of a database file, or http(s):// of a tracking server; patience: seconds to wait for a store that is
    away where nothing else is left to do, at the end of a run and before a job of a sweep.
    Raises UserError from `start` where the store cannot be opened.
    """

    client: "MlflowClient"

    def __init__(self, uri: str, experiment: str, patience: float = 120.0) -> None:
        self.uri = absolute_uri(uri)
        self.experiment = experiment
        self.patience = patience
        self._points: list[Any] = []  # metrics since the last flush
        self._recorded: set[tuple[str, int]] = set()  # (metric, step): a run that is gone on with repeats what it knows
        self._datasets: set[str] = set()  # recorded already: MLflow may refuse to take one twice
        self._outbox: deque[Callable[[], object]] = deque()  # what the store has not taken yet, in order
        self._next_try = 0.0

    def start(self, name: str, tags: Mapping[str, str], run_id: str | None = None) -> Self:
        self.open()
        adopted = self._project_run()
        if run_id:
            self._patiently(lambda: run_path(self.client, run_id))
            self._patiently(lambda: self._reopen(run_id))
        elif adopted:
            self.run_id = adopted
            self.client.update_run(adopted, name=redact(name))
            self.tags(tags)
        else:
            created = self.client.create_run(self.experiment_id, run_name=redact(name), tags=redact_all(dict(tags)))
            self.run_id = created.info.run_id
        return self

    def open(self, *, waits: bool = False) -> None:
        deadline = time.monotonic() + (self.patience if waits else 0.0)
        while not hasattr(self, "client"):
            try:
                self.client, self.experiment_id = open_store(self.uri, self.experiment)
            except StoreAwayError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(1)

    def _patiently(self, operation: Callable[[], Result]) -> Result:
        """Return what `operation` reads from the store, which may be away for a while; raises StoreGoneError."""
        deadline = time.monotonic() + self.patience
        while True:
            try:
                with uninterrupted():
                    return operation()
            except UserError:
                raise
            except Exception as error:  # a server, a database and a disk fail in their own ways
                if _is_refusal(error) or time.monotonic() > deadline:
                    raise StoreGoneError(f"{self.uri} does not answer as it should: {str(error).splitlines()[0]}") from error
            time.sleep(1)

    def _project_run(self) -> str | None:
        """Return the run that `mlflow run` has made for this process, if it lies where our runs are looked for."""
        from mlflow.exceptions import MlflowException

        run_id = os.environ.pop("MLFLOW_RUN_ID", None)
        if run_id is None:
            return None
        try:
            return run_id if self.client.get_run(run_id).info.experiment_id == self.experiment_id else None
        except MlflowException:  # of another store
            return None

    def _reopen(self, run_id: str) -> None:
        run = self.client.get_run(run_id)
        self.run_id, self.experiment_id = run_id, run.info.experiment_id
        for key in run.data.metrics:
            self._recorded |= {(key, point.step) for point in self.client.get_metric_history(run_id, key)}
        self._datasets = {item.dataset.name for item in run.inputs.dataset_inputs} if run.inputs else set()
        for key in {"error", "pruned"} & run.data.tags.keys():  # of an end that is none any more
            self.client.delete_tag(run_id, key)
        self.client.update_run(run_id, status="RUNNING")

    @uninterrupted()
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stopped = isinstance(error, KeyboardInterrupt | PrunedError)
        status = "FINISHED" if error is None else "KILLED" if stopped else "FAILED"
        if isinstance(error, PrunedError):
            self.tags({"pruned": str(error), "error": str(error)})
        elif error is not None:
            self.text("".join(traceback.format_exception(error)), "traceback.txt")
            self.tags({"error": (str(error).strip() or type(error).__name__).splitlines()[0][:250]})
        self._queue_points()
        self._outbox.append(partial(self._terminate, status, self.run_id))
        deadline = time.monotonic() + self.patience
        while lost := self._send():
            reason = str(lost).splitlines()[0]
            if _is_refusal(lost):
                raise StoreGoneError(
                    f"{self.uri} refuses what run {self.run_id} records: {reason}\n"
                    f"What is on the disk is kept. If it was deleted, bring it back with `{self._how_to_restore()}`."
                ) from error
            if time.monotonic() > deadline:
                raise StoreGoneError(
                    f"{self.uri} no longer takes what run {self.run_id} records: {reason}\n"
                    "Nothing is lost: what is on the disk is kept."
                ) from error
            time.sleep(1)

    def _how_to_restore(self) -> str:
        """Return the command that brings back the run, or its experiment where that was deleted with all its runs."""
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):
            if self.client.get_experiment(self.experiment_id).lifecycle_stage == "deleted":
                return _how_to_restore(self.uri, self.experiment_id)
        return f"{_store_variable(self.uri)}mlflow runs restore --run-id {self.run_id}"

    def _terminate(self, status: str, run_id: str) -> None:
        began = self.client.get_run(run_id).info.start_time
        self.client.set_terminated(run_id, status, max(began, int(time.time() * 1000)))  # a clock can be set back

    def _queue(self, operation: Callable[[], object]) -> None:
        """Have the store do `operation`, now or, while it is gone, later; operations keep their order."""
        self._outbox.append(operation)
        if time.monotonic() >= self._next_try and self._send():
            self._next_try = time.monotonic() + RETRY_AFTER

    def _send(self) -> Exception | None:
        """Send what waits; return what keeps the store from taking it, if anything does."""
        while self._outbox:
            try:
                with uninterrupted():
                    self._outbox[0]()
                    self._outbox.popleft()
            except Exception as error:  # a server, a database and a disk fail in their own ways; none may end a training
                return error
        return None

    def params(self, params: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, redact(str(value))) for key, value in params.items()]
        self._queue(lambda: self.client.log_batch(self.run_id, params=entities))

    def tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(key, redact(value)) for key, value in tags.items()]
        self._queue(lambda: self.client.log_batch(self.run_id, tags=entities))

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {key: value for key, value in metrics.items() if (key, step) not in self._recorded}
        self._recorded |= {(key, step) for key in new}
        self._points += [Metric(key, value, now, step) for key, value in new.items()]

    def flush(self) -> None:
        self._queue_points()
        self._queue(lambda: None)

    def _queue_points(self) -> None:
        # The store takes a point that it has, to the millisecond, as the same one: a batch may be sent twice.
        for start in range(0, len(self._points), BATCH_LIMIT):
            batch = self._points[start : start + BATCH_LIMIT]
            self._outbox.append(partial(self.client.log_batch, self.run_id, metrics=batch))
        self._points = []

    def text(self, text: str, path: str) -> None:
        self._queue(lambda: self.client.log_text(self.run_id, redact(text), path))

    def figure(self, draw: Callable[[], "Figure"], path: str) -> None:
        form = {"dpi": 80, "pil_kwargs": {"compress_level": 1}}
        self._queue(lambda: self.client.log_figure(self.run_id, draw(), path, save_kwargs=form))

    def file(self, file: Path) -> None:
        self._queue(lambda: self.client.log_artifact(self.run_id, str(file)))

    def dataset(self, data: "Dataset", split: str, context: str) -> None:
        from mlflow.entities import Dataset as DatasetEntity
        from mlflow.entities import DatasetInput, InputTag

        from mnist_exp.data import SIDE

        if f"{data.name}-{split}" in self._datasets:
            return
        self._datasets.add(f"{data.name}-{split}")
        part = data.splits[split]
        schema = {"images": f"uint8 (n, 1, {SIDE}, {SIDE})", "labels": "int64 (n,)"}
        entity = DatasetEntity(
            name=f"{data.name}-{split}",
            digest=part.digest,
            source_type="local",
            source=json.dumps({"uri": redact(data.source)}),
            schema=json.dumps(schema),
            profile=json.dumps({"num_rows": len(part), "epoch_size": part.epoch_size}),
        )
        inputs = [DatasetInput(entity, [InputTag("mlflow.data.context", context)])]
        self._queue(lambda: self.client.log_inputs(self.run_id, inputs))

    def model(self, model: "nn.Module", example: Any, folder: Path, config: dict[str, Any]) -> None:
        shape = {key: value for key, value in config["model"].items() if key != "dropout"}  # which the graph does not have
        exported.save(folder, model, config, partial(export, model, example, architecture=json.dumps(shape)))
        self._queue(lambda: self._log_model(folder))

    def _log_model(self, folder: Path) -> None:
        """Record the model in `folder`; what an end that was cut off has left of it, whole or begun, is used."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        run = self.client.get_run(self.run_id)
        begun = self.client.search_logged_models([self.experiment_id], f"source_run_id='{self.run_id}'")
        model = next(iter(begun), None) or self.client.create_logged_model(
            self.experiment_id, "model", self.run_id, params=run.data.params
        )
        if model.status == LoggedModelStatus.READY:
            return
        if not run.outputs or model.model_id not in {output.model_id for output in run.outputs.model_outputs}:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)

    def children(self, sweep_id: str | None = None, ended_after: int = 0) -> list[Record]:
        ended = f" and attributes.end_time > {ended_after}" if ended_after else ""
        where = f"tags.sweep_id = '{sweep_id or self.run_id}'{ended}"
        found = self._patiently(lambda: read_runs(self.client, self.experiment_id, where))
        return [record for record in found if record.job is not None]

    def delete(self, run_id: str) -> None:
        self._patiently(lambda: self.client.delete_run(run_id))

    def reap(self, output_dir: Path) -> list[Record]:
        self.open()
        running = self._patiently(lambda: read_runs(self.client, self.experiment_id, "attributes.status = 'RUNNING'"))
        return [record for record in running if self._reap_if_dead(record, output_dir)]

    def _reap_if_dead(self, record: Record, output_dir: Path) -> bool:
        if record.tags.get("host") != platform.node() or not {"pid", "output_dir"} <= record.tags.keys():
            return False
        why = LEFT if _lives(record.tags["pid"]) else DIED
        folder = output_dir.absolute() / record.run_id
        # The tag could name any folder: a lock is looked at only where this command's own output goes.
        if record.tags["output_dir"] != str(output_dir.absolute()) or not (folder / output.LOCK).exists():
            return why == DIED and self.close(record.run_id, why)
        with output.idle(folder) as idle:
            return idle and self.close(record.run_id, why)

    def close(self, run_id: str, why: str) -> bool:
        def close() -> bool:
            run = self.client.get_run(run_id)
            is_running = bool(run.info.status == "RUNNING")  # it may have ended since it was looked for
            if is_running or run.data.tags.get("error") in (DIED, LEFT):
                self.client.set_tag(run_id, "error", redact(why))
            if is_running:
                self._terminate("KILLED", run_id)
            return is_running

        return self._patiently(close)

    def read(self, run_id: str) -> Original:
        from pydantic import TypeAdapter, ValidationError

        self.open()
        run_path(self.client, run_id)
        run = self.client.get_run(run_id)
        if "sweep_jobs" in run.data.tags:
            raise UserError(f"Run {run_id} is a sweep: name one of its jobs, which `{command('runs', 'list')}` shows.")
        try:
            recipe = TypeAdapter(Recipe).validate_json(self._download(run_id, "recipe.json"))
        except (OSError, ValidationError) as error:
            raise UserError(f"Run {run_id} does not hold its recipe.json as it should: {str(error).splitlines()[0]}") from error
        check_stored(recipe.overrides, f"recipe.json of run {run_id}")
        histories = {key: self.client.get_metric_history(run_id, key) for key in run.data.metrics}
        points = {key: {point.step: point.value for point in history} for key, history in histories.items()}
        return Original(_record(run), recipe, points)

    def find_sweep(self, sweep: str, *, finished_too: bool) -> tuple[Record, Definition]:
        self.open()
        sweeps = read_runs(self.client, self.experiment_id, "tags.sweep_jobs LIKE '%'")
        allowed = [record for record in sweeps if finished_too or record.status != "FINISHED"]
        wanted = allowed if sweep == "latest" else [record for record in sweeps if record.run_id == sweep]
        for record in sorted(wanted, key=lambda record: record.started, reverse=True):
            if (definition := self._definition(record)) is not None:
                return record, definition
        if wanted:
            raise UserError(
                f"sweep {sweep}: it has no sweep.json that can be read: it ended before it was defined. Start it anew."
            )
        if sweep == "latest" and sweeps:
            raise UserError(
                f"sweep.resume=latest: all {len(sweeps)} sweeps in {self.uri} have finished, so that nothing is left to do."
            )
        known = ", ".join(f"{record.run_id} ({record.status})" for record in sweeps[:5]) or "none"
        what = "" if finished_too else " that could be gone on with"
        raise UserError(f"sweep {sweep}: there is no such sweep{what} in {self.uri}; those there: {known}.")

    def _definition(self, record: Record) -> Definition | None:
        try:
            return parse_definition(self._download(record.run_id, "sweep.json"), f"sweep.json of run {record.run_id}")
        except OSError:
            return None

    def _download(self, run_id: str, path: str) -> bytes:
        """Return the content of an artifact; raises OSError where it is not to be had."""
        from mlflow.exceptions import MlflowException

        try:
            with TemporaryDirectory() as folder:
                return Path(self.client.download_artifacts(run_id, path, folder)).read_bytes()
        except MlflowException as error:
            raise OSError(str(error)) from error

    def outcomes(self, records: list[Record]) -> list[tuple[Record, Any]]:
        from mlflow.artifacts import download_artifacts

        def read(record: Record) -> Any:
            with TemporaryDirectory() as folder:
                try:
                    path = download_artifacts(f"{record.artifacts}/{OUTCOME}", dst_path=folder)
                    return json.loads(Path(path).read_text())
                except Exception:  # a run that ended early has none; a server or a disk may refuse it
                    return None

        with ThreadPoolExecutor(8) as pool:  # over a network, waiting takes the time
            return list(zip(records, pool.map(read, records), strict=True))

    def publish(self, run_id: str, file: Path, tags: Mapping[str, str]) -> str:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            self.client.log_artifact(run_id, str(file))
            for key, value in tags.items():
                self.client.set_tag(run_id, key, value)
            address = f"{self.client.get_run(run_id).info.artifact_uri}/{file.name}"
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise UserError(
                f"{file.name} could not be left in run {run_id} of {self.uri}: {str(error).splitlines()[0]}"
            ) from error
        if not address.startswith("file:"):
            return f"{file.name}, under Artifacts of {self.uri}{run_path(self.client, run_id)}"
        return unquote(urlsplit(address).path)

    def link(self, run_id: str) -> str:
        return run_path(self.client, run_id).removeprefix("/")

    def how_to_open(self) -> str:
        if self.uri.startswith("http"):
            return f"{without_credentials(self.uri)}{run_path(self.client, self.run_id)}"
        return f"{_store_variable(self.uri)}{command('ui', self.run_id)}"


@uninterrupted()
def read_runs(client: "MlflowClient", experiment_id: str, where: str = "") -> list[Record]:
    """Return the runs of an experiment for which MLflow's filter `where` holds, the newest first, in one query a thousand.

    A run whose id is not of MLflow's form is left out: ids become the names of folders.
    """
    runs: list[Run] = []
    token: str | None = ""
    while token is not None:
        page = client.search_runs([experiment_id], where, max_results=1000, page_token=token or None)
        runs += page
        token = page.token
    return [_record(run) for run in runs if re.fullmatch("[0-9a-f]{32}", run.info.run_id)]


def _record(run: "Run") -> Record:
    info, data = run.info, run.data
    texts = (info.run_id, info.experiment_id, info.run_name, info.status)
    inputs = run.inputs.dataset_inputs if run.inputs else []
    digests = {item.dataset.name.rpartition("-")[2]: item.dataset.digest for item in inputs}
    held = dict(data.params), dict(data.metrics), dict(data.tags), digests
    return Record(*texts, info.start_time, info.end_time, *held, info.artifact_uri)


def _lives(pid: str) -> bool:
    """Return whether this machine has a process of that number; one that is no number counts as alive."""
    if not (pid.isdecimal() and 0 < int(pid) < 2**31):
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_refusal(error: Exception) -> bool:
    """Return whether the store has answered and will not do what was asked, however often it is asked again."""
    code = getattr(error, "error_code", None)  # of MLflow's exceptions
    return code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "BAD_REQUEST", "PERMISSION_DENIED")


def _store_variable(uri: str) -> str:
    """Return the assignment before a shell command that reads the store at `uri`; none for the default, or with credentials."""
    return "" if uri == default_store() or has_credentials(uri) else f"MLFLOW_TRACKING_URI={shlex.quote(uri)} "


def _how_to_restore(uri: str, experiment_id: str) -> str:
    return f"{_store_variable(uri)}mlflow experiments restore --experiment-id {experiment_id}"


def export(model: "nn.Module", example: Any, folder: Path, architecture: str) -> None:
    """Write the model as an MLflow model, a graph that loads without this code.

    example: an array of two images; architecture: what tells the graph of this model from others. Tracing a graph takes most of
    the time, and torch never gives all of its memory back: models of one architecture share the graph of the first.
    """
    import torch

    key = architecture, example.tobytes()
    if key not in _traced:
        _trace(model, example, folder)
        while len(_traced) >= TRACES_KEPT:
            del _traced[next(iter(_traced))]
        files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        _traced[key] = torch.export.load(folder / GRAPH), files
        return
    from mlflow.models import Model

    program, files = _traced[key]
    weights = model.state_dict()
    with torch.no_grad():
        for name, value in program.state_dict.items():
            value.copy_(weights[name])
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    torch.export.save(program, folder / GRAPH)
    described = Model.load(folder)
    described.model_uuid, described.utc_time_created = uuid4().hex, str(datetime.now(UTC).replace(tzinfo=None))
    described.save(folder / "MLmodel")


def _trace(model: "nn.Module", example: Any, folder: Path) -> None:
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from mnist_exp.data import SIDE

    mlflow.pytorch.save_model(
        # torch.export warns of every weight that is laid out channels_last
        copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format),
        folder,
        input_example=example,
        signature=ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, 1, SIDE, SIDE))]),
            outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 10))]),
        ),
        pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
    )


def load_model(uri: str) -> "nn.Module":
    """Return the model at `uri`, a folder or what MLflow calls models:/<model id>, in evaluation mode.

    It maps images, uint8 (n, 1, 28, 28), to logits, float32 (n, 10). Raises UserError if it is not one that this program
    exported, whole. Nothing of the folder is executed, see `exported.load`.
    """
    from mlflow.artifacts import download_artifacts

    try:
        folder = Path(uri) if Path(uri).is_dir() else Path(download_artifacts(uri))
    except Exception as error:  # a store and a disk fail in their own ways
        raise UserError(f"{uri} cannot be loaded as a model: {str(error).splitlines()[0]}") from error
    return exported.load(folder)


def absolute_uri(uri: str) -> str:
    """Return `uri` with a relative SQLite path made absolute; raises UserError on a scheme that is not supported."""
    if uri.startswith("sqlite:///"):
        return absolute_path(uri)
    if urlsplit(uri).scheme in ("http", "https"):
        return uri.rstrip("/")
    raise UserError(
        f"tracking.uri={uri} (MLFLOW_TRACKING_URI) is not supported: allowed are sqlite:////absolute/path.db and "
        "http(s)://host:port of an MLflow server. Unset MLFLOW_TRACKING_URI for the default, or use tracking=none."
    )


def open_store(uri: str, experiment: str) -> tuple["MlflowClient", str]:
    """Return a client of the store at `uri` and the id of `experiment`, creating database and experiment if missing.

    A lock file beside a SQLite database keeps several first runs from creating it at once. Raises UserError.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default of 7 waits four minutes for a dead server
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # seconds without an answer; that of 120 outlasts a worker's grace
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # into the middle of our bars
    for noisy in ("urllib3", "mlflow.store.db.utils"):  # of each attempt that failed; we say it when all have
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        if not uri.startswith("sqlite:"):
            return _open_experiment(mlflow, uri, experiment, artifact_location=None)
        database = Path(uri.removeprefix("sqlite:///"))
        with FileLock(f"{database}.lock"):
            return _open_experiment(mlflow, uri, experiment, (database.parent / "mlartifacts").as_uri())
    except UserError:
        raise
    except (MlflowException, SQLAlchemyError, OSError, ValueError) as error:
        problem = f"tracking.uri={uri} (MLFLOW_TRACKING_URI) cannot be opened: {str(error).splitlines()[0]}"
        if "out-of-date database schema" in str(error):
            raise UserError(_how_to_upgrade(uri)) from error
        raise StoreAwayError(
            f"{problem}\nAllowed are a SQLite file in a folder that can be written, and a tracking server that answers. "
            "Start the server, name another store, or use tracking=none."
        ) from error


def _how_to_upgrade(uri: str) -> str:
    """Return what to do about a database of another version of MLflow."""
    import mlflow

    path = uri.removeprefix("sqlite:///")
    copy = shlex.join(["cp", path, f"{path}.backup"])
    return (
        f"tracking.uri={uri} (MLFLOW_TRACKING_URI) has the database schema of another version of MLflow than "
        f"{mlflow.__version__}. Make a backup, then upgrade it: `{copy} && {shlex.join(['mlflow', 'db', 'upgrade', uri])}`. "
        "If a newer MLflow wrote it, install that one instead."
    )


def _open_experiment(mlflow: Any, uri: str, experiment: str, artifact_location: str | None) -> tuple["MlflowClient", str]:
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is not None and found.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment={experiment} was deleted in {uri}. Restore it with "
            f"`{_how_to_restore(uri, found.experiment_id)}`, or name another."
        )
    view, state = f"mlflow.sharedViewState.{LEADERBOARD}", leaderboard_view()
    try:
        if found is None:
            return client, str(client.create_experiment(experiment, artifact_location, tags={view: state}))
        if view not in found.tags:
            client.set_experiment_tag(found.experiment_id, view, state)
    except MlflowException:  # a server has no lock file: another process may have been first
        found = client.get_experiment_by_name(experiment)
        if found is None or view not in found.tags:
            raise
    return client, str(found.experiment_id)


def leaderboard_view() -> str:
    """Return the saved view of the run table that `leaderboard_path` opens, in the UI's own (undocumented) form."""
    state = {
        "selectedColumns": LEADERBOARD_COLUMNS,
        "orderByKey": LEADERBOARD_COLUMNS[0],
        "orderByAsc": False,
        "searchFilter": "",
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    now = int(time.time() * 1000)
    return json.dumps({"name": "Leaderboard", "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"})


def leaderboard_path(experiment_id: str) -> str:
    """Return the part of a UI address that opens the experiment's runs with the leaderboard's columns."""
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={LEADERBOARD}"


@uninterrupted()
def run_path(client: "MlflowClient", run_id: str) -> str:
    """Return the part of a UI address that opens the run; raises UserError where the store has none of that id."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if not _is_refusal(error):
            raise
        raise UserError(
            f"There is no run {run_id} in {client.tracking_uri}: MLFLOW_TRACKING_URI or tracking.uri names the store, and "
            "tracking=none is for runs that were started with it."
        ) from error
    return f"/#/experiments/{run.info.experiment_id}/runs/{run_id}?workflowType=machine_learning"
