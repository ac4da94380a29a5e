"""The training loop over phases, epochs and steps. It yields reports and records nothing."""

import ctypes
import inspect
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mnist_exp.errors import Count, DivergedError, Positive, UserError
from mnist_exp.learning.callbacks import Callback
from mnist_exp.learning.data import Dataset, derive_seed, generator
from mnist_exp.learning.distillation import Targets
from mnist_exp.learning.evaluation import evaluate

REPORTS_PER_EPOCH = 20
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Keys: phase, ended (whether the phase has), steps (in the phase), epochs_before (the phase), examples_seen, model, optimizer,
# scheduler, scaler, callbacks.
TrainState = dict[str, Any]


@dataclass(frozen=True)
class PhaseConfig:
    """A phase of training as data.

    Attributes:
        split: Name of the split to train on.
        epochs: Number of epochs.
        batch_size: Images per step.
        optimizer: Takes the parameters.
        scheduler: Takes the optimizer, and `total_steps` if its signature has it; advanced after every step.
        augmentation: Takes images (n, channels, side, side) uint8 and a generator, and returns float32 images.
        loss: Takes logits (n, classes) float32 and targets, and returns a scalar.
        teacher: Takes the data set and the folder of all runs, and returns the targets.
        max_grad_norm: Limit of the norm of the whole gradient, or None for no limit.
        callbacks: By name, in the order of their calls.
    """

    split: str
    epochs: Count
    batch_size: Count
    optimizer: Callable[..., Optimizer]
    scheduler: Callable[..., LRScheduler]
    augmentation: Callable[[Tensor, torch.Generator], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    teacher: Callable[[Dataset, Path], Targets]
    max_grad_norm: Positive | None
    callbacks: Mapping[str, Callback] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """A phase that is ready for training.

    Attributes:
        name: Name of the phase.
        config: Its configuration.
        optimizer: Optimizer of the model's parameters.
        scheduler: Scheduler over all steps of the phase.
        targets: Maps a batch to the targets of the loss.
        steps_per_epoch: Number of steps in an epoch.
        validation: Name of the split to validate on, or None if training has used it.
    """

    name: str
    config: PhaseConfig
    optimizer: Optimizer
    scheduler: LRScheduler
    targets: Targets
    steps_per_epoch: int
    validation: str | None


@dataclass(frozen=True)
class Report:
    """The progress since the previous report.

    Attributes:
        phase: Name of the phase.
        examples_seen: Number of images over all phases so far.
        seconds: Training time since the previous report. Reports that arrive together share theirs in proportion.
        metrics: Values by name. `epoch` counts over all phases.
        epoch: Number of complete epochs of the phase, at the end of one.
        state: All that training needs to resume, where a checkpoint is due. Its tensors belong to the model and the
            optimizer: save it before asking for the next report.
        figures: Figures by name, from callbacks at the end of a phase.
    """

    phase: str
    examples_seen: int
    seconds: float
    metrics: dict[str, float]
    epoch: int | None = None
    state: TrainState | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict)


def choose_device(device: str) -> torch.device:
    """Return the device for `device` (auto, cpu, cuda, mps); raises UserError if this machine has none."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    names = [name for name, is_available in available.items() if is_available]
    if device != "auto" and device not in names:
        expected = f"{' or '.join(['auto', *names])} on this machine"
        raise UserError.invalid("device", device, expected, "Use device=auto.")
    return torch.device(names[0] if device == "auto" else device)


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products and convolutions for `precision` (auto, fp32, bf16, fp16)."""
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Return whether the CPU has instructions for bf16; a CPU that emulates bf16 is faster in fp32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def disable_malloc_trim() -> None:
    """Make glibc keep freed memory: trimming cost 25 % of a step."""
    trim_threshold, mmap_threshold = -1, -3  # parameters of mallopt
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim_threshold, 2**30)
        libc.mallopt(mmap_threshold, 2**25)


