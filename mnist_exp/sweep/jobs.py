"""The jobs of a sweep: composed and validated before the first starts, and matched with their runs in the store."""

import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_exp.composing import from_composed, without_hydra
from mnist_exp.overrides import GROUPS, combinations, key_of, parse, varied_keys
from mnist_exp.settings import Settings, Trial, check_repeats
from mnist_exp.tracking.base import COLORS, RunRecord

JobResults = Mapping[int, JobReturn]


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Args:
        number: The position of the job in the sweep, from 0.
        overrides: The overrides that define the job.
        digest: The digest of the configuration that they compose, which identifies the job in the store.
    """

    number: int
    overrides: list[str]
    digest: str


class Composer:
    """Composes jobs as Hydra does, but faster if they differ in plain values only.

    Hydra takes a fifth of a second for each job, too long to find a mistake in the last of hundreds.
    """

    def __init__(self, loader: ConfigLoader, composed: DictConfig, *, needs_validation: bool) -> None:
        self._loader, self._composed, self._needs_validation = loader, composed, needs_validation
        self._bases: dict[tuple[str, ...], bytes] = {}  # pickled: copies of a configuration take four times as long
        self._trial = Trial()

    def job(self, number: int, overrides: Sequence[str]) -> Job:
        """Return a job, composed and checked; raises UserError."""
        settings = self.settings(overrides)
        self._check_job(settings, overrides)
        return Job(number, list(overrides), settings.digest())

    def settings(self, overrides: Sequence[str]) -> Settings:
        """Return the settings that overrides compose; raises UserError."""
        return from_composed(self._compose(overrides))

    def write_out(self, overrides: list[str]) -> list[str]:
        """Return overrides with globs resolved against conf/ and shuffled choices in their order."""
        written = []
        for override in OverridesParser.create(config_loader=self._loader).parse_overrides(overrides):
            value = override.value()
            if isinstance(value, Glob) or getattr(value, "shuffle", False):
                written.append(f"{override.get_key_element()}={','.join(override.sweep_string_iterator())}")
            else:
                written.append(str(override.input_line))
        return written

    def grid(self, grids: Sequence[Sequence[str]]) -> list[Job]:
        """Return every combination of the choices in each grid; combinations that compose equal configurations count once."""
        jobs: dict[str, Job] = {}
        combined = list(dict.fromkeys(combination for grid in grids for combination in combinations(grid)))
        varied = varied_keys(combined)
        composed = [self.settings(combination) for combination in combined]  # finds most mistakes, and is fast
        for combination, settings in zip(combined, composed, strict=True):
            self._check_job(settings, combination)
            digest = settings.digest(varied, combination)
            jobs.setdefault(digest, Job(len(jobs), list(combination), digest))
        return list(jobs.values())

    def _check_job(self, settings: Settings, overrides: Sequence[str]) -> None:
        check_repeats(settings, overrides)
        self._trial.try_out(settings, read_data=True, needs_validation=self._needs_validation)

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


def job_colors(jobs: Sequence[Job]) -> dict[int, str]:
    """Return the color of each job in charts, by number: the same for jobs that differ in the seed alone."""
    arms = {job.number: tuple(override for override in job.overrides if key_of(override) != "seed") for job in jobs}
    positions = {arm: position for position, arm in enumerate(dict.fromkeys(arms.values()))}
    return {number: COLORS[positions[arm] % len(COLORS)] for number, arm in arms.items()}


def common_data(children: Iterable[RunRecord], varied: Sequence[str]) -> str | None:
    """Return the name of the data set that all finished runs have used, unless the sweep varies it."""
    names = {child.data for child in children if child.status == "FINISHED" and child.job is not None}
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
