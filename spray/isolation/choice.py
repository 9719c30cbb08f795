"""Which explanation of a cluster is the best: several isolators are tried, and the evidence chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from spray.isolation.artifact import Artifact
from spray.isolation.blended import isolate_blended, isolate_shade, isolate_shading, isolate_veil
from spray.isolation.causal import Predictor, shows
from spray.isolation.changed import Changed, isolate_background, isolate_change, isolate_faded
from spray.isolation.evidence import Evidence
from spray.isolation.matted import isolate_colored, isolate_donated, isolate_uncolored
from spray.isolation.moments import refined
from spray.isolation.scattered import isolate_scattered
from spray.isolation.statistics import quartiles, statistics
from spray.isolation.turned import isolate_turned
from spray.isolation.two_samples import area, told_apart

Isolator = Callable[[Evidence], Artifact | None]
"""Explains what a cluster has and the rest of its class has not; None where it can't."""


def isolate_local(evidence: Evidence, near: bool = False) -> Artifact | None:
    """Isolate content that is always the same, at about the same place."""
    found = evidence.common_artifact(near)
    return found if found is not None and found.constant else None


def isolate_near(evidence: Evidence) -> Artifact | None:
    """Isolate of that what ends near the relevance."""
    return isolate_local(evidence, near=True)


ISOLATORS: dict[str, Isolator] = {
    "near": isolate_near,
    "local": isolate_local,
    "colored": isolate_colored,
    "uncolored": isolate_uncolored,
    "scattered": isolate_scattered,
    "turned": isolate_turned,
    "blended": isolate_blended,
    "faded": isolate_faded,
    "shade": isolate_shade,
    "shading": isolate_shading,
    "veil": isolate_veil,
    "change": isolate_change,
    "background": isolate_background,
    "donated": isolate_donated,
}
"""From the simplest on: of two that explain a cluster as well the earlier one is chosen."""

CUT_OUT = 0.5
"""Handicap of cut-outs whose content varies: they take along what else is there, and explain nothing by themselves,
unless they account for the cluster."""
EFFECT = 0.5
"""Most that its effect on the model adds to the evidence for an explanation."""
GROUPS = 4
"""Natural groups of the rest of the class that a change of the whole image is compared with."""
SIMPLER = 0.01
"""An isolator has to be better by so much than the one before it."""


SAME_CONTENT = ("near", "local", "scattered")
"""Isolators of the same piece of an image in all samples, which natural kinds of images don't have."""
WHOLE = ("faded", "shade", "shading", "veil", "change", "background")
"""Isolators that explain a cluster by a change of the whole image."""
PARTS = tuple(name for name in ISOLATORS if name not in (*WHOLE, "donated"))
"""Isolators of something that is on the image, with content or a shape of its own. Cut-outs of few samples, against few
others, hold whatever is natural in these."""
LIKE_ENOUGH = 0.85
"""Least likeness of what such a change makes of the rest.

Images of a class differ as wholes without any artifact, and a change fitted to a natural group moves models, too; but
what it makes does not look like the group.
"""
LIKE_AT_ALL = 0.4
"""The same of what has a place or shape of its own, if it is not the same piece of an image.

Planted ones had 0.53 and more; pixels of a colour that some natural images have made others like these by 0.06 to 0.27.
"""
LIKE_SOME = 0.65
"""The same of cut-outs after which hardly anything tells the rest from the cluster: each sample shows another one."""
APART = 0.8
"""Least area under the curve by which the cluster's samples have to be told from the rest ..."""
ALIKE = 0.65
"""... and largest share of it, of what exceeds chance, that may be left once the artifact is added to the rest.

Natural kinds of images differ in more than one thing: whatever is added to the others, they can still be told apart.
"""
HALF_ALIKE = 0.5
"""The same for what lies at any angle, as edges and corners do: planted strips left up to 0.46, one natural thing 0.59
and the others 0.77 or more."""
MORE_ALIKE = 0.4
"""The same for a change of the whole image and for pixels of one colour: light, contrast and colour are much of what
natural kinds differ in."""
MOST_LEFT = dict.fromkeys((*WHOLE, "colored"), MORE_ALIKE) | {"turned": HALF_ALIKE}
"""Of the isolators for which it is not `ALIKE`."""
HARDLY_APART = 0.4
"""The same for cut-outs that make the rest only somewhat like the cluster; of natural kinds they left 0.53 and more.

Of a change of the whole image so little shows that it is no natural one.
"""
CONFIRMED, CHANGED = 0.3, 0.4
"""Of what is isolated from samples that it was recognized in: the most that may be left of the difference, and the most
of an image that it may take the place of. Natural kinds left 0.40 and more or took the place of 0.53."""
SAME_WAY = 0.5
"""Least cosine of two changes of the whole image that go the same way."""
SHARP = 0.9
"""Least separation of what is looked at again from all samples that show it, whatever else the cluster shares, and of
what is isolated from samples that it was recognized in."""
RESEMBLES = 0.5
"""Least likeness from which on a change of the whole image is fitted more closely and looked at again, which takes a
while."""
CLOSER = -0.2
"""Least share explained of the squared difference: added, nothing makes images look less like the cluster's samples."""
SEPARATED = 0.75
"""Least separation by its own score: what makes the cluster is found in it."""
REPLACED = 0.55
"""Most of an image that an artifact may take the place of and still be one: more, and it is another image. All images
become like a group of flat ones if they are blended with its colour enough."""
CUT_REPLACED, CUT_SHARE = 0.2, 0.4
"""The same of cut-outs, and the largest share of a class that they are recognized in: what always differs and is in
much of the image, or in most of a class, is what makes the class. Planted ones had 0.14 and 0.30 at most."""


