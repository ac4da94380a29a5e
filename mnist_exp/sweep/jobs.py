"""The jobs of a sweep: composed and validated before the first starts, and matched with their runs in the store."""

import itertools
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_exp.composing import from_composed, without_hydra
from mnist_exp.errors import UserError
from mnist_exp.overrides import GROUPS, key_of, parse, text_of
from mnist_exp.settings import Settings, Trial, check_repeats
from mnist_exp.tracking.base import COLORS, RunRecord
from mnist_exp.tracking.definition import Job

JobResults = Mapping[int, JobReturn]


class Composer:
    """Composes jobs as Hydra does, but faster if they differ in plain values only.

    Hydra takes a fifth of a second for each job, too long to find a mistake in the last of hundreds.
    """

    def __init__(self, loader: ConfigLoader, composed: DictConfig, check: Callable[[Settings], None]) -> None:
        self._loader, self._composed, self._check = loader, composed, check
        self._bases: dict[tuple[str, ...], bytes] = {}  # pickled: copies of a configuration take four times as long
        self._trial = Trial()

    def job(self, number: int, overrides: Sequence[str]) -> Job:
        """Return a job, composed and checked; raises UserError."""
        return self._checked(number, overrides, from_composed(self._compose(overrides)))

    def parse(self, overrides: list[str]) -> list[Override]:
        """Return overrides as parsed by Hydra, with globs resolved against conf/."""
        return OverridesParser.create(config_loader=self._loader).parse_overrides(overrides)

    def choices(self, overrides: list[str]) -> dict[str, list[str]]:
        """Return the overrides that a command line chooses between, by key; raises UserError on an interval."""
        choices: dict[str, list[str]] = {}
        for override in self.parse(overrides):
            key = override.get_key_element()
            if not override.is_sweep_override():
                value = override.get_value_element_as_str()
                choices[key] = [key if override.is_delete() and value == "null" else f"{key}={value}"]
            elif override.is_discrete_sweep():
                with suppress(OmegaConfBaseException):  # of a range among other values
                    choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
                if not choices.get(key):
                    text = text_of(str(override.input_line))
                    raise UserError.invalid(key, text, "values such as 0,1,5, or one range that is not empty")
            else:
                raise UserError(
                    f"{override.input_line} is invalid: expected a list of choices, such as 0.1,0.2 or range(0,5). "
                    "Intervals need hydra/sweeper=optuna."
                )
        return choices

    def grid(self, overrides: list[str]) -> list[Job]:
        """Return every combination of the choices in `overrides`; combinations that compose equal configurations count once."""
        jobs: dict[tuple[str, ...], Job] = {}
        combinations = list(itertools.product(*self.choices(overrides).values()))
        composed = [from_composed(self._compose(combination)) for combination in combinations]  # finds most mistakes, and is fast
        for combination, settings in zip(combinations, composed, strict=True):
            job = self._checked(len(jobs), combination, settings)
            runs = (override for override in combination if key_of(override) in ("resume", "rerun"))
            jobs.setdefault((job.config_hash, *runs), job)
        return list(jobs.values())

    def added(self, jobs: Sequence[Job], overrides: list[str]) -> list[Job]:
        """Return new jobs: the values of `overrides`, combined with the values that the other keys have in `jobs`.

        Args:
            jobs: The jobs that exist; a combination that composes the configuration of one is left out.
            overrides: The overrides of the command line.
        """
        choices = self.choices(overrides)
        hashes, seen = {job.config_hash for job in jobs}, {tuple(job.overrides) for job in jobs}
        added: list[Job] = []
        # An existing job with a value replaced keeps the order of its overrides, which decides what overrides what.
        for combination in itertools.product(*choices.values()):
            for job in jobs:
                values = {key_of(override): override for override in combination}
                changed = [values.pop(key_of(override), override) for override in job.overrides] + list(values.values())
                if tuple(changed) in seen:
                    continue
                seen.add(tuple(changed))
                new = self.job(jobs[-1].number + 1 + len(added), changed)
                if new.config_hash not in hashes:
                    hashes.add(new.config_hash)
                    added.append(new)
        return added

    def _checked(self, number: int, overrides: Sequence[str], settings: Settings) -> Job:
        check_repeats(settings, overrides)
        self._trial.try_out(settings, read_data=True)
        self._check(settings)
        return Job(number, list(overrides), settings.digest)

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        plain = {override: parsed for override in overrides if (parsed := _plain_value(override))}
        rest = tuple(override for override in overrides if override not in plain)
        if rest not in self._bases:
            self._bases[rest] = pickle.dumps(without_hydra(self._loader.load_sweep_config(self._composed, list(rest))))
        config: DictConfig = pickle.loads(self._bases[rest])
        try:
            for parsed in plain.values():
                OmegaConf.update(config, parsed.key_or_group, parsed.value(), merge=True)
        except OmegaConfBaseException:  # either invalid, which Hydra explains, or the order matters
            return without_hydra(self._loader.load_sweep_config(self._composed, list(overrides)))
        return config


