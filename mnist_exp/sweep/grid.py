"""Grids: every combination of the choices on the command line, once."""

import re
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from mnist_exp.composing import config_dir_of, from_composed, missing_extra
from mnist_exp.console import show_lines, show_sweep, show_table, sweep_progress
from mnist_exp.errors import UserError
from mnist_exp.nodes import build, is_location, remember_locations, walk
from mnist_exp.overrides import (
    check_ids,
    choices,
    combinations,
    command,
    key_of,
    parse,
    quoted,
    section_of,
    text_of,
    varied_keys,
)
from mnist_exp.paths import take_credentials
from mnist_exp.settings import ID, NEUTRAL, Settings, read_recipe
from mnist_exp.signals import Interrupted, install_signal_handlers
from mnist_exp.storage import run_dir
from mnist_exp.sweep.clusters import until_all_ended
from mnist_exp.sweep.jobs import Composer, Job, failed
from mnist_exp.sweep.parent import Parent, check_output_dir
from mnist_exp.sweep.summary import preview, progress
from mnist_exp.sweep.workers import WorkerPool
from mnist_exp.tracking import provenance
from mnist_exp.tracking.base import RECIPE, RunRecord, Store, Sweep, grids_text
from mnist_exp.tracking.models import whole_id
from mnist_exp.tracking.tags import JOB, NO_JOB


