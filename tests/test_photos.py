"""The embedded photographs: the same patches everywhere, training and test apart, no download."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch

from spray.data import photos as module
from spray.data.arrays import ArrayDataset
from spray.data.photos import CLASSES, PATCH, TEST_PER_CLASS, TILE, TRAIN_PER_CLASS, photos


@pytest.fixture(scope="module")
def parts() -> tuple[ArrayDataset, ArrayDataset]:
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*arguments: object) -> None:
            raise AssertionError("the photographs must not be downloaded")

        patch.setattr(socket.socket, "connect", refuse)
        return photos()


def places(data: ArrayDataset) -> list[tuple[str, int, int]]:
    split = [name.replace("/", "-").split("-") for name in data.names]
    return [(photograph, int(top), int(left)) for photograph, top, left in split]


def test_counts_and_types(parts: tuple[ArrayDataset, ArrayDataset]) -> None:
    assert len(CLASSES) >= 6
    for data, per_class in zip(parts, (TRAIN_PER_CLASS, TEST_PER_CLASS), strict=True):
        assert np.bincount(data.labels).tolist() == [per_class] * len(CLASSES)
        assert data.image_shape == (3, PATCH, PATCH)
        assert data.classes == CLASSES
        assert len(set(data.names)) == len(data)
        assert [name.split("/")[0] for name in data.names] == [CLASSES[label] for label in data.labels]
        pixels = data.batch(np.arange(len(data)))
        assert 0 <= pixels.min() < 0.1
        assert 0.9 < pixels.max() <= 1


def test_no_pixel_is_shared_between_training_and_test(parts: tuple[ArrayDataset, ArrayDataset]) -> None:
    used: list[dict[str, np.ndarray]] = []
    for data in parts:
        canvas = {name: np.zeros((1200, 1200), dtype=bool) for name in CLASSES}
        for name, top, left in places(data):
            canvas[name][top : top + PATCH, left : left + PATCH] = True
        used.append(canvas)
    for name in CLASSES:
        assert used[0][name].any()
        assert not (used[0][name] & used[1][name]).any()


def test_every_patch_lies_in_one_tile_and_tiles_are_used_evenly(parts: tuple[ArrayDataset, ArrayDataset]) -> None:
    for data in parts:
        tiles: dict[tuple[str, int, int], int] = {}
        for name, top, left in places(data):
            assert top % TILE + PATCH <= TILE
            assert left % TILE + PATCH <= TILE
            tile = (name, top // TILE, left // TILE)
            tiles[tile] = tiles.get(tile, 0) + 1
        for name in CLASSES:
            counts = [n for (photograph, _, _), n in tiles.items() if photograph == name]
            assert len(counts) >= 10
            assert max(counts) <= 4 * min(counts) + 4


def test_patches_are_cut_where_their_names_say(parts: tuple[ArrayDataset, ArrayDataset]) -> None:
    for name in CLASSES:
        photograph = module._photograph(name)
        for data in parts:
            i = data.labels.tolist().index(CLASSES.index(name))
            _, top, left = places(data)[i]
            cut = photograph[top : top + PATCH, left : left + PATCH].transpose(2, 0, 1)
            np.testing.assert_array_equal(data.images[i], cut)


def test_a_part_of_the_colour_is_left() -> None:
    from skimage import data

    original = data.astronaut().astype(float)
    luminance = original @ [0.2125, 0.7154, 0.0721]
    expected = luminance[..., None] + 0.35 * (original - luminance[..., None])
    np.testing.assert_allclose(module._photograph("astronaut"), expected.clip(0, 255), atol=0.5 + 1e-9)
    grey = module._photograph("brick")
    np.testing.assert_array_equal(grey, np.repeat(data.brick()[..., None], 3, axis=2))


def test_the_patches_are_always_the_same(parts: tuple[ArrayDataset, ArrayDataset]) -> None:
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1]
    again = photos()
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    for first, second in zip(parts, again, strict=True):
        assert first.fingerprint == second.fingerprint
    assert parts[0].fingerprint != parts[1].fingerprint


def test_an_unknown_photograph_is_refused() -> None:
    with pytest.raises(ValueError, match="no photograph 'unicorn'"):
        module._photograph("unicorn")
