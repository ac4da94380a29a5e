"""The definition of a sweep, which its parent run stores, and the context that it sets for each job."""

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mnist_exp.errors import UserError
from mnist_exp.overrides import JOB_KEY, check_stored, key_of, quoted, text_of


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Args:
        number: The number of the job, from 0.
        overrides: The overrides that define the job.
        config_hash: The digest of the configuration that they compose.
    """

    number: int
    overrides: list[str]
    config_hash: str


@dataclass(frozen=True)
class JobContext:
    """What a job knows of its sweep. It travels as the value of the hidden override `+sweep_job=...`.

    Args:
        sweep_id: The id of the parent.
        number: The number of the job.
        color: The color of the job in charts, `#RRGGBB`.
        varied: The keys that differ between jobs.
        data: The data set of the finished jobs, None if they differ.
        in_search: Whether a search proposed the job, and may stop it.
    """

    sweep_id: str
    number: int
    color: str
    varied: list[str]
    data: str | None
    in_search: bool

    def as_override(self) -> str:
        """Return the override that carries the context to the job."""
        return f"+{JOB_KEY}={quoted(json.dumps(asdict(self)))}"


def parse_job_context(values: str | dict[str, Any]) -> JobContext:
    """Return a context from the value of its override, or from its stored fields; raises UserError."""
    adapter = TypeAdapter(JobContext)
    try:
        context = adapter.validate_json(values) if isinstance(values, str) else adapter.validate_python(values)
    except ValidationError as error:
        raise UserError(f"{JOB_KEY} is invalid: expected the context that a sweep sets for its jobs.") from error
    if not re.fullmatch("[0-9a-f]{32}", context.sweep_id) or not re.fullmatch("#[0-9A-Fa-f]{6}", context.color):
        raise UserError(f"{JOB_KEY} is invalid: expected the id of a sweep and a color such as #0072B2.")
    return context


@dataclass(frozen=True)
class Extension:
    """Jobs that were added to a sweep after its start.

    Args:
        time: The date and time, ISO 8601 in UTC.
        overrides: The overrides of the command line that added them.
        first: The number of the first added job.
        count: The number of added jobs.
    """

    time: str
    overrides: list[str]
    first: int
    count: int


@dataclass(frozen=True)
class Definition:
    """A sweep as it was started and extended.

    Args:
        sweeper: The name of the class that proposes the jobs.
        total: The number of jobs, including those that a search has not proposed yet.
        overrides: The overrides of the command line.
        software: The versions that affect the outcome, from `provenance.software`.
        jobs: The jobs that are defined so far.
        extensions: The steps in which jobs were added.
    """

    sweeper: str
    total: int
    overrides: list[str]
    software: dict[str, str]
    jobs: list[Job]
    extensions: list[Extension] = field(default_factory=list)

    @property
    def initial(self) -> frozenset[int]:
        """The numbers of the jobs that were defined before the first one started."""
        first = min((extension.first for extension in self.extensions), default=self.total)
        return frozenset(job.number for job in self.jobs if job.number < first)

    @property
    def all_overrides(self) -> list[str]:
        """The overrides of the command line, of the jobs and of the extensions, each once."""
        jobs = (override for job in self.jobs for override in job.overrides)
        added = (override for extension in self.extensions for override in extension.overrides)
        return list(dict.fromkeys([*self.overrides, *jobs, *added]))

    def as_json(self) -> str:
        """Return the definition as text."""
        return json.dumps(asdict(self), indent=1)


def storable(name: str) -> str:
    """Return a name for a parameter or a metric without the characters that MLflow refuses."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def sweep_params(definition: Definition) -> dict[str, str]:
    """Return the parameters of a sweep's parent: the sweeper, the values of each key, and what was added.

    None has the name of a run's parameter: grouping runs by `model` must not find the parent. A parameter cannot change, so
    extensions have their own.
    """
    steps = {"sweep": definition.overrides}
    steps |= {f"extension{number}": step.overrides for number, step in enumerate(definition.extensions, start=1)}
    params = {f"{step}.{key_of(item)}": text_of(item) or item for step, overrides in steps.items() for item in overrides}
    return {"sweep.sweeper": definition.sweeper} | {storable(key): value for key, value in params.items()}


def parse_definition(text: str | bytes, source: str) -> Definition | None:
    """Return the definition in `text`, which was read from `source`, or None if it contains none.

    Raises:
        UserError: An override is not allowed in a store.
    """
    try:
        definition = TypeAdapter(Definition).validate_json(text)
    except ValidationError:
        return None
    numbers = [job.number for job in definition.jobs]
    if len(set(numbers)) != len(numbers) or any(number < 0 for number in numbers):
        return None
    check_stored(definition.all_overrides, source)
    return definition
