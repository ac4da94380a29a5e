"""Time the reference recipe, whole commands and their training, against the same recipe through DataLoader.

    python scripts/benchmark.py [--rounds 5] [--picture FILE]

Each round runs all commands once, in turn, in processes of their own: `python -m mnist_exp.run` with everything that it
records, and scripts/dataloader.py in its two forms, which records nothing. Then --help and tab completion, the time that training
takes for ten times the epochs, and where the time of a run goes (with --picture, drawn). Medians, and ratios within a round.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from mlflow import MlflowClient
from rich.console import Console
from rich.table import Table

from mnist_exp import CONF
from mnist_exp.config import build, resolve
from mnist_exp.data import MNIST_FILES
from mnist_exp.training import choose_precision, fit, hold_freed_memory, plan

OURS = "mnist_exp"
FORMS = {"DataLoader, v2 on tensors": "v2", "DataLoader, PIL": "pil"}
EPOCH_FLOP = 155e9


def command(*arguments: str, **environment: str) -> tuple[float, float, str]:
    """Run a command; return its wall seconds, its peak memory in MiB, and what it printed."""
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | environment, text=True
    ) as process:
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return time.monotonic() - began, usage.ru_maxrss / 1024, printed


def run_ours(template: Path, folder: Path, seed: int) -> dict[str, float]:
    """Run the command line into a new store; return what it took."""
    folder.mkdir()
    shutil.copyfile(template, folder / "mlflow.db")  # a new store takes six seconds, once in its life
    store = f"sqlite:///{folder}/mlflow.db"
    began = time.time()
    overrides = ["data.fallback=null", f"seed={seed}", f"output_dir={folder}/outputs"]
    wall, memory, _ = command("-m", "mnist_exp.run", *overrides, MLFLOW_TRACKING_URI=store)
    client = MlflowClient(store)
    (run,) = client.search_runs(["1"])
    metrics = run.data.metrics
    history = {key: client.get_metric_history(run.info.run_id, f"train/{key}")[0] for key in ("loss", "examples_per_second")}
    first = history["loss"].timestamp / 1000 - history["loss"].step / history["examples_per_second"].value - began
    training = metrics["time/train_seconds"] + metrics["time/finetune_seconds"]
    return {"wall": wall, "training": training, "accuracy": metrics["test/accuracy"], "memory": memory, "first_step": first}


def run_dataloader(root: str, form: str, seed: int) -> dict[str, float]:
    """Run the yardstick; return what it took."""
    script = str(Path(__file__).with_name("dataloader.py"))
    wall, memory, printed = command(script, "--transforms", form, "--seed", str(seed), "--root", root)
    return {"wall": wall, "memory": memory, **json.loads(printed)}


def unpacked_mnist(folder: Path, root: Path) -> str:
    """Return a torchvision root that may be written to, as torchvision needs it."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_FILES:
        shutil.copyfile(root / "MNIST" / "raw" / f"{name}.gz", raw / f"{name}.gz")
    return str(folder)


