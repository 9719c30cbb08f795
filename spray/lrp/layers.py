"""Affine layers as the rules see them: a linear map with its weight and bias, and that map transposed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class LinearMap(Protocol):
    """A bilinear operation of an input and a weight, without the numbers."""

    @property
    def kind(self) -> str:
        """The kind of layer: "linear" or "convolution"."""

    def forward(self, a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Return ``w·a + b``."""

    def transpose(self, s: Tensor, w: Tensor, shape: Sequence[int]) -> Tensor:
        """Return ``wᵀ·s`` in the shape of an input."""

    def scale_outputs(self, w: Tensor, scale: Tensor) -> Tensor:
        """Return `w` with the weights of each output channel multiplied by its entry of `scale`."""


@dataclass(frozen=True)
class FullyConnected:
    """The map of `torch.nn.functional.linear`."""

    kind: str = "linear"

    def forward(self, a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Return ``a wᵀ + b``."""
        return F.linear(a, w, b)

    def transpose(self, s: Tensor, w: Tensor, shape: Sequence[int]) -> Tensor:
        """Return ``s w``."""
        return s @ w

    def scale_outputs(self, w: Tensor, scale: Tensor) -> Tensor:
        """Scale the rows."""
        return w * scale[:, None]


@dataclass(frozen=True)
class Convolution:
    """A (transposed) convolution over one to three dimensions.

    `trailing` is the zero padding after the last position of each dimension, beyond `padding` on both sides.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    trailing: tuple[int, ...] = ()
    kind: str = "convolution"

    def forward(self, a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Return the convolution of `a` with `w`, plus `b` per channel."""
        if any(self.trailing):
            a = F.pad(a, [width for after in reversed(self.trailing) for width in (0, after)])
        return torch.convolution(
            a,
            w,
            b,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self._output_padding,
            self.groups,
        )

    def transpose(self, s: Tensor, w: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the vector-Jacobian product with respect to the input; the weight's is not computed."""
        inner = shape[2:]
        padded = [n + after for n, after in zip(inner, self.trailing or (0,) * len(inner), strict=True)]
        like = s.new_empty(1).expand(*shape[:2], *padded)
        R = torch.ops.aten.convolution_backward(
            s,
            like,
            w,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self._output_padding,
            self.groups,
            (True, False, False),
        )[0]
        return R[(..., *(slice(n) for n in inner))] if any(self.trailing) else R

    def scale_outputs(self, w: Tensor, scale: Tensor) -> Tensor:
        """Scale the filters; a transposed convolution holds its outputs group by group in dimension 1."""
        if not self.transposed:
            return w * scale.view(-1, *[1] * (w.dim() - 1))
        grouped = w.unflatten(0, (self.groups, -1))
        factor = scale.view(self.groups, 1, -1, *[1] * (w.dim() - 2))
        return (grouped * factor).flatten(0, 1)

    @property
    def _output_padding(self) -> tuple[int, ...]:
        return self.output_padding or (0,) * len(self.stride)


@dataclass(frozen=True)
class Layer:
    """An affine layer ``z = w·a + b``.

    Parameters
    ----------
    map : LinearMap
        What the weight does.
    w, b : Tensor
        Weight and bias (None: no bias).
    shape : sequence of int
        The shape of its input.
    nonnegative : bool
        Whether its input is known to have no negative entry.
    """

    map: LinearMap
    w: Tensor
    b: Tensor | None
    shape: Sequence[int]
    nonnegative: bool = False

    def __call__(self, a: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """Return ``w·a + b`` for another weight and bias."""
        return self.map.forward(a, w, b)

    def T(self, s: Tensor, w: Tensor) -> Tensor:  # noqa: N802
        """Return ``wᵀ·s``, one value for each input."""
        return self.map.transpose(s, w, (s.shape[0], *self.shape[1:]))


@dataclass(frozen=True)
class BatchNorm:
    """What batch normalisation in evaluation mode computes: ``(y − mean) / √(var + eps) · weight + bias``."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def merge(self, layer: Layer) -> Layer:
        """Return the one affine layer that is `layer` followed by this normalisation."""
        scale = torch.rsqrt(self.var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -self.mean if layer.b is None else layer.b - self.mean
        bias = shift * scale if self.bias is None else shift * scale + self.bias
        dtype = layer.w.dtype
        weight = layer.map.scale_outputs(layer.w, scale.to(dtype))
        return replace(layer, w=weight, b=bias.to(dtype))
