"""What a sweep consists of, as its parent run keeps it: enough to go on with it and to compare its jobs."""

import json
from dataclasses import asdict, dataclass

from mnist_exp.overrides import check_stored


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its number, its overrides, and the digest of the configuration that they compose."""

    number: int
    overrides: list[str]
    config_hash: str


@dataclass(frozen=True)
class Definition:
    """A sweep as it was begun; software: what decides the outcome beside the configuration, from `provenance.software`."""

    sweeper: str
    total: int
    overrides: list[str]
    software: dict[str, str]
    jobs: list[Job]

    def as_json(self) -> str:
        """Return the definition as text."""
        return json.dumps(asdict(self), indent=1)


def parse_definition(text: str | bytes, source: str) -> Definition | None:
    """Return the definition that `text`, read from `source`, holds; None where it holds none.

    Raises UserError where it holds overrides that must not come out of a store.
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
