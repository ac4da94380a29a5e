"""Moves sweeps between stores: a sweep with its jobs, files and models as a folder."""

import json
import re
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_exp.errors import UserError
from mnist_exp.redaction import redact_all
from mnist_exp.storage.manifest import MANIFEST, read_text_file, verify_manifest, write_manifest
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import RunRecord
from mnist_exp.tracking.connection import first_line
from mnist_exp.tracking.definition import parse_definition
from mnist_exp.tracking.housekeeping import logged_models
from mnist_exp.tracking.mlflow_store import RUN_ID, MLflowStore, download, record_of
from mnist_exp.tracking.mlflow_tracker import BATCH_LIMIT
from mnist_exp.tracking.model_export import verify_model
from mnist_exp.tracking.provenance import user
from mnist_exp.tracking.views import ONE_SWEEP, model_name

if TYPE_CHECKING:
    from mlflow.entities import Run

KIND = "sweep"
IMPORTED, IMPORTING = "imported.run_id", "importing.run_id"  # the old id of a run; of one that is not complete
MAX_RUN = 100_000_000  # bytes of a run.json, or of the manifest of a sweep
MAX_TIME = 2**53  # milliseconds, or examples
ENDED = ("FINISHED", "FAILED", "KILLED")
NOT_MOVED = (tag.HOST, tag.PID, tag.OUTPUT_DIR)  # the process and the folder of the old machine


@dataclass(frozen=True)
class Point:
    """A value of a metric; model: whether it belongs to the run's model, too."""

    key: str
    value: float
    timestamp: int
    step: int
    model: bool = False
    dataset: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class MovedDataset:
    """A data set that a run uses, as MLflow records it."""

    name: str
    digest: str
    source: str
    schema: str
    profile: str
    context: str


@dataclass(frozen=True)
class MovedRun:
    """A run as it is exported; times in milliseconds since 1970."""

    run_id: str
    name: str
    status: str
    started: int
    ended: int
    tags: dict[str, str]
    params: dict[str, str]
    points: list[Point]
    datasets: list[MovedDataset] = field(default_factory=list)
    model: str | None = None


def export_sweep(store: MLflowStore, sweep: str, folder: Path) -> int:
    """Write a sweep to a new folder; return the number of its jobs' runs. Raises UserError."""
    from mlflow.exceptions import MlflowException

    if folder.exists():
        raise UserError(f"{folder} exists already: expected a new folder. Choose another name.")
    parent, _ = store.find_sweep(sweep, finished_too=True)
    records = [parent, *store.children(parent.run_id)]
    if running := [record for record in records if record.status not in ENDED]:
        raise UserError(f"Run {running[0].run_id} of sweep {parent.run_id} is {running[0].status}: export it once it has ended.")
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        for record in records:
            _export_run(store, record, partial / record.run_id)
        write_manifest(partial, {"kind": KIND, "sweep": parent.run_id})
        partial.replace(folder)
    except MlflowException as error:
        raise UserError(f"Sweep {parent.run_id} cannot be exported: {first_line(error)}") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Choose another folder, or free some space.") from error
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
    return len(records) - 1


def _export_run(store: MLflowStore, record: RunRecord, folder: Path) -> None:
    from mlflow.artifacts import download_artifacts

    folder.mkdir()
    run, models = store.get_run(record.run_id), logged_models(store, record)
    histories = [store.client.get_metric_history(record.run_id, key) for key in run.data.metrics]
    linked = {(m.key, m.step): m for model in models for m in model.metrics or []}
    points = [_point(point, linked.get((point.key, point.step))) for history in histories for point in history]
    datasets = [
        MovedDataset(
            item.dataset.name,
            item.dataset.digest,
            item.dataset.source or "",
            item.dataset.schema or "",
            item.dataset.profile or "",
            next((t.value for t in item.tags if t.key == tag.DATASET_CONTEXT), ""),
        )
        for item in (run.inputs.dataset_inputs if run.inputs else [])
    ]
    moved = MovedRun(
        record.run_id, record.name, record.status, record.started, record.ended or record.started, record.tags, record.params,
        points, datasets, models[0].name if models else None,
    )  # fmt: skip
    (folder / "run.json").write_text(json.dumps(redact_all(asdict(moved))))
    for artifact in store.client.list_artifacts(record.run_id):
        (folder / "artifacts").mkdir(exist_ok=True)
        download_artifacts(f"{record.artifacts}/{artifact.path}", dst_path=str(folder / "artifacts"))
    if models:
        download_artifacts(f"models:/{models[0].model_id}", dst_path=str(folder / "model"))


