"""The sets of images of `hans_bench.py`: another seed gives other images too.

Factories for `dataset.factory`, which return (training, test).
"""

from __future__ import annotations

import numpy as np
from rank_data import clothes, patches

from spray.data.arrays import ArrayDataset

__all__ = ["fashion", "photos32", "photos64"]

GREY = np.array([0.2125, 0.7154, 0.0721])


def photos32(seed: int) -> tuple[ArrayDataset, ArrayDataset]:
    """Return grey patches of 32² pixels of scikit-image's photographs: 450 and 125 of each of eight."""
    train, test = patches(seed, tile=48, patch=32)
    return _grey(train), _grey(test)


def photos64(seed: int) -> tuple[ArrayDataset, ArrayDataset]:
    """Return patches of 64² pixels in colour."""
    return patches(seed, tile=96, patch=64)


def fashion(seed: int) -> tuple[ArrayDataset, ArrayDataset]:
    """Return 600 and 200 images of each class of Fashion-MNIST."""
    return clothes(seed)


def _grey(dataset: ArrayDataset) -> ArrayDataset:
    luminance = np.einsum("ncyx,c->nyx", dataset.images.astype(np.float64), GREY)
    images = np.round(luminance).clip(0, 255).astype(np.uint8)[:, None]
    return ArrayDataset(images, dataset.labels, dataset.classes, dataset.names)
