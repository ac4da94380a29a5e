"""Callbacks in real training: what they leave in the weights, and when they refuse."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MNIST_SHAPE, Compose
from torch import Tensor, nn

from mnist_exp.errors import UserError
from mnist_exp.learning.callbacks import Callback, EarlyStopping, Freeze, WeightAverage
from mnist_exp.learning.data import Dataset, derive_seed
from mnist_exp.learning.evaluation import evaluate
from mnist_exp.learning.training import Report, fit, prepare_phases
from mnist_exp.nodes import build
from mnist_exp.settings import Settings


def train(config: Settings, data: Dataset, **callbacks: Callback) -> tuple[nn.Module, nn.Module, list[Report]]:
    """Train; return the model before and after it, and the reports. The callbacks are those of the first phase."""
    torch.manual_seed(derive_seed(0, "weights"))
    model = build(config.model, "model", **MNIST_SHAPE)
    before = copy.deepcopy(model)
    phases = {name: build(node, f"phases.{name}") for name, node in config.phases.items()}
    first = next(iter(phases))
    phases[first] = replace(phases[first], callbacks=callbacks or phases[first].callbacks)
    prepared = prepare_phases(model, phases, data, Path())
    return before, model, [copy.deepcopy(report) for report in fit(model, prepared, data, seed=0, precision=torch.float32)]


def test_the_average_validates_and_stays_in_model_and_checkpoint(composed: Compose, short_digits: Dataset) -> None:
    config = composed("phase=[train]", "phases.train.epochs=2", "batch_size=300")
    steps: list[dict[str, torch.Tensor]] = []

    class Steps(Callback):
        def on_phase_start(self, model: nn.Module) -> None:
            self.model = model
            steps.append(copy.deepcopy(model.state_dict()))

        def on_step(self) -> None:
            steps.append(copy.deepcopy(self.model.state_dict()))

    _, model, reports = train(config, short_digits, steps=Steps(), average=WeightAverage(decay=0.5))
    name = "output.weight"
    expected = steps[1][name]  # the average starts with the weights after the first step
    for step in steps[2:]:
        expected = 0.5 * expected + 0.5 * step[name]
    torch.testing.assert_close(model.state_dict()[name], expected)
    assert reports[-1].state is not None
    assert reports[-1].state["ended"]
    assert reports[-1].state["model"][name].equal(model.state_dict()[name])
    values = evaluate(model, short_digits.splits["finetune"]).metrics
    assert reports[-1].metrics["val/loss"] == values["loss"], "the network that validates is the one that stays"


def test_a_phase_ends_early_and_the_next_one_counts_from_there(composed: Compose, short_digits: Dataset) -> None:
    config = composed("callbacks=[early_stopping]", "callbacks.early_stopping.patience=2", "callbacks.early_stopping.min_delta=1",
                      "phases.train.epochs=20", "batch_size=300")  # fmt: skip
    _, _, reports = train(config, short_digits)
    ends = {report.phase: report for report in reports if report.state and report.state["ended"]}
    assert ends["train"].metrics["epoch"] == 3, "the first value, and two epochs that do not reach it by 1"
    assert ends["finetune"].metrics["epoch"] == 4
    assert ends["finetune"].examples_seen == 3 * short_digits.splits["train"].epoch_size + 128


def test_lower_is_better_for_a_loss() -> None:
    callback = EarlyStopping("val/loss", patience=2)
    callback.on_phase_start(nn.Linear(1, 1))
    values = [1.0, 0.5, 0.6, 0.4, 0.5, 0.6]
    assert [callback.on_epoch_end({"val/loss": value}) for value in values] == [False, False, False, False, False, True]


@pytest.mark.parametrize("metric", ["test/accuracy", "val/hue", "val/epoch"])
def test_a_metric_that_cannot_decide_is_refused(metric: str) -> None:
    with pytest.raises(UserError) as error:
        EarlyStopping(metric, patience=2)
    assert error.value.key == "metric"


def test_frozen_modules_keep_weights_and_statistics(composed: Compose, short_digits: Dataset) -> None:
    """Until the phase ends: the next one trains them, also in a model with the norm of this project's fused kernel."""
    config = composed("phases.train.epochs=2", "batch_size=300")
    before, frozen, _ = train(composed("phase=[train]", "phases.train.epochs=2", "batch_size=300"), short_digits,
                              freeze=Freeze(["blocks"]))  # fmt: skip
    for name, value in before.state_dict().items():
        assert value.equal(frozen.state_dict()[name]) == name.startswith("blocks."), name
    _, both, _ = train(config, short_digits, freeze=Freeze(["blocks"]))
    assert not both.state_dict()["blocks.0.norm.running_mean"].equal(before.state_dict()["blocks.0.norm.running_mean"])
    assert not both.state_dict()["blocks.0.conv.weight"].equal(before.state_dict()["blocks.0.conv.weight"])
    assert all(parameter.requires_grad for parameter in both.parameters())


