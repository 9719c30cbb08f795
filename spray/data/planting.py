"""Artifacts planted on purpose, for controlled studies: the truth about them is known.

A kind of artifact is a function that marks one image; adding a kind means registering a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from spray.data.base import ImageDataset
from spray.data.plant_defaults import DEFAULTS
from spray.errors import UserError
from spray.registry import Registry

PLACES = ("top_left", "top_right", "bottom_left", "bottom_right", "center", "random")


class Marker(Protocol):
    """Draws an artifact: returns its content (C, H, W) and its opacity (H, W), both in [0, 1]."""

    def __call__(self, shape: tuple[int, int, int], plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draw on a canvas of `shape` (C, H, W)."""
        ...


KINDS: Registry[Marker] = Registry("kind of planted artifact")


@dataclass(frozen=True)
class Plant:
    """An artifact to plant: what, on which class, how often, where.

    Attributes
    ----------
    kind : str
        A name in `KINDS`.
    target : int
        Index of the class whose training images get it.
    rate : float
        Share of that class's training images, in [0, 1].
    seed : int
        Chooses the images and each image's jitter.
    place : str
        One of `PLACES`; "random" means anywhere, each position as likely as any other, whatever the jitter. A frame
        ignores it.
    size : int
        Side of the artifact (thickness of a frame) in pixels.
    jitter : int
        Each image's artifact is moved by up to so many pixels in both directions.
    color : tuple of float
        RGB in [0, 1]; grey images get its luminance.
    """

    kind: str
    target: int
    rate: float
    seed: int
    place: str
    size: int
    jitter: int
    color: tuple[float, float, float]

    @classmethod
    def from_config(
        cls, options: Mapping[str, Any] | None, classes: Sequence[str], shape: tuple[int, int, int]
    ) -> Plant | None:
        """Check `dataset.plant` and return the plant, or None for `kind: none`.

        Parameters
        ----------
        options : mapping or None
            Keys as in `DEFAULTS`; `class` is an index or a name.
        classes : sequence of str
            The dataset's classes.
        shape : tuple of int
            (C, H, W) of its images.

        Raises
        ------
        UserError
            For an unknown key, class or kind, or a value out of range.
        """
        given = dict(options or {})
        if str(given.get("kind", "none")) in ("none", "None"):
            return None
        if unknown := set(given) - set(DEFAULTS):
            raise UserError(f"dataset.plant has no key {sorted(unknown)[0]!r}; allowed: {', '.join(DEFAULTS)}")
        merged = DEFAULTS | given
        KINDS.get(merged["kind"])
        place, color = merged["place"], merged["color"]
        if place not in PLACES:
            raise UserError(f"dataset.plant.place={place} is unknown; allowed: {', '.join(PLACES)}")
        if not _is_color(color):
            raise UserError(f"dataset.plant.color={color} must be three numbers in [0, 1]: red, green, blue")
        side = min(shape[1:])
        return cls(
            kind=merged["kind"],
            target=class_index(merged["class"], classes, "dataset.plant.class"),
            rate=_number(merged, "rate", 0.0, 1.0),
            seed=_whole(merged, "seed", 0, 2**32 - 1),
            place=place,
            size=_whole(merged, "size", 1, side // 2),
            jitter=_whole(merged, "jitter", 0, side // 2),
            color=(float(color[0]), float(color[1]), float(color[2])),
        )

    def mark(self, images: Tensor, keys: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Put the artifact on images.

        Parameters
        ----------
        images : Tensor
            (n, C, H, W) in [0, 1].
        keys : sequence
            One for each image; image and key decide the jitter, together with the seed.

        Returns
        -------
        marked : Tensor
            (n, C, H, W).
        opacity : Tensor
            (n, H, W): where each image was changed, and how strongly.
        """
        marker = KINDS.get(self.kind)
        shape = (images.shape[1], images.shape[2], images.shape[3])
        drawn = [marker(shape, self, self._rng("jitter", key)) for key in keys]
        content = torch.stack([c for c, _ in drawn]).to(images)
        opacity = torch.stack([o for _, o in drawn]).to(images)
        return images + opacity[:, None] * (content - images), opacity

    def chosen(self, labels: np.ndarray) -> np.ndarray:
        """Return the indices (sorted, int64) of the training images that get the artifact."""
        members = np.flatnonzero(labels == self.target)
        n = round(self.rate * len(members))
        return np.sort(self._rng("choice").permutation(members)[:n])

    def _rng(self, purpose: str, key: Any = "") -> np.random.Generator:
        digest = sha256(f"{self.seed}:{purpose}:{key}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little"))


@dataclass(frozen=True)
class PlantedTruth:
    """What only verification and the report may know about a planted artifact."""

    plant: Plant
    samples: np.ndarray
    """Indices of the marked training samples."""
    class_index: int
    class_name: str
    kind: str
    rate: float


class PlantedDataset(ImageDataset):
    """A dataset in which the chosen training images carry the artifact; otherwise the one it wraps."""

    def __init__(self, dataset: ImageDataset, plant: Plant) -> None:
        self._dataset, self._plant = dataset, plant
        self._marked = np.zeros(len(dataset), dtype=bool)
        self._marked[plant.chosen(dataset.labels)] = True
        self.classes, self.labels, self.names = dataset.classes, dataset.labels, dataset.names
        self.image_shape, self.unreadable = dataset.image_shape, dataset.unreadable
        self.fingerprint = sha256(f"{dataset.fingerprint}:{plant}".encode()).hexdigest()

    def batch(self, indices: np.ndarray) -> Tensor:
        """Return images (n, C, H, W) in [0, 1], marked where they were chosen."""
        images = self._dataset.batch(indices)
        which = np.flatnonzero(self._marked[indices])
        if len(which):
            images = images.clone()
            images[which] = self._plant.mark(images[which], [f"train:{i}" for i in np.asarray(indices)[which]])[0]
        return images


def planted(dataset: ImageDataset, options: Mapping[str, Any] | None) -> ImageDataset:
    """Return the training set with the artifact of `dataset.plant` in it, or unchanged where there is none."""
    plant = Plant.from_config(options, dataset.classes, dataset.image_shape)
    return dataset if plant is None or plant.rate == 0 else PlantedDataset(dataset, plant)


def planted_truth(options: Mapping[str, Any] | None, dataset: ImageDataset) -> PlantedTruth | None:
    """Return the truth about the planted artifact; None where nothing was planted."""
    plant = Plant.from_config(options, dataset.classes, dataset.image_shape)
    if plant is None or not len(samples := plant.chosen(dataset.labels)):
        return None
    return PlantedTruth(plant, samples, plant.target, dataset.classes[plant.target], plant.kind, plant.rate)


def class_index(value: int | str, classes: Sequence[str], key: str) -> int:
    """Return the index of a class given by name or index; UserError naming `key` if there is none."""
    if str(value) in classes:
        return list(classes).index(str(value))
    if str(value).isdecimal() and int(value) < len(classes):
        return int(value)
    shown = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
    raise UserError(f"{key}={value} is no class; allowed: an index from 0 to {len(classes) - 1} or one of {shown}")


def _number(options: Mapping[str, Any], key: str, low: float, high: float) -> float:
    try:
        value = float(options[key])
    except (TypeError, ValueError):
        value = float("nan")
    if not low <= value <= high:
        raise UserError(f"dataset.plant.{key}={options[key]} is not a number from {low} to {high}")
    return value


def _whole(options: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = _number(options, key, low, high)
    if not value.is_integer():
        raise UserError(f"dataset.plant.{key}={options[key]} is not a whole number from {low} to {high}")
    return int(value)


def _is_color(value: Any) -> bool:
    try:
        return not isinstance(value, str) and len(value) == 3 and all(0 <= float(c) <= 1 for c in value)
    except (TypeError, ValueError):
        return False


def _color(plant: Plant, channels: int) -> Tensor:
    rgb = torch.tensor(plant.color)
    return rgb if channels == 3 else (rgb @ torch.tensor([0.2125, 0.7154, 0.0721])).expand(channels)


def _corner(plant: Plant, shape: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Return top and left of a square of the plant's size: its place, one pixel inside, with jitter."""
    _, height, width = shape
    free_y, free_x = height - plant.size, width - plant.size
    if plant.place == "random":
        return int(rng.integers(free_y + 1)), int(rng.integers(free_x + 1))
    vertical, _, horizontal = plant.place.partition("_")
    top = {"top": 1, "bottom": free_y - 1}.get(vertical, free_y // 2)
    left = {"left": 1, "right": free_x - 1}.get(horizontal, free_x // 2)
    dy, dx = rng.integers(-plant.jitter, plant.jitter + 1, size=2)
    return int(np.clip(top + dy, 0, free_y)), int(np.clip(left + dx, 0, free_x))


def _square(
    shape: tuple[int, int, int], plant: Plant, rng: np.random.Generator, stamp: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Draw a square stamp: the plant's colour where `stamp` is 1, black where it is 0."""
    top, left = _corner(plant, shape, rng)
    rows, columns = slice(top, top + plant.size), slice(left, left + plant.size)
    content, opacity = torch.zeros(shape), torch.zeros(shape[1:])
    content[:, rows, columns] = _color(plant, shape[0])[:, None, None] * stamp(plant.size)
    opacity[rows, columns] = 1
    return content, opacity


@KINDS.register("tag")
def tag(shape: tuple[int, int, int], plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a little tag: a coloured square with a dark cross in it."""

    def stamp(size: int) -> Tensor:
        line = torch.arange(size)
        inner = (line > 0) & (line < size - 1)
        crossed = (line[:, None] == line) | (line[:, None] + line == size - 1)
        return (~(crossed & inner[:, None] & inner)).float()

    return _square(shape, plant, rng, stamp)


@KINDS.register("box")
def box(shape: tuple[int, int, int], plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a box of one colour."""
    return _square(shape, plant, rng, lambda size: torch.ones(size, size))


@KINDS.register("frame")
def frame(shape: tuple[int, int, int], plant: Plant, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a frame along the border; jitter changes its thickness."""
    thickness = max(1, plant.size + int(rng.integers(-plant.jitter, plant.jitter + 1)))
    opacity = torch.ones(shape[1:])
    opacity[thickness:-thickness, thickness:-thickness] = 0
    return _color(plant, shape[0])[:, None, None].expand(shape).clone(), opacity
