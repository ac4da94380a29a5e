"""The composed configuration: resolved to plain values, checked before anything is built, and built."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatch
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

# What may be called where, as one name in one module, so that nothing else can be reached through it (torch.os.system).
TARGETS = {
    "data": r"mnist_exp\.data\.load_\w+",
    "model": r"(mnist_exp\.models|torch\.nn)\.[A-Z]\w*",
    "optimizer": r"mnist_exp\.optimizers\.[a-z]\w*|torch\.optim\.[A-Z]\w*",
    "scheduler": r"mnist_exp\.schedules\.[a-z]\w*|torch\.optim\.lr_scheduler\.[A-Z]\w*",
    "augmentation": r"mnist_exp\.augmentation\.[A-Z]\w*",
    "teacher": r"mnist_exp\.distillation\.[A-Z]\w*",
    "tracking": r"mnist_exp\.tracking\.[A-Z]\w*Tracker",
    "phase": r"mnist_exp\.training\.Phase",
}


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
# pattern of the key: (check, what is allowed)
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_integer(0), "an integer of at least 0"),
    "precision": (_one_of("auto", "fp32", "bf16", "fp16"), "auto, fp32, bf16 or fp16"),
    "device": (_one_of("auto", "cpu", "cuda", "mps"), "auto, cpu, cuda or mps"),
    "output_dir": (_text, "a folder"),
    "save_every": (_or_null(_integer(1)), "an integer of at least 1 (steps), or null"),
    "resume": (_or_null(_run_id), "a run's id of 32 hexadecimal digits, latest, or null"),
    "rerun": (_or_null(_one_run), "a run's id of 32 hexadecimal digits, or null"),
    "sweep.resume": (_or_null(_run_id), "a sweep's id of 32 hexadecimal digits, latest, or null"),
    "sweep.on_failure": (_one_of("continue", "stop"), "continue or stop"),
    "sweep.retries": (_integer(0), "an integer of at least 0"),
    "sweep.insist": TRUE_OR_FALSE,
    "sweep.id": (_or_null(_one_run), "a sweep's id, given by the sweep"),
    "sweep.job": (_or_null(_integer(0)), "a job's number, given by the sweep"),
    "sweep.colour": (_or_null(lambda value: bool(re.fullmatch("#[0-9A-Fa-f]{6}", str(value)))), "a color, given by the sweep"),
    "sweep.varied": (lambda value: isinstance(value, list) and all(map(_text, value)), "keys, given by the sweep"),
    "sweep.data": (_or_null(_text), "the name of a data set, given by the sweep"),
    "sweep.search": TRUE_OR_FALSE,
    "*batch_size": (_integer(1), "an integer of at least 1"),
    "*.epochs": (_integer(1), "an integer of at least 1"),
    "*.lr": (_number(lambda value: value > 0), "a number above 0"),
    "*.adamw_lr": (_number(lambda value: value > 0), "a number above 0"),
    "*.weight_decay": (_number(lambda value: value >= 0), "a number of at least 0"),
    "*.momentum": (_number(lambda value: 0 <= value < 1), "a number from 0 to below 1"),
    "*.label_smoothing": (_number(lambda value: 0 <= value < 1), "a number from 0 to below 1"),
    "*.max_grad_norm": (_or_null(_number(lambda value: value > 0)), "a number above 0, or null"),
    "*.split": (_text, "the name of a split of the data, such as train or finetune"),
    "*.div_factor": (_number(lambda value: value > 0), "a number above 0"),
    "*.final_div_factor": (_number(lambda value: value > 0), "a number above 0"),
    "*.pct_start": (_number(lambda value: 0 < value < 1), "a number between 0 and 1"),
    "*.min_factor": (_number(lambda value: 0 <= value <= 1), "a number from 0 to 1"),
    "*.gamma": (_number(lambda value: 0 < value <= 1), "a number above 0, up to 1"),
    "*.milestones": (_numbers(lambda value: 0 <= value <= 1), "a list of numbers from 0 to 1, fractions of the phase"),
    "*.degrees": (_number(lambda value: 0 <= value <= 180), "a number from 0 to 180"),
    "*augmentation.scale": (
        lambda value: _numbers(lambda item: item > 0)(value) and len(value) == 2 and value[0] <= value[1],
        "[smallest, largest], both above 0",
    ),
    "*.translate": (_number(lambda value: 0 <= value < 1), "a number from 0 to below 1, a fraction of the side"),
    "*betas": (
        lambda value: _numbers(lambda item: 0 <= item < 1)(value) and len(value) == 2,
        "two numbers from 0 to below 1",
    ),
    "*teacher.runs": (_different_runs, "a list of the ids of finished runs, each of 32 hexadecimal digits and named once"),
    "data.root": (_text, "a folder"),
    "tracking.uri": (_text, "sqlite:////path.db, or http(s)://host:port of an MLflow server"),
    "tracking.patience": (_number(lambda value: value >= 0), "a number of at least 0, in seconds"),
    "tracking.experiment": (_text, "the name of an MLflow experiment"),
    "model.se": (_or_null(lambda value: isinstance(value, dict)), "a squeeze-excitation, or null"),
    "data.finetune_fraction": (_number(lambda value: 0 < value < 1), "a number between 0 and 1"),
    "data.validation_size": (lambda value: _integer(0)(value) and value < 60_000, "an integer from 0 to below 60000"),
    "data.fallback": (_one_of("digits", None), "digits or null"),
    "model.dropout": (_number(lambda value: 0 <= value < 1), "a number from 0 to below 1"),
    "model.hidden_features": (_or_null(_integer(1)), "an integer of at least 1, or null for no hidden layer"),
    "model.kernel_sizes": (
        lambda value: isinstance(value, list) and len(value) == 3 and all(_integer(1)(size) and size % 2 for size in value),
        "three odd integers",
    ),
    "model.separable": TRUE_OR_FALSE,
    "model.conv_bias": TRUE_OR_FALSE,
    "model.mean_pool": TRUE_OR_FALSE,
    "model.channels": (_three_integers, "three integers of at least 1"),
    "model.depths": (_three_integers, "three integers of at least 1"),
    "model.se.reduction": (_integer(1), "an integer of at least 1"),
}


def resolve(composed: DictConfig) -> dict[str, Any]:
    """Return a run's configuration as plain dicts and values, interpolations resolved and everything checked.

    Raises UserError on unknown or missing keys, values out of range, and targets outside the allowed modules.
    """
    config = as_dict(composed)
    check(config)
    return config


def as_dict(composed: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain dicts and values, interpolations resolved; raises UserError where they cannot be."""
    try:
        config = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration cannot be resolved: {str(error).splitlines()[0]}") from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def check(config: dict[str, Any]) -> None:
    """Raise UserError on the first thing in a resolved configuration that cannot be run."""
    for key in config.keys() - KEYS:
        raise UserError(f"{key} is not a key of the configuration{did_you_mean(key, KEYS)}. Allowed: {', '.join(sorted(KEYS))}.")
    for key in sorted(REQUIRED):
        if not config.get(key) and config.get(key) != 0:
            raise UserError(f"{key} is missing: give it a value, or do not delete it (~{key}) on the command line.")
    for key, value in nodes({key: config[key] for key in sorted(config, key=lambda key: key == "phases")}):
        check_plain(key, value)
        check_target(key, value)
        if isinstance(value, str) and "${" in value:  # a stored configuration is resolved: Hydra would do it again, and call
            raise UserError(f"{key}={value} is not valid: allowed are plain values, without ${{...}}.")
        for pattern, (valid, allowed) in RULES.items():
            if fnmatch(key, pattern) and not valid(value):
                raise UserError(f"{key}={value} is not valid: allowed is {allowed}. Set it with {key}=... on the command line.")
    if not isinstance(config["phases"], dict):
        raise UserError(f"phases={config['phases']} is not valid: allowed are phases by name, as in conf/config.yaml.")
    for name, phase in config["phases"].items():
        if not isinstance(phase, dict) or "_target_" not in phase:
            raise UserError(f"phases.{name} is not a phase: add one with +phase@phases.{name}=finetune.")
        if not re.fullmatch(r"\w+", str(name)) or name in KEYS | {"total"}:
            raise UserError(f"phases.{name} is not a name for a phase: allowed is a word that is no key of the configuration.")
    for key in ("data", "model", "tracking"):
        if not isinstance(config[key], dict) or "_target_" not in config[key]:
            raise UserError(f"{key}={config[key]} is not valid: allowed is an option of the group conf/{key}/.")


