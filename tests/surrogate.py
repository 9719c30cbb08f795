"""LRP-0 as gradient × input of a surrogate: torch functions that have the model's values but LRP's gradients.

With LRP-0 in affine layers, all rules of the engine are multiples of the input: those of AttnLRP (Achtibat et al.
2024) become gradients if an activation is ``x · (f(x) / x)`` with the quotient taken for a constant, a deviation, a
divisor and a gate are constants, and in a product of two signals each is a constant for half of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ACTIVATIONS = {"gelu", "silu", "hardswish", "relu6", "tanh", "mish", "elu", "softplus", "selu", "hardtanh"}
GATES = {"sigmoid", "hardsigmoid", "norm", "var", "std", "sqrt", "rsqrt", "exp", "log"}
PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm"}
QUOTIENTS = {"div", "__truediv__", "true_divide"}


def half_each(product: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The product of two signals, in the gradient of which each counts half."""
    return (product(a, b.detach()) + product(a.detach(), b)) / 2


class Surrogate(TorchFunctionMode):
    """The mode under which a model's gradient is the context R / x of LRP-0."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        signals = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
        if base in ACTIVATIONS:
            x = args[0]
            kwargs.pop("inplace", None)  # models use what is returned
            z = getattr(torch.nn.functional, base)(x, *[a for a in args[1:] if not isinstance(a, bool)], **kwargs)
            return torch.where(x == 0, z, x * (z / x).detach())
        if base in GATES:
            return func(*args, **kwargs).detach()
        if base in ("square", "pow", "__pow__") and signals:
            x = args[0]
            return torch.where(x == 0, 0, x * (func(x.detach(), *args[1:], **kwargs) / x).detach())
        if base in ("normalize", "local_response_norm"):
            x = args[0]
            return torch.where(x == 0, 0, x * (func(*args, **kwargs) / x).detach())
        if base in PRODUCTS and len(signals) == 2:
            return half_each(func, *args)
        if base in QUOTIENTS and len(signals) == 2:
            return func(args[0], args[1].detach())
        if base == "addcmul":
            with self:
                return args[0] + args[1] * args[2]
        if base == "einsum" and len(signals) == 2:
            equation, *operands = args
            return half_each(lambda a, b: torch.einsum(equation, a, b), *operands)
        if base in ("layer_norm", "rms_norm", "group_norm"):
            return self.normalization(base, func, args, kwargs)
        if base == "scaled_dot_product_attention":
            with self:
                return attention(*args, **kwargs)
        if base == "multi_head_attention_forward":
            with self:
                return self_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def normalization(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor:
        """A normalisation with a constant deviation; affine in its input, so ``z = J·a + z(0)``."""
        x = args[0]
        given = dict(zip(("shape", "weight", "bias", "eps"), args[1:], strict=False)) | kwargs
        eps = given.get("eps")
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        rows = x.reshape(len(x), given["shape"], -1) if name == "group_norm" else x
        dims = (-1,) if name == "group_norm" else tuple(range(-len(given["shape"]), 0))
        if name == "rms_norm":
            rows = rows / (rows.square().mean(dims, keepdim=True) + eps).sqrt().detach()
        else:
            centred = rows - rows.mean(dims, keepdim=True)
            rows = centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt().detach()
        z = rows.reshape(x.shape)
        shape = (-1, *[1] * (x.dim() - 2)) if name == "group_norm" else None
        for key, combine in (("weight", torch.mul), ("bias", torch.add)):
            t = given.get(key)
            if t is not None:
                z = combine(z, t.view(shape) if shape else t)
        return z


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0, is_causal: bool = False
) -> Tensor:
    """softmax(q kᵀ / √d + mask) v."""
    assert not is_causal
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ v


def self_attention(q: Tensor, k: Tensor, v: Tensor, width: int, heads: int, weight: Tensor, bias: Tensor, *rest: Any,
                   **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    """Self-attention of sequences (L, N, E) without masks."""
    assert q is k is v
    length, n, _ = q.shape
    parts = F.linear(q, weight, bias).reshape(length, n, 3, heads, -1).permute(2, 1, 3, 0, 4)
    out = attention(*parts.unbind())
    return F.linear(out.permute(2, 0, 1, 3).reshape(length, n, width), rest[-2], rest[-1]), None


def lrp_0_of_surrogate(model: nn.Module, x: Tensor, target: int) -> Tensor:
    """The relevance of a model's logit under LRP-0 and AttnLRP."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    with Surrogate():
        logits = model(leaf * 1)
    return x * torch.autograd.grad(logits[:, target].sum(), leaf)[0]
