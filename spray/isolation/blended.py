"""Semi-transparent artifacts: watermarks, vignettes. Their opacity shows in how much less pixels vary behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy import ndimage
from torch import Tensor, nn

from spray.isolation.alignment import congeal, shifted
from spray.isolation.artifact import ARTIFACTS, Artifact, smaller
from spray.isolation.candidate import salient
from spray.isolation.changed import smoothed
from spray.isolation.evidence import Evidence
from spray.isolation.statistics import quartiles, statistics

FAINTEST = 0.1
"""Least opacity that is told from none."""
EXTREME = 0.25
"""How far the colour of a shade may be from black, or white, in all channels, and still be it."""
TURNS = 12
"""Turns taken between fitting the opacity of a shade and what the samples are like without it."""
GAINS = (0.3, 2.0)
"""Least and largest gain of medians by which samples of a kind differ from the rest of their class."""
LEAST = 0.02
"""Share of an image in which a shade is taken to be nothing."""


@ARTIFACTS.register("blended")
@dataclass(frozen=True)
class Blended(Artifact):
    """An artifact that the image shows through: ``x' = (1 - α) x + α c``, α the mask and c the pattern.

    Attributes
    ----------
    template : Tensor
        (C, H, W): what it leaves in images from which the coarse structure was taken; zero where it has no edges.
    weights, bias : Tensor, float
        (d,): what makes a score of an image's statistics, for those without edges.
    zero : float
        The rest's typical answer to the template.
    """

    kind: ClassVar[str] = "blended"
    exact: ClassVar[bool] = False

    template: Tensor
    weights: Tensor
    bias: float
    zero: float

    @property
    def drawn(self) -> bool:
        """Whether it has edges."""
        return bool(self.template.any())

    def score(self, images: Tensor) -> Tensor:
        """Return how much an image is like the cluster, 1, rather than like the rest, 0, (n,)."""
        if not self.drawn:
            return statistics(images) @ self.weights.to(images) + self.bias
        return (answers(images, self.template, self.radius)[0] - self.zero) / self.scale

    def _shift(self, images: Tensor) -> Tensor:
        return self._match(images)[1]  # at full size already

    def _match(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if not self.drawn:
            return torch.zeros(len(images)), torch.zeros(len(images), 2, dtype=torch.int64)
        return answers(images, self.template, self.radius)

    def without(self, images: Tensor) -> Tensor:
        """Return images (n, C, H, W) with what lies behind it, x = (x' - αc) / (1 - α), as far as α is below 0.9."""
        shift = -self._match(images)[1]
        mask = self._moved(shift).to(images).clamp_max(0.9)
        pattern = shifted(self.pattern.to(images).expand(len(images), -1, -1, -1), shift, self.radius)
        return ((images - mask * pattern) / (1 - mask)).clamp(0, 1)


def edges(images: Tensor) -> Tensor:
    """Return images (n, C, H, W) without their coarse structure."""
    return images - smoothed(images, 1.5)


def answers(images: Tensor, template: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Return each image's best correlation with the template over all shifts (n,) and that shift (n, 2)."""
    padded = nn.functional.pad(edges(images), (radius,) * 4)
    answer = nn.functional.conv2d(padded, template.to(images)[None])[:, 0] / template.square().sum()
    best = answer.flatten(1).argmax(dim=1)
    side = answer.shape[2]
    shift = torch.stack([best // side, best % side], dim=1) - radius
    return answer.flatten(1).amax(dim=1), shift


def isolate_blended(evidence: Evidence) -> Blended | None:
    """Isolate what is blended into the images at about the same place, sharp enough to be aligned by its edges."""
    images, others = evidence.images, evidence.other_images
    radius = max(1, round(min(images.shape[2:]) / 10))
    region = salient(evidence.gain)
    if not region.any():
        return None
    around = torch.from_numpy(ndimage.binary_dilation(region.numpy(), iterations=radius)).float()
    fine, factor = smaller(edges(images))
    where = (smaller(around[None, None])[0][0, 0] > 0).float()
    shift = (congeal(fine, where, -(-radius // factor))[1] * factor).clamp(-radius, radius)
    wide = torch.from_numpy(ndimage.binary_dilation(region.numpy(), iterations=2 * radius)).float()
    template = torch.zeros_like(images[0])
    for _ in range(2):
        template = wide * (edges(shifted(images, shift, radius)).mean(dim=0) - edges(others).mean(dim=0))
        if float(template.square().sum()) < 1e-6:
            return None
        shift = answers(images, template, radius)[1]
        shift = (shift - shift.median(dim=0).values).clamp(-radius, radius)
    alpha, pattern = _drawn(shifted(images, shift, radius), others, template)
    if not (alpha > 0).any():
        return None
    template = torch.from_numpy(ndimage.grey_dilation((alpha > 0).float().numpy(), size=(5, 5))) * template
    own, rest = (answers(part, template, radius)[0] for part in (images, others))
    unit = float(own.median() - rest.median())
    if unit <= 1e-6:
        return None
    none = torch.zeros(statistics(images[:1]).shape[1])
    return Blended(alpha, pattern, shift, unit, radius, True, template, none, 0.0, float(rest.median()))


def _drawn(images: Tensor, others: Tensor, template: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate opacity (H, W) and content (C, H, W) of something drawn with edges on aligned images.

    Against what its surroundings let expect, a pixel is changed by ``α (c - x)`` on average: this is known well, since
    what the images show cancels out. How much is opacity and how much colour the spreads tell, pooled over all of it.
    """
    strength = template.mean(dim=0)
    strength = strength * strength[strength.abs() == strength.abs().max()][0].sign()
    drawn = strength > 0.35 * strength.max()
    free = (~drawn).float()
    weight = smoothed(free[None, None], 2.0).clamp_min(1e-3)

    def changed(part: Tensor) -> Tensor:
        return (part - smoothed(part * free, 2.0) / weight).mean(dim=0)

    change = changed(images) - changed(others)
    (lower, _, upper), (before_lower, _, before_upper) = quartiles(images), quartiles(others)
    ratio = (upper - lower)[:, drawn].mean() / (before_upper - before_lower)[:, drawn].mean().clamp_min(1e-3)
    alpha = float((1 - ratio).clamp(FAINTEST, 1))
    behind = others[:, :, drawn].mean(dim=(0, 2))
    color = (behind + change[:, drawn].mean(dim=1) / alpha).clamp(0, 1)
    towards = (color - behind)[:, None, None]
    opaque = (change * towards).sum(dim=0) / towards.square().sum().clamp_min(1e-6)
    return torch.where(drawn, opaque.clamp(0, 1), 0.0), color[:, None, None].expand_as(change).clone()


def isolate_veil(evidence: Evidence) -> Blended | None:
    """Isolate what is blended softly over much of the image and always lies the same: a vignette, a gradient."""
    alpha, color = opacity(*evidence.quartiles, sigma=min(evidence.images.shape[2:]) / 10)
    if float((alpha > 0).float().mean()) < 0.05:
        return None
    return _without_edges(evidence, alpha, color)


def isolate_shade(evidence: Evidence) -> Blended | None:
    """Isolate a shade of one colour whose opacity is a quadratic function of the place: a vignette, a light leak.

    Each pixel gives two equations, ``m - m' = α (m - c)`` and ``s - s' = α s`` of its median m and the distance s of
    its quartiles, without and with the shade. With six coefficients of α the few images of a cluster say it well; a
    colour that is nearly black or white is taken for that, since it and the opacity say almost the same.

    Returns
    -------
    Blended or None
        None where its opacity does not vary by `FAINTEST` over the image: that would be a fade.
    """
    (medians, spread), (before_medians, before_spread) = (_levels(part) for part in evidence.quartiles)
    height, width = evidence.images.shape[2:]
    terms = _quadratic(height, width)
    alpha = _fitted(terms, before_spread, before_spread - spread)
    for _ in range(5):
        weight = alpha / alpha.square().sum().clamp_min(1e-6)
        color = ((medians - (1 - alpha) * before_medians) * weight).sum(dim=1).clamp(0, 1)
        color = _extreme(color)
        towards = before_medians - color[:, None]
        slope = torch.cat([towards.flatten(), before_spread])
        change = torch.cat([(before_medians - medians).flatten(), before_spread - spread])
        alpha = _fitted(terms.repeat(len(color) + 1, 1), slope, change)[: height * width]
    return _shade(evidence, alpha, color)


def isolate_shading(evidence: Evidence) -> Blended | None:
    """Isolate such a shade from samples that are of a kind, which `isolate_shade` would take for part of it.

    Samples of a pure cluster seldom are typical of their class: they are lighter as a whole, or vary less. So the rest
    is taken to be like them but for a gain g and an offset o of its medians and a factor k of its spreads, the same all
    over the image: ``m' = (1 - α)(g m + o) + α c`` and ``s' = (1 - α) k s``. Opacity and the others are fitted in
    turns. What then is the same at all places can be either, and is none of the shade: somewhere it is 0.

    Returns
    -------
    Blended or None
        None where its opacity does not vary by `FAINTEST` over the image.
    """
    (medians, spread), (before_medians, before_spread) = (
        _levels(smoothed(part, 1.5).double()) for part in evidence.quartiles
    )
    height, width = evidence.images.shape[2:]
    terms = _quadratic(height, width).double()
    alpha, color = torch.zeros(height * width).double(), torch.zeros(len(medians)).double()
    for turn in range(TURNS):
        clear = 1 - alpha
        vary = (spread @ (clear * before_spread)) / (clear * before_spread).square().sum().clamp_min(1e-9)
        behind = torch.empty_like(medians)
        for channel, (m, b) in enumerate(zip(medians, before_medians, strict=True)):
            parts = [clear * b, clear, *([alpha] if turn else [])]
            gain, offset, *end = torch.linalg.lstsq(torch.stack(parts, dim=1), m[:, None]).solution[:, 0]
            behind[channel] = gain.clamp(*GAINS) * b + offset
            color[channel] = end[0].clamp(0, 1) if end else 0.0
        towards, size = behind - color[:, None], (vary * before_spread).mean().clamp_min(1e-6)
        level = towards.abs().mean().clamp_min(0.05)  # both kinds of equations weigh the same
        slope = torch.cat([(towards / level).flatten(), vary * before_spread / size])
        change = torch.cat([((behind - medians) / level).flatten(), (vary * before_spread - spread) / size])
        rows = terms.repeat(len(color) + 1, 1) * slope[:, None]
        alpha = terms @ torch.linalg.lstsq(rows, change[:, None]).solution[:, 0]
        least = alpha.quantile(LEAST).clamp_max(0.9)
        alpha = ((alpha - least) / (1 - least)).clamp(0, 0.95)
    return _shade(evidence, alpha.float(), _extreme(color.float()))


def _levels(quartiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return each pixel's median (C, H W) and the distance of its quartiles, the mean over channels (H W,)."""
    lower, middle, upper = quartiles
    return middle.flatten(1), (upper - lower).mean(dim=0).flatten()


def _quadratic(height: int, width: int) -> Tensor:
    """Return the terms (H W, 6) of a quadratic function of the place."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=-1).reshape(-1, 6)


def _extreme(color: Tensor) -> Tensor:
    """Return a colour (C,), black or white if it is nearly that."""
    for extreme in (0.0, 1.0):
        color = torch.full_like(color, extreme) if float((color - extreme).abs().max()) <= EXTREME else color
    return color


def _shade(evidence: Evidence, alpha: Tensor, color: Tensor) -> Blended | None:
    """Return a shade of an opacity (H W,) and a colour (C,); None where it hardly varies."""
    alpha = torch.where(alpha > FAINTEST / 5, alpha, 0.0).reshape(evidence.images.shape[2:])
    if float(alpha.max() - alpha.min()) < FAINTEST:
        return None
    return _without_edges(evidence, alpha, color[:, None, None].expand(evidence.images.shape[1:]).clone())


def _without_edges(evidence: Evidence, alpha: Tensor, pattern: Tensor) -> Blended:
    """Return what is blended in softly, always at the same place, scored by the cluster's statistics."""
    w, b = evidence.discriminant
    shift = torch.zeros(1, 2, dtype=torch.int64)
    return Blended(alpha, pattern, shift, 1.0, 1, True, torch.zeros_like(pattern), w, b, 0.0)


def _fitted(terms: Tensor, slope: Tensor, change: Tensor) -> Tensor:
    """Return the opacity (n,) in [0, 0.95], linear in its terms (n, k), for which ``opacity · slope`` is the change."""
    rows = (terms * slope[:, None]).double()
    coefficients = torch.linalg.lstsq(rows, change.double()[:, None]).solution[:, 0]
    return (terms.double() @ coefficients).to(terms).clamp(0, 0.95)


def opacity(quartiles: Tensor, other_quartiles: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Estimate opacity α (H, W) and content c (C, H, W) of what is blended into images, from each pixel's quartiles.

    With ``x' = (1 - α) x + α c`` and the same distribution of x in both sets, every spread is (1 - α) times what it
    was, ``s' = (1 - α) s``, and ``median' = (1 - α) median + α c``. The distance of the quartiles is the spread: a
    cluster is never quite pure. Spreads are pooled over channels and a Gaussian neighbourhood of `sigma` pixels; the
    content is one colour, the mean weighted by α², for a pixel of its own knows little of it.
    """
    (lower, inside, upper), (before_lower, outside, before_upper) = quartiles, other_quartiles
    spread, before = (
        torch.from_numpy(ndimage.gaussian_filter((b - a).mean(dim=0).numpy(), sigma))
        for a, b in ((lower, upper), (before_lower, before_upper))
    )
    alpha = 1 - spread / before.clamp_min(1e-3)
    # A content inside [0, 1] has to account for the difference of the medians, too.
    apart = inside - outside
    room = torch.where(apart > 0, 1 - outside, outside).clamp_min(0.05)
    least = torch.from_numpy(ndimage.gaussian_filter((apart.abs() / room).amax(dim=0).numpy(), sigma))
    alpha = torch.maximum(alpha, 0.5 * (alpha + least)).clamp(0, 1)
    alpha = torch.where((alpha > FAINTEST) & (least > 0.25 * FAINTEST), alpha, 0.0)
    weight = alpha / alpha.square().sum().clamp_min(1e-6)
    color = ((inside - (1 - alpha) * outside) * weight).sum(dim=(1, 2)).clamp(0, 1)
    return alpha, color[:, None, None].expand_as(outside).clone()
