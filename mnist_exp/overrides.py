"""Override strings: parse them, decide which ones a store may contain, and write them as commands."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from mnist_exp import CONF, HOME
from mnist_exp.errors import UserError
from mnist_exp.redaction import has_credentials, redact

PARTS = ("optimizer", "scheduler", "augmentation", "teacher")  # shared by all phases, each of which may choose its own
RECIPE = {"seed", "batch_size", "precision", "device", "phases", "data", "model", *PARTS}  # keys that affect a run's outcome
GROUPS = {"data", "model", "phase", "experiment", "arm", *PARTS}  # their groups in conf/
# Locations of data, checkpoints and records: taken from the command line and the environment, never from a store.
LOCATIONS = ("output_dir", "tracking", "data.root")
JOB_KEY = "sweep_job"  # the hidden key with which a sweep passes a context to its jobs
# Keys that do not affect a run's outcome.
NEUTRAL = (*LOCATIONS, "parameter_limit", "save_every", "resume", "rerun", "sweep", "plan")
IDS = ("resume", "rerun", "sweep.resume", "sweep.extend", "teacher.runs", "phases.*.teacher.runs")  # keys that hold ids of runs
_PACKAGE = re.compile(rf"phases\.\w+(\.({'|'.join(PARTS)}))?")


def key_of(override: str) -> str:
    """Return the key of an override, or the group with its package (group@package)."""
    parsed = _parsed(override)
    return parsed.key_or_group if parsed.package is None else f"{parsed.key_or_group}@{parsed.package}"


def text_of(override: str) -> str:
    """Return the value of an override as typed: Hydra reads an id such as 1234e567 as a number."""
    return (_parsed(override).input_line or "").partition("=")[2]


def split_override(override: str) -> tuple[str, str]:
    """Return the key and the value of an override."""
    return key_of(override), text_of(override)


def typed_ids(overrides: Iterable[str], keys: Iterable[str]) -> dict[str, str | list[str]]:
    """Return the ids of runs on a command line as typed, by key.

    Args:
        overrides: The command line; what it sweeps over is set by the overrides of each job.
        keys: The patterns of keys that hold ids.
    """
    set_here = [override for override in overrides if text_of(override) and not _parsed(override).is_sweep_override()]
    texts = {key_of(override): text_of(override).strip("'\"") for override in set_here}
    found = {
        key: text
        for key, text in texts.items()
        if any(fnmatch(key, pattern) for pattern in keys) and text not in ("null", "latest")
    }
    return {
        key: [item.strip(" '\"") for item in text[1:-1].split(",")] if text.startswith("[") else text
        for key, text in found.items()
    }


def keep_ids(composed: DictConfig, overrides: Iterable[str]) -> None:
    """Put the ids of runs into a composed configuration as typed: Hydra's grammar reads 1234e567 as a number."""
    for key, text in typed_ids(overrides, IDS).items():
        OmegaConf.update(composed, key, text)


def is_location(override: str) -> bool:
    """Return whether an override sets one of LOCATIONS."""
    return _names(key_of(override), LOCATIONS)


def is_neutral(override: str) -> bool:
    """Return whether an override does not affect a run's outcome."""
    key = key_of(override)
    return _names(key, NEUTRAL) or key.startswith(("hydra.", "hydra/"))


def quoted(value: str) -> str:
    """Return a string in the form in which Hydra reads it from a command line, quoted if necessary."""
    if re.fullmatch(r"[A-Za-z/_][\w/.:-]*", value) and value.lower() not in ("null", "true", "false", "inf", "nan"):
        return value
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'").replace("${", "\\${")
    return f"'{escaped}'"


def command(module: str, *overrides: str) -> str:
    """Return the shell command that runs a module of this package: `command("run", "seed=1")`."""
    return shlex.join(["python", "-m", f"mnist_exp.{module}", *map(redact, overrides)])  # quotes would hide a secret from redact


