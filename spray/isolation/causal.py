"""The causal test of an artifact: what adding it to other classes and removing it from its own does to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import binomtest, mannwhitneyu, wilcoxon
from torch import Tensor

from spray.isolation.artifact import Artifact
from spray.isolation.changed import rms
from spray.isolation.matted import Donated
from spray.isolation.removal import elsewhere, filled, is_undone, removed
from spray.isolation.sample_bias import SampleBias
from spray.verification import wilson_interval

LEVEL = 0.01
"""Level of the tests, after Holm's correction for all candidates."""

MIN_EFFECT = 0.1
"""Least difference of flip rate and control flip rate that counts as an effect; three times that where the
samples do not share the content: parts of images of one kind move predictions too, without being an artifact."""

ACCOUNTED = 0.02
"""The same where the artifact accounts for its cluster: then it is no part of an ordinary image, and what is left to
ask is whether the model relies on it. A network that is sure of its images may be turned in few of them and rely on it
all the same: one that moved 4.5 % more than the control lost 9 points of accuracy with the artifact in all images."""

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
        The same with content from images without the artifact, at the same place.
    logit_gain : float
        Mean rise of the class's logit, against the largest of the others', when the artifact is added, minus the
        control's.
    p_value : float
        One-sided exact McNemar test of artifact against control, image by image.
    removal_cost : float
        Mean fall of the class's logit, against the largest of the others', when the artifact is removed from its own
        samples, minus the fall when the same is done to the class's samples without it; minus nothing where it changed
        the whole image and is undone.
    removal_p_value : float
        One-sided Mann-Whitney test of that; Wilcoxon's signed-rank test of what is undone.
    removal_gain_p_value : float
        The same test of the other side: of the artifact costing its own samples, so that removing it gains.
    n : int
        Number of other classes' images tested; those predicted as the artifact's class beforehand are left out.
    flip_rate_interval, control_flip_rate_interval : list of float
        Their 95 % intervals (Wilson, 1927).
    effect_interval, logit_gain_interval, removal_cost_interval : list of float
        95 % intervals of the differences: quantiles of 2,000 bootstrap samples of the images; those of the first two
        keep artifact and control of an image together.
    elsewhere_flip_rate : float or None
        The flip rate of the same content at other places; None where the artifact has no place of its own. It tells
        whether the place matters, and is no condition of a verdict.
    removal_cost_elsewhere : float or None
        Mean fall of the class's logit when as much is in-painted elsewhere in the artifact's own samples.
    elsewhere_flip_rate_interval, removal_cost_elsewhere_interval : list of float or None
        Their 95 % intervals: Wilson's and of the bootstrap.
    n_removed : int
        Number of the artifact's own samples that it was removed from.
    removal_held_out : bool
        Whether these are images that the model was not trained on.
    """

    flip_rate: float
    control_flip_rate: float
    logit_gain: float
    p_value: float
    removal_cost: float
    removal_p_value: float
    n: int
    flip_rate_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    control_flip_rate_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    effect_interval: list[float] = field(default_factory=lambda: [-1.0, 1.0])
    logit_gain_interval: list[float] | None = None
    removal_cost_interval: list[float] | None = None
    elsewhere_flip_rate: float | None = None
    removal_cost_elsewhere: float | None = None
    elsewhere_flip_rate_interval: list[float] | None = None
    removal_cost_elsewhere_interval: list[float] | None = None
    n_removed: int = 0
    removal_held_out: bool = False
    removal_gain_p_value: float = 1.0


def measure_effect(
    predict: Predictor,
    artifact: Artifact,
    target: int,
    others: Tensor,
    carriers: Tensor,
    donors: Tensor,
    seed: int,
    controls: Sequence[Artifact] = (),
    content: Tensor | None = None,
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
    controls : sequence of Artifact
        For an artifact that changes whole images: such changes as there are between other samples of the class. They
        take the place of the donors' content.
    content : Tensor, optional
        (l, C, H, W): images that the control's content is from instead. The class's own is the control of what may be
        a natural part of it; of what accounts for its cluster, and so is none, any other image's is.

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

    added = add(None if shows(artifact) else content_of(carriers))
    if controls:
        parts = torch.empty_like(others)
        for number, change in enumerate(controls):
            mine = donor % len(controls) == number
            if mine.any():
                parts[mine] = _no_stronger(others[mine], change, artifact, draws[mine])
        control = predict(parts)
    else:
        control = add(content_of(donors if content is None else content))
    flips, control_flips = (logits.argmax(dim=1) == target for logits in (added, control))
    only = int((flips & ~control_flips).sum())
    discordant = int((flips ^ control_flips).sum())
    typical = donors.median(dim=0).values
    cost = removal_cost(predict, artifact, target, carriers, typical)
    control_cost, (removal_p_value, gain_p_value) = _removal_control(predict, artifact, target, cost, donors, typical)
    gains = (margin(added, target) - margin(control, target)).float()
    differences = flips.float() - control_flips.float()
    moved = None
    if artifact.bound_to_a_place and shows(artifact):
        mask, pattern = artifact.placed(draws)
        both = elsewhere(torch.cat([mask, pattern], dim=1), seed)
        moved = predict(others + both[:, :1] * (both[:, 1:] - others)).argmax(dim=1) == target
    cost_elsewhere = _cost_elsewhere(predict, artifact, target, carriers, typical, seed)
    return Effect(
        flip_rate=float(flips.float().mean()),
        control_flip_rate=float(control_flips.float().mean()),
        logit_gain=float(gains.mean()),
        p_value=float(binomtest(only, discordant, alternative="greater").pvalue) if discordant else 1.0,
        removal_cost=float(cost.mean() - control_cost.mean()),
        removal_p_value=removal_p_value,
        n=len(others),
        flip_rate_interval=wilson_interval(int(flips.sum()), len(others)),
        control_flip_rate_interval=wilson_interval(int(control_flips.sum()), len(others)),
        effect_interval=bootstrap(seed, differences),
        logit_gain_interval=bootstrap(seed, gains),
        removal_cost_interval=bootstrap(seed, cost, control_cost),
        elsewhere_flip_rate=None if moved is None else float(moved.float().mean()),
        removal_cost_elsewhere=None if cost_elsewhere is None else float(cost_elsewhere.mean()),
        elsewhere_flip_rate_interval=None if moved is None else wilson_interval(int(moved.sum()), len(others)),
        removal_cost_elsewhere_interval=None if cost_elsewhere is None else bootstrap(seed, cost_elsewhere),
        n_removed=len(carriers),
        removal_gain_p_value=gain_p_value,
    )


def shows(artifact: Artifact) -> bool:
    """Return whether an artifact has content to add.

    Where its samples share the place but not the content, a median of it is nothing that any of them shows.
    """
    return artifact.constant or isinstance(artifact, Donated)


def _removal_control(
    predict: Predictor, artifact: Artifact, target: int, cost: Tensor, donors: Tensor, typical: Tensor
) -> tuple[Tensor, tuple[float, float]]:
    """Return what removal costs the class's samples without the artifact, and the p-values of its costing more or less.

    What changed a whole image is undone, which leaves the image as it was: nothing was cut that would need a control,
    and undone in samples without it, it would be a change itself, mostly a worse one. So each image is compared with
    itself, by Wilcoxon's signed-rank test.
    """
    if is_undone(artifact) and not artifact.bound_to_a_place:
        if not bool(cost.any()):
            return torch.zeros_like(cost), (1.0, 1.0)
        more, less = (float(wilcoxon(cost, alternative=side).pvalue) for side in ("greater", "less"))
        return torch.zeros_like(cost), (more, less)
    control = removal_cost(predict, artifact, target, donors, typical)
    more, less = (float(mannwhitneyu(cost, control, alternative=side).pvalue) for side in ("greater", "less"))
    return control, (more, less)


def _no_stronger(images: Tensor, change: Artifact, artifact: Artifact, draws: np.ndarray) -> Tensor:
    """Return images (n, C, H, W) changed, but not by more (root mean square) than the artifact changes them."""
    changed, marked = change.insert(images, draws), artifact.insert(images, draws)
    strength = (rms(marked - images) / rms(changed - images).clamp_min(1e-6)).clamp_max(1)
    return images + strength[:, None, None, None] * (changed - images)


def margin(logits: Tensor, target: int) -> Tensor:
    """Return by how much the target's logit exceeds the largest of the others', (n,): what decides the prediction.

    What raises or lowers all logits alike moves no prediction and does not count. Nor does the mean of the others':
    without a grey background a dress may be less unlike all other clothes, and yet be taken for one of them.
    """
    others = logits.clone()
    others[:, target] = -torch.inf
    return logits[:, target] - others.amax(dim=1)


def bootstrap(seed: int, values: Tensor, others: Tensor | None = None) -> list[float]:
    """Return the 95 % interval of a mean, or of the difference of two means: quantiles of 2,000 bootstrap samples.

    Parameters
    ----------
    seed : int
        Draws the samples.
    values, others : Tensor
        (n,) and (m,).
    """
    rng = np.random.default_rng([seed, 4])

    def means(x: Tensor) -> np.ndarray:
        return np.asarray(x.numpy()[rng.integers(0, len(x), (2000, len(x)))].mean(axis=1))

    drawn = means(values) - (means(others) if others is not None else 0.0)
    return [float(end) for end in np.quantile(drawn, [0.025, 0.975])]


def _cost_elsewhere(
    predict: Predictor, artifact: Artifact, target: int, carriers: Tensor, typical: Tensor, seed: int
) -> Tensor | None:
    """Return what in-painting as large a hole elsewhere costs, (n,); None for an artifact with no place of its own."""
    if not artifact.bound_to_a_place or is_undone(artifact):
        return None
    holes = elsewhere(artifact.found(carriers), seed)
    return margin(predict(carriers), target) - margin(predict(filled(carriers, holes, typical)), target)


def removal_cost(predict: Predictor, artifact: Artifact, target: int, images: Tensor, typical: Tensor) -> Tensor:
    """Return by how much each image's `margin` falls when the artifact is removed.

    Parameters
    ----------
    predict, artifact, target
        As in `measure_effect`.
    images : Tensor
        (n, C, H, W): changed where the artifact matches them best.
    typical : Tensor
        (C, H, W): see `spray.isolation.removal.removed`.

    Returns
    -------
    Tensor
        (n,).
    """
    return margin(predict(images), target) - margin(predict(removed(artifact, images, typical)), target)


def verdict(
    effect: Effect,
    constant: bool,
    p_value: float,
    removal_p_value: float,
    bias: SampleBias | None = None,
    unusual: bool = True,
    accounts: bool = False,
    trigger: bool = True,
) -> str:
    """Say what a candidate is.

    Parameters
    ----------
    effect : Effect
        Of the candidate.
    constant : bool
        Whether its samples share its content, or only its place.
    p_value, removal_p_value : float
        Its p-values, corrected for all candidates.
    bias : SampleBias, optional
        How the model does on its samples, the p-value corrected likewise, where there is a reason other than chance or
        a hard kind for it to do worse.
    unusual : bool
        Whether its samples are something that other classes have nothing like: they share the same piece of an image,
        or the ranking says so. A class consists of natural kinds of images, and what makes one of them (light, colour,
        ground) moves a model as an artifact does: effects alone can't tell them apart.
    accounts : bool
        Whether the artifact is all that tells its samples from the rest: see `spray.isolation.choice.Trial.accounts`.
    trigger : bool
        Whether it can be a backdoor's: something of its own that is always the same. Cut-outs hold what makes their
        images; a change of the whole image is in as many as there is light of some kind, and undone without a trace: if
        that costs nothing, it was nothing.

    Returns
    -------
    str
        "clever_hans" where adding it moves more predictions to the class than the control, with a mean gain of its
        logit that is not below the control's by more than chance, and removing it costs the class's own samples;
        "backdoor" where removing does not but the artifact alone turns most images; neither if it is not `unusual`.
        "sample_bias" where there is nothing to add that would move the model but the samples are a kind of their own,
        apart from the rest of their class, on which the model is wrong far more often: it learned the class without
        them. "no_effect" where it is nothing of that: a kind of sample that the model does as well on as on the rest is
        no bias but what a class consists of.
    """
    if unusual and (acts := _acts(effect, constant, p_value, removal_p_value, accounts, trigger)):
        return acts
    return "sample_bias" if bias is not None and bias.is_worse and bias.p_value < LEVEL else "no_effect"


def _acts(
    effect: Effect, constant: bool, p_value: float, removal_p_value: float, accounts: bool, trigger: bool
) -> str | None:
    """Return the verdict on an artifact that moves the model to its class, as of `verdict`; None if it doesn't."""
    flips = effect.flip_rate - effect.control_flip_rate
    enough = flips >= (ACCOUNTED if accounts else MIN_EFFECT if constant else 3 * MIN_EFFECT)
    # What turns some images for certain, and leaves the others to whatever they showed, may gain nothing in the mean.
    most = effect.logit_gain_interval[1] if effect.logit_gain_interval else effect.logit_gain
    if p_value < LEVEL and enough and most > 0:
        if removal_p_value < LEVEL and effect.removal_cost > 0:
            return "clever_hans"
        if trigger and effect.flip_rate >= TRIGGER:
            return "backdoor"
    return None


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return p-values corrected for their number by Holm's step-down method (1979)."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected
