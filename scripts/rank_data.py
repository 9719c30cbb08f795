"""Draws of three small sets of real images for `rank_bench.py`: another seed gives other images too.

Factories for `dataset.factory`, which return (training, test), and one for `model.factory`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from spray.data import photos
from spray.data.arrays import ArrayDataset
from spray.models.small_cnn import SmallCNN

SIDE = 16
"""Digits are magnified to so many pixels: they have 8, too few for the shipped network."""


def clothes(seed: int, train: int = 600, test: int = 200) -> tuple[ArrayDataset, ArrayDataset]:
    """Return `train` and `test` images of each class of Fashion-MNIST."""
    from spray.data.fashion_mnist import fashion_mnist

    parts = fashion_mnist(None)
    rng = np.random.default_rng([seed, 1])
    chosen = [_some_of_each(part.labels, n, rng) for part, n in zip(parts, (train, test), strict=True)]
    return _part(parts[0], chosen[0]), _part(parts[1], chosen[1])


def patches(seed: int, tile: int = photos.TILE, patch: int = photos.PATCH) -> tuple[ArrayDataset, ArrayDataset]:
    """Return patches of scikit-image's photographs, cut at other places and with other tiles set aside for testing."""
    parts: dict[str, tuple[list[np.ndarray], list[int], list[str]]] = {"train": ([], [], []), "test": ([], [], [])}
    for label, name in enumerate(photos.CLASSES):
        cut = photos._cut(photos._photograph(name), np.random.default_rng([seed, 2, label]), tile, patch)
        for part, found in cut.items():
            images, labels, names = parts[part]
            images += [image for image, _, _ in found]
            labels += [label] * len(found)
            names += [f"{name}/{top:04d}-{left:04d}" for _, top, left in found]
    train, test = (ArrayDataset(np.stack(i), np.array(y), photos.CLASSES, n) for i, y, n in parts.values())
    return train, test


def digits(seed: int, test_share: float = 0.2) -> tuple[ArrayDataset, ArrayDataset]:
    """Return scikit-learn's digits, another part of them set aside for testing."""
    from sklearn.datasets import load_digits

    source = load_digits()
    times = SIDE // source.images.shape[1]
    images = np.round(source.images * (255 / 16)).astype(np.uint8).repeat(times, axis=1).repeat(times, axis=2)
    order = np.random.default_rng([seed, 3]).permutation(len(images))
    n_test = round(test_share * len(images))
    whole = ArrayDataset(images[:, None], source.target, [str(name) for name in source.target_names])
    return _part(whole, np.sort(order[n_test:])), _part(whole, np.sort(order[:n_test]))


def grey(num_classes: int) -> nn.Module:
    """Return half of the shipped network for grey images: a study of a hundred models has to end some day."""
    return SmallCNN(1, num_classes, width=16)


def colored(num_classes: int) -> nn.Module:
    """Return the same for images in colour."""
    return SmallCNN(3, num_classes, width=16)


def _some_of_each(labels: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    members = (np.flatnonzero(labels == label) for label in np.unique(labels))
    return np.sort(np.concatenate([rng.permutation(of_class)[:n] for of_class in members]))


def _part(dataset: ArrayDataset, chosen: np.ndarray) -> ArrayDataset:
    names: Sequence[str] = [dataset.names[i] for i in chosen]
    return ArrayDataset(dataset.images[chosen], dataset.labels[chosen], dataset.classes, names)
