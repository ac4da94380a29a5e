"""Opens an MLflow store, starts runs, and reads and corrects those that are stored."""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, Run, RunTag
from mlflow.exceptions import MlflowException
from pydantic import Field
from sqlalchemy.exc import SQLAlchemyError

from mnist_exp.errors import NonNegative, UserError, first_line
from mnist_exp.metrics import format_metric, on_test
from mnist_exp.overrides import command
from mnist_exp.paths import NAME
from mnist_exp.signals import defer_signals
from mnist_exp.storage.run_dir import RUN_ID
from mnist_exp.tracking import connection
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import MAX_TAG, MODELS, Answer, ModelSource, RunInfo, RunRecord, Store, StoreUnavailableError, Sweep
from mnist_exp.tracking.connection import Result, gc_command, is_refusal, restore_command, retry, terminate
from mnist_exp.tracking.mlflow_ui import show
from mnist_exp.tracking.views import (
    HOST,
    PORT,
    VIEW_PREFIX,
    View,
    artifact_path,
    difference_path,
    leaderboard,
    link_line,
    marks,
    run_path,
    surplus_views,
    sweep_view,
    view_path,
    view_tag,
)

if TYPE_CHECKING:
    from mnist_exp.tracking.mlflow_tracker import MLflowTracker

MAX_LINE = 85  # characters in a line of a description in the UI
MAX_ANSWER = 1000  # characters of an answer in a description, of which MLflow keeps 8,000


