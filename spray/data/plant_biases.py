"""Biases that are no artifact on an image: labels that are wrong, a kind of sample that training never saw.

With a small artifact on one class (`spray.data.plant_kinds`) they stand for the three kinds of bias of Hägele et al.,
"Resolving challenges in deep learning-based analyses of histopathological images using explanation methods" (2020): in
the labels of the whole set, correlated with a class, and of the sampling. Adding one means registering a function in
the same registry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spray.data.base import ImageDataset
from spray.data.plant_kinds import KINDS
from spray.data.subset import Subset
from spray.errors import UserError

if TYPE_CHECKING:
    from spray.data.plant_options import Plant

LUMINANCE = (0.2125, 0.7154, 0.0721)
BY_NAME = "name:"
"""What a choice of samples by a pattern of their names begins with."""


@dataclass(frozen=True)
class Biased:
    """A training set with a bias in it.

    Attributes
    ----------
    dataset : ImageDataset
        The biased set.
    samples : ndarray of int64
        Those of its samples that the bias changed.
    kept : ndarray of int64, optional
        Where some were left out: the samples of the set before that are its samples now.
    facts : dict
        What else is to be known about it, as JSON takes it.
    """

    dataset: ImageDataset
    samples: np.ndarray
    kept: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bias:
    """A kind of bias: a function that puts it into a training set, and which options count besides class and rate."""

    put_in: Callable[[ImageDataset, Plant], Biased]
    uses: tuple[str, ...]


class Relabelled(ImageDataset):
    """A dataset with other labels."""

    def __init__(self, dataset: ImageDataset, labels: np.ndarray) -> None:
        self._dataset = dataset
        self.classes, self.names = dataset.classes, dataset.names
        self.labels = np.asarray(labels, dtype=np.int64)
        self.image_shape, self.unreadable = dataset.image_shape, dataset.unreadable
        self.fingerprint = sha256(dataset.fingerprint.encode() + self.labels.astype("<i8").tobytes()).hexdigest()

    def batch(self, indices: np.ndarray) -> Tensor:
        """Return the images at `indices`: float32 (n, C, H, W) in [0, 1]."""
        return self._dataset.batch(indices)


def _mislabel(dataset: ImageDataset, plant: Plant) -> Biased:
    """Replace the labels of a share of the samples: by `to`, or each by some other class."""
    labels = np.asarray(dataset.labels, dtype=np.int64)
    samples = plant.chosen(labels)
    rng = plant.generator("label")
    if plant.to is None:
        # Any of the others, each as likely.
        wrong = (labels[samples] + rng.integers(1, len(dataset.classes), len(samples))) % len(dataset.classes)
    else:
        samples = samples[labels[samples] != plant.to]
        wrong = np.full(len(samples), plant.to)
    replaced = labels.copy()
    replaced[samples] = wrong
    _require_all(dataset, replaced, plant)
    facts = {"labels_before": labels[samples].tolist(), "labels": wrong.tolist()}
    return Biased(Relabelled(dataset, replaced) if len(samples) else dataset, samples, facts=facts)


def _missing(dataset: ImageDataset, plant: Plant) -> Biased:
    """Leave out those samples of the class that are of a kind, as many as the rate says."""
    labels = np.asarray(dataset.labels)
    out: list[np.ndarray] = []
    bounds: dict[str, float | None] = {}
    for label in plant.targets(labels):
        members = np.flatnonzero(labels == label)
        if plant.which.startswith(BY_NAME):
            alike = members[_named(dataset, members, plant.which)]
            out.append(plant.generator("choice", label).permutation(alike)[: round(plant.rate * len(alike))])
        else:
            values = _measured(dataset, members, plant.which)
            first = np.argsort(values, kind="stable")[: round(plant.rate * len(members))]
            out.append(members[first])
            bounds[dataset.classes[int(label)]] = float(values[first].max()) if len(first) else None
    left_out = np.sort(np.concatenate(out)) if out else np.empty(0, dtype=np.int64)
    if plant.rate > 0 and plant.which.startswith(BY_NAME) and not len(left_out):
        raise UserError(f"{plant.key}.which={plant.which} leaves nothing out: no sample of the class has such a name")
    kept = np.setdiff1d(np.arange(len(dataset)), left_out)
    _require_all(dataset, labels[kept], plant)
    facts = {"which": plant.which, "bounds": bounds, "left_out": [str(dataset.names[int(i)]) for i in left_out]}
    nothing = np.empty(0, dtype=np.int64)
    return Biased(Subset(dataset, kept) if len(left_out) else dataset, nothing, kept, facts)


KINDS.register("mislabel")(Bias(_mislabel, ("to",)))
KINDS.register("missing")(Bias(_missing, ("which",)))


def of_kind(dataset: ImageDataset, plant: Plant, facts: dict[str, Any]) -> np.ndarray:
    """Return which samples (sorted, int64) of a set, such as the test images, are of the kind that training lacks.

    Parameters
    ----------
    dataset : ImageDataset
        Images of the same classes.
    plant : Plant
        Of kind `missing`.
    facts : dict
        What was known when it was planted: how far the kind reaches.
    """
    found = []
    for label in plant.targets(dataset.labels):
        members = np.flatnonzero(dataset.labels == label)
        if plant.which.startswith(BY_NAME):
            found.append(members[_named(dataset, members, plant.which)])
        elif (bound := facts["bounds"].get(dataset.classes[label])) is not None:
            found.append(members[_measured(dataset, members, plant.which) <= bound])
    return np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)


def _named(dataset: ImageDataset, members: np.ndarray, which: str) -> np.ndarray:
    pattern = which.removeprefix(BY_NAME)
    return np.array([fnmatchcase(str(dataset.names[i]), pattern) for i in members], dtype=bool)


def _measured(dataset: ImageDataset, members: np.ndarray, which: str) -> np.ndarray:
    """Return a number for each sample, the smaller the more it is of the kind."""
    measure = MEASURES[which]
    parts = [measure(dataset.batch(members[start : start + 256])) for start in range(0, len(members), 256)]
    return torch.cat(parts).double().numpy() if parts else np.empty(0)


def _luminance(images: Tensor) -> Tensor:
    """Return the luminance (n, H, W) of images (n, C, H, W)."""
    if images.shape[1] != 3:
        return images.mean(dim=1)
    return (images * torch.tensor(LUMINANCE)[:, None, None]).sum(dim=1)


def _brightness(images: Tensor) -> Tensor:
    return _luminance(images).mean(dim=(1, 2))


def _contrast(images: Tensor) -> Tensor:
    return _luminance(images).flatten(1).std(dim=1)


def _colorfulness(images: Tensor) -> Tensor:
    return (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2))


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "dark": _brightness,
    "bright": lambda images: -_brightness(images),
    "flat": _contrast,
    "busy": lambda images: -_contrast(images),
    "grey": _colorfulness,
    "colorful": lambda images: -_colorfulness(images),
}
"""The kinds of samples that are told by a property of the image; those with the smallest number are left out first."""


def _require_all(dataset: ImageDataset, labels: np.ndarray, plant: Plant) -> None:
    """Refuse a bias that leaves a class without training images."""
    left = np.bincount(labels, minlength=len(dataset.classes))
    lost = (np.bincount(dataset.labels, minlength=len(dataset.classes)) > 0) & (left == 0)
    if lost.any():
        name = dataset.classes[int(lost.argmax())]
        raise UserError(
            f"{plant.key}.rate={plant.rate} leaves no training image of class {name!r}; every class needs some: take a "
            "smaller rate"
        )
