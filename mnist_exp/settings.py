"""The typed configuration: check it once, where it enters."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from mnist_exp.errors import Count, Mark, MissingDataError, UserError
from mnist_exp.metrics import objectives
from mnist_exp.nodes import (
    CHECKED,
    build,
    call,
    check_arguments,
    check_nodes,
    defaults_of,
    explain,
    is_location,
    marked,
    unknown_key,
    walk,
)
from mnist_exp.overrides import GROUPS, JOB_KEY, PARTS, key_of, parse, section_of, text_of
from mnist_exp.paths import HOME

if TYPE_CHECKING:
    from mnist_exp.learning.data import Dataset

FORMAT = 8  # of recipes, checkpoints and models; raised if an older one would be misread
TRIAL_STEPS = 1000  # of the schedules that are built to check their arguments
ID = "[0-9a-f]{6,32}"  # an id of a run, or its first digits
# Keys that do not affect a run's results.
NEUTRAL = ("output_dir", "tracking", "objective", "save_every", "resume", "rerun", "sweep", JOB_KEY, "data_description")


def _node(value: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value.get("_target_"), str):
        raise PydanticCustomError("expected", "an option of its group in conf/, with the key _target_")
    return value


def _run_id(value: Any, *others: str) -> Any:
    if not (isinstance(value, str) and (value in others or re.fullmatch(ID, value))):
        expected = "the id of a run, or at least its first 6 hexadecimal digits, in quotes{others}"
        raise PydanticCustomError("expected", expected, {"others": "".join(f", or {other}" for other in others)})
    return value


def _objective(value: str) -> str:
    if value not in objectives():
        raise PydanticCustomError("expected", "a validation metric: {known}", {"known": " or ".join(objectives())})
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
        objective: The metric that decides.
        data: The data set of the finished jobs, None if they differ.
        in_search: Whether a search proposed the job, and may stop it.
    """

    model_config = CHECKED
    sweep_id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    number: Annotated[int, Field(ge=0)]
    color: Annotated[str, Field(pattern="^#[0-9A-Fa-f]{6}$")]
    varied: list[str]
    objective: str
    data: str | None
    in_search: bool

    def as_override(self) -> str:
        """Return the override that carries the context to the job."""
        values = ",".join(f"{key}:{json.dumps(value)}" for key, value in self.model_dump().items())
        return f"+{JOB_KEY}={{{values}}}"


class DataDescription(BaseModel):
    """What models and their users need to know of a data set, and of its use.

    Args:
        name: The name of the data set, the same for any part of it.
        class_names: The name of each class.
        side: Height and width of the images.
        channels: 1 for gray values, 3 for colors.
        preparation: How pictures become images: `handwriting` for digits, else `plain`.
        digests: The digest of each split.
        locations: The places where the data were found, by the arguments of their function.
        trained_on: The splits that the model may have been trained on.
        before: The descriptions of the models that its weights came from.
        warning: Shown to the users of the model, empty without one.
    """

    model_config = CHECKED
    name: str = ""
    class_names: Annotated[list[str], Field(min_length=1)]
    side: Count
    channels: Count
    preparation: Literal["handwriting", "plain"] = "plain"
    digests: dict[str, str] = Field(default_factory=dict)
    locations: dict[str, str] = Field(default_factory=dict)
    trained_on: list[str] = Field(default_factory=list)
    before: list["DataDescription"] = Field(default_factory=list)
    warning: str = ""

    def may_have_trained_on(self, other: "DataDescription", split: str) -> bool:
        """Return whether a model of this description may have been trained on images of a split of `other`."""
        if any(earlier.may_have_trained_on(other, split) for earlier in self.before):
            return True
        if self.digests.get(split) == other.digests[split]:
            return split in self.trained_on
        return self.name == other.name

    @property
    def shape(self) -> dict[str, int]:
        """The arguments that every model takes from the data."""
        return {"classes": len(self.class_names), "side": self.side, "in_channels": self.channels}


