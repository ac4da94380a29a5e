import math

import pytest
import torch
import torch.nn.functional as F

from mnist_exp.augmentation import RandomAffine, Unchanged
from mnist_exp.data import generator
from mnist_exp.errors import UserError

LIGHT = RandomAffine(degrees=5, scale=(0.98, 1.02), translate=0.03)


def test_draws_stay_within_their_ranges_and_reach_them() -> None:
    maps = LIGHT.draw(20_000, generator("draws"))
    zoom = maps[:, 0, :2].norm(dim=1)  # (cos, -sin) * zoom
    angle = torch.atan2(maps[:, 1, 0], maps[:, 1, 1]).rad2deg()
    scale, shift = 1 / zoom, maps[:, :, 2] / 2  # shift as a fraction of the side
    for values, low, high in ((angle, -5, 5), (scale, 0.98, 1.02), (shift, -0.03, 0.03)):
        assert low - 1e-4 <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high + 1e-4
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))


def test_every_image_has_a_draw_of_its_own() -> None:
    image = torch.randint(0, 256, (1, 1, 28, 28), generator=generator("image"), dtype=torch.uint8)
    augmented = LIGHT(image.expand(100, -1, -1, -1), generator("draws"))
    assert len(augmented.flatten(1).unique(dim=0)) == 100


def test_equals_torchs_own_affine_grid() -> None:
    images = torch.rand(16, 1, 28, 28, generator=generator("images")) * 255
    maps = LIGHT.draw(16, generator("draws"))
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    expected = F.grid_sample(images, grid, align_corners=False)
    torch.testing.assert_close(LIGHT(images, generator("draws")), expected, atol=1e-2, rtol=1e-4)


def test_a_quarter_turn_turns_counterclockwise_or_clockwise_but_exactly() -> None:
    image = torch.rand(1, 1, 28, 28) * 255
    turn = RandomAffine(degrees=90, scale=(1, 1), translate=0)
    turn.draw = lambda count, generator: torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])  # type: ignore[method-assign]
    turned = turn(image, generator())
    assert min((turned - image.rot90(k, (2, 3))).abs().max() for k in (1, 3)) < 0.01
    assert math.isclose(turned.sum(), image.sum(), rel_tol=1e-4)


def test_the_generator_decides_everything() -> None:
    images = torch.rand(8, 1, 28, 28)
    assert LIGHT(images, generator(1)).equal(LIGHT(images, generator(1)))
    assert not LIGHT(images, generator(1)).equal(LIGHT(images, generator(2)))


def test_none_changes_nothing() -> None:
    images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)
    assert Unchanged()(images, generator()).equal(images.float())


@pytest.mark.parametrize("wrong", [{"degrees": -1}, {"scale": (1.1, 0.9)}, {"scale": (0, 1)}, {"translate": 1}])
def test_a_range_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"augmentation.{next(iter(wrong))}="):
        RandomAffine(**{"degrees": 5, "scale": (0.98, 1.02), "translate": 0.03} | wrong)  # type: ignore[arg-type]
