"""Normalisations by the statistics of the sample itself: layer, group, instance and root-mean-square norm.

Their deviation is taken as a constant, as in AttnLRP (Achtibat et al. 2024, section 3.3): what is left,
``z = γ (a − mean a) / σ + β``, is affine in the input and its relevance is divided by contribution. With
``normalization="pass"`` relevance passes as it is (the identity rule).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from spray.lrp.handlers import Call, handles, signature
from spray.lrp.operations import passes
from spray.lrp.products import scaled
from spray.lrp.rules import divide, weigh
from spray.lrp.tape import Node
from spray.lrp.trace import Trace, known, record_of


def bind(func: Call, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    bound = signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def normalization(
    trace: Trace,
    a: Tensor,
    z: Tensor,
    blocks: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    centred: bool = True,
) -> Tensor:
    """Return `z` with its node: a normalisation of `a`.

    Parameters
    ----------
    trace : Trace
        The trace.
    a, z : Tensor
        Its input and output.
    blocks : sequence of int
        The shape in which every row, all but the first two dimensions, is one block with its own statistics.
    weight, bias : Tensor, optional
        γ and β, broadcast to the shape of `a`.
    eps : float, optional
        What is added to the variance; None is the dtype's machine epsilon.
    centred : bool
        Whether the mean is taken off.
    """
    if any(t is not None and record_of(t) for t in (weight, bias)):
        trace.fail("a normalisation whose weight or bias depends on the input")
    z = trace.mark(z.detach(), [a])
    if trace.composite.normalization == "pass":
        passes(trace, a, z, keeps_zeros=False)
        return z
    values = a.detach().float() if a.dtype in (torch.float16, torch.bfloat16) else a.detach()
    rows = values.reshape(*blocks)
    dims = tuple(range(2, len(blocks)))
    square = rows.var(dims, unbiased=False, keepdim=True) if centred else rows.square().mean(dims, keepdim=True)
    inverse = torch.rsqrt(square + (torch.finfo(a.dtype).eps if eps is None else eps)).to(z.dtype)
    offset = bias.detach() if bias is not None and trace.composite.zero_bias else None
    gamma = None if weight is None else weight.detach()
    inputs, outputs, epsilon = a.detach().to(z.dtype), z.detach(), trace.epsilon(z.dtype)

    def back(arrived: Sequence[Tensor | None]) -> Sequence[Tensor]:
        (R,) = arrived
        assert R is not None
        s = divide(R.to(outputs.dtype), outputs if offset is None else outputs - offset, epsilon)
        s = s if gamma is None else s.mul_(gamma)
        t = s.reshape(s.shape[0], *blocks).mul_(inverse)
        if centred:
            t = t.sub_(t.mean([d + 1 for d in dims], keepdim=True))
        return [weigh(t.reshape(s.shape), inputs)]

    trace.tape.append(Node((known(a).slot,), (known(z).slot,), back, proportional=True))
    return z


@handles("layer_norm rms_norm")
def layer_norm(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle the layer norm and the root-mean-square norm over the last dimensions."""
    given = normalized_arguments(func, args, kwargs)
    a, shape = given["input"], tuple(given["normalized_shape"])
    before = prod(a.shape[: a.dim() - len(shape)])
    return normalization(
        trace,
        a,
        func(*args, **kwargs),
        (before, 1, prod(shape)),
        given.get("weight"),
        given.get("bias"),
        given.get("eps"),
        centred=func.__name__ == "layer_norm",
    )


def normalized_arguments(func: Call, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of `layer_norm` or `rms_norm` by name; torch's builtins have no signature."""
    names = ["input", "normalized_shape", "weight"]
    if func.__name__ == "layer_norm":
        names += ["bias", "eps", "cudnn_enable"]
        return {"eps": 1e-5, **dict(zip(names, args, strict=False)), **kwargs}
    return {"eps": None, **dict(zip([*names, "eps"], args, strict=False)), **kwargs}


@handles("group_norm")
def group_norm(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle the group norm."""
    names = ("input", "num_groups", "weight", "bias", "eps")
    given = {"weight": None, "bias": None, "eps": 1e-5, **dict(zip(names, args, strict=False)), **kwargs}
    a, groups = given["input"], given["num_groups"]
    blocks = (a.shape[0], groups, prod(a.shape[1:]) // groups)
    weight, bias = per_channel(given, a)
    return normalization(trace, a, func(*args, **kwargs), blocks, weight, bias, given["eps"])


def per_channel(given: dict[str, Any], a: Tensor) -> list[Tensor | None]:
    """Return a weight and a bias of one entry a channel so that they broadcast to `a`."""
    return [None if t is None else t.view(-1, *[1] * (a.dim() - 2)) for t in (given["weight"], given["bias"])]


@handles("instance_norm")
def instance_norm(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle the instance norm with the instance's own statistics."""
    given = bind(func, args, kwargs)
    if not given["use_input_stats"]:
        trace.fail("instance normalisation with running statistics")
    a = given["input"]
    weight, bias = per_channel(given, a)
    return normalization(trace, a, func(*args, **kwargs), (*a.shape[:2], prod(a.shape[2:])), weight, bias, given["eps"])


@handles("normalize local_response_norm")
def divided(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle a division by the input's own norm, which is taken as a constant."""
    a = args[0] if args else kwargs["input"]
    z = func(*args, **kwargs).detach()
    return scaled(trace, lambda signal, _: z, a, 1.0)
