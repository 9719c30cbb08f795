"""Concept activation vectors: the direction of an artifact in a layer."""

from __future__ import annotations

import torch
from torch import Tensor


def pattern_cav(activations: Tensor, has_artifact: Tensor) -> Tensor:
    """Return the unit pattern CAV h, cov(a, t) / var(t): for binary t the difference of the two means.

    Pahde et al., "Navigating neural space: revisiting concept activation vectors to overcome directional divergence",
    2024, equation 5 (SignalCAV).

    Parameters
    ----------
    activations : Tensor
        (n, d).
    has_artifact : Tensor of bool
        (n,); both kinds must occur.

    Returns
    -------
    Tensor
        (d,), of length 1, or zero if the means agree.

    Raises
    ------
    ValueError
        If only one kind occurs.
    """
    if has_artifact.all() or not has_artifact.any():
        raise ValueError("a CAV needs samples with and without the artifact")
    difference = activations[has_artifact].mean(dim=0) - activations[~has_artifact].mean(dim=0)
    return torch.nn.functional.normalize(difference, dim=0)
