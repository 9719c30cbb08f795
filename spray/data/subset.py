"""A part of a dataset, for trying things out."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
from torch import Tensor

from spray.data.base import ImageDataset, UnreadableSampleError


class Subset(ImageDataset):
    """Some samples of a dataset, numbered anew.

    Parameters
    ----------
    dataset : ImageDataset
        The whole.
    indices : ndarray of int
        Its samples that are kept, in their new order.
    """

    def __init__(self, dataset: ImageDataset, indices: np.ndarray) -> None:
        self._dataset, self._indices = dataset, np.asarray(indices, dtype=np.int64)
        self.classes, self.image_shape, self.unreadable = dataset.classes, dataset.image_shape, dataset.unreadable
        self.labels = dataset.labels[self._indices]
        self.names = [dataset.names[i] for i in self._indices]
        self.fingerprint = sha256(dataset.fingerprint.encode() + self._indices.tobytes()).hexdigest()

    def batch(self, indices: np.ndarray) -> Tensor:
        """Return the images at `indices`: float32 (n, C, H, W) in [0, 1]."""
        try:
            return self._dataset.batch(self._indices[indices])
        except UnreadableSampleError as error:
            asked = np.asarray(indices, dtype=np.int64)
            own = int(asked[self._indices[asked] == error.index][0])
            raise UnreadableSampleError(own, error.reason, str(error)) from None


def per_class(dataset: ImageDataset, most: int | None) -> ImageDataset:
    """Return the dataset with at most so many samples of each class, spread evenly; None keeps all."""
    if most is None:
        return dataset
    kept = []
    for label in range(len(dataset.classes)):
        members = np.flatnonzero(dataset.labels == label)
        kept.append(members[even_sample(len(members), most)])
    return Subset(dataset, np.sort(np.concatenate(kept)))


def even_sample(n: int, most: int) -> np.ndarray:
    """Return up to `most` of the numbers below `n`, spread evenly, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64)) if n else np.empty(0, dtype=np.int64)
