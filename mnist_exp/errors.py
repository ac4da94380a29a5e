"""The one exception whose message is all that the user gets to see."""


class UserError(Exception):
    """Something the user can put right: names the key, its value, what is allowed, and the remedy."""
