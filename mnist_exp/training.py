"""The loop: phases of training over splits of data, one report after another."""

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mnist_exp.data import Dataset, derive_seed, generator
from mnist_exp.distillation import NoTeacher
from mnist_exp.errors import UserError
from mnist_exp.evaluation import evaluate
from mnist_exp.overrides import PARTS

REPORTS_PER_EPOCH = 20
State = dict[str, Any]  # the phase, its steps done, the examples seen, and the states of all that changes in training
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Phase:
    """One stretch of training as data: which split, for how long, and with what.

    optimizer: called with the parameters; scheduler: called with the optimizer and total_steps, stepped every batch;
    augmentation: called with (n, 1, 28, 28) images and a generator; teacher: called with data and output_dir, returns what maps
    images as augmented and labels to targets; max_grad_norm: of the whole gradient, None for no limit;
    label_smoothing: the share of the target that all classes divide (Szegedy et al., 2016).
    """

    split: str
    epochs: int
    batch_size: int
    optimizer: Callable[..., Optimizer]
    scheduler: Callable[..., LRScheduler]
    augmentation: Callable[[Tensor, torch.Generator], Tensor]
    teacher: Callable[..., NoTeacher]
    max_grad_norm: float | None
    label_smoothing: float


@dataclass(frozen=True)
class Stage:
    """A phase made ready: its name, its optimizer over the model, its scheduler over the phase's steps, and its teacher."""

    name: str
    phase: Phase
    optimizer: Optimizer
    scheduler: LRScheduler
    teacher: NoTeacher
    steps_per_epoch: int
    validation: str | None


@dataclass(frozen=True)
class Report:
    """What happened since the last report.

    state: what it takes to go on from here, where a checkpoint is due; it lives in the model and the optimizer, and is to be
    saved before the next report is asked for;
    examples_seen: over all phases; seconds: of training since the last report, or the share of it in reports that come together;
    the metric `epoch` counts over all phases.
    """

    phase: str
    examples_seen: int
    seconds: float
    metrics: dict[str, float]
    state: State | None = None


@dataclass(frozen=True)
class Window:
    """The steps since the last point of the curves, up to `step` of the epoch; their results lie on the device still."""

    step: int
    learning_rate: float
    results: list[tuple[Tensor, Tensor, Tensor]]  # loss, accuracy, gradient norm
    sizes: list[int]

    @property
    def examples(self) -> int:
        """The number of images in these steps."""
        return sum(self.sizes)

    def values(self) -> tuple[list[float], ...]:
        """Wait for the losses, accuracies and gradient norms, and return them."""
        return tuple(torch.stack(values).tolist() for values in zip(*self.results, strict=True))


class NonFiniteLossError(UserError):
    """The loss or the weights became NaN or infinite."""


def choose_device(device: str) -> torch.device:
    """Return the device that `device` (auto, cpu, cuda, mps) stands for; raises UserError if the machine has none."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available[device]:
        there = ", ".join(name for name, there in available.items() if there)
        raise UserError(f"device={device}: this machine has none. Allowed here: auto, {there}. Leave device=auto.")
    return torch.device(device)


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products and convolutions that `precision` (auto, fp32, bf16, fp16) stands for."""
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Return whether the CPU has instructions for bf16; those that emulate it are faster in fp32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def hold_freed_memory() -> None:
    """Have this process keep freed memory for its next tensors (glibc): to return and fetch it anew took a quarter of a step."""
    trim_threshold, mmap_threshold = -1, -3  # mallopt's names of its settings
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim_threshold, 2**30)
        libc.mallopt(mmap_threshold, 2**25)


