"""Clusters that are made of known parts: pictures, and the rest of their class, with an artifact planted in them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from spray.data.planting import Plant
from spray.isolation.evidence import Evidence

SIDE = 32
N, REST = 80, 160


def scenes(n: int, seed: int) -> Tensor:
    """Smooth random pictures with fine structure, quantised as images are."""
    rng = np.random.default_rng(seed)
    sizes = ((4, 0.4), (12, 0.3), (SIDE, 0.3))
    parts = [(torch.from_numpy(rng.random((n, 3, side, side))).float(), weight) for side, weight in sizes]
    grown = [w * nn.functional.interpolate(part, size=(SIDE, SIDE), mode="bilinear") for part, w in parts]
    return (sum(grown) * 255).round() / 255


class World:
    """A cluster that carries a planted artifact, with heatmaps that show it, and the rest of its class."""

    def __init__(self, **options: object) -> None:
        self.plant = Plant.from_config({"class": 0} | options, ("a", "b"), (3, SIDE, SIDE))
        self.clean = scenes(N, 1)
        self.images, self.opacity = self.plant.mark(self.clean, [f"{i}" for i in range(N)])
        self.other = scenes(REST, 2)
        noise = [
            torch.from_numpy(np.random.default_rng(s).normal(0.05, 0.1, (n, SIDE, SIDE))).float()
            for s, n in ((3, N), (4, REST))
        ]
        seen = self.opacity if self.plant.kind not in ("brightness", "tint", "noise", "blur") else 0 * self.opacity
        self.evidence = Evidence(self.images, noise[0] + seen, self.other, noise[1])
