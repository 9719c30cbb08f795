"""TCAV: whether a model's output rises when an inner layer's activations move in an artifact's direction."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from spray.correction.layers import INPUT, candidates, changed, find
from spray.correction.wrapped import innermost

ZERO = 1e-6
"""A directional derivative below this share of the gradient's length is round-off: the output does not depend on it."""


def concept_layer(model: nn.Module, x: Tensor) -> str | None:
    """Return the layer whose activations a CAV is fitted in: the last before the input of the layer of the outputs.

    In the input of the last linear layer the gradient is the same for all images, so that TCAV could only be 0 or 1.
    The layer is the same for a model and for a `Projected` around it.

    Parameters
    ----------
    model : nn.Module
        In eval mode; left as it was.
    x : Tensor
        (N, C, H, W), two normalised images or more, on the model's device.

    Returns
    -------
    str or None
        A name as `spray.correction.layers.changed` takes it; None for a model without such a layer.
    """
    inner, prefix = innermost(model)
    names = [name for name in candidates(inner, x) if not name.endswith(INPUT)]
    return prefix + names[-1] if names else None


def directional_derivatives(model: nn.Module, layer: str, h: Tensor, x: Tensor, target: int | Tensor) -> np.ndarray:
    """Return ∇f·h, the derivative of an output along a direction of a layer's activations.

    Parameters
    ----------
    model : nn.Module
        In eval mode; left as it was.
    layer : str
        As `spray.correction.layers.changed` takes it. What a `Projected` does there comes behind it: along a direction
        that it projects out the derivative is 0.
    h : Tensor
        (d,), of all activations of an image, on the model's device.
    x : Tensor
        (n, C, H, W), normalised, on the model's device.
    target : int or Tensor
        Whose output f is: a class, or one for each image (n,).

    Returns
    -------
    ndarray of float64
        (n,); exactly 0 where the derivative is nothing but round-off.
    """
    find(model, layer)
    leaves: list[Tensor] = []

    def tap(a: Tensor) -> Tensor:
        leaves.append(a.detach().clone().requires_grad_(True))
        return leaves[-1]

    with torch.enable_grad(), changed(model, layer, tap):
        logits = model(x)
    wanted = torch.as_tensor(target, device=logits.device).expand(len(x))
    chosen = logits.gather(1, wanted[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, leaves[0], allow_unused=True, materialize_grads=True)
    rows = gradient.flatten(1).double()
    along = rows @ h.double()
    along[along.abs() <= ZERO * rows.norm(dim=1) * h.double().norm()] = 0
    return along.cpu().numpy()