def location_overrides(config: Mapping[str, Any]) -> list[str]:
    """Return the overrides with which another command finds the files and records of this configuration.

    Defaults need none. An address with credentials is never included: the user sets MLFLOW_TRACKING_URI.
    """
    overrides = []
    output_dir = Path(config["output_dir"]).absolute()
    if output_dir != HOME / "outputs":
        overrides.append(f"output_dir={quoted(str(output_dir))}")
    uri = config["tracking"].get("uri")
    if uri is None:
        overrides.append("tracking=none")
    elif (uri := absolute_path(uri)) != default_store() and not has_credentials(uri):
        overrides.append(f"tracking.uri={quoted(uri)}")
    if config["tracking"].get("experiment", "mnist_exp") != "mnist_exp":
        overrides.append(f"tracking.experiment={quoted(config['tracking']['experiment'])}")
    root = config.get("data", {}).get("root")
    if root is not None and root != os.environ.get("MNIST_ROOT", str(HOME / "data")):
        overrides.append(f"data.root={quoted(str(Path(root).absolute()))}")
    return overrides


def store_uri() -> str:
    """Return the address of the store: from conf/local/default.yaml, else MLFLOW_TRACKING_URI, else the default store."""
    return _local_default("tracking.uri") or os.environ.get("MLFLOW_TRACKING_URI") or default_store()


def data_root() -> str:
    """Return the folder of MNIST: from conf/local/default.yaml, else MNIST_ROOT, else the default folder."""
    return _local_default("data.root") or os.environ.get("MNIST_ROOT") or str(HOME / "data")


def _local_default(key: str) -> str | None:
    """Return the value of a key in conf/local/default.yaml."""
    file = CONF / "local" / f"{os.environ.get('MNIST_EXP_LOCAL', 'default')}.yaml"
    return OmegaConf.select(OmegaConf.load(file), key) if file.exists() else None


def default_store() -> str:
    """Return the address of the default store."""
    return f"sqlite:///{HOME / 'mlflow.db'}"


def absolute_path(uri: str) -> str:
    """Return a SQLite address with its path made absolute, any other unchanged."""
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri else f"sqlite:///{Path(path).absolute()}"


def check_stored(overrides: Iterable[str], source: str) -> None:
    """Raise UserError unless all overrides, read from `source`, set keys of the recipe or choose options in conf/.

    Anyone who can write to the source can change them. With Hydra, `hydra.*`, a search path or an option outside conf/ could run
    code or write files, a resolver could read the environment, and a location could point outside the output folder.
    """
    for override in overrides:
        problem = _problem(override)
        if problem:
            raise UserError(
                f"{source} contains the override {override!r}, which {problem}. Expected overrides of the recipe's keys and "
                "groups, such as model=se_cnn or optimizer.lr=0.1. Start a new run or sweep with your own command line."
            )


def _problem(override: str) -> str | None:
    """Return the reason why a store must not contain an override, None if it may."""
    try:
        parsed = _parsed(override)
        options = _options(parsed)
    except HydraException:
        return "Hydra cannot parse"
    key, package = parsed.key_or_group, parsed.package
    if re.search(r"\$\{(?![\w.]+\})", override):
        return "contains an interpolation other than ${KEY}"
    if key in GROUPS:
        if package is not None and not _PACKAGE.fullmatch(package):
            return f"inserts an option at {package}"
        if parsed.is_force_add() or (parsed.is_add() and package is None):
            return "adds to the configuration"
        if any(not re.fullmatch(r"\w+", option) for option in options):
            return "chooses an option outside conf/"
        return None
    if parsed.is_add() or parsed.is_force_add():
        return "adds to the configuration"
    if key in ("resume", "rerun") and re.fullmatch(r"[0-9a-f]{6,32}(,[0-9a-f]{6,32})*", text_of(override)):
        return None  # runs whose own recipes are checked in turn
    if package is not None or key.partition(".")[0] not in RECIPE | {"parameter_limit", "save_every"} or _names(key, LOCATIONS):
        return "is not a key of the recipe"
    return None


@cache
def _parsed(override: str) -> Override:
    return parse([override])[0]


def parse(overrides: Sequence[str]) -> list[Override]:
    """Return override strings as parsed by Hydra; raises HydraException."""
    return OverridesParser.create().parse_overrides(list(overrides))


def _options(parsed: Override) -> list[str]:
    """Return the options that an override of a group chooses; a glob, which can only match files in conf/, counts as none."""
    value = parsed.value()
    if parsed.key_or_group not in GROUPS or isinstance(value, Glob) or (parsed.is_delete() and value is None):
        return []
    return list(parsed.sweep_string_iterator()) if parsed.is_discrete_sweep() else [parsed.get_value_element_as_str()]


def _names(key: str, keys: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in keys)
