"""The composed configuration: resolve it to plain values, validate it, and instantiate its nodes."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import cache
from importlib import import_module
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_exp import HOME
from mnist_exp.errors import ArgumentError, UserError
from mnist_exp.learning.arguments import is_integer
from mnist_exp.overrides import NEUTRAL, PARTS, RECIPE, key_of, typed_ids
from mnist_exp.redaction import without_credentials

OmegaConf.register_new_resolver("root", lambda path: str(HOME / path), replace=True)
OmegaConf.register_new_resolver("without_credentials", without_credentials, replace=True)
OmegaConf.register_new_resolver("scaled", lambda value, at, to: value * to / at, replace=True)

KEYS = RECIPE | {"output_dir", "parameter_limit", "save_every", "resume", "rerun", "sweep", "plan", "tracking", "shape"}
SECTIONS = {  # the keys of the parts that only sweeps use
    "sweep": {"resume", "extend", "on_failure", "retries", "dry_run", "force"},
    "plan": {"factor", "baseline", "metric", "margin", "seeds"},
}
NULLABLE = {"parameter_limit", "save_every", "resume", "rerun"}
# The phases require their own parts. The shape of the data is not in conf/: a run adds it to the configuration that it stores.
REQUIRED = KEYS - {*PARTS, "shape"}

# The allowed targets of each part of the configuration. One name in one module: torch.os.system must not be reachable.
TARGETS = {
    "data": r"mnist_exp\.learning\.datasets\.load_\w+",
    "model": r"(mnist_exp\.learning\.models|torch\.nn)\.[A-Z]\w*",
    "optimizer": r"mnist_exp\.learning\.optim\.[a-z]\w*|torch\.optim\.[A-Z]\w*",
    "scheduler": r"mnist_exp\.learning\.optim\.[a-z]\w*|torch\.optim\.lr_scheduler\.[A-Z]\w*",
    "augmentation": r"mnist_exp\.learning\.augmentation\.[A-Z]\w*",
    "teacher": r"mnist_exp\.experiment\.teachers\.[a-z]\w*",
    "tracking": r"mnist_exp\.tracking\.(base|mlflow_store)\.[A-Z]\w*Store",
    "phase": r"mnist_exp\.learning\.training\.PhaseConfig",
}
# The keys where a target may be. Hydra would call one anywhere, before the node around it.
_PART = "|".join(PARTS)
TARGET_KEY = re.compile(rf"(?:phases\.\w+\.)?({_PART})\._target_|(phase)s\.\w+\._target_|(data|tracking)\._target_|(model)\..*")


def _integer(least: int) -> Callable[[Any], bool]:
    return lambda value: is_integer(value, least)


def _number(valid: Callable[[float], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 and valid(value)

    return check


def _one_of(*allowed: str | None) -> Callable[[Any], bool]:
    return lambda value: (value is None or isinstance(value, str)) and value in allowed


def check_margin(key: str, value: Any) -> None:
    """Raise UserError unless `value` is a positive number or None."""
    if value is not None and not _number(lambda number: number > 0)(value):
        raise UserError(f"{key}={value} is invalid: expected a number > 0, in the displayed unit of the metric, or null.")


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _run_id(value: Any) -> bool:
    return bool(re.fullmatch("latest|[0-9a-f]{6,32}", str(value)))


def _one_run(value: Any) -> bool:
    return _run_id(value) and value != "latest"


def _different_runs(value: Any) -> bool:
    runs = isinstance(value, list) and bool(value) and all(isinstance(run, str) and _one_run(run) for run in value)
    return runs and len(set(value)) == len(value)


def _scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _shape(value: Any) -> bool:
    names = {"classes", "side", "in_channels"}
    return isinstance(value, dict) and value.keys() == names and all(map(_integer(1), value.values()))


def _two_fractions(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number(lambda item: 0 <= item < 1), value))


def _or_null(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or valid(value)


TRUE_OR_FALSE = (lambda value: isinstance(value, bool), "true or false")
# pattern of the key: (check, expectation)
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_integer(0), "an integer >= 0"),
    "precision": (_one_of("auto", "fp32", "bf16", "fp16"), "auto, fp32, bf16 or fp16"),
    "device": (_one_of("auto", "cpu", "cuda", "mps"), "auto, cpu, cuda or mps"),
    "output_dir": (_text, "a folder"),
    "save_every": (_or_null(_integer(1)), "an integer >= 1 (steps), or null"),
    "resume": (_or_null(_run_id), "the id of a run, or a prefix of at least 6 hexadecimal digits, latest, or null"),
    "rerun": (_or_null(_one_run), "the id of a run, or a prefix of at least 6 hexadecimal digits, or null"),
    "sweep.resume": (_or_null(_run_id), "the id of a sweep, or a prefix of at least 6 hexadecimal digits, latest, or null"),
    "sweep.extend": (_or_null(_run_id), "the id of a sweep, or a prefix of at least 6 hexadecimal digits, latest, or null"),
    "sweep.on_failure": (_one_of("continue", "stop"), "continue or stop"),
    "sweep.retries": (_integer(0), "an integer >= 0"),
    "sweep.force": TRUE_OR_FALSE,
    "sweep.dry_run": TRUE_OR_FALSE,
    "plan.factor": (_or_null(_text), "a key that the sweep varies, or null"),
    "plan.baseline": (_or_null(_scalar), "a value of plan.factor, or null"),
    "plan.metric": (_or_null(_text), "the name of a metric, such as test/accuracy, or null"),
    "plan.margin": (
        _or_null(_number(lambda value: value > 0)),
        "a number > 0, in the displayed unit of the metric, or null",
    ),
    "plan.seeds": (_or_null(_integer(2)), "an integer >= 2, or null"),
    "parameter_limit": (_or_null(_integer(1)), "an integer >= 1, or null for no limit"),
    "batch_size": (_integer(1), "an integer >= 1"),
    "*teacher.runs": (
        _different_runs,
        "a list of different ids of finished runs, or of prefixes of at least 6 hexadecimal digits",
    ),
    "shape": (_shape, "the classes, side and in_channels of the data, as a run stores them"),
    "tracking.uri": (_text, "sqlite:////path.db, or http(s)://host:port of an MLflow server"),
    "tracking.patience": (_number(lambda value: value >= 0), "a number of seconds >= 0"),
    "tracking.experiment": (_text, "the name of an MLflow experiment"),
}
# The arguments of torch's own optimizers and schedulers. Ours check themselves.
TORCH_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_number(lambda value: value > 0), "a number > 0"),
    "weight_decay": (_number(lambda value: value >= 0), "a number >= 0"),
    "momentum": (_number(lambda value: 0 <= value < 1), "a number >= 0 and < 1"),
    "betas": (_two_fractions, "two numbers >= 0 and < 1"),
    "gamma": (_number(lambda value: 0 < value <= 1), "a number > 0 and <= 1"),
}
# The arguments that each part gets when it is called: by position, by name.
CALLS: dict[str, tuple[int, tuple[str, ...]]] = {
    "data": (0, ("seed",)),
    "optimizer": (1, ()),
    "scheduler": (1, ("total_steps",)),
    "teacher": (2, ()),
}
TRIAL_STEPS = 1000  # of the schedules that are built to check their arguments


def resolve(composed: DictConfig) -> dict[str, Any]:
    """Return a composed configuration as plain values, resolved and validated.

    Raises:
        UserError: A key is unknown or missing, a value is out of range, or a target is not allowed.
    """
    config = as_dict(composed)
    check(config)
    return config


def as_dict(composed: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain values with all interpolations resolved; raises UserError if one cannot be."""
    try:
        config = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration cannot be resolved: {str(error).splitlines()[0]}") from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def own_keys(composed: DictConfig, overrides: Sequence[str], keys: set[str], ids: set[str]) -> dict[str, Any]:
    """Return the configuration of a command that has keys of its own, as plain values.

    Args:
        composed: The composed configuration. conf/local/default.yaml may have set keys of the run command as well.
        overrides: The command line.
        keys: The keys that a user may set.
        ids: The keys that hold ids, which are read as typed.

    Raises:
        UserError: The command line sets another key, or removes one; or a target is not allowed.
    """
    added = [override for override in overrides if key_of(override).partition(".")[0] not in keys | ids]
    if added:
        raise UserError(f"{' '.join(added)} is invalid: expected keys among {', '.join(sorted(keys))}.")
    composed_keys = as_dict(composed)
    if removed := {key_of(override) for override in overrides} & ((keys | ids) - composed_keys.keys()):
        raise UserError(f"The command line removes {', '.join(sorted(removed))}: expected only changed values.")
    config = {key: value for key, value in composed_keys.items() if key in keys | ids} | typed_ids(overrides, ids)
    for key, value in nodes(config):
        check_target(key, value)
    return config