@dataclass(frozen=True)
class Trial:
    """One explanation of a cluster, fitted on half of it, and the evidence for it on the other half.

    Attributes
    ----------
    isolator : str
        A name in `ISOLATORS`.
    artifact : Artifact
        What it isolated.
    likeness : float
        How much like the cluster the rest of the class becomes once it is added: 0 not at all, 1 fully. Too strong a
        change counts as much as one too weak.
    explained : float
        Which share of the squared difference of the quartiles of all pixels, of cluster and rest, is then gone.
    separation : float
        How often a sample of the cluster matches the artifact better than one of the rest does.
    apart, still_apart : float
        How well a classifier tells the cluster from the rest, and from the rest with the artifact added: see
        `told_apart`.
    flip_rate, control_flip_rate : float, optional
        Shares of images of other classes that are predicted as the artifact's class once it is added, and once the
        control is; None where they decide nothing: another trial is better whatever they are, or none has a verdict.
    closely : bool
        Whether it was fitted more closely: see `spray.isolation.moments`.
    """

    isolator: str
    artifact: Artifact
    likeness: float
    explained: float
    separation: float
    apart: float
    still_apart: float
    flip_rate: float | None = None
    control_flip_rate: float | None = None
    closely: bool = False

    @property
    def same_piece(self) -> bool:
        """Whether it is the very same piece of an image, not pixels of a colour that a ground may have, too."""
        return self.isolator in SAME_CONTENT and self.artifact.constant

    @property
    def explains(self) -> bool:
        """Whether the cluster is what was added: assumed of the same piece of an image."""
        least = LIKE_ENOUGH if self.isolator in WHOLE else LIKE_AT_ALL
        return self.isolator in SAME_CONTENT or self.likeness >= least

    @property
    def left(self) -> float:
        """How much of what tells cluster and rest apart is left once the artifact is added, 0 to 1."""
        before, after = (max(0.0, 2 * area - 1) for area in (self.apart, self.still_apart))
        return min(1.0, after / before) if before else 1.0

    @property
    def accounts(self) -> bool:
        """Whether the artifact, with content of its own, is all that tells the cluster's samples from the rest."""
        alike = (
            self.apart >= APART and self.left <= MOST_LEFT.get(self.isolator, ALIKE) and self.separation >= SEPARATED
        )
        # Cut-outs of natural images hold what makes these, but do not make others like them.
        least = LIKE_SOME if self.left <= HARDLY_APART else LIKE_ENOUGH
        like = self.explains and (self.artifact.constant or self.likeness >= least) and self.explained >= CLOSER
        part = self.artifact.replaced <= (REPLACED if self.artifact.constant else CUT_REPLACED)
        return alike and like and part and shows(self.artifact)

    @property
    def confirmed(self) -> bool:
        """Whether it may be an artifact though it was isolated from the very samples that it was recognized in."""
        sure = self.left <= CONFIRMED and self.separation >= SHARP and self.artifact.replaced <= CHANGED
        return self.accounts and sure

    @property
    def settled(self) -> bool:
        """Whether there is no need to look for a better one: it accounts for the samples and leaves hardly anything."""
        return self.accounts and self.left <= CONFIRMED

    @property
    def unnatural(self) -> bool:
        """Whether the cluster is no natural kind of image: the artifact accounts for it, or is always the same piece.

        Of too few or too impure samples that could not be told from the rest, nothing can be accounted for.
        """
        return self.accounts or (self.isolator in SAME_CONTENT and max(self.apart, self.still_apart) < APART)

    def unnatural_in(self, share: float) -> bool:
        """Whether it is unnatural if it is recognized in such a share of its class.

        Cut-outs of most of a class hold what makes the class.
        """
        return self.unnatural and (self.artifact.constant or share <= CUT_SHARE)

    @property
    def evidence(self) -> float:
        """What trials are compared by."""
        effect = (self.flip_rate or 0.0) - 0.5 * (self.control_flip_rate or 0.0)
        handicap = 0.0 if self.artifact.constant or self.accounts else CUT_OUT
        return (
            self.likeness
            + 0.5 * (self.explained + 2 * self.separation - 1)
            + EFFECT * effect
            - 0.25 * self.left
            - handicap
        )


