"""Choose runs to delete, and delete them from the store and the output folder."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from mnist_exp.errors import UserError
from mnist_exp.metrics import EVALUATION, best_first, metric_of
from mnist_exp.overrides import command
from mnist_exp.settings import ID
from mnist_exp.signals import defer_signals
from mnist_exp.storage import run_dir
from mnist_exp.tracking import tags as tag
from mnist_exp.tracking.base import RunRecord, Store
from mnist_exp.tracking.tables import Group, group_by_sweep


def plan_pruning(
    store: Store, output_dir: Path, before: float, keep_best: int, metric: str
) -> tuple[list[Group], dict[str, int]]:
    """Return what pruning deletes, FAILED and KILLED runs first, then by age; and the number of kept groups by reason.

    Args:
        store: The store.
        output_dir: The folder of all runs.
        before: Milliseconds since 1970: runs that ended later are kept.
        keep_best: The number of best finished runs to keep, for each data set.
        metric: The metric that decides which runs are best.

    Raises:
        UserError: The metric has no direction.
    """
    records = store.runs()
    best, registered = _best(records, keep_best, metric), store.registered_runs().keys()
    lists = " ".join(value for run in records for key, value in run.params.items() if key.endswith(("teacher.runs", "init")))
    needed = tuple(re.findall(ID, lists))
    chosen, kept = [], Counter[str]()
    for group in group_by_sweep(records):
        ids = {run.run_id for run in group}
        checks = {
            "running": any(run.status == "RUNNING" or run.ended is None for run in group),
            "younger": any((run.ended or 0) > before for run in group),
            "registered models": ids & registered,
            "resumable": _is_resumable(group, output_dir),
            "teachers or initial models of other runs": any(run_id.startswith(needed) for run_id in ids),
            f"best {keep_best} of each data set by {metric}, or all if none has it": ids & best,
        }
        if reasons := [reason for reason, applies in checks.items() if applies]:
            kept[reasons[0]] += 1
        else:
            chosen.append(group)
    return sorted(chosen, key=lambda group: (group[0].status == "FINISHED", group[0].ended)), kept


def _best(records: Iterable[RunRecord], count: int, metric: str) -> set[str]:
    """Return the ids of the best finished runs of each data set, which its name and digest identify.

    Without the metric in any run of a data set, none can be preferred: all of them are returned.
    """
    if metric_of(metric).higher_is_better is None or metric.startswith(EVALUATION):
        raise UserError.invalid("--by", metric, "a metric of training runs with a best direction, such as val/accuracy")
    by_data = defaultdict(list)
    for record in records:
        if record.status == "FINISHED" and tag.SWEEP_JOBS not in record.tags:
            by_data[record.data, record.digests.get("test")].append(record)
    best: set[str] = set()
    for runs in by_data.values():
        ranked = best_first(metric, (run for run in runs if metric in run.metrics), lambda run: run.metrics[metric])
        best |= {record.run_id for record in (ranked[:count] if ranked else runs)}
    return best


def _is_resumable(group: Group, output_dir: Path) -> bool:
    """Return whether work is left, and finished jobs or a checkpoint to go on from, perhaps in a folder out of reach.

    No work is left of a run that diverged: it would diverge again.
    """
    runs = [run for run in group if run.job is not None] or group
    ended = {run.job for run in runs if run.is_done or (output_dir / run.run_id / run_dir.DIVERGED).exists()}
    if group[0].is_done or str(len(ended)) == group[0].tags.get(tag.SWEEP_JOBS, "1"):
        return False
    reachable = (None, str(output_dir.absolute()))
    return any(
        run.is_done or run_dir.has_checkpoint(output_dir / run.run_id) or run.tags.get(tag.OUTPUT_DIR) not in reachable
        for run in runs
    )


def find_groups(store: Store, names: Sequence[str]) -> list[Group]:
    """Return the runs that a user names, a sweep with all its jobs.

    Args:
        store: The store.
        names: Ids, their first 6 or more digits, or `latest`.

    Raises:
        UserError: A run does not exist, or its model is registered.
    """
    found: dict[str, RunRecord] = {}
    for named in map(store.find_run, names):
        found |= {run.run_id: run for run in (named, *store.children(named.run_id))}
    for run_id, version in store.registered_runs().items():
        if run_id in found:
            remedy = "Delete that version first, for example on its page in the MLflow UI."
            raise UserError(f"The model of run {run_id} is registered as {version}.", key="id", value=run_id, remedy=remedy)
    return group_by_sweep(found.values())


def delete(store: Store, group: Group, output_dir: Path) -> None:
    """Delete a single run or a sweep and the folders, and mark the models as deleted. A sweep that loses a job becomes KILLED.

    The artifacts stay until `mlflow gc` removes them: their address comes from the store, which could name any folder.

    Raises:
        UserError: A process works on a run, or the store does not allow the deletion.
    """
    for run in group:  # all or none
        with _locked(store, run, output_dir):
            pass
    for run in reversed(group):  # the sweep last: what is left of an interrupted deletion can be deleted again
        with _locked(store, run, output_dir), defer_signals():
            store.delete(run.run_id)  # first: if the store refuses, the folder stays
            run_dir.remove_folder(output_dir / run.run_id)
    if group[0].job is not None:
        with suppress(UserError):  # its sweep was deleted before
            reason = f"the run of job {group[0].job} was deleted"
            store.mark_killed(group[0].tags[tag.SWEEP], reason, was="FINISHED")  # so that `sweep.resume=latest` finds it


@contextmanager
def _locked(store: Store, run: RunRecord, output_dir: Path) -> Iterator[None]:
    """Lock a run for the block; raises UserError if a process works on it, or has since `run` was read."""
    folder = output_dir / run.run_id
    with run_dir.try_lock(folder) if folder.is_dir() and not folder.is_symlink() else nullcontext(True) as is_free:
        if not is_free or store.get_run(run.run_id).status not in {run.status} - {"RUNNING"}:
            raise UserError(
                f"Run {run.run_id} cannot be deleted: a process works on it.",
                key="id",
                value=run.run_id,
                remedy=f"Stop it. If it is dead, run `{command('runs', 'reap')}` on its machine.",
            )
        yield
