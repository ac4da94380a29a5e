"""The nodes of a configuration, which call a `_target_`: allow, check and build them."""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError

from mnist_exp.errors import Mark, UserError
from mnist_exp.overrides import GROUPS, PARTS, key_of, text_of
from mnist_exp.paths import CONFIG_DIR, LOCATIONS, NAME, config_dirs, take_credentials, typed

RESERVED = ("_target_", "_partial_")  # keys of a node that are no arguments
CHECKED = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every node of a configuration, dicts and lists included."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        inner = f"{path}.{key}" if path else str(key)
        yield inner, value
        if isinstance(value, dict | list):
            yield from walk(value, inner)


def check_nodes(config: Mapping[str, Any]) -> None:
    """Raise UserError on a target that no file of its group names at its place, or on text that Hydra would resolve again.

    The options of a part of a phase may contain each other, as those of an augmentation that composes others.
    """
    for key, value in walk(config):
        if isinstance(value, str) and "${" in value:
            raise UserError.invalid(key, value, "a plain value, without ${...}")
        if key.endswith("_target_"):
            place = _place(key)
            group = place.partition(".")[0]
            places = {place, f"{group}._target_"} if group in PARTS else {place}
            if not {(allowed, str(value)) for allowed in places} & targets(tuple(config_dirs())):
                raise UserError.invalid(
                    key,
                    value,
                    f"a target that a file of conf/{group}/ names at this place",
                    f"Write it into a file, conf/{group}/NAME.yaml, and choose {group}=NAME. If the file is in another folder, "
                    f"add {CONFIG_DIR} FOLDER.",
                )


def _place(key: str) -> str:
    """Return the dotted key of a node from its group on: optimizer._target_, for phases.train.optimizer._target_."""
    first, *rest = key.split(".")
    if first != "phases":
        return key
    return ".".join(rest[1:] if len(rest) > 2 and rest[1] in PARTS else ["phase", *rest[1:]])


@cache
def targets(folders: tuple[Path, ...]) -> set[tuple[str, str]]:
    """Return the place and the name of each target in the files of options."""
    found = set()
    nodes = {*PARTS, "data", "model", "tracking"}
    for folder, group in ((folder, group) for folder in folders for group in {"", "local", *GROUPS, *nodes}):
        for file in (folder / group).glob("*.yaml"):
            try:
                content = yaml.load(file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}  # safe, in C
                prefix = "phases.any." if group == "phase" else f"{group}." if group in nodes else ""
                found |= {(_place(prefix + key), str(value)) for key, value in walk(content) if key.endswith("_target_")}
            except (yaml.YAMLError, TypeError) as error:
                raise UserError(f"{file} is not valid YAML: {error}.", key=str(file), remedy="Correct it, or move it.") from error
    return found


def build(node: Mapping[str, Any], key: str, **arguments: Any) -> Any:
    """Check the arguments of the node `key` against the annotations of its target, and call it; raises UserError.

    Args:
        node: The node.
        key: Its key, for messages.
        arguments: Further arguments of the call.
    """
    check_arguments(node, key)
    for name in arguments.keys() & node.keys():
        raise UserError.invalid(f"{key}.{name}", node[name], "no value: the run passes it", "Leave it out.")
    return _instantiate(node, key, arguments)


def _instantiate(value: Any, key: str, arguments: Mapping[str, Any]) -> Any:
    """Return a value with all nodes in it called: as Hydra's `instantiate`, which takes 10 ms and resolves text again.

    An option that is called later, as `PARTS` says, or a node with `_partial_`, becomes a function with the arguments bound.
    """
    if isinstance(value, list):
        return [_instantiate(item, key, {}) for item in value]
    if not isinstance(value, dict):
        return value
    built = {name: _instantiate(item, f"{key}.{name}", {}) for name, item in value.items() if name not in RESERVED}
    if "_target_" not in value:
        return built
    function = partial(_target(value, key), **built, **arguments)
    part = re.fullmatch(r"(?:phases\.\w+\.)?(\w+)", key)
    return function if value.get("_partial_") or (part and PARTS.get(part[1])) else call(function, value, key)


def call(function: Callable[..., Any], node: Mapping[str, Any], key: str, *values: Any, **named: Any) -> Any:
    """Call what a node stands for; raises UserError."""
    try:
        return function(*values, **named)
    except UserError as error:
        if not error.key:
            raise
        raise type(error).invalid(f"{key}.{error.key}", error.value, error.expected, error.remedy) from error
    except Exception as error:  # torch and extensions raise exceptions of any kind
        arguments = ", ".join(f"{name}={value}" for name, value in node.items() if name[0] != "_" and not isinstance(value, dict))
        raise UserError(
            f"{key} cannot be built: {node['_target_']} refuses {arguments or 'its arguments'}: {error}.",
            key=key,
            value=dict(node),
            remedy=f"Change an argument with {key}.ARGUMENT=VALUE.",
        ) from error


def check_arguments(node: Mapping[str, Any], key: str) -> None:
    """Raise UserError unless the node `key` and all nodes in it have arguments that their targets accept."""
    _check_node(node, key)
    for name, value in walk(node):
        if isinstance(value, dict) and "_target_" in value:
            _check_node(value, f"{key}.{name}")