def plan(model: nn.Module, phases: Mapping[str, Phase], data: Dataset, output_dir: Path) -> list[Stage]:
    """Build each phase's optimizer, scheduler and teacher, so that what cannot work is said before any training.

    output_dir: where a teacher's runs lie. Raises UserError on a split that `data` lacks, and on what any of the three refuses.
    """
    stages: list[Stage] = []
    trained_on: set[str] = set()
    for name, phase in phases.items():
        for part in PARTS:
            if not callable(getattr(phase, part)):
                raise UserError(f"phases.{name}.{part} is missing: choose one with {part}@phases.{name}.{part}=OPTION.")
        if phase.split not in data.splits or phase.split == "test":
            allowed = ", ".join(split for split in data.splits if split != "test")
            raise UserError(f"phases.{name}.split={phase.split} cannot be trained on: allowed with this data: {allowed}.")
        epoch_size = data.splits[phase.split].epoch_size
        if phase.batch_size > epoch_size:
            raise UserError(
                f"phases.{name}.batch_size={phase.batch_size} is not valid: allowed is at most {epoch_size}, the examples of an "
                f"epoch of the split {phase.split}."
            )
        steps_per_epoch = data.splits[phase.split].steps(phase.batch_size)
        try:
            optimizer = phase.optimizer(model.parameters())
            scheduler = phase.scheduler(optimizer, total_steps=phase.epochs * steps_per_epoch)
            teacher = phase.teacher(data, output_dir)
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise UserError(
                f"phases.{name}: its optimizer, scheduler or teacher refuses its arguments, or the phase's "
                f"{phase.epochs * steps_per_epoch} steps: {error}. See their files in conf/ for what they take."
            ) from error
        trained_on |= {phase.split, data.validation} if teacher.saw_validation else {phase.split}
        validation = None if data.validation in trained_on else data.validation
        stages.append(Stage(name, phase, optimizer, scheduler, teacher, steps_per_epoch, validation))
    return stages


def fit(
    model: nn.Module,
    stages: list[Stage],
    data: Dataset,
    *,
    seed: int,
    precision: torch.dtype,
    save_every: int | None = None,
    resume_from: State | None = None,
) -> Iterator[Report]:
    """Train `model` through `stages`; yield at most 20 reports an epoch, the last with validation and state.

    save_every: also report, with state, every so many steps. resume_from: a report's state; training goes on behind it,
    bit for bit as if it had never stopped, because all randomness derives from (seed, phase, epoch, step).
    The model and the data must lie on one device. Raises NonFiniteLossError within a twentieth of an epoch; other devices than
    the CPU run ahead, and are waited for where a checkpoint is due: there the reports, and the error, come together.
    """
    model.to(memory_format=torch.channels_last)
    device = next(model.parameters()).device
    examples_seen, epochs_done = 0, 0
    names = [stage.name for stage in stages]
    if resume_from is not None and not _fits(resume_from, names):
        raise UserError("The checkpoint does not hold a state of this run's phases. Start the run again.")
    first_stage = names.index(resume_from["phase"]) if resume_from else 0
    for position, stage in enumerate(stages):
        phase, split = stage.phase, data.splits[stage.phase.split]
        if position < first_stage:
            epochs_done += phase.epochs
            continue
        scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        first_epoch, steps_done = 0, 0
        if resume_from and position == first_stage:
            _restore(resume_from, model, stage, scaler)
            examples_seen = resume_from["examples_seen"]
            first_epoch, steps_done = divmod(resume_from["steps"], stage.steps_per_epoch)
            epochs_done += first_epoch
        reports = {round(stage.steps_per_epoch * (i + 1) / REPORTS_PER_EPOCH) for i in range(REPORTS_PER_EPOCH)}
        for epoch in range(first_epoch, phase.epochs):
            model.train()
            windows: list[Window] = []  # not yet reported
            results: list[tuple[Tensor, Tensor, Tensor]] = []  # loss, accuracy, gradient norm of the steps of the next one
            sizes: list[int] = []
            started = time.perf_counter()
            batches = split.batches(phase.batch_size, generator(seed, stage.name, epoch, "order"), skip=steps_done)
            for step, (images, labels) in enumerate(batches, start=steps_done + 1):
                learning_rate = stage.optimizer.param_groups[0]["lr"]
                results.append(_step(model, stage, scaler, images, labels, precision, (seed, stage.name, epoch, step)))
                sizes.append(len(labels))
                steps = epoch * stage.steps_per_epoch + step
                saves = step == stage.steps_per_epoch or (save_every is not None and steps % save_every == 0)
                if not saves and step not in reports:
                    continue
                windows.append(Window(step, learning_rate, results, sizes))
                results, sizes = [], []
                if not saves and device.type != "cpu":
                    continue  # to read a result is to wait for the device
                values = [window.values() for window in windows]
                seconds_per_example = (time.perf_counter() - started) / sum(window.examples for window in windows)
                for window, (loss, accuracy, grad_norm) in zip(windows, values, strict=True):
                    _check_finite(loss, stage, epoch, window)
                    examples_seen += window.examples
                    metrics = {
                        "epoch": epochs_done + window.step / stage.steps_per_epoch,
                        "train/loss": weighted_mean(loss, window.sizes),
                        "train/accuracy": weighted_mean(accuracy, window.sizes),
                        "train/grad_norm": sum(grad_norm) / len(grad_norm),
                        "train/lr": window.learning_rate,
                        "train/examples_per_second": 1 / seconds_per_example,
                    }
                    state = None
                    if saves and window is windows[-1]:
                        if not all(value.isfinite().all() for value in model.state_dict().values()):
                            raise _not_finite("weights", "infinite or NaN", stage, epoch, step, learning_rate)
                        if step == stage.steps_per_epoch and stage.validation:
                            evaluation = evaluate(model, data.splits[stage.validation])
                            metrics |= {"val/loss": evaluation.loss, "val/accuracy": evaluation.accuracy}
                        state = _state(model, stage, scaler, steps, examples_seen)
                    yield Report(stage.name, examples_seen, seconds_per_example * window.examples, metrics, state)
                windows, started = [], time.perf_counter()
            epochs_done += 1
            steps_done = 0


