"""Artifacts whose shape or colour differs from sample to sample: text, frames and stripes, stickers turned anyhow.

One mean of them is nothing that any sample shows, so several samples are kept as donors, each with a matte of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from spray.isolation.artifact import ARTIFACTS, Artifact
from spray.isolation.candidate import LARGEST, salient
from spray.isolation.evidence import Evidence
from spray.isolation.statistics import discriminant

DONORS = 48
"""Most donors that are kept."""
TOLERANCES = (0.001, 0.004, 0.015)
"""By how much, in a channel, pixels of one colour may differ; a matte falls to 0 at three times that."""
AT_ONCE = 8
"""Images whose pixels are compared with each other at once."""
COMPARED = (64, 256)
"""Most pixels of an image that may be its most frequent colour, and most that are compared with each of them."""
ENCLOSED = 1.0
"""Largest area that pixels of one colour may enclose and still be one thing with it, as a share of their own ..."""
ALWAYS = 0.3
"""... and how much its mean colour may vary, as a share of how much it would in the rest: the letters on a sticker are
always the same, what a frame surrounds is not."""
MOST = 0.95
"""Share of the cluster whose images have no more pixels of the colour than is typical of the artifact."""
LEVELS = 16
"""Levels of each channel that colours are counted by."""


@dataclass(frozen=True)
class Donated(Artifact):
    """An artifact whose samples do not share the content: donors (d, C, H, W) with mattes (d, H, W)."""

    exact: ClassVar[bool] = False

    donors: Tensor
    mattes: Tensor

    def placed(self, draws: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return masks (n, 1, H, W) and contents (n, C, H, W) of the donors that were drawn, where these have it."""
        which = torch.from_numpy(np.asarray(draws) % len(self.donors))
        return self.mattes[which, None].float(), self.donors[which].float()


@ARTIFACTS.register("varying")
@dataclass(frozen=True)
class Varying(Donated):
    """An artifact whose samples share a place alone.

    Nothing that it shows is the same, so that its score is one of `texture` there: `weights` (d,) and a `bias`.
    """

    kind: ClassVar[str] = "varying"

    weights: Tensor
    bias: float

    def score(self, images: Tensor) -> Tensor:
        """Return how much an image is at this place like the cluster, 1, rather than like the rest, 0, (n,)."""
        return texture(images, self.mask) @ self.weights.to(images) + self.bias


@ARTIFACTS.register("colored")
@dataclass(frozen=True)
class Colored(Donated):
    """An artifact whose pixels have one colour: always the same (`color`, (C,)) or, NaN, another one in each sample.

    `weights` (H, W) say how much more often the cluster's images have such a pixel than the rest's; `whole`, whether
    what they enclose is a part of it. `most` is the score of those that have the most such pixels: a clear sky is of
    one colour, too, and has more.
    """

    kind: ClassVar[str] = "colored"

    color: Tensor
    weights: Tensor
    tolerance: float
    zero: float
    whole: bool = False
    most: float = float("inf")

    def found(self, images: Tensor) -> Tensor:
        """Return each image's matte (n, 1, H, W)."""
        mattes = self._matte(images)
        return (with_enclosed(mattes) if self.whole else mattes)[:, None]

    def score(self, images: Tensor) -> Tensor:
        """Return how much of the artifact's shape an image has, (n,): typically 1 in the cluster and 0 in the rest.

        What has more than any sample of the cluster is as far from it as what has so much less.
        """
        score = (self._filled(images) - self.zero) / self.scale
        return torch.minimum(score, 2 * self.most - score)

    def insert(self, images: Tensor, draws: np.ndarray, content: Tensor | None = None) -> Tensor:
        """Add the artifact, or other content in its place: not in its very shape where any colour will do.

        Then the shape is all that the samples share, and text written in the colours of another image is text still:
        its strokes are closed to blocks (by as much as an eighth of the image).
        """
        if content is None or not bool(self.color.isnan().any()):
            return super().insert(images, draws, content)
        mask = closed(self.placed(draws)[0].to(images), max(1, round(min(images.shape[2:]) / 16)))
        return images + mask * (content.to(images) - images)

    def _matte(self, images: Tensor) -> Tensor:
        return one_color(images, self.weights, self.color, self.tolerance)

    def _filled(self, images: Tensor) -> Tensor:
        return (self._matte(images) * self.weights.to(images)).sum(dim=(1, 2))


def texture(images: Tensor, mask: Tensor) -> Tensor:
    """Return what pixels inside a mask (H, W) are like, (n, 5 C): of each channel mean, spread, extremes, edges.

    Edges are the mean absolute difference of neighbours.
    """
    inside = mask > 0.05
    values = images[:, :, inside]
    steps = [
        ((images[:, :, 1:] - images[:, :, :-1]).abs(), inside[1:] & inside[:-1]),
        ((images[:, :, :, 1:] - images[:, :, :, :-1]).abs(), inside[:, 1:] & inside[:, :-1]),
    ]
    edges = torch.cat([step[:, :, both] for step, both in steps], dim=2)
    edges = edges.mean(dim=2) if edges.shape[2] else torch.zeros_like(values[:, :, 0])
    spread = values.std(dim=2, correction=0)
    return torch.cat([values.mean(dim=2), spread, values.amin(dim=2), values.amax(dim=2), edges], dim=1)


