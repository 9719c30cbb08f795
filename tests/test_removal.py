"""Taking artifacts away: holes are filled from around, changes are undone, everything else stays."""

from __future__ import annotations

import torch
from torch import Tensor

from spray.isolation.artifact import Artifact
from spray.isolation.blended import Blended
from spray.isolation.removal import LARGEST_HOLE, elsewhere, filled, removed


def slopes(n: int = 3, side: int = 24) -> Tensor:
    """Images that rise evenly: biharmonic functions, which in-painting continues exactly."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    return torch.stack([torch.stack([0.2 + 0.5 * x, 0.1 + 0.3 * y + 0.1 * i, 0.4 * x + 0.4 * y]) for i in range(n)])


def square(side: int = 24) -> Tensor:
    mask = torch.zeros(side, side)
    mask[6:11, 8:13] = 1
    return mask


def test_a_hole_is_filled_from_around_it() -> None:
    images = slopes()
    marked = torch.where(square() > 0, 1.0, images)
    found = Artifact(square(), torch.ones(3, 24, 24), torch.zeros(1, 2, dtype=torch.int64), 0.5, 2, True)
    back = removed(found, marked, torch.zeros(3, 24, 24))
    assert (back - images).abs().max() < 0.03
    assert torch.equal(back[:, :, square() == 0], marked[:, :, square() == 0])


def test_it_is_removed_where_it_lies_in_each_image() -> None:
    images = slopes()
    marked = images.clone()
    marked[0, :, 7:12, 9:14] = 1
    marked[1, :, 5:10, 6:11] = 1
    found = Artifact(square(), torch.ones(3, 24, 24), torch.zeros(1, 2, dtype=torch.int64), 0.5, 2, True)
    assert (removed(found, marked, torch.zeros(3, 24, 24))[:2] - images[:2]).abs().max() < 0.05


def test_larger_images_are_filled_at_a_smaller_size() -> None:
    images = slopes(1, 160)
    mask = torch.zeros(1, 1, 160, 160)
    mask[:, :, 40:80, 50:80] = 1
    back = filled(torch.where(mask > 0, 0.0, images), mask, torch.zeros(3, 160, 160))
    assert (back - images).abs().max() < 0.06


def test_holes_too_large_show_what_is_typical() -> None:
    images, mask = slopes(), torch.zeros(3, 1, 24, 24)
    mask[0, :, : int(24 * LARGEST_HOLE) + 2] = 1
    typical = torch.full((3, 24, 24), 0.3)
    back = filled(images, mask, typical)
    torch.testing.assert_close(back, torch.where(mask > 0, typical, images))


def test_what_shines_through_is_brought_back() -> None:
    images, alpha = slopes(), 0.4 * square()
    color = torch.tensor([1.0, 0.2, 0.0])[:, None, None].expand(3, 24, 24)
    veil = Blended(
        alpha,
        color,
        torch.zeros(1, 2, dtype=torch.int64),
        1.0,
        1,
        True,
        torch.zeros(3, 24, 24),
        torch.zeros(1),
        0.0,
        0.0,
    )
    marked = images + alpha * (color - images)
    torch.testing.assert_close(removed(veil, marked, torch.zeros(3, 24, 24)), images, atol=1e-5, rtol=0)


def test_behind_something_drawn_the_image_is_continued_whatever_its_opacity_was_thought_to_be() -> None:
    images, alpha = slopes(), 0.4 * square()
    marked = torch.where(square() > 0, 1.0, images)
    parts = (alpha, torch.ones(3, 24, 24), torch.zeros(1, 2, dtype=torch.int64), 1.0, 1, True)
    drawn = Blended(*parts, torch.ones(3, 24, 24) * square(), torch.zeros(1), 0.0, 0.0)
    back = removed(drawn, marked, torch.zeros(3, 24, 24))
    assert (drawn.without(marked) - images).abs().max() > 0.5
    assert (back - images)[:, :, 7:10, 9:12].abs().max() < 0.1


def test_a_hole_elsewhere_is_as_large_and_lies_elsewhere() -> None:
    masks = square()[None, None].expand(20, -1, -1, -1)
    moved = elsewhere(masks, 0)
    assert torch.equal(moved.sum(dim=(1, 2, 3)), masks.sum(dim=(1, 2, 3)))
    assert (moved * masks).sum() == 0
    assert len({tuple(m.flatten().tolist()) for m in moved}) > 5
    assert torch.equal(elsewhere(masks, 0), moved)
