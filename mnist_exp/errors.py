"""The exceptions whose message is the whole answer to the user."""


class UserError(Exception):
    """A problem that the user can fix. The message names the key, its value, the expectation, and the remedy."""


class ResumableError(UserError):
    """A problem outside the run, such as a disk or a store: the run can be resumed once it is fixed."""


class PrunedError(UserError):
    """A search stopped this run early because others perform better."""
