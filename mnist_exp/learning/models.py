"""The network: three convolutional blocks, squeeze-excitation in the second, a hidden layer, one logit a class."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_exp.errors import Count, Fraction, ParameterLimit, UserError
from mnist_exp.learning.data import derive_seed
from mnist_exp.learning.fused import norm_pool_activate

NEGATIVE_SLOPE = 0.1


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from the means of all channels: (n, c, h, w) -> (n, c, h, w).

    Source: Hu et al., Squeeze-and-Excitation Networks, 2018, equations 2 to 4.
    """

    def __init__(self, channels: int, reduction: Count) -> None:
        super().__init__()
        if reduction > channels:
            raise UserError.invalid("reduction", reduction, f"an integer from 1 to {channels}, the number of channels")
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def gates(self, features: Tensor) -> Tensor:
        """Return the gates of `features`: (n, c, h, w) -> (n, c)."""
        return torch.sigmoid(self.excite(F.relu(self.squeeze(features.mean((2, 3))))))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.gates(features)[:, :, None, None]  # (n, c, h, w) * (n, c, 1, 1)


class StaticGate(nn.Module):
    """Scale each channel by a learned gate in (0, 1), the same for every image: (n, c, h, w) -> (n, c, h, w).

    The control for `SqueezeExcite`, whose gates depend on the image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(channels))

    def forward(self, features: Tensor) -> Tensor:
        return features * torch.sigmoid(self.logits)[:, None, None]  # (n, c, h, w) * (c, 1, 1)


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
        if self.norm.training and features.device.type == "cpu":
            features = norm_pool_activate(features, self.norm, NEGATIVE_SLOPE)  # (n, out, h // 2, w // 2)
        else:
            # The activation is monotonic, so pooling first gives the same values for a quarter of the work.
            features = F.leaky_relu(F.max_pool2d(self.norm(features), 2), NEGATIVE_SLOPE)  # (n, out, h // 2, w // 2)
        return features if self.attention is None else self.attention(features)


class CNN(nn.Module):
    """Map images (n, in_channels, side, side) with values from 0 to 255, of any dtype, to logits (n, classes).

    Args:
        channels: Channels of the three blocks.
        depths: Convolutions in each block.
        kernel_sizes: Kernel size in each block, odd.
        separable: Whether the convolutions of the second and third block are depthwise separable.
        conv_bias: Whether the convolutions have a bias.
        mean_pool: Whether to average the last features over all pixels.
        hidden_features: Size of the hidden layer, or None for no hidden layer.
        dropout: Probability of dropout before the last layer.
        classes: Number of classes.
        side: Height and width of the images, at least 8.
        in_channels: Channels of the images.
        se: Returns the second block's attention from its number of channels; None for no attention.
        parameter_limit: Largest number of parameters, None for no limit.

    Raises:
        UserError: A kernel size is even, the images are too small, `se` rejects its arguments, or there are too many parameters.
    """

    def __init__(
        self,
        channels: tuple[Count, Count, Count],
        depths: tuple[Count, Count, Count],
        kernel_sizes: tuple[Count, Count, Count],
        separable: bool,
        conv_bias: bool,
        mean_pool: bool,
        hidden_features: Count | None,
        dropout: Fraction,
        classes: int,
        side: int,
        in_channels: int,
        se: Callable[[int], nn.Module] | None = None,
        parameter_limit: ParameterLimit = None,
    ) -> None:
        super().__init__()
        if not all(size % 2 for size in kernel_sizes):
            raise UserError.invalid("kernel_sizes", kernel_sizes, "three odd integers")
        if side < 8:
            raise UserError.invalid("side", side, "images of at least 8 x 8 pixels, which three blocks can halve")
        try:
            attention = se(channels[1]) if se else None
        except UserError as error:
            raise UserError.invalid(f"se.{error.key}", error.value, error.expected) from error
        self.blocks = nn.Sequential()
        inputs = in_channels
        for block, (outputs, depth, kernel_size) in enumerate(zip(channels, depths, kernel_sizes, strict=True)):
            # On a single channel, such as that of the images, a separable convolution could only learn one pattern, scaled.
            is_separable = separable and block > 0
            block_attention = attention if block == 1 else None
            self.blocks.append(ConvBlock(inputs, outputs, depth, kernel_size, conv_bias, is_separable, block_attention))
            inputs = outputs
        self.pool = nn.AdaptiveAvgPool2d(1) if mean_pool else nn.Identity()
        features = channels[2] * (1 if mean_pool else (side // 8) ** 2)  # each block halves the side
        self.hidden = nn.Linear(features, hidden_features) if hidden_features else None
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_features or features, classes)
        count = count_parameters(self)
        if parameter_limit is not None and count > parameter_limit:
            raise UserError.invalid(
                "parameter_limit",
                parameter_limit,
                f"at least {count:,}, the number of parameters of the model",
                "Lower model.channels or other sizes, or lift the limit with model.parameter_limit=null.",
            )

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(images.float() / 255)  # (n, in_channels, side, side) -> (n, c, side // 8, side // 8)
        features = self.pool(features).flatten(1)  # (n, c * (side // 8) ** 2), or (n, c) with mean_pool
        if self.hidden is not None:
            features = F.leaky_relu(self.hidden(features), NEGATIVE_SLOPE)  # (n, hidden_features)
        logits: Tensor = self.output(self.dropout(features))  # (n, classes)
        return logits


@contextmanager
def without_values() -> Iterator[None]:
    """Make models in the block without values, which take no memory."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter", UserWarning)  # a constructor loads weights
        yield


def create_model(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a model with initial weights that depend on the seed alone."""
    with without_values():
        make()  # raises its errors, such as for too many parameters, before memory is allocated
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "weights"))
        return make()


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
