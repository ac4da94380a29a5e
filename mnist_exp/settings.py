"""The typed configuration: check it once, where it enters, and build its nodes."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import field
from difflib import get_close_matches
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from pydantic.dataclasses import dataclass
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticCustomError

from mnist_exp.errors import Count, MissingDataError, UserError
from mnist_exp.overrides import JOB_KEY, PARTS, check_stored, is_location, key_of
from mnist_exp.paths import CONFIG_DIR, HOME, LOCATIONS, NAME, config_dirs

if TYPE_CHECKING:
    from mnist_exp.learning.data import Dataset

TRIAL_STEPS = 1000  # of the schedules that are built to check their arguments
ID = "[0-9a-f]{6,32}"  # an id of a run, or its first digits
# Keys that do not affect a run's outcome.
NEUTRAL = ("output_dir", "tracking", "parameter_limit", "save_every", "resume", "rerun", "sweep", JOB_KEY, "shape")
RESERVED = ("_target_", "_partial_")  # keys of a node that are no arguments
CHECKED = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def _node(value: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value.get("_target_"), str):
        raise PydanticCustomError("expected", "an option of its group in conf/, with the key _target_")
    return value


def _run_id(value: Any, *others: str) -> Any:
    if not (isinstance(value, str) and (value in others or re.fullmatch(ID, value))):
        expected = "the id of a run, or at least its first 6 hexadecimal digits, in quotes{others}"
        raise PydanticCustomError("expected", expected, {"others": "".join(f", or {other}" for other in others)})
    return value


Node = Annotated[dict[str, Any], AfterValidator(_node)]  # a call: `_target_` and its arguments
RunId = Annotated[str, BeforeValidator(_run_id)]  # what a recipe names must stay the same run: never latest
RunChoice = Annotated[str, BeforeValidator(lambda value: _run_id(value, "latest"))]


class SweepSettings(BaseModel):
    """The keys of `sweep`, as conf/config.yaml describes them."""

    model_config = CHECKED
    resume: RunChoice | None = None
    extend: RunChoice | None = None
    dry_run: bool = False
    force: bool = False


class JobContext(BaseModel):
    """The context of a job, which its sweep sets by a hidden override.

    Args:
        sweep_id: The id of the parent.
        number: The number of the job.
        color: The color of the job in charts, `#RRGGBB`.
        varied: The keys that differ between jobs.
        data: The data set of the finished jobs, None if they differ.
        in_search: Whether a search proposed the job, and may stop it.
    """

    model_config = CHECKED
    sweep_id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    number: Annotated[int, Field(ge=0)]
    color: Annotated[str, Field(pattern="^#[0-9A-Fa-f]{6}$")]
    varied: list[str]
    data: str | None
    in_search: bool

    def as_override(self) -> str:
        """Return the override that carries the context to the job."""
        values = ",".join(f"{key}:{json.dumps(value)}" for key, value in self.model_dump().items())
        return f"+{JOB_KEY}={{{values}}}"


class Settings(BaseModel):
    """A resolved configuration, as conf/config.yaml describes it. A stored one may lack newer keys: their defaults apply.

    Args:
        shape: The arguments that every model takes from the data; a run adds them to the configuration that it stores.
    """

    model_config = CHECKED
    seed: Annotated[int, Field(ge=0)]
    batch_size: Count
    data: Node
    model: Node
    phases: dict[str, Node]
    tracking: Node
    optimizer: Node | None = None
    scheduler: Node | None = None
    augmentation: Node | None = None
    teacher: Node | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    output_dir: Path = HOME / "outputs"
    parameter_limit: Count | None = 25_000
    save_every: Count | None = None
    resume: RunChoice | None = None
    rerun: RunChoice | None = None
    sweep: SweepSettings = SweepSettings()
    sweep_job: JobContext | None = None
    shape: dict[Literal["classes", "side", "in_channels"], Count] | None = None

    def digest(self, counted: Container[str] = ()) -> str:
        """Return a digest of the settings that affect the results of a run, with newer keys at their defaults.

        Args:
            counted: Keys that count although they do not affect the results, because a sweep varies them.
        """
        if self.rerun:  # such a run brings its own recipe
            return _digest_of({"rerun": self.rerun})
        recipe = _with_defaults(self.model_dump(mode="json", exclude={key for key in NEUTRAL if key not in counted}), "")
        places = {key.removeprefix("data.") for key in LOCATIONS}
        recipe["data"] = {key: value for key, value in recipe["data"].items() if key not in places}
        recipe["phases"] = list(recipe["phases"].items())  # their order counts
        return _digest_of(recipe)


@dataclass(frozen=True)
class Recipe:
    """A run's settings, the option of each group, and the overrides of its command line.

    Args:
        settings: The settings.
        choices: The option of each group.
        overrides: The overrides, without locations.
    """

    settings: Settings
    choices: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    def as_json(self) -> str:
        """Return the recipe as text, which `read_recipe` reads."""
        config = self.settings.model_dump(mode="json")
        return json.dumps({"config": config, "choices": self.choices, "overrides": self.overrides})


def read_recipe(text: str | bytes, source: str) -> Recipe:
    """Return a recipe from a store or a checkpoint, which anyone who can write there can change.

    Its configuration is plain JSON without `${`, may call only what files of conf/ name, and its overrides set the recipe only.

    Raises:
        UserError: The recipe is not as `Recipe.as_json` writes it, or names what it must not.
    """
    try:
        content = json.loads(text)
        recipe = Recipe(check_settings(json.dumps(content["config"])), content["choices"], content["overrides"])
    except UserError as error:
        error.add_note(f"This is in {source}.")
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{source} contains no readable recipe: {error}") from error
    check_stored(recipe.overrides, source)
    return recipe


def stored_node(group: str, node: Any, source: str) -> dict[str, Any]:
    """Return a node of a group from a store, checked as `read_recipe` does; raises UserError."""
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError(f"{source} contains no readable node {group}.")
    _check_nodes({group: node})
    return node


def defaults_of_newer_keys(settings: Settings) -> dict[str, Any]:
    """Return the keys that a stored configuration lacks, because it is older than they are, and the defaults that apply."""
    missing = settings.model_dump(include=Settings.model_fields.keys() - settings.model_fields_set - {"shape", JOB_KEY, *PARTS})
    for key, node in walk(settings.model_dump(exclude={"tracking"})):
        if isinstance(node, dict):
            missing |= {f"{key}.{name}": value for name, value in _defaults(node, key).items() if name not in node}
    return missing


def _defaults(node: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the defaults of a node's arguments if its target is ours: conf/ writes out all of them."""
    if not str(node.get("_target_")).startswith(f"{NAME}."):
        return {}
    parameters = inspect.signature(_target(node, key)).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}