class Settings(BaseModel):
    """A resolved configuration, as conf/config.yaml describes it. A stored one may lack newer keys: their defaults apply.

    Its further keys are those of `PARTS`, which the phases share.

    Args:
        data_description: Of the data of a run, which adds it to the configuration that it stores.
    """

    model_config = CHECKED | ConfigDict(extra="allow")
    seed: Annotated[int, Field(ge=0)]
    batch_size: Count
    data: Node
    model: Node
    phases: Annotated[dict[str, Node], Field(min_length=1)]
    tracking: Node
    init: Annotated[str, Field(min_length=1)] | None = None
    init_strict: bool = True
    objective: Annotated[str, AfterValidator(_objective)] = "val/accuracy"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    output_dir: Path = HOME / "outputs"
    save_every: Count | None = None
    resume: RunChoice | None = None
    rerun: RunChoice | None = None
    sweep: SweepSettings = SweepSettings()
    sweep_job: JobContext | None = None
    data_description: DataDescription | None = None

    def neutral_arguments(self) -> set[str]:
        """Return the keys of arguments that do not affect the results: the places of data, and the limit of a model."""
        places = [f"data.{name}" for name in marked(self.data, "data", *Mark)]
        return {*places, *(f"model.{name}" for name in marked(self.model, "model", Mark.LIMIT))}

    def digest(self, counted: Collection[str] = (), overrides: Iterable[str] = ()) -> str:
        """Return a digest of the settings that affect the results of a run, with newer keys at their defaults.

        Args:
            counted: Keys that count although they do not affect the results, because a sweep varies them.
            overrides: The overrides of a job. Options that differ in the place of their data alone are different jobs.
        """
        if self.rerun:  # such a run brings its own recipe
            return _digest_of({"rerun": self.rerun})
        excluded = {key for key in NEUTRAL if key not in counted} | PARTS.keys()  # the phases have their parts
        recipe = _comparable(self.model_dump(mode="json", exclude=excluded), "")
        for key in self.neutral_arguments() - set(counted):
            group, _, name = key.partition(".")
            recipe[group].pop(name, None)
        chosen = [override for override in overrides if key_of(override) in {"data", "experiment", "arm"} & set(counted)]
        return _digest_of([recipe, sorted(chosen)] if chosen else recipe)


# The keys that a stored override may set: those of a recipe, and those that decide on its ranking and its checkpoints.
STORABLE = (Settings.model_fields.keys() - set(NEUTRAL)) | {"objective", "save_every", *PARTS}


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
        return json.dumps({"format": FORMAT, "config": config, "choices": self.choices, "overrides": self.overrides})


def read_recipe(text: str | bytes, source: str) -> Recipe:
    """Return a recipe from a store or a checkpoint, which anyone who can write there can change.

    Its configuration is plain JSON without `${`, may call only what files of conf/ name, and its overrides set the recipe only.

    Raises:
        UserError: The recipe is not as `Recipe.as_json` writes it, or names what it must not.
    """
    try:
        content = json.loads(text)
        check_format(content, source)
        recipe = Recipe(check_settings(json.dumps(content["config"])), content["choices"], content["overrides"])
    except UserError as error:
        error.add_note(f"This is in {source}.")
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{source} contains no readable recipe: {error}") from error
    check_stored(recipe.overrides, source)
    return recipe


def check_stored(overrides: Iterable[str], source: str) -> None:
    """Raise UserError unless all overrides, read from `source`, set keys of the recipe or choose options of its groups.

    Anyone who can write to the source can change them. `hydra.*`, a search path or an option outside conf/ could run code, a
    resolver could read the environment, and a location could point outside the output folder.
    """
    for override in overrides:
        if problem := _problem(override):
            raise UserError(
                f"{source} contains the override {override!r}, which {problem}.",
                key=override,
                expected="overrides of the recipe's keys and groups, such as model=se_cnn or optimizer.lr=0.1",
                remedy="Start a new run or sweep with your own command line.",
            )


