"""Corrections that train on: A-ClArC, which adds the artifact to images of all classes, and its control."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from spray.correction.base import CONTROL, CORRECTIONS, Problem
from spray.training import Transform, train

SHARE = 0.5
"""Share of the images that A-ClArC adds an artifact to."""


@CORRECTIONS.register(CONTROL)
def fine_tuned(problem: Problem) -> nn.Module:
    """Train on without any change to the images: what the budget alone does."""
    return _train(problem, None)


@CORRECTIONS.register("a_clarc")
def a_clarc(problem: Problem) -> nn.Module:
    """Train on with the isolated artifacts added to half of the images, whatever their class.

    Augmentative ClArC in input space (Anders et al. 2022, section 4.1): what occurs in every class says nothing about
    any.
    """
    rng = np.random.default_rng([problem.seed, 41])

    def add(pixels: Tensor, indices: np.ndarray) -> Tensor:
        chosen = np.flatnonzero(rng.random(len(pixels)) < SHARE)
        kinds = rng.integers(0, len(problem.findings), size=len(chosen))
        pixels = pixels.clone()
        for kind, finding in enumerate(problem.findings):
            mine = chosen[kinds == kind]
            if len(mine):
                pixels[mine] = finding.artifact.insert(pixels[mine], rng.integers(0, 2**31, len(mine)))
        return pixels

    return _train(problem, add)


def _train(problem: Problem, transform: Transform | None) -> nn.Module:
    train(
        problem.model,
        problem.train,
        problem.normalizer,
        epochs=problem.epochs,
        batch_size=problem.batch_size,
        learning_rate=problem.learning_rate,
        weight_decay=0.0,
        seed=problem.seed,
        device=problem.device,
        transform=transform,
        on_epoch=problem.on_epoch,
    )
    return problem.model
