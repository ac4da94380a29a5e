"""Moves sweeps between stores: a sweep with its jobs, files and models as a folder."""

import json
import math
import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_exp.errors import UserError
from mnist_exp.overrides import check_stored
from mnist_exp.redaction import redact_all
from mnist_exp.storage.manifest import MANIFEST, read_text_file, verify_manifest, write_manifest
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import RunRecord
from mnist_exp.tracking.connection import first_line
from mnist_exp.tracking.definition import parse_definition
from mnist_exp.tracking.housekeeping import logged_models
from mnist_exp.tracking.mlflow_store import RUN_ID, MLflowStore
from mnist_exp.tracking.model_export import verify_model
from mnist_exp.tracking.provenance import user
from mnist_exp.tracking.views import ONE_SWEEP

if TYPE_CHECKING:
    from mlflow.entities import Run

KIND = "sweep"
IMPORTED, IMPORTING = "imported.run_id", "importing.run_id"  # the old id of a run; of one that is not complete
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
class MovedRun:
    """A run as it is exported; datasets: name, digest, source, schema, profile and context of each."""

    run_id: str
    name: str
    status: str
    started: int
    ended: int
    tags: dict[str, str]
    params: dict[str, str]
    points: list[Point]
    datasets: list[dict[str, str]] = field(default_factory=list)
    model: str | None = None


def export_sweep(store: MLflowStore, sweep: str, folder: Path) -> int:
    """Write a sweep to a new folder; return the number of its jobs' runs. Raises UserError."""
    if folder.exists():
        raise UserError(f"{folder} exists already: expected a new folder. Choose another name.")
    parent, _ = store.find_sweep(sweep, finished_too=True)
    records = [parent, *store.children(parent.run_id)]
    if running := [record for record in records if record.status not in ENDED]:
        raise UserError(f"Run {running[0].run_id} of sweep {parent.run_id} is {running[0].status}: export it once it has ended.")
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for record in records:
            _export_run(store, record, partial / record.run_id)
        write_manifest(partial, {"kind": KIND, "sweep": parent.run_id})
        partial.replace(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}. Choose another folder, or free some space.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(records) - 1


