"""Isolating what a cluster of heatmaps has in common: where (mask), what (pattern) and in which samples (score)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from spray.isolation.alignment import congeal, match, shifted

SIDE = 64
"""Images with longer sides are matched at this size."""

CONSISTENT = 0.3
"""A pixel belongs to the artifact where the cluster's images differ from the pattern by less than this share of
what the rest of the class differs from it by."""

VISIBLE = 0.04
"""... and where the rest of the class differs from the pattern by at least so much, in units of the pixel range."""


CARRIED = 0.75
"""Share of the cluster's samples in which a pixel has to be constant."""

LARGEST = 0.5
"""An artifact covers at most so much of the image: what covers more is another image, not an addition to one."""


@dataclass(frozen=True)
class Artifact:
    """An isolated candidate.

    Attributes
    ----------
    mask : Tensor
        (H, W) in [0, 1]: the artifact's opacity at its usual place.
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

    mask: Tensor
    pattern: Tensor
    shifts: Tensor
    scale: float
    radius: int
    constant: bool

    def found(self, images: Tensor) -> Tensor:
        """Return the mask (n, 1, H, W) at the place where each image (n, C, H, W) matches the pattern best."""
        return self._moved(-self._match(images)[1])

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

    def insert(self, images: Tensor, draws: np.ndarray, content: Tensor | None = None) -> Tensor:
        """Add the artifact to images, each time moved by one of the shifts that were seen.

        Parameters
        ----------
        images : Tensor
            (n, C, H, W) in [0, 1].
        draws : ndarray of int
            (n,), at least 0: which of the shifts to take, modulo their number.
        content : Tensor, optional
            (n, C, H, W): images to take the content from instead of the pattern, from the very same place.

        Returns
        -------
        Tensor
            (n, C, H, W).
        """
        mask, pattern = self.placed(draws)
        return images + mask.to(images) * ((pattern if content is None else content).to(images) - images)

    def placed(self, draws: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return masks (n, 1, H, W) and patterns (n, C, H, W), each moved by the shift that was drawn for it."""
        moved = -self.shifts[torch.from_numpy(np.asarray(draws) % len(self.shifts))]
        return self._moved(moved), shifted(self.pattern.expand(len(moved), -1, -1, -1), moved, self.radius)

    def _moved(self, shift: Tensor) -> Tensor:
        """Return masks (n, 1, H, W), moved; unlike an image a mask is not continued beyond the border."""
        height, width = self.mask.shape
        margin = self.radius
        wide = nn.functional.pad(self.mask[None, None], (margin,) * 4)
        moved = shifted(wide.expand(len(shift), -1, -1, -1), shift, margin)
        return moved[:, :, margin : margin + height, margin : margin + width]

    def _match(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return each image's distance (n,) from the pattern and the shift (n, 2) at which it is smallest."""
        small, factor = _smaller(images)
        mask, pattern = _smaller(self.mask[None, None])[0][0, 0], _smaller(self.pattern[None])[0][0]
        distance, shift = match(small, pattern, mask, -(-self.radius // factor))
        return distance, (shift * factor).clamp(-self.radius, self.radius)


def isolate(images: Tensor, relevance: Tensor, other_images: Tensor, other_relevance: Tensor) -> Artifact | None:
    """Isolate what the samples of a cluster share and the rest of their class does not have.

    Parameters
    ----------
    images : Tensor
        (n, C, H, W) in [0, 1], the cluster's.
    relevance : Tensor
        (n, H, W): their heatmaps.
    other_images, other_relevance : Tensor
        The same for other samples of the class.

    Returns
    -------
    Artifact or None
        None if there is no place where the cluster has more relevance than the rest.
    """
    radius = max(1, round(min(images.shape[2:]) / 10))
    region = _salient(relevance_gain(relevance, other_relevance))
    if not region.any():
        return None
    around = torch.from_numpy(ndimage.binary_dilation(region.numpy(), iterations=radius)).float()
    pattern, shift, other_shift = _align(images, other_images, around, radius)
    gain = relevance_gain(
        shifted(relevance[:, None], shift, radius)[:, 0], shifted(other_relevance[:, None], other_shift, radius)[:, 0]
    )
    spread = _differences(shifted(images, shift, radius), pattern, CARRIED)
    distance = _differences(shifted(other_images, other_shift, radius), pattern, 0.5)
    constant = (distance > VISIBLE) & (spread < CONSISTENT * distance)
    mask, is_constant = _grow(_salient(gain) if (gain > 0).any() else region, constant, gain)
    unscaled = Artifact(mask, pattern, shift, 1.0, radius, is_constant)
    scale = float((1 - unscaled.score(other_images)).median())
    return replace(unscaled, scale=max(scale, 1e-6))


def _align(images: Tensor, other_images: Tensor, around: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pattern that the images share (C, H, W), their shifts and those at which the others come closest."""
    small, factor = _smaller(images)
    where = (_smaller(around[None, None])[0][0, 0] > 0).float()
    _, shift = congeal(small, where, -(-radius // factor))
    shift = (shift * factor).clamp(-radius, radius)
    pattern = shifted(images, shift, radius).median(dim=0).values
    _, other_shift = match(_smaller(other_images)[0], _smaller(pattern[None])[0][0], where, -(-radius // factor))
    return pattern, shift, (other_shift * factor).clamp(-radius, radius)


def _differences(images: Tensor, pattern: Tensor, share: float) -> Tensor:
    """Return by how much (H, W) a share of the images differ from the pattern at most, averaged over channels."""
    differences = (images - pattern).abs().mean(dim=1)
    return differences.kthvalue(max(1, round(share * len(images))), dim=0).values


def _salient(gain: Tensor) -> Tensor:
    """Return where (H, W) the relevance that a cluster gained is large, by Otsu's threshold; nowhere without any."""
    return gain > otsu(gain[gain > 0]) if (gain > 0).any() else torch.zeros_like(gain, dtype=torch.bool)


def relevance_gain(relevance: Tensor, other: Tensor) -> Tensor:
    """Return by how much a cluster's mean positive relevance exceeds the rest's at each pixel, smoothed.

    Parameters
    ----------
    relevance, other : Tensor
        (n, H, W); each map counts by its share: divided by the sum of its absolute values.

    Returns
    -------
    Tensor
        (H, W).
    """

    def share(maps: Tensor) -> Tensor:
        total = maps.abs().sum(dim=(1, 2), keepdim=True)
        return (maps.clamp_min(0) / total.clamp_min(torch.finfo(maps.dtype).tiny)).mean(dim=0)

    difference = (share(relevance.float()) - share(other.float())).numpy()
    return torch.from_numpy(ndimage.gaussian_filter(difference, sigma=max(difference.shape) / 40))


def otsu(values: Tensor) -> float:
    """Return Otsu's threshold of some values: it splits them with the least variance inside the two parts."""
    from skimage.filters import threshold_otsu

    array = values.numpy()
    return float(threshold_otsu(array) if array.min() < array.max() else np.nextafter(array.min(), -np.inf))


def _grow(region: Tensor, same: Tensor, gain: Tensor) -> tuple[Tensor, bool]:
    """Return the mask, and whether its content is constant.

    Where pixels of constant content meet the relevant region they are the artifact, with all that hangs together
    with them; where hardly any do, only the place is common and the mask is the relevant region.
    """
    labelled, n = ndimage.label(same.numpy(), structure=np.ones((3, 3)))
    inside = labelled[region.numpy()]
    touched = [part for part in range(1, n + 1) if (inside == part).sum() >= 2]
    grown = np.isin(labelled, touched)
    filled = ndimage.binary_fill_holes(grown)
    if filled.mean() > LARGEST:  # what a frame encloses is no hole in it
        filled = grown
    share = float(gain.clamp_min(0)[torch.from_numpy(filled)].sum() / gain.clamp_min(0).sum().clamp_min(1e-12))
    if share >= 0.25 and filled.mean() <= LARGEST:
        return torch.from_numpy(filled).float(), True
    return region.float(), False


def _smaller(images: Tensor) -> tuple[Tensor, int]:
    """Return images averaged down to at most `SIDE`, and the factor."""
    factor = -(-max(images.shape[2:]) // SIDE)
    return (images, 1) if factor == 1 else (nn.functional.avg_pool2d(images, factor, ceil_mode=True), factor)


def scores(artifact: Artifact, batches: Iterator[Tensor]) -> np.ndarray:
    """Return the score of every image, float32 (N,), of batches (n, C, H, W)."""
    return torch.cat([artifact.score(batch) for batch in batches]).numpy().astype(np.float32)
