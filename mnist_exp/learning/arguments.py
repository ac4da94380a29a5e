"""Checks of the arguments of constructors."""

from collections.abc import Sequence
from typing import TypeGuard

from mnist_exp.errors import ArgumentError


def require(valid: bool, name: str, value: object, expected: str) -> None:
    """Raise ArgumentError unless `valid`.

    Args:
        valid: Whether the value is allowed.
        name: Name of the argument.
        value: Its value.
        expected: The values that are allowed.
    """
    if not valid:
        raise ArgumentError(name, value, expected)


def is_integer(value: object, least: int) -> bool:
    """Return whether `value` is an integer of at least `least` that fits into 31 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def is_number(value: object, low: float, high: float = 1e30) -> bool:
    """Return whether `value` is a finite number from `low` to `high`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def is_sequence(value: object) -> TypeGuard[Sequence[object]]:
    """Return whether `value` is a list or another sequence, but no text."""
    return isinstance(value, Sequence) and not isinstance(value, str)
