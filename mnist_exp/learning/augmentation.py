"""Augmentations of a whole batch on its device, with an independent draw for each image.

An augmentation takes images (n, channels, h, w) of any dtype and a CPU generator, its only source of randomness, and returns
float32 images in the same range of values.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from mnist_exp.errors import Fraction, Positive, UserError


class Unchanged:
    """Leave the images unchanged."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images as float32."""
        return images.float()


class Compose:
    """Apply several augmentations, one after the other.

    Args:
        parts: The augmentations by name, in order.
    """

    def __init__(self, parts: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]]) -> None:
        self.parts = parts

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images as float32, each transformed by all parts."""
        for augment in self.parts.values():
            images = augment(images, generator)
        return images


class RandomAffine:
    """Rotate, scale and shift each image about its center, with bilinear interpolation and black outside.

    Args:
        degrees: Largest rotation, 0 to 180; uniform within +- degrees.
        scale: Smallest and largest factor, both above 0; uniform between them.
        translate: Largest shift on each axis, as a fraction of the side, 0 to below 1; uniform within +- translate.

    Raises:
        UserError: The smallest factor of `scale` exceeds the largest.
    """

    def __init__(
        self, degrees: Annotated[float, Interval(ge=0, le=180)], scale: tuple[Positive, Positive], translate: Fraction
    ) -> None:
        if scale[0] > scale[1]:
            raise UserError.invalid("scale", scale, "[smallest, largest]")
        self.degrees = degrees
        self.scale = scale
        self.translate = translate

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` maps (count, 2, 3) float32 from output to input coordinates, in units of half the side."""
        angle, factor, shift_x, shift_y = torch.rand(4, count, generator=generator).mul_(2).sub_(1)  # each (count,), in [-1, 1)
        angle = angle * math.radians(self.degrees)
        smallest, largest = self.scale
        zoom = 1 / ((smallest + largest) / 2 + factor * (largest - smallest) / 2)
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        x, y = shift_x * 2 * self.translate, shift_y * 2 * self.translate
        # From output to input: undo the shift, then rotation and scale.
        rows = (cos, -sin, -(cos * x - sin * y), sin, cos, -(sin * x + cos * y))
        return torch.stack(rows, dim=1).view(count, 2, 3)  # (count, 6) -> (count, 2, 3)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images as float32, each transformed by its own map."""
        count, _, height, width = images.shape
        maps = self.draw(count, generator)
        if images.is_cuda:
            maps = maps.pin_memory()  # otherwise the copy would wait for the device
        maps = maps.to(images.device, non_blocking=True)[:, :, None, None, :]  # (n, 2, 3) -> (n, 2, 1, 1, 3)
        x = (torch.arange(width, device=images.device) * 2 + 1) / width - 1  # (w,)
        y = ((torch.arange(height, device=images.device) * 2 + 1) / height - 1)[:, None]  # (h, 1)
        # F.affine_grid computes the same as 512 tiny matrix products, ten times slower on a CPU.
        grid = torch.empty(count, height, width, 2, device=images.device)
        for axis in (0, 1):
            a, b, c = maps[:, axis].unbind(-1)  # each (n, 1, 1)
            torch.add(a * x + c, b * y, out=grid[..., axis])  # (n, 1, w) + (n, h, 1) -> (n, h, w)
        return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
