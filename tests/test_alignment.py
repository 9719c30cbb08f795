"""Template matching against loops, shifts against np.roll, congealing against a jitter that is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spray.isolation.alignment import congeal, match, shifted


def images(n: int, seed: int = 0, shape: tuple[int, int, int] = (3, 12, 10)) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((n, *shape))).float()


def slow_match(image: np.ndarray, template: np.ndarray, mask: np.ndarray, radius: int) -> dict[tuple[int, int], float]:
    channels, height, width = image.shape
    out = {}
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            total = 0.0
            for y in range(height):
                for x in range(width):
                    row, column = min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)
                    for c in range(channels):
                        total += mask[y, x] * (image[c, row, column] - template[c, y, x]) ** 2
            out[dy, dx] = total / mask.sum()
    return out


@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("kind", ["binary", "soft", "border"])
def test_match_equals_loops(radius: int, kind: str) -> None:
    pictures, template = images(3, shape=(2, 7, 6)), images(1, 9, (2, 7, 6))[0]
    mask = torch.zeros(7, 6)
    if kind == "soft":
        mask = images(1, 4, (1, 7, 6))[0, 0]
    elif kind == "binary":
        mask[2:5, 1:4] = 1
    else:
        mask[0, :] = mask[:, -1] = 1
    distance, shift = match(pictures, template, mask, radius)
    for i in range(3):
        all_distances = slow_match(
            pictures[i].double().numpy(), template.double().numpy(), mask.double().numpy(), radius
        )
        best = min(all_distances, key=lambda key: all_distances[key])
        assert tuple(shift[i].tolist()) == best
        assert float(distance[i]) == pytest.approx(all_distances[best], abs=1e-5)


def test_match_finds_content_that_was_moved() -> None:
    template = images(1)[0]
    mask = torch.zeros(12, 10)
    mask[4:8, 3:7] = 1
    for dy, dx in [(0, 0), (2, -1), (-2, 2), (1, 0)]:
        moved = torch.roll(template, (dy, dx), dims=(1, 2))[None]
        distance, shift = match(moved, template, mask, 2)
        assert shift.tolist() == [[dy, dx]]
        assert float(distance) < 1e-5


def test_match_without_content_stays_where_it_is() -> None:
    distance, shift = match(torch.full((2, 3, 8, 8), 0.5), torch.full((3, 8, 8), 0.25), torch.ones(8, 8), 3)
    assert shift.tolist() == [[0, 0], [0, 0]]
    torch.testing.assert_close(distance, torch.full((2,), 3 * 0.25**2), atol=1e-5, rtol=0)


def test_match_of_grey_and_colour_and_of_any_channel_count() -> None:
    for channels in (1, 4):
        pictures = images(2, shape=(channels, 9, 9))
        distance, shift = match(pictures, pictures[0], torch.ones(9, 9), 2)
        assert shift[0].tolist() == [0, 0]
        assert float(distance[0]) < 1e-5 < float(distance[1])


def test_shifted_is_a_roll_inside_and_continues_the_border() -> None:
    pictures = images(5)
    shift = torch.tensor([[0, 0], [2, 1], [-2, 2], [1, -2], [-1, -1]])
    moved = shifted(pictures, shift, 2)
    for i, (dy, dx) in enumerate(shift.tolist()):
        rolled = np.roll(pictures[i].numpy(), (-dy, -dx), axis=(1, 2))
        np.testing.assert_array_equal(moved[i, :, 2:-2, 2:-2].numpy(), rolled[:, 2:-2, 2:-2])
        rows = (np.arange(12) + dy).clip(0, 11)
        columns = (np.arange(10) + dx).clip(0, 9)
        np.testing.assert_array_equal(moved[i].numpy(), pictures[i].numpy()[:, rows][:, :, columns])


def test_shifted_by_what_match_found_brings_the_content_back() -> None:
    template = images(1, 3)[0]
    mask = torch.zeros(12, 10)
    mask[4:8, 3:7] = 1
    moved = torch.roll(template, (2, -1), dims=(1, 2))[None]
    _, shift = match(moved, template, mask, 2)
    inside = mask.bool()
    np.testing.assert_array_equal(shifted(moved, shift, 2)[0][:, inside].numpy(), template[:, inside].numpy())


@pytest.mark.parametrize("seed", range(4))
def test_congeal_recovers_a_known_jitter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, patch = 30, torch.from_numpy(rng.random((3, 5, 5))).float()
    pictures = images(n, seed + 100, (3, 24, 24))
    jitter = torch.from_numpy(rng.integers(-2, 3, size=(n, 2)))
    for picture, (dy, dx) in zip(pictures, jitter.tolist(), strict=True):
        picture[:, 9 + dy : 14 + dy, 9 + dx : 14 + dx] = patch
    mask = torch.zeros(24, 24)
    mask[6:17, 6:17] = 1
    template, shift = congeal(pictures, mask, 3)
    assert shift.median(dim=0).values.tolist() == [0, 0]
    origin = jitter.median(dim=0).values
    assert torch.equal(shift, jitter - origin)
    top, left = (9 + origin).tolist()
    torch.testing.assert_close(template[:, top : top + 5, left : left + 5], patch)


def test_congeal_of_images_already_aligned_moves_nothing() -> None:
    pictures = images(1, 2).expand(6, -1, -1, -1) + 0.01 * images(6, 3)
    template, shift = congeal(pictures, torch.ones(12, 10), 2)
    assert not shift.any()
    torch.testing.assert_close(template, pictures.median(dim=0).values)


def test_congeal_keeps_shifts_in_the_radius_and_takes_one_image() -> None:
    _, shift = congeal(images(20), torch.ones(12, 10), 1, rounds=2)
    assert shift.abs().max() <= 1
    one = images(1)
    template, shift = congeal(one, torch.ones(12, 10), 2)
    assert shift.tolist() == [[0, 0]]
    torch.testing.assert_close(template, one[0])


def test_nothing_is_changed_in_place() -> None:
    pictures, mask = images(8), torch.ones(12, 10)
    before = pictures.clone()
    congeal(pictures, mask, 2)
    match(pictures, pictures[0], mask, 2)
    assert torch.equal(pictures, before)
    assert torch.equal(mask, torch.ones(12, 10))
