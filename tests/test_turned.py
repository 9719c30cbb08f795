"""The same piece of an image at any angle: a strip with two colours, in clusters that are pure or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from spray.isolation.choice import separation
from spray.isolation.evidence import Evidence
from spray.isolation.turned import Turned, isolate_turned, turned
from spray.pipelines.isolated import load_artifact, save_artifact
from tests.worlds import SIDE, World, scenes

N, REST = 40, 80


def strip(images: Tensor, seed: int, scale: int = 1) -> tuple[Tensor, Tensor]:
    """Return images with a strip at any angle, light at one end and dark at the other, and its opacity (n, H, W)."""
    rng = np.random.default_rng(seed)
    side = images.shape[2]
    y, x = np.mgrid[:side, :side] + 0.5
    marked, opacity = images.clone(), torch.zeros(len(images), side, side)
    for i in range(len(images)):
        angle = rng.uniform(0, 2 * np.pi)
        row, column = 10 * scale + rng.integers(-scale, scale + 1, 2)
        along = (x - column) * np.cos(angle) + (y - row) * np.sin(angle)
        across = (y - row) * np.cos(angle) - (x - column) * np.sin(angle)
        inside = np.minimum(2.2 * scale - np.abs(across), 5 * scale - np.abs(along))
        opacity[i] = torch.from_numpy(np.clip(inside + 0.5, 0, 1)).float()
        color = torch.from_numpy(np.where(along > 0, 0.9, 0.2)).float()
        marked[i] = images[i] + opacity[i] * (color - images[i])
    return marked, opacity


def world(share: float, scale: int = 1) -> tuple[Evidence, Tensor, Tensor]:
    """Return a cluster of which a share has the strip and the relevance on it, and images with it and their opacity."""

    def pictures(n: int, seed: int) -> Tensor:
        return nn.functional.interpolate(scenes(n, seed), scale_factor=scale, mode="bilinear")

    with_it, opacity = strip(pictures(round(share * N), 1), 5, scale)
    images = torch.cat([with_it, pictures(N - len(with_it), 3)])
    other = pictures(REST, 2)
    noise = np.random.default_rng(4)
    maps, other_maps = (
        torch.from_numpy(noise.normal(0.05, 0.1, (len(x), *x.shape[2:]))).float() for x in (images, other)
    )
    maps[: len(with_it)] += opacity
    fresh, fresh_opacity = strip(pictures(30, 6), 7, scale)
    return Evidence(images, maps, other, other_maps), fresh, fresh_opacity


@pytest.mark.parametrize(("share", "scale"), [(1.0, 1), (0.65, 1), (1.0, 4)])
def test_a_strip_at_any_angle_is_found_in_other_images(share: float, scale: int) -> None:
    evidence, images, opacity = world(share, scale)
    found = isolate_turned(evidence)
    assert found is not None
    assert found.constant
    assert separation(found.score(images), found.score(evidence.other_images)) > 0.95
    # Of the two in the middle, that with less contrast.
    for x, typical in ((evidence.images, 1), (evidence.other_images, 0)):
        assert float(found.score(x).sort().values[len(x) // 2]) == pytest.approx(typical, abs=1e-3)
    masks = found.found(images)[:, 0]
    both, either = ((f(masks > 0.5, opacity > 0.5)).flatten(1).sum(1) for f in (torch.logical_and, torch.logical_or))
    assert float((both / either).median()) > 0.6
    # Both halves have their colour.
    inside = found.pattern[:, found.mask > 0.9].mean(dim=0)
    assert inside.min() < 0.35
    assert inside.max() > 0.75


def test_it_is_added_at_the_angles_it_was_seen_at_and_survives_the_disk(tmp_path: Path) -> None:
    evidence, _, _ = world(1.0)
    found = isolate_turned(evidence)
    assert found is not None
    clean, draws = scenes(N, 9), np.arange(N)
    added, opacity = found.add(clean, draws)
    assert torch.equal(added, found.insert(clean, draws))
    assert ((added == clean).all(dim=1, keepdim=True) | (opacity > 0)).all()
    assert len(found.angles.unique()) >= 12
    # Where a sample has it, there it is put: as much as the pose is found again.
    assert float(found.score(added).median()) > 0.7
    areas = (opacity[:, 0].flatten(1) * (found.found(evidence.images)[:, 0].flatten(1))).sum(1) / opacity.flatten(
        1
    ).sum(1)
    assert float(areas.median()) > 0.7
    save_artifact(tmp_path / "artifact.npz", found)
    again = load_artifact(tmp_path / "artifact.npz")
    assert isinstance(again, Turned)
    assert torch.equal(again.insert(clean, draws), added)
    assert torch.equal(again.score(clean), found.score(clean))


@pytest.mark.parametrize("seed", range(3))
def test_what_has_nothing_in_common_is_no_strip(seed: int) -> None:
    noise = np.random.default_rng(seed)
    images, other = scenes(N, 20 + seed), scenes(REST, 30 + seed)
    maps, other_maps = (
        torch.from_numpy(noise.normal(0.05, 0.1, (len(x), SIDE, SIDE))).float() for x in (images, other)
    )
    found = isolate_turned(Evidence(images, maps, other, other_maps))
    # If anything is made of it, other samples of the cluster have it no more than the rest.
    if found is not None:
        assert separation(found.score(scenes(60, 40 + seed)), found.score(scenes(60, 50 + seed))) < 0.7


@pytest.mark.parametrize("kind", ["box", "tag"])
def test_what_is_never_turned_is_no_turned_artifact(kind: str) -> None:
    assert isolate_turned(World(kind=kind, size=6).evidence) is None


def test_one_colour_is_no_match_where_all_around_has_it_too() -> None:
    """A dark room matches a black strip everywhere; a strip ends."""
    mask, pattern = torch.zeros(SIDE, SIDE), torch.full((3, SIDE, SIDE), 0.1)
    mask[8:11, 6:15] = 1
    zero = torch.zeros(1, 2, dtype=torch.int64)
    black = Turned(mask, pattern, zero, 1.0, 3, True, torch.zeros(1), 0.0)
    dark, light = torch.full((1, 3, SIDE, SIDE), 0.1), torch.full((1, 3, SIDE, SIDE), 0.7)
    scores = black.score(torch.cat([dark, light, black.insert(light, np.zeros(1, int))]))
    assert float(scores[2]) > 3
    assert scores[:2].abs().max() < 0.1


def test_a_quarter_is_torchs_and_others_are_scipys() -> None:
    images = scenes(3, 0)
    middle = torch.full((2,), (SIDE - 1) / 2)
    quarter = turned(images, torch.full((3,), np.pi / 2), middle)
    torch.testing.assert_close(quarter, images.rot90(-1, (2, 3)), atol=1e-4, rtol=0)
    for degrees in (15, 100, -40):
        found = turned(images, torch.full((3,), np.deg2rad(degrees)), middle, "zeros")
        expected = ndimage.rotate(images.numpy(), -degrees, axes=(2, 3), reshape=False, order=1)
        inner = np.s_[:, :, 8:-8, 8:-8]
        np.testing.assert_allclose(found.numpy()[inner], expected[inner], atol=1e-5)
