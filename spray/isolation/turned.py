"""Artifacts that are the same piece of an image, turned by any angle: a plaster, a ruler, a chart of colours."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from spray.isolation.alignment import Matching, around, shifted
from spray.isolation.artifact import ARTIFACTS, Artifact, moved_masks, smaller
from spray.isolation.candidate import SMALLEST, VISIBLE, salient, shared
from spray.isolation.evidence import Evidence
from spray.isolation.statistics import median

ANGLES = 24
"""Angles that are tried, over a full turn."""
ROUNDS = 6
"""Most turns taken between aligning all images and renewing what they are aligned with."""
REACH = 0.3
"""How far it reaches at most from its middle, as a share of the image's shorter side."""
RING = 2
"""Width of the ring around it, in pixels."""
OPAQUE = 0.6
"""Least opacity at which content is seen well enough."""
SOME = 0.5
"""Share of the cluster's samples that show it at least."""
UPRIGHT = 0.7
"""What matches by so much of its score if it is not turned is explained by what is never turned."""
FEW = 16
"""Images of which one is what the first alignment is made with."""

Found = tuple[Tensor, Tensor, Tensor]
"""Of each image the least value (n,) over all shifts and angles, and where: shift (n, 2), angle (n,)."""


@ARTIFACTS.register("turned")
@dataclass(frozen=True)
class Turned(Artifact):
    """An artifact of constant content at any angle: mask and pattern are as they are turned by none.

    `angles` (n,), in radians, go with `shifts`; `zero` is the contrast that the rest of the class typically has,
    `scale` by how much the cluster's is less.
    """

    kind: ClassVar[str] = "turned"
    exact: ClassVar[bool] = False

    angles: Tensor
    zero: float

    @property
    def center(self) -> Tensor:
        """What point (row, column) it turns around: the middle of its mask."""
        places = self.mask.nonzero().float()
        return (places.amin(dim=0) + places.amax(dim=0)) / 2

    def score(self, images: Tensor) -> Tensor:
        """Return how well images match, (n,): typically 1 in the cluster and 0 in the rest."""
        return (self.zero - self.best(images)[0]) / self.scale

    def found(self, images: Tensor) -> Tensor:
        """Return the mask (n, 1, H, W) at the place and the angle where each image matches the pattern best."""
        _, shift, angle = self.best(images)
        masks = turned(self.mask.expand(len(images), 1, -1, -1), angle, self.center, "zeros")[:, 0]
        return moved_masks(masks, -shift, self.radius)

    def placed(self, draws: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return masks (n, 1, H, W) and patterns (n, C, H, W), each turned and moved as one of the samples had it."""
        drawn = torch.from_numpy(np.asarray(draws) % len(self.shifts))
        angles, which = self.angles[drawn].unique(return_inverse=True)
        masks = turned(self.mask.expand(len(angles), 1, -1, -1), angles, self.center, "zeros")[which, 0]
        patterns = turned(self.pattern.expand(len(angles), -1, -1, -1), angles, self.center)[which]
        moved = -self.shifts[drawn]
        return moved_masks(masks, moved, self.radius), shifted(patterns, moved, self.radius)

    def best(self, images: Tensor, n_angles: int = ANGLES) -> Found:
        """Return where each image has the least contrast to the pattern, see `Views`, at the first few angles."""
        small, factor = smaller(images)
        mask, pattern = smaller(self.mask[None, None])[0][0, 0], smaller(self.pattern[None])[0][0]
        views = Views(mask, pattern, (self.center + 0.5) / factor - 0.5, n_angles)
        contrast, shift, angle = views.closest(Matching(small, views.reach, -(-self.radius // factor)))
        return contrast, (shift * factor).clamp(-self.radius, self.radius), angle


class Views:
    """A pattern (C, H, W) turned by the first few angles, with its mask (H, W) and a ring around that.

    What has one colour all over matches wherever an image has that colour. What ends where the pattern ends does not
    match the pattern's edge, continued, in the ring. So that the distance inside the mask is taken as a share of that
    in the ring; its logarithm is the contrast.
    """

    def __init__(self, mask: Tensor, pattern: Tensor, center: Tensor, n_angles: int = ANGLES) -> None:
        self.angles = every_angle()[:n_angles]
        ring = ndimage.binary_dilation(mask.numpy() > 0, iterations=RING) & (mask.numpy() == 0)

        def all_around(x: Tensor, beyond: str) -> Tensor:
            return turned(x.expand(n_angles, -1, -1, -1), self.angles, center, beyond)

        self.masks = all_around(mask[None], "zeros")[:, 0]
        self.rings = all_around(torch.from_numpy(ring).to(mask)[None], "zeros")[:, 0]
        self.patterns = all_around(pattern, "border")
        self.reach = torch.maximum(self.masks, self.rings).amax(dim=0)

    def closest(self, matching: Matching) -> Found:
        """Return where each image has the least contrast."""
        found = []
        least = self.patterns.shape[1] * VISIBLE**2
        for pattern, mask, ring in zip(self.patterns, self.masks, self.rings, strict=True):
            # Of a ring that is out of sight there is no distance, and no end of the pattern to be seen.
            inside, outside = (
                matching.within(part).distances(pattern).clamp_min(0).nan_to_num(0) for part in (mask, ring)
            )
            found.append(matching.least(((inside + least) / (outside + least)).log()))
        return _best_of(found, self.angles)


def every_angle() -> Tensor:
    """Return the angles (ANGLES,) that are tried, in radians."""
    return torch.arange(ANGLES) * (2 * np.pi / ANGLES)


def turned(images: Tensor, angles: Tensor, center: Tensor, beyond: str = "border") -> Tensor:
    """Return images (n, C, H, W), each turned by an angle (n,), in radians, around a point (row, column).

    Parameters
    ----------
    beyond : str
        What lies beyond an image: "border", its border pixels, or "zeros".
    """
    height, width = images.shape[2:]
    y, x = torch.meshgrid(torch.arange(height) - center[0], torch.arange(width) - center[1], indexing="ij")
    cos, sin = (f(angles)[:, None, None] for f in (torch.cos, torch.sin))
    rows, columns = center[0] + cos * y - sin * x, center[1] + sin * y + cos * x
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=3).to(images)
    return nn.functional.grid_sample(images, grid, padding_mode=beyond, align_corners=False)


def isolate_turned(evidence: Evidence) -> Turned | None:
    """Isolate content that the samples share at angles of their own, where they have more relevance than the rest.

    Of large images the poses are found in smaller ones.
    """
    n, _, height, width = evidence.images.shape
    factor = smaller(evidence.images[:1])[1]
    radius = max(1, round(min(height, width) / 10 / factor))
    center, reach = _place(evidence)
    reach = min(-(-reach // factor), round(REACH * min(height, width) / factor))
    start = (center // factor - reach - radius) * factor
    side = (2 * (reach + radius) + 1) * factor
    row, column = start.tolist()
    part = slice(row, row + side), slice(column, column + side)
    inside, outside = (
        Windows(around(x, part, 0), reach, radius, factor) for x in (evidence.images, evidence.other_images)
    )
    pattern = inside.typical()
    found: Found | None = None
    for _ in range(ROUNDS):
        before, found = found, inside.closest(pattern)
        close = inside.aligned(*found)
        pattern = median(close, dim=0)
        if before is not None and all(map(torch.equal, before[1:], found[1:])):
            break
    mask = inside.disc * shared(close, outside.aligned(*outside.closest(pattern)), pattern)[0]
    for size in (1, factor):
        if mask.sum() < SMALLEST:
            return None
        views = Views(mask, pattern, inside.middle)
        close, far = (some.aligned(*views.closest(some.matching), size) for some in (inside, outside))
        mask, disc = (x.repeat_interleave(size, 0).repeat_interleave(size, 1) for x in (mask, inside.disc))
        mask, pattern = _matted(close, far, mask, 2 * size)
        mask = mask * disc
    whole, content = (_pasted(x, (row, column), height, width) for x in (mask[None], pattern))
    if whole.sum() < SMALLEST:
        return None
    unmoved, unturned = torch.zeros(n, 2, dtype=torch.int64), torch.zeros(n)
    unscaled = Turned(whole[0], content, unmoved, 1.0, radius * factor, True, unturned, 0.0)
    contrast, shift, angle = unscaled.best(evidence.images)
    zero = float(unscaled.best(evidence.other_images)[0].median())
    scale, unturned_scale = (zero - float(x.median()) for x in (contrast, unscaled.best(evidence.images, 1)[0]))
    if scale < 1e-6 or unturned_scale > UPRIGHT * scale:
        return None
    return replace(unscaled, shifts=shift, angles=angle, zero=zero, scale=scale)


def _place(evidence: Evidence) -> tuple[Tensor, int]:
    """Return the middle (row, column) of where the cluster has most relevance more than the rest, and its reach."""
    gain = evidence.gain
    labelled, n = ndimage.label(salient(gain).numpy())
    if not n:
        return torch.tensor(gain.shape) // 2, 1
    most = 1 + int(np.argmax(ndimage.sum_labels(gain.numpy(), labelled, range(1, n + 1))))
    places = torch.from_numpy(np.argwhere(labelled == most))
    center = (places.amin(dim=0) + places.amax(dim=0)) // 2
    return center, int(np.ceil(float((places - center).float().norm(dim=1).max()))) + 1


class Windows:
    """Windows (n, C, s, s) of images that are aligned with one another by shifts and turns, compared inside a disc.

    They are taken from images `factor` times as large.
    """

    def __init__(self, images: Tensor, reach: int, radius: int, factor: int) -> None:
        self.full, self.factor, self.radius = images, factor, radius
        self.images = nn.functional.avg_pool2d(images, factor) if factor > 1 else images
        side = self.images.shape[2]
        away = (torch.arange(side) - side // 2).square()
        self.disc = (away[:, None] + away <= (reach + 0.5) ** 2).float()  # turned, the corners are not in the window
        self.middle = torch.full((2,), side // 2)
        self.matching = Matching(self.images, self.disc, radius)
        self.least = images.shape[1] * VISIBLE**2
        self.variance = self.images[:, :, self.disc > 0].var(dim=2, correction=0).sum(dim=1) + self.least

    def __getitem__(self, which: slice) -> Windows:
        some = copy(self)
        some.full, some.images, some.variance = self.full[which], self.images[which], self.variance[which]
        some.matching = self.matching.only(which)
        return some

    def closest(self, pattern: Tensor) -> Found:
        """Return where least of each image is left once a pattern (C, s, s) is taken off, as a share of its variance.

        Of an even ground little is left whatever is taken off, but no small share.
        """
        angles = every_angle()
        views = turned(pattern.expand(ANGLES, -1, -1, -1), angles, self.middle)
        distance, shift, angle = _best_of([self.matching.to(view) for view in views], angles)
        return (distance + self.least) / self.variance, shift, angle

    def aligned(self, left: Tensor, shift: Tensor, angle: Tensor, scale: int = 1) -> Tensor:
        """Return images moved and turned back, at a larger scale, those that are closest: a cluster is seldom pure."""
        some = left.argsort()[: max(1, round(SOME * len(left)))]
        images = shifted((self.full if scale > 1 else self.images)[some], scale * shift[some], scale * self.radius)
        return turned(images, -angle[some], (self.middle + 0.5) * scale - 0.5)

    def typical(self) -> Tensor:
        """Return the image, among some, that half of the others come closest to."""
        some = self[:: max(1, len(self.images) // FEW)]
        half = max(1, len(some.images) // 2)
        # The first is its own.
        left = [float(some.closest(image)[0].sort().values[1 : 1 + half].mean()) for image in some.images]
        return some.images[int(np.argmin(left))]


def _best_of(found: list[tuple[Tensor, Tensor]], angles: Tensor) -> Found:
    value, shift = (torch.stack(each) for each in zip(*found, strict=True))
    best, image = value.argmin(dim=0), torch.arange(value.shape[1])
    return value[best, image], shift[best, image], angles[best]


def _matted(images: Tensor, others: Tensor, core: Tensor, margin: int) -> tuple[Tensor, Tensor]:
    """Return the opacity (H, W) and the content (C, H, W) of what aligned images share, up to a margin around a core.

    Where it is as opaque as α, the images vary by 1 - α of what others do. What its edges show is what is next to them.
    """
    seen, ground = median(images, dim=0), median(others, dim=0)
    spread, usual = (median((x - m).abs().mean(dim=1), dim=0) for x, m in ((images, seen), (others, ground)))
    alpha = (1 - spread / usual.clamp_min(VISIBLE)).clamp(0, 1)
    # Samples lie up to half a pixel and half a step of the angle beside, which blurs edges.
    alpha = (2 * alpha - 0.5).clamp(0, 1)
    alpha = alpha * torch.from_numpy(ndimage.binary_dilation(core.numpy() > 0.5, iterations=margin))
    labelled, _ = ndimage.label(alpha.numpy() > 0)
    alpha = alpha * torch.from_numpy(np.isin(labelled, np.unique(labelled[core.numpy() > 0.5])))
    opaque = alpha.numpy() > min(OPAQUE, float(alpha.max()) / 2)
    nearest = ndimage.distance_transform_edt(~opaque, return_distances=False, return_indices=True)
    return alpha, seen[:, *torch.from_numpy(nearest)]


def _pasted(part: Tensor, start: Sequence[int], height: int, width: int) -> Tensor:
    """Return an image (C, H, W), empty but for a part of it that starts at a place; what is out of it is dropped."""
    canvas = torch.zeros(len(part), height, width)
    to, of = [], []
    for at, length, size in zip(start, part.shape[1:], (height, width), strict=True):
        to.append(slice(max(at, 0), min(at + length, size)))
        of.append(slice(to[-1].start - at, to[-1].stop - at))
    canvas[:, *to] = part[:, *of]
    return canvas