def prepare_phases(
    model: nn.Module, phases: Mapping[str, PhaseConfig], data: Dataset, output_dir: Path, used: Collection[str] = ()
) -> list[Phase]:
    """Build the optimizer, scheduler and targets of every phase, so that errors appear before training.

    Args:
        model: The model to train.
        phases: Configurations by name, in order.
        data: The data set, on the device of the model.
        output_dir: Folder of all runs, where a teacher finds its own.
        used: Splits that the initial weights may have been trained on.

    Raises:
        UserError: A phase cannot use its split, or one of its parts rejects its arguments, the number of steps or the classes.
    """
    check_phases(phases, data, model, used)
    _check_output(model, data)
    prepared: list[Phase] = []
    for name, config in phases.items():
        steps_per_epoch = data.splits[config.split].steps(config.batch_size)
        total_steps = config.epochs * steps_per_epoch
        try:
            optimizer = config.optimizer(model.parameters())
            scheduler = make_scheduler(config.scheduler, optimizer, total_steps)
            targets = config.teacher(data, output_dir)
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise UserError(
                f"phases.{name} is invalid: its optimizer, scheduler or teacher rejects its arguments or the phase's "
                f"{total_steps} steps: {error}.",
                key=f"phases.{name}",
                remedy="Their files in conf/ list the arguments.",
            ) from error
        prepared.append(Phase(name, config, optimizer, scheduler, targets, steps_per_epoch, None))
    leaking = [phase.name for phase in prepared if phase.targets.saw_validation_split]
    validations = check_phases(phases, data, model, used, leaking)
    return [replace(phase, validation=validations[phase.name]) for phase in prepared]


def _check_output(model: nn.Module, data: Dataset) -> None:
    """Raise UserError unless the model maps two images of the data, as they are stored, to logits (2, classes)."""
    was_training, images = model.training, next(iter(data.splits.values())).images[:2]
    with torch.no_grad():
        found = _try(model.eval(), images)
    model.train(was_training)
    if found != f"it returns {(len(images), data.classes)}":
        expected = f"a model that maps images {tuple(images.shape)} uint8 to logits ({len(images)}, {data.classes}), but {found}"
        raise UserError.invalid("model", type(model).__name__, expected)


def _check_loss(config: PhaseConfig, key: str, data: Dataset) -> None:
    """Move the loss of a phase to the device of the data; raise UserError unless it maps logits and labels to a scalar."""
    classes, labels = data.classes, next(iter(data.splits.values())).labels[:2]
    if isinstance(config.loss, nn.Module):
        config.loss.to(labels.device)
    found = _try(config.loss, torch.zeros(len(labels), classes, device=labels.device), labels)
    if found != "it returns ()":
        expected = f"a loss that maps logits ({len(labels)}, {classes}) and labels ({len(labels)},) to a scalar, but {found}"
        raise UserError.invalid(key, type(config.loss).__name__, expected)


def _try(function: Callable[..., Tensor], *inputs: Tensor) -> str:
    """Return in words the shape of a function's result, or the error that it raises."""
    try:
        return f"it returns {tuple(function(*inputs).shape)}"
    except Exception as error:  # models and losses raise exceptions of any kind
        return f"it raises {type(error).__name__}: {error}"


