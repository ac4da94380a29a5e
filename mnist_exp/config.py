"""The composed configuration: resolve it to plain values, validate it, and instantiate its nodes."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib import import_module
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_exp import HOME
from mnist_exp.errors import UserError
from mnist_exp.overrides import NEUTRAL, PARTS, RECIPE
from mnist_exp.redaction import without_credentials

OmegaConf.register_new_resolver("root", lambda path: str(HOME / path), replace=True)
OmegaConf.register_new_resolver("without_credentials", without_credentials, replace=True)
OmegaConf.register_new_resolver("scaled", lambda value, at, to: value * to / at, replace=True)

KEYS = RECIPE | {"output_dir", "save_every", "resume", "rerun", "sweep", "tracking"}
REQUIRED = KEYS - {*PARTS, "save_every", "resume", "rerun"}  # the parts: through phases

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
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _number(valid: Callable[[float], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30 and valid(value)

    return check


def _numbers(valid: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(_number(valid), value))


def _three_integers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_integer(1), value))


def _one_of(*allowed: str | None) -> Callable[[Any], bool]:
    return lambda value: (value is None or isinstance(value, str)) and value in allowed


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _run_id(value: Any) -> bool:
    return bool(re.fullmatch("latest|[0-9a-f]{32}", str(value)))


def _one_run(value: Any) -> bool:
    return _run_id(value) and value != "latest"


def _different_runs(value: Any) -> bool:
    runs = isinstance(value, list) and bool(value) and all(isinstance(run, str) and _one_run(run) for run in value)
    return runs and len(set(value)) == len(value)


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
    "resume": (_or_null(_run_id), "a run id of 32 hexadecimal digits, latest, or null"),
    "rerun": (_or_null(_one_run), "a run id of 32 hexadecimal digits, or null"),
    "sweep.resume": (_or_null(_run_id), "a sweep id of 32 hexadecimal digits, latest, or null"),
    "sweep.on_failure": (_one_of("continue", "stop"), "continue or stop"),
    "sweep.retries": (_integer(0), "an integer >= 0"),
    "sweep.force": TRUE_OR_FALSE,
    "sweep.id": (_or_null(_one_run), "a sweep id, set by the sweep"),
    "sweep.job": (_or_null(_integer(0)), "a job number, set by the sweep"),
    "sweep.color": (_or_null(lambda value: bool(re.fullmatch("#[0-9A-Fa-f]{6}", str(value)))), "a color, set by the sweep"),
    "sweep.varied": (lambda value: isinstance(value, list) and all(map(_text, value)), "keys, set by the sweep"),
    "sweep.data": (_or_null(_text), "the name of a data set, set by the sweep"),
    "sweep.search": TRUE_OR_FALSE,
    "*batch_size": (_integer(1), "an integer >= 1"),
    "*.epochs": (_integer(1), "an integer >= 1"),
    "*.lr": (_number(lambda value: value > 0), "a number > 0"),
    "*.adamw_lr": (_number(lambda value: value > 0), "a number > 0"),
    "*.weight_decay": (_number(lambda value: value >= 0), "a number >= 0"),
    "*.momentum": (_number(lambda value: 0 <= value < 1), "a number >= 0 and < 1"),
    "*.label_smoothing": (_number(lambda value: 0 <= value < 1), "a number >= 0 and < 1"),
    "*.max_grad_norm": (_or_null(_number(lambda value: value > 0)), "a number > 0, or null"),
    "*.split": (_text, "the name of a split of the data, such as train or finetune"),
    "*.div_factor": (_number(lambda value: value > 0), "a number > 0"),
    "*.final_div_factor": (_number(lambda value: value > 0), "a number > 0"),
    "*.pct_start": (_number(lambda value: 0 < value < 1), "a number between 0 and 1"),
    "*.min_factor": (_number(lambda value: 0 <= value <= 1), "a number from 0 to 1"),
    "*.gamma": (_number(lambda value: 0 < value <= 1), "a number > 0 and <= 1"),
    "*.milestones": (_numbers(lambda value: 0 <= value <= 1), "a list of numbers from 0 to 1, fractions of the phase"),
    "*.degrees": (_number(lambda value: 0 <= value <= 180), "a number from 0 to 180"),
    "*augmentation.scale": (
        lambda value: _numbers(lambda item: item > 0)(value) and len(value) == 2 and value[0] <= value[1],
        "[smallest, largest], both > 0",
    ),
    "*.translate": (_number(lambda value: 0 <= value < 1), "a number >= 0 and < 1, a fraction of the side"),
    "*betas": (
        lambda value: _numbers(lambda item: 0 <= item < 1)(value) and len(value) == 2,
        "two numbers >= 0 and < 1",
    ),
    "*teacher.runs": (_different_runs, "a list of different ids of finished runs, each of 32 hexadecimal digits"),
    "data.root": (_text, "a folder"),
    "tracking.uri": (_text, "sqlite:////path.db, or http(s)://host:port of an MLflow server"),
    "tracking.patience": (_number(lambda value: value >= 0), "a number of seconds >= 0"),
    "tracking.experiment": (_text, "the name of an MLflow experiment"),
    "model.se": (_or_null(lambda value: isinstance(value, dict)), "a squeeze-excitation, or null"),
    "data.finetune_fraction": (_number(lambda value: 0 < value < 1), "a number between 0 and 1"),
    "data.validation_size": (lambda value: _integer(0)(value) and value < 60_000, "an integer >= 0 and < 60000"),
    "data.fallback": (_one_of("digits", None), "digits or null"),
    "model.dropout": (_number(lambda value: 0 <= value < 1), "a number >= 0 and < 1"),
    "model.hidden_features": (_or_null(_integer(1)), "an integer >= 1, or null for no hidden layer"),
    "model.kernel_sizes": (
        lambda value: isinstance(value, list) and len(value) == 3 and all(_integer(1)(size) and size % 2 for size in value),
        "three odd integers",
    ),
    "model.separable": TRUE_OR_FALSE,
    "model.conv_bias": TRUE_OR_FALSE,
    "model.mean_pool": TRUE_OR_FALSE,
    "model.channels": (_three_integers, "three integers >= 1"),
    "model.depths": (_three_integers, "three integers >= 1"),
    "model.se.reduction": (_integer(1), "an integer >= 1"),
}


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


def check(config: dict[str, Any]) -> None:
    """Raise UserError on the first invalid entry of a resolved configuration."""
    for key in config.keys() - KEYS:
        raise UserError(
            f"{key} is not a key of the configuration{did_you_mean(key, KEYS)}. Expected one of: {', '.join(sorted(KEYS))}."
        )
    for key in sorted(REQUIRED):
        if not config.get(key) and config.get(key) != 0:
            raise UserError(f"{key} is missing: set it, or do not delete it (~{key}) on the command line.")
    for key, value in nodes({key: config[key] for key in sorted(config, key=lambda key: key == "phases")}):
        check_plain(key, value)
        check_target(key, value)
        if isinstance(value, str) and "${" in value:  # Hydra would resolve it again, and call a resolver
            raise UserError(f"{key}={value} is invalid: expected a plain value, without ${{...}}.")
        for pattern, (valid, expected) in RULES.items():
            if fnmatch(key, pattern) and not valid(value):
                raise UserError(f"{key}={value} is invalid: expected {expected}. Set it with {key}=... on the command line.")
    if not isinstance(config["phases"], dict):
        raise UserError(f"phases={config['phases']} is invalid: expected phases by name, as in conf/config.yaml.")
    for name, phase in config["phases"].items():
        if not isinstance(phase, dict) or "_target_" not in phase:
            raise UserError(f"phases.{name} is not a phase: add one with +phase@phases.{name}=finetune.")
        if not re.fullmatch(r"\w+", str(name)) or name in KEYS | {"total"}:
            raise UserError(f"phases.{name} is invalid: expected a word that is not a key of the configuration.")
        for part in PARTS:
            if phase.get(part) is None:
                raise UserError(f"phases.{name}.{part} is missing: choose one with {part}@phases.{name}.{part}=OPTION.")
    for key in ("data", "model", "tracking"):
        if not isinstance(config[key], dict) or "_target_" not in config[key]:
            raise UserError(f"{key}={config[key]} is invalid: expected an option of the group conf/{key}/.")


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
    recipe = {key: value for key, value in config.items() if key not in NEUTRAL}
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
    for inner, target in nodes(node, key):
        if inner.endswith("_target_") and str(target).startswith("mnist_exp."):
            module, _, name = target.rpartition(".")
            if getattr(getattr(import_module(module), name, None), "__module__", None) != module:  # it may only import the name
                raise UserError(f"{inner}={target} is not allowed: expected a class or function that {module} defines.")
    try:
        return instantiate(node, _convert_="all", **arguments)
    except Exception as error:  # Hydra wraps any exception of a constructor in its InstantiationException
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{key} cannot be built: {cause or error}. Its file in conf/ lists its arguments.") from error


def did_you_mean(key: str, known: set[str]) -> str:
    """Return ' (did you mean ...?)' with the known key closest to `key`, or an empty string."""
    close = get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
