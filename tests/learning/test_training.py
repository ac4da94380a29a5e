import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MNIST_SHAPE, finished
from torch import Tensor, nn

from mnist_exp.errors import DivergedError, UserError
from mnist_exp.learning.data import Dataset, derive_seed
from mnist_exp.learning.datasets import load_digits
from mnist_exp.learning.distillation import Targets
from mnist_exp.learning.evaluation import evaluate
from mnist_exp.learning.training import (
    Phase,
    Report,
    _PhaseTrainer,
    choose_device,
    choose_precision,
    fit,
    prepare_phases,
)
from mnist_exp.nodes import build
from mnist_exp.settings import Settings


def train(config: Settings, data: Dataset | None = None) -> tuple[nn.Module, list[Report], Dataset]:
    """Train as a run does, without recording anything; on `data`, or by default on the data of the configuration."""
    data = data or build(config.data, "data", seed=config.seed)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = build(config.model, "model", **MNIST_SHAPE)
    configs = {name: build(node, f"phases.{name}") for name, node in config.phases.items()}
    phases = prepare_phases(model, configs, data, Path())
    precision = choose_precision(config.precision, torch.device("cpu"))
    return model, list(fit(model, phases, data, seed=config.seed, precision=precision)), data


def test_digits_pass_the_gate(composed) -> None:
    model, reports, data = train(composed("data=digits", "data.subset=1400", "batch_size=64", "phases.train.epochs=3"))
    assert evaluate(model, data.splits["test"]).metrics["accuracy"] > 0.80
    assert {report.phase for report in reports} == {"train", "finetune"}
    assert reports[-1].examples_seen == 3 * 1400 + data.splits["finetune"].epoch_size


def test_a_fifth_of_an_epoch_on_mnist_exceeds_90_percent(composed, mnist_root) -> None:
    """The first phase alone, validated on images that it has not trained on."""
    _, reports, _ = train(composed(f"data.root={mnist_root}", "data.subset=12000", "batch_size=128", "~phases.finetune"))
    assert [report.phase for report in reports] == ["train"] * 20
    assert reports[-1].metrics["val/accuracy"] > 0.9


@pytest.mark.slow
def test_the_default_run_averages_983(composed, mnist_root) -> None:
    accuracies = []
    for seed in range(3):
        model, _, data = train(composed(f"data.root={mnist_root}", f"seed={seed}"))
        accuracies.append(evaluate(model, data.splits["test"]).metrics["accuracy"])
    assert sum(accuracies) / 3 >= 0.983, accuracies


def test_the_same_seed_gives_the_same_weights_bit_for_bit(composed, short_digits) -> None:
    first, repeated, other = (train(composed(f"seed={seed}"), short_digits)[0].state_dict() for seed in (0, 0, 1))
    assert all(first[key].equal(repeated[key]) for key in first)
    assert not all(first[key].equal(other[key]) for key in first)


def test_a_caller_s_random_state_neither_matters_nor_changes(composed, short_digits) -> None:
    config, data = composed("~phases.train"), short_digits
    torch.manual_seed(1)
    first = train(config, data)[0].state_dict()
    torch.manual_seed(derive_seed(0, "weights"))
    model = build(config.model, "model", **MNIST_SHAPE)
    phases = prepare_phases(model, {"finetune": build(config.phases["finetune"], "phases.finetune")}, data, Path())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    list(fit(model, phases, data, seed=0, precision=choose_precision("auto", torch.device("cpu"))))
    assert torch.get_rng_state().equal(before)
    assert all(first[key].equal(value) for key, value in model.state_dict().items())


def test_phases_can_be_dropped_and_added(composed, short_digits) -> None:
    assert list(composed("~phases.finetune").phases) == ["train"]
    assert list(composed("~phases.train").phases) == ["finetune"]
    three = composed("~phases.train", "+phase@phases.polish=finetune", "phases.polish.optimizer.lr=1e-5")
    assert list(composed("phase=[finetune,train]").phases) == ["finetune", "train"]
    assert list(three.phases) == ["finetune", "polish"]
    assert three.phases["polish"]["optimizer"]["lr"] == 1e-5
    assert [report.phase for report in train(three, short_digits)[1]] == ["finetune", "polish"]


def test_a_phase_s_own_optimizer_can_be_chosen(composed) -> None:
    phases = composed("optimizer@phases.finetune.optimizer=adamw").phases
    assert phases["finetune"]["optimizer"]["_target_"] == "torch.optim.AdamW"
    assert phases["finetune"]["optimizer"]["lr"] == 1e-4
    assert phases["train"]["optimizer"]["_target_"] == "torch.optim.SGD"


class OneOff(Targets):
    """Targets that are the digit after the label."""

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.one_hot((labels + 1) % 10, 10).float()


