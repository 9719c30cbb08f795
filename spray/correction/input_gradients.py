"""Right for the Right Reasons: a penalty on gradients where the artifact is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from spray.correction.base import CORRECTIONS, Problem, carriers
from spray.correction.choice import choose_strength
from spray.correction.fine_tuning import fine_tune
from spray.training import Batch, Objective


@CORRECTIONS.register("rrr")
def rrr(problem: Problem) -> nn.Module:
    """Train on with a penalty on the output's gradient inside the mask of samples that carry the artifact.

    Ross et al., "Right for the right reasons: training differentiable models by constraining their explanations",
    2017: CE + λ Σ (M · ∇_x Σ_k log p_k)². Here without a scale, as in Dreyer et al., "Reveal to revise: an explainable
    AI life cycle for iterative bias correction of deep models", 2023: CE + λ cos(|∇_x Σ_k log p_k|, M), averaged over
    the batch's samples that carry the artifact; M is its mask where it is found in the sample.
    """
    carrying = [carriers(problem, finding) for finding in problem.findings]

    def masks(batch: Batch) -> Tensor:
        found = torch.zeros(len(batch.pixels), 1, *batch.pixels.shape[2:])
        for finding, carries in zip(problem.findings, carrying, strict=True):
            which = np.flatnonzero(carries[batch.indices])
            if len(which):
                found[which] = torch.maximum(found[which], finding.artifact.found(batch.pixels[which]).float())
        return found

    def make(strength: float) -> Objective:
        def loss(model: nn.Module, batch: Batch) -> Tensor:
            M = masks(batch).to(batch.x)
            x = batch.x.detach().requires_grad_()
            logits = model(x)
            entropy = nn.functional.cross_entropy(logits, batch.labels)
            which = M.flatten(1).any(dim=1)
            if not which.any():
                return entropy
            (gradient,) = torch.autograd.grad(logits.log_softmax(dim=1).sum(), x, create_graph=True)
            return entropy + strength * overlap(gradient[which], M[which]).mean()

        return loss

    def trained(part: Problem, strength: float, indices: np.ndarray | None) -> nn.Module:
        return fine_tune(part, objective=make(strength), indices=indices)

    strength, setting = choose_strength(problem, "rrr", trained)
    problem.facts["chosen"] = setting
    return trained(problem, strength, None)


def overlap(gradient: Tensor, mask: Tensor) -> Tensor:
    """Return cos(|∇|, M) of each sample: 0 if no gradient is inside the mask, 1 if it is spread evenly over it alone.

    Parameters
    ----------
    gradient : Tensor
        (n, C, H, W); of its absolute values the sum over channels counts.
    mask : Tensor
        (n, 1, H, W), at least 0.

    Returns
    -------
    Tensor
        (n,).
    """
    size, M = gradient.abs().sum(dim=1).flatten(1), mask.flatten(1)
    return nn.functional.cosine_similarity(size, M, dim=1, eps=1e-12)
