"""Grids: every combination of the choices on the command line, once."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from mnist_exp.composing import config_dir_of, from_composed
from mnist_exp.console import SweepDisplay, show_lines, show_table
from mnist_exp.errors import UserError
from mnist_exp.overrides import check_ids, check_stored, is_location, key_of, remember_locations, section_of
from mnist_exp.paths import take_credentials
from mnist_exp.settings import Settings, build
from mnist_exp.signals import install_signal_handlers
from mnist_exp.storage import run_dir
from mnist_exp.sweep.jobs import Composer, failed, varied_keys
from mnist_exp.sweep.parent import Parent, check_definition, check_output_dir, open_parent
from mnist_exp.sweep.summary import Progress, preview
from mnist_exp.tracking import provenance
from mnist_exp.tracking.base import Store
from mnist_exp.tracking.definition import Definition, Extension, Job


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
        self.composed, self.params = composed, params
        self.composer = Composer(context.config_loader, composed, self.check)
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task, config=composed
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs that `arguments` define, or the missing jobs of the sweep `sweep.resume`; raises UserError."""
        install_signal_handlers()
        check_ids(arguments)
        hydra = self.composed.hydra
        remember_locations(hydra.overrides.task, config_dir_of(hydra))  # interpolations resolved
        self.settings = settings = from_composed(self.composed)
        store = build(settings.tracking, "tracking")
        if not settings.sweep.dry_run:
            run_dir.ensure_writable_dir(settings.output_dir)
        # The command line: locations, the sweep's own keys, and what defines its jobs.
        locations = [override for override in arguments if is_location(override)]
        apart = {*locations, *(override for override in arguments if section_of(override) == "sweep")}
        overrides = [f"{key}={value}" for key, value in self.params.items()]
        overrides += [override for override in arguments if override not in apart]
        stored = None
        if settings.sweep.resume or settings.sweep.extend:
            sweep_id, stored = self._load_definition(store, overrides, locations)
            definition = self.extend(sweep_id, stored, overrides) if settings.sweep.extend else self.resume(stored)
        else:
            sweep_id, jobs = None, self.define(overrides)
            definition = Definition(self.name, self.total(jobs), overrides, provenance.software(), jobs)
        if definition is not stored:  # what could not be read back from the store is refused before anything is recorded
            check_stored(definition.all_overrides, "The command line")
        if settings.sweep.dry_run:
            rows, notes = preview(definition, sweep_id, store)
            show_table(rows)
            show_lines(notes)
            return
        getattr(self.launcher, "warm_up", lambda: None)()  # now that nothing can be refused any more
        launching = [override for override in self.composed.hydra.overrides.hydra if "launcher" in override]
        with open_parent(
            store,
            definition,
            settings,
            sweep_id=sweep_id,
            stored=stored,
            swept_keys=self.swept_keys(definition),
            locations=locations,
            selecting_overrides=(*self.selecting_overrides, *launching),
        ) as parent:
            if definition is not stored:
                parent.define()
            display = SweepDisplay(definition.total)
            try:
                with display.polling(Progress(store, parent.tracker.run_id).read):
                    self.run_jobs(parent)
            except BaseException:
                with suppress(Exception):  # the error that ended the sweep matters, not that the store is unreachable, too
                    _show(parent, display)
                raise
            _check_finished(parent, _show(parent, display))

    def _load_definition(self, store: Store, overrides: list[str], locations: list[str]) -> tuple[str, Definition]:
        """Return the id and the definition of the sweep to resume or to extend."""
        sweep, output_dir = self.settings.sweep, self.settings.output_dir
        key = "sweep.extend" if sweep.extend else "sweep.resume"
        if sweep.extend and sweep.resume:
            raise UserError("sweep.resume and sweep.extend exclude each other: resume the sweep first, then extend it.")
        if not sweep.dry_run:
            store.reap(output_dir)
        record, stored = store.find_sweep(sweep.extend or sweep.resume or "", finished_too=bool(sweep.extend))
        if sweep.extend and (self.name != GridSweep.name or stored.sweeper != self.name):
            raise UserError.invalid(
                key,
                record.run_id,
                "a grid, not a search",
                "Continue a search with sweep.resume and a larger hydra.sweeper.n_trials.",
            )
        check_output_dir(record, output_dir, locations, key)
        jobs = [self.composer.job(job.number, job.overrides) for job in stored.jobs]
        if not sweep.force:
            current = [] if sweep.extend else overrides
            check_definition(stored, Definition(self.name, len(jobs), current, provenance.software(), jobs), key)
        return record.run_id, stored

    def extend(self, sweep_id: str, stored: Definition, overrides: list[str]) -> Definition:
        """Return the definition of a sweep with the jobs that `overrides` add; raises UserError if they add none."""
        if not overrides:
            raise UserError(f"sweep.extend={sweep_id} adds nothing: expected new values, such as 'seed=range(5,20)'.")
        existing, varied = {override for job in stored.jobs for override in job.overrides}, varied_keys(stored.jobs)
        for override in (item for choices in self.composer.choices(overrides).values() for item in choices):
            if section_of(override) == "data" and key_of(override) not in varied and override not in existing:
                raise UserError(
                    f"{override} is invalid: sweep {sweep_id} does not vary the data, and runs on other data cannot be compared "
                    "with its own. Leave it out, or start another sweep."
                )
        jobs = self.composer.added(stored.jobs, overrides)
        if not jobs:
            raise UserError(f"sweep.extend={sweep_id} adds no job: all combinations with {' '.join(overrides)} are in the sweep.")
        step = Extension(datetime.now(UTC).isoformat(timespec="seconds"), overrides, jobs[0].number, len(jobs))
        return replace(stored, total=stored.total + len(jobs), jobs=[*stored.jobs, *jobs], extensions=[*stored.extensions, step])

    def define(self, overrides: list[str]) -> list[Job]:
        """Return all jobs that can be defined before the first starts, validated."""
        return self.composer.grid(overrides)

    def check(self, settings: Settings) -> None:
        """Raise UserError if this sweeper must not run a job of those settings."""

    def total(self, jobs: list[Job]) -> int:
        """Return the number of jobs of a new sweep."""
        return len(jobs)

    def resume(self, stored: Definition) -> Definition:
        """Return the definition of a resumed sweep."""
        return stored

    def swept_keys(self, definition: Definition) -> list[str]:
        """Return the keys that differ between jobs."""
        return varied_keys(definition.jobs)

    def run_jobs(self, parent: Parent) -> None:
        """Run all jobs."""
        self.launch_missing(parent, parent.definition.jobs)

    def launch_missing(self, parent: Parent, jobs: Sequence[Job]) -> None:
        """Run those of `jobs` that have not finished."""
        if not parent.force:
            parent.wait_for_running_jobs()
        missing = parent.missing(jobs)
        if not missing:
            return
        try:
            results = self.launcher.launch(list(missing.values()), initial_job_idx=min(missing))
        except UserError:
            raise
        except Exception as error:  # some launchers raise the exception of their first job after all have run
            results = [failed(error) for _ in missing]
        parent.results |= dict(zip(missing, results, strict=True))
        parent.mark_killed(list(missing))


def _show(parent: Parent, display: SweepDisplay) -> list[dict[str, str]]:
    """Finalize the sweep and show its table."""
    rows = parent.finalize()
    if rows:
        display.results(rows, parent.tracker.ui_command())
    return rows


def _check_finished(parent: Parent, rows: list[dict[str, str]]) -> None:
    """Raise UserError if a job has not finished."""
    failures = [row for row in rows if row["status"] not in ("FINISHED", "PRUNED")]
    if failures:
        first = failures[0]
        raise UserError(
            f"{len(failures)} of {len(rows)} jobs did not finish; the first of them, job {first['job']}: "
            f"{first['error'] or first['status']}\n"
            f"Fix the cause, then run `{parent.resume_command}` to finish the sweep."
        )