def test_a_network_learns_the_targets_of_its_teacher(composed, short_digits) -> None:
    config = composed("~phases.finetune", "batch_size=64", "phases.train.epochs=3")
    model = build(config.model, "model", **MNIST_SHAPE)
    phase = replace(build(config.phases["train"], "phases.train"), teacher=lambda data, output_dir: OneOff())
    phases = prepare_phases(model, {"train": phase}, short_digits, Path())
    reports = list(fit(model, phases, short_digits, seed=0, precision=torch.float32))
    evaluation = evaluate(model, short_digits.splits["test"])
    assert (evaluation.logits.argmax(1) == (evaluation.labels + 1) % 10).float().mean() > 0.8
    assert evaluation.metrics["accuracy"] < 0.1 > reports[-1].metrics["train/accuracy"], "accuracy counts labels, not targets"


def test_a_split_that_a_phase_has_trained_on_no_longer_validates(composed, short_digits) -> None:
    _, reports, _ = train(composed(), short_digits)
    validated = {report.phase for report in reports if "val/accuracy" in report.metrics}
    assert validated == {"train"}, "phase finetune trains on the images that validated phase train"


def test_a_split_that_a_teacher_was_trained_on_no_longer_validates(composed, short_digits, tmp_path: Path) -> None:
    of_seed = {seed: load_digits(0.02, seed) for seed in (0, 1)}
    for seed, drop, validates in ((0, "~phases.finetune", True), (0, "~phases.train", False), (1, "~phases.finetune", False)):
        run = finished(composed("data=digits", drop), of_seed[seed], tmp_path)
        config = build(composed("teacher=ensemble", f"teacher.runs=[{run}]").phases["train"], "phases.train")
        model = build(composed().model, "model", **MNIST_SHAPE)
        (phase,) = prepare_phases(model, {"train": config}, short_digits, tmp_path)
        assert (phase.validation == "finetune") == validates


def test_reports_cover_every_example_once(composed, short_digits) -> None:
    config = composed("batch_size=30", "~phases.finetune", "phases.train.epochs=2")
    _, reports, data = train(config, short_digits)
    assert len(reports) == 40
    assert reports[-1].examples_seen == 2 * data.splits["train"].epoch_size
    assert [report.metrics["epoch"] for report in reports if report.state] == [1.0, 2.0]
    assert reports[0].metrics.keys() == {
        "epoch", "train/loss", "train/accuracy", "train/grad_norm", "train/lr", "train/examples_per_second",
    }  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_steps_do_not_wait_for_the_gpu(composed, short_digits) -> None:
    config, device = composed("~phases.finetune"), torch.device("cuda")
    model, data = build(config.model, "model", **MNIST_SHAPE).to(device), short_digits.to(device)
    (phase,) = prepare_phases(model, {"train": build(config.phases["train"], "phases.train")}, data, Path())
    trainer = _PhaseTrainer(model, phase, data, 0, choose_precision("auto", device), None, 0, 0)
    batches = list(data.splits["train"].batches(512, torch.Generator()))
    try:
        for step, (images, labels) in enumerate(batches):
            trainer.train_step(images, labels, (step,))
            torch.cuda.set_sync_debug_mode("error")  # from the second step on: the first one initializes the libraries
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_loss_that_is_not_finite_stops_the_run(composed, short_digits) -> None:
    with pytest.raises(DivergedError) as error:
        train(composed("optimizer.lr=1e29", "scheduler=constant", "phases.train.epochs=20"), short_digits)
    assert "optimizer.lr" in error.value.remedy


def test_weights_that_are_not_finite_never_reach_a_checkpoint(composed, short_digits) -> None:
    config = composed("~phases.train")
    model = build(config.model, "model", **MNIST_SHAPE)
    phases = prepare_phases(model, {"finetune": build(config.phases["finetune"], "phases.finetune")}, short_digits, Path())
    phases[0].scheduler.step = lambda: model.output.weight.data.fill_(float("nan"))  # after the last step's finite loss
    with pytest.raises(DivergedError):
        list(fit(model, phases, short_digits, seed=0, precision=torch.float32))
    with pytest.raises(UserError):
        evaluate(model, short_digits.splits["test"])


def test_the_gradient_is_clipped(composed, short_digits) -> None:
    config = composed("~phases.finetune", "phases.train.max_grad_norm=1e-12",
                      "scheduler=constant", "optimizer=sgd", "optimizer.weight_decay=0")  # fmt: skip
    torch.manual_seed(derive_seed(0, "weights"))
    before = build(config.model, "model", **MNIST_SHAPE)
    after = train(config, short_digits)[0]
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(old, new, atol=1e-9, rtol=0, msg=f"{name} moved")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions_learn(composed, precision: str, short_digits) -> None:
    model, _, data = train(composed(f"precision={precision}", "batch_size=64", "phases.train.epochs=3"), short_digits)
    assert evaluate(model, data.splits["test"]).metrics["accuracy"] > 0.80


