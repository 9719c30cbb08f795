"""The control, which trains on, and group-balanced re-training, which does so with samples drawn otherwise."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from torch import Tensor, nn

from spray.correction.base import CONTROL, CORRECTIONS, Problem
from spray.correction.groups import balance
from spray.correction.interpolation import stepped_back
from spray.training import Objective, Transform, cross_entropy, train


@CORRECTIONS.register(CONTROL)
def fine_tuned(problem: Problem) -> nn.Module:
    """Train on without any change to the images: what the budget alone does."""
    return fine_tune(problem)


@CORRECTIONS.register("group_balanced")
def group_balanced(problem: Problem) -> nn.Module:
    """Train on with samples drawn such that an artifact says nothing about the class.

    Groups are made of class and artifact, the latter by the artifacts' scores; in each class all groups are drawn
    equally often, classes as often as before (Idrissi et al., "Simple data balancing achieves competitive worst-group
    accuracy", 2022). A group with hardly any samples is filled with images of its class that the isolated artifact is
    added to; or, with `fill_groups` off, its artifact is left out in every class. See `spray.correction.groups`. Where
    clean accuracy falls, the weights go back towards those before (`spray.correction.interpolation.stepped_back`).
    """

    def trained(part: Problem, indices: np.ndarray | None) -> nn.Module:
        balanced = balance(part, indices)
        part.facts["groups"] = balanced.facts()
        rng = np.random.default_rng([part.seed, 53])

        def fill(pixels: Tensor, samples: np.ndarray) -> Tensor:
            return balanced.fill(part, pixels, samples, rng)

        weights = balanced.weights if indices is None else balanced.weights[indices]
        return fine_tune(part, transform=fill, indices=indices, weights=weights)

    return stepped_back(problem, ({}, trained))


def fine_tune(
    problem: Problem,
    transform: Transform | None = None,
    objective: Objective = cross_entropy,
    indices: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    frozen: Collection[nn.Module] = (),
) -> nn.Module:
    """Train a problem's model on with its budget and return it; see `spray.training.train`."""
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
        objective=objective,
        indices=indices,
        weights=weights,
        frozen=frozen,
    )
    return problem.model
