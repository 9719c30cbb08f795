"""Affine layers as the rules see them: a linear map with its weight and bias, and that map transposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from spray.lrp.tape import fold, unfold


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

    def output_shape(self, shape: Sequence[int], w: Tensor) -> tuple[int, ...]:
        """Return the shape of the output for an input of a shape."""

    def n_outputs(self, w: Tensor) -> int:
        """Return the number of entries of a bias."""

    def spread(self, R: Tensor, shape: Sequence[int], w: Tensor) -> Tensor | None:
        """Return relevance spread evenly over the inputs each output sees; None: there is no short way."""


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

    def output_shape(self, shape: Sequence[int], w: Tensor) -> tuple[int, ...]:
        """Replace the last dimension."""
        return (*shape[:-1], w.shape[0])

    def n_outputs(self, w: Tensor) -> int:
        """Count the rows."""
        return w.shape[0]

    def spread(self, R: Tensor, shape: Sequence[int], w: Tensor) -> Tensor | None:
        """Every output sees every input of its sample."""
        return (R.sum(-1, keepdim=True) / w.shape[1]).expand(*R.shape[:-1], w.shape[1]).contiguous()


@dataclass(frozen=True)
class Product:
    """Any other function that is linear in its first argument: ``function(a, w)``."""

    function: Callable[[Tensor, Tensor], Tensor]
    kind: str = "linear"

    def forward(self, a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Return ``function(a, w) + b``."""
        return self.function(a, w) if b is None else self.function(a, w) + b

    def transpose(self, s: Tensor, w: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the vector-Jacobian product."""
        with torch.enable_grad():
            leaf = torch.zeros(tuple(shape), dtype=s.dtype, device=s.device, requires_grad=True)
            return torch.autograd.grad(self.function(leaf, w), leaf, s)[0]

    def scale_outputs(self, w: Tensor, scale: Tensor) -> Tensor:
        """Refuse: it has no channels that a normalisation could be merged into."""
        raise NotImplementedError

    def output_shape(self, shape: Sequence[int], w: Tensor) -> tuple[int, ...]:
        """Refuse: it is computed at once."""
        raise NotImplementedError

    def n_outputs(self, w: Tensor) -> int:
        """Return 1: one entry is added to all outputs."""
        return 1

    def spread(self, R: Tensor, shape: Sequence[int], w: Tensor) -> Tensor | None:
        """Return None."""
        return None


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
        # Only its shape and memory format are read; memory that nobody touches costs nothing.
        like = torch.empty((*shape[:2], *padded), dtype=s.dtype, device=s.device, memory_format=memory_format(s))
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

    def output_shape(self, shape: Sequence[int], w: Tensor) -> tuple[int, ...]:
        """Return what `torch.convolution` makes of an input's shape."""
        inner = []
        after = self.trailing or (0,) * len(self.stride)
        sizes = zip(shape[2:], w.shape[2:], self.stride, self.padding, self.dilation, after, strict=True)
        for i, (n, k, stride, padding, dilation, extra) in enumerate(sizes):
            reach = dilation * (k - 1)
            if self.transposed:
                inner.append((n - 1) * stride - 2 * padding + reach + self._output_padding[i] + 1)
            else:
                inner.append((n + 2 * padding + extra - reach - 1) // stride + 1)
        return (shape[0], self.n_outputs(w), *inner)

    def n_outputs(self, w: Tensor) -> int:
        """Count the output channels."""
        return w.shape[1] * self.groups if self.transposed else w.shape[0]

    def spread(self, R: Tensor, shape: Sequence[int], w: Tensor) -> Tensor | None:
        """Spread each position's sum over its channels with a filter of one channel."""
        if self.transposed:
            return None
        one = replace(self, groups=1)
        samples, n_in = R.shape[0], w.shape[1]
        inner = (1, 1, *shape[2:])
        box = torch.ones((1, 1, *w.shape[2:]), dtype=R.dtype, device=R.device)
        counts = one.forward(torch.ones(inner, dtype=R.dtype, device=R.device), box, None) * n_in
        total = R.unflatten(1, (self.groups, -1)).sum(2).flatten(0, 1)[:, None]
        share = one.transpose(total.div_(counts), box, (samples * self.groups, *inner[1:]))
        grouped = share.unflatten(0, (samples, self.groups))
        return grouped.expand(samples, self.groups, n_in, *shape[2:]).flatten(1, 2).contiguous()

    @property
    def _output_padding(self) -> tuple[int, ...]:
        return self.output_padding or (0,) * len(self.stride)


def memory_format(t: Tensor) -> torch.memory_format:
    """Return how a tensor's channels lie in memory."""
    for format, dims in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if t.dim() == dims and not t.is_contiguous() and t.is_contiguous(memory_format=format):
            return format
    return torch.contiguous_format


@dataclass(frozen=True)
class Layer:
    """An affine layer ``z = w·a + b``.

    Parameters
    ----------
    map : LinearMap
        What the weight does.
    w, b : Tensor
        Weight and bias (None: no bias, or one that the rules leave out).
    offset : Tensor, optional
        A bias that the rules leave out though the outputs have it.
    shape : sequence of int
        The shape of its input.
    nonnegative : bool
        Whether its input is known to have no negative entry.
    rectified : bool
        Whether its outputs are known only where they are positive (below that they are 0), and have no
        relevance elsewhere: a ReLU follows.
    epsilon : float
        The stabiliser of denominators where the rule has none of its own.
    """

    map: LinearMap
    w: Tensor
    b: Tensor | None
    shape: Sequence[int]
    nonnegative: bool = False
    rectified: bool = False
    epsilon: float = 1e-6
    offset: Tensor | None = None

    def __call__(self, a: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """Return ``w·a + b`` for another weight and bias."""
        return self.map.forward(a, w, b)

    def T(self, s: Tensor, w: Tensor) -> Tensor:  # noqa: N802
        """Return ``wᵀ·s``, one value for each target and input: (T, N, ...), as `s`."""
        if type(self.map) is FullyConnected:
            return s @ w
        if type(self.map) is Convolution:
            batch = fold(s)
            return unfold(self.map.transpose(batch, w, (batch.shape[0], *self.shape[1:])), s.shape[0])
        return torch.stack([self.map.transpose(one, w, self.shape) for one in s])

    def transposes(self, s: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return ``wᵀ·s`` for each of several weights; convolutions of few channels in one go."""
        one_group = isinstance(self.map, Convolution) and self.map.groups == 1 and not self.map.transposed
        if not one_group:
            return [self.T(s, w) for w in weights]
        batch, (n, *inner) = fold(s), self.shape[1:]
        shape = (batch.shape[0], len(weights) * n, *inner)
        wide = torch.cat([w.contiguous(memory_format=memory_format(batch)) for w in weights], 1)
        return [unfold(c, s.shape[0]) for c in self.map.transpose(batch, wide, shape).split(n, 1)]

    @cached_property
    def w_plus(self) -> Tensor:
        """The positive part of the weight."""
        return self.w.clamp(min=0)

    @cached_property
    def w_minus(self) -> Tensor:
        """The negative part of the weight (zero or below)."""
        return self.w.clamp(max=0)

    def with_bias(self, b: Tensor | None, epsilon: float) -> Tensor:
        """Return a bias with `epsilon` added to every entry."""
        if b is None:
            return torch.full((self.map.n_outputs(self.w),), epsilon, dtype=self.w.dtype, device=self.w.device)
        return b + epsilon

    def to(self, dtype: torch.dtype) -> Layer:
        """Return the layer with its weight and bias in a dtype."""
        if self.w.dtype == dtype:
            return self
        b, offset = (None if t is None else t.to(dtype) for t in (self.b, self.offset))
        return replace(self, w=self.w.to(dtype), b=b, offset=offset)

    def without_bias(self) -> Layer:
        """Return the layer whose bias the rules leave out."""
        return replace(self, b=None, offset=self.b)


@dataclass(frozen=True)
class BatchNorm:
    """What batch normalisation in evaluation mode computes: ``(y − mean) / √(var + eps) · weight + bias``."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @cached_property
    def scale(self) -> Tensor:
        """What every channel is multiplied by."""
        scale = torch.rsqrt(self.var + self.eps)
        return scale if self.weight is None else scale * self.weight

    def shift(self, a: Tensor) -> Tensor:
        """Return what is added to every channel of an input `a`, whatever its values are."""
        shift = -self.mean * self.scale if self.bias is None else self.bias - self.mean * self.scale
        return shift.to(a.dtype).view(-1, *[1] * (a.dim() - 2))

    def merge(self, map: LinearMap, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the one affine layer that is a layer followed by this normalisation."""
        shift = -self.mean if b is None else b - self.mean
        bias = shift * self.scale if self.bias is None else shift * self.scale + self.bias
        return map.scale_outputs(w, self.scale.to(w.dtype)), bias.to(w.dtype)
