"""Artifacts that change the whole image: brighter, tinted, less contrast, blurred, noisy; or only its background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from spray.isolation.artifact import ARTIFACTS, Artifact
from spray.isolation.evidence import Evidence
from spray.isolation.statistics import BANDS, frequencies, quartiles, radial_power, statistics

BACKGROUND = 0.25
"""How far from the background's colour a pixel may be, in its most different channel, to belong to it at all."""
RANGE = 0.15
"""Share of images that may be darker than the darkest typical one, and lighter than the lightest."""
WEAKEST = 0.02
"""Least root mean square change, in units of the pixel range, that is a change."""
SAME = 0.02
"""Values of which the quartiles lie this close together, in units of the pixel range, are the same in all images."""


@ARTIFACTS.register("global")
@dataclass(frozen=True)
class Changed(Artifact):
    """A change of the whole image: ``x' = a · (G_σ * x) + b + ν · η`` per channel, clipped to [0, 1].

    Attributes
    ----------
    gain, offset : Tensor
        (C,): a and b. As a blend with a colour c: ``a = 1 - α``, ``b = α c``.
    blur : float
        Standard deviation σ of the Gaussian, in pixels; 0 for none.
    noise : float
        Standard deviation ν of white noise; 0 for none.
    weights, bias : Tensor, float
        (d,): what makes a score of an image's statistics.
    even : bool
        Whether the noise is evenly distributed rather than normally; its range ends at √3 ν then.
    """

    kind: ClassVar[str] = "global"
    exact: ClassVar[bool] = False
    drawn: ClassVar[bool] = False

    gain: Tensor
    offset: Tensor
    blur: float
    noise: float
    weights: Tensor
    bias: float
    even: bool = False

    @property
    def bound_to_a_place(self) -> bool:
        """It is everywhere."""
        return False

    @property
    def opacity(self) -> float:
        """The share of the image that is replaced: 1 - a."""
        return float((1 - self.gain).mean().clamp(0, 1))

    @property
    def replaced(self) -> float:
        """As much as it is opaque, everywhere."""
        return self.opacity

    def region(self, images: Tensor) -> Tensor:
        """Return where images are changed, and how strongly, (n, 1, H, W)."""
        return images.new_ones(len(images), 1, *images.shape[2:])

    def found(self, images: Tensor) -> Tensor:
        """Return the mask (n, 1, H, W)."""
        return self.region(images)

    def score(self, images: Tensor) -> Tensor:
        """Return how much an image's statistics (n,) are like the cluster's, 1, rather than like the rest's, 0."""
        return statistics(images) @ self.weights.to(images) + self.bias

    def add(self, images: Tensor, draws: np.ndarray) -> tuple[Tensor, Tensor]:
        """Change images (n, C, H, W); each draw has noise of its own."""
        gain, offset = (part.to(images)[:, None, None] for part in (self.gain, self.offset))
        new = gain * smoothed(images, self.blur) + offset
        if self.noise:
            eta = np.stack([_white(np.random.default_rng([int(d), 3]), images.shape[1:], self.even) for d in draws])
            new = new + self.noise * torch.from_numpy(eta).to(images)
        region = self.region(images)
        return images + region * (new.clamp(0, 1) - images), region

    def insert(self, images: Tensor, draws: np.ndarray, content: Tensor | None = None) -> Tensor:
        """Change images, or blend them with the mean colour of other `content` by as much (root mean square).

        The whole of another image would not be a control: whatever speaks for its class comes along.
        """
        marked, region = self.add(images, draws)
        if content is None:
            return marked
        towards = region * (content.to(images).mean(dim=(2, 3), keepdim=True) - images)
        strength = (rms(marked - images) / rms(towards).clamp_min(1e-6)).clamp_max(1)
        return images + strength[:, None, None, None] * towards

    def placed(self, draws: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return masks and patterns for those who paste: the colour that is blended with, as opaque as it is."""
        n = len(draws)
        return (self.opacity * self.mask).expand(n, 1, -1, -1), self.pattern.expand(n, -1, -1, -1)

    def without(self, images: Tensor) -> Tensor:
        """Return images (n, C, H, W) with the change undone as far as that goes: noise smoothed, gain and offset back.

        What a blur took away does not come back by itself; unsharp masking restores its amplitude where it is known.
        """
        gain, offset = (part.to(images)[:, None, None] for part in (self.gain, self.offset))
        calm = _denoised(images, self.noise) if self.noise else images
        if self.blur:
            calm = calm + 2 * (calm - smoothed(calm, self.blur))
        back = ((calm - offset) / gain.clamp_min(0.1)).clamp(0, 1)
        region = self.region(images)
        return images + region * (back - images)


@ARTIFACTS.register("background")
@dataclass(frozen=True)
class Background(Changed):
    """A change of the pixels that have the colour of the background, of which the typical one on the border says most.

    Opacity falls from 1 for that colour to 0 for such as differ by `BACKGROUND` in a channel.
    """

    kind: ClassVar[str] = "background"

    def region(self, images: Tensor) -> Tensor:
        """Return the background's opacity (n, 1, H, W)."""
        distance = (images - background_color(images)[:, :, None, None]).abs().amax(dim=1, keepdim=True)
        return (1 - distance / BACKGROUND).clamp(0, 1)


def isolate_change(evidence: Evidence) -> Changed | None:
    """Fit the change of the whole image that makes the rest of the class look like the cluster.

    Gain and offset come from the moments of each pixel, since ``sd' = a sd`` and ``mean' = a mean + b``; the spread
    over images of what is no noise is taken from smoothed images. Blur and noise come from the spectrum: against
    ``a²`` times the rest's, a blur leaves the share ``exp(-(2πfσ)²)`` of the power at frequency f, while white noise
    adds as much at every frequency.

    Returns
    -------
    Changed or None
        None if hardly anything is changed.
    """
    inside, outside = evidence.images, evidence.other_images
    gain, offset = _linear(smoothed(inside, 1.0), smoothed(outside, 1.0))
    flat = outside * gain[:, None, None] + offset[:, None, None]
    blur, noise = _spectral(inside, flat)
    # What noise and blur do to the range of values is no matter of gain.
    found = _checked(Changed, evidence, gain, offset, blur, noise)
    if found is None or not noise:
        return found
    tails, changed = _tails(inside), (replace(found, even=even) for even in (False, True))
    return min(changed, key=lambda one: abs(_tails(one.add(outside, np.arange(len(outside)))[0]) - tails))


def _tails(images: Tensor) -> float:
    """Return the typical kurtosis of what images have beyond their coarse structure.

    The spectrum of white noise does not tell how its values are distributed; this does.
    """
    fine = (images - smoothed(images, 1.0)).flatten(1)
    fine = fine - fine.mean(dim=1, keepdim=True)
    variance = fine.square().mean(dim=1).clamp_min(1e-12)
    return float((fine.pow(4).mean(dim=1) / variance.square()).median())


def _white(rng: np.random.Generator, shape: Sequence[int], even: bool) -> np.ndarray:
    """Return white noise of mean 0 and variance 1, float32."""
    noise = rng.random(shape, np.float32) * 2 * 3**0.5 - 3**0.5 if even else rng.standard_normal(shape, np.float32)
    return noise.astype(np.float32)


def isolate_faded(evidence: Evidence) -> Changed | None:
    """Fit the blend with one colour that takes the range of the rest's values to that of the cluster's.

    Black and white are in most images, whatever they show: what ``x' = a x + b`` makes of the darkest and the lightest
    pixel of an image says more of b and a + b than the pixels in between, of which each image has others.

    Returns
    -------
    Changed or None
        None if hardly anything is changed, or if contrast is gained.
    """
    inside, outside = evidence.images.flatten(2), evidence.other_images.flatten(2)
    # Typical of the images that go farthest, and not of the one that does: a cluster is never quite pure.
    low, before_low = (values.amin(dim=2).quantile(RANGE, dim=0) for values in (inside, outside))
    high, before_high = (values.amax(dim=2).quantile(1 - RANGE, dim=0) for values in (inside, outside))
    gain = (high - low) / (before_high - before_low).clamp_min(0.1)
    if not 0.1 <= float(gain.min()) <= float(gain.max()) <= 1.0 + WEAKEST:
        return None
    return _checked(Changed, evidence, gain, low - gain * before_low, 0.0, 0.0)


def isolate_background(evidence: Evidence) -> Background | None:
    """Fit the change of the background's colour that makes the rest of the class look like the cluster."""
    inside, outside = background_color(evidence.images), background_color(evidence.other_images)
    gain, offset = _linear(inside[:, :, None, None], outside[:, :, None, None])
    found = _checked(Background, evidence, gain, offset, 0.0, 0.0)
    assert found is None or isinstance(found, Background)
    return found


def _checked(
    kind: type[Changed], evidence: Evidence, gain: Tensor, offset: Tensor, blur: float, noise: float
) -> Changed | None:
    """Return the change with a score, None for one that hardly changes the rest of the class."""
    shape = evidence.images.shape[1:]
    w, b = evidence.discriminant
    color = (offset / (1 - gain).clamp_min(0.05)).clamp(0, 1)
    parts = (gain, offset, blur, noise, w, b)
    flat = color[:, None, None].expand(shape).clone()
    found = kind(torch.ones(shape[1:]), flat, torch.zeros(1, 2, dtype=torch.int64), 1.0, 1, True, *parts)
    some = evidence.other_images[:64]
    changed = found.add(some, np.arange(len(some)))[0] - some
    return found if float(rms(changed).mean()) >= WEAKEST else None


def _linear(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Return gain and offset (C,) that map the pixels' quartiles over one set of images to those over the other.

    Quartiles rather than moments: a cluster is never quite pure. Of values that are the same in all images nothing
    tells a gain, and it is 1: undone, a small one would blow up whatever is left of the image.
    """
    lower, middle, upper = quartiles(inside)
    before_lower, before, before_upper = quartiles(outside)
    spread, before_spread = ((b - a).mean(dim=(1, 2)) for a, b in ((lower, upper), (before_lower, before_upper)))
    gain = torch.where(before_spread > SAME, spread / before_spread.clamp_min(SAME), 1.0).clamp(0.1, 1.5)
    return gain, middle.mean(dim=(1, 2)) - gain * before.mean(dim=(1, 2))


def _spectral(inside: Tensor, outside: Tensor) -> tuple[float, float]:
    """Return blur σ and noise ν that turn the mean spectrum of the one set of images into the other's."""
    power, before = (radial_power(images).exp().mean(dim=0) for images in (inside, outside))
    ratio = (power / before).log()
    if ratio[-1] > ratio[1] + 0.3:
        window = torch.outer(*(torch.hann_window(side, periodic=False) for side in inside.shape[2:]))
        added = (power - before)[BANDS // 2 :].clamp_min(0).median()
        return 0.0, float((added / window.square().sum()).sqrt())
    if ratio[-1] < ratio[0] - 0.7:
        # The highest rings hold what rounding left; slope of the log power over (2πf)² up to there.
        x = (2 * np.pi * frequencies()).square()
        use = slice(0, BANDS - 1)
        slope = float(((x[use] - x[use].mean()) * (ratio[use] - ratio[use].mean())).sum() / x[use].var() / (BANDS - 2))
        return float(np.sqrt(max(0.0, -slope))), 0.0
    return 0.0, 0.0


def smoothed(images: Tensor, sigma: float) -> Tensor:
    """Return images (n, C, H, W) smoothed by a Gaussian of σ pixels, mirrored at the border."""
    if sigma <= 0:
        return images
    radius = min(int(np.ceil(3 * sigma)), min(images.shape[2:]) - 1)
    kernel = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    kernel /= 2 * kernel.sum() - kernel[0]
    result = nn.functional.pad(images, (radius,) * 4, mode="reflect")
    # Sums of moved images: PyTorch's convolution of each channel alone takes three to ten times as long.
    for dim in (2, 3):
        size = images.shape[dim]
        parts = [result.narrow(dim, start, size) for start in range(2 * radius + 1)]
        total = float(kernel[0]) * parts[radius]
        for distance, weight in enumerate(kernel[1:].tolist(), start=1):
            total.add_(parts[radius - distance] + parts[radius + distance], alpha=weight)
        result = total
    return result


def background_color(images: Tensor) -> Tensor:
    """Return the colour (n, C) of the pixel on each image's border that is nearest to the border's median."""
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, 1:-1, 0], images[:, :, 1:-1, -1]], dim=2)
    middle = border.median(dim=2, keepdim=True).values
    nearest = (border - middle).abs().amax(dim=1).argmin(dim=1)
    return border.gather(2, nearest[:, None, None].expand(-1, border.shape[1], 1))[:, :, 0]


def rms(difference: Tensor) -> Tensor:
    """Return the root mean square (n,) of differences (n, C, H, W)."""
    return difference.square().mean(dim=(1, 2, 3)).sqrt()


def _denoised(images: Tensor, noise: float) -> Tensor:
    """Return images without white noise of that standard deviation, by total variation (Chambolle, 2004)."""
    from skimage.restoration import denoise_tv_chambolle

    return torch.from_numpy(
        np.stack(
            [denoise_tv_chambolle(image, weight=1.5 * noise, channel_axis=0) for image in images.cpu().double().numpy()]
        )
    ).to(images)
