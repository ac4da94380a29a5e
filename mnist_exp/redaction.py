"""Keep credentials out of everything that is recorded or printed."""

import os
import re
from typing import Any
from urllib.parse import quote

MASK = "***"
SECRET_NAMES = ("PASSWORD", "TOKEN", "SECRET", "KEY")  # in the names of environment variables
SHORTEST_SECRET = 6  # shorter values would mask ordinary words
# user@ or user:password@ behind ://. A password may hold slashes (SQLAlchemy) and @ (http), so that the last @ of the word ends
# it: rather mask an address whose path holds an @ than let a password through.
_USER_PART = re.compile(r"(?<=://)(?:[^/\s\"@:]*:[^\s\"]*|[^/\s\"@:?#]+)@")


def redact(text: str) -> str:
    """Return `text` without the user part of any URL and without the values of secret environment variables."""
    for secret in _secrets():
        text = text.replace(secret, MASK)
    return _USER_PART.sub(f"{MASK}@", text)


def redact_all(value: Any) -> Any:
    """Return nested dicts, lists and tuples with every string in them redacted, keys included; all else stays as it is."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact_all(key): redact_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact_all(item) for item in value)
    return value


def without_credentials(uri: str) -> str:
    """Return `uri` without its user part."""
    return _USER_PART.sub("", uri)


def has_credentials(uri: str) -> bool:
    """Return whether `uri` holds something that is masked where it is recorded."""
    return redact(uri) != uri


def _secrets() -> list[str]:
    """Return the values to mask, the longest first, so that none hides a part of another; as they are and percent-encoded."""
    named = (value for name, value in os.environ.items() if any(word in name.upper() for word in SECRET_NAMES))
    secrets = {form for value in named if len(value) >= SHORTEST_SECRET for form in (value, quote(value, safe=""))}
    return sorted(secrets, key=len, reverse=True)
