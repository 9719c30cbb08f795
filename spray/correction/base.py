"""What a correction is given, and the registry of those that there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from spray.correction.options import Options
from spray.data.base import ImageDataset, Normalizer
from spray.errors import UserError
from spray.isolation.candidate import Artifact
from spray.isolation.growing import halfway
from spray.registry import Registry


@dataclass(frozen=True)
class Finding:
    """A proven artifact.

    Attributes
    ----------
    artifact : Artifact
        What it looks like, and where.
    class_index : int
        Its class.
    samples : ndarray of int
        The training samples of its class that carry it.
    scores : ndarray of float, shape (N,), optional
        How well each training sample, of all classes, matches it.
    threshold : float, optional
        The score above which an image carries it; halfway between what its samples and all others typically have where
        there is none.
    test_scores : ndarray of float, shape (n,), optional
        How well each test image matches it.
    """

    artifact: Artifact
    class_index: int
    samples: np.ndarray
    scores: np.ndarray | None = None
    threshold: float | None = None
    test_scores: np.ndarray | None = None


@dataclass(frozen=True)
class Problem:
    """A model that relies on artifacts, and what is at hand to correct it.

    Attributes
    ----------
    model : nn.Module
        In eval mode on `device`; a correction may change it, since it gets a copy.
    train : ImageDataset
        The training images.
    normalizer : Normalizer
        From pixels to the model's input.
    findings : sequence of Finding
        The proven artifacts, the strongest first.
    epochs, batch_size, learning_rate
        Budget of the corrections that train, the same for all.
    seed : int
        Of everything random.
    device : torch.device
        Where to compute.
    on_epoch : callable, optional
        Called after each epoch with its number and mean loss.
    options : Options
        What else can be chosen.
    facts : dict
        Filled by the correction: what it tried, what it chose and why. Only what JSON can hold.
    shared : dict
        What corrections of the same model need not find out twice; may be one for all of them.
    """

    model: nn.Module
    train: ImageDataset
    normalizer: Normalizer
    findings: Sequence[Finding]
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    device: torch.device
    on_epoch: Callable[[int, float], None] | None = None
    options: Options = field(default_factory=Options)
    facts: dict[str, Any] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)


Correction = Callable[[Problem], nn.Module]
"""Returns a corrected model in eval mode: with the same `state_dict` keys as the one it was given, or a
`spray.correction.wrapped.Projected` around it."""

CORRECTIONS: Registry[Correction] = Registry("correction method")
CONTROL = "fine_tuned"
"""The control that every comparison carries."""


def check_methods(methods: Sequence[str]) -> list[str]:
    """Return the methods in the order to run them, the control first if any other is asked for.

    Raises
    ------
    UserError
        For an unknown or repeated method.
    """
    for method in methods:
        CORRECTIONS.get(method)
    if len(set(methods)) < len(methods):
        raise UserError(f"correction.methods={list(methods)} names a method twice; name each once")
    return [CONTROL, *(m for m in methods if m != CONTROL)] if methods else []


def inputs(problem: Problem, indices: np.ndarray) -> torch.Tensor:
    """Return the model's input (n, C, H, W) for training images, on the device."""
    return problem.normalizer(problem.train.batch(indices), problem.device)


def carriers(problem: Problem, finding: Finding) -> np.ndarray:
    """Return which training images carry an artifact, bool (N,).

    Those are the finding's samples and, of the other classes, the images whose score is above the threshold; where
    there is none, those whose score is nearer to what its samples typically have than to what all other images
    typically have. Without scores no image of another class is one.
    """
    carries = np.zeros(len(problem.train), dtype=bool)
    carries[finding.samples] = True
    if finding.scores is not None and len(finding.samples):
        others = np.asarray(problem.train.labels) != finding.class_index
        threshold = finding.threshold
        if threshold is None and not carries.all():
            threshold = halfway(finding.scores, carries)
        if threshold is not None:
            carries |= others & (finding.scores > threshold)
    return carries


def unmarked(problem: Problem) -> np.ndarray:
    """Return which training images carry no artifact at all, bool (N,)."""
    return ~np.any([carriers(problem, finding) for finding in problem.findings], axis=0)