def _step(
    model: nn.Module,
    stage: Stage,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    labels: Tensor,
    precision: torch.dtype,
    place: tuple[object, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one step and return its loss, accuracy and gradient norm, on the device, which is waited for in fp16 only."""
    images = stage.phase.augmentation(images, generator(*place, "augmentation"))
    with torch.random.fork_rng(devices=[labels.device] if labels.device.type == "cuda" else []):
        torch.manual_seed(derive_seed(*place, "dropout"))  # dropout knows no other source than the global one
        with torch.autocast(labels.device.type, precision, enabled=precision != torch.float32):
            logits = model(images)
            targets = stage.teacher(images, labels)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=stage.phase.label_smoothing)
    stage.optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    scaler.unscale_(stage.optimizer)
    limit = float("inf") if stage.phase.max_grad_norm is None else stage.phase.max_grad_norm
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    scaler.step(stage.optimizer)
    scaler.update()
    stage.scheduler.step()
    return loss.detach(), (logits.argmax(1) == labels).float().mean(), grad_norm.detach()


def _check_finite(losses: list[float], stage: Stage, epoch: int, window: Window) -> None:
    for step, loss in enumerate(losses, start=window.step - len(losses) + 1):
        if not abs(loss) < float("inf"):
            raise _not_finite("loss", str(loss), stage, epoch, step, window.learning_rate)


def _not_finite(what: str, value: str, stage: Stage, epoch: int, step: int, learning_rate: float) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"The {what} became {value} in phase {stage.name}, epoch {epoch + 1}, step {step} of {stage.steps_per_epoch}, "
        f"at learning rate {learning_rate:g}: allowed are finite numbers. "
        "Lower the learning rate (optimizer.lr) or the gradient's limit (phases.*.max_grad_norm)."
    )


def weighted_mean(values: list[float], weights: list[int]) -> float:
    """Return the mean of `values` over examples, of which each value stands for so many as its weight."""
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _fits(state: State, phases: list[str]) -> bool:
    counts = [state.get("steps"), state.get("examples_seen")]
    return state.get("phase") in phases and all(isinstance(count, int) and count >= 0 for count in counts)


def _restore(state: State, model: nn.Module, stage: Stage, scaler: torch.amp.GradScaler) -> None:
    """Put a state that a report held back; raises UserError where it is another network's or optimizer's."""
    try:
        for part, owner in (("model", model), ("optimizer", stage.optimizer), ("scheduler", stage.scheduler), ("scaler", scaler)):
            owner.load_state_dict(state[part])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"The checkpoint's state does not fit phase {stage.name} as this version builds it: {str(error).splitlines()[0]}"
        ) from error


def _state(model: nn.Module, stage: Stage, scaler: torch.amp.GradScaler, steps: int, examples_seen: int) -> State:
    return {
        "phase": stage.name,
        "steps": steps,
        "examples_seen": examples_seen,
        "model": model.state_dict(),
        "optimizer": stage.optimizer.state_dict(),
        "scheduler": stage.scheduler.state_dict(),
        "scaler": scaler.state_dict(),
    }
