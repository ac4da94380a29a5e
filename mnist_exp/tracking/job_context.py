"""The context that a sweep sets for each of its jobs."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mnist_exp.errors import UserError
from mnist_exp.overrides import JOB_KEY, quoted


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