@cache
def _plain_value(override: str) -> Override | None:
    """Return a parsed override if it only sets a key to a value, else None."""
    parsed = parse(override)
    key = parsed.key_or_group
    is_change = not (parsed.is_add() or parsed.is_force_add() or parsed.is_delete() or parsed.is_sweep_override())
    return parsed if is_change and parsed.package is None and key not in GROUPS and "/" not in key else None


def varied_keys(jobs: Iterable[Job]) -> list[str]:
    """Return the keys whose overrides differ between jobs, or are missing in some, in the order of the command line."""
    values: dict[str, set[str]] = {}
    jobs = list(jobs)
    counts = Counter(key_of(override) for job in jobs for override in job.overrides)
    for job in jobs:
        for override in job.overrides:
            values.setdefault(key_of(override), set()).add(override)
    return [key for key, seen in values.items() if len(seen) > 1 or counts[key] < len(jobs)]


def job_colors(jobs: Sequence[Job]) -> dict[int, str]:
    """Return the color of each job in charts, by number: the same for jobs that differ in the seed alone."""
    arms = {job.number: tuple(override for override in job.overrides if key_of(override) != "seed") for job in jobs}
    positions = {arm: position for position, arm in enumerate(dict.fromkeys(arms.values()))}
    return {number: COLORS[positions[arm] % len(COLORS)] for number, arm in arms.items()}


def latest_run_per_job(children: Iterable[RunRecord]) -> dict[int, RunRecord]:
    """Return the run of each job: the finished one, else the newest."""
    ordered = sorted(children, key=lambda child: (child.status == "FINISHED", child.started))
    return {child.job: child for child in ordered if child.job is not None}


def common_data(children: Iterable[RunRecord], varied: Sequence[str]) -> str | None:
    """Return the name of the data set that all finished runs have used, unless the sweep varies it."""
    names = {child.data for child in children if child.status == "FINISHED"}
    is_common = len(names) == 1 and not any(key.partition(".")[0] == "data" for key in varied)
    return name if is_common and re.fullmatch(r"\w+", name := names.pop()) else None


def result_of(result: JobReturn | None) -> Any:
    """Return the value or the exception that a launcher reports for a job.

    Hydra's public `return_value` raises the exception. tests/sweep/test_jobs.py fails if the private attribute changes.
    """
    return result._return_value if result else None  # noqa: SLF001  # see above


def failed(error: Exception) -> JobReturn:
    """Return the report of a job that failed with `error`."""
    result = JobReturn()
    result.return_value, result.status = error, JobStatus.FAILED
    return result


def failure_reason(result: JobReturn | None) -> str:
    """Return, in one line, the reason that a launcher reports for a failure, empty if there is none."""
    value = result_of(result)
    return str(value).splitlines()[0] if isinstance(value, BaseException) and str(value) else ""
