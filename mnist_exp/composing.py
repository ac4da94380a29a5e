"""Compose the configuration as the command line does, and explain what Hydra refuses."""

import json
import os
import re
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from mnist_exp.errors import UserError
from mnist_exp.nodes import did_you_mean, walk
from mnist_exp.overrides import GROUPS, PARTS, check_groups, not_an_override, quoted
from mnist_exp.paths import CONF, HOME, LOCAL, TRACKING, config_dirs, take_credentials
from mnist_exp.settings import Recipe, Settings, check_settings

OmegaConf.register_new_resolver("root", lambda path: str(HOME / path), replace=True)
OmegaConf.register_new_resolver("scaled", lambda value, at, to: value * to / at, replace=True)

EXTRAS = {"ray_launcher": "ray", "submitit": "slurm", "optuna": "search"}  # by part of the name of a package
COMPOSING_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
# Names that people know from elsewhere, and ours.
SYNONYMS = {
    "learning_rate": "lr", "num_epochs": "epochs", "max_epochs": "epochs", "bs": "batch_size", "batchsize": "batch_size",
    "wd": "weight_decay", "random_seed": "seed", "random_state": "seed", "train_batch_size": "batch_size",
}  # fmt: skip


def read_environment() -> None:
    """Store the options that the environment chooses as `environment` of conf/config.yaml: Hydra 1.4 takes no variables there."""
    chosen = {"tracking": os.environ.get(TRACKING, "mlflow"), "local": os.environ.get(LOCAL, "default")}
    configs = ConfigStore.instance()
    configs.repo.pop("environment.yaml", None)  # Hydra 1.3 lacks replace=True
    configs.store("environment", {"defaults": [{f"override /{group}": option} for group, option in chosen.items()]})


read_environment()  # for workers, which compose their jobs


