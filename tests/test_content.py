"""Shared content on images made for it: artifacts have it, natural kinds, near-duplicates and flat surfaces do not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from spray.analysis.content import place_of_gain, relevance_peaks, shared_content, window_sides

N, SIDE, SIZE = 120, 28, 5
CLEAR = 1.0
"""Log ratio that is clear: the cluster varies less than half as much, relative to what is around."""


def textures(n: int = N, channels: int = 1, seed: int = 0, smooth: float = 1.5) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(n, channels, SIDE, SIDE))
    return np.clip(0.5 + 0.5 * gaussian_filter(noise, (0, 0, smooth, smooth)) * smooth, 0, 1)


def hot(places: np.ndarray, seed: int = 1) -> np.ndarray:
    """Heatmaps with a bump at each place, on noise."""
    maps = 0.02 * np.random.default_rng(seed).random((len(places), SIDE, SIDE))
    for one, (row, column) in zip(maps, places, strict=True):
        one[row, column] += 8
    return gaussian_filter(maps, (0, 1, 1))


def anywhere(n: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, SIDE - 4, size=(n, 2))


def stamp(images: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Put a cross on a bright square at each place."""
    images = images.copy()
    tag = np.ones((SIZE, SIZE))
    tag[np.arange(SIZE), np.arange(SIZE)] = tag[np.arange(SIZE), ::-1][np.arange(SIZE), np.arange(SIZE)] = 0
    for one, (row, column) in zip(images, places, strict=True):
        one[:, row - 2 : row + 3, column - 2 : column + 3] = tag
    return images


def first(size: int, n: int = N) -> np.ndarray:
    return np.arange(n) < size


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 30, 70])
@pytest.mark.parametrize("fixed", [True, False])
def test_an_artifact_is_shared_content(fixed: bool, size: int, channels: int) -> None:
    member, places = first(size), anywhere(N)
    if fixed:
        places[member] = [6, 6]
    images = textures(channels=channels)
    images[member] = stamp(images[member], places[member])
    assert shared_content(images, hot(places), member) > CLEAR


def test_relevance_that_is_elsewhere_does_not_hide_a_fixed_artifact() -> None:
    member, places = first(30), np.full((N, 2), 18)
    images = textures()
    images[member] = stamp(images[member], np.full((30, 2), 6))
    weaker = hot(np.full((N, 2), 6), seed=3) * np.where(member, 0.4, 0)[:, None, None]
    assert shared_content(images, hot(places) + weaker, member) > CLEAR


def test_a_few_pixels_of_jitter_do_not_matter() -> None:
    member = first(30)
    places = 8 + np.random.default_rng(0).integers(-2, 3, size=(N, 2))
    images = textures()
    images[member] = stamp(images[member], places[member])
    assert shared_content(images, hot(np.full((N, 2), 8)), member) > CLEAR


@pytest.mark.parametrize("seed", range(5))
def test_a_natural_kind_has_none(seed: int) -> None:
    """The cluster has its relevance elsewhere, and its images differ from the rest's, but vary as much."""
    member = first(40)
    places = np.where(member[:, None], [7, 7], [20, 20])
    images = textures(seed=seed)
    images[member] = np.clip(0.6 * images[member] + 0.4 * textures(1, seed=99), 0, 1)
    assert shared_content(images, hot(places), member) < CLEAR


def test_near_duplicates_have_none() -> None:
    """Views of one scene are alike at the place of relevance and all around it."""
    member, places = first(20), anywhere(N)
    images = textures()
    scene = textures(1, seed=7)[0]
    for i in np.flatnonzero(member):
        shift = np.random.default_rng(i).integers(-5, 6, size=2)
        images[i] = np.roll(scene, shift, axis=(1, 2))
        places[i] = 14 + shift
    assert shared_content(images, hot(places), member) < CLEAR


def test_flat_surfaces_have_none() -> None:
    member = first(30)
    images = textures()
    images[member] = np.random.default_rng(0).random((30, 1, 1, 1)) * 0.02
    assert abs(shared_content(images, hot(anywhere(N)), member)) < CLEAR


def test_random_parts_have_none() -> None:
    images, maps = textures(), hot(anywhere(N))
    found = [shared_content(images, maps, np.random.default_rng(s).permutation(first(25))) for s in range(20)]
    assert max(found) < 0.5
    assert abs(np.mean(found)) < 0.25


def test_order_and_unit_of_relevance_do_not_matter() -> None:
    member, places = first(30), anywhere(N)
    images = textures()
    images[member] = stamp(images[member], places[member])
    maps = hot(places)
    value = shared_content(images, maps, member)
    assert shared_content(images, 1e-6 * maps, member) == pytest.approx(value)
    assert shared_content(images[::-1], maps[::-1], member[::-1]) == pytest.approx(value, rel=0.1)


def test_peaks_and_gain_are_where_they_were_put() -> None:
    places = anywhere(N)
    assert (np.abs(relevance_peaks(hot(places)) - places) <= 1).all()
    assert relevance_peaks(-hot(places)).shape == (N, 2)
    member = first(30)
    both = hot(np.full((N, 2), 20)) + hot(np.full((N, 2), 6), seed=5) * member[:, None, None]
    assert (np.abs(place_of_gain(both, member) - 6) <= 1).all()


@pytest.mark.parametrize(("side", "sides"), [(16, (5, 9)), (28, (7, 13)), (32, (9, 17)), (8, (3, 5))])
def test_windows_are_a_quarter_of_the_image(side: int, sides: tuple[int, int]) -> None:
    assert window_sides(side, 2 * side) == sides


def test_degenerate_clusters_and_shapes() -> None:
    images, maps = textures(), hot(anywhere(N))
    for size in (0, 1, N - 1, N):
        assert shared_content(images, maps, first(size)) == 0
    assert np.isfinite(shared_content(np.zeros_like(images), np.zeros_like(maps), first(20)))
    with pytest.raises(ValueError, match="do not fit"):
        shared_content(images, maps[:, :5], first(20))
