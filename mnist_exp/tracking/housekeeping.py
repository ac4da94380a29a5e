"""Choose old runs, and delete them from the store and the output folder."""

import re
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException

from mnist_exp.errors import UserError
from mnist_exp.metrics import EVALUATION, metric_of
from mnist_exp.storage import run_dir
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import RunRecord
from mnist_exp.tracking.connection import first_line
from mnist_exp.tracking.mlflow_store import MLflowStore

DAY = 86_400_000  # ms
ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


@dataclass(frozen=True)
class Pruning:
    """The runs that pruning deletes, the oldest first, and the number of kept ones by reason."""

    runs: list[RunRecord]
    kept: dict[str, int]


def plan_pruning(store: MLflowStore, output_dir: Path, days: float, keep_best: int, metric: str) -> Pruning:
    """Choose the runs to delete.

    Args:
        store: The store.
        output_dir: The folder of all runs.
        days: Younger runs are kept, by the time of their end.
        keep_best: The number of best finished runs to keep, for each data set.
        metric: The metric that decides which runs are best.

    Raises:
        UserError: The metric has no direction, or the registry of models cannot be read.
    """
    records = store.runs()
    best, registered = _best(records, keep_best, metric), _registered(store)
    oldest = time.time() * 1000 - days * DAY
    unfinished = {record.run_id for record in records if tag.SWEEP_JOBS in record.tags and record.status != "FINISHED"}
    reasons: dict[str, str] = {}
    for record in records:
        checks = {
            "running": record.status == "RUNNING" or record.ended is None,
            "younger": (record.ended or 0) > oldest,
            "registered models": record.run_id in registered,
            "resumable": _is_resumable(record, output_dir) or bool({record.run_id, record.tags.get(tag.SWEEP)} & unfinished),
            f"best {keep_best} of each data set by {metric}, or on data without it": record.run_id in best,
        }
        if applying := [reason for reason, applies in checks.items() if applies]:
            reasons[record.run_id] = applying[0]
    while needed := _needed(records, reasons):
        reasons |= needed
    chosen = [record for record in records if record.run_id not in reasons]
    return Pruning(sorted(chosen, key=lambda record: record.ended or 0), dict(Counter(reasons.values())))


def _needed(records: Sequence[RunRecord], reasons: Mapping[str, str]) -> dict[str, str]:
    """Return the runs that kept runs need, and the reason: the sweeps of jobs, and teachers."""
    kept = [record for record in records if record.run_id in reasons]
    sweeps = dict.fromkeys((record.tags.get(tag.SWEEP, "") for record in kept), "sweeps of kept jobs")
    teachers = {run_id: "named by kept runs" for record in kept for run_id in ID.findall(record.tags.get(tag.OVERRIDES, ""))}
    ids = {record.run_id for record in records}
    return {run_id: reason for run_id, reason in (teachers | sweeps).items() if run_id in ids - reasons.keys()}


def _best(records: Iterable[RunRecord], count: int, metric: str) -> set[str]:
    """Return the ids of the best finished runs of each data set, which its name and digest identify.

    Without the metric in any run of a data set, none can be preferred: all of them are returned.
    """
    is_better = metric_of(metric).higher_is_better
    if is_better is None or metric.startswith(EVALUATION):
        raise UserError(
            f"--by {metric} is invalid: expected a metric of training runs with a best direction, such as val/accuracy."
        )
    by_data = defaultdict(list)
    for record in records:
        if record.status == "FINISHED" and tag.SWEEP_JOBS not in record.tags:
            by_data[record.data, record.digests.get("test")].append(record)
    best: set[str] = set()
    for runs in by_data.values():
        ranked = sorted((run for run in runs if metric in run.metrics), key=lambda run: run.metrics[metric], reverse=is_better)
        best |= {record.run_id for record in (ranked[:count] if ranked else runs)}
    return best


def _is_resumable(record: RunRecord, output_dir: Path) -> bool:
    """Return whether a run that has not finished may have a checkpoint: in its folder, or in a folder out of reach."""
    folder = output_dir / record.run_id
    if record.is_done or run_dir.is_complete(folder):
        return False
    return run_dir.has_checkpoint(folder) or record.tags.get(tag.OUTPUT_DIR) not in (None, str(output_dir.absolute()))


def _registered(store: MLflowStore) -> set[str | None]:
    """Return the ids of the runs whose models are in the registry; raises UserError if it cannot be read."""
    found: set[str | None] = set()
    token: str | None = ""
    try:
        while token is not None:
            page = store.client.search_model_versions(max_results=1000, page_token=token or None)
            for version in page:
                models = {version.model_id, *re.findall(r"\bm-[0-9a-f]{32}\b", version.source or "")} - {None, ""}
                found |= {version.run_id, *ID.findall(version.source or "")}
                found |= {store.client.get_logged_model(model_id).source_run_id for model_id in models}
            token = page.token or None  # a server's last page has an empty one
    except MlflowException as error:
        raise UserError(
            f"The models registered in {store.uri} cannot be read, so no run can be deleted: {first_line(error)}"
        ) from error
    return found


def delete(store: MLflowStore, record: RunRecord, output_dir: Path) -> str | None:
    """Delete a run and its folder, and mark its models as deleted; return the reason if a part is left.

    Its artifacts stay until `mlflow gc` removes them: their address comes from the store, which could name any folder.
    """
    folder = output_dir / record.run_id
    with ExitStack() as lock:
        if folder.is_dir() and not folder.is_symlink() and not lock.enter_context(run_dir.try_lock(folder)):
            return "a process works on it"
        if store.get_run(record.run_id).info.status != record.status:
            return "it was resumed in the meantime"
        try:  # the run last: what is left of an interrupted deletion can be deleted again
            run_dir.remove_folder(folder)
            for model in logged_models(store, record):
                store.client.delete_logged_model(model.model_id)
            store.delete(record.run_id)
        except Exception as error:  # servers, databases and disks raise exceptions of their own
            return first_line(error)
    return None


def gc_command(store: MLflowStore) -> str:
    """Return the command that removes the artifacts of deleted runs for good."""
    uri = shlex.quote(store.uri)
    database = "DATABASE   (on the server)" if store.uri.startswith("http") else uri
    return f"MLFLOW_TRACKING_URI={uri} mlflow gc --backend-store-uri {database}"


def logged_models(store: MLflowStore, record: RunRecord) -> list[LoggedModel]:
    """Return the models that a run has recorded."""
    return list(store.client.search_logged_models([record.experiment_id], f"source_run_id='{record.run_id}'"))
