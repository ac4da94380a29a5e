import pytest
import torch
import torch.nn.functional as F

from mnist_exp.errors import UserError
from mnist_exp.learning.augmentation import RandomAffine, Unchanged
from mnist_exp.learning.data import generator

LIGHT = RandomAffine(degrees=5, scale=(0.98, 1.02), translate=0.03)


def test_draws_stay_within_their_ranges_and_reach_them() -> None:
    """The inverse of the maps, which run from output to input, shows how points of the image move."""
    strong = RandomAffine(degrees=15, scale=(0.85, 1.15), translate=0.1)
    for augmentation in (LIGHT, strong):
        maps = augmentation.draw(20_000, generator("draws"))
        forward = torch.linalg.inv(torch.cat([maps, torch.tensor([0.0, 0.0, 1.0]).expand(len(maps), 1, 3)], dim=1))
        scale = forward[:, :2, 0].norm(dim=1)
        angle = torch.atan2(forward[:, 1, 0], forward[:, 0, 0]).rad2deg()
        shift = forward[:, :2, 2] / 2  # of the center, as a fraction of the side
        limits = (augmentation.degrees, augmentation.translate)
        for values, low, high in ((angle, -limits[0], limits[0]), (scale, *augmentation.scale), (shift, -limits[1], limits[1])):
            assert low - 1e-4 <= values.min() < low + 0.01 * (high - low)
            assert high - 0.01 * (high - low) < values.max() <= high + 1e-4
            assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


def test_every_image_has_its_own_draw() -> None:
    image = torch.randint(0, 256, (1, 1, 28, 28), generator=generator("image"), dtype=torch.uint8)
    augmented = LIGHT(image.expand(100, -1, -1, -1), generator("draws"))
    assert len(augmented.flatten(1).unique(dim=0)) == 100


def test_equals_torchs_own_affine_grid() -> None:
    images = torch.rand(16, 1, 28, 28, generator=generator("images")) * 255
    maps = LIGHT.draw(16, generator("draws"))
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    expected = F.grid_sample(images, grid, align_corners=False)
    torch.testing.assert_close(LIGHT(images, generator("draws")), expected, atol=1e-2, rtol=1e-4)


def test_a_pixel_lands_where_its_map_says() -> None:
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 14, 14] = 255  # half a pixel below and right of the center
    for seed in range(20):
        augmentation = RandomAffine(degrees=0, scale=(1, 1), translate=0.3)
        dx, dy = -augmentation.draw(1, generator(seed))[0, :, 2] * 14  # in pixels
        moved = augmentation(image, generator(seed))[0, 0]
        rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
        center = (columns * moved).sum() / moved.sum(), (rows * moved).sum() / moved.sum()
        assert [float(axis) for axis in center] == pytest.approx([float(14 + dx), float(14 + dy)], abs=0.01)


def test_the_generator_decides_everything() -> None:
    images = torch.rand(8, 1, 28, 28)
    assert LIGHT(images, generator(1)).equal(LIGHT(images, generator(1)))
    assert not LIGHT(images, generator(1)).equal(LIGHT(images, generator(2)))


def test_a_range_in_the_wrong_order_is_named() -> None:
    with pytest.raises(UserError) as error:
        RandomAffine(degrees=0, scale=(1.1, 0.9), translate=0)
    assert error.value.key == "scale"


def test_none_changes_nothing() -> None:
    images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
    assert Unchanged()(images, generator()).equal(images.float())
