"""A-ClArC at the input: the isolated artifacts are added to copies of training images, so that they say nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from spray.correction.base import CORRECTIONS, Problem, carriers
from spray.correction.fine_tuning import fine_tune
from spray.correction.interpolation import stepped_back
from spray.training import Batch

WEIGHTS = (0.125, 0.25)
"""Weights of a class's images with an artifact that are tried, as shares of the weight of those without any, the
weakest first. On 20 models of photographs a quarter cost 0.4 points of clean accuracy more than an eighth, and gained
1.1 with the artifact; but where there is little to train on, an eighth may not be enough."""
MOST = 0.5
"""The same of all artifacts together, at most: more of them must not crowd out what there is to learn."""
LARGEST = 4.0
"""Most that an image without an artifact counts, in a class that has few of them."""


@dataclass(frozen=True)
class Augmented:
    """How much training images count, and how often a copy with an artifact is made of one.

    Attributes
    ----------
    weights : ndarray of float
        (N,): how much each image counts, as it is.
    free : ndarray of bool
        (N,): whether it carries no artifact; copies are made of these alone.
    copied : ndarray of float
        (artifacts, N): how likely a copy with each artifact is made of it; a copy counts 1.
    """

    weights: np.ndarray
    free: np.ndarray
    copied: np.ndarray


def augment(problem: Problem, weight: float) -> Augmented:
    """Return how to make each artifact weigh the same share of every class, and its other images what the class did.

    A class whose own images carry an artifact is thus left with neither more of it than others, nor fewer images
    without it than it had images.
    """
    labels = np.asarray(problem.train.labels)
    n_classes = len(problem.train.classes)
    sizes = np.bincount(labels, minlength=n_classes)
    carrying = [carriers(problem, finding) for finding in problem.findings]
    free = ~np.any(carrying, axis=0)
    n_free = np.bincount(labels[free], minlength=n_classes).clip(1)
    weights = np.where(free, np.minimum(LARGEST, sizes / n_free)[labels], 1.0)
    copied = []
    for carries in carrying:
        n = np.bincount(labels[carries], minlength=n_classes)
        weights[carries] = np.minimum(weights, np.minimum(1.0, weight * sizes / n.clip(1))[labels])[carries]
        copied.append(np.where(free, ((weight * sizes - n).clip(0) / n_free).clip(0, 1)[labels], 0.0))
    return Augmented(weights, free, np.stack(copied))


@CORRECTIONS.register("a_clarc")
def a_clarc(problem: Problem) -> nn.Module:
    """Train on with copies of images, of all classes, that the isolated artifacts are added to.

    Augmentative ClArC in input space (Anders et al. 2022, section 4.1): what occurs in every class says nothing about
    any. Every image is seen once in an epoch, as by the control. Beside it come so many copies with each artifact that
    it weighs an eighth of every class, or a quarter where an eighth is not enough (`WEIGHTS`), or several of them
    together at most half; images that carry one by themselves count less where there are more. Many more copies, or
    copies in the place of the images, cost clean accuracy: the model has less to learn from. Where it costs some
    nevertheless, the weights go back towards those before (`spray.correction.interpolation.stepped_back`).
    """
    labels = np.asarray(problem.train.labels)

    def loss(model: nn.Module, batch: Batch, how: Augmented, rng: np.random.Generator) -> Tensor:
        weights = torch.from_numpy(how.weights[batch.indices]).float()
        x, which, counts = [batch.x], [batch.indices], [weights]
        for finding, copied in zip(problem.findings, how.copied, strict=True):
            chosen = np.flatnonzero(rng.random(len(batch.indices)) < copied[batch.indices])
            if not len(chosen):
                continue
            marked = finding.artifact.insert(batch.pixels[chosen], rng.integers(0, 2**31, len(chosen)))
            x.append(problem.normalizer(marked, problem.device))
            which.append(batch.indices[chosen])
            counts.append(torch.ones(len(chosen)))
        count = torch.cat(counts).to(batch.x.device)
        wanted = torch.from_numpy(labels[np.concatenate(which)].astype(np.int64)).to(batch.x.device)
        each = nn.functional.cross_entropy(model(torch.cat(x)), wanted, reduction="none")
        return (each * count).sum() / count.sum()

    def trained(part: Problem, indices: np.ndarray | None, how: Augmented) -> nn.Module:
        rng = np.random.default_rng([part.seed, 41])
        return fine_tune(part, objective=lambda model, batch: loss(model, batch, how, rng), indices=indices)

    most = MOST / max(1, len(problem.findings))
    # Of many artifacts both may be the most that each can have; then there is one way.
    weights = dict.fromkeys(min(weight, most) for weight in WEIGHTS)
    return stepped_back(
        problem, *(({"weight": weight}, partial(trained, how=augment(problem, weight))) for weight in weights)
    )
