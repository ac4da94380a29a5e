"""The exceptions whose message is all that the user gets to see."""


class UserError(Exception):
    """Something the user can put right: names the key, its value, what is allowed, and the remedy."""


class ResumableError(UserError):
    """Something beside the run failed, a disk or a store: the run can go on once that is put right."""


class PrunedError(UserError):
    """A search has stopped this run early, because others do better."""