def make_scheduler(factory: Callable[..., LRScheduler], optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Return the scheduler of an optimizer; it gets `total_steps` if its signature has that and its options do not set it."""
    is_open = "total_steps" in inspect.signature(factory).parameters and "total_steps" not in getattr(factory, "keywords", {})
    return factory(optimizer, total_steps=total_steps) if is_open else factory(optimizer)


def set_mode(optimizer: Optimizer, mode: Literal["train", "eval"]) -> None:
    """Switch the weights to those for steps or for evaluation, if the optimizer distinguishes them.

    Schedule-free optimizers do (Defazio et al., The Road Less Scheduled, 2024).
    """
    getattr(optimizer, mode, lambda: None)()


def check_phases(
    phases: Mapping[str, PhaseConfig],
    data: Dataset,
    model: nn.Module,
    used: Collection[str] = (),
    leaking: Collection[str] = (),
) -> dict[str, str | None]:
    """Return the split that validates each phase, None if training has used it.

    Args:
        phases: Configurations by name, in order.
        data: The data set.
        model: The model, perhaps without values.
        used: Splits that the initial weights may have been trained on.
        leaking: The phases whose targets come from networks that were trained on the validation split.

    Raises:
        UserError: A phase cannot train on its split, or cannot use its loss or one of its callbacks.
    """
    validations: dict[str, str | None] = {}
    trained_on = set(used)
    for name, config in phases.items():
        if config.split not in data.splits or config.split == "test":
            allowed = " or ".join(known for known in data.splits if known != "test")
            raise UserError.invalid(f"phases.{name}.split", config.split, f"{allowed} with this data")
        if config.batch_size > (size := data.splits[config.split].epoch_size):
            expected = f"at most {size}, the size of an epoch of the split {config.split}"
            remedy = f"Lower phases.{name}.batch_size, or train on more images."
            raise UserError.invalid(f"phases.{name}.batch_size", config.batch_size, expected, remedy)
        _check_loss(config, f"phases.{name}.loss", data)
        trained_on |= {config.split, data.validation} if name in leaking else {config.split}
        validations[name] = None if data.validation in trained_on else data.validation
        for key, callback in config.callbacks.items():
            if not isinstance(callback, Callback):
                where = f"phases.{name}.callbacks.{key}"
                raise UserError.invalid(where, type(callback).__name__, "a class derived from learning.callbacks.Callback")
            try:
                callback.check(model, validations[name])
            except UserError as error:
                where = f"phases.{name}.callbacks.{key}.{error.key}"
                raise UserError.invalid(where, error.value, error.expected, error.remedy) from error
    return validations


def fit(
    model: nn.Module,
    phases: list[Phase],
    data: Dataset,
    *,
    seed: int,
    precision: torch.dtype,
    save_every: int | None = None,
    resume_from: TrainState | None = None,
) -> Iterator[Report]:
    """Train `model` through `phases`, and yield reports.

    There are at most `REPORTS_PER_EPOCH` reports an epoch and one at each checkpoint. The last of an epoch contains validation
    and state.
    A device other than the CPU runs ahead of this function, which waits for it at checkpoints only. Reports and errors since
    the previous checkpoint then arrive together.

    Args:
        model: The model, which is changed in place.
        phases: The phases of the model, from `prepare_phases`.
        data: The data set, on the device of the model.
        seed: Seed of order, augmentation and dropout. Phase, epoch and step enter as well, so that a resumed run continues
            bit for bit as if it had never stopped.
        precision: Dtype of matrix products and convolutions, from `choose_precision`.
        save_every: Steps between checkpoints, in addition to the one at the end of every epoch.
        resume_from: State of the report to resume from.

    Raises:
        DivergedError: The loss or the weights are not finite.
        UserError: `resume_from` does not belong to these phases.
    """
    model.to(memory_format=torch.channels_last)
    names = [phase.name for phase in phases]
    if resume_from is not None and not _is_state_of(resume_from, names):
        raise UserError("The checkpoint contains no state of this run's phases.", remedy="Start a new run.")
    first, epochs_before, examples_seen = 0, 0, 0
    if resume_from:
        first, epochs_before = names.index(resume_from["phase"]), resume_from["epochs_before"]
    for phase in phases[first:]:
        trainer = _PhaseTrainer(model, phase, data, seed, precision, save_every, epochs_before, examples_seen)
        trainer.start(resume_from if phase is phases[first] else None)
        while not trainer.ended:
            yield from trainer.train_epoch()
        epochs_before, examples_seen = epochs_before + trainer.epoch, trainer.examples_seen


def _is_state_of(state: TrainState, phases: list[str]) -> bool:
    counts = [state.get("steps"), state.get("epochs_before"), state.get("examples_seen")]
    return state.get("phase") in phases and all(isinstance(count, int) and count >= 0 for count in counts)


@dataclass
class _MetricBuffer:
    """Metrics of the steps between two reports, kept on the device so that no step waits for it."""

    last_step: int = 0  # in the epoch, from 1
    learning_rate: float = 0.0  # of the last step
    results: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # loss, accuracy, gradient norm of each step
    sizes: list[int] = field(default_factory=list)  # images of each step

    def read(self) -> list[list[float]]:
        """Wait for the device, and return the losses, accuracies and gradient norms."""
        return [torch.stack(values).tolist() for values in zip(*self.results, strict=True)]


@dataclass
class _PhaseTrainer:
    """Trains one phase, epoch by epoch. The fields are the arguments of `fit` and the counts before the phase."""

    model: nn.Module
    phase: Phase
    data: Dataset
    seed: int
    precision: torch.dtype
    save_every: int | None
    epochs_before: int
    examples_seen: int
    steps: int = 0  # in this phase
    ended: bool = False  # the phase

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.callbacks = self.phase.config.callbacks

    @property
    def epoch(self) -> int:
        """The number of epochs that are complete."""
        return self.steps // self.phase.steps_per_epoch

    def train_epoch(self) -> Iterator[Report]:
        """Train the next epoch, and yield its reports; a resumed epoch skips the steps before the checkpoint."""
        phase, steps_per_epoch, epoch = self.phase, self.phase.steps_per_epoch, self.epoch
        report_steps = {round(steps_per_epoch * (i + 1) / REPORTS_PER_EPOCH) for i in range(REPORTS_PER_EPOCH)}
        self.model.train()
        set_mode(phase.optimizer, "train")
        for callback in self.callbacks.values():
            callback.on_epoch_start()
        buffers, buffer, started = [], _MetricBuffer(), time.perf_counter()
        first = self.steps % steps_per_epoch
        order = generator(self.seed, phase.name, epoch, "order")
        batches = self.data.splits[phase.config.split].batches(phase.config.batch_size, order, skip=first)
        for step, (images, labels) in enumerate(batches, start=first + 1):
            buffer.last_step, buffer.learning_rate = step, phase.optimizer.param_groups[0]["lr"]
            buffer.results.append(self.train_step(images, labels, (self.seed, phase.name, epoch, step)))
            buffer.sizes.append(len(labels))
            self.steps += 1
            is_checkpoint = step == steps_per_epoch or (self.save_every is not None and self.steps % self.save_every == 0)
            if is_checkpoint or step in report_steps:
                buffers.append(buffer)
                buffer = _MetricBuffer()
                if is_checkpoint or self.device.type == "cpu":  # reading a result waits for the device
                    yield from self.report(epoch, buffers, started, is_checkpoint)
                    buffers, started = [], time.perf_counter()

    def train_step(self, images: Tensor, labels: Tensor, seed_parts: tuple[object, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step, without waiting for the device except in fp16.

        Args:
            images: (n, channels, side, side) uint8.
            labels: (n,) int64.
            seed_parts: Parts of the step's seeds.

        Returns:
            Loss, accuracy and gradient norm, each () float32 on the device.
        """
        config, optimizer = self.phase.config, self.phase.optimizer
        images = config.augmentation(images, generator(*seed_parts, "augmentation"))  # (n, channels, side, side) float32
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(*seed_parts, "dropout"))  # dropout uses torch's global generator only
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                targets = self.phase.targets(images, labels)  # (n,) or (n, classes)
                for name, callback in self.callbacks.items():
                    images, targets = callback.on_batch(images, targets, generator(*seed_parts, "callbacks", name))
                logits = self.model(images)  # (n, classes)
        loss = config.loss(logits.float(), targets)
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(optimizer)
        limit = float("inf") if config.max_grad_norm is None else config.max_grad_norm
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.scaler.step(optimizer)
        self.scaler.update()
        self.phase.scheduler.step()
        for callback in self.callbacks.values():
            callback.on_step()
        return loss.detach(), (logits.argmax(1) == labels).float().mean(), grad_norm.detach()

    def report(self, epoch: int, buffers: list[_MetricBuffer], started: float, is_checkpoint: bool) -> Iterator[Report]:
        """Yield the reports of `buffers`; at a checkpoint, the last contains the state and, after an epoch, the validation."""
        results = [buffer.read() for buffer in buffers]
        seconds_per_example = (time.perf_counter() - started) / sum(sum(buffer.sizes) for buffer in buffers)
        for buffer, (losses, accuracies, grad_norms) in zip(buffers, results, strict=True):
            for step, loss in enumerate(losses, start=buffer.last_step - len(losses) + 1):
                if not abs(loss) < float("inf"):
                    raise self.not_finite(f"loss became {loss}", epoch, step, buffer)
            examples = sum(buffer.sizes)
            self.examples_seen += examples
            metrics = {
                "epoch": self.epochs_before + epoch + buffer.last_step / self.phase.steps_per_epoch,
                "train/loss": weighted_mean(losses, buffer.sizes),
                "train/accuracy": weighted_mean(accuracies, buffer.sizes),
                "train/grad_norm": sum(grad_norms) / len(grad_norms),
                "train/lr": buffer.learning_rate,
                "train/examples_per_second": 1 / seconds_per_example,
            }
            ended_epoch, state, figures = None, None, {}
            if is_checkpoint and buffer is buffers[-1]:
                if not all(value.isfinite().all() for value in self.model.state_dict().values()):
                    raise self.not_finite("weights became infinite or NaN", epoch, buffer.last_step, buffer)
                if buffer.last_step == self.phase.steps_per_epoch:
                    ended_epoch, figures = self.epoch, self.end_epoch(metrics)
                state = self.state()
            seconds = seconds_per_example * examples
            yield Report(self.phase.name, self.examples_seen, seconds, metrics, ended_epoch, state, figures)

    def end_epoch(self, metrics: dict[str, float]) -> dict[str, Figure]:
        """Add the validation metrics, unless training has used that split, and end the phase if it is time; return figures."""
        set_mode(self.phase.optimizer, "eval")
        if self.phase.validation is not None:
            network = self.model
            for callback in self.callbacks.values():
                network = callback.validated(network)
            evaluation = evaluate(network, self.data.splits[self.phase.validation])
            metrics |= {f"val/{name}": value for name, value in evaluation.metrics.items()}
        stops = [callback.on_epoch_end(metrics) for callback in self.callbacks.values()]
        for name, value in metrics.items():
            try:
                metrics[name] = float(value)  # a callback may have added a tensor
            except (TypeError, ValueError) as error:
                raise UserError.invalid(name, value, "a number, as the value of a metric", "Correct on_epoch_end.") from error
        self.ended = any(stops) or self.epoch == self.phase.config.epochs
        ending = self.callbacks.values() if self.ended else ()
        return {name: figure for callback in ending for name, figure in (callback.on_phase_end() or {}).items()}

    def not_finite(self, problem: str, epoch: int, step: int, buffer: _MetricBuffer) -> DivergedError:
        """Return the error for a loss or weights that are not finite."""
        return DivergedError(
            f"The {problem} in phase {self.phase.name}, epoch {epoch + 1}, step {step} of {self.phase.steps_per_epoch}, "
            f"at learning rate {buffer.learning_rate:g}: expected finite numbers.",
            remedy="Lower optimizer.lr (or phases.*.optimizer.lr), or the limit of the gradient, phases.*.max_grad_norm.",
        )

    def _modules(self) -> dict[str, Any]:
        optimizer, scheduler = self.phase.optimizer, self.phase.scheduler
        return {"model": self.model, "optimizer": optimizer, "scheduler": scheduler, "scaler": self.scaler}

    def state(self) -> TrainState:
        """Return all that `start` needs, without copies."""
        states = {name: part.state_dict() for name, part in self._modules().items()}
        callbacks = {name: callback.state_dict() for name, callback in self.callbacks.items()}
        counts = {"steps": self.steps, "epochs_before": self.epochs_before, "examples_seen": self.examples_seen}
        return {"phase": self.phase.name, "ended": self.ended, **counts, **states, "callbacks": callbacks}

    def start(self, state: TrainState | None) -> None:
        """Start the phase, or continue it from the state of a report.

        Raises:
            UserError: The state belongs to another model, optimizer or callback.
        """
        self.ended = bool(state and state.get("ended"))
        for callback in () if self.ended else self.callbacks.values():
            callback.on_phase_start(self.model)
        if state is None:
            return
        self.steps, self.examples_seen = state["steps"], state["examples_seen"]
        try:
            for name, part in self._modules().items():
                part.load_state_dict(state[name])
            for name, callback in () if self.ended else self.callbacks.items():
                callback.load_state_dict(state["callbacks"][name])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"The checkpoint's state does not fit phase {self.phase.name} as this version builds it: "
                f"{str(error).splitlines()[0]}.",
                remedy="Resume with the version that wrote it, or start a new run.",
            ) from error


def weighted_mean(values: list[float], weights: list[int]) -> float:
    """Return the mean of `values`, each counted `weights` times."""
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
