"""The definition of a sweep, which its parent run stores: enough to resume the sweep and to compare its jobs."""

import json
from dataclasses import asdict, dataclass

from mnist_exp.overrides import check_stored
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