def closed(masks: Tensor, radius: int) -> Tensor:
    """Return masks (n, 1, H, W) with gaps of up to twice the radius filled: the morphological closing by a square."""
    side = 2 * radius + 1
    wide = nn.functional.pad(masks, (radius,) * 4)
    grown = nn.functional.max_pool2d(wide, side, stride=1, padding=radius)
    return -nn.functional.max_pool2d(-grown, side, stride=1)


def with_enclosed(mattes: Tensor) -> Tensor:
    """Return mattes (n, H, W) that are 1 as well where they enclose something, unless it is larger than they are.

    A gap of a pixel in what encloses it does not matter: compression blurs edges.
    """
    whole = []
    solid = mattes > 0.5
    for matte, own, closing in zip(mattes, solid.cpu().numpy(), closed(solid[:, None].float(), 1)[:, 0], strict=True):
        inside = ndimage.binary_fill_holes(closing.cpu().numpy()) & ~own
        small = 0 < inside.sum() <= ENCLOSED * own.sum()
        whole.append(torch.where(torch.from_numpy(inside).to(matte.device), 1.0, matte) if small else matte)
    return torch.stack(whole) if whole else mattes


def _with_constant(mattes: Tensor, images: Tensor, others: Tensor) -> tuple[Tensor, bool]:
    """Return the donors' mattes (n, H, W) with what they enclose if it is always the same, and whether it is."""
    whole = with_enclosed(mattes)
    holes = (whole - mattes).clamp_min(0)
    area = holes.sum(dim=(1, 2))
    having = area > 0
    if having.sum() < max(2, len(mattes) / 2):
        return mattes, False
    elsewhere = others[torch.arange(len(images)) % len(others)]
    own, usual = (
        (((holes[:, None] * part).sum(dim=(2, 3)) / area[:, None])[having]).std(dim=0).mean()
        for part in (images, elsewhere)
    )
    return (whole, True) if bool(own < ALWAYS * usual) else (mattes, False)


def one_color(images: Tensor, weights: Tensor, color: Tensor, tolerance: float) -> Tensor:
    """Return mattes (n, H, W) of the pixels that have the artifact's colour, where weights are above 0.

    Where its colour is not known (NaN) it is the one that the weights give most to, in each image by itself.
    """
    where = weights > 0
    mattes = images.new_zeros(len(images), *weights.shape)
    pixels = images[:, :, where]
    colors = color.to(images)[:, None].expand(len(images), -1, 1)
    if bool(color.isnan().any()):
        parts = [_modal(part, weights[where].to(images), tolerance) for part in pixels.split(AT_ONCE)]
        colors = torch.cat(parts) if parts else colors
    distance = (pixels - colors).abs().amax(dim=1)
    mattes[:, where] = (1.5 - distance / (2 * tolerance)).clamp(0, 1)
    return mattes


def _modal(pixels: Tensor, weight: Tensor, tolerance: float) -> Tensor:
    """Return the colour (n, C, 1) of most weight among pixels (n, C, p) with weights (p,)."""
    # Of many pixels not all are looked at as the colour, nor is every one compared with it; text of any size has more.
    asked, seen = (_spread(pixels.shape[2], most) for most in COMPARED)
    one, other = pixels[:, :, asked, None], pixels[:, :, None, seen]
    apart = (one[:, 0] - other[:, 0]).abs_()
    for channel in range(1, pixels.shape[1]):
        apart = torch.maximum(apart, (one[:, channel] - other[:, channel]).abs_())
    # Around a colour of a smooth scene there are many that differ a little; what was drawn stands alone.
    near, around = ((apart <= reach).to(pixels) @ weight[seen] for reach in (tolerance, 4 * tolerance))
    best = (near - around / 2).argmax(dim=1)
    return pixels[:, :, asked].gather(2, best[:, None, None].expand(-1, pixels.shape[1], 1))


def _spread(n: int, most: int) -> Tensor:
    """Return at most so many of n indices, spread evenly and yet along no line: every k-th pixel may be in one column.

    They are multiples of the golden ratio, modulo 1, of n.
    """
    if n <= most:
        return torch.arange(n)
    return (torch.arange(most, dtype=torch.float64) * ((5**0.5 - 1) / 2) % 1 * n).long()


def isolate_donated(evidence: Evidence) -> Artifact | None:
    """Isolate a place, with the samples' content there; the artifact itself where the content is always the same."""
    found = evidence.common_artifact()
    if found is None or found.constant:
        return found
    soft = torch.from_numpy(ndimage.gaussian_filter(ndimage.binary_dilation(found.mask.numpy()).astype("f4"), 0.5))
    donors = evidence.images[:DONORS]
    parts = (found.pattern, torch.zeros(1, 2, dtype=torch.int64), found.scale, found.radius, False)
    w, b = discriminant(*(texture(images, soft) for images in (evidence.images, evidence.other_images)))
    return Varying(soft, *parts, donors.half(), soft.expand(len(donors), -1, -1).half(), w, b)