def spread(values: list[float], digits: int = 1) -> str:
    """Return median, smallest and largest of some values."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def training_parts(overrides: list[str]) -> dict[str, float]:
    """Train in this process with a clock at every border; return seconds by part, and of the whole as `training`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve(compose("config", ["data.fallback=null", "device=cpu", "tracking=none", "~phases.finetune", *overrides]))
    data = build(config["data"], "data", seed=0)
    model = build(config["model"], "model")
    (phase,) = (build(node, "phase") for node in config["phases"].values())
    spent: dict[str, float] = defaultdict(float)
    border = time.perf_counter()

    def reach(part: str) -> None:
        nonlocal border
        now = time.perf_counter()
        spent[part] += now - border
        border = now

    augment = phase.augmentation

    def timed_augmentation(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        reach("rest")  # of the step before, the batch and the reports included
        augmented = augment(images, generator)
        reach("data")
        return augmented

    stages = plan(model, {"train": replace(phase, augmentation=timed_augmentation)}, data, Path())
    model.register_forward_hook(lambda *_: reach("forward") if model.training else None)
    stages[0].optimizer.register_step_pre_hook(lambda *_: reach("backward"))
    stages[0].optimizer.register_step_post_hook(lambda *_: reach("optimizer"))
    border = began = time.perf_counter()
    seconds = sum(
        report.seconds for report in fit(model, stages, data, seed=0, precision=choose_precision("auto", torch.device("cpu")))
    )
    spent["validation"] = time.perf_counter() - began - seconds
    spent["rest"] = seconds - sum(spent[part] for part in ("data", "forward", "backward", "optimizer"))
    return {**spent, "training": seconds}


def peak() -> float:
    """Return the machine's peak: floating-point operations a second of a large matrix product, in the precision of training."""
    matrix = torch.randn(2048, 2048).to(choose_precision("auto", torch.device("cpu")))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / statistics.median(seconds)


def draw(parts: dict[str, float], file: Path) -> None:
    """Draw where the time of a run goes, as one bar."""
    figure = Figure(figsize=(9, 1.9))
    axes = figure.add_subplot(xlabel="seconds of `python -m mnist_exp.run`", yticks=[])
    left = 0.0
    colours = ("#999999", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#F0E442", "#CC79A7")
    for (part, seconds), colour in zip(parts.items(), colours, strict=True):
        axes.barh(0, seconds, left=left, color=colour, edgecolor="white", label=f"{part} {seconds:.2f} s")
        left += seconds
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, fontsize="small")
    figure.savefig(file, dpi=110, bbox_inches="tight")


def main() -> None:
    """Parse the command line, run everything in turns, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        root = Path(resolve(compose("config"))["data"]["root"])
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in (OURS, *FORMS)}
    started: dict[str, list[float]] = {"--help": [], "tab completion": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template = folder / "template.db"
        MlflowClient(f"sqlite:///{template}").search_experiments()
        loaded = unpacked_mnist(folder / "data", root)
        run_ours(template, folder / "warm", 0)
        for seed in range(arguments.rounds):
            taken[OURS].append(run_ours(template, folder / str(seed), seed))
            for form, option in FORMS.items():
                taken[form].append(run_dataloader(loaded, option, seed))
            started["--help"].append(command("-m", "mnist_exp.run", "--help")[0])
            completion = "import mnist_exp.run; mnist_exp.run.main()"
            environment = {"COMP_LINE": "mnist-exp optim", "_HYDRA_COMPLETE": "1"}
            started["tab completion"].append(command("-c", completion, "-sc", "query=bash", **environment)[0])

    table = Table("", "whole command, s", "ratio", "training, s", "ratio ", "peak memory, MiB", "test accuracy")
    for name, rounds in taken.items():
        ratios = {
            what: statistics.median(other[what] / ours[what] for other, ours in zip(rounds, taken[OURS], strict=True))
            for what in ("wall", "training")
        }
        table.add_row(
            name,
            spread([one["wall"] for one in rounds]),
            f"{ratios['wall']:.1f}",
            spread([one["training"] for one in rounds], 2),
            f"{ratios['training']:.1f}",
            f"{statistics.median(one['memory'] for one in rounds):,.0f}",
            f"{statistics.mean(one['accuracy'] for one in rounds):.2%}",
        )
    Console(width=140).print(table)
    first = [one["first_step"] for one in taken[OURS]]
    print(
        f"to the first step of training: {spread(first)} s; "
        + "; ".join(f"{key}: {spread(s, 2)} s" for key, s in started.items())
    )

    hold_freed_memory()
    training_parts([])
    once = [training_parts([]) for _ in range(arguments.rounds)]
    parts = {part: statistics.median(one[part] for one in once) for part in once[0]}
    ten = training_parts(["phases.train.epochs=10"])["training"]
    print("training by part: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items()))
    print(f"ten epochs take {ten / parts['training']:.1f} times one; ", end="")
    print(f"{EPOCH_FLOP / parts['training'] / peak():.0%} of the peak of {peak() / 1e9:,.0f} GFLOP/s")
    if arguments.picture:
        whole = statistics.median(one["wall"] for one in taken[OURS])
        trained = statistics.median(one["training"] for one in taken[OURS])  # fine-tuning included
        shares = {part: parts[part] for part in ("data", "forward", "backward", "optimizer")}
        shares["validation, rest"] = parts["rest"] + parts["validation"]
        shown = {"start-up": statistics.median(first)}
        shown |= {part: trained * seconds / sum(shares.values()) for part, seconds in shares.items()}
        shown["test, pictures, model, tracking"] = whole - sum(shown.values())
        draw(shown, arguments.picture)
    print(
        f"n = {arguments.rounds} rounds; {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{choose_precision('auto', torch.device('cpu'))}, {platform.machine()}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
