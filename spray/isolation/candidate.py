"""Isolating what a cluster of heatmaps has in common: where (mask), what (pattern) and in which samples (score)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from spray.isolation.alignment import congeal, exact, match, shifted
from spray.isolation.artifact import OPAQUE, Artifact, smaller
from spray.isolation.statistics import median

CONSISTENT = 0.3
"""A pixel belongs to the artifact where the cluster's images differ from the pattern by less than this share of
what the rest of the class differs from it by."""

VISIBLE = 0.04
"""... and where the rest of the class differs from the pattern by at least so much, in units of the pixel range."""


CARRIED = 0.75
"""Share of the cluster's samples in which a pixel has to be constant."""

EDGE = 0.1
"""Least difference of neighbouring pixels, in units of the pixel range, that divides one part of it from another."""

CLEARLY = 0.4
"""Least difference of a part from the rest of the class, as a share of that of the part that differs most."""

SMALLEST = 4
"""Fewest pixels of a part that others are compared with."""

SOFT = 0.3
"""Least opacity of a pixel at the artifact's edge that is told from none."""

LARGEST = 0.5
"""An artifact covers at most so much of the image: what covers more is another image, not an addition to one."""


def isolate(
    images: Tensor,
    relevance: Tensor,
    other_images: Tensor,
    other_relevance: Tensor,
    radius: int | None = None,
    near: bool = False,
) -> Artifact | None:
    """Isolate what the samples of a cluster share and the rest of their class does not have.

    Parameters
    ----------
    images : Tensor
        (n, C, H, W) in [0, 1], the cluster's.
    relevance : Tensor
        (n, H, W): their heatmaps.
    other_images, other_relevance : Tensor
        The same for other samples of the class.
    radius : int, optional
        By how many pixels it may be moved; a tenth of the shorter side where nothing is said.
    near : bool
        Whether only what ends near the relevance, within `radius`, belongs to it: samples that share an artifact may
        have dark ground in common, too, and that hangs together with it.

    Returns
    -------
    Artifact or None
        None if there is no place where the cluster has more relevance than the rest.
    """
    common = find_common(images, relevance, other_images, other_relevance, radius)
    return None if common is None else common.artifact(other_images, near)


