"""Patches of the real photographs inside scikit-image's wheel: a dataset that needs no download.

Each class is one photograph. It is cut into tiles; some tiles are set aside for testing, and patches are cut at
random places inside single tiles, so that no pixel is shared between training and test patches, while patches of
one tile overlap, as frames of one scene do in real data.
"""

from __future__ import annotations

import numpy as np

from spray.data.arrays import ArrayDataset

CLASSES = ("astronaut", "brick", "cat", "coffee", "grass", "gravel", "motorcycle", "tissue")
"""Names of the classes; `_photograph` tells where each comes from."""

TILE = 48
"""Side of a tile in pixels."""

PATCH = 32
"""Side of a patch in pixels."""

TRAIN_PER_CLASS, TEST_PER_CLASS = 450, 125
TEST_SHARE = 0.25
"""Share of the tiles that only test patches are cut from."""

SATURATION = 0.35
"""Share of the colour that is left: with all of it the colour alone would give most classes away."""


def photos() -> tuple[ArrayDataset, ArrayDataset]:
    """Cut the patches.

    Returns
    -------
    train, test : ArrayDataset
        3,600 and 1,000 patches of shape (3, 32, 32) in eight classes. The patches are always the same.
    """
    parts: dict[str, list[tuple[np.ndarray, int, str]]] = {"train": [], "test": []}
    for label, name in enumerate(CLASSES):
        rng = np.random.default_rng([20201, label])
        for part, patches in _cut(_photograph(name), rng).items():
            parts[part] += [(patch, label, f"{name}/{top:04d}-{left:04d}") for patch, top, left in patches]
    train, test = (
        ArrayDataset(
            np.stack([patch for patch, _, _ in part]),
            np.array([label for _, label, _ in part]),
            CLASSES,
            [name for _, _, name in part],
        )
        for part in (parts["train"], parts["test"])
    )
    return train, test


def _photograph(name: str) -> np.ndarray:
    """Return a photograph as uint8 (H, W, 3) with some of its colour taken away."""
    from skimage import data

    source = {
        "cat": data.chelsea,
        "tissue": data.immunohistochemistry,
        "motorcycle": lambda: data.stereo_motorcycle()[0],
    }.get(name, getattr(data, name, None))
    if source is None:
        raise ValueError(f"scikit-image has no photograph {name!r}")
    image = np.asarray(source(), dtype=np.float64)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    luminance = image @ np.array([0.2125, 0.7154, 0.0721])
    mixed = luminance[..., None] + SATURATION * (image - luminance[..., None])
    return np.round(mixed).clip(0, 255).astype(np.uint8)


def _cut(
    photograph: np.ndarray, rng: np.random.Generator, tile: int = TILE, patch: int = PATCH
) -> dict[str, list[tuple[np.ndarray, int, int]]]:
    """Cut training and test patches (uint8 (3, patch, patch), top, left) from tiles of their own."""
    height, width = photograph.shape[:2]
    tiles = [(top, left) for top in range(0, height - tile + 1, tile) for left in range(0, width - tile + 1, tile)]
    order = rng.permutation(len(tiles))
    n_test = max(1, round(TEST_SHARE * len(tiles)))
    shares = {
        "test": (order[:n_test], TEST_PER_CLASS),
        "train": (order[n_test:], TRAIN_PER_CLASS),
    }
    return {
        part: _patches(photograph, [tiles[i] for i in chosen], n, rng, tile, patch)
        for part, (chosen, n) in shares.items()
    }


def _patches(
    photograph: np.ndarray,
    tiles: list[tuple[int, int]],
    n: int,
    rng: np.random.Generator,
    tile: int = TILE,
    patch: int = PATCH,
) -> list[tuple[np.ndarray, int, int]]:
    """Cut `n` different patches, spread evenly over the tiles."""
    places: dict[tuple[int, int], None] = {}
    turn = 0
    while len(places) < n:
        tile_top, tile_left = tiles[turn % len(tiles)]
        top, left = rng.integers(0, tile - patch + 1, size=2)
        places[(tile_top + int(top), tile_left + int(left))] = None
        turn += 1
    return [
        (photograph[top : top + patch, left : left + patch].transpose(2, 0, 1).copy(), top, left)
        for top, left in places
    ]
