import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import MNIST_SHAPE
from torch import Tensor, nn

from mnist_exp.errors import UserError
from mnist_exp.learning.fused import norm_pool_activate
from mnist_exp.learning.models import StaticGate, count_parameters, create_model
from mnist_exp.nodes import build

SIZES = {"se_cnn": 19_674, "plain_cnn": 19_526, "plain_cnn_matched": 19_717, "static_gate": 19_542}


@pytest.mark.parametrize(("name", "parameters"), SIZES.items())
def test_sizes(composed, name: str, parameters: int) -> None:
    model = build(composed(f"model={name}").model, "model", **MNIST_SHAPE)
    assert count_parameters(model) == parameters
    assert abs(parameters / 19_674 - 1) < 0.01


ACCURATE = {"se_cnn_wide": 23_386, "se_cnn_deep": 24_496, "se_cnn_separable": 24_157, "se_cnn_separable_small": 9_715}


@pytest.mark.parametrize(("name", "parameters"), ACCURATE.items())
def test_sizes_of_the_larger_models(composed, name: str, parameters: int) -> None:
    model = build(composed(f"model={name}").model, "model", **MNIST_SHAPE)
    assert count_parameters(model) == parameters
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_depths_and_mean_pool(composed) -> None:
    """A block of depth 2 convolves twice at full size; the mean discards the positions of the last features."""
    model = build(composed("model=se_cnn_deep").model, "model", **MNIST_SHAPE).eval()
    assert [[module.out_channels for module in block.modules() if isinstance(module, nn.Conv2d)] for block in model.blocks] == [
        [16],
        [24, 24],
        [30, 30],
    ]
    images = torch.rand(3, 1, 28, 28) * 255
    features = []
    model.blocks.register_forward_hook(lambda _, __, output: features.append(output))
    logits = model(images)
    assert features[0].shape == (3, 30, 3, 3)
    torch.testing.assert_close(model.output(features[0].mean((2, 3))), logits)


def test_separable_convolutions(composed) -> None:
    """Except in the first block, they equal one full convolution, whose kernel is the product of both parts."""
    model = build(composed("model=se_cnn_separable").model, "model", **MNIST_SHAPE).eval()
    assert isinstance(model.blocks[0].conv, nn.Conv2d)
    depthwise, pointwise = model.blocks[2].conv
    features = torch.randn(2, 88, 7, 7)
    full = pointwise.weight * depthwise.weight.transpose(0, 1)  # (out, in, 1, 1) * (1, in, 3, 3)
    torch.testing.assert_close(F.conv2d(features, full, padding=1), model.blocks[2].conv(features), rtol=1e-4, atol=1e-5)


def test_a_static_gate_scales_channels_alike_for_all_images() -> None:
    gate, features = StaticGate(3), torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(gate(features), features / 2)  # at the start
    gate.logits.data = torch.tensor([-9.0, 0.0, 9.0])
    ratios = gate(features) / features
    assert (ratios.flatten(2) - torch.tensor([0.0, 0.5, 1.0])[:, None]).abs().max() < 1e-3


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_28_by_28_to_10(composed, batch: int, dtype: torch.dtype) -> None:
    model = build(composed().model, "model", **MNIST_SHAPE).eval()
    assert model(torch.zeros(batch, 1, 28, 28, dtype=dtype)).shape == (batch, 10)


def test_scaling_is_part_of_the_model(composed) -> None:
    model = build(composed().model, "model", **MNIST_SHAPE).eval()
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    inputs = []
    model.blocks[0].conv.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    model(images)
    torch.testing.assert_close(inputs[0], images.float() / 255)


def test_too_large_a_model_is_refused(composed) -> None:
    with pytest.raises(UserError) as error:
        build(composed("model.hidden_features=120").model, "model", **MNIST_SHAPE)
    assert (error.value.key, error.value.value) == ("model.parameter_limit", 25_000)
    assert "model.parameter_limit=null" in error.value.remedy
    for limit in ("null", "30000"):
        large = composed("model.hidden_features=120", f"model.parameter_limit={limit}").model
        assert count_parameters(build(large, "model", **MNIST_SHAPE)) > 25_000


@pytest.mark.parametrize(
    ("override", "side", "key"),
    [
        ("model.kernel_sizes=[3,2,3]", 28, "model.kernel_sizes"),
        ("model.se.reduction=17", 28, "model.se.reduction"),
        ("model=se_cnn", 7, "model.side"),
    ],
)
def test_sizes_that_do_not_fit_are_named(composed, override: str, side: int, key: str) -> None:
    with pytest.raises(UserError) as error:
        build(composed(override).model, "model", **(MNIST_SHAPE | {"side": side}))
    assert error.value.key == key


def test_squeeze_excitation_attends(composed) -> None:
    """Its gates are in (0, 1), differ between images, scale whole channels, and are learned."""
    model = build(composed().model, "model", **MNIST_SHAPE)
    se = model.blocks[1].attention
    features = torch.randn(8, 16, 7, 7, generator=torch.Generator().manual_seed(0)).abs()
    gates = se.gates(features)
    assert gates.shape == (8, 16)
    assert ((gates > 0) & (gates < 1)).all()
    assert gates.std(0).mean() > 1e-4, "equal gates for all images carry no information"
    torch.testing.assert_close(se(features), features * gates[:, :, None, None])
    se(features).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in se.parameters())
    assert build(composed("model=plain_cnn").model, "model", **MNIST_SHAPE).blocks[1].attention is None


@pytest.mark.parametrize("shape", [(6, 8, 28, 28), (5, 16, 14, 14), (3, 20, 7, 7), (1, 3, 2, 2)])
def test_fused_normalization_equals_torchs_own(shape: tuple[int, ...]) -> None:
    """Values, gradients and running statistics, for slopes of either sign, in double precision."""
    torch.manual_seed(0)
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plain = nn.BatchNorm2d(shape[1]).double()
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    fused = copy.deepcopy(plain)

    def gradients(output: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, [features, norm.weight, norm.bias], torch.ones_like(output).cumsum(-1))

    expected = F.leaky_relu(F.max_pool2d(plain(features), 2), 0.1)
    actual = norm_pool_activate(features, fused, 0.1)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, fused), gradients(expected, plain))
    torch.testing.assert_close(fused.state_dict(), plain.state_dict())


@pytest.mark.parametrize("offset", [0.0, 0.7, 2.0])
def test_fused_normalization_is_as_precise_as_torchs_own_in_bf16(offset: float) -> None:
    torch.manual_seed(0)
    exact = torch.randn(64, 8, 28, 28) + offset
    low = exact.bfloat16().to(memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(8)

    def error(function) -> tuple[float, float]:
        features = low.clone().requires_grad_()
        reference = low.double().requires_grad_()
        output, expected = function(features), F.leaky_relu(F.max_pool2d(copy.deepcopy(norm).double()(reference), 2), 0.1)
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        gradient = torch.autograd.grad(output, features, weights.bfloat16())[0]
        expected_gradient = torch.autograd.grad(expected, reference, weights.bfloat16().double())[0]
        # Where rounding makes two values of a window equal, the maximum may be either: compare sums over windows.
        difference = F.avg_pool2d(gradient.double() - expected_gradient, 2)
        return (
            ((output - expected).norm() / expected.norm()).item(),
            (difference.norm() / F.avg_pool2d(expected_gradient, 2).norm()).item(),
        )

    fused = error(lambda features: norm_pool_activate(features, copy.deepcopy(norm), 0.1))
    plain = error(lambda features: F.leaky_relu(F.max_pool2d(copy.deepcopy(norm)(features), 2), 0.1))
    assert fused[0] < 1.5 * plain[0]
    assert fused[1] < 2 * plain[1]


def test_a_constructor_may_load_weights() -> None:
    """Although it is called without memory first."""
    weights = nn.Linear(4, 2).state_dict()

    def make() -> nn.Module:
        model = nn.Linear(4, 2)
        model.load_state_dict(weights)
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create_model(make, seed=0)
    assert model.weight.equal(weights["weight"])


def test_a_nested_part_that_cannot_be_built_is_named() -> None:
    loss = {"_target_": "torch.nn.CrossEntropyLoss", "weight": {"_target_": "torch.tensor", "data": [1, "a"]}}
    with pytest.raises(UserError) as error:
        build(loss, "loss")
    assert error.value.key == "loss.weight"