def _problem(override: str) -> str:
    """Return the reason why a store must not contain an override, empty if it may."""
    try:
        parsed = parse(override)
    except UserError:
        return "Hydra cannot parse"
    if re.search(r"\$\\|\$\{(?![\w.]+\})", override):
        return "contains another interpolation than ${KEY}"
    if parsed.key_or_group in GROUPS:
        if parsed.package is not None and parsed.package.partition(".")[0] not in STORABLE:
            return f"inserts an option at {parsed.package}"
        return "chooses no option by its plain name" if re.search(r"[/{]|\.\.", text_of(override)) else ""
    is_id = re.fullmatch(r"(resume|rerun)=[0-9a-f,']+", override)  # of runs whose own recipes are checked in turn
    if not (section_of(override) in STORABLE or is_id):
        return "sets no key of the recipe and names no run by its id"
    return ""


def check_format(content: Any, source: str) -> None:
    """Raise UserError unless `content`, read from `source`, has the format of this version."""
    found = content.get("format", "an earlier one") if isinstance(content, dict) else "none"
    if found != FORMAT:
        raise UserError(
            f"{source} has format {found}, expected {FORMAT}: another version of this program wrote it.",
            key="format",
            value=found,
            expected=str(FORMAT),
            remedy="Use that version, or start a new run.",
        )


def defaults_of_newer_keys(settings: Settings) -> dict[str, Any]:
    """Return the keys that a stored configuration lacks, because it is older than they are, and the defaults that apply."""
    unset = Settings.model_fields.keys() - settings.model_fields_set - {"data_description", JOB_KEY}
    missing = settings.model_dump(include=unset)
    for key, node in walk(settings.model_dump(exclude={"tracking"})):
        if isinstance(node, dict):
            missing |= {f"{key}.{name}": value for name, value in defaults_of(node, key).items() if name not in node}
    return missing


def _comparable(value: Any, key: str) -> Any:
    """Return a part of a configuration with the defaults of the arguments that its nodes lack, and the order of its nodes."""
    if isinstance(value, list):
        return [_comparable(item, key) for item in value]
    if not isinstance(value, dict):
        return value
    items = {name: _comparable(item, f"{key}.{name}") for name, item in (defaults_of(value, key) | value).items()}
    are_nodes = bool(value) and all(isinstance(item, dict) and "_target_" in item for item in value.values())
    return list(items.items()) if are_nodes else items  # phases, callbacks and the parts of an augmentation have an order


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def check_settings(text: str) -> Settings:
    """Return the settings in JSON text; raises UserError if a key or a value is wrong, or a target is not allowed."""
    try:
        settings = Settings.model_validate_json(text)
    except ValidationError as error:
        raise explain(error, known=SweepSettings.model_fields) from error
    known = Settings.model_fields.keys() | PARTS
    for key in (settings.model_extra or {}).keys() - PARTS:
        raise unknown_key(key, known, "a key of the configuration")
    for name, phase in settings.phases.items():
        if not re.fullmatch(r"\w+", name) or name in known or name == "total":
            raise UserError.invalid(f"phases.{name}", "...", "as its name a word that is no key of the configuration")
        for part in PARTS.keys() & phase:
            nodes = phase[part].values() if part == "callbacks" and isinstance(phase[part], dict) else [phase[part]]
            if not all(isinstance(node, dict) and "_target_" in node for node in nodes):
                nested = ", below the name of the option" if part == "callbacks" else ""
                expected = f"an option, whose file in conf/{part}/ has the key _target_{nested}"
                remedy = f"Choose one with +{part}@phases.{name}.{part}=OPTION."
                raise UserError.invalid(f"phases.{name}.{part}", phase[part], expected, remedy)
    check_nodes(json.loads(text))
    return settings


def check_repeats(settings: Settings, overrides: Iterable[str]) -> None:
    """Raise UserError if overrides resume or rerun a run, which brings its own recipe, and change more than locations."""
    run = settings.resume or settings.rerun
    changed = [override for override in overrides if not is_location(override) and key_of(override) not in ("resume", "rerun")]
    if run and changed:
        raise UserError(
            f"{'resume' if settings.resume else 'rerun'}={run} uses the run's own recipe: {' '.join(changed)} cannot change it.",
            key=changed[0],
            expected="at most locations: output_dir, tracking, and those of the data",
            remedy="Start a new run for another recipe.",
        )


