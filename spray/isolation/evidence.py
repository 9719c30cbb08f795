"""What an artifact is isolated from: a cluster's samples and others of their class."""

from __future__ import annotations

from dataclasses import dataclass

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
        images, maps, others, other_maps = self.images, self.relevance, self.other_images, self.other_relevance
        return Evidence(images[which::2], maps[which::2], others[which::2], other_maps[which::2])
