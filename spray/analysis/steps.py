"""Steps from a heatmap to the vector that SpRAy compares: one registry; each step takes and gives a batch.

A step is a frozen dataclass whose fields are its options. Most work on each sample alone; one that needs all
samples of a group first (`PCA`) says so by `fitted` and gets them in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

from spray.analysis.options import at_least
from spray.errors import UserError
from spray.registry import Registry


class Step:
    """One step; subclasses are frozen dataclasses.

    Attributes
    ----------
    maps : bool
        Whether it needs heatmaps (n, C, H, W) and can't take vectors (n, d).
    fitted : bool
        Whether it has to see all samples before it can change one.
    """

    maps: ClassVar[bool] = False
    fitted: ClassVar[bool] = False

    def __call__(self, x: Tensor) -> Tensor:
        """Return the batch, float32, after this step: as many samples, all zero where they were."""
        return self._apply(x)

    def _apply(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def fit(self, batches: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the step as fitted to all samples; only of those with `fitted`."""
        raise NotImplementedError

    def trial(self, x: Tensor) -> Tensor:
        """Return what the step would make of a few samples, to find out whether it fits."""
        return self(x)


STEPS: Registry[type[Step]] = Registry("step")


@STEPS.register("sum")
@dataclass(frozen=True)
class Sum(Step):
    """The sum of a heatmap's channels."""

    maps: ClassVar[bool] = True

    def _apply(self, x: Tensor) -> Tensor:
        return x.sum(dim=1, keepdim=True)


@STEPS.register("absolute")
@dataclass(frozen=True)
class Absolute(Step):
    """The absolute value: how much a place counts, for or against."""

    def _apply(self, x: Tensor) -> Tensor:
        return x.abs()


@STEPS.register("positive")
@dataclass(frozen=True)
class Positive(Step):
    """What speaks for the class; the rest is zero."""

    def _apply(self, x: Tensor) -> Tensor:
        return x.clamp_min(0)


@STEPS.register("pool")
@dataclass(frozen=True)
class Pool(Step):
    """Average maps with more rows or columns than `size` down to it."""

    size: int = 16
    maps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least("size", self.size, 1)

    def _apply(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        size = min(self.size, height), min(self.size, width)
        return x if size == (height, width) else nn.functional.adaptive_avg_pool2d(x, size)


@STEPS.register("smooth")
@dataclass(frozen=True)
class Smooth(Step):
    """Blur by a Gaussian of standard deviation `sigma` pixels, mirrored at the border: the sum stays."""

    sigma: float = 1.0
    maps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least("sigma", self.sigma, 0, strictly=True)

    def _apply(self, x: Tensor) -> Tensor:
        rows, columns = (_blur(length, self.sigma) for length in x.shape[2:])
        return rows @ x @ columns.T


@STEPS.register("normalize_sum")
@dataclass(frozen=True)
class NormalizeSum(Step):
    """Divide a sample by the sum of its absolute values.

    Not by the signed sum, which may be next to zero or negative, and would blow a map up or turn its signs around.
    """

    def _apply(self, x: Tensor) -> Tensor:
        return _divided(x, lambda flat: flat.abs().sum(dim=1))


@STEPS.register("normalize_l2")
@dataclass(frozen=True)
class NormalizeL2(Step):
    """Divide a sample by its Euclidean length."""

    def _apply(self, x: Tensor) -> Tensor:
        # By the largest value first, since squares of relevance easily leave the range of float32.
        return _divided(_divided(x, lambda flat: flat.abs().amax(dim=1)), lambda flat: flat.norm(dim=1))


@STEPS.register("pca")
@dataclass(frozen=True)
class PCA(Step):
    """The group's first principal components, from the covariance, which is summed up batch by batch.

    It pays where neighbours are searched in many dimensions. Its cost grows with their square, so that more than
    `MOST` have to be pooled first.
    """

    components: int = 64
    fitted: ClassVar[bool] = True
    MOST: ClassVar[int] = 4096

    def __post_init__(self) -> None:
        at_least("components", self.components, 1)

    def fit(self, batches: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the projection on the components, at most as many as there are samples or dimensions."""
        n, shift = 0, np.zeros(0)
        total = moment = np.zeros(0)
        for batch in batches:
            rows = batch.flatten(1).numpy().astype(np.float64)
            if n == 0:
                # Any point amid the samples will do: it keeps the sums from cancelling.
                shift = rows.mean(axis=0)
                total, moment = np.zeros_like(shift), np.zeros((len(shift), len(shift)))
            rows -= shift
            total += rows.sum(axis=0)
            moment += rows.T @ rows
            n += len(rows)
        if n == 0:
            return lambda x: x.new_zeros((len(x), 1))
        covariance = moment / n - np.outer(total, total) / n**2
        basis = torch.from_numpy(_leading(covariance, min(self.components, len(total), n))).float()
        mean = torch.from_numpy(shift + total / n).float()
        return lambda x: (x.flatten(1) - mean) @ basis

    def trial(self, x: Tensor) -> Tensor:
        """Return as many values as components that enough samples would have."""
        flat = x.flatten(1)
        if flat.shape[1] > self.MOST:
            raise UserError(f"pca takes at most {self.MOST} values a sample, not {flat.shape[1]}; put pool before it")
        return flat[:, : self.components]


def _divided(x: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Return each sample divided by its measure, zero where that is zero."""
    by = measure(x.flatten(1)).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(by > 0, x / by.clamp_min(torch.finfo(x.dtype).tiny), 0)


@lru_cache(maxsize=8)
def _blur(length: int, sigma: float) -> Tensor:
    """Return the matrix (length, length) that blurs a column."""
    return torch.from_numpy(gaussian_filter1d(np.eye(length), sigma, axis=0, mode="reflect")).float()


def _leading(covariance: np.ndarray, m: int) -> np.ndarray:
    """Return the eigenvectors (d, m) of the largest eigenvalues, the largest entry of each positive."""
    from scipy.linalg import eigh

    d = len(covariance)
    vectors = eigh(covariance, subset_by_index=(d - m, d - 1))[1][:, ::-1]
    sign = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(m)])
    return vectors * sign
