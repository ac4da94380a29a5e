"""Time the reference recipe, whole commands and their training, against the same recipe with a DataLoader.

    python scripts/benchmarks/run.py [--rounds 5]

Each round runs every command once, in turn, each in its own process: `python -m mnist_exp.run`, which records everything, and
dataloader.py in its two forms, which records nothing. The script also times --help, tab completion and ten times the epochs, and
measures how the time of training divides; timeline.py does so for the whole command. It prints medians, and ratios within a
round.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from mlflow import MlflowClient
from rich.console import Console
from rich.table import Table

from mnist_exp.composing import compose_recipe
from mnist_exp.learning.datasets import MNIST_FILES
from mnist_exp.learning.training import choose_precision, disable_malloc_trim, fit, prepare_phases
from mnist_exp.nodes import build

OURS = "mnist_exp"
TRANSFORMS = {"DataLoader, v2 on tensors": "v2", "DataLoader, PIL": "pil"}
EPOCH_FLOP = 155e9
UNTRACKED = "mnist_exp, tracking=none"
# What no command with training, and none with tracking, can avoid.
IMPORTS = {
    "import torch, torch._dynamo": "import torch, torch._dynamo",
    "import MLflow, Hydra and matplotlib, open the store": (
        "import os, hydra, mlflow, mlflow.pytorch, matplotlib.figure; from mlflow import MlflowClient; "
        "MlflowClient(os.environ['MLFLOW_TRACKING_URI']).search_experiments()"
    ),
}
COMPLETE = {"COMP_LINE": "mnist-exp optim", "_HYDRA_COMPLETE": "1"}

Measurement = dict[str, float]  # seconds, MiB, accuracy, by name


def run_command(*arguments: str, **environment: str) -> tuple[float, float, str]:
    """Run a Python command; return its wall time in seconds, its peak memory in MiB, and its output."""
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | environment, text=True
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return time.monotonic() - started, usage.ru_maxrss / 1024, output


def run_ours(template: Path, folder: Path, seed: int) -> Measurement:
    """Run the command line into a new store, a copy of the empty `template`."""
    folder.mkdir()
    shutil.copyfile(template, folder / "mlflow.db")  # creating a store takes six seconds, once
    store = f"sqlite:///{folder}/mlflow.db"
    started = time.time()
    overrides = ["data.fallback=null", f"seed={seed}", f"output_dir={folder}/outputs"]
    wall, memory, _ = run_command("-m", "mnist_exp.run", *overrides, MLFLOW_TRACKING_URI=store)
    client = MlflowClient(store)
    (run,) = client.search_runs(["1"])
    metrics = run.data.metrics
    history = {key: client.get_metric_history(run.info.run_id, f"train/{key}")[0] for key in ("loss", "examples_per_second")}
    first_step = history["loss"].timestamp / 1000 - history["loss"].step / history["examples_per_second"].value - started
    training = metrics["time/train_seconds"] + metrics["time/finetune_seconds"]
    return {"wall": wall, "training": training, "accuracy": metrics["test/accuracy"], "memory": memory, "first_step": first_step}


def run_untracked(folder: Path, seed: int) -> Measurement:
    """Run the command line with `tracking=none`; the training is that of the tracked run with the same seed."""
    overrides = ["data.fallback=null", f"seed={seed}", "tracking=none", f"output_dir={folder}"]
    wall, memory, output = run_command("-m", "mnist_exp.run", *overrides)
    seconds = [float(text) for text in re.findall(r"time/(?:train|finetune)_seconds\D+([\d.]+) s", output)]
    accuracy = re.search(r"test/accuracy\D+([\d.]+) %", output)
    return {"wall": wall, "training": sum(seconds), "accuracy": float(accuracy[1]) / 100 if accuracy else 0.0, "memory": memory}


def run_dataloader(root: str, transforms: str, seed: int) -> Measurement:
    """Run the baseline."""
    script = str(Path(__file__).with_name("dataloader.py"))
    wall, memory, output = run_command(script, "--transforms", transforms, "--seed", str(seed), "--root", root)
    return {"wall": wall, "memory": memory, **json.loads(output)}


def mnist_root() -> Path:
    """Return the torchvision root that the default configuration reads."""
    data = compose_recipe().settings.data
    return Path(data["root"] or data["download_root"])


def unpacked_mnist(folder: Path, root: Path) -> str:
    """Return a writable torchvision root, which torchvision needs, with the files of `root`."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_FILES:
        shutil.copyfile(root / "MNIST" / "raw" / f"{name}.gz", raw / f"{name}.gz")
    return str(folder)


