"""Repeated content on images made for it: copies of a mark are found; likeness, duplicates and flat parts are not."""

from __future__ import annotations

import numpy as np
import pytest

from spray.analysis.content import NOISE
from spray.analysis.repeated import CLEAR, FEWEST, best_windows, gap, repeated_content, separate_peaks
from tests.test_content import SIDE, N, anywhere, hot, stamp, textures


def others(channels: int = 1, n: int = 150) -> np.ndarray:
    return textures(n, channels, seed=11).astype(np.float32)


def marked(size: int, fixed: bool, channels: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, heatmaps that look at the mark in those that have it, and who has it."""
    member, places = np.arange(N) < size, anywhere(N)
    if fixed:
        places[member] = np.random.default_rng(5).integers(5, 7, (size, 2))
    images = textures(channels=channels)
    images[member] = stamp(images[member], places[member])
    return images.astype(np.float32), hot(places).astype(np.float32), member


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [FEWEST, 20, 70])
@pytest.mark.parametrize("fixed", [True, False])
def test_the_samples_with_a_mark_are_found(fixed: bool, size: int, channels: int) -> None:
    images, maps, member = marked(size, fixed, channels)
    first = repeated_content(images, maps, others(channels))[0]
    assert first.strength > 2 * CLEAR
    np.testing.assert_array_equal(first.member, member)
    assert first.distance[member].max() < first.distance[~member].min()


def test_relevance_may_look_at_something_else_more() -> None:
    images, maps, member = marked(20, fixed=False)
    distracted = maps + 2 * hot(anywhere(N, seed=8), seed=9).astype(np.float32)
    np.testing.assert_array_equal(repeated_content(images, distracted, others())[0].member, member)


def test_relevance_may_speak_against_the_mark() -> None:
    images, maps, member = marked(20, fixed=False)
    signed = (np.where(member[:, None, None], -maps, 0) + 2 * hot(anywhere(N, seed=8))).astype(np.float32)
    np.testing.assert_array_equal(repeated_content(images, signed, others())[0].member, member)


def test_where_no_relevance_is_nothing_is_sought() -> None:
    images, _, _ = marked(20, fixed=True)
    elsewhere = hot(np.full((N, 2), 20)).astype(np.float32)
    assert repeated_content(images, elsewhere, others()) == []


def test_textures_alone_have_no_copies() -> None:
    assert repeated_content(textures().astype(np.float32), hot(anywhere(N)).astype(np.float32), others()) == []


def test_what_other_classes_have_as_well_is_no_mark_of_this_one() -> None:
    images, maps, _ = marked(20, fixed=True)
    everywhere = others()
    everywhere[:15] = stamp(everywhere[:15], np.full((15, 2), 12))
    assert repeated_content(images, maps, others())
    assert repeated_content(images, maps, everywhere) == []


@pytest.mark.parametrize("shift", [0, 3])
def test_duplicates_and_overlapping_crops_are_no_mark(shift: int) -> None:
    images, places = textures().astype(np.float32), anywhere(N)
    rng = np.random.default_rng(4)
    for i in range(1, 25):
        images[i] = np.roll(images[0], rng.integers(-shift, shift + 1, 2), axis=(1, 2))
    places[:25] = [14, 14]
    assert repeated_content(images, hot(places).astype(np.float32), others()) == []


def test_a_part_that_varies_by_degrees_is_no_mark() -> None:
    """Such as the heel of a boot: each has one, none is another's copy."""
    places = anywhere(N)
    images = stamp(textures(), places)
    images += np.random.default_rng(7).normal(size=images.shape) * np.linspace(0, 0.6, N)[:, None, None, None]
    found = repeated_content(np.clip(images, 0, 1).astype(np.float32), hot(places).astype(np.float32), others())
    assert max((each.strength for each in found), default=0.0) < 1.5 * CLEAR
    copies = marked(60, fixed=False)[:2]
    assert repeated_content(*copies, others())[0].strength > 3 * CLEAR


def test_the_gap_is_that_of_the_formula() -> None:
    own = np.concatenate([np.full(10, 0.001), np.full(40, 0.1)])[None]
    gaps, middles = gap(own)
    assert gaps[0] == pytest.approx(np.log((0.1 + NOISE) / (0.001 + NOISE)))
    assert middles[0] == pytest.approx(np.sqrt((0.1 + NOISE) * (0.001 + NOISE)) - NOISE)
    nearer, _ = gap(own, np.full((1, 200), 0.02))
    assert nearer[0] == pytest.approx(np.log((0.02 + NOISE) / (0.001 + NOISE)))
    few = np.concatenate([np.full(2, 0.9), np.full(198, 0.02)])[None]
    assert gap(own, few)[0][0] == nearer[0]


def test_windows_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    images, templates = rng.random((70, 2, 9, 8), np.float32), rng.random((3, 2, 3, 3), np.float32)
    distance, place = best_windows(images, templates)
    for t in range(3):
        for n in (0, 63, 64, 69):
            slow = {
                (r, c): float(((images[n, :, r : r + 3, c : c + 3] - templates[t]) ** 2).mean())
                for r in range(7)
                for c in range(6)
            }
            assert distance[t, n] == pytest.approx(min(slow.values()), abs=1e-6)
            assert slow[tuple(place[t, n])] == pytest.approx(min(slow.values()), abs=1e-6)


def test_peaks_lie_apart_and_the_largest_comes_first() -> None:
    maps = (hot(np.array([[5, 6]])) + 0.5 * hot(np.array([[20, 18]])) + 0.25 * hot(np.array([[8, 22]]))).astype(
        np.float32
    )
    np.testing.assert_array_equal(separate_peaks(maps, 3)[0], [[5, 6], [20, 18], [8, 22]])


def test_small_classes_and_lone_ones_have_nothing_and_shapes_are_checked() -> None:
    images, maps, _ = marked(20, fixed=True)
    assert repeated_content(images[:7], maps[:7], others()) == []
    assert repeated_content(images, maps, others()[:0]) == []
    with pytest.raises(ValueError, match="do not fit"):
        repeated_content(images, maps[:, :-1], others())


def test_black_images_have_nothing() -> None:
    black = np.zeros((40, 1, SIDE, SIDE), np.float32)
    assert repeated_content(black, hot(anywhere(40)).astype(np.float32), black) == []


def test_it_is_the_same_again() -> None:
    images, maps, _ = marked(20, fixed=False)
    one, two = (repeated_content(images, maps, others()) for _ in range(2))
    assert [each.strength for each in one] == [each.strength for each in two]
    assert images.shape[2] == SIDE
