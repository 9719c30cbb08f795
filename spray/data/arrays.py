"""Datasets that lie in memory as one array."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spray.data.base import ImageDataset


class ArrayDataset(ImageDataset):
    """Images held in one array of bytes.

    Parameters
    ----------
    images : ndarray of uint8, shape (N, C, H, W)
        The pixels; 255 is the brightest.
    labels : array_like of int, shape (N,)
        Class of each image, in [0, len(classes)).
    classes : sequence of str
        Names of the classes.
    names : sequence of str, optional
        A readable name of each image; the index with leading zeros if not given.

    Raises
    ------
    ValueError
        If shapes, types or labels do not fit together.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | Sequence[int],
        classes: Sequence[str],
        names: Sequence[str] | None = None,
    ) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = tuple(classes)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 (N, C, H, W), not {images.dtype} {images.shape}")
        if self.labels.shape != (len(images),):
            raise ValueError(f"{len(images)} images need as many labels, not {self.labels.shape}")
        if len(images) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(f"labels must lie in [0, {len(self.classes)})")
        width = len(str(max(len(images) - 1, 0)))
        self.names = [f"{index:0{width}d}" for index in range(len(images))] if names is None else names
        if len(self.names) != len(images):
            raise ValueError(f"{len(images)} images need as many names, not {len(self.names)}")
        self.images = np.ascontiguousarray(images)
        self.image_shape = (images.shape[1], images.shape[2], images.shape[3])
        self.fingerprint = self._hash()

    def batch(self, indices: np.ndarray) -> Tensor:
        """Return the images at `indices`: float32 (n, C, H, W) in [0, 1]."""
        return torch.from_numpy(self.images[np.asarray(indices, dtype=np.int64)]).float().div_(255)

    def _hash(self) -> str:
        # The shape belongs to it: arrays of other shapes can have the same bytes.
        header = json.dumps([self.images.shape, self.classes])
        digest = hashlib.sha256(header.encode())
        digest.update(self.images.reshape(-1).data)
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()
