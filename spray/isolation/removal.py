"""Taking an artifact away: in-painting what hides the image, undoing what only changed it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from spray.isolation.artifact import Artifact

LARGEST_HOLE = 0.25
"""Share of the image above which a hole is filled with what such images typically show: in-painting would invent."""
SIDE = 64
"""Images with longer sides are in-painted at this size: the equations have as many unknowns as the hole has pixels."""
HIDDEN = 0.05
"""Opacity above which a pixel is in-painted."""


@runtime_checkable
class Reversible(Protocol):
    """An artifact that can be undone: the image shows through it."""

    @property
    def drawn(self) -> bool:
        """Whether it has edges: then what lies behind it is better continued from around it."""
        ...

    def without(self, images: Tensor) -> Tensor:
        """Return images (n, C, H, W) with it undone."""
        ...


def removed(artifact: Artifact, images: Tensor, typical: Tensor) -> Tensor:
    """Return images without the artifact: in-painted where it is found, or with the change undone.

    Parameters
    ----------
    artifact : Artifact
        What to remove.
    images : Tensor
        (n, C, H, W) in [0, 1].
    typical : Tensor
        (C, H, W): what images of the class without the artifact typically show.

    Returns
    -------
    Tensor
        (n, C, H, W).
    """
    if isinstance(artifact, Reversible) and is_undone(artifact):
        return artifact.without(images)
    return filled(images, artifact.found(images), typical)


def is_undone(artifact: Artifact) -> bool:
    """Return whether an artifact is removed by undoing it rather than by in-painting.

    How opaque something drawn is can't be told well where its samples show it turned or cut off differently.
    """
    return isinstance(artifact, Reversible) and not artifact.drawn


def elsewhere(masks: Tensor, seed: int) -> Tensor:
    """Return masks (n, 1, H, W), each moved by at least a quarter of the image, around its border if need be."""
    rng = np.random.default_rng([seed, 5])
    height, width = masks.shape[2:]
    rolled = []
    for mask in masks:
        dy, dx = (int(rng.integers(-(-side // 4), side - side // 4 + 1)) for side in (height, width))
        rolled.append(mask.roll((dy, dx), dims=(1, 2)))
    return torch.stack(rolled) if rolled else masks


def filled(images: Tensor, masks: Tensor, typical: Tensor) -> Tensor:
    """Fill the holes that masks make in images.

    By biharmonic functions (Damelin and Hoang, "On surface completion and image inpainting by biharmonic functions",
    2018) as scikit-image has them; holes of more than `LARGEST_HOLE` of the image by what is typical.

    Parameters
    ----------
    images : Tensor
        (n, C, H, W) in [0, 1].
    masks : Tensor
        (n, 1, H, W).
    typical : Tensor
        (C, H, W).
    """
    holes = masks > HIDDEN
    new = torch.stack([_fill(image, hole[0], typical) for image, hole in zip(images, holes, strict=True)])
    return torch.where(holes.to(images.device), new, images)


def _fill(image: Tensor, hole: Tensor, typical: Tensor) -> Tensor:
    """Return one image (C, H, W) with its hole (H, W) filled."""
    from skimage.restoration import inpaint_biharmonic

    share = float(hole.float().mean())
    if share == 0:
        return image
    if share > LARGEST_HOLE:
        return typical.to(image)
    factor = -(-max(hole.shape) // SIDE)
    small, low = image, hole
    if factor > 1:
        # Means over what is left of the image alone.
        left = (~hole).to(image)[None, None]
        weight = nn.functional.avg_pool2d(left, factor, ceil_mode=True)
        small = (nn.functional.avg_pool2d(image[None] * left, factor, ceil_mode=True) / weight.clamp_min(1e-6))[0]
        low = weight[0, 0] < 1e-6
        if not low.any():
            return nn.functional.interpolate(small[None], size=hole.shape, mode="bilinear")[0]
    whole = inpaint_biharmonic(small.permute(1, 2, 0).double().cpu().numpy(), low.cpu().numpy(), channel_axis=2)
    new = torch.from_numpy(np.ascontiguousarray(whole.clip(0, 1).transpose(2, 0, 1))).to(image)
    return new if factor == 1 else nn.functional.interpolate(new[None], size=hole.shape, mode="bilinear")[0]
