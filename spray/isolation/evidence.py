"""What an artifact is isolated from: a cluster's samples and others of their class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from spray.isolation.artifact import Artifact
from spray.isolation.candidate import Common, find_common, relevance_gain
from spray.isolation.statistics import discriminant, quartiles, statistics


@dataclass(frozen=True)
class Evidence:
    """Images with their heatmaps, of a cluster and of the rest of its class; what several isolators ask is kept.

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

    @cached_property
    def gain(self) -> Tensor:
        """How much more relevance the cluster has at each pixel, (H, W), see `relevance_gain`."""
        return relevance_gain(self.relevance, self.other_relevance)

    @cached_property
    def _common(self) -> Common | None:
        return find_common(self.images, self.relevance, self.other_images, self.other_relevance)

    def common_artifact(self, near: bool = False) -> Artifact | None:
        """Return what the cluster's images have in common, see `spray.isolation.candidate.isolate`."""
        return None if self._common is None else self._common.artifact(self.other_images, near)

    @cached_property
    def quartiles(self) -> tuple[Tensor, Tensor]:
        """The quartiles (3, C, H, W) of each pixel, in the cluster and in the rest."""
        return quartiles(self.images), quartiles(self.other_images)

    @cached_property
    def discriminant(self) -> tuple[Tensor, float]:
        """Weights (d,) and bias of `statistics` by which the cluster, 1, is told from the rest, 0."""
        return discriminant(statistics(self.images), statistics(self.other_images))
