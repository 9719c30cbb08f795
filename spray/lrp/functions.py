"""Autograd functions whose backward passes relevance instead of a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from spray.lrp.layers import Layer
from spray.lrp.rules import Rule, divide

# Tensors are saved detached: a saved input would keep its record alive, and through an in-place operation's
# record the graph that saved it.


class Affine(Function):
    """An affine layer under a rule.

    ``Affine.apply(a, compute, layer, rule)`` returns ``compute(a)``; `layer` makes the `Layer` when relevance
    arrives, so that merged weights don't wait in memory.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, a: Tensor, compute: Callable[[Tensor], Tensor], layer: Callable[[], Layer], rule: Rule
    ) -> Tensor:
        z = compute(a)
        ctx.save_for_backward(a.detach() if rule.uses_input else None, z.detach() if rule.uses_output else None)
        ctx.layer, ctx.rule = layer, rule
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: D102
        a, z = ctx.saved_tensors
        return ctx.rule(ctx.layer(), a, z, R), None, None, None


class Pass(Function):
    """An elementwise operation that hands relevance through as it is: ``Pass.apply(a, compute)``."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: D102
        return compute(a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        return R, None


class Weigh(Function):
    """The first half of the norm rule, at the inputs: R_j = a_j s_j."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(a.detach())
        return a.view_as(a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, s: Tensor) -> Tensor:  # noqa: D102
        (a,) = ctx.saved_tensors
        return a * s


class Normalize(Function):
    """The second half of the norm rule, at the output: s_k = R_k / (z_k + ε·sign z_k)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, epsilon: float | None) -> Tensor:  # noqa: D102
        ctx.save_for_backward(z.detach())
        ctx.epsilon = epsilon
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, R: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        (z,) = ctx.saved_tensors
        return divide(R, z, ctx.epsilon), None
