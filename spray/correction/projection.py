"""P-ClArC: the artifact's direction is projected out of inner activations, nothing is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from spray.correction.axes import joint, projected, reactive
from spray.correction.base import CORRECTIONS, Problem, inputs
from spray.correction.choice import choose_projection
from spray.correction.layers import activations, run_hooked
from spray.correction.wrapped import Projection


@CORRECTIONS.register("p_clarc")
def p_clarc(problem: Problem) -> nn.Module:
    """Project the artifacts' directions out of the activations of a layer.

    Projective ClArC (Anders et al. 2022, equation 9): a' = a + (z⁻ - h·a) h, with h the artifact's unit CAV and z⁻
    the mean of h·a over the class's samples without the artifact. Several directions, of one artifact or of several,
    are projected out at once, such that h_i·a' = z⁻_i for all of them (see `spray.correction.wrapped.Projection`).

    In front of a linear layer y = W a + b this is the same as other weights: with H⁺ the pseudo-inverse of the
    directions H, W' = W (I - H⁺ H) and b' = b + W H⁺ z⁻; then the result is a plain `state_dict`. In any other layer it
    is a module around the model. Layer, pooling and strength (the share of the way) are as set, or chosen
    (`spray.correction.choice`).
    """
    projections = joint(*choose_projection(problem, "p_clarc"))
    return fold(problem, projections) or projected(problem.model, projections, problem.device)


@CORRECTIONS.register("reactive_p_clarc")
def reactive_p_clarc(problem: Problem) -> nn.Module:
    """Project each artifact's directions out of those samples alone that a classifier takes to carry it.

    Bareeva et al., "Reactive model correction: mitigating harm to task-relevant features via conditional bias
    suppression", 2024. The condition is a logistic regression on the same activations, fitted within the artifact's
    class, so that one forward pass is enough; samples for which it does not fire get the original model's output.
    """
    axes, strength = choose_projection(problem, "reactive_p_clarc")
    return projected(problem.model, reactive(axes, strength), problem.device)


def fold(problem: Problem, projections: Sequence[Projection]) -> nn.Module | None:
    """Return the model with a projection in the weights of the next layer, None where that is not the same.

    It is where the activations are the input of linear layers with a bias and are used for nothing else. Whether that
    is so is measured: on images with and without the artifact the model with other weights has to give what the
    projected one does.
    """
    if len(projections) != 1 or projections[0].dim is not None:
        return problem.model if not projections else None
    (projection,) = projections
    samples = problem.findings[0].samples[:8]
    others = np.setdiff1d(np.arange(min(len(problem.train), len(samples) + 8)), samples)
    x = inputs(problem, np.concatenate([samples, others]))
    folded = copy.deepcopy(problem.model)
    layers = readers(folded, projection.layer, x)
    if not layers or any(layer.bias is None for layer in layers):
        return None
    H, back, z = (part.double() for part in (projection.directions, projection.back, projection.offsets))
    with torch.no_grad():
        for layer in layers:
            along = float(projection.strength) * (layer.weight.double() @ back)
            layer.bias.add_((along @ z).to(layer.bias))
            layer.weight.sub_((along @ H).to(layer.weight))
        expected = projected(problem.model, projections, problem.device)(x)
        difference = (folded(x) - expected).abs().max()
    return folded if bool(difference <= 1e-3 * expected.abs().max()) else None


def readers(model: nn.Module, layer: str, x: Tensor) -> list[nn.Linear]:
    """Return the linear layers that are given a layer's activations, as they are or flattened."""
    a = activations(model, layer, x).flatten(1)
    found: list[nn.Linear] = []

    def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        given = arguments[0]
        if given.dim() == 2 and given.shape == a.shape and torch.equal(given, a) and isinstance(module, nn.Linear):
            found.append(module)

    hooks = [module.register_forward_pre_hook(look) for module in model.modules() if isinstance(module, nn.Linear)]
    run_hooked(model, x, hooks)
    return found
