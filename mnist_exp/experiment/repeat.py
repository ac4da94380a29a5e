"""The request of a run: new, resumed from a checkpoint, or repeated from its record."""

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mnist_exp.composing import local_defaults
from mnist_exp.errors import Mark, UserError
from mnist_exp.experiment.runner import RunRequest, RunResult, ShouldPrune, run
from mnist_exp.metrics import metric_of
from mnist_exp.nodes import build, defaults_of, marked
from mnist_exp.overrides import command, key_of, quoted
from mnist_exp.paths import typed
from mnist_exp.settings import JobContext, Node, Recipe, Settings, check_stored, defaults_of_newer_keys
from mnist_exp.storage import checkpoint, run_dir
from mnist_exp.storage.checkpoint import Checkpoint
from mnist_exp.tracking import provenance
from mnist_exp.tracking.base import DeniedError, Store, latest_run_per_job
from mnist_exp.tracking.models import whole_id


def request(start: Checkpoint, **options: Any) -> RunRequest:
    """Return the request of a run; options: further fields of `RunRequest`. Raises UserError if it could not be resumed."""
    check_stored(start.recipe.overrides, "The command line")
    recipe = _with_whole_init(start.recipe)
    options = {"quiet": recipe.settings.sweep_job is not None, "in_search": _is_trial(recipe.settings)} | options
    repeat = command("run", *recipe.overrides) if options["quiet"] else provenance.command_line()
    return RunRequest(replace(start, recipe=recipe), repeat, **options)


def _is_trial(settings: Settings) -> bool:
    return settings.sweep_job is not None and settings.sweep_job.in_search


def _with_whole_init(recipe: Recipe) -> Recipe:
    """Return a recipe whose `init` is the full id and the digest of a model, so that it always means the same weights."""
    settings = recipe.settings
    if settings.init is None:
        return recipe
    whole = whole_id(build(settings.tracking, "tracking"), settings.init, settings.output_dir)
    kept = [override for override in recipe.overrides if key_of(override) != "init"]
    return replace(recipe, settings=settings.model_copy(update={"init": whole}), overrides=[*kept, f"init={quoted(whole)}"])


def resume(settings: Settings, should_prune: ShouldPrune | None = None) -> RunResult:
    """Resume the run `settings.resume` from its last intact checkpoint, with the recipe that it contains.

    Args:
        settings: The settings of the command line.
        should_prune: As in `RunRequest`.

    Raises:
        UserError: The run has finished, or has no intact checkpoint.
    """
    assert settings.resume
    folder = run_dir.find_run(settings.output_dir, settings.resume)
    with run_dir.lock_run(folder):  # before reading: another process may be about to finish the run
        run_dir.check_unfinished(folder)
        saved = checkpoint.load_latest_intact(folder)
        if saved.run_id != folder.name:
            raise UserError(f"{folder} contains the checkpoint of run {saved.run_id}: expected a folder named like its run.")
        job = settings.sweep_job
        in_sweep = job is not None
        if not in_sweep:
            state = saved.state or {"examples_seen": 0, "steps": 0, "phase": next(iter(saved.recipe.settings.phases))}
            print(
                f"Resuming run {saved.run_id} after step {state['steps']} of phase {state['phase']}, {state['examples_seen']:,} "
                "examples in all."
            )
            if stored_job := saved.recipe.settings.sweep_job:  # it still belongs to its sweep
                job = stored_job.model_copy(update={"data": None})
        rerun = saved.recipe.settings.rerun  # the digest of such a job
        stored = with_present_locations(saved.recipe, settings, resume=settings.resume, rerun=rerun, sweep_job=job)
        return run(request(replace(saved, recipe=stored), should_prune=should_prune, quiet=in_sweep))


def requeued(settings: Settings, job: JobContext) -> Settings:
    """Return the settings of a job of a sweep; of one that a scheduler starts again, they resume its run.

    A run without a checkpoint is deleted, and the job starts again from the beginning.
    """
    store: Store = build(settings.tracking, "tracking")
    run = latest_run_per_job(store.children(job.sweep_id)).get(job.number)
    if run is None:
        return settings
    if run.is_done or run_dir.has_checkpoint(settings.output_dir / run.run_id):
        return settings.model_copy(update={"resume": run.run_id})
    with suppress(DeniedError):  # the new run of the job counts, being newer
        store.delete(run.run_id)
    return settings


def rerun(settings: Settings) -> RunResult:
    """Repeat the stored run `settings.rerun`; raises UserError if it has not finished, or a metric differs."""
    assert settings.rerun
    store: Store = build(settings.tracking, "tracking")
    original = store.find_run(settings.rerun, finished=True)
    recipe, run_id = store.recipe(original), original.run_id
    if original.status != "FINISHED":
        raise UserError(f"rerun={run_id}: the run is {original.status}, expected a FINISHED run.", key="rerun", value=run_id)
    repeated = with_present_locations(recipe, settings, rerun=run_id, sweep_job=settings.sweep_job)
    names = {"threads", *provenance.software(), *provenance.git_tags()} & original.tags.keys()
    software = {name: original.tags[name] for name in names}
    result = run(request(Checkpoint("", repeated, software), in_search=_is_trial(recipe.settings)))
    compared = {name: points for name, points in store.points(original).items() if not metric_of(name).is_measured_time}
    differing = sorted(name for name, points in compared.items() if points != result.points.get(name))
    if differing:
        raise UserError(f"Run {result.run_id} differs from run {run_id} in {', '.join(differing)}.")
    print(f"Run {result.run_id} is identical to run {run_id} in every metric except the measured times.")
    return result


def with_present_locations(stored: Recipe, settings: Settings, **changes: Any) -> Recipe:
    """Return a stored recipe with the locations of this machine, and say which newer keys get their defaults.

    Args:
        stored: The recipe of a checkpoint or a store.
        settings: The settings of this command line.
        changes: Further changes of the settings.
    """
    for key, value in defaults_of_newer_keys(stored.settings).items():
        print(f"The stored recipe is older than the key {key}: its default {value} applies.", file=sys.stderr)
    present = {name: getattr(settings, name) for name in ("output_dir", "tracking", "sweep")} | {"resume": None, "rerun": None}
    data = locate_data(stored.settings, settings.data)
    return replace(stored, settings=stored.settings.model_copy(update=present | {"data": data} | changes))


def locate_data(stored: Settings, present: Node) -> Node:
    """Return the node of the data of stored settings, with the places where the data are on this machine.

    The command line and conf/local go first, then the recorded place if it exists. A folder to download to is never taken from
    the record.

    Args:
        stored: The settings.
        present: The node of this command line, perhaps of another data set.
    """
    node, own = dict(stored.data), present if present["_target_"] == stored.data["_target_"] else {}
    for name in marked(node, "data", Mark.DOWNLOAD):
        node.pop(name, None)
        node |= {key: value for key, value in (defaults_of(node, "data") | own).items() if key == name}
    recorded = stored.data_description.locations if stored.data_description else {}
    for name in marked(node, "data", Mark.LOCATION):
        place = recorded.get(name) or node.get(name)
        if f"data.{name}" in typed and name in present:
            node[name] = present[name]
        elif name in own and (name in local_defaults("data") or not (place and Path(place).exists())):
            node[name] = own[name]
        elif place:
            node[name] = place
    return node
