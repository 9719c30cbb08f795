"""What to plant: the options of `dataset.plant` and `dataset.plants`, checked, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spray.data.plant_biases import BY_NAME, MEASURES
from spray.data.plant_defaults import DEFAULTS
from spray.data.plant_kinds import KINDS, Artifact, Color, drawn
from spray.errors import UserError

PLACES = ("top_left", "top_right", "bottom_left", "bottom_right", "center", "random")
EVERY = "all"
"""As a class: the same in all of them."""
RANDOM = "random"
"""As a colour: another one on each image."""
KEY = "dataset.plant"
LIST_KEY = "dataset.plants"


@dataclass(frozen=True)
class Plant:
    """An artifact or a bias to plant: what, on which class, how often, where.

    Attributes
    ----------
    kind : str
        A name in `KINDS`.
    target : int or None
        Index of the class whose training images get it; None: all classes, each at this rate.
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
    color : tuple of float or str
        RGB in [0, 1], where grey images get its luminance; or `RANDOM`.
    strength : float
        How opaque it is, above 0, up to 1.
    to : int or None
        The class that mislabelled samples are said to be of; None: each some other one.
    which : str
        The kind of sample that is missing: a name in `MEASURES`, or ``name:PATTERN``.
    position : int
        0 for `dataset.plant`, 1 and so on for those of `dataset.plants`. Each draws numbers of its own, so that two of
        the same seed do not choose the same images.
    key : str
        Where it was configured; it names the plant in messages and in the truth.
    """

    kind: str
    target: int | None
    rate: float
    seed: int
    place: str
    size: int
    jitter: int
    color: Color | str
    # Not in the representation, and so not in `identity`, unless they are other than usual: fingerprints of datasets
    # from before they existed stay as they were.
    strength: float = field(default=1.0, repr=False)
    to: int | None = field(default=None, repr=False)
    which: str = field(default="dark", repr=False)
    position: int = field(default=0, repr=False)
    key: str = field(default=KEY, repr=False, compare=False)

    @classmethod
    def from_config(
        cls,
        options: Mapping[str, Any] | None,
        classes: Sequence[str] | None,
        shape: tuple[int, int, int] | None,
        position: int = 0,
    ) -> Plant | None:
        """Check `dataset.plant`, or an item of `dataset.plants`, and return the plant, or None for `kind: none`.

        Parameters
        ----------
        options : mapping or None
            Keys as in `DEFAULTS`; `class` is an index, a name or `all`.
        classes : sequence of str or None
            The dataset's classes; None where they are not known yet: then any passes.
        shape : tuple of int or None
            (C, H, W) of its images; None where it is not known yet.
        position : int
            As in `Plant`.

        Raises
        ------
        UserError
            For an unknown key, class or kind, or a value out of range.
        """
        key = KEY if position == 0 else f"{LIST_KEY}[{position - 1}]"
        given = dict(options or {})
        if str(given.get("kind", "none")) in ("none", "None"):
            return None
        if unknown := set(given) - set(DEFAULTS):
            raise UserError(f"{key} has no key {sorted(map(str, unknown))[0]!r}; allowed: {', '.join(DEFAULTS)}")
        merged = DEFAULTS | given
        kind = KINDS.get(merged["kind"])
        side = min(shape[1:]) // 2 if shape else None
        plant = cls(
            kind=merged["kind"],
            target=_target(merged["class"], classes, f"{key}.class"),
            rate=_number(merged, key, "rate", 0.0, 1.0),
            seed=_whole(merged, key, "seed", 0, 2**32 - 1),
            place=_one_of(merged, key, "place", PLACES),
            size=_whole(merged, key, "size", 1, side),
            jitter=_whole(merged, key, "jitter", 0, side),
            color=_color(merged["color"], kind.color if isinstance(kind, Artifact) else (1.0, 1.0, 1.0), key),
            strength=_strength(merged, key, kind.strength if isinstance(kind, Artifact) else 1.0),
            to=_to(merged["to"], classes, f"{key}.to"),
            which=_which(merged["which"], key),
            position=position,
            key=key,
        )
        plant._check_kind(merged, shape)
        return plant

    def _check_kind(self, given: Mapping[str, Any], shape: tuple[int, int, int] | None) -> None:
        """Check what only some kinds have to fulfil."""
        if self.kind == "mislabel" and self.to is not None and self.to == self.target:
            raise UserError(f"{self.key}.to={given['to']} is the class itself; give another one, or none for any other")
        footprint = drawn(self.kind).footprint if self.is_drawn else None
        if shape and footprint:
            height, width = footprint(self)
            if height > shape[1] or width > shape[2]:
                raise UserError(
                    f"{self.key}.size={self.size}: a {self.kind} of that size takes {height}×{width} pixels, the "
                    f"images have {shape[1]}×{shape[2]}; take a smaller size or another kind"
                )

    @property
    def is_drawn(self) -> bool:
        """Whether it is an artifact on images, and no other bias."""
        return isinstance(KINDS.get(self.kind), Artifact)

    @property
    def name(self) -> str:
        """What the plant is called in the truth: `plant`, `plants[0]`, ..."""
        return self.key.partition(".")[2]

    def identity(self) -> str:
        """Return a text that is another one for every other plant."""
        usual = {f.name: f.default for f in fields(self) if not f.repr and f.compare}
        unusual = {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        return f"{self!r}{unusual or ''}"

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

        Raises
        ------
        ValueError
            For a bias that is not drawn on images.
        """
        kind = drawn(self.kind)
        if not len(images):
            return images.clone(), images.new_zeros(0, *images.shape[2:])
        drawings = [
            kind.draw(image, self, self.generator("jitter", key))
            for image, key in zip(images.detach().cpu(), keys, strict=True)
        ]
        content = torch.stack([c for c, _ in drawings]).to(images)
        opacity = torch.stack([o for _, o in drawings]).to(images) * self.strength
        return images + opacity[:, None] * (content - images), opacity

    def targets(self, labels: np.ndarray) -> list[int]:
        """Return the classes that get it, of those that there are samples of."""
        return [int(label) for label in np.unique(labels) if self.target in (None, label)]

    def chosen(self, labels: np.ndarray) -> np.ndarray:
        """Return the indices (sorted, int64) of the training images that get it."""
        found = []
        for label in self.targets(labels):
            members = np.flatnonzero(labels == label)
            rng = self.generator("choice", "" if self.target is not None else label)
            found.append(rng.permutation(members)[: round(self.rate * len(members))])
        return np.sort(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)

    def generator(self, purpose: str, key: Any = "") -> np.random.Generator:
        """Return the plant's own source of random numbers for a purpose."""
        seed = f"{self.seed}/{self.position}" if self.position else str(self.seed)
        digest = sha256(f"{seed}:{purpose}:{key}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def read_plants(
    options: Mapping[str, Any] | None,
    more: Sequence[Any] | None,
    classes: Sequence[str] | None = None,
    shape: tuple[int, int, int] | None = None,
) -> list[Plant]:
    """Check `dataset.plant` and `dataset.plants`; return what is to be planted, in that order.

    Parameters
    ----------
    options : mapping or None
        `dataset.plant`.
    more : sequence of mapping, or None
        `dataset.plants`: the same keys; without a seed of its own an item has that of `dataset.plant`.
    classes, shape
        As in `Plant.from_config`.

    Raises
    ------
    UserError
        For the first mistake that is found.
    """
    items = [_mapping(options, KEY)]
    if more is not None and (isinstance(more, str | Mapping) or not isinstance(more, Sequence)):
        raise UserError(f"{LIST_KEY}={more} is no list; write {LIST_KEY}=[{{kind: box, class: 0}}]")
    seed = {"seed": items[0]["seed"]} if "seed" in items[0] else {}
    for index, item in enumerate(more or ()):
        own = _mapping(item, f"{LIST_KEY}[{index}]")
        if "kind" not in own:
            raise UserError(f"{LIST_KEY}[{index}] has no kind; allowed: {', '.join(KINDS.names())}, none")
        items.append(seed | own)
    plants = [Plant.from_config(item, classes, shape, position) for position, item in enumerate(items)]
    return [plant for plant in plants if plant is not None]


