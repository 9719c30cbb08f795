"""The gradient, and the gradient times the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spray.attribution.registry import ATTRIBUTIONS
from spray.attribution.target import Target, check_logits, class_indices, one_hot
from spray.errors import UserError

OnLogits = Callable[[Tensor], Any] | None


@ATTRIBUTIONS.register("gradient")
def gradient(model: nn.Module, x: Tensor, target: Target, *, on_logits: OnLogits = None) -> Tensor:
    """Return the gradient of the target's logit with respect to the input (Simonyan et al. 2014).

    `on_logits` is given the logits of `x`.
    """
    if strays_alone(model, x):
        first = None if on_logits is None else lambda logits: on_logits(logits[:1])
        return gradient(model, torch.cat([x, x]), for_two(target), on_logits=first)[:1]
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = check_logits(model(leaf.clone()), x)  # a clone, since the model may change its input in place
        if on_logits is not None:
            on_logits(logits.detach())
        mask = one_hot(logits, class_indices(logits, target)[:, 0])
        result = torch.autograd.grad(logits, leaf, mask, allow_unused=True)[0] if logits.requires_grad else None
    if result is None:
        raise UserError("the model's output has no gradient with respect to its input")
    return result


def strays_alone(model: nn.Module, x: Tensor) -> bool:
    """Return whether a sample needs company for a right gradient.

    In torch (2.14 at least) the backward of batch normalisation in evaluation mode misreads an incoming gradient
    of one sample whose strides come from transposed tokens.
    """
    return len(x) == 1 and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def for_two(target: Target) -> Target:
    """Return the target of one sample as that of two alike."""
    return torch.cat([target, target]) if isinstance(target, Tensor) and target.dim() == 1 else target


@ATTRIBUTIONS.register("gradient_x_input")
def gradient_x_input(model: nn.Module, x: Tensor, target: Target, *, on_logits: OnLogits = None) -> Tensor:
    """Return the gradient times the input (Shrikumar et al. 2016)."""
    return gradient(model, x, target, on_logits=on_logits) * x