def as_list(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a command line with interpolations resolved; raises UserError if one refers to itself."""
    try:
        return list(overrides)
    except OmegaConfBaseException as error:
        raise UserError(f"The command line cannot be resolved: {str(error).splitlines()[0]}. Write plain values.") from error


def check(config: dict[str, Any]) -> None:
    """Raise UserError on the first invalid entry of a resolved configuration."""
    for key in config.keys() - KEYS:
        raise UserError(
            f"{key} is not a key of the configuration{did_you_mean(key, KEYS)}. Expected one of: {', '.join(sorted(KEYS))}."
        )
    for section, known in SECTIONS.items():
        for key in sorted((config.get(section) or {}).keys() - known):
            raise UserError(
                f"{section}.{key} is not a key of the configuration{did_you_mean(key, known)}. Expected one of: "
                f"{', '.join(sorted(known))}."
            )
    for key in sorted(REQUIRED):
        if key not in config or (not config[key] and config[key] != 0 and key not in NULLABLE):
            raise UserError(f"{key} is missing: set it, or do not delete it (~{key}) on the command line.")
    for key, value in nodes({key: config[key] for key in sorted(config, key=lambda key: key == "phases")}):
        check_plain(key, value)
        check_target(key, value)
        if isinstance(value, str) and "${" in value:  # Hydra would resolve it again, and call a resolver
            raise UserError(f"{key}={value} is invalid: expected a plain value, without ${{...}}.")
        for pattern, (valid, expected) in RULES.items():
            if fnmatch(key, pattern) and not valid(value):
                raise _invalid(ArgumentError(key, value, expected))
        if isinstance(value, dict) and str(value.get("_target_")).startswith("torch.optim."):
            for name in value.keys() & TORCH_RULES.keys():
                valid, expected = TORCH_RULES[name]
                if not valid(value[name]):
                    raise _invalid(ArgumentError(f"{key}.{name}", value[name], expected))
    if not isinstance(config["phases"], dict):
        raise UserError(f"phases={config['phases']} is invalid: expected phases by name, as in conf/config.yaml.")
    for name, phase in config["phases"].items():
        if not isinstance(phase, dict) or "_target_" not in phase:
            raise UserError(f"phases.{name} is not a phase: add one with +phase@phases.{name}=finetune.")
        if not re.fullmatch(r"\w+", str(name)) or name in KEYS | {"total"}:
            raise UserError(f"phases.{name} is invalid: expected a word that is not a key of the configuration.")
        for part in PARTS:
            if phase.get(part) is None:
                raise UserError(f"phases.{name}.{part} is missing: choose one with +{part}@phases.{name}.{part}=OPTION.")
    for key in ("data", "model", "tracking"):
        if not isinstance(config[key], dict) or "_target_" not in config[key]:
            raise UserError(f"{key}={config[key]} is invalid: expected an option of the group conf/{key}/.")


def _invalid(error: ArgumentError) -> UserError:
    return UserError(f"{error} Set it with {error.name}=... on the command line.")


def bind(config: dict[str, Any]) -> None:
    """Check the arguments of every target of a checked configuration, before anything is loaded or trained.

    Each is bound to its signature. All but data sets, teachers and stores are also built: the model without memory if the shape
    of the data is known, optimizers and schedules for a trial layer. Equal nodes are checked once, so that the jobs of a sweep
    take little time.

    Raises:
        UserError: A target rejects its arguments, or the model has too many parameters.
    """
    for role in ("data", "tracking"):
        _bind_node(role, role, _text_of(config[role]))
    _bind_model(_text_of(config["model"]), _text_of(config.get("shape")), config["parameter_limit"])
    for name, phase in config["phases"].items():
        keys = {part: part if phase[part] == config.get(part) else f"phases.{name}.{part}" for part in PARTS}
        for part in ("augmentation", "teacher"):
            _bind_node(keys[part], part, _text_of(phase[part]))
        _bind_schedule(keys["optimizer"], keys["scheduler"], _text_of(phase["optimizer"]), _text_of(phase["scheduler"]))
        plain = {key: None if key in PARTS else value for key, value in phase.items()}
        _bind_node(f"phases.{name}", "phase", _text_of(plain))


def bind_data(config: dict[str, Any]) -> None:
    """Check what only the images can tell: the arguments of the data set and the model, and the split and batch size of phases.

    Each data set is read once for all jobs of a sweep. Nothing is checked if this machine, such as the head of a cluster, lacks
    the images.

    Raises:
        UserError: A value does not fit the images, or the model has too many parameters.
    """
    from mnist_exp.learning.training import check_split

    if (found := _shape_and_sizes(_text_of(config["data"]))) is None:
        return
    shape, sizes = found
    _bind_model(_text_of(config["model"]), _text_of(shape), config["parameter_limit"])
    for name, phase in config["phases"].items():
        check_split(name, phase["split"], phase["batch_size"], sizes)


@cache
def _shape_and_sizes(text: str) -> tuple[dict[str, int], dict[str, int]] | None:
    """Return the shape of a data set and the epoch size of each split, None if this machine lacks the images."""
    node = json.loads(text)
    module, _, name = node["_target_"].rpartition(".")
    arguments = _arguments(node)
    if "fallback" in arguments:
        arguments["fallback"] = None  # other images tell nothing
    try:
        data = getattr(import_module(module), name)(**arguments, seed=0)
    except ArgumentError as error:
        raise _invalid(error.within("data")) from error
    except Exception:  # the images are missing, or damaged: the job says so
        return None
    return data.shape, {split: part.epoch_size for split, part in data.splits.items()}


def _text_of(node: Any) -> str:
    return json.dumps(node, sort_keys=True)


@cache
def _bind_node(key: str, role: str, text: str) -> None:
    node = json.loads(text)
    _bind_signature(node, key, *CALLS.get(role, (0, ())))
    try:
        if role == "data":
            import_module(node["_target_"].rpartition(".")[0]).check_arguments(**_arguments(node))
    except ArgumentError as error:
        raise _invalid(error.within(key)) from error
    if role in ("augmentation", "phase"):
        build(node, key)


@cache
def _bind_model(text: str, shape_text: str, limit: int | None) -> None:
    import torch

    from mnist_exp.learning.models import count_parameters

    node, shape = json.loads(text), json.loads(shape_text)
    _bind_signature(node, "model", 0, ("classes", "side", "in_channels"))
    if shape is not None:
        with torch.device("meta"):
            count_parameters(build(node, "model", **shape), limit)


@cache
def _bind_schedule(optimizer_key: str, scheduler_key: str, optimizer_text: str, scheduler_text: str) -> None:
    import torch

    layer = torch.nn.Conv2d(1, 1, 1)  # has both kinds of parameters that optimizers distinguish
    parts = {optimizer_key: json.loads(optimizer_text), scheduler_key: json.loads(scheduler_text)}
    for key, node in parts.items():
        _bind_signature(node, key, *CALLS["scheduler" if key == scheduler_key else "optimizer"])
    optimizer = _call(build(parts[optimizer_key], optimizer_key), optimizer_key, layer.parameters())
    _call(build(parts[scheduler_key], scheduler_key), scheduler_key, optimizer, total_steps=TRIAL_STEPS)


def _call(function: Callable[..., Any], key: str, *values: Any, **named: Any) -> Any:
    try:
        return function(*values, **named)
    except Exception as error:  # torch and extensions raise exceptions of any kind
        raise _not_built(key, error) from error


def _not_built(key: str, error: BaseException) -> UserError:
    """Return the error for a target that has raised `error`."""
    if isinstance(error, ArgumentError):
        return _invalid(error.within(key))
    if isinstance(error, UserError):
        return error
    return UserError(f"{key} cannot be built: {error}. Its file in conf/ lists its arguments.")


def _bind_signature(node: dict[str, Any], key: str, positional: int, named: tuple[str, ...]) -> None:
    """Raise UserError unless the target of a node accepts its arguments and those that it gets when it is called."""
    refuse_imported(node, key)
    module, _, name = node["_target_"].rpartition(".")
    target = getattr(import_module(module), name, None)
    if target is None:
        raise UserError(f"{key}._target_={node['_target_']} is invalid: expected a class or function that {module} defines.")
    try:
        inspect.signature(target).bind(*[None] * positional, **_arguments(node), **dict.fromkeys(named))
    except TypeError as error:
        raise _not_built(key, error) from error


def _arguments(node: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}


def check_plain(key: str, value: Any) -> None:
    """Raise UserError on a value that no configuration file can contain, or on one of Hydra's own keys such as `_args_`.

    Only a forged configuration contains a tuple. Hydra would find targets in it, `nodes` would not.
    """
    name = key.rpartition(".")[2]
    is_reserved = re.fullmatch(r"_\w*_", name) and name not in ("_target_", "_partial_")
    if is_reserved or (name == "_partial_" and value is not True):
        raise UserError(f"{key}={value} is not allowed: expected no reserved key but _target_ and _partial_: true.")
    if not (value is None or type(value) in (str, int, float, bool, list, dict)):
        raise UserError(f"{key} is invalid: expected a string, number, boolean, null, list or map, not {type(value)}.")


def check_target(key: str, value: Any) -> None:
    """Raise UserError if `key` is a target and `value` is not allowed there."""
    if not key.endswith("_target_"):
        return
    match = TARGET_KEY.fullmatch(key)
    role = next(filter(None, match.groups()), "") if match else ""
    if not (isinstance(value, str) and re.fullmatch(TARGETS.get(role, "(?!)"), value)):
        raise UserError(
            f"{key}={value} is not allowed: expected a class or function of the matching module of mnist_exp or torch. "
            "To use another one, wrap it in a function in mnist_exp."
        )


def digest(config: dict[str, Any]) -> str:
    """Return a short hash of the part of a resolved configuration that affects the outcome of a run."""
    recipe = {key: value for key, value in config.items() if key not in (*NEUTRAL, "shape")}
    recipe["data"] = {key: value for key, value in config["data"].items() if key != "root"}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every node of a resolved configuration, dicts and lists included.

    Raises UserError on a key that is not a string, or contains a dot and so could pass for a nested key.
    """
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(node, dict) and (not isinstance(key, str) or "." in key):
            raise UserError(f"{path or 'The configuration'} has the invalid key {key!r}: expected a word.")
        inner = f"{path}.{key}" if path else str(key)
        yield inner, value
        if isinstance(value, dict | list):
            yield from nodes(value, inner)


def build(node: Any, key: str, **arguments: Any) -> Any:
    """Instantiate the node `key` of a validated configuration; raises UserError if its target raises."""
    refuse_imported(node, key)
    try:
        return instantiate(node, _convert_="all", **arguments)
    except Exception as error:  # Hydra wraps any exception of a constructor in its InstantiationException
        cause = error.__cause__ or error
        raise _not_built(key, cause) from (None if isinstance(cause, UserError) else error)


def refuse_imported(node: Any, key: str) -> None:
    """Raise UserError on a target that its module in mnist_exp only imports."""
    for inner, target in nodes(node, key):
        if inner.endswith("_target_") and str(target).startswith("mnist_exp."):
            module, _, name = target.rpartition(".")
            if getattr(getattr(import_module(module), name, None), "__module__", None) != module:
                raise UserError(f"{inner}={target} is not allowed: expected a class or function that {module} defines.")


def did_you_mean(key: str, known: set[str]) -> str:
    """Return ' (did you mean ...?)' with the known key closest to `key`, or an empty string."""
    close = get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
