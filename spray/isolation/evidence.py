"""What an artifact is isolated from: a cluster's samples and others of their class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """Images with their heatmaps, of a cluster and of the rest of its class.

    Attributes
    ----------
    images : Tensor
        (n, C, H, W) in [0, 1], the cluster's.
    relevance : Tensor
        (n, H, W): their heatmaps.
    other_images, other_relevance : Tensor
        The same of the rest.
    """

    images: Tensor
    relevance: Tensor
    other_images: Tensor
    other_relevance: Tensor

    def half(self, which: int) -> Evidence:
        """Return every second sample, from the first (0) or second (1) on."""
        return Evidence(*(part[which::2] for part in (self.images, self.relevance)), *self._others(which))

    def _others(self, which: int) -> tuple[Tensor, Tensor]:
        return self.other_images[which::2], self.other_relevance[which::2]

    def take(self, inside: np.ndarray) -> Evidence:
        """Return the same samples, told apart anew: `inside`, bool (n + m,), over the cluster's, then the rest's."""
        images = torch.cat([self.images, self.other_images])
        maps = torch.cat([self.relevance, self.other_relevance])
        which = torch.from_numpy(inside)
        return Evidence(images[which], maps[which], images[~which], maps[~which])