def check_plain(key: str, value: Any) -> None:
    """Raise UserError on a value that no configuration file can hold, or a key that says how Hydra calls a target.

    Only a stored configuration can hold a tuple or a tensor. Hydra would look for targets inside a tuple, where `nodes` does not.
    """
    name = key.rpartition(".")[2]
    is_instruction = re.fullmatch(r"_\w*_", name) and name not in ("_target_", "_partial_")
    if is_instruction or (name == "_partial_" and value is not True):
        raise UserError(f"{key}={value} is not allowed: allowed are _target_ and _partial_: true.")
    if not (value is None or type(value) in (str, int, float, bool, list, dict)):
        raise UserError(f"{key} is not valid: allowed are texts, numbers, true, false, null, lists and maps, not {type(value)}.")


def check_target(key: str, value: Any) -> None:
    """Raise UserError if `key` names what is to be called, and `value` is not among what may be, at this place."""
    if not key.endswith("_target_"):
        return
    place = re.match(rf"phases\.\w+\.({'|'.join(PARTS)})\.|(phase)s\.\w+\._target_$|(\w+)\.", key)
    role = next(filter(None, place.groups()), "") if place else ""
    if not (isinstance(value, str) and re.fullmatch(TARGETS.get(role, "(?!)"), value)):
        raise UserError(
            f"{key}={value} is not allowed: a target is a class or function of the module of mnist_exp, or of torch, that "
            f"belongs there. To use another, wrap it in a function in mnist_exp."
        )


def digest(config: dict[str, Any]) -> str:
    """Return a short hash of what, in a resolved configuration, decides the outcome of a run."""
    recipe = {key: value for key, value in config.items() if key not in NEUTRAL}
    recipe["data"] = {key: value for key, value in config["data"].items() if key != "root"}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything in a resolved configuration, dicts and lists included.

    Raises UserError on a key of a dict that is no text, and on one that holds a dot, which would pass for another place.
    """
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(node, dict) and (not isinstance(key, str) or "." in key):
            raise UserError(f"{path or 'The configuration'} has a key that is not allowed: {key!r}. Allowed are words.")
        inner = f"{path}.{key}" if path else str(key)
        yield inner, value
        if isinstance(value, dict | list):
            yield from nodes(value, inner)


def build(node: Any, key: str, **arguments: Any) -> Any:
    """Call what the node under `key` of a checked configuration stands for; raises UserError if it refuses."""
    try:
        return instantiate(node, _convert_="all", **arguments)
    except Exception as error:  # whatever a constructor raises comes wrapped in Hydra's InstantiationException
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{key} cannot be built: {cause or error}. See its file in conf/ for what it takes.") from error


def did_you_mean(key: str, known: set[str]) -> str:
    """Return ' (did you mean ...?)' with the known keys closest to `key`, or nothing."""
    close = get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