def class_index(value: int | str, classes: Sequence[str], key: str, also: str = "") -> int:
    """Return the index of a class given by name or index; UserError naming `key` if there is none."""
    if str(value) in classes:
        return list(classes).index(str(value))
    if str(value).isdecimal() and int(value) < len(classes):
        return int(value)
    shown = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
    raise UserError(
        f"{key}={value} is no class; allowed: {also}an index from 0 to {len(classes) - 1} or one of {shown}"
    )


def _target(value: Any, classes: Sequence[str] | None, key: str) -> int | None:
    """Return the index of the class, None for all; a class that is called `all` goes first."""
    if str(value) == EVERY and EVERY not in (classes or ()):
        return None
    return 0 if classes is None else class_index(value, classes, key, f"{EVERY}, ")


def _to(value: Any, classes: Sequence[str] | None, key: str) -> int | None:
    return None if value is None or classes is None else class_index(value, classes, key)


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{key}={value} is no mapping; write it as {{kind: box, class: 0}}")
    return dict(value or {})


def _one_of(options: Mapping[str, Any], key: str, name: str, allowed: Sequence[str]) -> str:
    if options[name] not in allowed:
        raise UserError(f"{key}.{name}={options[name]} is unknown; allowed: {', '.join(allowed)}")
    return str(options[name])


def _which(value: Any, key: str) -> str:
    if str(value) not in MEASURES and not str(value).startswith(BY_NAME):
        raise UserError(f"{key}.which={value} is unknown; allowed: {', '.join(MEASURES)}, {BY_NAME}PATTERN")
    return str(value)


def _strength(options: Mapping[str, Any], key: str, usual: float) -> float:
    value = usual if options["strength"] is None else _number(options, key, "strength", 0.0, 1.0)
    if value == 0:
        raise UserError(f"{key}.strength=0 would change nothing; give a number above 0, up to 1, or rate=0")
    return value


def _number(options: Mapping[str, Any], key: str, name: str, low: float, high: float | None) -> float:
    try:
        value = float(options[name])
    except (TypeError, ValueError):
        value = float("nan")
    if not low <= value <= (np.finfo(float).max if high is None else high):
        wanted = f"a number from {low} to {high}" if high is not None else f"a number from {low}"
        raise UserError(f"{key}.{name}={options[name]} is not {wanted}")
    return value


def _whole(options: Mapping[str, Any], key: str, name: str, low: int, high: int | None) -> int:
    value = _number(options, key, name, low, high)
    if not value.is_integer():
        wanted = f"a whole number from {low}" + (f" to {high}" if high is not None else "")
        raise UserError(f"{key}.{name}={options[name]} is not {wanted}")
    return int(value)


def _color(value: Any, usual: Color | str, key: str) -> Color | str:
    if value is None:
        return usual
    if value == RANDOM:
        return RANDOM
    try:
        if isinstance(value, str) or len(value) != 3 or not all(0 <= float(c) <= 1 for c in value):
            raise ValueError
        return float(value[0]), float(value[1]), float(value[2])
    except (TypeError, ValueError):
        raise UserError(
            f"{key}.color={value} must be three numbers in [0, 1]: red, green, blue; or {RANDOM}, or null for the "
            "kind's own"
        ) from None