def isolate_colored(evidence: Evidence) -> Colored | None:
    """Isolate pixels of a colour that the cluster has where the rest of the class does not."""
    inside, outside = evidence.images, evidence.other_images
    color = _common_color(inside, outside)
    if color is None:
        return None
    everywhere = torch.ones(inside.shape[2:])
    return _colored(evidence, everywhere, color, TOLERANCES[-1])


def isolate_uncolored(evidence: Evidence) -> Colored | None:
    """Isolate shapes that have one colour inside each sample, another one in each, at a place of more relevance."""
    gain = evidence.gain
    region = salient(gain)
    if not region.any():
        return None
    around = torch.from_numpy(ndimage.binary_dilation(region.numpy(), iterations=2)).float()
    if float(around.mean()) > LARGEST:
        return None
    none = torch.full((evidence.images.shape[1],), torch.nan)
    weights = around * gain.clamp_min(0.1 * float(gain.max()))
    tried = [_colored(evidence, weights, none, tolerance) for tolerance in TOLERANCES]
    found = [one for one in tried if one is not None]
    return max(found, key=lambda one: _gap(one, evidence), default=None)


def _gap(artifact: Artifact, evidence: Evidence) -> float:
    """Return how often a sample of the cluster scores higher than one of the rest."""
    return float((artifact.score(evidence.images)[:, None] > artifact.score(evidence.other_images)).float().mean())


def _colored(evidence: Evidence, weights: Tensor, color: Tensor, tolerance: float) -> Colored | None:
    """Weigh places by how much more often the cluster has the colour there, twice, and collect the donors."""
    inside, outside = evidence.images, evidence.other_images
    for _ in range(2):
        often, seldom = (one_color(images, weights, color, tolerance).mean(dim=0) for images in (inside, outside))
        more = torch.from_numpy(ndimage.gaussian_filter((often - seldom).numpy(), 0.5))
        weights = torch.where(more > max(0.05, 0.2 * float(more.max())), more, 0.0)
        if not (weights > 0).any():
            return None
    mattes = one_color(inside, weights, color, tolerance)
    own = (mattes * weights).sum(dim=(1, 2))
    rest = (one_color(outside, weights, color, tolerance) * weights).sum(dim=(1, 2))
    zero, unit = float(rest.median()), float(own.median() - rest.median())
    # Those of the cluster that lack it are no donors.
    donors = (own >= zero + 0.5 * unit).nonzero()[:DONORS, 0]
    if unit <= 1e-6 or not len(donors):
        return None
    kept, whole = _with_constant(mattes[donors], inside[donors], outside)
    shown = kept[:, None]
    pattern = (shown * inside[donors]).sum(dim=0) / shown.sum(dim=0).clamp_min(1e-3)
    fill = (shown * inside[donors]).sum(dim=(0, 2, 3)) / shown.sum(dim=(0, 2, 3))
    pattern = torch.where(shown.sum(dim=0) > 0, pattern, fill[:, None, None]).clamp(0, 1)
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    parts = (pattern, zeros, unit, 1, True, inside[donors].half(), kept.half())
    most = float(((own - zero) / unit).quantile(MOST))
    return Colored(kept.mean(dim=0), *parts, color, weights, tolerance, zero, whole, most)


def _common_color(inside: Tensor, outside: Tensor) -> Tensor | None:
    """Return the colour (C,) that most more of the cluster's images have than of the rest's, None if hardly any do.

    An image has a colour if at least half a per cent of its pixels, and four, do.
    """
    pixels = max(4, round(0.005 * inside.shape[2] * inside.shape[3]))

    def having(images: Tensor) -> np.ndarray:
        bins = (images.clamp(0, 1 - 1e-6) * LEVELS).long().flatten(2)
        code = bins[:, 0]
        for channel in range(1, images.shape[1]):
            code = code * LEVELS + bins[:, channel]
        size = LEVELS ** images.shape[1]
        return np.stack([np.bincount(row, minlength=size) for row in code.numpy()])

    own, other = having(inside), having(outside)
    share = (own >= pixels).mean(axis=0) - (other >= pixels).mean(axis=0)
    amount = np.sqrt(own.mean(axis=0) / inside[0, 0].numel())
    best = int((share.clip(0) * amount).argmax())
    if share[best] < 0.4:
        return None
    digits = [best // LEVELS**power % LEVELS for power in range(inside.shape[1] - 1, -1, -1)]
    low = torch.tensor(digits) / LEVELS
    flat = inside.clamp(0, 1 - 1e-6).transpose(0, 1).flatten(1)
    hit = ((flat >= low[:, None]) & (flat < low[:, None] + 1 / LEVELS)).all(dim=0)
    return flat[:, hit].median(dim=1).values
