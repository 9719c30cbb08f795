"""Finding the same content at slightly different places: template matching and congealing.

Learned-Miller, "Data driven image models through continuous joint alignment", 2006, here with translations only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
    # All else has no weight. In double precision, since of the large sums next to nothing is left where images match.
    part = extent(mask)
    kernels, weights, constant = _shifted_kernels(template[:, *part].double(), mask[part].to(images).double(), radius)
    padded = nn.functional.pad(images, (radius,) * 4, mode="replicate")
    rows, columns = (slice(side.start, side.stop + 2 * radius) for side in part)
    padded = padded[:, :, rows, columns].double()
    squares = (padded**2).sum(dim=1).flatten(1) @ weights
    products = padded.flatten(1) @ kernels
    distance = ((squares - 2 * products + constant) / mask.sum()).to(images)
    # Shifts that come equally close are decided for the smallest one: without content there is nothing to follow.
    offset = torch.arange(-radius, radius + 1, device=images.device).float()
    length = (offset[:, None] ** 2 + offset**2).flatten()
    best = (distance + 1e-6 * length).argmin(dim=1)
    shift = torch.stack([best // len(offset), best % len(offset)], dim=1) - radius
    return distance.gather(1, best[:, None])[:, 0].clamp_min(0), shift


def extent(mask: Tensor) -> tuple[slice, slice]:
    """Return the rows and the columns that a mask (H, W), not all zero, reaches over."""
    rows, columns = (mask.amax(dim=dim).nonzero()[:, 0] for dim in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _shifted_kernels(template: Tensor, mask: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return m·T and m at every shift as columns over the padded image, and Σ m T².

    With them a matrix product gives the distance of all images at all shifts.
    """
    height, width = (side + 2 * radius for side in mask.shape)
    weighted = mask * template

    def moved(x: Tensor) -> Tensor:
        """Return what lies at each shift, (shifts, shifts, channels, height, width), of x (channels, ...)."""
        wide = nn.functional.pad(x, (2 * radius,) * 4)
        return wide.unfold(1, height, 1).unfold(2, width, 1).flip(1, 2).movedim(0, 2)

    kernels, weights = (moved(x).flatten(2).flatten(0, 1).T for x in (weighted, mask[None]))
    return kernels, weights, (weighted * template).sum()


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
    some = images[:: max(1, len(images) // 16)]
    distances = torch.stack([match(some, image, mask, radius)[0].sqrt().mean() for image in some])
    template = some[int(distances.argmin())]
    shift = torch.zeros(len(images), 2, dtype=torch.int64, device=images.device)
    for _ in range(rounds):
        _, found = match(images, template, mask, radius)
        found = (found - found.median(dim=0).values).clamp(-radius, radius)
        template = shifted(images, found, radius).median(dim=0).values
        if torch.equal(found, shift):
            break
        shift = found
    return template, shift


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
