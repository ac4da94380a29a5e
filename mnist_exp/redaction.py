"""Masks credentials in all records and output."""

import os
import re
from typing import Any
from urllib.parse import quote

MASK = "***"
SECRET_NAMES = ("PASSWORD", "TOKEN", "SECRET", "KEY")  # in the names of environment variables
SHORTEST_SECRET = 6  # shorter values would mask ordinary words
# user@ or user:password@ after ://. A password may contain slashes (SQLAlchemy) and @ (http), so it extends to the last @ of the
# word: masking an address whose path contains an @ is better than showing a password.
_USER_PART = re.compile(r"(?<=://)(?:[^/\s\"@:]*:[^\s\"]*|[^/\s\"@:?#]+)@")


def redact(text: str) -> str:
    """Return `text` without the user part of any URL and without the values of secret environment variables."""
    for secret in _secrets():
        text = text.replace(secret, MASK)
    return _USER_PART.sub(f"{MASK}@", text)


def redact_all(value: Any) -> Any:
    """Return nested dicts, lists and tuples with every string in them redacted, including keys."""
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
    """Return whether `redact` changes `uri`."""
    return redact(uri) != uri


def _secrets() -> list[str]:
    """Return the values to mask, also percent-encoded, the longest first because one may contain another."""
    named = (value for name, value in os.environ.items() if any(word in name.upper() for word in SECRET_NAMES))
    parts = {part for value in named for part in (value, value.strip(), *value.splitlines())}  # a patch prefixes each line
    secrets = {form for part in parts if len(part) >= SHORTEST_SECRET for form in (part, quote(part, safe=""))}
    return sorted(secrets, key=len, reverse=True)