def tried(
    evidence: Evidence,
    target: int,
    features: Callable[[Tensor], np.ndarray],
    likeness: Callable[[np.ndarray], np.ndarray],
    predict: Predictor,
    others: Tensor,
    seed: int,
    unusual: bool = True,
    names: Sequence[str] = tuple(ISOLATORS),
    known: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Trial]:
    """Try isolators on half of the samples, and gather the evidence on the other half.

    Parameters
    ----------
    evidence : Evidence
        The cluster and the rest of its class.
    target : int
        The class.
    features : callable
        From images (n, C, H, W) to what they are compared by, (n, d).
    likeness : callable
        From features to how much like the cluster each image is: typically 1 for its samples, 0 for the rest.
    predict : callable
        The model, from pixels to logits.
    others : Tensor
        (m, C, H, W): images of other classes, none of those that the proof is made with.
    seed : int
        Draws variants and donors.
    unusual : bool
        Whether the ranking finds the cluster unusual. If not, and no explanation shows that it is, there won't be a
        verdict, and no effects are measured.
    names : sequence of str
        Of the isolators that are tried.
    known : tuple of ndarray, optional
        The features of the cluster's images and of the rest's, where they have been computed already.

    Returns
    -------
    list of Trial
        The best first.
    """
    first, second = evidence.half(0), evidence.half(1)
    rng = np.random.default_rng([seed, 21])
    rest = second.other_images
    draws, other_draws = (rng.integers(0, 2**31, len(images)) for images in (rest, others))
    donors = rest[rng.integers(0, len(rest), len(others))]
    inside, outside = [part[1::2] for part in known] if known else (features(second.images), features(rest))
    usual = float(np.median(likeness(outside)))
    unit = max(float(np.median(likeness(inside))) - usual, 1e-6)
    before = told_apart(inside, outside, seed)

    def judged(name: str, artifact: Artifact, closely: bool = False) -> Trial:
        added = artifact.insert(rest, draws)
        seen = features(added)
        like = (float(np.median(likeness(seen))) - usual) / unit
        left = _distance(second.quartiles[0], quartiles(added)) / max(_distance(*second.quartiles), 1e-9)
        return Trial(
            name,
            artifact,
            likeness=max(-1.0, 1 - abs(1 - like)),
            explained=max(-1.0, 1 - left),
            separation=separation(artifact.score(second.images), artifact.score(rest)),
            apart=before,
            still_apart=told_apart(inside, seen, seed),
            closely=closely,
        )

    trials: list[Trial] = []
    for name in names:
        if name == "turned" and any(trial.accounts and trial.isolator in SAME_CONTENT for trial in trials):
            continue  # the same piece that is never turned is simpler, and this takes longest
        artifact = ISOLATORS[name](first)
        if artifact is None:
            continue
        trial = judged(name, artifact)
        if isinstance(artifact, Changed) and trial.apart >= APART and trial.likeness >= RESEMBLES:
            trial = max(trial, judged(name, refined(artifact, first), closely=True), key=lambda t: t.evidence)
        trials.append(trial)

    def effect(trial: Trial) -> Trial:
        added = (trial.artifact.insert(others, other_draws, content) for content in (None, donors))
        rates = [float((predict(images).argmax(dim=1) == target).float().mean()) for images in added]
        return replace(trial, flip_rate=rates[0], control_flip_rate=rates[1])

    if unusual or any(trial.unnatural for trial in trials):
        return _ordered(trials, effect)
    return sorted(trials, key=_value, reverse=True)