def test_what_a_phase_cannot_use_is_an_error_before_training(composed: Compose, short_digits: Dataset) -> None:
    """Also in a later phase: nothing is trained in vain."""
    for option, key in (("early_stopping", "early_stopping.metric"), ("freeze", "freeze.modules")):
        config = composed(f"callbacks@phases.finetune.callbacks=[{option}]")
        if option == "freeze":
            config.phases["finetune"]["callbacks"]["freeze"]["modules"] = ["nothing"]
        with pytest.raises(UserError) as error:
            train(config, short_digits)
        assert error.value.key == f"phases.finetune.callbacks.{key}"


def test_a_callback_may_change_the_batch(composed: Compose, short_digits: Dataset) -> None:
    """Images and targets, one callback after the other; without its generator, a resumed run would differ."""

    class Half(Callback):
        def __init__(self, least: float) -> None:
            self.least, self.drawn = least, list[float]()

        def on_batch(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            assert float(images.max()) > self.least, "the callbacks before it have halved the images"
            assert targets.ndim == 1
            self.drawn.append(torch.rand((), generator=generator).item())
            return images / 2, torch.zeros_like(targets)

    first, second, again = Half(128), Half(64), Half(128)
    config = composed("phase=[train]", "batch_size=300", "phases.train.epochs=3", "optimizer.lr=0.05")
    _, model, _ = train(config, short_digits, first=first, second=second)
    train(config, short_digits, first=again)
    assert first.drawn == again.drawn
    assert len(set(first.drawn + second.drawn)) == 2 * len(first.drawn)
    assert set(evaluate(model, short_digits.splits["finetune"]).predictions.tolist()) == {0}, "the targets that it gave"


def test_an_optimizer_may_evaluate_with_other_weights_than_it_trains(composed: Compose, short_digits: Dataset) -> None:
    """A schedule-free one leaves the average of its weights, which validation has seen."""
    config = composed("phase=[train]", "batch_size=300", "scheduler=constant")
    config.phases["train"]["optimizer"] = {"_target_": "pytorch_optimizer.ScheduleFreeSGD", "lr": 0.1}
    optimizers: list[Any] = []

    class Weights(Callback):
        def on_step(self) -> None:
            assert optimizers[-1].param_groups[0]["train_mode"]

    phase = build(config.phases["train"], "phases.train")
    model = build(config.model, "model", **MNIST_SHAPE)

    def make(parameters: Any) -> Any:
        optimizers.append(phase.optimizer(parameters))
        return optimizers[-1]

    phases = prepare_phases(
        model, {"train": replace(phase, optimizer=make, callbacks={"weights": Weights()})}, short_digits, Path()
    )
    *_, last = fit(model, phases, short_digits, seed=0, precision=torch.float32)
    values = evaluate(model, short_digits.splits["finetune"]).metrics
    assert last.metrics["val/loss"] == values["loss"]
    optimizers[-1].train()
    assert evaluate(model, short_digits.splits["finetune"]).metrics["loss"] != values["loss"]


def test_a_callback_may_add_metrics_and_return_figures(composed: Compose, short_digits: Dataset) -> None:
    from matplotlib.figure import Figure

    class Gradients(Callback):
        def on_phase_start(self, model: nn.Module) -> None:
            self.model = model

        def on_step(self) -> None:
            self.largest = max(float(parameter.grad.abs().max()) for parameter in self.model.parameters())

        def on_epoch_end(self, metrics: dict[str, float]) -> bool:
            metrics["train/largest_gradient"] = self.largest
            return False

        def on_phase_end(self) -> dict[str, Figure]:
            return {"gradients": Figure()}

    _, _, reports = train(composed("phase=[train]", "batch_size=300"), short_digits, gradients=Gradients())
    assert 0 < reports[-1].metrics["train/largest_gradient"] < float("inf")
    assert list(reports[-1].figures) == ["gradients"]
    assert not any(report.figures for report in reports[:-1])