def _export_run(store: MLflowStore, record: RunRecord, folder: Path) -> None:
    from mlflow.artifacts import download_artifacts

    (folder / "artifacts").mkdir(parents=True)
    run, models = store.get_run(record.run_id), logged_models(store, record)
    histories = [store.client.get_metric_history(record.run_id, key) for key in run.data.metrics]
    linked = {(m.key, m.step): m for model in models for m in model.metrics or []}
    points = [_point(point, linked.get((point.key, point.step))) for history in histories for point in history]
    datasets = [
        {key: getattr(item.dataset, key) or "" for key in ("name", "digest", "source", "schema", "profile")}
        | {"context": next((t.value for t in item.tags if t.key == tag.DATASET_CONTEXT), "")}
        for item in (run.inputs.dataset_inputs if run.inputs else [])
    ]
    moved = MovedRun(
        record.run_id, record.name, record.status, record.started, record.ended or record.started, record.tags, record.params,
        points, datasets, models[0].name if models else None,
    )  # fmt: skip
    (folder / "run.json").write_text(json.dumps(redact_all(asdict(moved))))
    for artifact in store.client.list_artifacts(record.run_id):
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
        UserError: The folder is not as `export_sweep` writes it. Nothing was recorded.
    """
    runs = _read(folder)
    store.open()
    before = {record.tags[IMPORTED]: record.run_id for record in store.runs(f"tags.`{IMPORTED}` LIKE '%'")}
    for record in store.runs(f"tags.`{IMPORTING}` LIKE '%'"):  # an import that was interrupted
        if record.tags[IMPORTING] in {run.run_id for run in runs} and IMPORTED not in record.tags:
            store.delete(record.run_id)
    ids: dict[str, str] = {}
    for run in runs:  # the parent first
        ids[run.run_id] = before.get(run.run_id) or _import_run(store, run, folder / run.run_id, ids)
    parent = runs[0]
    jobs = parent.tags[tag.SWEEP_JOBS]
    store.link_curves(ids[parent.run_id], int(jobs) if jobs.isdecimal() and len(jobs) < 9 else len(runs) - 1)
    if parent.run_id not in before and tag.DESCRIPTION in parent.tags:
        description = _with_new_ids(parent.tags[tag.DESCRIPTION], ids, store.experiment_id)
        store.client.set_tag(ids[parent.run_id], tag.DESCRIPTION, description)
    return ids[parent.run_id], len(ids.keys() - before.keys())


def _read(folder: Path) -> list[MovedRun]:
    """Return the runs in an exported folder, the parent first, after every file was checked; raises UserError."""
    from pydantic import TypeAdapter, ValidationError

    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    config = verify_manifest(folder, files)
    damaged = f"{folder} is not a sweep exported by this program"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if config.get("kind") != KIND or config.get("sweep") not in names or not all(map(RUN_ID.fullmatch, names)):
        raise UserError(f"{damaged}: expected a folder from `runs export`.")
    runs = []
    for name in sorted(names, key=lambda name: name != config["sweep"]):
        try:
            run = TypeAdapter(MovedRun).validate_json(read_text_file(folder / name / "run.json"))
        except (OSError, ValueError, ValidationError) as error:
            raise UserError(f"{damaged}: {name}/run.json is unreadable: {first_line(error)}") from error
        is_parent = name == config["sweep"]
        belongs = tag.SWEEP_JOBS in run.tags if is_parent else run.tags.get(tag.SWEEP) == config["sweep"]
        finite = all(math.isfinite(point.value) for point in run.points)
        if run.run_id != name or run.status not in ENDED or not belongs or not finite:
            raise UserError(f"{damaged}: {name}/run.json does not describe an ended run of sweep {config['sweep']}.")
        if run.model is not None:
            verify_model(folder / name / "model")
        runs.append(run)
    _check_overrides(folder / config["sweep"] / "artifacts" / "sweep.json", damaged)
    return runs


def _check_overrides(file: Path, damaged: str) -> None:
    try:
        definition = parse_definition(read_text_file(file), str(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{damaged}: its sweep.json is unreadable.") from error
    if definition is None:
        raise UserError(f"{damaged}: its sweep.json is unreadable.")
    check_stored(definition.overrides, str(file))


def _import_run(store: MLflowStore, moved: MovedRun, folder: Path, ids: dict[str, str]) -> str:
    """Record one run with its files and its model; return its new id."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, LoggedModelStatus, Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    client = store.client
    tags = {key: value for key, value in moved.tags.items() if key not in (*NOT_MOVED, IMPORTED, IMPORTING)}
    tags |= {key: ids[moved.tags[key]] for key in (tag.PARENT, tag.SWEEP) if moved.tags.get(key) in ids}
    tags |= {"imported.by": user(), "imported.time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    try:
        started = {IMPORTING: moved.run_id}
        run: Run = client.create_run(store.experiment_id, moved.started, started, moved.name)
        run_id = str(run.info.run_id)
        if tag.DESCRIPTION in tags:
            tags[tag.DESCRIPTION] = tags[tag.DESCRIPTION].replace(moved.run_id, run_id)
        for item in moved.datasets:
            fields = (item[key] for key in ("name", "digest", "source", "schema", "profile"))
            name, digest, source, schema, profile = fields
            dataset = Dataset(name, digest, "local", source, schema, profile)
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag(tag.DATASET_CONTEXT, item["context"])])])
        for path in sorted((folder / "artifacts").iterdir()):
            client.log_artifacts(run_id, str(path), path.name) if path.is_dir() else client.log_artifact(run_id, str(path))
        model_id = None
        if moved.model is not None:
            model = client.create_logged_model(store.experiment_id, moved.model, run_id, params=moved.params)
            model_id = model.model_id
            client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
            client.log_model_artifacts(model_id, str(folder / "model"))
            client.finalize_logged_model(model_id, LoggedModelStatus.READY)
        metrics = [
            Metric(
                point.key, point.value, point.timestamp, point.step, model_id=model_id if point.model else None,
                dataset_name=point.dataset, dataset_digest=point.digest, run_id=run_id,
            )
            for point in moved.points
        ]  # fmt: skip
        for start in range(0, len(metrics), 1000):
            client.log_batch(run_id, metrics=metrics[start : start + 1000])
        client.log_batch(run_id, params=[Param(key, value) for key, value in moved.params.items()])
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in (tags | {IMPORTED: moved.run_id}).items()])
        client.set_terminated(run_id, moved.status, moved.ended)
    except (MlflowException, OSError, KeyError) as error:
        raise UserError(
            f"Run {moved.run_id} cannot be imported: {first_line(error)}\nRepeat the command: it adds only what is missing."
        ) from error
    return run_id


def _with_new_ids(text: str, ids: dict[str, str], experiment_id: str) -> str:
    """Return the description of a parent with links to the new runs."""
    text = re.sub(r"#/experiments/\d+/", f"#/experiments/{experiment_id}/", text)
    for old, new in ids.items():
        text = text.replace(old, new).replace(ONE_SWEEP + old[:8], ONE_SWEEP + new[:8])
    return text
