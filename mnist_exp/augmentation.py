"""Transforms of a whole batch on its device, with one independent draw per image.

An augmentation is called with (n, 1, h, w) images of any dtype and a CPU generator, and returns float32 images in the
same range. Randomness comes from the generator alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Unchanged:
    """Leave the images as they are."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images as float32."""
        return images.float()


class RandomAffine:
    """Rotate, scale and shift each image about its centre, black outside, bilinear between pixels.

    degrees: rotation, uniform in +-degrees; scale: (smallest, largest) factor, uniform between;
    translate: shift of the centre as a fraction of the side, uniform in +-translate on each axis.
    """

    def __init__(self, degrees: float, scale: tuple[float, float], translate: float) -> None:
        self.degrees = degrees
        self.scale = scale
        self.translate = translate

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` maps from output to input coordinates, (count, 2, 3) float32, in units of half the side."""
        angle, factor, shift_x, shift_y = torch.rand(4, count, generator=generator).mul_(2).sub_(1)  # each in [-1, 1)
        angle = angle * math.radians(self.degrees)
        smallest, largest = self.scale
        zoom = 1 / ((smallest + largest) / 2 + factor * (largest - smallest) / 2)
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        x, y = shift_x * 2 * self.translate, shift_y * 2 * self.translate
        # Output to input: undo the shift, then rotation and scale.
        rows = (cos, -sin, -(cos * x - sin * y), sin, cos, -(sin * x + cos * y))
        return torch.stack(rows, dim=1).view(count, 2, 3)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images, each through a map of its own, as float32."""
        count, _, height, width = images.shape
        maps = self.draw(count, generator)
        if images.is_cuda:
            maps = maps.pin_memory()  # without which the copy waits for the device
        maps = maps.to(images.device, non_blocking=True)[:, :, None, None, :]  # (n, 2, 1, 1, 3)
        x = (torch.arange(width, device=images.device) * 2 + 1) / width - 1
        y = ((torch.arange(height, device=images.device) * 2 + 1) / height - 1)[:, None]
        # F.affine_grid computes the same as 512 tiny matrix products, ten times slower on a CPU.
        grid = torch.empty(count, height, width, 2, device=images.device)
        for axis in (0, 1):
            a, b, c = maps[:, axis].unbind(-1)  # each (n, 1, 1)
            torch.add(a * x + c, b * y, out=grid[..., axis])  # (n, 1, w) + (n, h, 1)
        return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
