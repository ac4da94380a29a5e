"""Mistakes of the user: the exceptions, and the types of arguments that a mistake violates."""

from enum import Enum
from typing import Annotated, Self

from annotated_types import Ge, Gt, Interval, MinLen


class Mark(Enum):
    """Marks of annotations: arguments that do not affect the results of a run, and are no part of its digest."""

    LOCATION = "the place of data, which are only read; a resumed or repeated run looks there first"
    DOWNLOAD = "a folder that data are downloaded to; never taken from a record"
    LIMIT = "a limit that a value must not exceed"


# Types of arguments. `nodes.build` checks the arguments of a node against the annotations of its target.
Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]
Share = Annotated[float, Interval(ge=0, le=1)]
Location = Annotated[str, MinLen(1), Mark.LOCATION]
DownloadFolder = Annotated[str, MinLen(1), Mark.DOWNLOAD]
ParameterLimit = Annotated[Count | None, Mark.LIMIT]


class UserError(Exception):
    """A problem that the user can fix. Its text is the whole answer: the problem, and the remedy.

    Attributes:
        key: The key or the option that is wrong, such as `optimizer.lr` or `--port`; empty if no single one is.
        value: Its value.
        expected: The values that are allowed, empty if unknown.
        remedy: The sentence that says what to do, empty without one.
    """

    def __init__(self, problem: str, *, key: str = "", value: object = None, expected: str = "", remedy: str = "") -> None:
        super().__init__(f"{problem} {remedy}".rstrip())
        self.key, self.value, self.expected, self.remedy = key, value, expected, remedy

    @classmethod
    def invalid(cls, key: str, value: object, expected: str, remedy: str = "") -> Self:
        """Return the error for a wrong value: `KEY=VALUE is invalid: expected EXPECTED. REMEDY`."""
        separator = " " if key.startswith("--") else "="
        problem = f"{key}{separator}{value} is invalid: expected {expected}."
        return cls(problem, key=key, value=value, expected=expected, remedy=remedy)


class MissingDataError(UserError):
    """The images of a data set are not on this machine, or cannot be read."""


class ResumableError(UserError):
    """A problem outside the run, such as a disk or a store: the run can be resumed once it is fixed."""


class DivergedError(UserError):
    """The loss, the weights or the outputs of the network became NaN or infinite."""


class PrunedError(UserError):
    """A search stopped this run early because others perform better."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