def _point(point: Any, linked: Any) -> Point:
    data = (linked.dataset_name, linked.dataset_digest) if linked else (None, None)
    return Point(point.key, point.value, point.timestamp, point.step, linked is not None, *data)


def import_sweep(store: MLflowStore, folder: Path) -> tuple[str, int]:
    """Bring an exported sweep into a store as new runs; return the id of its parent and the number of added runs.

    Runs that an earlier import has completed are left as they are.

    Raises:
        UserError: The folder is not as `export_sweep` writes it, and nothing was recorded; or the store refuses a run.
    """
    runs = _read(folder)
    store.open()
    before = {record.tags[IMPORTED]: record.run_id for record in store.runs(f"tags.`{IMPORTED}` LIKE '%'")}
    parent = runs[0]
    if parent.run_id in before:
        _refuse_extended(store, before[parent.run_id], folder / parent.run_id / "artifacts" / "sweep.json")
    for record in store.runs(f"tags.`{IMPORTING}` LIKE '%'"):  # an import that was interrupted
        if record.tags[IMPORTING] in {run.run_id for run in runs}:
            _discard(store, record.run_id)
    ids: dict[str, str] = {}
    for run in runs:  # the parent first
        ids[run.run_id] = before.get(run.run_id) or _import_run(store, run, folder / run.run_id, ids)
    new_id = ids[parent.run_id]
    store.link_curves(new_id, sum(run.status == "FINISHED" for run in runs[1:]))
    description = store.client.get_run(new_id).data.tags.get(tag.DESCRIPTION, "")
    store.client.set_tag(new_id, tag.DESCRIPTION, _with_new_ids(description, ids, store.experiment_id))
    return new_id, len(ids.keys() - before.keys())


def _refuse_extended(store: MLflowStore, run_id: str, file: Path) -> None:
    """Raise UserError if an imported sweep had other jobs than the folder: its results would not fit."""
    if download(store.client, run_id, "sweep.json") != read_text_file(file, MAX_RUN):
        raise UserError(f"Sweep {run_id} was imported with other jobs, before it was extended. Delete it, then import it again.")


def _discard(store: MLflowStore, run_id: str) -> None:
    """Delete a run that is incomplete, and its model."""
    for model in logged_models(store, record_of(store.get_run(run_id))):
        store.client.delete_logged_model(model.model_id)
    store.delete(run_id)


