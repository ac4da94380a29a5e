"""The exceptions whose message is the whole answer to the user."""


class UserError(Exception):
    """A problem that the user can fix. The message names the key, its value, the expectation, and the remedy."""


class ResumableError(UserError):
    """A problem outside the run, such as a disk or a store: the run can be resumed once it is fixed."""


class PrunedError(UserError):
    """A search stopped this run early because others perform better."""


class ArgumentError(UserError):
    """An argument of a constructor is invalid.

    Args:
        name: Name of the argument. `config.build` puts the key of its node before it.
        value: Its value.
        expected: The values that are allowed.
    """

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"{name}={value} is invalid: expected {expected}.")
        self.name, self.value, self.expected = name, value, expected

    def within(self, key: str) -> "ArgumentError":
        """Return the same error with `key` before the name of the argument."""
        return ArgumentError(f"{key}.{self.name}", self.value, self.expected)
