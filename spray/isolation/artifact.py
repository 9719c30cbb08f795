"""What an isolated artifact is: it can be added to images, found in them, and says how well an image matches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from spray.isolation.alignment import exact, match, match_anywhere, shifted
from spray.registry import Registry

SIDE = 64
"""Images with longer sides are matched at this size."""
OPAQUE = 0.9
"""Opacity from which on a pixel is matched: through an edge the image shows, which differs from one to the next."""


@dataclass(frozen=True)
class Artifact:
    """An isolated candidate with a place of its own, the same content each time.

    Kinds that are something else derive from it; what they all can do is `add`, `insert`, `placed`, `found`, `score`.

    Attributes
    ----------
    mask : Tensor
        (H, W) in [0, 1]: the artifact's opacity at its usual place, with the soft edges that its samples show.
    pattern : Tensor
        (C, H, W) in [0, 1]: its content there.
    shifts : Tensor of int64
        (n, 2): by how far it was moved in the samples it was isolated from.
    scale : float
        Typical distance of the rest of the class from the pattern; the unit of the score.
    radius : int
        Largest shift looked for.
    constant : bool
        Whether the samples share the same content there, or only the place.
    """

    kind: ClassVar[str] = "local"
    exact: ClassVar[bool] = True
    """Whether a score of 1 says that an image shows it exactly; or as much as its samples typically do."""

    mask: Tensor
    pattern: Tensor
    shifts: Tensor
    scale: float
    radius: int
    constant: bool

    @property
    def core(self) -> Tensor:
        """Where (H, W) its content is always the same: the mask without soft edges, if anything is left of it then."""
        core = self.mask * (self.mask >= OPAQUE)
        return core if core.any() else self.mask

    @property
    def bound_to_a_place(self) -> bool:
        """Whether it could as well lie elsewhere: then it can be tried there too."""
        return float((self.mask > 0.05).float().mean()) <= 0.5

    @property
    def opacity(self) -> float:
        """How opaque it is where it is most so: robustly, the 90 % quantile within its mask."""
        inside = self.mask[self.mask > 0.05]
        return float(inside.quantile(0.9)) if len(inside) else 0.0

    @property
    def replaced(self) -> float:
        """How much of an image it takes the place of: its opacity, on average over all pixels."""
        return float(self.mask.mean())

    def found(self, images: Tensor) -> Tensor:
        """Return the mask (n, 1, H, W) at the place where each image (n, C, H, W) matches the pattern best."""
        return self._moved(-self._shift(images))

    def score(self, images: Tensor) -> Tensor:
        """Return how well images match: 1 is the pattern itself, 0 as far from it as the rest of the class.

        Parameters
        ----------
        images : Tensor
            (n, C, H, W) in [0, 1].

        Returns
        -------
        Tensor
            (n,), at most 1.
        """
        return 1 - self._match(images)[0].sqrt() / self.scale

    def add(self, images: Tensor, draws: np.ndarray) -> tuple[Tensor, Tensor]:
        """Add the artifact to images, each time as one of the samples showed it.

        Parameters
        ----------
        images : Tensor
            (n, C, H, W) in [0, 1].
        draws : ndarray of int
            (n,), at least 0: which variant (place, donor) each image gets, modulo their number.

        Returns
        -------
        images : Tensor
            (n, C, H, W).
        opacity : Tensor
            (n, 1, H, W): where they were changed, and how strongly.
        """
        mask, pattern = self.placed(draws)
        mask = mask.to(images)
        return images + mask * (pattern.to(images) - images), mask

    def insert(self, images: Tensor, draws: np.ndarray, content: Tensor | None = None) -> Tensor:
        """Add the artifact to images, or in its place, as strongly, something else.

        Parameters
        ----------
        images, draws
            As of `add`.
        content : Tensor, optional
            (n, C, H, W): images to take the content from instead of the pattern, from the very same place.

        Returns
        -------
        Tensor
            (n, C, H, W).
        """
        if content is None:
            return self.add(images, draws)[0]
        mask = self.placed(draws)[0].to(images)
        return images + mask * (content.to(images) - images)

    def placed(self, draws: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return masks (n, 1, H, W) and patterns (n, C, H, W), each moved by the shift that was drawn for it."""
        moved = -self.shifts[torch.from_numpy(np.asarray(draws) % len(self.shifts))]
        return self._moved(moved), shifted(self.pattern.expand(len(moved), -1, -1, -1), moved, self.radius)

    def _moved(self, shift: Tensor) -> Tensor:
        """Return masks (n, 1, H, W), moved; unlike an image a mask is not continued beyond the border."""
        return moved_masks(self.mask.expand(len(shift), -1, -1), shift, self.radius)

    def _shift(self, images: Tensor) -> Tensor:
        """Return where (n, 2) each image matches best, to the pixel."""
        return exact(images, self._match(images)[1], self.pattern, self.core, smaller(images)[1], self.radius)

    def _match(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return each image's distance (n,) from the pattern and the shift (n, 2) at which it is smallest."""
        small, factor = smaller(images)
        mask, pattern = smaller(self.core[None, None])[0][0, 0], smaller(self.pattern[None])[0][0]
        distance, shift = match(small, pattern, mask, -(-self.radius // factor))
        return distance, (shift * factor).clamp(-self.radius, self.radius)


ARTIFACTS: Registry[type[Artifact]] = Registry("kind of isolated artifact")
"""The classes of artifacts by their kind, so that they can be read from disk."""
ARTIFACTS.register("local")(Artifact)


@ARTIFACTS.register("scattered")
@dataclass(frozen=True)
class Scattered(Artifact):
    """An artifact of constant content that may lie anywhere: its mask and pattern stand in the middle of the image."""

    kind: ClassVar[str] = "scattered"

    @property
    def bound_to_a_place(self) -> bool:
        """It is nowhere more than elsewhere."""
        return False

    def _shift(self, images: Tensor) -> Tensor:
        return self._match(images)[1]  # at full size already

    def _match(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return match_anywhere(images, self.pattern, self.core)


def moved_masks(masks: Tensor, shift: Tensor, radius: int) -> Tensor:
    """Return masks (n, 1, H, W), of masks (n, H, W), moved as images are by `shifted`; empty beyond the border."""
    height, width = masks.shape[1:]
    wide = nn.functional.pad(masks[:, None], (radius,) * 4)
    return shifted(wide, shift, radius)[:, :, radius : radius + height, radius : radius + width]


def smaller(images: Tensor) -> tuple[Tensor, int]:
    """Return images averaged down to at most `SIDE`, and the factor."""
    factor = -(-max(images.shape[2:]) // SIDE)
    return (images, 1) if factor == 1 else (nn.functional.avg_pool2d(images, factor, ceil_mode=True), factor)
