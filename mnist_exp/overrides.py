"""Overrides: parse them, and write them as commands."""

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain, product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mnist_exp.errors import UserError
from mnist_exp.paths import CONFIG_DIR, LOCATIONS, NAME, TRACKING, typed

# The parts of a phase, each a group in conf/, shared by all phases, each of which may choose its own. True: an option is called
# later, with further arguments, so that its file needs no `_partial_: true`.
PARTS = {"optimizer": True, "scheduler": True, "augmentation": False, "loss": False, "teacher": True, "callbacks": False}
GROUPS = {"data", "model", "phase", "experiment", "arm", *PARTS}  # the groups of a recipe in conf/
JOB_KEY = "sweep_job"  # the hidden key with which a sweep passes a context to its jobs


@cache
def parse(override: str) -> Override:
    """Return an override as parsed by Hydra; raises UserError."""
    try:
        return OverridesParser.create().parse_overrides([override])[0]
    except HydraException as error:
        raise not_an_override(override) from error


def not_an_override(text: str) -> UserError:
    """Return the error for text that Hydra cannot parse."""
    return UserError(
        f"{text!r} is no override: expected KEY=VALUE, without spaces around =, and with balanced quotes and brackets.",
        key=text,
        expected="KEY=VALUE",
        remedy="Write, for example, optimizer=adam. Quote a value with special characters twice: \"output_dir='a b'\".",
    )


def key_of(override: str) -> str:
    """Return the key of an override, or the group with its package (group@package)."""
    parsed = parse(override)
    return parsed.key_or_group if parsed.package is None else f"{parsed.key_or_group}@{parsed.package}"


def section_of(override: str) -> str:
    """Return the first part of the key of an override: `optimizer` of optimizer.lr=0.1."""
    return parse(override).key_or_group.partition(".")[0]


def text_of(override: str) -> str:
    """Return the value of an override as typed."""
    return (parse(override).input_line or "").partition("=")[2]


def choices(override: str) -> list[str]:
    """Return the overrides that a list of choices or a range stands for, the override itself if it has one value.

    Raises:
        UserError: It is an interval, or has no value.
    """
    parsed = parse(override)
    key = parsed.get_key_element()
    if not parsed.is_sweep_override():
        value = parsed.get_value_element_as_str()
        return [key if parsed.is_delete() and value == "null" else f"{key}={value}"]
    if not parsed.is_discrete_sweep():
        raise UserError(
            f"{override} is invalid: expected a list of choices, such as 0.1,0.2 or range(0,5). "
            "Intervals need hydra/sweeper=optuna."
        )
    found: list[str] = []
    with suppress(OmegaConfBaseException):  # of a range among other values
        found = [f"{key}={value}" for value in parsed.sweep_string_iterator()]
    if not found:
        raise UserError.invalid(key, text_of(override), "values such as 0,1,5, or one range that is not empty")
    return found


def combinations(grid: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the overrides of each job of a grid: every combination of the choices of its overrides."""
    by_key = {key_of(override): choices(override) for override in grid}
    return list(product(*by_key.values()))


def varied_keys(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Return the keys whose overrides differ between jobs, or are missing in some, in the order of the command line."""
    values: dict[str, list[str]] = defaultdict(list)
    for override in chain.from_iterable(jobs):
        values[key_of(override)].append(override)
    return [key for key, seen in values.items() if len(set(seen)) > 1 or len(seen) < len(jobs)]


def check_ids(overrides: Iterable[str]) -> None:
    """Raise UserError on an id that Hydra reads as a number: 1234e567 as infinity, 00123456 without its zeros."""
    for override in overrides:
        key, text = key_of(override), text_of(override)
        is_id = key in ("init", "resume", "rerun", "sweep.resume", "sweep.extend")
        ids = (text.split(",") if parse(override).is_sweep_override() else [text]) if is_id else []
        if any(isinstance(parse(f"{key}={item}").value(), int | float) for item in ids):
            quotes = ",".join(f"'{item}'" for item in ids)
            raise UserError.invalid(key, text, "an id that is not a number", f'Type it in quotes: "{key}={quotes}".')


def check_groups(overrides: Iterable[str]) -> None:
    """Raise UserError on a group that is set to null or to values that are no names: Hydra's own errors do not name it."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+").partition("@")[0] in GROUPS and (value == "null" or not _are_names(override, value)):
            raise UserError.invalid(
                key,
                value,
                "an option of its group, or a list of different ones",
                f"Leave the group out with ~{key}, or choose an option.",
            )


def _are_names(override: str, value: str) -> bool:
    """Return whether a list of options has names only, each once."""
    items = parse(override).value() if value.startswith("[") else []
    if not isinstance(items, list):
        return True
    return all(isinstance(item, str | QuotedString) for item in items) and len({str(item) for item in items}) == len(items)


def locations() -> list[str]:
    """Return the locations that the user typed, as overrides."""
    return [f"{key}={text}" for key, text in typed.items() if key != CONFIG_DIR]


def quoted(value: str) -> str:
    """Return a string in the form in which Hydra reads it from a command line, quoted if necessary."""
    if re.fullmatch(r"[\w/][\w/.:-]*", value, re.ASCII) and isinstance(parse(f"key={value}").value(), str):
        return value
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'").replace("${", "\\${")
    return f"'{escaped}'"


def command(module: str, *arguments: str) -> str:
    """Return the shell command that runs a module of this package, with the locations that the user typed."""
    if module == "run":
        repeated = [override for override in locations() if override not in arguments]
    else:
        options = [(option, f"{key}={typed[key]}") for key, option in LOCATIONS.items() if option and key in typed]
        repeated = [word for option, override in options for word in (option, str(parse(override).value()))]
    folder = [CONFIG_DIR, typed[CONFIG_DIR]] if CONFIG_DIR in typed else []
    tracking = [f"{TRACKING}={typed['tracking']}"] if "tracking" in typed and module != "run" else []
    return shlex.join([*tracking, "python", "-m", f"{NAME}.{module}", *arguments, *repeated, *folder])
