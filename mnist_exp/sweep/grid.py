"""Hydra's sweeper for grids: every combination of the choices on the command line, once."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from mnist_exp.config import build, resolve
from mnist_exp.console import SweepDisplay, show_plan
from mnist_exp.errors import UserError
from mnist_exp.overrides import check_stored, is_location, keep_ids, key_of, parse, text_of
from mnist_exp.signals import install_signal_handlers
from mnist_exp.storage import run_dir
from mnist_exp.sweep.jobs import Composer, failed, varied_keys, without_hydra
from mnist_exp.sweep.parent import Parent, open_parent, refuse_changed_definition, refuse_other_output_dir
from mnist_exp.sweep.summary import Progress, preview
from mnist_exp.tracking import provenance
from mnist_exp.tracking.base import Store
from mnist_exp.tracking.definition import Definition, Extension, Job, Plan


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
        cli_overrides = [override for override in arguments if key_of(override).partition(".")[0] not in ("sweep", "plan")]
        locations = [override for override in cli_overrides if is_location(override)]
        overrides = [f"{key}={value}" for key, value in self.params.items()]
        overrides += [override for override in cli_overrides if override not in locations]
        self.typed_plan = [override for override in arguments if key_of(override).partition(".")[0] == "plan"]
        stored = None
        if sweep_config["resume"] or sweep_config["extend"]:
            sweep_id, stored = self._stored(store, overrides, locations)
            definition = self.extended(sweep_id, stored, overrides) if sweep_config["extend"] else self.resumed(stored)
        else:
            sweep_id, jobs = None, self.define(overrides)
            if any(override.is_sweep_override() for override in parse(self.typed_plan)):
                raise UserError(f"{' '.join(self.typed_plan)} is invalid: expected one value, because a sweep has one plan.")
            plan = make_plan(config["plan"], jobs)
            definition = Definition(type(self).__name__, self.total(jobs), overrides, provenance.software(), jobs, plan)
        if definition is not stored:
            refuse_unstorable(definition)
        if sweep_config["dry_run"]:
            show_plan(*preview(definition, sweep_id, store))
            return
        getattr(self.launcher, "warm_up", lambda: None)()  # now that nothing can be refused any more
        varied = self.varied(definition)
        with open_parent(
            store, definition, config, sweep_id=sweep_id, stored=stored, varied=varied, locations=locations, flags=self.flags
        ) as parent:
            if definition is not stored:
                parent.define()
                parent.confirm()
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
        """Return the id and the definition of the sweep to resume or to extend."""
        sweep_config, output_dir = self.run_config["sweep"], Path(self.run_config["output_dir"])
        extends = bool(sweep_config["extend"])
        key = "sweep.extend" if extends else "sweep.resume"
        if extends and sweep_config["resume"]:
            raise UserError("sweep.resume and sweep.extend exclude each other: resume the sweep first, then extend it.")
        if self.typed_plan:
            raise UserError(
                f"{' '.join(self.typed_plan)} is invalid: the plan of a sweep is stored before its first job, and {key} cannot "
                "change it. Leave it out."
            )
        if not sweep_config["dry_run"]:
            store.reap(output_dir)
        record, stored = store.find_sweep(sweep_config["extend"] or sweep_config["resume"], finished_too=extends)
        if extends and (self.flags or stored.sweeper != type(self).__name__):  # only a grid needs no flags
            raise UserError(
                f"sweep.extend={record.run_id} is invalid: expected a grid, not a search. Continue a search with "
                "sweep.resume and a larger hydra.sweeper.n_trials."
            )
        refuse_other_output_dir(record, output_dir, locations, key)
        jobs = [self.composer.job(job.number, job.overrides) for job in stored.jobs]
        if not sweep_config["force"]:
            current = [] if extends else overrides
            software = provenance.software()
            refuse_changed_definition(stored, Definition(type(self).__name__, len(jobs), current, software, jobs), key)
        return record.run_id, stored

    def extended(self, sweep_id: str, stored: Definition, overrides: list[str]) -> Definition:
        """Return the definition of a sweep with the jobs that `overrides` add; raises UserError if they add none."""
        if not overrides:
            raise UserError(f"sweep.extend={sweep_id} adds nothing: expected new values, such as 'seed=range(5,20)'.")
        existing, varied = {override for job in stored.jobs for override in job.overrides}, varied_keys(stored.jobs)
        for override in (item for choices in self.composer.choices(overrides).values() for item in choices):
            key = key_of(override)
            if key.partition(".")[0] == "data" and key not in varied and override not in existing:
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


def refuse_unstorable(definition: Definition) -> None:
    """Raise UserError on an override that could not be read back from the store, before anything is recorded."""
    check_stored(definition.all_overrides, "The command line")


def make_plan(values: dict[str, Any], jobs: Sequence[Job]) -> Plan | None:
    """Return the plan of a sweep, None without one.

    Args:
        values: The values of `plan` in the configuration.
        jobs: The jobs of the sweep.

    Raises:
        UserError: The plan names a factor or a baseline that the sweep does not contain, or an unknown metric.
    """
    if all(value is None for value in values.values()):
        return None
    baseline = None if values["baseline"] is None else str(values["baseline"])
    varied = [key for key in varied_keys(jobs) if key != "seed"]
    factor = values["factor"] or (varied[0] if len(varied) == 1 else None)
    plan = Plan(**(values | {"baseline": baseline, "factor": factor}))
    if plan.factor is not None and plan.factor not in varied:
        raise UserError(
            f"plan.factor={plan.factor} is invalid: expected a key that the sweep varies: {', '.join(varied) or 'none'}."
        )
    arms = dict.fromkeys(text_of(item) for job in jobs for item in job.overrides if key_of(item) == factor)
    if baseline is not None and baseline not in arms:
        raise UserError(f"plan.baseline={baseline} is invalid: expected a value of plan.factor: {', '.join(arms) or 'none'}.")
    if plan.metric is not None and not _is_recorded(plan.metric):
        raise UserError(f"plan.metric={plan.metric} is invalid: expected a metric of a run, such as test/accuracy or val/loss.")
    return plan


def _is_recorded(metric: str) -> bool:
    """Return whether finished runs have one value of a metric."""
    from mnist_exp.learning.evaluation import EVALUATED

    part, _, name = metric.rpartition("/")
    of_time = part == "time" and name.endswith("_seconds")
    return of_time or metric == "model/parameters" or (part in ("val", "test") and name in EVALUATED)


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
