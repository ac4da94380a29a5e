"""Hydra's sweeper for grids: every combination of the choices on the command line, once."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from mnist_exp.config import build, resolve
from mnist_exp.console import SweepDisplay, show_plan
from mnist_exp.errors import UserError
from mnist_exp.overrides import is_location, keep_ids, key_of
from mnist_exp.signals import install_signal_handlers
from mnist_exp.storage import run_dir
from mnist_exp.sweep.jobs import Composer, failed, varied_keys, without_hydra
from mnist_exp.sweep.parent import Parent, open_parent, refuse_changed_definition, refuse_other_output_dir
from mnist_exp.sweep.summary import Progress, preview
from mnist_exp.tracking import provenance
from mnist_exp.tracking.base import Store
from mnist_exp.tracking.definition import Definition, Job


class GridSweeper(Sweeper):
    """Runs all jobs of a grid, or the missing jobs of a sweep that is resumed.

    Args:
        params: Choices by key, as on the command line, for presets.
    """

    flags: tuple[str, ...] = ()  # the overrides that select this sweeper

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Receive Hydra's objects."""
        from hydra.core.plugins import Plugins

        self.composed = config
        self.composer = Composer(hydra_context.config_loader, config, self.check)
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs that `arguments` define, or the missing jobs of the sweep `sweep.resume`; raises UserError."""
        install_signal_handlers()
        composed = without_hydra(self.composed)
        keep_ids(composed, arguments)
        self.run_config = config = resolve(composed)
        sweep_config = config["sweep"]
        if sweep_config["on_failure"] == "stop" and not hasattr(self.launcher, "stops_on_failure"):
            raise UserError("sweep.on_failure=stop needs hydra/launcher=workers: other launchers start all jobs at once.")
        store = build(config["tracking"], "tracking")
        if not sweep_config["dry_run"]:
            run_dir.make_folder(Path(config["output_dir"]))
        cli_overrides = [override for override in arguments if key_of(override).partition(".")[0] != "sweep"]
        locations = [override for override in cli_overrides if is_location(override)]
        overrides = [f"{key}={value}" for key, value in self.params.items()]
        overrides += [override for override in cli_overrides if override not in locations]
        if sweep_config["resume"]:
            sweep_id, definition = self._stored(store, overrides, locations)
        else:
            sweep_id, jobs = None, self.define(overrides)
            definition = Definition(type(self).__name__, self.total(jobs), overrides, provenance.software(), jobs)
        if sweep_config["dry_run"]:
            show_plan(*preview(definition, sweep_id, store))
            return
        getattr(self.launcher, "warm_up", lambda: None)()  # now that nothing can be refused any more
        varied = self.varied(definition)
        with open_parent(
            store, definition, config, sweep_id=sweep_id, varied=varied, locations=locations, flags=self.flags
        ) as parent:
            display = SweepDisplay(definition.total)
            try:
                with display.polling(Progress(store, parent.tracker.run_id).read):
                    self.run_jobs(parent)
            except BaseException:
                with suppress(Exception):  # the error that ended the sweep matters, not that the store is away, too
                    _show(parent, display)
                raise
            _refuse_failed(parent, _show(parent, display))

    def _stored(self, store: Store, overrides: list[str], locations: list[str]) -> tuple[str, Definition]:
        """Return the id and the definition of the sweep to resume."""
        output_dir = Path(self.run_config["output_dir"])
        if not self.run_config["sweep"]["dry_run"]:
            store.reap(output_dir)
        record, stored = store.find_sweep(self.run_config["sweep"]["resume"], finished_too=False)
        refuse_other_output_dir(record, output_dir, locations)
        jobs = [self.composer.job(job.number, job.overrides) for job in stored.jobs]
        if not self.run_config["sweep"]["force"]:
            refuse_changed_definition(stored, Definition(type(self).__name__, len(jobs), overrides, provenance.software(), jobs))
        return record.run_id, self.resumed(stored)

    def define(self, overrides: list[str]) -> list[Job]:
        """Return all jobs that can be defined before the first starts, validated."""
        return self.composer.grid(overrides)

    def check(self, config: dict[str, Any]) -> None:
        """Raise UserError if this sweeper must not run a job of that configuration."""

    def total(self, jobs: list[Job]) -> int:
        """Return the number of jobs of a new sweep."""
        return len(jobs)

    def resumed(self, stored: Definition) -> Definition:
        """Return the definition of a resumed sweep."""
        return stored

    def varied(self, definition: Definition) -> list[str]:
        """Return the keys that differ between jobs."""
        return varied_keys(definition.jobs)

    def run_jobs(self, parent: Parent) -> None:
        """Run all jobs."""
        self.launch_missing(parent, parent.definition.jobs)

    def launch_missing(self, parent: Parent, jobs: Sequence[Job]) -> None:
        """Run those of `jobs` that have not finished, and repeat the failed ones `sweep.retries` times."""
        for _ in range(1 + self.run_config["sweep"]["retries"]):
            if not parent.force:
                parent.wait_for_orphans()
            missing = parent.missing(jobs)
            if not missing:
                return
            try:
                results = self.launcher.launch(list(missing.values()), initial_job_idx=min(missing))
            except UserError:
                raise
            except Exception as error:  # some launchers raise the exception of their first job after all have run
                results = [failed(error) for _ in missing]
            parent.returns |= dict(zip(missing, results, strict=True))
            parent.mark_dead(list(missing))


def _show(parent: Parent, display: SweepDisplay) -> list[dict[str, str]]:
    """Conclude the sweep and show its table."""
    rows = parent.conclude()
    if rows:
        display.results(rows, parent.tracker.ui_command())
    return rows


def _refuse_failed(parent: Parent, rows: list[dict[str, str]]) -> None:
    """Raise UserError if a job has not finished."""
    failures = [row for row in rows if row["status"] not in ("FINISHED", "PRUNED")]
    if failures:
        first = failures[0]
        raise UserError(
            f"{len(failures)} of {len(rows)} jobs did not finish; the first of them, job {first['job']}: "
            f"{first['error'] or first['status']}\n"
            f"Fix the cause, then run `{parent.resume_command}` to finish the sweep."
        )