def _with_defaults(value: Any, key: str) -> Any:
    """Return a part of a configuration with the defaults of the arguments that its nodes lack."""
    if isinstance(value, list):
        return [_with_defaults(item, key) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: _with_defaults(item, f"{key}.{name}") for name, item in (_defaults(value, key) | value).items()}


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def check_settings(text: str) -> Settings:
    """Return the settings in JSON text; raises UserError if a key or a value is wrong, or a target is not allowed."""
    try:
        settings = Settings.model_validate_json(text)
    except ValidationError as error:
        raise explain(error, known=Settings.model_fields) from error
    for name, phase in settings.phases.items():
        if not re.fullmatch(r"\w+", name) or name in Settings.model_fields or name == "total":
            raise UserError.invalid(f"phases.{name}", "...", "as its name a word that is no key of the configuration")
        for part in PARTS:
            if not isinstance(phase.get(part), dict) or "_target_" not in phase[part]:
                raise UserError.invalid(
                    f"phases.{name}.{part}", phase.get(part), f"an option: +{part}@phases.{name}.{part}=OPTION"
                )
    _check_nodes(json.loads(text))
    return settings


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every node of a configuration, dicts and lists included."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        inner = f"{path}.{key}" if path else str(key)
        yield inner, value
        if isinstance(value, dict | list):
            yield from walk(value, inner)