class MLflowStore(Store):
    """The experiment `experiment` of the MLflow store at `uri`. Both are created if missing.

    Args:
        uri: `sqlite:///` and the path of a database file, or the http(s) address of a tracking server.
        experiment: The name of the experiment.
        patience: Seconds to wait for a store that is unreachable, at the end of a run and before a job of a sweep.
    """

    preloaded = (
        f"{NAME}.tracking.mlflow_tracker", "mlflow.store.tracking.sqlalchemy_store", "alembic.command",
        "matplotlib.backends.backend_agg",
    )  # fmt: skip
    remedy = f"{Store.remedy} For another MLflow store, set MLFLOW_TRACKING_URI or tracking.uri."
    client: MlflowClient

    def __init__(self, uri: str, experiment: Annotated[str, Field(min_length=1)], patience: NonNegative = 120.0) -> None:
        self.uri = connection.check_uri(uri)
        self.experiment = experiment
        self.patience = patience

    def __str__(self) -> str:
        return f"{self.uri}, experiment {self.experiment}"

    def open(self, *, wait: bool = False) -> None:
        deadline = time.monotonic() + (self.patience if wait else 0.0)
        while not hasattr(self, "client"):
            try:
                self.client, self.experiment_id = connection.connect(self.uri, self.experiment)
            except StoreUnavailableError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(1)

    def make_tracker(self, run: Run) -> "MLflowTracker":
        """Return the tracker of a run that has started; a store that records more overrides this."""
        from mnist_exp.tracking.mlflow_tracker import MLflowTracker  # with torch, which commands that only read do not need

        return MLflowTracker(self.client, self.uri, run, self.patience)

    def start(self, info: RunInfo, run_id: str | None = None) -> "MLflowTracker":
        self.open()
        if run_id:
            return self._retry(lambda: self.make_tracker(self._reopen(run_id)))
        # The UI cuts the source of a LOCAL run at its last slash. It shows that of a JOB whole.
        tags = {**info.tags, tag.COMMAND_TYPE: "JOB", tag.COMMAND: info.command}
        if tag.RECIPE in tags:
            self._save_leaderboard(tags[tag.DATA], tags[tag.OBJECTIVE])
        try:
            run = _project_run(self.client, self.experiment_id, info.name, tags)
            run = run or self.client.create_run(self.experiment_id, run_name=info.name, tags=tags)
        except (MlflowException, SQLAlchemyError, OSError) as error:  # not repeated: the store may have created the run
            raise connection.denial(error) or UserError(
                f"{self.uri} cannot start a run: {first_line(error)}",
                key="tracking.uri",
                value=self.uri,
                remedy="Make sure that the server answers and that its disk has space, or use another tracking.uri.",
            ) from error
        if not RUN_ID.fullmatch(run.info.run_id):  # it becomes the name of a folder
            raise UserError(f"{self.uri} created a run with the id {run.info.run_id!r}, expected 32 hexadecimal digits.")
        return self.make_tracker(run)

    def _retry(self, operation: Callable[[], Result]) -> Result:
        return retry(operation, self.uri, self.patience)

    def _reopen(self, run_id: str) -> Run:
        run = self._stored_run(run_id)
        self.experiment_id = run.info.experiment_id
        for key in tag.OF_THE_END & run.data.tags.keys():
            self.client.delete_tag(run_id, key)
        self.client.update_run(run_id, status="RUNNING")
        return run

    def get_run(self, run_id: str) -> RunRecord:
        return record_of(self._stored_run(run_id))

    @defer_signals()
    def _stored_run(self, run_id: str) -> Run:
        self.open()
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if not is_refusal(error):
                raise
            raise connection.denial(error) or self.missing(run_id) from error
        if run.info.run_id != run_id:  # it becomes the name of a folder
            raise UserError(f"{self.uri} answers with another run than {run_id}.")
        if run.info.lifecycle_stage == "deleted":
            restore = restore_command(self.client, self.uri, run.info.experiment_id, run_id)
            raise UserError(f"Run {run_id} was deleted in {self.uri}.", remedy=f"Restore it with `{restore}`.")
        return run

    def runs(self, *, status: str = "", tag: str = "", prefix: str = "", everywhere: bool = False) -> list[RunRecord]:
        conditions = {
            f"attributes.status = '{status}'": status,
            f"attributes.run_id LIKE '{prefix}%'": prefix,
            f"tags.{tag} LIKE '%'": tag,
        }
        return self._search(" and ".join(text for text, is_asked in conditions.items() if is_asked), everywhere)

    def children(self, sweep_id: str) -> list[RunRecord]:
        return self._retry(partial(self._search, f"tags.{tag.SWEEP} = '{sweep_id}'", everywhere=True))

    @defer_signals()
    def _search(self, query: str, everywhere: bool) -> list[RunRecord]:
        """Return the runs of this experiment, or of all, for which MLflow's filter `query` holds, the newest first."""
        self.open()
        experiments = [item.experiment_id for item in self.client.search_experiments()] if everywhere else [self.experiment_id]
        runs: list[Run] = []
        token: str | None = ""
        while token is not None:  # not by mlflow.search_runs, which reads the store that this process has opened last
            page = self.client.search_runs(experiments, query, max_results=1000, page_token=token or None)
            runs += page
            token = page.token
        return [record_of(run) for run in runs if RUN_ID.fullmatch(run.info.run_id)]

    def points(self, record: RunRecord) -> dict[str, dict[int, float]]:
        histories = {key: self.client.get_metric_history(record.run_id, key) for key in record.metrics}
        return {key: {point.step: point.value for point in history} for key, history in histories.items()}

    def delete(self, run_id: str) -> None:
        def delete() -> None:
            for model in self._logged_models(record_of(self.client.get_run(run_id))):
                self.client.delete_logged_model(model.model_id)
            self.client.delete_run(run_id)  # last: what is left of an interrupted deletion can be deleted again

        self._retry(delete)

    def _logged_models(self, record: RunRecord) -> list[LoggedModel]:
        self.open()
        return list(self.client.search_logged_models([record.experiment_id], f"source_run_id='{record.run_id}'"))

    def after_deletion(self, records: Sequence[RunRecord]) -> list[str]:
        run_id = records[0].run_id if len(records) == 1 else "ID"
        restore = restore_command(self.client, self.uri, records[0].experiment_id, run_id)
        return [
            f"Restore a record, without its folder and its model: {restore}",
            f"Remove the files of all deleted runs for good: {gc_command(self.uri)}",
        ]

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self._retry(lambda: self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()]))

    def set_status(self, run_id: str, status: str) -> None:
        self._retry(partial(terminate, self.client, run_id, status))

    def mark_killed(self, run_id: str, reason: str, was: str = "RUNNING") -> bool:
        return self._retry(partial(super().mark_killed, run_id, reason, was))

    def reap(self, output_dir: Path) -> list[RunRecord]:
        return self._retry(partial(super().reap, output_dir))

    def find_sweep(self, sweep: str, *, unfinished: bool = False) -> Sweep:
        found = super().find_sweep(sweep, unfinished=unfinished)
        self.experiment_id = found.experiment_id
        return found

    def read_artifacts(self, records: Sequence[RunRecord], path: str, *, strict: bool = False) -> dict[str, bytes]:
        self.open()

        def read(record: RunRecord) -> bytes | None:
            try:
                with TemporaryDirectory() as folder:
                    address = f"{record.artifacts}/{path}"
                    return Path(download_artifacts(address, dst_path=folder, tracking_uri=self.uri)).read_bytes()
            except Exception as error:  # stores raise exceptions of their own
                if strict and path in [file.path for file in self.client.list_artifacts(record.run_id)]:
                    raise UserError(f"{path} of run {record.run_id} cannot be read: {error}") from error
                return None  # most such runs ended before they recorded one

        with ThreadPoolExecutor(8) as pool:  # over a network, most of the time is waiting
            found = zip(records, pool.map(read, records), strict=True)
            return {record.run_id: content for record, content in found if content is not None}

    def publish(self, run_id: str, answer: Answer) -> str:
        for path in (answer.report, answer.picture):
            self.client.log_artifact(run_id, str(path))
        name, run = answer.report.name, self._stored_run(run_id)
        experiment_id = run.info.experiment_id
        pages = self.sweep_links(record_of(run), self.children(run_id))
        links = {"Report": run_path(experiment_id, run_id, name)[1:]} | pages
        # One paragraph for each factor, which its next comparison replaces. The UI covers all but its first two lines.
        mark, earlier = f"**{answer.factor}**: ", run.data.tags.get(tag.DESCRIPTION, "")
        others = re.sub(rf"^{re.escape(mark)}.*?(\n\n|\Z)", "", earlier, flags=re.DOTALL | re.MULTILINE)
        whole = f"{answer.title} ({answer.subtitle})"
        text = " ".join([f"{whole}.", *answer.notes])
        lines = [
            mark + shorten(answer.title, MAX_LINE, placeholder=" ..."),
            link_line(links),
            f"![The comparison by {answer.factor}]({artifact_path(run_id, answer.picture.name)})",
            shorten(text, MAX_ANSWER, placeholder=" ..."),
        ]
        others = others.replace(f"\n\n{link_line(pages)}\n\n", "\n\n")  # as before the first answer
        description = "\n".join(lines) + f"\n\n{others}"
        tags = {tag.ANSWER: whole, f"{tag.ANSWER}.{answer.factor}": text[:MAX_TAG], tag.DESCRIPTION: description}
        self.set_tags(run_id, tags)
        if self.uri.startswith("http"):
            return f"{self.uri}{run_path(experiment_id, run_id, name)}"
        if not run.info.artifact_uri.startswith("file:"):
            return f"{run.info.artifact_uri}/{name}"
        return unquote(urlsplit(f"{run.info.artifact_uri}/{name}").path)

    def run_model(self, record: RunRecord, output_dir: Path) -> ModelSource | None:
        found = next(iter(self._logged_models(record)), None)
        return ModelSource(f"models:/{found.model_id}", record.title, found.model_id, record.run_id) if found else None

    def fetch_model(self, source: ModelSource) -> Path:
        try:
            return Path(source.address if Path(source.address).is_dir() else download_artifacts(source.address))
        except Exception as error:  # stores and disks raise exceptions of their own
            raise UserError(f"{source.address} cannot be loaded as a model: {first_line(error)}") from error

    def registered_model(self, address: str) -> ModelSource:
        if not re.fullmatch("models:/(m-[0-9a-f]{32}|[^/@]+[/@].+)", address):
            raise UserError.invalid("model", address, MODELS)
        self.open()
        name, _, alias = address.removeprefix("models:/").partition("@")
        try:
            if "/" not in name and not alias:
                run_id = self.client.get_logged_model(name).source_run_id
                return ModelSource(address, f"model {name} of run {(run_id or 'unknown')[:8]}", name, run_id)
            if alias:
                version = self.client.get_model_version_by_alias(name, alias)
            else:
                version = self.client.get_model_version(*name.rsplit("/", 1))
        except MlflowException as error:
            raise connection.denial(error) or UserError(f"model {address} is not in {self.uri}: {first_line(error)}") from error
        logged = re.fullmatch("models:/(m-[0-9a-f]{32})", version.source or "")  # MLflow's stores do not fill in version.model_id
        return ModelSource(address, f"{version.name}, version {version.version}", logged[1] if logged else None, version.run_id)

    def registered_runs(self) -> dict[str, str]:
        self.open()
        return {
            run_id: f"version {version.version} of {version.name}"
            for version in mlflow.search_model_versions()
            for run_id in (version.run_id, *re.findall("[0-9a-f]{32}", version.source or ""))
        }

    def find_champion(self, name: str, alias: str) -> str | None:
        self.open()
        try:
            return self.client.get_model_version_by_alias(name, alias).run_id or ""
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the model, or its alias
                return None
            raise

    def register(self, record: RunRecord, name: str, alias: str, reason: str, tags: Mapping[str, str]) -> str:
        from mnist_exp.tracking.mlflow_models import check_written_by_us  # with torch

        source = self.run_model(record, Path())  # which is in the store, not in a folder
        if source is None:
            raise UserError(f"Run {record.run_id} has no model.", key="id", value=record.run_id, remedy="Promote another run.")
        check_written_by_us(self.fetch_model(source))
        link = f"[Run {record.run_id[:8]}]({run_path(record.experiment_id, record.run_id)[1:]})"
        scores = sorted(item for item in record.metrics.items() if item[0].startswith(("test/", "val/")))
        results = [f"{metric} {format_metric(metric, value)}" for metric, value in scores]
        description = f"{reason}\n\n{', '.join([f'{link} on {record.data}', *results])}."
        version = mlflow.register_model(source.address, name, tags=dict(tags))  # also links the logged model to the version
        self.client.update_model_version(name, version.version, description)
        self.client.set_registered_model_alias(name, alias, version.version)
        self.client.update_registered_model(name, self._describe_versions(name, record.objective))
        return str(version.version)

    def _describe_versions(self, name: str, objective: str) -> str:
        """Return the versions of a registered model as a table in Markdown, the newest first."""
        aliases = self.client.get_registered_model(name).aliases
        metrics = [objective, on_test(objective)]
        rows: list[list[object]] = [["version", *metrics, "data", "run", "alias"]]
        versions = [version for version in mlflow.search_model_versions() if version.name == name]  # a filter breaks at quotes
        for version in sorted(versions, key=lambda version: int(version.version), reverse=True):
            try:
                run = record_of(self.client.get_run(version.run_id or ""))
            except MlflowException:  # deleted for good, or of a model that others have registered
                run = None
            values = [format_metric(key, run.metrics[key]) if run and key in run.metrics else "" for key in metrics]
            link = f"[{run.name}]({run_path(run.experiment_id, run.run_id)[1:]})" if run else ""
            own = ", ".join(alias for alias, number in aliases.items() if int(number) == int(version.version))
            rows.append([version.version, *values, run.data if run else "", link, own])
        lines = [f"| {' | '.join(f'{cell}&emsp;' for cell in row)} |" for row in rows]  # the UI leaves no space between columns
        return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])

    def show_ui(self, run_id: str | None, view: str | None, port: int) -> None:
        show(self, run_id, view, port)

    def link(self, run_id: str, path: str = "") -> str:
        return artifact_path(run_id, path) if path else run_path(self.experiment_id, run_id).removeprefix("/")

    def page(self, run_id: str) -> str | None:
        path = run_path(self.experiment_id, run_id)
        return f"{self.uri}{path}" if self.uri.startswith("http") else None

    def ui_hint(self, run_id: str) -> str:
        return f"Open it in the MLflow UI: {self.page(run_id) or command('ui', run_id)}"

    def difference_hint(self, first: RunRecord, second: RunRecord) -> str:
        path = difference_path(first.experiment_id, [first.run_id, second.run_id])
        if first.experiment_id != second.experiment_id:
            return ""
        if self.uri.startswith("http"):
            return f"Compare them in the MLflow UI: {self.uri}{path}"
        return f"Compare them in the MLflow UI, which `{command('ui')}` starts: http://{HOST}:{PORT}{path}"

    def sweep_links(self, sweep: RunRecord, children: Sequence[RunRecord]) -> dict[str, str]:
        try:
            example = next((child for child in children if child.status == "FINISHED"), None)
            lengths = {
                metric: len(self.client.get_metric_history(example.run_id, metric)) if example else 0
                for metric in ("train/loss", sweep.objective)
            }
            key, view = sweep_view(sweep, children, [metric for metric, length in lengths.items() if length > 1])
            self._save_view(sweep.experiment_id, key, view)
        except MlflowException:  # the sweep has its results without a view
            return {}
        paths = {"Curves": view_path(sweep.experiment_id, key, charts=True), "Runs": view_path(sweep.experiment_id, key)}
        return {text: path.removeprefix("/") for text, path in paths.items()}

    def _save_leaderboard(self, data: str, objective: str) -> None:
        """Save the leaderboard of a data set unless it is there."""
        with suppress(MlflowException):  # from a server that does not allow it: everything else works without it
            key, view = leaderboard(data, objective)
            found = self.client.get_experiment(self.experiment_id).tags
            for name, value in marks(objective).items():
                if name not in found:
                    connection.tag_experiment(self.client, self.experiment_id, name, value)
            if VIEW_PREFIX + key not in found:
                self._save_view(self.experiment_id, key, view)

    def _save_view(self, experiment_id: str, key: str, view: View) -> None:
        connection.tag_experiment(self.client, experiment_id, VIEW_PREFIX + key, view_tag(view))
        for name in surplus_views(self.client.get_experiment(experiment_id).tags):
            self.client.delete_experiment_tag(experiment_id, name)


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
    return RunRecord(
        info.run_id, info.experiment_id, info.run_name, info.status, info.start_time, info.end_time, dict(data.params),
        dict(data.metrics), dict(data.tags), digests, info.artifact_uri,
    )  # fmt: skip
