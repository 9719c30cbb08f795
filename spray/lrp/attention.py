"""Products of two signals and attention (AttnLRP: Achtibat et al. 2024).

- A bilinear product, ``z_k = Σ_ij a_i b_j``: both operands get half, divided by contribution (eq. 14).
- The softmax, by its Taylor expansion: R_i = x_i (R_i − s_i Σ_j R_j) (eq. 13).
- With one constant operand a product is a fully connected layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spray.lrp.affine import affine
from spray.lrp.handlers import Call, handles, leaf_of, operands
from spray.lrp.layers import FullyConnected, Product
from spray.lrp.norms import bind
from spray.lrp.operations import by_contribution
from spray.lrp.products import WEIGHTS
from spray.lrp.rules import divide
from spray.lrp.tape import Node, vjp
from spray.lrp.trace import Trace, carriers, known, record_of

Bilinear = Callable[[Tensor, Tensor], Tensor]


@handles("matmul mm bmm mv dot __matmul__ __rmatmul__")
def matrix_product(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle the product of two matrices."""
    a, b = operands(args, kwargs)
    if func.__name__ == "__rmatmul__":
        a, b = b, a
    return contract(trace, torch.matmul, a, b)


def contract(trace: Trace, func: Bilinear, a: Tensor, b: Tensor) -> Tensor:
    """Return ``func(a, b)``, linear in each."""
    if record_of(a) and record_of(b):
        return product_of_signals(trace, func, a, b)
    if record_of(a):
        if func is torch.matmul and b.dim() == 2 and a.dim() > 1:
            return affine(trace, a, FullyConnected(), b.mT, None, torch.matmul(a, b))
        return affine(trace, a, Product(func), b, None, func(a, b))
    return affine(trace, b, Product(lambda signal, w: func(w, signal)), a, None, func(a, b))


