"""Isolation on images whose artifact is known: where it is, what it shows and who carries it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spray.data.planting import Plant
from spray.isolation import candidate
from spray.isolation.candidate import Artifact, isolate, otsu, relevance_gain, scores

CASES = {
    "tag": {"kind": "tag", "size": 6, "jitter": 2},
    "small tag": {"kind": "tag", "size": 5, "jitter": 1, "place": "bottom_right"},
    "box": {"kind": "box", "size": 6, "jitter": 2, "place": "top_right"},
    "centre": {"kind": "tag", "size": 8, "jitter": 2, "place": "center"},
    "frame": {"kind": "frame", "size": 3, "jitter": 0},
    "thin frame": {"kind": "frame", "size": 1, "jitter": 0},
}


def scenes(n: int, seed: int, shape: tuple[int, int, int] = (3, 32, 32)) -> Tensor:
    """Smooth random pictures: coarse blobs with finer ones on them."""
    rng = np.random.default_rng(seed)
    coarse, fine = (torch.from_numpy(rng.random((n, shape[0], side, side))).float() for side in (4, 16))
    return sum(
        weight * nn.functional.interpolate(part, size=shape[1:], mode="bilinear")
        for weight, part in ((0.5, coarse), (0.5, fine))
    )


def heatmaps(n: int, seed: int, opacity: Tensor | float = 0.0, size: tuple[int, int] = (32, 32)) -> Tensor:
    noise = np.random.default_rng(seed).normal(0.05, 0.1, size=(n, *size))
    return torch.from_numpy(noise).float() + opacity


class World:
    """A cluster that carries a planted artifact, and the rest of its class."""

    def __init__(self, case: str, seed: int = 0, shape: tuple[int, int, int] = (3, 32, 32), scale: int = 1) -> None:
        options = {"class": 0} | CASES[case]
        options |= {key: scale * options[key] for key in ("size", "jitter")}
        self.plant = Plant.from_config(options, ("a", "b"), shape)
        self.other = scenes(90, seed, shape)
        self.images, self.opacity = self.plant.mark(scenes(40, seed + 1, shape), [f"{seed}:{i}" for i in range(40)])
        self.artifact = isolate(
            self.images,
            heatmaps(40, seed, self.opacity, shape[1:]),
            self.other,
            heatmaps(90, seed + 1, size=shape[1:]),
        )


@pytest.fixture(scope="module", params=CASES)
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


def iou(found: Tensor, truth: Tensor) -> Tensor:
    found, truth = found > 0.5, truth > 0.5
    return (found & truth).flatten(1).sum(1) / (found | truth).flatten(1).sum(1)


def test_finds_the_place_in_every_image(world: World) -> None:
    assert world.artifact.constant
    overlap = iou(world.artifact.found(world.images)[:, 0], world.opacity)
    assert overlap.mean() >= 0.9
    assert overlap.min() >= 0.75


def test_what_has_hard_edges_keeps_them(world: World) -> None:
    assert set(world.artifact.mask.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("width", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("carrying", [1.0, 0.9])
def test_soft_edges_are_as_soft_as_they_are(width: float, carrying: float) -> None:
    y, x = np.mgrid[:32, :32]
    true = torch.from_numpy(1 / (1 + np.exp((np.hypot(y - 8.3, x - 22.6) - 4.5) / width))).float()
    color = torch.tensor([1.0, 0.8, 0.1])[:, None, None]
    clean, other = scenes(60, 1), scenes(90, 0)
    images = clean + true * (color - clean)
    images[round(60 * carrying) :] = clean[round(60 * carrying) :]
    artifact = isolate(images, heatmaps(60, 0, true), other, heatmaps(90, 1))
    assert artifact is not None
    assert artifact.constant
    soft = (true > 0.35) & (true < 0.65)
    assert ((artifact.mask > 0) & (artifact.mask < 1)).sum() >= soft.sum() / 2
    assert (artifact.mask - true)[soft].abs().mean() < 0.2
    hard = replace(artifact, mask=(artifact.mask > 0.5).float())
    assert (artifact.mask - true).abs().sum() < 0.85 * (hard.mask - true).abs().sum()
    assert (artifact.pattern - color)[:, artifact.mask > 0.5].abs().mean() < 0.1
    # Added, it looks more as in the images that have it than with a hard edge.
    n, draws = round(60 * carrying), np.arange(60)
    around = (true > 0.1) & (true < 0.9)
    errors = [(each.insert(clean, draws) - images)[:n, :, around].abs().mean() for each in (artifact, hard)]
    assert errors[0] < 0.75 * errors[1]
    assert artifact.score(images[:n]).min() > artifact.score(other).max() + 0.3


@pytest.mark.parametrize("carrying", [1.0, 0.85])
def test_a_line_around_it_is_no_soft_edge(carrying: float) -> None:
    color, mask = torch.zeros(3, 32, 32), torch.zeros(32, 32)
    color[:, 4:12, 18:26], mask[4:12, 18:26] = 0.2, 1
    color[:, 5:11, 19:25] = torch.tensor([1.0, 0.8, 0.1])[:, None, None]
    # On an even ground, of which only some of the others have anything else.
    clean, other = (torch.where(torch.rand(n, 1, 1, 1, generator=torch.Generator().manual_seed(n)) < 0.3, part, 0.7)
                    for n, part in ((60, scenes(60, 1)), (90, scenes(90, 0))))  # fmt: skip
    images = clean + mask * (color - clean)
    images[round(60 * carrying) :] = clean[round(60 * carrying) :]
    artifact = isolate(images, heatmaps(60, 0, mask), other, heatmaps(90, 1))
    assert artifact is not None
    torch.testing.assert_close(artifact.mask, mask)
    torch.testing.assert_close(artifact.pattern[:, mask > 0], color[:, mask > 0])


def test_finds_the_content(world: World) -> None:
    artifact = world.artifact
    content, opacity = world.plant.mark(torch.zeros(1, 3, 32, 32), ["0:0"])
    # Where the pattern lies as it does in the first image.
    _, shift = artifact._match(world.images[:1])
    pattern = candidate.shifted(artifact.pattern[None], -shift, artifact.radius)[0]
    inside = (opacity[0] > 0.5) & (artifact.found(world.images[:1])[0, 0] > 0.5)
    assert (pattern - content[0])[:, inside].abs().mean() < 0.01


def test_scores_tell_who_carries_it(world: World) -> None:
    fresh, _ = world.plant.mark(scenes(30, 77), [f"fresh:{i}" for i in range(30)])
    carriers, clean = torch.cat([world.images, fresh]), torch.cat([world.other, scenes(60, 78)])
    with_it, without = world.artifact.score(carriers), world.artifact.score(clean)
    assert with_it.min() > 0.9
    assert with_it.max() <= 1
    assert without.max() < with_it.min() - 0.1
    assert without[:90].median() == pytest.approx(0, abs=0.01)


def test_inserted_it_looks_like_the_planted_one(world: World) -> None:
    clean, draws = scenes(40, 55), np.arange(40)
    marked = world.artifact.insert(clean, draws)
    assert world.artifact.score(marked).min() > 0.95
    mask, _ = world.artifact.placed(draws)
    changed = (marked != clean).any(dim=1)
    assert not changed[mask[:, 0] == 0].any()
    # The draws are the cluster's own shifts: image i gets it where training image i has it.
    assert iou(mask[:, 0], world.opacity).mean() >= 0.9


def test_of_each_seed_it_is_found_again() -> None:
    for seed in (10, 20, 30):
        world = World("tag", seed)
        assert world.artifact.constant
        assert iou(world.artifact.found(world.images)[:, 0], world.opacity).mean() >= 0.9


@pytest.mark.parametrize(("shape", "scale"), [((1, 28, 28), 1), ((3, 40, 24), 1), ((3, 96, 96), 3)])
def test_other_shapes_and_images_that_are_matched_small(shape: tuple[int, int, int], scale: int) -> None:
    world = World("tag", 3, shape, scale)
    assert world.artifact.mask.shape == shape[1:]
    assert world.artifact.pattern.shape == shape
    overlap = iou(world.artifact.found(world.images)[:, 0], world.opacity)
    assert overlap.mean() >= (0.9 if scale == 1 else 0.7)
    assert world.artifact.score(world.images).min() > world.artifact.score(world.other).max()


@pytest.mark.parametrize("seed", range(6))
def test_a_cluster_without_structure_shares_no_content(seed: int) -> None:
    found = isolate(scenes(40, seed), heatmaps(40, seed), scenes(90, seed + 50), heatmaps(90, seed + 50))
    assert found is None or not found.constant


@pytest.mark.parametrize("seed", range(3))
def test_a_common_place_without_common_content_is_not_constant(seed: int) -> None:
    opacity = torch.zeros(32, 32)
    opacity[4:12, 4:12] = 1
    found = isolate(scenes(40, seed), heatmaps(40, seed, opacity), scenes(90, seed + 50), heatmaps(90, seed + 50))
    assert found is not None
    assert not found.constant
    assert iou(found.mask[None], opacity[None]) > 0.6


def test_nothing_to_isolate_without_a_gain_of_relevance() -> None:
    images, same = scenes(10, 0), torch.ones(10, 32, 32)
    assert isolate(images, same, images, same) is None
    assert isolate(images, 0 * same, images, 0 * same) is None
    assert isolate(images, -same, images, same) is None


def test_the_same_twice_and_inputs_untouched() -> None:
    first, second = World("tag"), World("tag")
    for name in ("mask", "pattern", "shifts", "scale", "radius", "constant"):
        assert torch.equal(
            torch.as_tensor(getattr(first.artifact, name)), torch.as_tensor(getattr(second.artifact, name))
        )
    parts = [first.images, heatmaps(40, 0, first.opacity), first.other, heatmaps(90, 1)]
    before = [part.clone() for part in parts]
    isolate(*parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


def test_mask_and_pattern_are_in_range(world: World) -> None:
    artifact = world.artifact
    assert 0 <= artifact.mask.min() <= artifact.mask.max() <= 1
    assert 0 <= artifact.pattern.min() <= artifact.pattern.max() <= 1
    assert artifact.shifts.abs().max() <= artifact.radius
    assert artifact.mask.mean() <= candidate.LARGEST


def test_relevance_gain_is_the_difference_of_mean_positive_shares() -> None:
    relevance = torch.zeros(2, 40, 40)
    relevance[0, 10, 10], relevance[0, 20, 20] = 3.0, -1.0
    relevance[1, 10, 10] = 100.0
    other = torch.zeros(3, 40, 40)
    other[0, 30, 30] = 6.0
    gain = relevance_gain(relevance, other)
    # Smoothing keeps the sums; the negative part does not count, but it takes its share.
    assert float(gain[5:16, 5:16].sum()) == pytest.approx((0.75 + 1) / 2, rel=1e-3)
    assert float(gain[25:36, 25:36].sum()) == pytest.approx(-1 / 3, rel=1e-3)
    assert float(gain[15:26, 15:26].abs().sum()) < 1e-2


def test_otsu_splits_with_least_variance_inside() -> None:
    rng = np.random.default_rng(0)
    values = np.sort(np.concatenate([rng.normal(0, 1, 300), rng.normal(8, 1, 60)]))
    inner = [i * values[:i].var() + (360 - i) * values[i:].var() for i in range(1, 360)]
    best = int(np.argmin(inner)) + 1
    assert int((values > otsu(torch.from_numpy(values))).sum()) == pytest.approx(360 - best, abs=3)


@pytest.mark.parametrize("value", [0.0, 0.01, 0.5, 1e6, -3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_of_equal_values_lie_above_otsu(value: float, dtype: torch.dtype) -> None:
    values = torch.full((5,), value, dtype=dtype)
    assert (values > otsu(values)).all()
    assert (values.numpy() > otsu(values)).all()


def simple(constant: bool = True) -> Artifact:
    mask = torch.zeros(12, 12)
    mask[0:4, 8:12] = 1
    pattern = scenes(1, 5, (3, 12, 12))[0]
    return Artifact(mask, pattern, torch.tensor([[0, 0], [1, -1], [2, 2], [-2, 0]]), 0.3, 2, constant)


def test_insert_places_by_the_drawn_shift_and_blends_by_the_mask() -> None:
    artifact = simple()
    images = scenes(5, 1, (3, 12, 12))
    marked = artifact.insert(images, np.array([0, 1, 2, 3, 4]))
    for i, (dy, dx) in enumerate([(0, 0), (1, -1), (2, 2), (-2, 0), (0, 0)]):
        expected = images[i].clone()
        for y in range(12):
            for x in range(12):
                if 0 <= y - dy < 12 and 0 <= x - dx < 12 and artifact.mask[y - dy, x - dx]:
                    expected[:, y, x] = artifact.pattern[:, y - dy, x - dx]
        torch.testing.assert_close(marked[i], expected)
    half = replace(artifact, mask=0.5 * artifact.mask).insert(images, np.zeros(5, dtype=int))
    torch.testing.assert_close(half, (images + artifact.insert(images, np.zeros(5, dtype=int))) / 2)


def test_insert_takes_other_content_from_the_very_same_place() -> None:
    artifact, images, donors = simple(), scenes(4, 1, (3, 12, 12)), scenes(4, 2, (3, 12, 12))
    mask, _ = artifact.placed(np.arange(4))
    marked = artifact.insert(images, np.arange(4), donors)
    torch.testing.assert_close(marked, torch.where(mask > 0, donors, images))


def test_scores_are_those_of_the_batches() -> None:
    artifact, images = simple(), scenes(10, 1, (3, 12, 12))
    together = scores(artifact, iter([images[:4], images[4:]]))
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, artifact.score(images).numpy(), atol=1e-6)
    whole = artifact.insert(images, np.arange(10) % 2)
    assert artifact.score(whole).min() > 0.99


@pytest.mark.parametrize("touches", [True, False])
def test_holes_are_filled_and_what_does_not_touch_the_relevant_place_is_left(touches: bool) -> None:
    ring = torch.zeros(20, 20, dtype=torch.bool)
    ring[4:9, 4:9] = True
    ring[6, 6] = False
    far = torch.zeros_like(ring)
    far[15:18, 15:18] = True
    region = torch.zeros_like(ring)
    region[5:8, 5:8] = True
    mask, constant = candidate._grow(region, ring | far if touches else far, region.float())
    assert constant is touches
    expected = ring.clone() if touches else region
    expected[6, 6] = True
    assert torch.equal(mask, expected.float())
