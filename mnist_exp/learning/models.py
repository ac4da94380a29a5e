"""The network: three convolutional blocks, squeeze-excitation in the second, a hidden layer, ten logits."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_exp.errors import UserError
from mnist_exp.learning.data import CLASSES
from mnist_exp.learning.fused import norm_pool_activate

PARAMETER_LIMIT = 25_000
NEGATIVE_SLOPE = 0.1


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from the means of all channels: (n, c, h, w) -> (n, c, h, w).

    Source: Hu et al., Squeeze-and-Excitation Networks, 2018, equations 2 to 4.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        if not 1 <= reduction <= channels:
            raise UserError(f"model.se.reduction={reduction} is invalid: expected 1 to {channels}, the number of channels.")
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def gates(self, features: Tensor) -> Tensor:
        """Return the gates of `features`: (n, c, h, w) -> (n, c)."""
        return torch.sigmoid(self.excite(F.relu(self.squeeze(features.mean((2, 3))))))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.gates(features)[:, :, None, None]  # (n, c, h, w) * (n, c, 1, 1)


def convolution(in_channels: int, out_channels: int, kernel_size: int, bias: bool, separable: bool) -> nn.Module:
    """Return a convolution that keeps height and width: (n, in, h, w) -> (n, out, h, w).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel, odd.
        bias: Whether the output channels have a bias.
        separable: Convolve each channel on its own, then mix the channels of each pixel, with a fraction of the parameters.

    Source: Chollet, Xception: Deep Learning with Depthwise Separable Convolutions, 2017, section 2.
    """
    padding = kernel_size // 2
    if not separable:
        return nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=bias)
    depthwise = nn.Conv2d(in_channels, in_channels, kernel_size, padding=padding, groups=in_channels, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(in_channels, out_channels, 1, bias=bias))


class ConvBlock(nn.Module):
    """Convolution, batch norm, 2x2 max pool, leaky ReLU, optional attention: (n, in, h, w) -> (n, out, h // 2, w // 2).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        depth: Number of convolutions; those before the last are normalized and activated at full size.
        kernel_size: Height and width of the kernels, odd.
        bias: Whether the convolutions have a bias.
        separable: Whether the convolutions are depthwise separable.
        attention: Applied to the output, or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        depth: int,
        kernel_size: int,
        bias: bool,
        separable: bool,
        attention: nn.Module | None,
    ) -> None:
        super().__init__()
        inputs = [in_channels, *[out_channels] * (depth - 1)]
        *before, self.conv = [convolution(i, out_channels, kernel_size, bias, separable) for i in inputs]
        layers = [nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.LeakyReLU(NEGATIVE_SLOPE)) for conv in before]
        self.before = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(out_channels)
        self.attention = attention

    def forward(self, features: Tensor) -> Tensor:
        features = self.conv(self.before(features))  # (n, in, h, w) -> (n, out, h, w)
        if self.training and features.device.type == "cpu":
            features = norm_pool_activate(features, self.norm, NEGATIVE_SLOPE)  # (n, out, h // 2, w // 2)
        else:
            # The activation is monotonic, so pooling first gives the same values for a quarter of the work.
            features = F.leaky_relu(F.max_pool2d(self.norm(features), 2), NEGATIVE_SLOPE)  # (n, out, h // 2, w // 2)
        return features if self.attention is None else self.attention(features)


class CNN(nn.Module):
    """Map images (n, 1, 28, 28) of gray values 0 to 255, of any dtype, to logits (n, 10).

    Args:
        channels: Channels of the three blocks.
        depths: Convolutions in each block, at least 1.
        kernel_sizes: Kernel size in each block, odd.
        separable: Whether the convolutions of the second and third block are depthwise separable.
        conv_bias: Whether the convolutions have a bias.
        mean_pool: Whether to average the last features over all pixels.
        hidden_features: Size of the hidden layer, or None for no hidden layer.
        dropout: Probability of dropout before the last layer.
        se: Returns the second block's attention from its number of channels; None for no attention.
    """

    def __init__(
        self,
        channels: Sequence[int],
        depths: Sequence[int],
        kernel_sizes: Sequence[int],
        separable: bool,
        conv_bias: bool,
        mean_pool: bool,
        hidden_features: int | None,
        dropout: float,
        se: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        inputs, attentions = (1, *channels[:2]), (None, se(channels[1]) if se else None, None)
        parts = zip(inputs, channels, depths, kernel_sizes, attentions, strict=True)
        self.blocks = nn.Sequential(
            # On a single input channel, a separable convolution could only learn one pattern, scaled.
            *[ConvBlock(i, o, depth, size, conv_bias, separable and i > 1, a) for i, o, depth, size, a in parts]
        )
        self.pool = nn.AdaptiveAvgPool2d(1) if mean_pool else nn.Identity()
        features = channels[2] * (1 if mean_pool else 3 * 3)
        self.hidden = nn.Linear(features, hidden_features) if hidden_features else None
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_features or features, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(images.float() / 255)  # (n, 1, 28, 28) -> (n, c, 3, 3)
        features = self.pool(features).flatten(1)  # (n, c * 3 * 3), or (n, c) with mean_pool
        if self.hidden is not None:
            features = F.leaky_relu(self.hidden(features), NEGATIVE_SLOPE)  # (n, hidden_features)
        logits: Tensor = self.output(self.dropout(features))  # (n, 10)
        return logits


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters; raises UserError above PARAMETER_LIMIT."""
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if count > PARAMETER_LIMIT:
        raise UserError(
            f"The model has {count:,} parameters: at most {PARAMETER_LIMIT:,} are allowed. "
            "Lower model.channels or model.hidden_features."
        )
    return count
