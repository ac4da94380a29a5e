"""A run in words: its name, its parameters, its results and its description."""

import re

from mnist_exp.learning.data import Dataset
from mnist_exp.metrics import METRICS, format_metric, metric_of
from mnist_exp.overrides import PARTS, command, key_of, text_of
from mnist_exp.settings import Recipe, walk

CLASS_KEY = re.compile(rf"\w+\.({'|'.join(PARTS)})\._target_|model\..+\._target_")


def run_name(choices: dict[str, str], overrides: list[str], data: str) -> str:
    """Return a run's name: its model, its data unless that is mnist, and the rest of `overrides` in short form."""
    rest = [short_override(override, choices) for override in overrides if key_of(override) not in ("model", "data")]
    return " ".join([choices.get("model", "model"), *([] if data == "mnist" else [data]), *rest])[:200]


def short_override(override: str, choices: dict[str, str]) -> str:
    """Return an override as names show it: `adam` for optimizer=adam, `bs=64` for batch_size=64, run ids cut to 8 digits."""
    override = re.sub("([0-9a-f]{8})[0-9a-f]{24}", r"\1", override)
    key, value = key_of(override), text_of(override)
    if choices.get(key) == value:
        return value
    return f"{'bs' if key == 'batch_size' else key.rpartition('.')[2]}={value}" if value else override


def parameters(recipe: Recipe) -> dict[str, object]:
    """Return the flat, readable part of a recipe that becomes the run's parameters."""
    settings, choices = recipe.settings, recipe.choices
    shared: dict[str, object] = {group: choices[group] for group in PARTS if group in choices}
    parts = {**settings.phases, "model": settings.model}
    return {
        **{group: choices[group] for group in ("model", "data") if group in choices},
        **({**shared, "batch_size": settings.batch_size} if "train" in settings.phases else {}),  # they belong to phase train
        "seed": settings.seed,
        # An edited file in conf/ must show: the split of the data, and the classes that each phase uses.
        **{
            f"data.{key}": value for key, value in settings.data.items() if not re.match("_|root|default_root|fallback|seed", key)
        },
        **{key.removesuffix("._target_"): value.rpartition(".")[2] for key, value in walk(parts) if CLASS_KEY.fullmatch(key)},
        **{key: value for key, value in walk(parts) if not isinstance(value, dict) and not re.search(r"\._|\.\d", key)},
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
        warning: A warning about the data, or None.
        picture: The link to the figure of the worst mistakes, empty without one.
    """
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    shown_warning = f"**{warning}**\n\n" if warning else ""
    return (
        f"{shown_warning}| | |\n| --- | --- |\n{table}\n\nRepeat it: `{command('run', *overrides)}`\n\n"
        "Pictures, configuration and checkpoint are under Artifacts."
    ) + (f"\n\n![The worst mistakes]({picture})" if picture else "")
