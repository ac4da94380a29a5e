"""The metrics of runs: display format, unit and direction, defined once for the terminal, tables, reports and MLflow."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Metric:
    """How values of a metric are displayed.

    Args:
        name: The last part of the names under which it is recorded, such as `accuracy` in `test/accuracy`.
        form: The format specification of the displayed number.
        unit: The unit of a value.
        difference_unit: The unit of a difference.
        scale: The factor from recorded to displayed values.
        higher_is_better: The direction, None if there is none.
        is_measured_time: Whether the value depends on the speed of the machine, so that it differs when a run is repeated.
        is_exact: Whether the value follows from the configuration alone.
        margin: The smallest difference that matters, as displayed; None if that depends on the question.
    """

    name: str
    form: str
    unit: str = ""
    difference_unit: str = ""
    scale: float = 1.0
    higher_is_better: bool | None = None
    is_measured_time: bool = False
    is_exact: bool = False
    margin: float | None = None


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", ".2f", "%", "points", 100.0, higher_is_better=True, margin=0.05),
        Metric("loss", ".4f", higher_is_better=False),
        Metric("calibration_error", ".2f", "%", "points", 100.0, higher_is_better=False),
        Metric("parameters", ",.0f", higher_is_better=False, is_exact=True),
        Metric("epoch", ".2f"),
        Metric("lr", ".3g"),
        Metric("grad_norm", ".3g"),
        Metric("seconds", ".2f", "s", "s", higher_is_better=False, is_measured_time=True),
        Metric("examples_per_second", ",.0f", "examples/s", "examples/s", higher_is_better=True, is_measured_time=True),
    )
}
OTHER = Metric("other", ".4g")
SHOWN = ("test/accuracy", "test/loss", "time/total_seconds")  # in tables of runs, after the objective
EVALUATION = "evaluate/"  # begins the names of metrics of stored models: no command selects runs by them


def metric_of(name: str) -> Metric:
    """Return the metric that is recorded as `name`: of `test/accuracy` accuracy, of `time/train_seconds` seconds."""
    last = name.rpartition("/")[2]
    return METRICS.get("seconds" if last.endswith("_seconds") else last, OTHER)


def objectives() -> list[str]:
    """Return the metrics that can decide: those of an evaluation with a best direction, on validation images."""
    measured = [item for item in METRICS.values() if not (item.is_exact or item.is_measured_time)]
    return [f"val/{item.name}" for item in measured if item.higher_is_better is not None]


def on_test(name: str) -> str:
    """Return the name on test images of a metric on validation images."""
    return name.replace("val/", "test/", 1)


def best_first(name: str, items: Iterable[Item], value: Callable[[Item], float]) -> list[Item]:
    """Return items sorted by their value of a metric, the best first; equal ones keep their order.

    Args:
        name: The name of the metric, which may have no direction: then the highest is first.
        items: The items.
        value: Returns the value of an item.
    """
    return sorted(items, key=value, reverse=metric_of(name).higher_is_better is not False)


def format_metric(
    name: str, value: float, *, signed: bool = False, is_difference: bool = False, bare: bool = False, keep_sign: bool = False
) -> str:
    """Return a recorded value as displayed: 98.60 %, 3.46 s.

    Args:
        name: The name under which it is recorded.
        value: The value, or a difference of two.
        signed: Whether positive values have a sign, too.
        is_difference: Whether to use the unit of a difference.
        bare: Whether to omit the unit.
        keep_sign: Whether a value that would round to 0 has its first significant digit.
    """
    if not math.isfinite(value):
        return "-"
    metric = metric_of(name)
    sign = "+z" if signed else "z"  # z formats a value that rounds to 0 as 0, not as -0
    shown = value * metric.scale
    number = f"{shown:{sign}{metric.form}}"
    if keep_sign and shown and not number.strip("+0."):
        number = f"{shown:{sign}.{-math.floor(math.log10(abs(shown)))}f}"
    return number if bare else f"{number} {metric.difference_unit if is_difference else metric.unit}".rstrip()