class GridSweep:
    """Runs all jobs of a grid, or the missing jobs of a sweep that is resumed.

    Args:
        context: Hydra's context.
        task: The function that runs a job.
        composed: The composed configuration, with Hydra's node.
        params: Choices by key, as on the command line, from a preset.
    """

    selecting_overrides: tuple[str, ...] = ()  # the overrides that select this sweeper
    name = "grid"

    def __init__(self, context: HydraContext, task: TaskFunction, composed: DictConfig, params: dict[str, str]) -> None:
        if isinstance(uri := composed.get("tracking", {}).get("uri"), str):  # from conf/local or a preset
            OmegaConf.update(composed, "tracking.uri", take_credentials(uri), force_add=True)
        launcher = composed.hydra.launcher._target_
        for package in ("ray", "submitit"):  # they import theirs only when they start the first job
            if f"hydra_{package}_launcher" in launcher and find_spec(package) is None:
                raise UserError(missing_extra(launcher) or "", key="hydra/launcher", value=launcher)
        self.composed, self.params = composed, params
        self.composer = Composer(context.config_loader, composed, needs_validation=self.name != GridSweep.name)
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task, config=composed
        )
        self.pool: WorkerPool | None = getattr(self.launcher, "pool", None)  # only our own launcher has it

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs that `arguments` define, or the missing jobs of the sweep `sweep.resume`; raises UserError."""
        install_signal_handlers()
        check_ids(arguments)
        hydra = self.composed.hydra
        remember_locations(hydra.overrides.task, config_dir_of(hydra))  # interpolations resolved
        self.settings = settings = from_composed(self.composed)
        store: Store = build(settings.tracking, "tracking")
        if not settings.sweep.dry_run:
            run_dir.ensure_writable_dir(settings.output_dir)
        arguments = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        locations = [override for override in arguments if is_location(override)]
        overrides = self._defining(store, arguments, locations)
        with ExitStack() as lock:
            stored = self._find_stored(store, locations, lock)
            grids = self._grids(stored, overrides)
            grids_text(grids)  # what could not be read back is refused before anything is recorded
            jobs = self.define(stored, grids)
            swept_keys = self.swept_keys(grids)
            children = self.match(store, stored, jobs, swept_keys) if stored else []
            total = self.total(stored, jobs)
            done = {number for child, number in children if child.is_done}
            if settings.sweep.dry_run:
                rows, notes = preview(jobs, done, total)
                show_table(rows)
                show_lines(notes)
                return
            renumbered = [(child, number) for child, number in children if child.job != number]
            has_all = total == len(jobs) and done.issuperset(job.number for job in jobs)
            if stored and stored.status == "FINISHED" and stored.total == total and has_all and not renumbered:
                show_lines([f"Sweep {stored.run_id} has finished: nothing is left to run."])
                return
            if self.pool:
                self.pool.warm_up()  # now that nothing can be refused any more
            launching = [override for override in hydra.overrides.hydra if "launcher" in override]
            selecting = [*self.selecting_overrides, *launching]
            objective = stored.objective if stored else settings.objective
            parent = Parent(store, settings, self.name, grids, jobs, total, swept_keys, locations, selecting, objective)
            lock.enter_context(parent.open(stored))
            for child, number in renumbered:
                store.set_tags(child.run_id, {JOB: NO_JOB if number is None else str(number)})
            self._run(parent)

    def _run(self, parent: Parent) -> None:
        """Run the jobs, and show and record their results."""
        try:
            with sweep_progress(parent.total, lambda: progress(parent.children(), parent.objective)):
                self.run_jobs(parent)
        except BaseException:
            with suppress(Exception):  # the error that ended the sweep matters, not that the store is unreachable, too
                _show(parent)
            raise
        rows = _show(parent)
        if parent.tracker.is_recording:
            self.publish(parent)
        _conclude(parent, rows)

    def _defining(self, store: Store, arguments: list[str], locations: list[str]) -> list[str]:
        """Return the overrides that define jobs: all but locations and the sweep's own keys.

        Raises:
            UserError: A location has several values: no record of a job contains locations.
        """
        for override in locations:
            if parse(override).is_sweep_override():
                key, group = key_of(override), section_of(override)
                remedy = f"Write an option for each place, conf/{group}/NAME.yaml, and sweep over {group}=NAME,NAME."
                raise UserError.invalid(key, text_of(override), "one place for all jobs", remedy)
        rest = [override for override in arguments if override not in locations and section_of(override) != "sweep"]
        if self.settings.init and not any(key_of(override) == "init" for override in rest):  # from a preset, or conf/local
            rest.append(f"init={quoted(self.settings.init)}")
        return self.composer.write_out([self._with_whole_ids(store, override) for override in rest])

    def _with_whole_ids(self, store: Store, override: str) -> str:
        """Return an override with the whole ids of the runs that it repeats or starts from, which their records have, too."""
        if key_of(override) not in ("init", "rerun"):
            return override
        texts = [text_of(choice).strip("'") for choice in choices(override)]
        if key_of(override) == "rerun":
            ids = [store.find_run(text).run_id if re.fullmatch(ID, text) else text for text in texts]
        else:
            ids = [text if text == "null" else whole_id(store, text, self.settings.output_dir) for text in texts]
        return f"{key_of(override)}={','.join(id_ if id_ == 'null' else quoted(id_) for id_ in ids)}"

    def _find_stored(self, store: Store, locations: list[str], lock: ExitStack) -> Sweep | None:
        """Return the sweep to resume or to extend, which stays locked, None for a new one; raises UserError."""
        sweep, output_dir = self.settings.sweep, self.settings.output_dir
        if sweep.extend and sweep.resume:
            raise UserError("sweep.resume and sweep.extend exclude each other: resume the sweep first, then extend it.")
        if not (sweep.extend or sweep.resume):
            return None
        key = "sweep.extend" if sweep.extend else "sweep.resume"
        if not sweep.dry_run:
            store.reap(output_dir)
        found = store.find_sweep(sweep.extend or sweep.resume or "", unfinished=not sweep.extend)
        if sweep.extend and found.sweeper != GridSweep.name:
            remedy = "Continue a search with sweep.resume and a larger hydra.sweeper.n_trials."
            raise UserError.invalid(key, found.run_id, "a grid, not a search", remedy)
        if found.sweeper != self.name:
            raise UserError.invalid(key, found.run_id, f"a sweep by {self.name}", f"Add hydra/sweeper={found.sweeper}.")
        check_output_dir(found, output_dir, locations, key)
        if not sweep.dry_run:
            lock.enter_context(run_dir.lock_run(output_dir / found.run_id))
            found = store.find_sweep(found.run_id)  # another process may have extended it
        return found

    def _grids(self, stored: Sweep | None, overrides: list[str]) -> list[list[str]]:
        """Return the grids to run: the typed one, or the stored ones with those that an extension adds; raises UserError."""
        if stored is None:
            return [overrides]
        if not self.settings.sweep.extend:
            if overrides and overrides not in stored.grids:
                raise UserError(
                    f"sweep.resume={stored.run_id} runs the sweep as it was started: {' '.join(overrides)} cannot change it.",
                    key="sweep.resume",
                    value=stored.run_id,
                    remedy="Leave the overrides out, start another sweep, or add jobs with sweep.extend.",
                )
            return stored.grids
        typed = {key_of(override): override for override in overrides}
        extended = [list(({key_of(override): override for override in grid} | typed).values()) for grid in stored.grids]
        return [list(grid) for grid in dict.fromkeys(map(tuple, [*stored.grids, *extended]))]

    def define(self, stored: Sweep | None, grids: list[list[str]]) -> list[Job]:
        """Return all jobs that can be defined before the first starts, checked."""
        jobs = self.composer.grid(grids)
        if self.settings.sweep.extend and stored and len(jobs) == stored.total:
            raise UserError(f"sweep.extend={stored.run_id} adds no job: expected new values, such as 'seed=range(5,20)'.")
        return jobs

    def total(self, stored: Sweep | None, jobs: list[Job]) -> int:
        """Return the number of jobs of the sweep."""
        return len(jobs)

    def match(self, store: Store, stored: Sweep, jobs: list[Job], varied: list[str]) -> list[tuple[RunRecord, int | None]]:
        """Return the runs of a stored sweep, each with the number of the job that it is, None if it is none.

        Raises:
            UserError: Other software started the sweep, or a finished run is none of the jobs, unless `sweep.force` is set.
        """
        if not self.settings.sweep.force:
            _check_unchanged(provenance.differences(stored.tags, provenance.software()))
        children = store.children(stored.run_id)
        if self.name != GridSweep.name:  # several trials of a search may have the same configuration
            return [(child, child.job) for child in children]
        recipes = store.read_artifacts(children, RECIPE, strict=True)
        numbers = {job.digest: job.number for job in jobs}
        matched = []
        for child in children:
            number = child.job  # unless it ended before it recorded its recipe
            if content := recipes.get(child.run_id):
                recipe = read_recipe(content, f"{RECIPE} of run {child.run_id}")
                then = recipe.settings
                number = numbers.get(then.digest(varied, recipe.overrides))
                if number is None and child.status == "FINISHED" and not self.settings.sweep.force and child.job is not None:
                    _check_unchanged(f"run {child.run_id} ({child.name}) " + self._changes(then, child.job, jobs, varied))
            matched.append((child, number))
        return matched

    def _changes(self, then: Settings, number: int, jobs: list[Job], varied: list[str]) -> str:
        """Return in words how a job of the sweep differs from the settings that its run had.

        Args:
            then: The settings of the run.
            number: The number of its job.
            jobs: The jobs as composed now.
            varied: The keys that differ between jobs.
        """
        for job in (job for job in jobs if job.number == number):
            before, now = (
                dict(walk(settings.model_dump(mode="json", exclude=set(NEUTRAL) - set(varied))))
                for settings in (then, self.composer.settings(job.overrides))
            )
            apart = then.neutral_arguments() - set(varied)
            keys = [key for key, value in (now | before).items() if not (isinstance(value, dict) or key in apart)]
            keys = [key for key in keys if now.get(key) != before.get(key)]
            if keys:
                return "; ".join(f"had {key}={before.get(key)}, is now {now.get(key)}" for key in keys)
        return "has a configuration that no job has now"

    def swept_keys(self, grids: list[list[str]]) -> list[str]:
        """Return the keys that differ between jobs."""
        return varied_keys([combination for grid in grids for combination in combinations(grid)])

    def run_jobs(self, parent: Parent) -> None:
        """Run all jobs."""
        self.launch_missing(parent, parent.jobs)

    def publish(self, parent: Parent) -> None:
        """Add a report to the parent; of a grid, `compare` does."""

    def launch_missing(self, parent: Parent, jobs: Sequence[Job]) -> None:
        """Run those of `jobs` that have not finished."""
        if not self.settings.sweep.force:
            parent.wait_for_running_jobs()
        missing = parent.missing(jobs)
        if not missing:
            return
        try:
            with until_all_ended(self.launcher, parent.tracker.run_id):
                results = self.launcher.launch(list(missing.values()), initial_job_idx=min(missing))
        except UserError:
            raise
        except Interrupted:
            with suppress(Exception):  # the signal matters, not that the store is unreachable, too
                parent.mark_killed(list(missing))
            raise
        except Exception as error:  # some launchers raise the exception of their first job after all have run
            results = [failed(error) for _ in missing]
        parent.results |= dict(zip(missing, results, strict=True))
        parent.mark_killed(list(missing))


def _check_unchanged(changes: str) -> None:
    """Raise UserError if a sweep has changed since its start; changes: in words, empty without any."""
    if changes:
        raise UserError(
            f"The sweep differs from its start: {changes}.",
            key="sweep.force",
            remedy="Start a new sweep, or run the jobs that have no finished run with sweep.force=true.",
        )


def _show(parent: Parent) -> list[dict[str, str]]:
    """Finalize the sweep and show its table."""
    rows = parent.finalize()
    if rows:
        show_sweep(rows, parent.store.ui_hint(parent.tracker.run_id))
    return rows


def _conclude(parent: Parent, rows: list[dict[str, str]]) -> None:
    """Show the command that answers what the sweep asks; raises UserError if a job has not finished."""
    failures = [row for row in rows if row["status"] not in ("FINISHED", "PRUNED")]
    if failures:
        first = failures[0]
        raise UserError(
            f"{len(failures)} of {len(rows)} jobs did not finish; the first of them, job {first['job']}: "
            f"{first['error'] or first['status']}\n"
            f"Fix the cause, then run `{parent.resume_command}` to finish the sweep."
        )
    if parent.tracker.is_recording:
        show_lines([next_step(parent, rows)])


def next_step(parent: Parent, rows: list[dict[str, str]]) -> str:
    """Return the line with the command that answers what a sweep asks, empty if there is none."""
    keys = set(parent.swept_keys) - {"seed"}
    choosing_data = {key for key in keys if key.partition(".")[0] in ("data", "experiment", "arm")}
    if choosing_data and len({child.data for child in parent.children()}) > 1:  # runs on different data are not compared
        keys -= choosing_data
        if not keys:
            return ""
    if keys and parent.sweeper == GridSweep.name:
        return f"Next: {command('compare', parent.tracker.run_id)}"
    is_ranked = any(row[parent.objective] for row in rows if row["status"] == "FINISHED")
    return f"Next: {command('runs', 'best', parent.tracker.run_id)}" if is_ranked else ""