def _value(trial: Trial) -> float:
    return trial.evidence - SIMPLER * list(ISOLATORS).index(trial.isolator)


def _ordered(trials: Sequence[Trial], effect: Callable[[Trial], Trial]) -> list[Trial]:
    """Return trials, the best first, with their effects where these can decide which is the best.

    On a large network predictions cost more than all else; what effects add to the evidence is at most `EFFECT`.
    """
    known: list[Trial] = []
    left = sorted(trials, key=_value, reverse=True)
    while left and (not known or _value(left[0]) + EFFECT >= max(map(_value, known))):
        known.append(effect(left.pop(0)))
    return sorted(known, key=_value, reverse=True) + left


def refitted(trial: Trial, evidence: Evidence) -> Artifact:
    """Return what the chosen isolator isolates from all samples; the trial's own if that is nothing."""
    found = ISOLATORS[trial.isolator](evidence)
    if trial.closely and isinstance(found, Changed):
        found = refined(found, evidence)
    return found or trial.artifact


def natural_changes(trial: Trial, evidence: Evidence, seed: int) -> list[Artifact]:
    """Return what the same isolator, or else that of any change, makes of groups that the rest falls into by itself.

    They are the control of a change of the whole image, of which there is no part that other content could take the
    place of: images of a class are brighter or darker, sharper or softer without any artifact. Where the change leaves
    hardly anything of what tells the cluster, and so is no natural one, natural changes the same way are no control: a
    model that learnt the artifact answers to whatever is like it.

    Returns
    -------
    list of Artifact
        Up to `GROUPS`; none for an artifact that has a place or an edge of its own.
    """
    from sklearn.cluster import KMeans

    rest, maps = evidence.other_images, evidence.other_relevance
    if trial.isolator not in WHOLE or len(rest) < 8 * GROUPS:
        return []
    features = statistics(rest)
    features = (features - features.mean(dim=0)) / (features.std(dim=0) + 1e-6)
    group = KMeans(GROUPS, n_init=4, random_state=seed).fit_predict(features.numpy())
    changes = []
    for number in range(GROUPS):
        inside = torch.from_numpy(group == number)
        if min(int(inside.sum()), int((~inside).sum())) >= 8:
            part = Evidence(rest[inside], maps[inside], rest[~inside], maps[~inside])
            changes.append(ISOLATORS[trial.isolator](part) or isolate_change(part))
    found = [change for change in changes if change is not None]
    if trial.left > HARDLY_APART:
        return found
    other = [change for change in found if _cosine(change, trial.artifact, rest) < SAME_WAY]
    return other or found


def _cosine(change: Artifact, other: Artifact, images: Tensor) -> float:
    """Return the cosine between what two changes do to images (n, C, H, W)."""
    draws = np.arange(len(images))
    one, two = ((each.insert(images, draws) - images).flatten() for each in (change, other))
    return float(one @ two / (one.norm() * two.norm()).clamp_min(1e-9))


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the mean squared difference of two sets' quartiles, pixel by pixel."""
    return float((one - other).square().mean())


def separation(inside: Tensor, outside: Tensor) -> float:
    """Return the `area` under the curve of two sets of values, (n,) and (m,)."""
    return area(inside.numpy(), outside.numpy())
