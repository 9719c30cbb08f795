"""Steps after which the place of something in a heatmap does not count: an artifact at a random place clusters too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from spray.analysis.options import at_least
from spray.analysis.steps import STEPS, Smooth, Step


@STEPS.register("marginals")
@dataclass(frozen=True)
class Marginals(Step):
    """Relevance by position: the sums of the rows and of the columns, each in descending order.

    With `ordered: false` they stay where they are, which tells where relevance is with H + W numbers.
    """

    ordered: bool = True
    maps: ClassVar[bool] = True

    def _apply(self, x: Tensor) -> Tensor:
        sums = [x.sum(dim=3), x.sum(dim=2)]
        if self.ordered:
            sums = [part.sort(dim=2, descending=True).values for part in sums]
        return torch.cat([part.flatten(1) for part in sums], dim=1)


@STEPS.register("histogram")
@dataclass(frozen=True)
class Histogram(Step):
    """How a heatmap's relevance is spread over values of different size: the share of |R| in each bin.

    Values are taken relative to the map's mean |R|, on the scale of asinh: linear near zero, logarithmic beyond, of
    both signs.
    """

    bins: int = 32
    maps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least("bins", self.bins, 2)

    def _apply(self, x: Tensor) -> Tensor:
        flat = x.flatten(1).double()
        size = flat.abs()
        total = size.sum(dim=1, keepdim=True)
        share = torch.where(total > 0, size / total.clamp_min(torch.finfo(flat.dtype).tiny), 0)
        d = flat.shape[1]
        # The largest value that is possible is d times the mean.
        place = torch.asinh(share * d) * flat.sign() / torch.asinh(torch.tensor(float(d), dtype=flat.dtype))
        bin_ = ((place + 1) / 2 * self.bins).long().clamp(0, self.bins - 1)
        return torch.zeros(len(flat), self.bins, dtype=flat.dtype).scatter_add_(1, bin_, share).float()


@STEPS.register("spectrum")
@dataclass(frozen=True)
class Spectrum(Step):
    """The radial spectrum: the root of the mean power at each spatial frequency, whatever its direction.

    A map that is moved in a circle has the same spectrum, which also tells how coarse or fine the relevance is.
    """

    maps: ClassVar[bool] = True

    def _apply(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        ring, members = _rings(height, width)
        # In units of the largest value, whose square would leave the range of float32.
        largest = x.flatten(1).abs().amax(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
        scaled = x / largest.reshape(-1, 1, 1, 1)
        power = torch.fft.fft2(scaled).abs().square().flatten(2)
        sums = torch.zeros(*x.shape[:2], len(members)).index_add_(2, ring, power)
        return ((sums / members).sqrt() * largest.reshape(-1, 1, 1)).flatten(1)


@STEPS.register("peak")
@dataclass(frozen=True)
class Peak(Step):
    """The surroundings, `size` pixels high and wide, of where the most relevance is (after a blur by `sigma`).

    What is beyond the border counts as zero.
    """

    size: int = 8
    sigma: float = 1.0
    maps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least("size", self.size, 1)
        at_least("sigma", self.sigma, 0, strictly=True)

    def _apply(self, x: Tensor) -> Tensor:
        n, _, _, width = x.shape
        blurred = Smooth(self.sigma)(x.abs().sum(dim=1, keepdim=True))
        at = blurred.flatten(1).argmax(dim=1)
        before, after = self.size // 2, (self.size - 1) // 2
        padded = nn.functional.pad(x, (before, after, before, after))
        offset = torch.arange(self.size)
        rows = (at // width)[:, None] + offset
        columns = (at % width)[:, None] + offset
        sample = torch.arange(n)[:, None, None]
        return padded.movedim(1, 3)[sample, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


@lru_cache(maxsize=8)
def _rings(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the ring (H·W,) that each frequency belongs to and the rings' numbers of members."""
    vertical, horizontal = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    # In cycles per longer side; beyond the half of a pixel's frequency only corners are left, the last ring.
    radius = (vertical[:, None].square() + horizontal.square()).sqrt() * max(height, width)
    ring = radius.round().long().clamp_max(max(height, width) // 2).flatten()
    members = torch.bincount(ring)
    # Long and narrow maps leave rings without a member.
    return ring, members.clamp_min(1).float()