def _check_node(node: Mapping[str, Any], key: str) -> None:
    """Check the arguments of a single node, by name and by annotation."""
    target = _target(node, key)
    arguments = {name: value for name, value in node.items() if name not in RESERVED}
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # written in C
        return
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        known = [name for name, item in parameters.items() if name in arguments or item.default is not item.empty]
        for name in arguments.keys() - parameters.keys():
            raise unknown_key(f"{key}.{name}", known, f"an argument of {node['_target_']}")
    plain = {name: value for name, value in arguments.items() if not _has_target(value)}
    if model := _arguments_model(target, tuple(plain)):
        try:
            model.model_validate_json(json.dumps(plain))
        except ValidationError as error:
            raise explain(error, key) from error


@cache
def _arguments_model(target: Any, names: tuple[str, ...]) -> type[BaseModel] | None:
    """Return the model of some arguments of a target, None if its annotations mean nothing to pydantic."""
    try:
        hints = _hints(target)
        fields: dict[str, Any] = {f"field_{name}": (hints.get(name, Any), Field(alias=name)) for name in names}
        return create_model("Arguments", __config__=CHECKED, **fields)
    except (NameError, TypeError, PydanticUserError):
        return None


def _hints(target: Any) -> dict[str, Any]:
    return get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)


def marked(node: Mapping[str, Any], key: str, *marks: Mark) -> list[str]:
    """Return the arguments of a node's target whose annotations have one of the marks, in their order."""
    try:
        hints = _hints(_target(node, key))
    except (NameError, TypeError):  # annotations that mean nothing, or a target that is written in C
        return []
    return [name for name, hint in hints.items() if any(_has_mark(hint, mark) for mark in marks)]


def _has_mark(hint: Any, mark: Mark) -> bool:
    return mark in getattr(hint, "__metadata__", ()) or any(_has_mark(item, mark) for item in get_args(hint))


def defaults_of(node: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the defaults of a node's arguments if its target is ours: conf/ writes out all of them."""
    if not str(node.get("_target_")).startswith(f"{NAME}."):
        return {}
    parameters = inspect.signature(_target(node, key)).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}


def is_location(override: str) -> bool:
    """Return whether an override sets a location: of runs, of the store, or of data, where a download goes included."""
    key = key_of(override)
    group, _, name = key.partition(".")
    return key in LOCATIONS or group == "tracking" or (group == "data" and name in _data_locations(tuple(config_dirs())))


def remember_locations(overrides: Iterable[str], config_dir: str | None) -> None:
    """Note the locations of a command line, which printed commands repeat; raises UserError on a folder that does not exist.

    Args:
        overrides: The overrides of the command line.
        config_dir: The folder of --config-dir, None without one.
    """
    typed.clear()
    if config_dir:
        if not Path(config_dir).is_dir():
            raise UserError.invalid(CONFIG_DIR, config_dir, "a folder that exists")
        typed[CONFIG_DIR] = config_dir
    typed.update({key_of(override): take_credentials(text_of(override)) for override in overrides if is_location(override)})


@cache
def _data_locations(folders: tuple[Path, ...]) -> set[str]:
    """Return the names of the arguments that say where data lie, of all data sets in the files of options."""
    names: set[str] = set()
    for place, target in targets(folders):
        if place == "data._target_":
            try:
                names.update(marked({"_target_": target}, "data", Mark.LOCATION, Mark.DOWNLOAD))
            except UserError:  # its package is not installed; a run that chooses it says so
                continue
    return names


def _target(node: Mapping[str, Any], key: str) -> Any:
    module, _, name = str(node["_target_"]).rpartition(".")
    try:
        found = getattr(import_module(module), name)
        if not callable(found):
            raise ValueError(f"{name} cannot be called")
        return found
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError.invalid(
            f"{key}._target_",
            node["_target_"],
            "a class or function that can be imported",
            f"{error}. Correct the name, or install its package.",
        ) from error


def _has_target(value: Any) -> bool:
    return isinstance(value, dict | list) and any(key.endswith("_target_") for key, _ in walk(value))


def explain(error: ValidationError, prefix: str = "", known: Iterable[str] = ()) -> UserError:
    """Return pydantic's first error as the message for the user.

    Args:
        error: The error.
        prefix: The key of the node that was checked.
        known: The keys that are allowed where one is unknown.
    """
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"]]
    names = [part for part in parts if re.fullmatch(r"\w+", part) and part not in ("int", "float")]  # not branches of unions
    key = ".".join(filter(None, [prefix, *names]))
    if first["type"] == "extra_forbidden":
        return unknown_key(key, known, "a key of the configuration")
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        return UserError.invalid(key.rpartition(".")[0], first["input"], "more values in the list")
    if first["type"] == "missing":
        return UserError(f"{key} is missing.", key=key, expected="a value", remedy=f"Set it, or do not delete it (~{key}).")
    expected = re.sub(r"^\w+ (should (be|have)|is not) ", "", first["msg"])
    expected = f"a number {expected}" if expected.startswith(("greater", "less")) else expected
    return UserError.invalid(key, first["input"], expected, f"Set it with {key}=... on the command line.")


def unknown_key(key: str, known: Iterable[str], kind: str) -> UserError:
    """Return the error for a key that is none of the known ones; kind: what it should be, with its article."""
    expected = f"one of {', '.join(sorted(known))}" if known else "none"
    hint = did_you_mean(key.rpartition(".")[2], known)
    return UserError(f"{key} is not {kind}{hint}: expected {expected}.", key=key, expected=expected)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean ...?)' with the known word closest to `word`, or an empty text."""
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
