"""LRP-guided training: features are weighted by their relevance while training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from spray.attribution import explain
from spray.correction.base import CORRECTIONS, Problem, inputs
from spray.correction.choice import choose_strength
from spray.correction.fine_tuning import fine_tune
from spray.correction.layers import INPUT, changed, feature_layer
from spray.correction.options import AUTO
from spray.errors import UserError
from spray.training import Batch, Objective


@CORRECTIONS.register("lrp_guided")
def lrp_guided(problem: Problem) -> nn.Module:
    """Train on with a second loss, of features weighted by their relevance for the class.

    Sun et al., "Explanation-guided training for cross-domain few-shot classification", 2020, equations 4 to 6: with R
    the LRP relevance of a layer's features a for the label, divided by its largest absolute value, w = 1 + R and the
    loss CE(f(a)) + λ CE(f(w ⊙ a)). The weights w are constants of each step: no gradient flows through LRP. Nothing of
    the artifact is used. The layer is the one that is set, else the features that the last layer is given; λ is the
    strength.
    """
    layer = problem.options.layer
    if layer in (AUTO, "output"):
        layer = feature_layer(problem.model, inputs(problem, np.arange(min(2, len(problem.train)))))
    if layer.endswith(INPUT):
        raise UserError(f"correction.layer={layer}: lrp_guided needs the output of a module; name one without {INPUT}")
    problem.facts["layer"] = layer

    def make(strength: float) -> Objective:
        def loss(model: nn.Module, batch: Batch) -> Tensor:
            w = relevance_weights(model, batch.x, batch.labels, layer)
            plain = nn.functional.cross_entropy(model(batch.x), batch.labels)
            with changed(model, layer, lambda a: a * w.to(a)):
                guided = nn.functional.cross_entropy(model(batch.x), batch.labels)
            return plain + strength * guided

        return loss

    def trained(part: Problem, strength: float, indices: np.ndarray | None) -> nn.Module:
        return fine_tune(part, objective=make(strength), indices=indices)

    strength, setting = choose_strength(problem, "lrp_guided", trained)
    problem.facts["chosen"] = {"layer": layer, **setting}
    return trained(problem, strength, None)


def relevance_weights(model: nn.Module, x: Tensor, labels: Tensor, layer: str) -> Tensor:
    """Return w = 1 + R / max|R| of a layer's features (N, ...) for the labels; 1 for a sample without relevance."""
    with _evaluated(model):
        R: Tensor = explain(model, x, labels, "lrp", "epsilon_plus_flat", layer=layer)
    size = R.abs().flatten(1).amax(dim=1).view(-1, *[1] * (R.dim() - 1))
    return 1 + torch.where(size > 0, R / size.clamp_min(torch.finfo(R.dtype).tiny), 0)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode while the block runs."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
