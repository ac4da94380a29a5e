"""Batch norm, 2x2 max pool and leaky ReLU as one differentiable function, for training on a CPU.

Torch's batch norm is slow with few channels, because its vectors run over the channels of one pixel, and it normalizes four
values of which the pool drops three. This version reads several pixels as one wide pixel and normalizes only the values that
the pool keeps: an affine map per channel commutes with the maximum, or with the minimum where its slope is negative. On two
cores this takes about 40 % of the time in the first block, and two thirds in the whole training.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FOLD = 4  # pixels per wide pixel: 4 x 8 channels fill a vector register


def norm_pool_activate(features: Tensor, norm: nn.BatchNorm2d, negative_slope: float) -> Tensor:
    """Compute leaky_relu(max_pool2d(norm(features), 2)) in training mode, and update the running statistics of `norm`.

    Args:
        features: (n, c, h, w), channels last.
        norm: A batch norm of c channels with a momentum.
        negative_slope: Slope of the leaky ReLU for negative values, above 0.

    Returns:
        (n, c, h // 2, w // 2), in the dtype of `features`.

    Source: Ioffe and Szegedy, Batch Normalization, 2015, algorithm 1 and the derivatives below it.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    output: Tensor
    output, mean, variance = _NormPoolActivate.apply(features, norm.weight, norm.bias, norm.eps, negative_slope)
    with torch.no_grad():
        count = features.numel() // features.shape[1]
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / max(1, count - 1)), norm.momentum)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
    return output


class _NormPoolActivate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, eps: float, negative_slope: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        features = features.contiguous(memory_format=torch.channels_last)
        mean, variance = _statistics(features)
        inverse = (variance + eps).rsqrt()
        slope = weight * inverse  # of the affine map that normalizes
        sign = torch.where(slope < 0, -1.0, 1.0)
        flips = bool((sign < 0).any())
        signed = _per_channel(features, sign) if flips else features
        pooled, indices = F.max_pool2d(signed, 2, return_indices=True)  # (n, c, h, w) -> (n, c, h // 2, w // 2)
        kept = _per_channel(pooled, sign) if flips else pooled  # the values of `features` that the pool keeps
        output = F.leaky_relu(_per_channel(kept, slope, bias - mean * slope), negative_slope)
        ctx.save_for_backward(features, kept, output, indices, mean, inverse, slope)
        ctx.negative_slope = negative_slope
        ctx.mark_non_differentiable(mean, variance)
        return output, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        features, kept, output, indices, mean, inverse, slope = ctx.saved_tensors
        # Torch offers the derivatives of its own functions only as operators of `torch.ops.aten`, which is not a stable API.
        # `test_fused_normalization_equals_torchs_own` fails if they change.
        grad = torch.ops.aten.leaky_relu_backward(grad_output, output, ctx.negative_slope, True)
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_bias = _channel_sum(grad)
        grad_weight = (_channel_sum(grad * kept) - mean * grad_bias) * inverse
        # With x = normalized features: d features = slope * (d x - mean(d x) - x * mean(d x * x)). Only the kept values have
        # a d x, but the means run over all values, so both mean terms are added as one affine map of `features`.
        scattered = torch.ops.aten.max_pool2d_with_indices_backward(
            _per_channel(grad, slope), features, [2, 2], [2, 2], [0, 0], [1, 1], False, indices
        )  # (n, c, h // 2, w // 2) -> (n, c, h, w)
        count = features.numel() // features.shape[1]
        a = -slope * inverse * grad_weight / count
        b = -slope * grad_bias / count - a * mean
        grad_features = scattered.add_(_per_channel(features, a, b))
        return grad_features, grad_weight, grad_bias, None, None


def _wide(tensor: Tensor) -> Tensor:
    """View a channels-last (n, c, h, w) tensor as (pixels / fold, fold * c)."""
    pixels = tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1])  # (n * h * w, c)
    fold = math.gcd(len(pixels), FOLD)
    return pixels.view(len(pixels) // fold, -1)


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (c,) and biased variance (c,) of each channel, at least in float32."""
    wide = _wide(features)
    # These running statistics are discarded: their dtype decides the precision in which torch accumulates.
    running = torch.zeros(2, wide.shape[1], dtype=torch.promote_types(features.dtype, torch.float32))
    means, variances = torch.batch_norm_update_stats(wide, running[0], running[1], 0.0)
    means, variances = means.view(-1, features.shape[1]), variances.view(-1, features.shape[1])  # each (fold, c)
    mean = means.mean(0)
    return mean, (variances + (means - mean) ** 2).mean(0)


def _channel_sum(tensor: Tensor) -> Tensor:
    """Return the sum (c,) of each channel of a channels-last tensor."""
    return _wide(tensor).sum(0, dtype=torch.promote_types(tensor.dtype, torch.float32)).view(-1, tensor.shape[1]).sum(0)


def _per_channel(tensor: Tensor, slope: Tensor, intercept: Tensor | None = None) -> Tensor:
    """Return slope * tensor + intercept, each (c,), in the tensor's dtype and layout, rounded once."""
    wide = _wide(tensor)
    times = wide.shape[1] // tensor.shape[1]
    slope = slope.to(torch.promote_types(tensor.dtype, torch.float32)).repeat(times)  # (c,) -> (fold * c,)
    intercept = torch.zeros_like(slope) if intercept is None else intercept.repeat(times)
    # Batch norm in evaluation mode is this map. It combines float32 statistics with bf16 values without a float32 copy.
    result = torch.batch_norm(wide, slope, intercept, torch.zeros_like(slope), torch.ones_like(slope), False, 0.0, 0.0, False)
    n, c, h, w = tensor.shape
    return result.view(n, h, w, c).permute(0, 3, 1, 2)  # (n, c, h, w), channels last
