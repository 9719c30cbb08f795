"""Right for the Right Reasons: a penalty on gradients where the artifact is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spray.correction.base import CORRECTIONS, Finding, Problem, carriers
from spray.correction.choice import LOG, choose_strength
from spray.correction.fine_tuning import fine_tune
from spray.training import Batch, Objective

EVEN = 0.99
"""A mask whose overlap with an even one is this large says nowhere: in two colours it would be 98 % of the image."""
SOME = 32
"""Samples whose masks are looked at to find that out."""


@CORRECTIONS.register("rrr")
def rrr(problem: Problem) -> nn.Module:
    """Train on with a penalty on the output's gradient inside the mask of samples that carry the artifact.

    Ross et al., "Right for the right reasons: training differentiable models by constraining their explanations",
    2017: CE + λ Σ (M · ∇_x Σ_k log p_k)². Here without a scale, as in Dreyer et al., "Reveal to revise: an explainable
    AI life cycle for iterative bias correction of deep models", 2023: CE + λ cos(|∇_x Σ_k log p_k|, M), averaged over
    the batch's samples that carry the artifact; M is its mask where it is found in the sample.

    An artifact that changes whole images (brightness, noise, blur, tint) has no part in the penalty: where M is 1
    everywhere the cosine is largest for the gradient that is spread most evenly, whatever the artifact. If all are
    such, it is trained on without a penalty, as the control.
    """
    placed: list[Finding] = []
    left_out: list[dict[str, Any]] = []
    for k, finding in enumerate(problem.findings, start=1):
        if has_place(problem, finding):
            placed.append(finding)
        else:
            left_out.append({"artifact": k, "class_index": finding.class_index, "kind": finding.artifact.kind})
    if left_out:
        problem.facts["left_out"] = left_out
        problem.facts["left_out_because"] = (
            "their masks are the whole image, so that a penalty on gradients inside them says nothing of them"
        )
    if not placed:
        LOG.warning("rrr: no artifact has a place of its own in the image; it is trained on without a penalty")
        problem.facts["chosen"] = {"strength": 0.0}
        return fine_tune(problem)
    carrying = [carriers(problem, finding) for finding in placed]

    def masks(batch: Batch) -> Tensor:
        found = torch.zeros(len(batch.pixels), 1, *batch.pixels.shape[2:])
        for finding, carries in zip(placed, carrying, strict=True):
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


def has_place(problem: Problem, finding: Finding) -> bool:
    """Return whether an artifact's masks, typically of its samples, say where it is, and not everywhere alike."""
    M = finding.artifact.found(problem.train.batch(finding.samples[:SOME])).float()
    return bool(overlap(torch.ones_like(M), M).median() < EVEN)


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