def product_of_signals(trace: Trace, func: Bilinear, a: Tensor, b: Tensor) -> Tensor:
    """Return ``func(a, b)``, linear in each; each gets half of the relevance, divided by contribution."""
    leaves = [leaf_of(a), leaf_of(b)]
    with torch.enable_grad():
        graph = func(*leaves)
    values, epsilon = graph.detach(), trace.epsilon(graph.dtype)
    z = trace.mark(values.view_as(values), [a, b], nonnegative=known(a).nonnegative and known(b).nonnegative)

    def back(arrived: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (R,) = arrived
        assert R is not None
        s = divide(R.to(values.dtype), 2 * values, epsilon)
        products = vjp([graph], leaves, [s])
        return [None if g is None else g * leaf.detach() for g, leaf in zip(products, leaves, strict=True)]

    trace.tape.append(Node((known(a).slot, known(b).slot), (known(z).slot,), back, proportional=True))
    return z


@handles("einsum")
def einsum(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle Einstein's sum of one or two signals and constants."""
    equation, *operands = args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str):
        trace.fail("einsum with its equation in numbers")
    signals = [i for i, t in enumerate(operands) if record_of(t)]
    if len(signals) > 2:
        trace.fail(f"einsum of {len(signals)} tensors that depend on the input")

    def put(*values: Tensor) -> Tensor:
        filled = list(operands)
        for i, value in zip(places, values, strict=True):
            filled[i] = value
        return torch.einsum(equation, *filled)

    if len(operands) == 2:
        places = [0, 1]
        return contract(trace, put, *operands)
    places = signals
    if len(signals) == 2:
        return product_of_signals(trace, put, *(operands[i] for i in signals))
    put.__name__ = "einsum"
    return by_contribution(trace, put, (operands[signals[0]],), {})


@handles("tensordot")
def tensordot(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle the contraction of two tensors over several dimensions."""
    given = dict(zip(("a", "b", "dims"), args, strict=False)) | kwargs
    dims = given.get("dims", 2)
    return contract(trace, lambda a, b: torch.tensordot(a, b, dims), given["a"], given["b"])


FACTORS = {
    "addmm": ("mat1", "mat2"),
    "addbmm": ("batch1", "batch2"),
    "baddbmm": ("batch1", "batch2"),
    "addmv": ("mat", "vec"),
}


@handles(" ".join(FACTORS))
def product_plus(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle a product of matrices that is added to something."""
    factors = FACTORS[func.__name__]
    given = dict(zip(("input", *factors), args, strict=False)) | kwargs
    alpha, beta = given.get("alpha", 1), given.get("beta", 1)
    a, weight = (given[name] for name in factors)
    bias = given["input"]
    with trace:
        if func.__name__ == "addmm" and alpha == beta == 1 and bias.dim() == 1 and not carriers(bias, weight):
            return F.linear(a, weight.mT, bias)
        product = torch.matmul(a, weight)
        product = product.sum(0) if func.__name__ == "addbmm" else product
        product = product if alpha == 1 else product * alpha
        if beta == 0:  # then torch doesn't look at it
            return product
        return product + (bias if beta == 1 else bias * beta)


@handles("softmax log_softmax _softmax")
def softmax(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle the softmax: R_i = x_i (R_i − s_i Σ_j R_j)."""
    if func.__name__ != "softmax":
        if trace.fallback is not None:
            return trace.fallback(trace, func, args, kwargs)
        trace.fail(func.__name__)
    a = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dim is None:
        trace.fail("a softmax whose dimension isn't given")
    dim %= a.dim()
    z = trace.mark(func(*args, **kwargs).detach(), [a], nonnegative=True, gate=WEIGHTS)
    x, s = a.detach(), z.detach()

    def back(arrived: Sequence[Tensor | None]) -> Sequence[Tensor]:
        (R,) = arrived
        assert R is not None
        R = R.to(s.dtype)
        rest = R - s * R.sum(dim + 1, keepdim=True)
        return [torch.where(torch.isfinite(x), x, 0) * rest]  # a masked entry, −∞, takes no part

    trace.tape.append(Node((known(a).slot,), (known(z).slot,), back, proportional=True))
    return z


@handles("scaled_dot_product_attention")
def scaled_dot_product_attention(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle attention: softmax(q kᵀ / √d + mask) v, part by part."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    q, k, v = given["query"], given["key"], given["value"]
    if given.get("dropout_p", 0.0) > 0:
        trace.fail("active dropout")
    scale = 1 / math.sqrt(q.shape[-1]) if given.get("scale") is None else given["scale"]
    mask = given.get("attn_mask")
    if given.get("is_causal", False):
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    with trace:
        if given.get("enable_gqa", False):
            repeats = q.shape[-3] // k.shape[-3]
            k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
        return attend(q, k, v, scale, mask)[0]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, safe: bool = True
) -> tuple[Tensor, Tensor]:
    """Return attention's output and weights; a boolean mask tells what may be seen, another is added.

    A query that sees nothing gets zeros if `safe`, else NaN.
    """
    scores = (q * scale) @ k.transpose(-2, -1)
    if mask is None:
        weights = scores.softmax(-1)
        return weights @ v, weights
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    blind = (scores == -math.inf).all(-1, keepdim=True)
    if safe and bool(blind.any()):
        weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    else:
        weights = scores.softmax(-1)
    return weights @ v, weights


@handles("multi_head_attention_forward")
def multi_head_attention(trace: Trace, func: Call, args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Handle `torch.nn.MultiheadAttention`: its projections are fully connected layers."""
    given = bind(func, args, kwargs)
    if given["training"] and given["dropout_p"] > 0:
        trace.fail("active dropout")
    unusual = ("bias_k", "bias_v", "static_k", "static_v")
    if any(given[name] is not None for name in unusual) or given["add_zero_attn"]:
        trace.fail(
            "multi-head attention with an extra key or value (bias_k, bias_v, add_zero_attn, static_k, static_v)"
        )
    q, k, v = given["query"], given["key"], given["value"]
    batched = q.dim() == 3
    with trace:
        if not batched:
            q, k, v = (t.unsqueeze(1) for t in (q, k, v))
        q, k, v = in_projection(given, q, k, v)
        heads = given["num_heads"]
        length, n, width = q.shape
        q, k, v = (t.reshape(t.shape[0], n, heads, -1).permute(1, 2, 0, 3) for t in (q, k, v))
        mask = attention_mask(given, n, heads, q)
        out, weights = attend(q, k, v, 1 / math.sqrt(q.shape[-1]), mask, safe=not given["need_weights"])
        out = out.permute(2, 0, 1, 3).reshape(length, n, width)
        out = F.linear(out, given["out_proj_weight"], given["out_proj_bias"])
        if given["average_attn_weights"]:
            weights = weights.mean(1)
        if not batched:
            out, weights = out.squeeze(1), weights.squeeze(0)
    return out, weights if given["need_weights"] else None


def in_projection(given: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Return query, key and value after their projections."""
    bias = given["in_proj_bias"]
    if given["use_separate_proj_weight"]:
        weights = [given[f"{name}_proj_weight"] for name in "qkv"]
    elif given["query"] is given["key"] and given["key"] is given["value"]:
        return F.linear(q, given["in_proj_weight"], bias).chunk(3, -1)
    else:
        weights = given["in_proj_weight"].chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(t, w, b) for t, w, b in zip((q, k, v), weights, biases, strict=True))


def attention_mask(given: dict[str, Any], n: int, heads: int, q: Tensor) -> Tensor | None:
    """Return the sum of both masks, which broadcasts to (N, heads, L, S); in these True means hidden."""
    total = None
    mask, padding = given["attn_mask"], given["key_padding_mask"]
    if mask is not None and mask.dim() == 3:
        mask = mask.reshape(n, heads, *mask.shape[1:])
    if padding is not None:
        padding = padding.reshape(n, 1, 1, -1)
    for part in (mask, padding):
        if part is not None:
            part = (
                torch.zeros_like(part, dtype=q.dtype).masked_fill(part, -math.inf) if part.dtype == torch.bool else part
            )
            total = part if total is None else total + part
    return total


@handles("glu")
def glu(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle the gated linear unit: the first half is the signal, the sigmoid of the second the gate."""
    a = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    with trace:
        signal, gate = a.chunk(2, dim)
        return signal * gate.sigmoid()


@handles("bilinear")
def bilinear(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle `torch.nn.functional.bilinear`."""
    a, b, weight, bias = (*args, *kwargs.values(), None)[:4]
    with trace:
        z = torch.einsum("...i,oij,...j->...o", a, weight, b)
        return z if bias is None else z + bias
