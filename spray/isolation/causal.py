"""The causal test of an artifact: what adding it to other classes and removing it from its own does to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest, mannwhitneyu
from torch import Tensor

from spray.isolation.candidate import Artifact

LEVEL = 0.01
"""Level of the tests, after Holm's correction for all candidates."""

MIN_EFFECT = 0.1
"""Least difference of flip rate and control flip rate that counts as an effect; three times that where the
samples do not share the content: parts of images of one kind move predictions too, without being an artifact."""

TRIGGER = 0.5
"""Least flip rate of a backdoor: the artifact alone decides."""

Predictor = Callable[[Tensor], Tensor]
"""From pixels (n, C, H, W) to logits (n, classes)."""


@dataclass(frozen=True)
class Effect:
    """What a candidate does to a model.

    Attributes
    ----------
    flip_rate : float
        Share of other classes' images that are predicted as the artifact's class once it is added.
    control_flip_rate : float
        The same with content from the class's images without the artifact, at the same place.
    logit_gain : float
        Mean rise of the class's logit when the artifact is added, minus the control's.
    p_value : float
        One-sided exact McNemar test of artifact against control, image by image.
    removal_cost : float
        Mean fall of the class's logit when the artifact is replaced in its own samples, minus the fall when the
        same is done to the class's samples without it.
    removal_p_value : float
        One-sided Mann-Whitney test of that.
    n : int
        Number of other classes' images tested; those predicted as the artifact's class beforehand are left out.
    """

    flip_rate: float
    control_flip_rate: float
    logit_gain: float
    p_value: float
    removal_cost: float
    removal_p_value: float
    n: int


def test_effect(
    predict: Predictor,
    artifact: Artifact,
    target: int,
    others: Tensor,
    carriers: Tensor,
    donors: Tensor,
    seed: int,
) -> Effect:
    """Add the artifact to other classes' images and replace it in its own, each against a control.

    Parameters
    ----------
    predict : callable
        The model, from pixels to logits.
    artifact : Artifact
        The candidate.
    target : int
        Its class.
    others : Tensor
        (n, C, H, W): held-out images of other classes.
    carriers : Tensor
        (m, C, H, W): images of the class that have the artifact.
    donors : Tensor
        (k, C, H, W): images of the class that do not have it; the controls' content is theirs.
    seed : int
        Draws shifts and donors.

    Returns
    -------
    Effect
        With `n` 0 and a p-value of 1 if there is nothing to test on.
    """
    before = predict(others)
    keep = before.argmax(dim=1) != target
    others, before = others[keep], before[keep]
    if not len(others) or not len(donors) or not len(carriers):
        return Effect(0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0)
    rng = np.random.default_rng([seed, 1])
    donor, draws = rng.integers(0, 2**31, size=(2, len(others)))

    def content_of(images: Tensor) -> Tensor:
        return images[torch.from_numpy(donor % len(images))]

    def add(content: Tensor | None) -> Tensor:
        return predict(artifact.insert(others, draws, content))

    # Where the samples share the place but not the content, a median of it is nothing that any of them shows.
    added = add(None if artifact.constant else content_of(carriers))
    control = add(content_of(donors))
    flips, control_flips = (logits.argmax(dim=1) == target for logits in (added, control))
    only = int((flips & ~control_flips).sum())
    discordant = int((flips ^ control_flips).sum())
    cost = removal_cost(predict, artifact, target, carriers, donors, seed)
    control_cost = removal_cost(predict, artifact, target, donors, donors, seed)
    return Effect(
        flip_rate=float(flips.float().mean()),
        control_flip_rate=float(control_flips.float().mean()),
        logit_gain=float((added - control)[:, target].mean()),
        p_value=float(binomtest(only, discordant, alternative="greater").pvalue) if discordant else 1.0,
        removal_cost=float(cost.mean() - control_cost.mean()),
        removal_p_value=float(mannwhitneyu(cost, control_cost, alternative="greater").pvalue),
        n=len(others),
    )


def removal_cost(
    predict: Predictor, artifact: Artifact, target: int, images: Tensor, donors: Tensor, seed: int
) -> Tensor:
    """Return by how much each image's target logit falls when a donor's content takes the artifact's place.

    Parameters
    ----------
    predict, artifact, target, seed
        As in `test_effect`.
    images : Tensor
        (n, C, H, W): changed where the artifact matches them best.
    donors : Tensor
        (k, C, H, W).

    Returns
    -------
    Tensor
        (n,).
    """
    rng = np.random.default_rng([seed, 2])
    content = donors[torch.from_numpy(rng.integers(0, len(donors), len(images)))]
    mask = artifact.found(images)
    return (predict(images) - predict(images + mask * (content - images)))[:, target]


def verdict(effect: Effect, constant: bool, p_value: float, removal_p_value: float) -> str:
    """Say what a candidate is.

    Parameters
    ----------
    effect : Effect
        Of the candidate.
    constant : bool
        Whether its samples share its content, or only its place.
    p_value, removal_p_value : float
        Its p-values, corrected for all candidates.

    Returns
    -------
    str
        "no_effect" where adding it does not move more predictions to the class, and raise its logit more, than the
        control; else "clever_hans" where removing it costs the class's own samples; "backdoor" where it does not but
        the artifact alone turns most images; and "no_effect" where it does neither.
    """
    flips = effect.flip_rate - effect.control_flip_rate
    if p_value >= LEVEL or flips < (MIN_EFFECT if constant else 3 * MIN_EFFECT) or effect.logit_gain <= 0:
        return "no_effect"
    if removal_p_value < LEVEL and effect.removal_cost > 0:
        return "clever_hans"
    return "backdoor" if effect.flip_rate >= TRIGGER else "no_effect"


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return p-values corrected for their number by Holm's step-down method (1979)."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected
