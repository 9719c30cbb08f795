"""What verification measures of a model: on clean test images and on such as an artifact is added to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spray.analysis.content import spread_evenly
from spray.correction.base import Finding
from spray.correction.cav import pattern_cav
from spray.correction.layers import activations
from spray.data.plant_options import Plant
from spray.pipelines.context import Context
from spray.sensitivity import concept_layer, directional_derivatives
from spray.training import batches
from spray.verification import Group, accuracy, attack_metrics, group_metrics, relevance_inside, tcav_metrics

FEWEST = 8
"""Fewest test images of a class that carry an artifact by themselves for them to be a group of their own."""

OF_EACH_KIND = 200
"""Most training samples with an artifact, and without, that its direction is estimated from."""


@dataclass(frozen=True)
class Attack:
    """An artifact, isolated or planted, that is added to test images.

    Attributes
    ----------
    class_index : int or None
        Its class; None where it is no sign of any class.
    samples : ndarray of int
        The training samples that carry it.
    add : callable
        Given pixels (n, C, H, W) and their indices among the test images, returns the images with it and where it
        went, (n, 1, H, W).
    carried : ndarray of bool
        (N,): which test images carry it by themselves.
    """

    class_index: int | None
    samples: np.ndarray
    add: Callable[[Tensor, np.ndarray], tuple[Tensor, Tensor]]
    carried: np.ndarray


def isolated(context: Context, finding: Finding) -> Attack:
    """Attack with an isolated artifact, at the place that is drawn for each test image."""
    n = len(context.test)
    draws = np.random.default_rng([context.config.seed, 7]).integers(0, 2**31, n)

    def add(pixels: Tensor, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return finding.artifact.add(pixels, draws[indices])

    return Attack(finding.class_index, finding.samples, add, carried(finding, n))


def planted(context: Context, plant: Plant, samples: np.ndarray) -> Attack:
    """Attack with the true artifact; the test images are as they were, without it."""

    def add(pixels: Tensor, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        marked, opacity = plant.mark(pixels, [f"test:{i}" for i in indices])
        return marked, opacity[:, None]

    return Attack(plant.target, samples, add, np.zeros(len(context.test), dtype=bool))


def carried(finding: Finding, n: int) -> np.ndarray:
    """Return which of the n test images carry an isolated artifact, by the same score and threshold as its samples."""
    if finding.test_scores is None or finding.threshold is None:
        return np.zeros(n, dtype=bool)
    return np.asarray(finding.test_scores > finding.threshold)


def measure(context: Context, model: nn.Module, logits: Tensor, attack: Attack) -> tuple[dict[str, Any], np.ndarray]:
    """Return what an artifact does to a model, with 95 % intervals.

    Parameters
    ----------
    context : Context
        Test images and settings.
    model : nn.Module
        In eval mode.
    logits : Tensor
        (N, classes): its output for the test images as they are.
    attack : Attack
        The artifact.

    Returns
    -------
    dict
        What `attack_metrics`, `group_metrics` and `tcav_metrics` return; and `unattacked_accuracy`, that on the same
        images as `attacked_accuracy`, without the artifact.
    ndarray of bool
        (N,): which test images are classified right with the artifact.
    """
    labels = np.asarray(context.test.labels)
    others = np.ones(len(labels), dtype=bool) if attack.class_index is None else labels != attack.class_index
    attacked, inside = _attacked(context, model, attack, np.flatnonzero(others))
    right = [part.argmax(dim=1).numpy() == labels for part in (logits, attacked)]
    facts = {
        **attack_metrics(attacked[others], labels[others], attack.class_index, inside),
        **accuracy("unattacked_accuracy", logits[others], labels[others]),
        **group_metrics(_groups(labels, right[0], right[1], attack.carried)),
        **tcav_metrics(_derivatives(context, model, attack)),
    }
    return facts, right[1]


NOTHING: dict[str, Any] = dict.fromkeys(
    {
        **attack_metrics(torch.empty(0, 1), np.empty(0, dtype=int), None, torch.empty(0)),
        **accuracy("unattacked_accuracy", torch.empty(0, 1), np.empty(0, dtype=int)),
        **group_metrics([]),
        **tcav_metrics(np.empty(0)),
    }
)
"""What is said where there is no artifact."""


def _attacked(context: Context, model: nn.Module, attack: Attack, others: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the logits (N, classes) of all test images with the artifact, and R_bias of some of the other classes."""
    labels = np.asarray(context.test.labels)
    explained = spread_evenly(others, context.config.verify.n_explained)
    logits, shares = [], []
    for indices in batches(len(labels), context.batch_size):
        pixels, mask = attack.add(context.test.batch(indices), indices)
        logits.append(context.predict_pixels(model, pixels))
        which = np.flatnonzero(np.isin(indices, explained))
        if len(which):
            x = context.normalizer(pixels[which], context.device)
            own = torch.from_numpy(labels[indices[which]].astype(np.int64)).to(context.device)
            relevance = context.explain(model, x, own if attack.class_index is None else attack.class_index)
            shares.append(relevance_inside(relevance.cpu(), mask[which]))
    return torch.cat(logits), torch.cat(shares) if shares else torch.empty(0)


def _groups(labels: np.ndarray, right: np.ndarray, attacked: np.ndarray, carried: np.ndarray) -> list[Group]:
    """Return each class with and without the artifact; it is added where hardly any test image carries it by itself."""
    groups = []
    for c in np.unique(labels).tolist():
        without, carrying = (labels == c) & ~carried, (labels == c) & carried
        added = bool(carrying.sum() < FEWEST)
        groups.append(Group(c, False, False, right[without]))
        groups.append(Group(c, True, added, attacked[without] if added else right[carrying]))
    return groups


def _derivatives(context: Context, model: nn.Module, attack: Attack) -> np.ndarray:
    """Return ∇f·h of test images of the artifact's class, f being its output; none where there is no such direction."""
    c, none = attack.class_index, np.empty(0)
    layer = None if c is None else concept_layer(model, context.trial_images(2))
    if c is None or layer is None:
        return none
    h = _direction(context, model, layer, attack.samples, c)
    indices = spread_evenly(np.flatnonzero(np.asarray(context.test.labels) == c), context.config.verify.n_explained)
    if h is None or not len(indices):
        return none
    parts = []
    for part in batches(len(indices), context.batch_size):
        x = context.normalizer(context.test.batch(indices[part]), context.device)
        parts.append(directional_derivatives(model, layer, h, x, c))
    return np.concatenate(parts)


def _direction(context: Context, model: nn.Module, layer: str, samples: np.ndarray, c: int) -> Tensor | None:
    """Return the pattern CAV (d,) of an artifact in a layer of this model, from training samples of its class."""
    of_class = np.flatnonzero(np.asarray(context.train.labels) == c)
    with_it, without = np.intersect1d(of_class, samples), np.setdiff1d(of_class, samples)
    if min(len(with_it), len(without)) < 2:
        return None
    indices = np.concatenate([spread_evenly(with_it, OF_EACH_KIND), spread_evenly(without, OF_EACH_KIND)])
    parts = []
    for part in batches(len(indices), context.batch_size):
        x = context.normalizer(context.train.batch(indices[part]), context.device)
        parts.append(activations(model, layer, x).flatten(1).double())
    return pattern_cav(torch.cat(parts), torch.from_numpy(np.isin(indices, with_it)).to(context.device))