def spread(values: list[float], digits: int = 1) -> str:
    """Return the median, the minimum and the maximum of some values as text."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def training_parts(overrides: list[str]) -> Measurement:
    """Train in this process and take the time between hooks; return seconds by part, and of the whole as `training`."""
    settings = compose_recipe("data.fallback=null", "device=cpu", "tracking=none", "~phases.finetune", *overrides).settings
    data = build(settings.data, "data", seed=0)
    model = build(settings.model, "model", classes=10, side=28, in_channels=1)
    phase_config = build(settings.phases["train"], "phases.train")
    parts: dict[str, float] = defaultdict(float)
    last = time.perf_counter()

    def end(part: str) -> None:
        nonlocal last
        now = time.perf_counter()
        parts[part] += now - last
        last = now

    def augmentation(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        end("rest")  # of the step before, including the batch and the reports
        augmented: torch.Tensor = phase_config.augmentation(images, generator)
        end("data")
        return augmented

    phases = prepare_phases(model, {"train": replace(phase_config, augmentation=augmentation)}, data, Path())
    model.register_forward_hook(lambda *_: end("forward") if model.training else None)
    phases[0].optimizer.register_step_pre_hook(lambda *_: end("backward"))
    phases[0].optimizer.register_step_post_hook(lambda *_: end("optimizer"))
    last = started = time.perf_counter()
    precision = choose_precision("auto", torch.device("cpu"))
    seconds = sum(report.seconds for report in fit(model, phases, data, seed=0, precision=precision))
    parts["validation"] = time.perf_counter() - started - seconds
    parts["rest"] = seconds - sum(parts[part] for part in ("data", "forward", "backward", "optimizer"))
    return {**parts, "training": seconds}


def peak_flops() -> float:
    """Return floating-point operations per second of a large matrix product in the precision of training."""
    matrix = torch.randn(2048, 2048).to(choose_precision("auto", torch.device("cpu")))
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(seconds)


def measure_commands(rounds: int) -> tuple[dict[str, list[Measurement]], dict[str, list[float]]]:
    """Run all commands in turn; return the measurements by command, and the seconds of --help and tab completion."""
    commands: dict[str, list[Measurement]] = {name: [] for name in (OURS, UNTRACKED, *TRANSFORMS)}
    startup: dict[str, list[float]] = {name: [] for name in ("--help", "tab completion", *IMPORTS)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template = folder / "template.db"
        MlflowClient(f"sqlite:///{template}").search_experiments()
        data = unpacked_mnist(folder / "data", mnist_root())
        run_ours(template, folder / "warm-up", 0)
        for seed in range(rounds):
            commands[OURS].append(run_ours(template, folder / str(seed), seed))
            commands[UNTRACKED].append(run_untracked(folder / f"{seed} untracked", seed))
            for form, transforms in TRANSFORMS.items():
                commands[form].append(run_dataloader(data, transforms, seed))
            startup["--help"].append(run_command("-m", "mnist_exp.run", "--help")[0])
            completion = run_command("-c", "import mnist_exp.run; mnist_exp.run.main()", "-sc", "query=bash", **COMPLETE)
            startup["tab completion"].append(completion[0])
            for name, code in IMPORTS.items():
                startup[name].append(run_command("-c", code, MLFLOW_TRACKING_URI=f"sqlite:///{template}")[0])
    return commands, startup


def print_commands(commands: Mapping[str, list[Measurement]], startup: Mapping[str, list[float]]) -> None:
    """Print the table of the commands and the times to a first answer."""
    table = Table("", "whole command, s", "ratio", "training, s", "ratio ", "peak memory, MiB", "test accuracy")
    for name, rounds in commands.items():
        pairs = list(zip(rounds, commands[OURS], strict=True))
        ratios = {key: statistics.median(other[key] / ours[key] for other, ours in pairs) for key in ("wall", "training")}
        table.add_row(
            name,
            spread([measured["wall"] for measured in rounds]),
            f"{ratios['wall']:.1f}",
            spread([measured["training"] for measured in rounds], 2),
            f"{ratios['training']:.1f}",
            f"{statistics.median(measured['memory'] for measured in rounds):,.0f}",
            f"{statistics.mean(measured['accuracy'] for measured in rounds):.2%}",
        )
    Console(width=140).print(table)
    first_steps = spread([measured["first_step"] for measured in commands[OURS]])
    others = "; ".join(f"{name}: {spread(seconds, 2)} s" for name, seconds in startup.items())
    print(f"to the first step of training: {first_steps} s; {others}")
    torch_imports, mlflow_imports = (list(startup[name]) for name in IMPORTS)
    first = statistics.median(ours["first_step"] / torch for ours, torch in zip(commands[OURS], torch_imports, strict=True))
    walls = [[measured["wall"] for measured in commands[name]] for name in (OURS, UNTRACKED)]
    added = [tracked - untracked for tracked, untracked in zip(*walls, strict=True)]
    print(f"the first step comes {first:.2f} times as late as the end of `import torch, torch._dynamo`")
    floors = [torch + ours["training"] for ours, torch in zip(commands[OURS], torch_imports, strict=True)]
    above = [ours["wall"] / floor for ours, floor in zip(commands[OURS], floors, strict=True)]
    print(f"the whole command takes {spread(above, 2)} times its floor, `import torch, torch._dynamo` and its own training")
    print(f"tracking adds {spread(added)} s; importing MLflow and opening the store take {spread(mlflow_imports)} s")


def measure_parts(rounds: int) -> None:
    """Measure and print how the time of training divides."""
    disable_malloc_trim()
    training_parts([])  # warm-up
    measured = [training_parts([]) for _ in range(rounds)]
    parts = {part: statistics.median(one[part] for one in measured) for part in measured[0]}
    ten_epochs = training_parts(["phases.train.epochs=10"])["training"]
    print("training by part: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items()))
    peak = peak_flops()
    print(f"ten epochs take {ten_epochs / parts['training']:.1f} times as long as one; training reaches ", end="")
    print(f"{EPOCH_FLOP / parts['training'] / peak:.0%} of the peak of {peak / 1e9:,.0f} GFLOP/s")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    commands, startup = measure_commands(arguments.rounds)
    print_commands(commands, startup)
    measure_parts(arguments.rounds)
    print(
        f"n = {arguments.rounds} rounds; {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{choose_precision('auto', torch.device('cpu'))}, {platform.machine()}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
