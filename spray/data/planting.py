"""Artifacts and biases planted on purpose, for controlled studies: the truth about them is known.

Several act one after the other, in the order in which they are configured (`dataset.plant`, then `dataset.plants`),
each on the training set that those before it left: a later artifact is drawn over an earlier one, chooses its samples
by the labels that a bias before it replaced, and among the samples that one before it left in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spray.data.base import ImageDataset
from spray.data.plant_biases import Bias
from spray.data.plant_defaults import DEFAULTS
from spray.data.plant_kinds import KINDS
from spray.data.plant_options import EVERY, PLACES, Plant, class_index, read_plants

__all__ = [
    "DEFAULTS",
    "KINDS",
    "PLACES",
    "Plant",
    "PlantedDataset",
    "PlantedTruth",
    "class_index",
    "plant_all",
    "planted",
    "planted_truth",
    "read_plants",
]


@dataclass(frozen=True, eq=False)
class PlantedTruth:
    """What only verification, the report and studies may know about what was planted.

    Attributes
    ----------
    plant : Plant
        What was planted.
    samples : ndarray of int64
        Indices, in the training set as it is used, of the samples that are marked or mislabelled.
    class_index, class_name : int or None, str
        Of the class that got it; None and "all" for all.
    kind, rate : str, float
        Of the plant.
    facts : dict
        What else is known, as JSON takes it: `labels_before` and `labels` of mislabelled samples; `which`, `bounds`
        and `left_out` (names) where a kind of sample is missing.
    """

    plant: Plant
    samples: np.ndarray
    class_index: int | None
    class_name: str
    kind: str
    rate: float
    facts: dict[str, Any] = field(default_factory=dict)
    _layer: PlantedDataset | None = None
    _own: np.ndarray | None = None

    @property
    def has_masks(self) -> bool:
        """Whether the artifact is somewhere rather than everywhere alike."""
        kind = KINDS.get(self.kind)
        return not isinstance(kind, Bias) and kind.extent != "global" and len(self.samples) > 0

    def masks(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the opacity (n, H, W) of the artifact on `samples[start:stop]`."""
        if self._layer is None or self._own is None:
            raise ValueError(f"{self.plant.key}: {self.kind} has no masks")
        return self._layer.opacity(self._own[start:stop])


class PlantedDataset(ImageDataset):
    """A dataset in which the chosen training images carry the artifact; otherwise the one it wraps."""

    def __init__(self, dataset: ImageDataset, plant: Plant) -> None:
        self._dataset, self._plant = dataset, plant
        self._marked = np.zeros(len(dataset), dtype=bool)
        self._marked[plant.chosen(dataset.labels)] = True
        self.classes, self.labels, self.names = dataset.classes, dataset.labels, dataset.names
        self.image_shape, self.unreadable = dataset.image_shape, dataset.unreadable
        self.fingerprint = sha256(f"{dataset.fingerprint}:{plant.identity()}".encode()).hexdigest()

    def batch(self, indices: np.ndarray) -> Tensor:
        """Return images (n, C, H, W) in [0, 1], marked where they were chosen."""
        images = self._dataset.batch(indices)
        which = np.flatnonzero(self._marked[indices])
        if len(which):
            images = images.clone()
            images[which] = self._plant.mark(images[which], self._keys(np.asarray(indices)[which]))[0]
        return images

    def opacity(self, indices: np.ndarray) -> Tensor:
        """Return how opaque the artifact is on each pixel (n, H, W); 0 on images that do not carry it."""
        found = torch.zeros(len(indices), *self.image_shape[1:])
        which = np.flatnonzero(self._marked[indices])
        if len(which):
            own = np.asarray(indices)[which]
            found[which] = self._plant.mark(self._dataset.batch(own), self._keys(own))[1]
        return found

    @staticmethod
    def _keys(indices: np.ndarray) -> list[str]:
        return [f"train:{i}" for i in indices]


def plant_all(dataset: ImageDataset, plants: Sequence[Plant]) -> tuple[ImageDataset, list[PlantedTruth]]:
    """Plant one thing after the other.

    Parameters
    ----------
    dataset : ImageDataset
        The training images.
    plants : sequence of Plant
        In the order in which they act.

    Returns
    -------
    dataset : ImageDataset
        With all of it planted; the same object where there was nothing to do.
    truths : list of PlantedTruth
        One for each plant; samples are numbered as in the returned dataset, those that a later one left out are gone.

    Raises
    ------
    UserError
        Where a bias leaves a class without samples.
    """
    truths: list[PlantedTruth] = []
    for plant in plants:
        kind = KINDS.get(plant.kind)
        truth = PlantedTruth(
            plant,
            np.empty(0, dtype=np.int64),
            plant.target,
            EVERY if plant.target is None else dataset.classes[plant.target],
            plant.kind,
            plant.rate,
        )
        if isinstance(kind, Bias):
            biased = kind.put_in(dataset, plant)
            if biased.kept is not None:
                truths = [_renumbered(earlier, len(dataset), biased.kept) for earlier in truths]
            dataset, truth = biased.dataset, replace(truth, samples=biased.samples, facts=biased.facts)
        elif plant.rate > 0:
            samples = plant.chosen(dataset.labels)
            dataset = layer = PlantedDataset(dataset, plant)
            truth = replace(truth, samples=samples, _layer=layer, _own=samples)
        truths.append(truth)
    return dataset, truths


def _renumbered(truth: PlantedTruth, n: int, kept: np.ndarray) -> PlantedTruth:
    """Return a truth for a set of which only the samples `kept`, of `n`, are left."""
    new = np.full(n, -1, dtype=np.int64)
    new[kept] = np.arange(len(kept))
    left = new[truth.samples] >= 0
    facts = {
        key: np.asarray(value)[left].tolist() if key in ("labels_before", "labels") else value
        for key, value in truth.facts.items()
    }
    own = None if truth._own is None else truth._own[left]
    return replace(truth, samples=new[truth.samples[left]], facts=facts, _own=own)


def planted(
    dataset: ImageDataset, options: Mapping[str, Any] | None, more: Sequence[Mapping[str, Any]] | None = None
) -> ImageDataset:
    """Return the training set with `dataset.plant` and `dataset.plants` in it, or unchanged where there is nothing."""
    return plant_all(dataset, read_plants(options, more, dataset.classes, dataset.image_shape))[0]


def planted_truth(options: Mapping[str, Any] | None, dataset: ImageDataset) -> PlantedTruth | None:
    """Return the truth about the artifact of `dataset.plant` alone; None where no sample carries one.

    Parameters
    ----------
    options : mapping or None
        `dataset.plant`.
    dataset : ImageDataset
        The training images, with the artifact in them or without.
    """
    truths = plant_all(dataset, read_plants(options, None, dataset.classes, dataset.image_shape))[1]
    return truths[0] if truths and len(truths[0].samples) else None
