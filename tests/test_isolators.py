"""Isolators of every kind on clusters that were made of known parts: opacity, colour, shape, change of the image."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from spray.isolation.blended import Blended, edges, isolate_blended, isolate_shade, isolate_shading, isolate_veil
from spray.isolation.changed import Background, isolate_background, isolate_change, isolate_faded, smoothed
from spray.isolation.choice import Isolator, separation
from spray.isolation.evidence import Evidence
from spray.isolation.matted import Colored, closed, isolate_colored, isolate_donated, isolate_uncolored
from spray.isolation.scattered import isolate_scattered, peaks, windows
from spray.isolation.statistics import BANDS, radial_power
from tests.worlds import REST, SIDE, N, World, scenes


def overlap(found: Tensor, truth: Tensor) -> Tensor:
    found, truth = found > 0.5 * found.max(), truth > 0.5 * truth.max()
    return (found & truth).flatten(1).sum(1) / (found | truth).flatten(1).sum(1)


def test_a_blend_of_the_whole_image_is_found_with_opacity_and_colour() -> None:
    world = World(kind="tint", color=[1.0, 0.0, 0.0], strength=0.4)
    change = isolate_change(world.evidence)
    assert change is not None
    torch.testing.assert_close(change.gain, torch.full((3,), 0.6), atol=0.06, rtol=0)
    torch.testing.assert_close(change.offset, torch.tensor([0.4, 0.0, 0.0]), atol=0.04, rtol=0)
    assert change.opacity == pytest.approx(0.4, abs=0.06)
    assert change.blur == 0
    assert change.noise < 0.02
    truth = world.plant.mark(world.other, [f"{i}" for i in range(REST)])[0]
    added = change.insert(world.other, np.arange(REST))
    assert (added - truth).abs().mean() < 0.15 * (world.other - truth).abs().mean()
    assert (change.without(truth) - world.other).abs().mean() < 0.05
    assert separation(change.score(world.images), change.score(world.other)) > 0.99


@pytest.mark.parametrize("kind", ["brightness", "tint"])
def test_a_fade_is_found_by_the_range_of_values(kind: str) -> None:
    world = World(kind=kind, strength=0.4)
    images = torch.cat([world.images[:72], scenes(8, 9)])
    faded = isolate_faded(Evidence(images, world.evidence.relevance, world.other, world.evidence.other_relevance))
    assert faded is not None
    color = torch.tensor(world.plant.color)
    torch.testing.assert_close(faded.gain, torch.full((3,), 0.6), atol=0.06, rtol=0)
    torch.testing.assert_close(faded.offset, 0.4 * color, atol=0.04, rtol=0)


def test_nothing_is_no_fade_and_no_shade() -> None:
    maps = torch.ones(N, SIDE, SIDE)
    evidence = Evidence(scenes(N, 5), maps, scenes(N, 6), maps)
    assert isolate_faded(evidence) is None
    # A shading is 0 somewhere, so that all the scatter of few images is above that.
    for isolator, most in ((isolate_shade, 0.1), (isolate_shading, 0.15)):
        shade = isolator(evidence)
        assert shade is None or float(shade.mask.mean()) < most


@pytest.mark.parametrize("isolator", [isolate_shade, isolate_shading])
def test_a_vignette_is_a_shade_of_its_opacity_and_colour(isolator: Isolator) -> None:
    world = World(kind="vignette", jitter=0)
    shade = isolator(world.evidence)
    assert shade is not None
    truth = world.opacity.flatten(0, -3)[0]
    assert (shade.mask - truth).abs().mean() < 0.06
    assert float(np.corrcoef(shade.mask.flatten(), truth.flatten())[0, 1]) > 0.95
    torch.testing.assert_close(shade.pattern[:, 0, 0], torch.zeros(3), atol=0.08, rtol=0)
    assert separation(shade.score(world.images), shade.score(world.other)) > 0.99


@pytest.mark.parametrize(("gain", "offset"), [(0.5, 0.45), (0.6, 0.0), (1.0, 0.0)])
def test_a_shade_on_samples_of_a_kind_is_told_from_what_makes_the_kind(gain: float, offset: float) -> None:
    """They are lighter or darker as a whole, and vary less."""
    world = World(kind="vignette", jitter=0)
    marked = world.plant.mark(gain * world.clean + offset, [f"{i}" for i in range(N)])[0]
    maps = world.evidence.relevance
    evidence = Evidence(marked, maps, world.other, world.evidence.other_relevance)
    truth = world.opacity.flatten(0, -3)[0]
    shading = isolate_shading(evidence)
    assert shading is not None
    assert (shading.mask - truth).abs().mean() < 0.05
    assert float(np.corrcoef(shading.mask.flatten(), truth.flatten())[0, 1]) > 0.97
    torch.testing.assert_close(shading.pattern[:, 0, 0], torch.zeros(3), atol=0.08, rtol=0)
    shade = isolate_shade(evidence)
    if gain < 1:
        assert shade is None or (shade.mask - truth).abs().mean() > 0.1


def test_an_impure_cluster_changes_the_estimate_little() -> None:
    world = World(kind="brightness", strength=0.4)
    images = torch.cat([world.images[:72], scenes(8, 9)])
    change = isolate_change(Evidence(images, world.evidence.relevance, world.other, world.evidence.other_relevance))
    assert change is not None
    torch.testing.assert_close(change.gain, torch.full((3,), 0.6), atol=0.12, rtol=0)


def test_noise_is_measured_and_each_draw_has_its_own() -> None:
    world = World(kind="noise", strength=0.4)
    change = isolate_change(world.evidence)
    assert change is not None
    assert change.even
    # Evenly distributed noise of 0.4 of the range has the standard deviation 0.4 / √12.
    assert change.noise == pytest.approx(0.4 / np.sqrt(12), rel=0.25)
    same = world.other[:1].expand(2, -1, -1, -1)
    first, second = change.insert(same, np.array([1, 2]))
    assert (first - second).abs().mean() > 0.02
    assert torch.equal(change.insert(same, np.array([1, 2]))[0], first)


def test_normally_distributed_noise_is_told_from_evenly_distributed() -> None:
    world = World(kind="noise", strength=0.4)
    noise = torch.randn(world.clean.shape, generator=torch.Generator().manual_seed(0))
    images = (0.6 * world.clean + 0.2 + 0.4 / np.sqrt(12) * noise).clamp(0, 1)
    change = isolate_change(Evidence(images, world.evidence.relevance, world.other, world.evidence.other_relevance))
    assert change is not None
    assert change.noise == pytest.approx(0.4 / np.sqrt(12), rel=0.25)
    assert not change.even


@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_blur_is_measured(sigma: float) -> None:
    world = World(kind="blur", size=round(4 * sigma))
    change = isolate_change(world.evidence)
    assert change is not None
    assert change.blur == pytest.approx(sigma, rel=0.35)
    assert change.noise == 0
    added = radial_power(change.insert(world.other, np.arange(REST))).mean(dim=0)
    truth, before = radial_power(world.images).mean(dim=0), radial_power(world.other).mean(dim=0)
    assert (added - truth)[: BANDS - 2].abs().mean() < 0.5 * (before - truth)[: BANDS - 2].abs().mean()


def test_no_change_is_no_artifact() -> None:
    maps = torch.ones(N, SIDE, SIDE)
    evidence = Evidence(scenes(N, 5), maps, scenes(N, 6), maps)
    assert isolate_change(evidence) is None
    assert isolate_colored(evidence) is None
    assert isolate_uncolored(evidence) is None


def test_the_background_alone_changes() -> None:
    found = isolate_change(World(kind="tint").evidence)
    assert found is not None
    background = Background(*(getattr(found, field.name) for field in fields(found)))
    images = torch.full((1, 3, SIDE, SIDE), 0.2)
    images[:, :, 10:20, 10:20] = 0.9
    changed, region = background.add(images, np.zeros(1, dtype=int))
    assert torch.equal(changed[:, :, 10:20, 10:20], images[:, :, 10:20, 10:20])
    assert (region[0, 0, :10] == 1).all()
    assert (changed[:, 0, :10] > 0.3).all()
    assert isolate_background(World(kind="background", strength=0.9).evidence) is not None


def test_a_watermark_is_found_with_its_opacity() -> None:
    world = World(kind="watermark", size=6, jitter=2)
    found = isolate_blended(world.evidence)
    assert found is not None
    assert overlap(found.found(world.images)[:, 0], world.opacity).mean() > 0.8
    assert found.opacity == pytest.approx(0.4, abs=0.15)
    assert separation(found.score(world.images), found.score(world.other)) > 0.98
    back = found.without(world.images)
    assert (back - world.clean).abs().mean() < 0.6 * (world.images - world.clean).abs().mean()


def test_a_vignette_is_a_veil_that_darkens_the_corners() -> None:
    world = World(kind="vignette", jitter=0, strength=0.8)
    found = isolate_veil(world.evidence)
    assert found is not None
    truth = world.opacity[0]
    assert np.corrcoef(found.mask.flatten(), truth.flatten())[0, 1] > 0.9
    assert float((found.mask - truth).abs().mean()) < 0.12
    assert float(found.pattern.max()) < 0.25


@pytest.mark.parametrize("kind", ["frame", "stripe", "box", "band_aid"])
def test_shapes_of_one_colour_are_found_in_each_image(kind: str) -> None:
    size, jitter = (10, 2) if kind == "band_aid" else (4, 2)
    world = World(kind=kind, size=size, jitter=jitter)
    found = isolate_colored(world.evidence)
    assert found is not None
    truth = world.opacity.clone()
    assert overlap(found.found(world.images)[:, 0], truth).mean() > (0.6 if kind == "band_aid" else 0.9)
    color = torch.tensor(world.plant.color)
    torch.testing.assert_close(found.color, color, atol=0.03, rtol=0)
    # The donors keep the variation: their mattes differ.
    mask, content = found.placed(np.arange(8))
    assert len({tuple(m.flatten().tolist()) for m in mask}) > 1
    assert (content - color[:, None, None]).abs()[mask.expand_as(content) > 0.99].max() < 0.05
    assert separation(found.score(world.images), found.score(world.other)) > 0.98


def letters(n: int) -> Tensor:
    """A plate of (h, w) = (10, 16) for each of n samples with an H and an O cut out."""
    plate = torch.ones(10, 16)
    plate[2:8, 3] = plate[2:8, 6] = plate[4, 3:7] = 0
    plate[2:8, 9] = plate[2:8, 13] = plate[2, 9:14] = plate[7, 9:14] = 0
    return plate.expand(n, -1, -1)


@pytest.mark.parametrize("white", [True, False])
def test_what_a_plate_encloses_belongs_to_it_where_it_is_always_the_same(white: bool) -> None:
    world = World(kind="tag")
    images = scenes(N, 1)
    places = [(8 + i % 3, 7 + i % 2) for i in range(N)]
    maps, truth = torch.zeros(N, SIDE, SIDE), torch.zeros(N, SIDE, SIDE)
    red = torch.tensor([0.8, 0.1, 0.1])[:, None, None]
    for image, heat, whole, plate, (y, x) in zip(images, maps, truth, letters(N), places, strict=True):
        part = image[:, y : y + 10, x : x + 16]
        part.copy_(plate * red + (1 - plate) * (torch.ones(3, 1, 1) if white else part.clone()))
        heat[y : y + 10, x : x + 16] = 1
        whole[y : y + 10, x : x + 16] = 1 if white else plate
    found = isolate_colored(Evidence(images, maps, world.other, world.evidence.other_relevance))
    assert found is not None
    assert found.whole is white
    assert overlap(found.found(images)[:, 0], truth).mean() > 0.97
    added = found.insert(torch.zeros(8, 3, SIDE, SIDE), np.arange(8))
    expected = 10 * 16 if white else int(letters(1).sum())
    assert int((added.sum(dim=1) > 0.5).flatten(1).sum(dim=1).float().median()) == pytest.approx(expected, rel=0.03)


def test_text_of_a_colour_of_its_own_in_each_image() -> None:
    world = World(kind="timestamp", size=6, jitter=1)
    found = isolate_uncolored(world.evidence)
    assert found is not None
    assert overlap(found.found(world.images)[:, 0], world.opacity).mean() > 0.8
    assert separation(found.score(world.images), found.score(world.other)) > 0.98
    assert found.color.isnan().all()
    # A clear sky is of one colour all over, in many more pixels than any text has.
    sky = torch.rand(20, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, SIDE, SIDE)
    assert (found.score(sky) < float(found.score(world.images).min())).all()


def test_content_that_lies_anywhere() -> None:
    world = World(kind="tag", size=6, place="random")
    found = isolate_scattered(world.evidence)
    assert found is not None
    assert overlap(found.found(world.images)[:, 0], world.opacity).mean() > 0.9
    assert separation(found.score(world.images), found.score(world.other)) > 0.99
    mask, _ = found.placed(np.arange(N))
    assert overlap(mask[:, 0], world.opacity).mean() > 0.9
    assert not found.bound_to_a_place


def test_windows_follow_the_peaks() -> None:
    maps = torch.zeros(2, 20, 24)
    maps[0, 3, 4], maps[1, 15, 20] = 1.0, 2.0
    assert peaks(maps).tolist() == [[3, 4], [15, 20]]
    cut = windows(maps[:, None], peaks(maps), 8)
    assert cut.shape == (2, 1, 8, 8)
    assert cut[0, 0, 4, 4] == 1
    assert cut[1, 0, 4, 4] == 2


def test_content_that_always_differs_has_donors() -> None:
    opacity = torch.zeros(SIDE, SIDE)
    opacity[4:12, 4:12] = 1
    noise = [
        torch.from_numpy(np.random.default_rng(s).normal(0.05, 0.1, (n, SIDE, SIDE))).float()
        for s, n in ((3, N), (4, REST))
    ]
    found = isolate_donated(Evidence(scenes(N, 1), noise[0] + opacity, scenes(REST, 2), noise[1]))
    assert found is not None
    assert not found.constant
    mask, content = found.placed(np.arange(2))
    torch.testing.assert_close(content, scenes(N, 1)[:2], atol=1e-3, rtol=0)
    assert ((mask > 0) & (mask < 1)).any()


def test_where_content_always_differs_the_texture_tells_who_carries_it() -> None:
    world = World(kind="timestamp", size=5, jitter=0, color="random")
    flat, others = 0.9 * torch.ones(N, 3, SIDE, SIDE), 0.9 * torch.ones(REST, 3, SIDE, SIDE)
    images, _ = world.plant.mark(flat, [f"{i}" for i in range(N)])
    evidence = Evidence(images, world.evidence.relevance, others, world.evidence.other_relevance)
    found = isolate_donated(evidence)
    assert found is not None
    assert not found.constant
    # Matched with what they show at the median, those without it would come closer.
    assert separation(found.score(images), found.score(others)) > 0.99
    assert float(found.score(images).median()) == pytest.approx(1, abs=0.05)
    assert float(found.score(others).median()) == pytest.approx(0, abs=0.05)


def test_controls_change_images_by_as_much() -> None:
    change = isolate_change(World(kind="tint").evidence)
    assert change is not None
    some, donors = scenes(10, 7), scenes(10, 8)
    control = change.insert(some, np.arange(10), donors)
    strength = [
        (images - some).square().mean(dim=(1, 2, 3)).sqrt() for images in (change.insert(some, np.arange(10)), control)
    ]
    assert (strength[1] <= strength[0] + 1e-5).all()
    # It goes towards the donor's mean colour, whose content does not come along.
    mean = donors.mean(dim=(2, 3), keepdim=True)
    assert ((control - some) * (mean - some)).min() >= -1e-6


def test_smoothing_is_scipys() -> None:
    from scipy.ndimage import gaussian_filter

    image = scenes(1, 0)
    expected = gaussian_filter(image[0, 1].numpy(), 1.3, mode="mirror", radius=4)
    np.testing.assert_allclose(smoothed(image, 1.3)[0, 1].numpy(), expected, atol=1e-5)


def test_closing_is_scipys() -> None:
    from scipy.ndimage import grey_closing

    rng = np.random.default_rng(0)
    masks = rng.random((3, 1, 20, 17)).astype(np.float32) * (rng.random((3, 1, 20, 17)) < 0.2)
    for mask, found in zip(masks[:, 0], closed(torch.from_numpy(masks), 2)[:, 0], strict=True):
        # Beyond the border there is nothing.
        expected = grey_closing(np.pad(mask, 4), size=(5, 5))[4:-4, 4:-4]
        np.testing.assert_allclose(found, expected)


def test_the_control_of_a_shape_in_any_colour_does_not_have_that_shape() -> None:
    mattes = torch.zeros(2, SIDE, SIDE)
    mattes[:, 4:12, 4:12:2] = 1
    parts = (torch.zeros(1, 2, dtype=torch.int64), 1.0, 1, True, torch.zeros(2, 3, SIDE, SIDE), mattes)
    for color, columns in (([float("nan")] * 3, 7), ([1.0, 0.0, 0.0], 4)):
        some = Colored(mattes[0], torch.zeros(3, SIDE, SIDE), *parts, torch.tensor(color), mattes[0], 0.01, 0.0)
        changed = some.insert(torch.zeros(1, 3, SIDE, SIDE), np.array([0]), torch.ones(1, 3, SIDE, SIDE))
        assert int((changed[0, 0, 8] > 0.5).sum()) == columns


def test_what_the_image_shows_through_is_found_in_large_images() -> None:
    mask = torch.zeros(96, 96)
    mask[20:30, 40:60] = 0.4
    template, still = edges((mask > 0)[None, None].float())[0], torch.zeros(1, 2, dtype=torch.int64)
    blended = Blended(mask, torch.ones(1, 96, 96), still, 1.0, 9, True, template, torch.zeros(1), 0.0, 0.0)
    images = torch.full((2, 1, 96, 96), 0.2)
    images[0, :, 23:33, 38:58] = images[1, :, 20:30, 40:60] = 0.5
    expected = torch.zeros(2, 1, 96, 96)
    expected[0, :, 23:33, 38:58] = expected[1, :, 20:30, 40:60] = 0.4
    torch.testing.assert_close(blended.found(images), expected)
