"""The sets of images of `hans_bench.py`: another seed gives other images too.

Factories for `dataset.factory`, which return (training, test).
"""

from __future__ import annotations

import numpy as np
from rank_data import clothes, patches

from spray.data.arrays import ArrayDataset

__all__ = ["fashion", "photos32", "photos64", "strangers"]

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


def strangers(seed: int, kind: int, host: int, train: int = 60, test: int = 40) -> tuple[ArrayDataset, ArrayDataset]:
    """Return Fashion-MNIST with a class less: a few images of it are a kind of another class, named `kind/…`.

    Parameters
    ----------
    seed : int
        Of the draws.
    kind, host : int
        The class that is no more, and the one that has so many training and test images of it.
    train, test : int
        How many.
    """
    parts = zip(clothes(seed), (train, test), strict=True)
    first, second = (_with_strangers(part, np.random.default_rng([seed, 7]), kind, host, few) for part, few in parts)
    return first, second


def _with_strangers(dataset: ArrayDataset, rng: np.random.Generator, kind: int, host: int, few: int) -> ArrayDataset:
    labels = np.asarray(dataset.labels)
    kept = np.union1d(np.flatnonzero(labels != kind), rng.permutation(np.flatnonzero(labels == kind))[:few])
    of_kind = labels[kept] == kind
    relabelled = np.where(of_kind, host, labels[kept])
    names = [f"{'kind' if strange else 'rest'}/{i:05d}" for i, strange in zip(kept, of_kind, strict=True)]
    classes = [name for i, name in enumerate(dataset.classes) if i != kind]
    return ArrayDataset(dataset.images[kept], relabelled - (relabelled > kind), classes, names)
