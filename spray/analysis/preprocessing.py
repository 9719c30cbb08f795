"""From relevance maps to the vectors that SpRAy compares."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def heatmap_features(relevance: np.ndarray | Tensor, grid: int = 16) -> np.ndarray:
    """Sum the channels, make the map smaller, divide it by the sum of its absolute values.

    The absolute sum, not the signed one, is what a map is divided by: the signed sum may be next to zero or
    negative, which would blow the map up or turn its signs around.

    Parameters
    ----------
    relevance : ndarray or Tensor
        (n, C, H, W), finite.
    grid : int
        Maps with more than so many rows or columns are averaged down to it.

    Returns
    -------
    ndarray of float32
        (n, h·w), h and w at most `grid`; a map without any relevance stays zero.

    Raises
    ------
    ValueError
        If the relevance is not finite.
    """
    maps = torch.as_tensor(relevance).float().sum(dim=1, keepdim=True)
    if not maps.isfinite().all():
        raise ValueError("the relevance holds NaN or infinity")
    height, width = maps.shape[2:]
    size = (min(grid, height), min(grid, width))
    if size != (height, width):
        maps = nn.functional.adaptive_avg_pool2d(maps, size)
    flat = maps.flatten(1)
    total = flat.abs().sum(dim=1, keepdim=True)
    return torch.where(total > 0, flat / total.clamp_min(torch.finfo(flat.dtype).tiny), 0).numpy()
