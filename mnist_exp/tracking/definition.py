"""The definition of a sweep, which its parent run stores, and the context that it sets for each job."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from mnist_exp.errors import UserError
from mnist_exp.overrides import JOB_KEY, check_stored, quoted
from mnist_exp.redaction import redact_all


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
    from pydantic import TypeAdapter, ValidationError

    adapter = TypeAdapter(JobContext)
    try:
        context = adapter.validate_json(values) if isinstance(values, str) else adapter.validate_python(values)
    except ValidationError as error:
        raise UserError(f"{JOB_KEY} is invalid: expected the context that a sweep sets for its jobs.") from error
    if not re.fullmatch("[0-9a-f]{32}", context.sweep_id) or not re.fullmatch("#[0-9A-Fa-f]{6}", context.color):
        raise UserError(f"{JOB_KEY} is invalid: expected the id of a sweep and a color such as #0072B2.")
    return context


@dataclass(frozen=True)
class Definition:
    """A sweep as it was started.

    Args:
        sweeper: The name of the class that proposes the jobs.
        total: The number of jobs, including those that a search has not proposed yet.
        overrides: The overrides of the command line.
        software: The versions that affect the outcome, from `provenance.software`.
        jobs: The jobs that are defined so far.
    """

    sweeper: str
    total: int
    overrides: list[str]
    software: dict[str, str]
    jobs: list[Job]

    def as_json(self) -> str:
        """Return the definition as text, with credentials masked."""
        return json.dumps(redact_all(asdict(self)), indent=1)


def parse_definition(text: str | bytes, source: str) -> Definition | None:
    """Return the definition in `text`, which was read from `source`, or None if it contains none.

    Raises:
        UserError: An override is not allowed in a store.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        definition = TypeAdapter(Definition).validate_json(text)
    except ValidationError:
        return None
    numbers = [job.number for job in definition.jobs]
    if len(set(numbers)) != len(numbers) or any(number < 0 for number in numbers):
        return None
    unique = dict.fromkeys([*definition.overrides, *(override for job in definition.jobs for override in job.overrides)])
    check_stored(unique, source)
    return definition