def _read(folder: Path) -> list[MovedRun]:
    """Return the runs in an exported folder, the parent first, after every file was checked; raises UserError."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    config = verify_manifest(folder, files, "a sweep", MAX_RUN)
    damaged = f"{folder} is not a sweep exported by this program"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    sweep = config.get("sweep")
    if config.get("kind") != KIND or sweep not in names or not all(map(RUN_ID.fullmatch, names)):
        raise UserError(f"{damaged}: expected a folder from `runs export`.")
    jobs = _jobs(folder / sweep / "artifacts" / "sweep.json", damaged)
    return [_read_run(folder / name, sweep, jobs, damaged) for name in sorted(names, key=lambda name: name != sweep)]


def _read_run(folder: Path, sweep: str, jobs: set[str], damaged: str) -> MovedRun:
    from pydantic import TypeAdapter, ValidationError

    try:
        run = TypeAdapter(MovedRun).validate_json(read_text_file(folder / "run.json", MAX_RUN))
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f"{damaged}: {folder.name}/run.json is unreadable: {first_line(error)}") from error
    if folder.name == sweep:  # a parent that is a job of another sweep would bring results into that one
        belongs = tag.SWEEP_JOBS in run.tags and not run.tags.keys() & {tag.SWEEP, tag.JOB, tag.PARENT}
    else:
        belongs = run.tags.get(tag.SWEEP) == run.tags.get(tag.PARENT) == sweep and run.tags.get(tag.JOB) in jobs
        belongs = belongs and tag.SWEEP_JOBS not in run.tags
    times = [run.started, run.ended, *(point.timestamp for point in run.points), *(point.step for point in run.points)]
    names = [*run.tags, *run.params, *(point.key for point in run.points), *(item.name for item in run.datasets)]
    is_valid = all(0 <= time < MAX_TIME for time in times) and all(re.fullmatch(r"[\w\-. /:]{1,250}", name) for name in names)
    if run.run_id != folder.name or run.status not in ENDED or not belongs or not is_valid:
        raise UserError(f"{damaged}: {folder.name}/run.json does not describe an ended run of sweep {sweep}.")
    if run.model is not None:
        verify_model(folder / "model")
    return run


def _jobs(file: Path, damaged: str) -> set[str]:
    """Return the numbers of the jobs in a sweep.json, as text; raises UserError if it is unreadable or must not be stored."""
    try:
        definition = parse_definition(read_text_file(file, MAX_RUN), str(file))
    except (OSError, ValueError):
        definition = None
    if definition is None:
        raise UserError(f"{damaged}: its sweep.json is unreadable.")
    return {str(job.number) for job in definition.jobs}


def _import_run(store: MLflowStore, moved: MovedRun, folder: Path, ids: dict[str, str]) -> str:
    """Record one run with its files and its model; return its new id."""
    from mlflow.entities import RunTag
    from mlflow.exceptions import MlflowException

    client, run_id = store.client, None
    try:
        run: Run = client.create_run(store.experiment_id, moved.started, {IMPORTING: moved.run_id}, moved.name)
        run_id = str(run.info.run_id)
        tags = {key: value for key, value in moved.tags.items() if key not in (*NOT_MOVED, IMPORTED, IMPORTING)}
        tags |= {key: ids[moved.tags[key]] for key in (tag.PARENT, tag.SWEEP) if key in moved.tags}
        tags |= {"imported.by": user(), "imported.time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        if tag.DESCRIPTION in tags:
            tags[tag.DESCRIPTION] = tags[tag.DESCRIPTION].replace(moved.run_id, run_id)
        model_id = _import_files(store, run_id, moved, folder)
        _import_values(store, run_id, moved, model_id)
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        client.set_terminated(run_id, moved.status, moved.ended)
        client.set_tag(run_id, IMPORTED, moved.run_id)  # now complete
        client.delete_tag(run_id, IMPORTING)
    except (MlflowException, OSError) as error:
        if run_id is not None:
            with suppress(Exception):  # the first error matters
                _discard(store, run_id)
        raise UserError(
            f"Run {moved.run_id} cannot be imported: {first_line(error)}\nRepeat the command: it adds only what is missing."
        ) from error
    return run_id


def _import_files(store: MLflowStore, run_id: str, moved: MovedRun, folder: Path) -> str | None:
    """Record the files and the model of a run; return the id of the model."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    client = store.client
    if (folder / "artifacts").is_dir():
        for path in sorted((folder / "artifacts").iterdir()):
            client.log_artifacts(run_id, str(path), path.name) if path.is_dir() else client.log_artifact(run_id, str(path))
    if moved.model is None:
        return None
    model = client.create_logged_model(store.experiment_id, model_name(moved.model), run_id, params=moved.params)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.log_model_artifacts(model.model_id, str(folder / "model"))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return str(model.model_id)


def _import_values(store: MLflowStore, run_id: str, moved: MovedRun, model_id: str | None) -> None:
    """Record the data sets, the metrics and the parameters of a run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    client = store.client
    for item in moved.datasets:
        dataset = Dataset(item.name, item.digest, "local", item.source, item.schema, item.profile)
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag(tag.DATASET_CONTEXT, item.context)])])
    metrics = [
        Metric(
            point.key, point.value, point.timestamp, point.step, model_id=model_id if point.model else None,
            dataset_name=point.dataset, dataset_digest=point.digest, run_id=run_id,
        )
        for point in moved.points
    ]  # fmt: skip
    for start in range(0, len(metrics), BATCH_LIMIT):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH_LIMIT])
    client.log_batch(run_id, params=[Param(key, value) for key, value in moved.params.items()])


def _with_new_ids(text: str, ids: dict[str, str], experiment_id: str) -> str:
    """Return the description of a parent with links to the new runs."""
    text = re.sub(r"#/experiments/\d+/", f"#/experiments/{experiment_id}/", text)
    for old, new in ids.items():
        text = text.replace(old, new).replace(ONE_SWEEP + old[:8], ONE_SWEEP + new[:8])
    return text