@dataclass(frozen=True)
class Common:
    """What the images of a cluster have in common, once they are aligned.

    Attributes
    ----------
    region : Tensor of bool
        (H, W): where the cluster has more relevance.
    gain : Tensor
        (H, W): how much more.
    pattern : Tensor
        (C, H, W): the median of the aligned images.
    shift : Tensor of int64
        (n, 2): by how far each was moved.
    constant : Tensor of bool
        (H, W): where the images hardly differ from the pattern, while the rest does.
    distance : Tensor
        (H, W): by how much the rest does.
    aligned : tuple of Tensor
        (n, C, H, W) and (m, C, H, W): the aligned images, and the others.
    radius : int
        Largest shift.
    """

    region: Tensor
    gain: Tensor
    pattern: Tensor
    shift: Tensor
    constant: Tensor
    distance: Tensor
    aligned: tuple[Tensor, Tensor]
    radius: int

    def artifact(self, other_images: Tensor, near: bool = False) -> Artifact:
        """Return what of it belongs to the artifact, as of `isolate`."""
        constant = self.constant
        if near:
            allowed = ndimage.binary_dilation(self.region.numpy(), iterations=self.radius)
            parts = (constant, self.pattern, self.distance)
            constant = torch.from_numpy(_ending_within(allowed, *(part.numpy() for part in parts)))
        mask, is_constant = _grow(self.region, constant, self.gain)
        mask, pattern = self._softened(mask) if is_constant else (mask, self.pattern)
        unscaled = Artifact(mask, pattern, self.shift, 1.0, self.radius, is_constant)
        scale = float((1 - unscaled.score(other_images)).median())
        return replace(unscaled, scale=max(scale, 1e-6))

    def _softened(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask and the pattern with soft edges, where the image shows through.

        Behind an opacity α images vary by 1 - α of what others do, and are as much nearer to the pattern next to it.
        Around the mask both have to say so; at its border either may say that it is opaque.
        """
        inside = mask.numpy() > 0
        inner = ndimage.binary_erosion(inside, np.ones((3, 3)), border_value=1)
        if not inner.any():
            return mask, self.pattern
        border, core = torch.from_numpy(inside & ~inner), torch.from_numpy(inner)
        (nearer, beside), (nearer_inside, within) = self._closer(inside), self._closer(inner)
        images, others = self.aligned
        behind = median(others, dim=0)
        varied = (images - self.pattern).abs().mean(dim=(0, 1))
        usual = (others - behind).abs().mean(dim=(0, 1))
        # Those of the cluster that don't carry it count as well; where it is fully opaque, they are all there is.
        steady = 1 - varied / usual.clamp_min(1e-6)
        steady = (steady / steady[core].median().clamp_min(SOFT)).clamp_max(1)
        reach, further = (
            torch.from_numpy(ndimage.binary_dilation(inside, np.ones((3, 3)), iterations=n))
            for n in (max(1, self.radius // 2), 2 * self.radius)
        )
        # What the cluster's images are like some way off, they are like without an artifact.
        away = further & ~reach
        around = torch.minimum(*(_beyond(share, away) for share in (steady, nearer)))
        at_border = torch.maximum(steady, nearer_inside).clamp_min(1 - CONSISTENT)
        soft = reach & ~(border | core) & (around >= SOFT)
        labelled = ndimage.label(soft.numpy() | inside, np.ones((3, 3)))[0]
        soft &= torch.from_numpy(np.isin(labelled, labelled[inside]))
        # A line around it, of another colour, is no mixture of what is inside and what is behind.
        mixed = behind + at_border * (within - behind)
        thin = border & (at_border < OPAQUE) & ((self.pattern - mixed).abs().mean(dim=0) <= EDGE)
        if int((border & ~thin).sum() + core.sum()) < 0.25 * inside.sum():
            return mask, self.pattern  # too little would be left to match
        opacity = torch.where(soft, around.clamp_max(OPAQUE - 0.01), torch.where(thin, at_border, mask))
        pattern = torch.where(soft, beside, torch.where(thin, within, self.pattern))
        return opacity, pattern

    def _closer(self, part: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return how much nearer the images are than others to the pattern at the nearest place of a part (H, W).

        As a share of the others' distance, (H, W), with that pattern, (C, H, W). What only some images are near to is
        no soft edge, but was aligned badly.
        """
        nearest = ndimage.distance_transform_edt(~part, return_distances=False, return_indices=True)
        content = self.pattern[:, nearest[0], nearest[1]]
        own, others = (_differences(images, content, CARRIED) for images in self.aligned)
        return 1 - own / others.clamp_min(1e-6), content


def _beyond(share: Tensor, away: Tensor) -> Tensor:
    """Return by how much of what is left to 1 a share (H, W) is greater than it typically is away from there."""
    usual = share[away].median().clamp(0, 0.9) if away.any() else share.new_zeros(())
    return (share - usual) / (1 - usual)


def find_common(
    images: Tensor, relevance: Tensor, other_images: Tensor, other_relevance: Tensor, radius: int | None = None
) -> Common | None:
    """Align the images of a cluster, and say what they have in common there; arguments are those of `isolate`."""
    radius = radius or max(1, round(min(images.shape[2:]) / 10))
    region = salient(relevance_gain(relevance, other_relevance))
    if not region.any():
        return None
    around = torch.from_numpy(ndimage.binary_dilation(region.numpy(), iterations=radius)).float()
    pattern, shift, other_shift = _align(images, other_images, around, radius)
    gain = relevance_gain(
        shifted(relevance[:, None], shift, radius)[:, 0], shifted(other_relevance[:, None], other_shift, radius)[:, 0]
    )
    aligned, others = shifted(images, shift, radius), shifted(other_images, other_shift, radius)
    constant, distance = shared(aligned, others, pattern)
    region = salient(gain) if (gain > 0).any() else region
    return Common(region, gain, pattern, shift, constant, distance, (aligned, others), radius)


def _align(images: Tensor, other_images: Tensor, around: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pattern that the images share (C, H, W), their shifts and those at which the others come closest."""
    small, factor = smaller(images)
    where = (smaller(around[None, None])[0][0, 0] > 0).float()
    _, shift = congeal(small, where, -(-radius // factor))
    shift = (shift * factor).clamp(-radius, radius)
    pattern = median(shifted(images, shift, radius), dim=0)
    for _ in range(2 if factor > 1 else 0):
        shift = exact(images, shift, pattern, around, factor, radius)
        pattern = median(shifted(images, shift, radius), dim=0)
    _, other_shift = match(smaller(other_images)[0], smaller(pattern[None])[0][0], where, -(-radius // factor))
    other_shift = (other_shift * factor).clamp(-radius, radius)
    return pattern, shift, exact(other_images, other_shift, pattern, around, factor, radius)


def shared(images: Tensor, other_images: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Return where (H, W) aligned images hardly differ from a pattern, while others do, and by how much these do."""
    spread, distance = _differences(images, pattern, CARRIED), _differences(other_images, pattern, 0.5)
    return (distance > VISIBLE) & (spread < CONSISTENT * distance), distance


def _differences(images: Tensor, pattern: Tensor, share: float) -> Tensor:
    """Return by how much (H, W) a share of the images differ from the pattern at most, averaged over channels."""
    differences = (images - pattern).abs().mean(dim=1)
    return differences.kthvalue(max(1, round(share * len(images))), dim=0).values


def salient(gain: Tensor) -> Tensor:
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
    # A filter that sees an edge explains what is on its other side, too.
    seen = torch.from_numpy(ndimage.binary_dilation(filled, np.ones((3, 3))))
    share = float(gain.clamp_min(0)[seen].sum() / gain.clamp_min(0).sum().clamp_min(1e-12))
    if share >= 0.25 and filled.mean() <= LARGEST:
        return torch.from_numpy(filled).float(), True
    return region.float(), False


def _ending_within(allowed: np.ndarray, same: np.ndarray, pattern: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Return the parts of `same` (H, W) that lie within what is allowed, parts being divided by edges of the pattern.

    What goes on beyond has its end elsewhere, if it has one. Nor do parts count that differ from the rest of the class,
    at the median, by less than `CLEARLY` of what the clearest does.
    """
    height, width = same.shape
    index = np.arange(height * width).reshape(height, width)
    pairs = []
    for one, other in (((slice(1, None), slice(None)), (slice(-1), slice(None))), (np.s_[:, 1:], np.s_[:, :-1])):
        flat = np.abs(pattern[:, *one] - pattern[:, *other]).max(axis=0) <= EDGE
        joined = same[one] & same[other] & flat
        pairs.append(np.stack([index[one][joined], index[other][joined]]))
    rows, columns = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(index.size, index.size))
    part = connected_components(graph, directed=False)[1].reshape(height, width)
    within = same & ~np.isin(part, part[same & ~allowed])
    size = np.bincount(part[within], minlength=index.size)
    apart = np.bincount(part[within], weights=distance[within], minlength=index.size) / np.maximum(size, 1)
    clearest = apart[size >= SMALLEST].max(initial=0.0)
    return within & (apart >= CLEARLY * clearest)[part]


def scores(artifact: Artifact, batches: Iterator[Tensor]) -> np.ndarray:
    """Return the score of every image, float32 (N,), of batches (n, C, H, W)."""
    return torch.cat([artifact.score(batch) for batch in batches]).numpy().astype(np.float32)
