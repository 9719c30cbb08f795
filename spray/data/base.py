"""What a dataset of images is to the rest of the library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spray.errors import UserError


class UnreadableSampleError(UserError):
    """A sample cannot be read, found out when it was used.

    Parameters
    ----------
    index : int
        The sample, as it was asked for.
    reason : str
        What is wrong with it, without its name.
    message : str, optional
        The whole line for the user, with the sample's name.

    Attributes
    ----------
    index : int
        The sample.
    reason : str
        What is wrong with it.
    """

    def __init__(self, index: int, reason: str, message: str | None = None) -> None:
        super().__init__(message or f"sample {index} cannot be read: {reason}")
        self.index, self.reason = index, reason

    def __reduce__(self) -> tuple[Any, ...]:
        # It comes back from worker processes.
        return type(self), (self.index, self.reason, str(self))


class ImageDataset(ABC):
    """Labelled images in pixel space, addressed by index.

    Attributes
    ----------
    classes : tuple of str
        Names of the classes; a label is an index into it.
    labels : ndarray of int64, shape (N,)
        Class of each sample.
    names : sequence of str
        A readable name of each sample: for files the path relative to the dataset's folder.
    image_shape : tuple of int
        (C, H, W) of every image.
    fingerprint : str
        Hash of what the dataset holds; another fingerprint means other data.
    unreadable : sequence of (str, str)
        Name and reason of each sample that was left out because it could not be read.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    names: Sequence[str]
    image_shape: tuple[int, int, int]
    fingerprint: str
    unreadable: Sequence[tuple[str, str]] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def batch(self, indices: np.ndarray) -> Tensor:
        """Return the images at `indices`: float32 (n, C, H, W) in [0, 1], before any normalisation.

        Several threads may call it at once.

        Raises
        ------
        UnreadableSampleError
            If one of them cannot be read.
        """


class Normalizer:
    """Maps pixels in [0, 1] to the input that the model was trained on, and back.

    Parameters
    ----------
    mean, std : sequence of float
        One number for each channel, or one for all.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(list(mean), dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(list(std), dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, pixels: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Return (pixels - mean) / std, on `device` if one is given.

        The way to a GPU is from pinned memory and not waited for.
        """
        if device is not None:
            if torch.device(device).type == "cuda" and pixels.device.type == "cpu":
                pixels = pixels.pin_memory()
            pixels = pixels.to(device, non_blocking=True)
        return (pixels - self.mean.to(pixels.device)) / self.std.to(pixels.device)