class Trial:
    """Builds the nodes of configurations before anything is loaded or trained, each distinct one once.

    So all jobs of a sweep are checked in seconds.
    """

    def __init__(self) -> None:
        self._results: dict[str, Any] = {}

    def try_out(self, settings: Settings, *, read_data: bool = False, needs_validation: bool = False) -> dict[str, Any]:
        """Check the arguments of every target of a configuration; return its phases as built, by name.

        Args:
            settings: The configuration.
            read_data: Whether to read the images, which tell whether the model and the phases fit them. This is skipped if this
                machine, such as the head of a cluster, lacks them.
            needs_validation: Whether a phase must be validated, if the images are read.

        Raises:
            UserError: A target refuses its arguments, the model has too many parameters, or a value does not fit the images.
        """
        from mnist_exp.learning.training import check_phases  # imports torch: seconds that other commands do not need

        self._once(check_arguments, settings.tracking, "tracking")
        self._once(check_arguments, settings.data, "data")
        data = self._once(_read_data, settings.data) if read_data else None
        description = data or settings.data_description
        model = self._once(_try_model, settings.model, description.shape if description else None)
        shared = {part: str(node) for part, node in (settings.model_extra or {}).items()}  # as text: NaN differs from itself
        phases = {}
        for name, node in settings.phases.items():
            parts = PARTS.keys() & node
            keys = {part: part if str(node[part]) == shared.get(part) else f"phases.{name}.{part}" for part in parts}
            phases[name] = self._once(_try_phase, node, f"phases.{name}", keys)
        if data and not any(check_phases(phases, data, model).values()) and needs_validation:
            raise UserError(
                f"No phase measures {settings.objective}: all use the images that validate, {data.validation}, or come later.",
                key="phases",
                remedy="Train on others first, such as phase=[train].",
            )
        return phases

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


def _try_model(node: dict[str, Any], shape: dict[str, int] | None) -> Any:
    """Return the model without values; None if the shape of the data is unknown."""
    from mnist_exp.learning.models import without_values

    check_arguments(node, "model")
    if shape is None:
        return None
    with without_values():
        return build(node, "model", **shape)


def _try_phase(node: dict[str, Any], key: str, keys: dict[str, str]) -> Any:
    """Return a phase as built, after its optimizer and its scheduler took a step; keys: those of its parts, for messages."""
    import torch

    from mnist_exp.learning.training import make_scheduler, set_mode

    parts = {part: _build_part(node[part], keys[part]) for part in keys}
    phase = build({name: value for name, value in node.items() if name not in parts}, key, **parts)
    layer = torch.nn.Conv2d(1, 1, 1)  # has both kinds of parameters that optimizers distinguish
    optimizer = call(parts["optimizer"], node["optimizer"], keys["optimizer"], layer.parameters())
    scheduler = call(make_scheduler, node["scheduler"], keys["scheduler"], parts["scheduler"], optimizer, TRIAL_STEPS)
    call(set_mode, node["optimizer"], keys["optimizer"], optimizer, "train")
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for part, stepped, lacks in (("optimizer", optimizer, "closure"), ("scheduler", scheduler, "metric")):
        try:
            stepped.step()
        except Exception as error:  # torch and extensions raise exceptions of any kind
            expected = f"one that steps after every batch, without a {lacks}"
            raise UserError.invalid(keys[part], node[part]["_target_"], expected, f"Choose another {part}: {error}") from error
    return phase


def _build_part(node: dict[str, Any], key: str) -> Any:
    """Build a part of a phase: a node, or the nodes of the callbacks by name."""
    if "_target_" in node:
        return build(node, key)
    return {name: build(item, f"{key}.{name}") for name, item in node.items()}
