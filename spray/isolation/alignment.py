"""Finding the same content at slightly different places: template matching and congealing.

Learned-Miller, "Data driven image models through continuous joint alignment", 2006, here with translations only.
"""

from __future__ import annotations

from copy import copy

import torch
from scipy.fft import next_fast_len
from torch import Tensor, nn

from spray.isolation.statistics import median


def match(images: Tensor, template: Tensor, mask: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Find where each image comes closest to the template inside the mask.

    The distance at shift δ is Σ_p m(p) |I(p + δ) - T(p)|² / Σ_p m(p), summed over channels; beyond its border an
    image is continued by its border pixels.

    Parameters
    ----------
    images : Tensor
        (n, C, H, W).
    template : Tensor
        (C, H, W).
    mask : Tensor
        (H, W) in [0, 1], not all zero.
    radius : int
        Largest shift in pixels, in both directions.

    Returns
    -------
    distance : Tensor
        (n,), at the best shift.
    shift : Tensor of int64
        (n, 2): by how many rows and columns the image's content lies away from the template's.
    """
    return Matching(images, mask, radius).to(template)


class Matching:
    """Images (n, C, H, W) whose distances to one template after the other are wanted, as of `match`.

    The sums over the mask at all shifts are correlations, which multiply spectra: I² * m - 2 I * (m T) + Σ m T².
    """

    def __init__(self, images: Tensor, mask: Tensor, radius: int) -> None:
        # All outside has no weight. In double precision, since of the large sums next to nothing is left where images
        # match.
        self.part, self.radius = extent(mask), radius
        self.mask = mask[self.part].to(images).double()
        padded = around(images, self.part, radius).double()
        self.size = [next_fast_len(side, real=True) for side in padded.shape[2:]]
        self.spectra, self.squares = self._spectrum(padded), self._spectrum((padded**2).sum(dim=1))
        self.weights = self._spectrum(self.mask).conj()

    def _spectrum(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(x, s=self.size)

    def only(self, which: slice) -> Matching:
        """Return what some of the images are matched with."""
        some = copy(self)
        some.spectra, some.squares = self.spectra[which], self.squares[which]
        return some

    def within(self, mask: Tensor) -> Matching:
        """Return what the images are matched with inside another mask (H, W), which reaches no further."""
        other = copy(self)
        other.mask = mask[self.part].to(self.mask)
        other.weights = self._spectrum(other.mask).conj()
        return other

    def to(self, template: Tensor) -> tuple[Tensor, Tensor]:
        """Return distance (n,) and shift (n, 2) of a template (C, H, W)."""
        distance, shift = self.least(self.distances(template))
        return distance.clamp_min(0), shift

    def distances(self, template: Tensor) -> Tensor:
        """Return the distances (n, shifts²) of a template (C, H, W) at all shifts."""
        content = template[:, *self.part].double()
        weighted = self._spectrum(self.mask * content).conj()
        spectrum = self.squares * self.weights - 2 * (self.spectra * weighted).sum(dim=1)
        side = 2 * self.radius + 1
        sums = torch.fft.irfft2(spectrum, s=self.size)[:, :side, :side].flatten(1)
        return ((sums + (self.mask * content.square()).sum()) / self.mask.sum()).to(template)

    def least(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least of the values (n, shifts²) at all shifts, (n,), and the shift (n, 2)."""
        # Shifts that come equally close are decided for the smallest one: without content there is nothing to follow.
        offset = torch.arange(-self.radius, self.radius + 1, device=values.device).float()
        length = (offset[:, None] ** 2 + offset**2).flatten()
        best = (values + 1e-6 * length).argmin(dim=1)
        shift = torch.stack([best // len(offset), best % len(offset)], dim=1) - self.radius
        return values.gather(1, best[:, None])[:, 0], shift


def extent(mask: Tensor) -> tuple[slice, slice]:
    """Return the rows and the columns that a mask (H, W), not all zero, reaches over."""
    rows, columns = (mask.amax(dim=dim).nonzero()[:, 0] for dim in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def around(images: Tensor, part: tuple[slice, slice], radius: int) -> Tensor:
    """Return a part of images (n, C, H, W), with a margin; beyond its border an image is continued by its pixels."""
    within, beyond = [], []
    for side, size in zip(part, images.shape[2:], strict=True):
        start, stop = side.start - radius, side.stop + radius
        within.append(slice(max(start, 0), min(stop, size)))
        beyond.append((max(-start, 0), max(stop - size, 0)))
    return nn.functional.pad(images[:, :, *within], (*beyond[1], *beyond[0]), mode="replicate")


def shifted(images: Tensor, shift: Tensor, radius: int) -> Tensor:
    """Move each image back by its shift, so that its content lies where the template's does.

    Parameters
    ----------
    images : Tensor
        (n, C, H, W).
    shift : Tensor of int64
        (n, 2), at most `radius` in absolute value.
    radius : int
        Width of the border that is continued.

    Returns
    -------
    Tensor
        (n, C, H, W): result(p) = image(p + shift).
    """
    height, width = images.shape[2:]
    padded = nn.functional.pad(images, (radius,) * 4, mode="replicate")
    rows = torch.arange(height, device=images.device) + radius + shift[:, :1]
    columns = torch.arange(width, device=images.device) + radius + shift[:, 1:]
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def congeal(images: Tensor, mask: Tensor, radius: int, rounds: int = 6) -> tuple[Tensor, Tensor]:
    """Align images to the template that they share.

    Starts from the medoid among some images, the one that the others come closest to, then takes turns between
    aligning all images with the template and making the template their median.

    Parameters
    ----------
    images : Tensor
        (n, C, H, W), n at least 1.
    mask : Tensor
        (H, W): where to look.
    radius : int
        Largest shift.
    rounds : int
        Most turns taken.

    Returns
    -------
    template : Tensor
        (C, H, W): the median of the aligned images.
    shift : Tensor of int64
        (n, 2), the median shift being zero.
    """
    matching, some = Matching(images, mask, radius), slice(None, None, max(1, len(images) // 16))
    among = matching.only(some)
    distances = torch.stack([among.to(image)[0].sqrt().mean() for image in images[some]])
    template = images[some][int(distances.argmin())]
    shift = torch.zeros(len(images), 2, dtype=torch.int64, device=images.device)
    for _ in range(rounds):
        _, found = matching.to(template)
        found = (found - found.median(dim=0).values).clamp(-radius, radius)
        template = median(shifted(images, found, radius), dim=0)
        if torch.equal(found, shift):
            break
        shift = found
    return template, shift


def exact(images: Tensor, shift: Tensor, template: Tensor, mask: Tensor, factor: int, radius: int) -> Tensor:
    """Return shifts (n, 2), which were found in images made smaller by a factor, to the pixel.

    Parameters
    ----------
    images : Tensor
        (n, C, H, W).
    shift : Tensor of int64
        (n, 2), at most `radius`.
    template, mask
        As of `match`.
    factor : int
        How many pixels of the images one was: as far is looked.
    radius : int
        Largest shift.
    """
    if factor == 1:
        return shift
    moved = shifted(images, shift, radius)
    return (shift + match(moved, template, mask, factor)[1]).clamp(-radius, radius)


def match_anywhere(images: Tensor, template: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Find where each image comes closest to the masked part of a template, wherever that fits inside the image.

    The same distance as of `match`, by convolution with the masked part alone.

    Parameters
    ----------
    images : Tensor
        (n, C, H, W).
    template : Tensor
        (C, H, W).
    mask : Tensor
        (H, W) in [0, 1], not all zero.

    Returns
    -------
    distance : Tensor
        (n,), at the best place.
    shift : Tensor of int64
        (n, 2): by how many rows and columns the image's content lies away from the template's.
    """
    part = extent(mask)
    top, left = part[0].start, part[1].start
    weight, content = mask[part].to(images), template[:, *part].to(images)
    squares = nn.functional.conv2d(images.square().sum(dim=1, keepdim=True), weight[None, None])
    products = nn.functional.conv2d(images, (weight * content)[None])
    distance = ((squares - 2 * products)[:, 0] + (weight * content.square()).sum()) / weight.sum()
    best = distance.flatten(1).argmin(dim=1)
    shift = torch.stack([best // distance.shape[2] - top, best % distance.shape[2] - left], dim=1)
    return distance.flatten(1).gather(1, best[:, None])[:, 0].clamp_min(0), shift
