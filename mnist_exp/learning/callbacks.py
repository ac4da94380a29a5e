"""Callbacks: what a phase does besides its steps. They are called in their order; the methods of the base class do nothing."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import MinLen
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_exp.errors import Count, Fraction, NonNegative, UserError
from mnist_exp.metrics import metric_of, objectives


class Callback:
    """The base class.

    A phase that is resumed calls `on_phase_start`, `load_state_dict` and `on_epoch_start`; one that had ended calls nothing.
    """

    def check(self, model: nn.Module, validation: str | None) -> None:
        """Raise UserError if a phase cannot use the callback; called for all phases before the first one starts.

        Args:
            model: The model, perhaps without values.
            validation: The split that validates the phase, None without one.
        """

    def on_phase_start(self, model: nn.Module) -> None:
        """Called before the first step, with the model that is trained."""

    def on_epoch_start(self) -> None:
        """Called before an epoch, after `model.train()`."""

    def on_batch(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the batch of a step, perhaps changed, with as many images.

        Args:
            images: (n, channels, side, side) float32, augmented.
            targets: Labels (n,) int64, or probabilities (n, classes) float32 from a teacher or an earlier callback.
            generator: The only source of randomness, so that a resumed run stays exact.
        """
        return images, targets

    def on_step(self) -> None:
        """Called after a step of the optimizer, while the parameters have their gradients."""

    def validated(self, model: nn.Module) -> nn.Module:
        """Return the network that validation evaluates: `model`, or another one."""
        return model

    def on_epoch_end(self, metrics: dict[str, float]) -> bool:
        """Called with the metrics of an epoch, to which it may add; return whether to end the phase."""
        return False

    def on_phase_end(self) -> Mapping[str, Figure] | None:
        """Called after the last epoch, before the weights are saved, which it may change; may return figures by name."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed phase needs: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` has returned."""


class WeightAverage(Callback):
    """Validate, and keep at the end, an exponential moving average of the weights and of the statistics of batch norms.

    Args:
        decay: Weight of the previous average in each step.

    Source: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992, with exponential weights.
    """

    def __init__(self, decay: Fraction) -> None:
        self.decay = decay

    def on_phase_start(self, model: nn.Module) -> None:
        self.model = model
        mean = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]  # torch's
        self.average = AveragedModel(model, multi_avg_fn=mean, use_buffers=True)

    def on_step(self) -> None:
        self.average.update_parameters(self.model)

    def validated(self, model: nn.Module) -> nn.Module:
        network: nn.Module = self.average.module
        return network

    def on_phase_end(self) -> None:
        self.model.load_state_dict(self.average.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)


class EarlyStopping(Callback):
    """End the phase when a validation metric has not improved for some epochs. The last weights are kept.

    Args:
        metric: Name of the metric, such as `val/accuracy`; metrics.py says whether higher is better.
        patience: Number of epochs without improvement.
        min_delta: Smallest change that counts as an improvement, in the recorded unit (accuracy: 0 to 1).

    Raises:
        UserError: There is no such metric, or it has no direction.
    """

    def __init__(self, metric: str, patience: Count, min_delta: NonNegative = 0.0) -> None:
        if metric not in objectives():
            raise UserError.invalid("metric", metric, f"a validation metric: {' or '.join(objectives())}")
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        self.sign = 1 if metric_of(metric).higher_is_better else -1

    def check(self, model: nn.Module, validation: str | None) -> None:
        if validation is None:
            raise UserError.invalid("metric", self.metric, "a phase with validation images", "Leave it out of this phase.")

    def on_phase_start(self, model: nn.Module) -> None:
        self.best, self.epochs_since = float("-inf"), 0

    def on_epoch_end(self, metrics: dict[str, float]) -> bool:
        value = self.sign * metrics[self.metric]
        if value > self.best + self.min_delta:
            self.best, self.epochs_since = value, 0
        else:
            self.epochs_since += 1
        return self.epochs_since >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "epochs_since": self.epochs_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.epochs_since = state["best"], state["epochs_since"]


class Freeze(Callback):
    """Keep modules of the model as they are for the whole phase: their parameters, and the statistics of their batch norms.

    Args:
        modules: Names of the modules, as `model.named_modules()` has them, such as `blocks` or `blocks.0`.

    """

    def __init__(self, modules: Annotated[Sequence[str], MinLen(1)]) -> None:
        self.modules = modules

    def check(self, model: nn.Module, validation: str | None) -> None:
        known = [name for name, _ in model.named_modules() if name]
        for name in self.modules:
            if name not in known:
                raise UserError.invalid("modules", name, f"some of {', '.join(known)}")
        frozen = {id(parameter) for name in self.modules for parameter in model.get_submodule(name).parameters()}
        if not any(parameter.requires_grad and id(parameter) not in frozen for parameter in model.parameters()):
            raise UserError.invalid("modules", list(self.modules), "modules that leave parameters to train")

    def on_phase_start(self, model: nn.Module) -> None:
        self.frozen = [model.get_submodule(name) for name in self.modules]
        parameters = [parameter for module in self.frozen for parameter in module.parameters()]
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None

    def on_epoch_start(self) -> None:
        for module in self.frozen:
            module.eval()

    def on_phase_end(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)
