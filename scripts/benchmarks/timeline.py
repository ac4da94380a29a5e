"""Measure where the time of one command goes, by part, from the shell to the shell.

    python scripts/benchmarks/timeline.py [--rounds 5] [--before CHECKOUT] [--figure FILE]

Runs `python -m mnist_exp.run` in processes of its own, into a store that exists, and takes the time inside of each part's
functions, without that of other parts called from there. With --before, a checkout of another version takes turns with this one.
It prints medians in seconds.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

# Libraries are imported in the functions that use them: the measured process runs this file, too.
# The functions of each part, as module:function or module:class.method.
PARTS = {
    "set up data, model, optimizer": ["experiment.runner:prepare"],
    "import MLflow, open the store": [f"tracking.mlflow_store:MLflowStore.{name}" for name in ("open", "start", "reap")],
    "record the setup": ["experiment.recorder:Recorder.log_setup"],
    "train": ["experiment.runner:train"],
    "record while training": ["experiment.recorder:Recorder.log_report"],
    "test": ["experiment.runner:evaluate"],
    "draw": ["experiment.recorder:Recorder.log_figures"],
    "export the model": ["experiment.recorder:Recorder.log_model"],
    "record the results": ["experiment.runner:finalize"],
}
STARTUP = ["Python, Hydra", "import torch", "import torch._dynamo"]
REST = ["rest", "exit"]
COLORS = (
    "#999999", "#E69F00", "#C97B00", "#F0E442", "#CC79A7", "#A05195", "#0072B2", "#A05195", "#56B4E9", "#009E73", "#7FC97F",
    "#66A61E", "#BBBBBB", "#DDDDDD",
)  # fmt: skip


class Clock:
    """Adds up seconds by part. Within a nested part, the time of the outer one stands still."""

    def __init__(self, started: float) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self._last, self._open = started, ["rest"]

    def lap(self, part: str) -> None:
        """Add the time since the last reading to a part."""
        now = time.time()
        self.parts[part] += now - self._last
        self._last = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time added to a part."""

        @wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            self.lap(self._open[-1])
            self._open.append(part)
            try:
                return function(*arguments, **options)
            finally:
                self.lap(self._open.pop())

        return run


def run_timed(started: float, file: str) -> None:
    """Run the command line in this process, which was started at `started`; write the seconds by part to a file."""
    clock = Clock(started)
    command = importlib.import_module("mnist_exp.run")
    clock.lap(STARTUP[0])
    importlib.import_module("torch")
    clock.lap(STARTUP[1])
    importlib.import_module("torch._dynamo")
    clock.lap(STARTUP[2])
    importlib.import_module("mnist_exp.experiment.runner")
    for part, functions in PARTS.items():
        for name in functions:
            module, _, path = name.partition(":")
            *owners, attribute = path.split(".")
            owner = importlib.import_module(f"mnist_exp.{module}")
            for step in owners:
                owner = getattr(owner, step)
            setattr(owner, attribute, clock.timed(part, getattr(owner, attribute)))
    try:
        command.main()
    finally:
        clock.lap("rest")
        Path(file).write_text(json.dumps({"parts": clock.parts, "ended": time.time()}))


def measure(checkout: Path, folder: Path, template: Path, seed: int) -> dict[str, float]:
    """Run one command of a checkout into a copy of the store `template`; return the seconds by part."""
    folder.mkdir()
    shutil.copyfile(template, folder / "mlflow.db")
    environment = {"PYTHONPATH": str(checkout), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    overrides = ["data.fallback=null", f"seed={seed}", f"output_dir={folder}/outputs"]
    started = time.time()
    subprocess.run(
        [sys.executable, __file__, "--inside", str(started), str(folder / "parts.json"), *overrides],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | environment,
    )  # fmt: skip
    ended = time.time()
    measured = json.loads((folder / "parts.json").read_text())
    parts = defaultdict(float, measured["parts"]) | {"exit": ended - measured["ended"]}
    return {part: parts.get(part, 0.0) for part in (*STARTUP, *PARTS, *REST)}


def draw(versions: dict[str, dict[str, float]], file: Path) -> None:
    """Draw the parts of each version as one bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.1 + 0.6 * len(versions)))
    axes = figure.add_subplot(xlabel="seconds of `python -m mnist_exp.run`")
    for version, parts in versions.items():
        left = 0.0
        for (part, width), color in zip(parts.items(), COLORS, strict=True):
            axes.barh(version, width, left=left, color=color, edgecolor="white", label=part)
            left += width
        axes.text(left, version, f" {left:.1f} s", va="center", fontsize="small")
    axes.invert_yaxis()
    axes.spines[["top", "left", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    texts = [f"{label}  {' | '.join(f'{parts[label]:.2f}' for parts in versions.values())}" for label in labels]
    legend = dict(zip(labels, zip(handles, texts, strict=True), strict=True)).values()
    style = {"loc": "lower center", "bbox_to_anchor": (0.45, 1.02), "ncols": 3}
    axes.legend(*zip(*legend, strict=True), **style, frameon=False, fontsize="small")
    figure.savefig(file, dpi=110, bbox_inches="tight")


def main() -> None:
    """Parse the command line, measure, print."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version")
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    here = Path(__file__).parents[2]
    checkouts = ({"before": arguments.before.absolute()} if arguments.before else {}) | {"now": here}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template = folder / "template.db"
        code = "import sys, mlflow; mlflow.MlflowClient(sys.argv[1]).search_experiments()"  # creating a store takes six seconds
        subprocess.run([sys.executable, "-c", code, f"sqlite:///{template}"], check=True, stderr=subprocess.DEVNULL)
        for version, checkout in checkouts.items():
            measure(checkout, folder / f"warm-up {version}", template, 0)
        for seed in range(arguments.rounds):
            for version, checkout in checkouts.items():
                rounds[version].append(measure(checkout, folder / f"{version} {seed}", template, seed))
    medians = {
        version: {part: statistics.median(one[part] for one in measured) for part in measured[0]}
        for version, measured in rounds.items()
    }
    table = Table("part, s", *medians)
    for part in next(iter(medians.values())):
        table.add_row(part, *(f"{parts[part]:.2f}" for parts in medians.values()))
    wholes = [statistics.median(sum(one.values()) for one in measured) for measured in rounds.values()]
    table.add_row("whole command", *(f"{whole:.2f}" for whole in wholes))
    Console().print(table)
    print(f"n = {arguments.rounds} rounds, medians; {os.cpu_count()} cores")
    if arguments.figure:
        draw(medians, arguments.figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        _, _, started, file, *sys.argv[1:] = sys.argv
        run_timed(float(started), file)
    else:
        main()