def check_repeats(settings: Settings, overrides: Iterable[str]) -> None:
    """Raise UserError if overrides resume or rerun a run, which brings its own recipe, and change more than locations."""
    run = settings.resume or settings.rerun
    changed = [override for override in overrides if not is_location(override) and key_of(override) not in ("resume", "rerun")]
    if run and changed:
        raise UserError(
            f"{'resume' if settings.resume else 'rerun'}={run} uses the run's own recipe: {' '.join(changed)} cannot change it.",
            key=changed[0],
            expected="at most the locations output_dir, tracking and data.root",
            remedy="Start a new run for another recipe.",
        )


def _check_nodes(config: Mapping[str, Any]) -> None:
    """Raise UserError on a target that no file of its group names at its place, or on text that Hydra would resolve again."""
    for key, value in walk(config):
        if isinstance(value, str) and "${" in value:
            raise UserError.invalid(key, value, "a plain value, without ${...}")
        if key.endswith("_target_") and (_place(key), str(value)) not in targets(tuple(config_dirs())):
            group = _place(key).partition(".")[0]
            raise UserError.invalid(
                key,
                value,
                f"a target that a file of conf/{group}/ names at this place",
                f"Write it into a file, conf/{group}/NAME.yaml, and choose {group}=NAME. If the file is in another folder, add "
                f"{CONFIG_DIR} FOLDER.",
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
    for folder, group in ((folder, group) for folder in folders for group in ("", "local", "phase", "experiment", "arm", *nodes)):
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
    try:
        return _instantiate(node, key, arguments)
    except Exception as error:  # targets raise exceptions of any kind
        raise not_built(node, key, error) from error


def _instantiate(value: Any, key: str, arguments: Mapping[str, Any]) -> Any:
    """Return a value with all nodes in it called: as Hydra's `instantiate`, which takes 10 ms and resolves text again."""
    if isinstance(value, list):
        return [_instantiate(item, key, {}) for item in value]
    if not isinstance(value, dict):
        return value
    built = {name: _instantiate(item, f"{key}.{name}", {}) for name, item in value.items() if name not in RESERVED}
    if "_target_" not in value:
        return built
    function = partial(_target(value, key), **built, **arguments)
    return function if value.get("_partial_") else function()


def call(function: Callable[..., Any], node: Mapping[str, Any], key: str, *values: Any, **named: Any) -> Any:
    """Call what `build` has made of a node with `_partial_`; raises UserError."""
    try:
        return function(*values, **named)
    except Exception as error:  # torch and extensions raise exceptions of any kind
        raise not_built(node, key, error) from error


def not_built(node: Mapping[str, Any], key: str, error: BaseException) -> UserError:
    """Return the error for a node whose target has raised `error`."""
    if isinstance(error, UserError):
        return error if not error.key else type(error).invalid(f"{key}.{error.key}", error.value, error.expected, error.remedy)
    arguments = ", ".join(f"{name}={value}" for name, value in node.items() if name[0] != "_" and not isinstance(value, dict))
    return UserError(
        f"{key} cannot be built: {node['_target_']} refuses {arguments or 'its arguments'}: {error}.",
        key=key,
        value=dict(node),
        remedy=f"Change an argument with {key}.ARGUMENT=VALUE.",
    )


def check_arguments(node: Mapping[str, Any], key: str) -> None:
    """Raise UserError unless the target of the node `key` accepts its arguments, by name and by annotation."""
    target = _target(node, key)
    arguments = {name: value for name, value in node.items() if name not in RESERVED}
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # written in C
        return
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        known = [name for name, item in parameters.items() if name in arguments or item.default is not item.empty]
        for name in arguments.keys() - parameters.keys():
            raise _unknown(f"{key}.{name}", known, f"an argument of {node['_target_']}")
    for name, value in arguments.items():
        if isinstance(value, dict) and "_target_" in value:
            check_arguments(value, f"{key}.{name}")
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
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
        fields: dict[str, Any] = {f"field_{name}": (hints.get(name, Any), Field(alias=name)) for name in names}
        return create_model("Arguments", __config__=CHECKED, **fields)
    except (NameError, TypeError, PydanticUserError):
        return None


def _target(node: Mapping[str, Any], key: str) -> Any:
    module, _, name = str(node["_target_"]).rpartition(".")
    try:
        return getattr(import_module(module), name)
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
        known: The keys of the whole configuration, for one that is unknown.
    """
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"]]
    names = [part for part in parts if re.fullmatch(r"\w+", part) and part not in ("int", "float")]  # not branches of unions
    key = ".".join(filter(None, [prefix, *names]))
    if first["type"] == "extra_forbidden":
        return _unknown(key, SweepSettings.model_fields if parts[0] == "sweep" else known, "a key of the configuration")
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        return UserError.invalid(key.rpartition(".")[0], first["input"], "more values in the list")
    if first["type"] == "missing":
        return UserError(f"{key} is missing.", key=key, expected="a value", remedy=f"Set it, or do not delete it (~{key}).")
    expected = re.sub(r"^\w+ (should (be|have)|is not) ", "", first["msg"])
    expected = f"a number {expected}" if expected.startswith(("greater", "less")) else expected
    return UserError.invalid(key, first["input"], expected, f"Set it with {key}=... on the command line.")


def _unknown(key: str, known: Iterable[str], kind: str) -> UserError:
    expected = f"one of {', '.join(sorted(known))}" if known else "none"
    hint = did_you_mean(key.rpartition(".")[2], known)
    return UserError(f"{key} is not {kind}{hint}: expected {expected}.", key=key, expected=expected)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' (did you mean ...?)' with the known word closest to `word`, or an empty text."""
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


class Trial:
    """Builds the nodes of configurations before anything is loaded or trained, each distinct one once.

    So all jobs of a sweep are checked in seconds.
    """

    def __init__(self) -> None:
        self._results: dict[str, Any] = {}

    def try_out(self, settings: Settings, *, read_data: bool = False) -> None:
        """Check the arguments of every target of a configuration.

        Args:
            settings: The configuration.
            read_data: Whether to read the images, which tell whether the model and the phases fit them. This is skipped if this
                machine, such as the head of a cluster, lacks them.

        Raises:
            UserError: A target refuses its arguments, the model has too many parameters, or a value does not fit the images.
        """
        from mnist_exp.learning.training import check_split  # imports torch, which takes seconds that other commands do not need

        self._once(check_arguments, settings.tracking, "tracking")
        self._once(check_arguments, settings.data, "data")
        data = self._once(_read_data, settings.data) if read_data else None
        self._once(_try_model, settings.model, data.shape if data else settings.shape, settings.parameter_limit)
        shared = {part: str(getattr(settings, part)) for part in PARTS}  # as text, because NaN differs from itself
        for name, node in settings.phases.items():
            keys = {part: part if str(node[part]) == shared[part] else f"phases.{name}.{part}" for part in PARTS}
            phase = self._once(_try_phase, node, f"phases.{name}", keys)
            if data:
                check_split(name, phase, data)

    def _once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        text = json.dumps([function.__name__, *arguments], sort_keys=True)
        if text not in self._results:
            self._results[text] = function(*arguments)
        return self._results[text]


def _read_data(node: dict[str, Any]) -> "Dataset | None":
    """Return a data set, None if this machine lacks its images."""
    try:
        data: Dataset = build(node, "data", seed=0)
    except MissingDataError:
        return None
    return None if data.warning else data  # others that take its place tell nothing


def _try_model(node: dict[str, Any], shape: dict[str, int] | None, limit: int | None) -> None:
    import torch

    from mnist_exp.learning.models import count_parameters

    check_arguments(node, "model")
    if shape is not None:
        with torch.device("meta"):  # before memory is allocated
            count_parameters(build(node, "model", **shape), limit)


def _try_phase(node: dict[str, Any], key: str, keys: dict[str, str]) -> Any:
    """Return a phase as built, after its optimizer and its schedule are called; keys: those of its parts, for messages."""
    import torch

    parts = {part: build(node[part], keys[part]) for part in PARTS}
    layer = torch.nn.Conv2d(1, 1, 1)  # has both kinds of parameters that optimizers distinguish
    optimizer = call(parts["optimizer"], node["optimizer"], keys["optimizer"], layer.parameters())
    call(parts["scheduler"], node["scheduler"], keys["scheduler"], optimizer, total_steps=TRIAL_STEPS)
    return build(node, key)
