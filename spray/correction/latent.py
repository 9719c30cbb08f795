"""Corrections that train what comes behind a layer: latent A-ClArC and RR-ClArC."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from spray.correction.axes import Axes
from spray.correction.base import CORRECTIONS, Problem, inputs
from spray.correction.choice import choose_layer, choose_strength
from spray.correction.fine_tuning import fine_tune
from spray.correction.layers import changed, upstream
from spray.errors import UserError
from spray.training import Batch, Objective

Make = Callable[[Sequence[Axes], float], Objective]


@CORRECTIONS.register("a_clarc_latent")
def a_clarc_latent(problem: Problem) -> nn.Module:
    """Train what comes behind a layer on, with the artifacts added to a share of the activations there.

    Augmentative ClArC (Anders et al. 2022, equation 8): a' = a + (z⁺ - h·a) h for random samples of all classes, with
    z⁺ the mean of h·a over samples with the artifact. What comes before the layer stays as it is, since h would no
    longer fit. The strength is the share of samples.
    """

    def make(axes: Sequence[Axes], share: float) -> Objective:
        def loss(model: nn.Module, batch: Batch) -> Tensor:
            def add(a: Tensor) -> Tensor:
                chosen = torch.rand(len(a), device=a.device) < share
                kinds = torch.randint(len(axes), (len(a),), device=a.device)
                for kind, part in enumerate(axes):
                    moved = towards(a, part, part.marked)
                    a = torch.where((chosen & (kinds == kind)).view(-1, *[1] * (a.dim() - 1)), moved, a)
                return a

            with changed(model, axes[0].layer, add):
                return nn.functional.cross_entropy(model(batch.x), batch.labels)

        return loss

    return _behind(problem, "a_clarc_latent", make)


@CORRECTIONS.register("rr_clarc")
def rr_clarc(problem: Problem) -> nn.Module:
    """Train what comes behind a layer on, with a penalty on the output's slope along the artifacts' axes.

    Right Reason ClArC (Dreyer et al., "From hope to safety: unlearning biases of deep models via gradient penalization
    in latent space", 2024, equation 6): CE + λ (∇_a[m·f(a)] · h)², with random signs m of the classes' logits for each
    batch. Its λ depends on the scale of the gradients, by ten orders of magnitude between layers and models; so the
    default divides the gradient by its length, CE + λ cos²(∇_a[m·f(a)], h), of which λ is the strength
    (`correction.penalty`: cosine or square).
    """
    cosine = problem.options.penalty == "cosine"

    def make(axes: Sequence[Axes], strength: float) -> Objective:
        def loss(model: nn.Module, batch: Batch) -> Tensor:
            seen: list[Tensor] = []

            def keep(a: Tensor) -> Tensor:
                seen.append(a.detach().requires_grad_())
                return seen[0].clone()  # what comes next may change it in place

            with changed(model, axes[0].layer, keep):
                logits = model(batch.x)
            signs = 2.0 * torch.randint(2, (logits.shape[1],), device=logits.device) - 1
            (gradient,) = torch.autograd.grad((logits * signs).sum(), seen[0], create_graph=True)
            penalty = sum(sensitivity(gradient, part, cosine).mean() for part in axes)
            return nn.functional.cross_entropy(logits, batch.labels) + strength * penalty

        return loss

    return _behind(problem, "rr_clarc", make)


def sensitivity(gradient: Tensor, axes: Axes, cosine: bool) -> Tensor:
    """Return Σ (g·h)² over an artifact's directions, and positions where there are any; divided by |g|² for `cosine`.

    Parameters
    ----------
    gradient : Tensor
        (N, ...), at the axes' layer.
    axes : Axes
        With orthonormal directions.
    cosine : bool
        Whether to divide; a gradient of zero gives 0.

    Returns
    -------
    Tensor
        (N,).
    """
    g = gradient.flatten(1) if axes.dim is None else gradient.movedim(axes.dim, -1)
    along = nn.functional.linear(g, axes.directions.to(g)).square().flatten(1).sum(dim=1)
    if not cosine:
        return along
    return along / g.square().flatten(1).sum(dim=1).clamp_min(torch.finfo(g.dtype).tiny)


def towards(a: Tensor, axes: Axes, z: Tensor) -> Tensor:
    """Return a + (z - h·a) h for all of an artifact's directions."""
    rows = a.flatten(1) if axes.dim is None else a.movedim(axes.dim, -1)
    H = axes.directions.to(a)
    step = nn.functional.linear(z.to(a) - nn.functional.linear(rows, H), H.T)
    return a + (step.view(a.shape) if axes.dim is None else step.movedim(-1, axes.dim))


def _behind(problem: Problem, method: str, make: Make) -> nn.Module:
    """Train what comes behind the layer, with the layer and the strength that are set or chosen."""
    axes = [part for part in choose_layer(problem) if len(part.directions)]
    if not axes:
        raise UserError(f"{method}: samples with and without the artifact agree in every layer tried")

    def trained(part: Problem, strength: float, indices: np.ndarray | None) -> nn.Module:
        return _train_behind(part, axes[0].layer, make(axes, strength), indices)

    strength, setting = choose_strength(problem, method, trained)
    problem.facts["chosen"] = {"layer": axes[0].name, **setting}
    return trained(problem, strength, None)


def _train_behind(problem: Problem, layer: str, objective: Objective, indices: np.ndarray | None) -> nn.Module:
    x = inputs(problem, np.arange(min(2, len(problem.train))))
    parameters, modules = upstream(problem.model, layer, x)
    needs = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(False)
    try:
        if not any(p.requires_grad for p in problem.model.parameters()):
            raise UserError(f"correction.layer={layer}: no weights come behind this layer; name an earlier one")
        return fine_tune(problem, objective=objective, indices=indices, frozen=modules)
    finally:
        for p, need in zip(parameters, needs, strict=True):
            p.requires_grad_(need)