def test_a_phase_on_a_split_that_is_not_there(composed, short_digits) -> None:
    for split in ("test", "nothing"):
        with pytest.raises(UserError) as error:
            train(composed(f"phases.train.split={split}"), short_digits)
        assert (error.value.key, error.value.value) == ("phases.train.split", split)


def test_a_batch_larger_than_an_epoch_is_named(composed, short_digits) -> None:
    with pytest.raises(UserError) as error:
        train(composed("phases.finetune.batch_size=129"), short_digits)
    assert (error.value.key, error.value.value) == ("phases.finetune.batch_size", 129)


def test_a_part_that_rejects_its_arguments_names_its_phase(composed, short_digits) -> None:
    config = build(composed().phases["train"], "phases.train")
    phases = {"train": config, "more": replace(config, optimizer=partial(torch.optim.SGD, lr=-1))}
    with pytest.raises(UserError) as error:
        prepare_phases(build(composed().model, "model", **MNIST_SHAPE), phases, short_digits, Path())
    assert error.value.key == "phases.more"


@pytest.mark.parametrize("output", [11, None])
def test_a_model_with_another_output_is_refused_before_training(composed, short_digits, output: int | None) -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(784, output or 10)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images.flatten(1).float()) if output else self.layer(images.flatten(1))  # bytes

    with pytest.raises(UserError) as error:
        prepare_phases(Wrong(), {"train": build(composed().phases["train"], "phases.train")}, short_digits, Path())
    assert error.value.key == "model"


def test_an_object_that_is_no_callback_is_refused(composed, short_digits) -> None:
    model = build(composed().model, "model", **MNIST_SHAPE)
    phase = replace(build(composed().phases["train"], "phases.train"), callbacks={"mine": object()})
    with pytest.raises(UserError) as error:
        prepare_phases(model, {"train": phase}, short_digits, Path())
    assert error.value.key == "phases.train.callbacks.mine"


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError) as error:
        choose_device("cuda")
    assert (error.value.key, error.value.value) == ("device", "cuda")
    assert choose_device("auto").type in ("cpu", "mps")


def assert_equal(first: Any, second: Any) -> None:
    """Equal to the bit, through dicts, lists and tensors."""
    if isinstance(first, torch.Tensor):
        assert first.equal(second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list):
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


CALLBACKS = (
    "callbacks=[freeze,weight_average,early_stopping]",
    "callbacks.early_stopping.patience=1",
    "callbacks.early_stopping.min_delta=1",
    "callbacks@phases.finetune.callbacks=[weight_average]",
)


SCHEDULE_FREE = {"_target_": "pytorch_optimizer.ScheduleFreeSGD", "lr": 0.1}


@pytest.mark.parametrize(
    ("options", "parts"),
    [(["optimizer=sgd_nesterov"], {}), (["optimizer=adamw"], {}), (CALLBACKS, {}), ([], {"optimizer": SCHEDULE_FREE})],
    ids=["sgd", "adamw", "callbacks", "schedule_free"],
)
def test_resuming_from_any_checkpoint_ends_in_the_same_state(composed, short_digits, options: list[str], parts: dict) -> None:
    """In both phases, within an epoch, at its end and between phases; metrics are equal, too, except the speed."""
    config = composed(*options, "batch_size=300", "phases.train.epochs=3", "phases.finetune.batch_size=10")

    def start() -> tuple[nn.Module, list[Phase]]:
        torch.manual_seed(derive_seed(0, "weights"))
        model = build(config.model, "model", **MNIST_SHAPE)
        configs = {name: build(node | parts, f"phases.{name}") for name, node in config.phases.items()}
        return model, prepare_phases(model, configs, short_digits, Path())

    options = {"seed": 0, "precision": choose_precision("auto", torch.device("cpu")), "save_every": 2}
    whole = [copy.deepcopy(report) for report in fit(*start(), short_digits, **options)]
    saved = [position for position, report in enumerate(whole) if report.state]
    assert len(saved) >= 13
    for position in saved:
        state = copy.deepcopy(whole[position].state)
        rest = [copy.deepcopy(report) for report in fit(*start(), short_digits, **options, resume_from=state)]
        assert len(rest) == len(whole) - position - 1
        for expected, actual in zip(whole[position + 1 :], rest, strict=True):
            assert_equal(expected.state, actual.state)
            assert (expected.phase, expected.examples_seen) == (actual.phase, actual.examples_seen)
            speed = {"train/examples_per_second"}
            assert expected.metrics.keys() == actual.metrics.keys()
            assert all(expected.metrics[key] == actual.metrics[key] for key in expected.metrics.keys() - speed)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),  # where bf16 is emulated, at a quarter of the speed
        ({"avx2": True}, torch.float32),
        ({}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"sve_bf16": True}, torch.bfloat16),
    ],
)
def test_bf16_is_chosen_only_where_the_cpu_has_it(
    capabilities: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision("auto", torch.device("cpu")) == expected
    assert choose_precision("bf16", torch.device("cpu")) == torch.bfloat16
