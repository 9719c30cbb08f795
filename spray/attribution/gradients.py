"""The gradient, and the gradient times the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spray.attribution.registry import ATTRIBUTIONS
from spray.attribution.target import Target, check_logits, class_indices, one_hot
from spray.errors import UserError


@ATTRIBUTIONS.register("gradient")
def gradient(model: nn.Module, x: Tensor, target: Target) -> Tensor:
    """Return the gradient of the target's logit with respect to the input (Simonyan et al. 2014)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = check_logits(model(leaf.clone()), x)  # a clone, since the model may change its input in place
        mask = one_hot(logits, class_indices(logits, target)[:, 0])
        result = torch.autograd.grad(logits, leaf, mask, allow_unused=True)[0] if logits.requires_grad else None
    if result is None:
        raise UserError("the model's output has no gradient with respect to its input")
    return result


@ATTRIBUTIONS.register("gradient_x_input")
def gradient_x_input(model: nn.Module, x: Tensor, target: Target) -> Tensor:
    """Return the gradient times the input (Shrikumar et al. 2016)."""
    return gradient(model, x, target) * x
