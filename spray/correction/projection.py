"""P-ClArC: the artifact's direction is projected out of the features, nothing is trained."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from spray.correction.base import CORRECTIONS, Finding, Problem, inputs
from spray.correction.cav import pattern_cav
from spray.errors import UserError
from spray.training import batches


@CORRECTIONS.register("p_clarc")
def p_clarc(problem: Problem) -> nn.Module:
    """Project the artifact's pattern CAV out of what the last linear layer is given.

    Projective ClArC (Anders et al. 2022, equation 9): a' = a + (z⁻ - h·a) h, with z⁻ the mean of h·a over the class's
    samples without the artifact. In front of a linear layer y = W a' + b this is the same as other weights,
    W' = W (I - h hᵀ) and b' = b + z⁻ W h, so the result is a plain `state_dict`. Several artifacts are projected out
    one after the other.

    Raises
    ------
    UserError
        If the model's output is not made by a linear layer with a bias.
    """
    layer = output_layer(problem.model, inputs(problem, np.arange(min(2, len(problem.train)))))
    for finding in problem.findings:
        h, z_clean = direction(problem, finding, layer)
        with torch.no_grad():
            along = layer.weight @ h
            layer.bias.add_(z_clean * along)
            layer.weight.sub_(torch.outer(along, h))
    return problem.model


def output_layer(model: nn.Module, x: Tensor) -> nn.Linear:
    """Return the linear layer, with a bias, whose output is the model's.

    Raises
    ------
    UserError
        If there is none.
    """
    outputs: list[tuple[nn.Linear, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda layer, _, output: outputs.append((layer, output)))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            result = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, output in reversed(outputs):
        if output.shape == result.shape and torch.equal(output, result):
            if layer.bias is None:
                raise UserError("p_clarc needs a bias in the model's last layer; leave it out of correction.methods")
            return layer
    raise UserError("p_clarc needs a model whose output is made by an nn.Linear; leave it out of correction.methods")


def direction(problem: Problem, finding: Finding, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return the artifact's unit pattern CAV (d,) in the layer's input, and z⁻; both from the artifact's class."""
    members = np.flatnonzero(np.asarray(problem.train.labels) == finding.class_index)
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    try:
        with torch.no_grad():
            for part in batches(len(members), problem.batch_size):
                problem.model(inputs(problem, members[part]))
    finally:
        hook.remove()
    activations = torch.cat(seen).double()
    marked = torch.from_numpy(np.isin(members, finding.samples)).to(activations.device)
    h = pattern_cav(activations, marked)
    return h.to(layer.weight), (activations[~marked] @ h).mean().to(layer.weight)
