"""What a correction is given, and the registry of those that there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from spray.data.base import ImageDataset, Normalizer
from spray.errors import UserError
from spray.isolation.candidate import Artifact
from spray.registry import Registry


@dataclass(frozen=True)
class Finding:
    """A proven artifact: what it is, its class and the training samples that carry it."""

    artifact: Artifact
    class_index: int
    samples: np.ndarray


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


Correction = Callable[[Problem], nn.Module]
"""Returns a corrected model with the same `state_dict` keys as the one it was given, in eval mode."""

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