def from_composed(composed: DictConfig) -> Settings:
    """Return the settings of a composed configuration, resolved and checked; raises UserError."""
    try:
        config = OmegaConf.to_container(without_hydra(composed), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration cannot be resolved: {str(error).splitlines()[0]}") from error
    assert isinstance(config, dict)
    tracking = config.get("tracking")
    if isinstance(tracking, dict) and isinstance(tracking.get("uri"), str):  # from conf/local, or a preset
        tracking["uri"] = take_credentials(tracking["uri"])
    return check_settings(json.dumps(config))


def without_hydra(composed: DictConfig) -> DictConfig:
    """Return a composed configuration without its node `hydra`."""
    if "hydra" not in composed:  # a copy takes longer than all checks of a job
        return composed
    config = composed.copy()
    with open_dict(config):
        config.pop("hydra", None)
    return config


def compose_recipe(*overrides: str) -> Recipe:
    """Compose the default configuration as the command line does, with conf/local and the environment; raises UserError."""
    check_groups(overrides)
    read_environment()
    folders = ",".join(quoted(f"file://{folder}") for folder in config_dirs()[1:])
    search = [f"hydra.searchpath=[{folders}]"] if folders else []
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", [*overrides, *search], return_hydra_config=True)
    except COMPOSING_ERRORS as error:
        raise explain(error) from error
    return Recipe(from_composed(composed), choices_of(composed.hydra), list(overrides))


def local_defaults(group: str) -> dict[str, Any]:
    """Return the keys of a group that the user's own defaults in conf/local set."""
    file = CONF / "local" / f"{os.environ.get(LOCAL, 'default')}.yaml"
    content = OmegaConf.to_container(OmegaConf.load(file), resolve=False) if file.is_file() else {}
    own = content.get(group) if isinstance(content, dict) else None
    return own if isinstance(own, dict) else {}


def choices_of(hydra: Any) -> dict[str, str]:
    """Return the option of each group of a composed configuration, given its node `hydra`."""
    return {group: option for group, option in hydra.runtime.choices.items() if option and not group.startswith("hydra/")}


def config_dir_of(hydra: Any) -> str | None:
    """Return the folder of --config-dir of a composed configuration, given its node `hydra`; None without one."""
    return next((source.path for source in hydra.runtime.config_sources if source.provider == "command-line"), None)


def explain(error: Exception) -> UserError:
    """Return the error for the user that stands for one that Hydra has raised while it composed the configuration."""
    text, cause = str(error).strip(), error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and (key := cause.full_key):
        shared = re.match(rf"phases\.\w+\.(({'|'.join(PARTS)})\..+)", key)
        if shared and not cause.parent_node:
            return UserError(f"{key} refers to a key at the top level.", key=key, remedy=f"Override {shared[1]} instead.")
        if isinstance(cause.parent_node, DictConfig):
            expected = f"one of {', '.join(sorted(map(str, cause.parent_node)))}"
            return _unchosen(key) or UserError(
                f"{key} is not a key of the configuration{_hint(key, cause.parent_node)}: expected {expected}.",
                key=key,
                expected=expected,
                remedy=f"A new key needs a plus: +{key}=..." if "." in key else "",
            )
    if isinstance(error, MissingConfigException):
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if group.startswith("hydra/") and (extra := missing_extra(str(error.missing_cfg_file))):
            return UserError(extra)
        known = error.options or [file.stem for folder in config_dirs() for file in (folder / group).glob("*.yaml")]
        if known:
            return UserError.invalid(group, option, f"one of {', '.join(sorted(known))}{did_you_mean(option, known)}")
    if several := re.match(r"(?:(Ambiguous) value for argument|Sweep parameters) '([^=']+)=(.*)'", text):
        is_ambiguous, key, values = several.groups()
        other = f"write {key}=[{values}] for a list, \"{key}='{values}'\" for text"
        other = "choose one" if key.partition("@")[0] in GROUPS or not is_ambiguous else other
        return UserError(
            f"{key}={values} gives several values.",
            key=key,
            value=values,
            remedy=f"Add -m as the first argument to run one job for each, or {other}.",
        )
    if isinstance(error, YAMLError):
        return UserError(f"A file of options is not valid YAML: {text}.", remedy="Correct it.")
    if isinstance(error, OverrideParseException):
        return not_an_override(error.override)
    return UserError(missing_extra(text) or "\n".join(dict.fromkeys([text, *([str(cause)] if cause else [])])))


def _unchosen(key: str) -> UserError | None:
    """Return the error for a key of a callback or a phase that has a file in conf/ but is not chosen, None for another key."""
    found = re.fullmatch(r"(?:.*\.)?(callbacks|phases)\.(\w+)", key)
    group = {"phases": "phase", "callbacks": "callbacks"}[found[1]] if found else ""
    if not found or not any((folder / group / f"{found[2]}.yaml").is_file() for folder in config_dirs()):
        return None
    return UserError(f"The option {found[2]} of {key} is not chosen.", key=key, remedy=f"Choose it: '{group}=[...,{found[2]}]'.")


def missing_extra(text: str) -> str | None:
    """Return the message for a text that names a package of an extra that is not installed, None for any other."""
    for package, extra in EXTRAS.items():
        if package in text:
            return f"{text} needs a package that is not installed. Install it with: pip install -e '.[{extra}]'"
    return None


def _hint(full_key: str, node: DictConfig) -> str:
    """Return ' (did you mean ...?)' for an unknown key of `node`: a synonym, a key further down, or one of similar spelling."""
    path, _, name = full_key.rpartition(".")
    name = SYNONYMS.get(name, name)
    prefix = f"{path}." if path else ""
    if name in node:
        return f" (did you mean {prefix}{name}?)"
    content = OmegaConf.to_container(node, resolve=False)
    below = [f"{prefix}{key}" for key, _ in walk(content) if key.rpartition(".")[2] == name]
    if below:
        return f" (did you mean {' or '.join(below[:2])}?)"
    return did_you_mean(name, [str(key) for key in node]).replace("did you mean ", f"did you mean {prefix}")
