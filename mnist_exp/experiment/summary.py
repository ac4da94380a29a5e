"""A run in words: its name, its parameters, its results and its description."""

import re

from mnist_exp.learning.data import Dataset
from mnist_exp.metrics import METRICS, format_metric, metric_of
from mnist_exp.nodes import walk
from mnist_exp.overrides import PARTS, command, key_of, text_of
from mnist_exp.settings import Recipe

CLASS_KEY = re.compile(rf"\w+\.({'|'.join(PARTS)})(\..+)?\._target_|model\..+\._target_")


def run_name(choices: dict[str, str], overrides: list[str], data: str) -> str:
    """Return a run's name: its model, its data unless that is mnist, and the rest of `overrides` in short form."""
    rest = [short_override(override, choices) for override in overrides if key_of(override) not in ("model", "data")]
    return " ".join([choices.get("model", "model"), *([] if data == "mnist" else [data]), *rest])[:200]


def recipe_name(recipe: Recipe) -> str:
    """Return a name that all runs of a recipe share, and runs of no other: a digest, and what most recipes differ in."""
    settings, choices = recipe.settings.model_copy(update={"seed": 0, "rerun": None}), recipe.choices
    parts = [choices[group] for group in ("model", "optimizer") if group in choices]
    return " ".join([*parts, f"bs={settings.batch_size}", settings.digest()[:8]])


def short_override(override: str, choices: dict[str, str]) -> str:
    """Return an override as names show it.

    `adam` for optimizer=adam, `bs=64` for batch_size=64, `finetune.bs=64` for that of a phase; ids have 8 digits, and numbers
    with a fraction three significant ones.
    """
    override = re.sub("([0-9a-f]{8})[0-9a-f]{24}", r"\1", override)
    key, value = key_of(override), text_of(override)
    if not value:
        return override
    phase = re.search(r"phases\.(\w+)\.", key)
    prefix = f"{phase[1]}." if phase else ""
    if choices.get(key) == value:
        return prefix + value
    if re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", value):
        value = f"{float(value):.3g}"
    name = key.rpartition(".")[2]
    return f"{prefix}{'bs' if name == 'batch_size' else name}={value}"


def parameters(recipe: Recipe) -> dict[str, object]:
    """Return the flat, readable part of a recipe that becomes the run's parameters."""
    settings, choices = recipe.settings, recipe.choices
    shared: dict[str, object] = {group: choices[group] for group in PARTS if group in choices}
    parts = {"data": settings.data, **settings.phases, "model": settings.model}
    apart = settings.neutral_arguments()
    return {
        **{group: choices[group] for group in ("model", "data") if group in choices},
        **({**shared, "batch_size": settings.batch_size} if "train" in settings.phases else {}),  # they belong to phase train
        "seed": settings.seed,
        **({"init": settings.init} if settings.init else {}),
        # An edited file in conf/ must show: its values, and the classes that each phase uses.
        **{key.removesuffix("._target_"): value.rpartition(".")[2] for key, value in walk(parts) if CLASS_KEY.fullmatch(key)},
        **{
            key: value
            for key, value in walk(parts)
            if not (isinstance(value, dict) or key in apart or re.search(r"\._|\.\d", key))
        },
    }


def result_rows(results: dict[str, float], data: Dataset) -> dict[str, str]:
    """Return the results of a run as the rows of a table: name, value with its unit."""
    parts, order = ("test", "val", "model", "time"), list(METRICS)
    names = [name for name in results if name.partition("/")[0] in parts]
    shown = sorted(names, key=lambda name: (parts.index(name.partition("/")[0]), order.index(metric_of(name).name), name))
    rows = {name: format_metric(name, results[name]) for name in shown}
    return rows | {"data": f"{data.name}: " + ", ".join(f"{name} {len(split):,}" for name, split in data.splits.items())}


def describe_run(rows: dict[str, str], overrides: list[str], warning: str | None, picture: str) -> str:
    """Return the run's description in Markdown, which the MLflow UI shows above everything else.

    Args:
        rows: From `result_rows`.
        overrides: The overrides of the command line.
        warning: A warning about the data or the number of steps, or None.
        picture: The link to the figure of the worst mistakes, empty without one.
    """
    table = "\n".join(f"| {name}&emsp; | {value} |" for name, value in rows.items())  # the UI leaves no space between columns
    shown_warning = f"**{warning}**\n\n" if warning else ""
    return (
        f"{shown_warning}| | |\n| --- | --- |\n{table}\n\nRepeat it: `{command('run', *overrides)}`\n\n"
        "Pictures, configuration and checkpoint are under Artifacts."
    ) + (f"\n\n![The worst mistakes]({picture})" if picture else "")
