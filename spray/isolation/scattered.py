"""Artifacts that lie anywhere: windows around each sample's peak of relevance are aligned before they are averaged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from spray.isolation.alignment import extent, match_anywhere
from spray.isolation.artifact import Scattered
from spray.isolation.candidate import isolate
from spray.isolation.evidence import Evidence

WINDOW = 0.6
"""Side of the windows, as a share of the image's shorter side."""


def isolate_scattered(evidence: Evidence) -> Scattered | None:
    """Isolate content that the samples share at places of their own.

    The rest of the class is cut at the same places, so that the relevance there is what any place gets.
    """
    height, width = evidence.images.shape[2:]
    side = max(8, 2 * round(WINDOW * min(height, width) / 2))
    if side >= min(height, width):
        return None
    centers = peaks(evidence.relevance)
    elsewhere = centers[torch.arange(len(evidence.other_images)) % len(centers)]
    parts = (
        windows(evidence.images, centers, side),
        windows(evidence.relevance[:, None], centers, side)[:, 0],
        windows(evidence.other_images, elsewhere, side),
        windows(evidence.other_relevance[:, None], elsewhere, side)[:, 0],
    )
    local = isolate(*parts, radius=side // 5)
    if local is None or not local.constant:
        return None
    mask, pattern = torch.zeros(height, width), torch.zeros(evidence.images.shape[1], height, width)
    top, left = (height - side) // 2, (width - side) // 2
    mask[top : top + side, left : left + side] = local.mask
    pattern[:, top : top + side, left : left + side] = local.pattern
    found = Scattered(mask, pattern, torch.zeros(1, 2, dtype=torch.int64), 1.0, 1, True)
    rows, columns = extent(found.core)
    ends = (rows.start, columns.start, height - rows.stop, width - columns.stop)
    shifts = match_anywhere(evidence.images, pattern, found.core)[1]
    found = replace(found, shifts=shifts, radius=max(1, *ends))
    scale = float((1 - found.score(evidence.other_images)).median())
    return replace(found, scale=max(scale, 1e-6))


def peaks(relevance: Tensor) -> Tensor:
    """Return where (n, 2) each heatmap (n, H, W) is highest once it is smoothed."""
    sigma = max(relevance.shape[1:]) / 20
    smooth = ndimage.gaussian_filter(relevance.clamp_min(0).numpy(), (0, sigma, sigma), mode="constant")
    best = smooth.reshape(len(smooth), -1).argmax(axis=1)
    return torch.from_numpy(np.stack(np.divmod(best, relevance.shape[2]), axis=1))


def windows(images: Tensor, centers: Tensor, side: int) -> Tensor:
    """Return square windows (n, C, side, side) around a place (n, 2) of each image, mirrored at the border."""
    half = side // 2
    padded = nn.functional.pad(images, (half,) * 4, mode="reflect" if half < min(images.shape[2:]) else "replicate")
    rows = torch.arange(side) + centers[:, :1]
    columns = torch.arange(side) + centers[:, 1:]
    sample = torch.arange(len(images))[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
