"""How well a model does on clean images and on images that carry an artifact."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor


def wilson_interval(hits: int, n: int, level: float = 0.95) -> list[float]:
    """Return Wilson's interval [low, high] of a share (Wilson, 1927)."""
    if n == 0:
        return [0.0, 1.0]
    z = float(norm.isf((1 - level) / 2))
    p = hits / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [float(max(0.0, center - half)), float(min(1.0, center + half))]


def clean_metrics(logits: Tensor, labels: np.ndarray) -> dict[str, Any]:
    """Return accuracy and worst accuracy of a class, with 95 % intervals.

    Parameters
    ----------
    logits : Tensor
        (n, classes).
    labels : ndarray of int
        (n,).

    Returns
    -------
    dict
        `clean_accuracy`, `worst_class_accuracy`, their `_interval`, `n`.
    """
    right = (logits.argmax(dim=1).numpy() == labels).astype(int)
    counts = {int(c): (int(right[labels == c].sum()), int((labels == c).sum())) for c in np.unique(labels)}
    worst = min(counts, key=lambda c: counts[c][0] / counts[c][1])
    return {
        **_share("clean_accuracy", int(right.sum()), len(right)),
        **_share("worst_class_accuracy", *counts[worst]),
        "n": len(labels),
    }


def attack_metrics(logits: Tensor, labels: np.ndarray, target: int | None, relevance_share: Tensor) -> dict[str, Any]:
    """Return what an artifact does to images of other classes, with 95 % intervals.

    Parameters
    ----------
    logits : Tensor
        (n, classes), of images with the artifact added.
    labels : ndarray of int
        (n,): their classes, none of them `target`.
    target : int or None
        The artifact's class; None for one that all classes have.
    relevance_share : Tensor
        (m,): share of the relevance inside the artifact, of some of them.

    Returns
    -------
    dict
        `attacked_accuracy`, `attacked_to_class` (None where there is no such class), `artifact_relevance`, their
        `_interval`, `n_attacked`.
    """
    predicted = logits.argmax(dim=1).numpy()
    to_class = (0, 0) if target is None else (int((predicted == target).sum()), len(labels))
    return {
        **_share("attacked_accuracy", int((predicted == labels).sum()), len(labels)),
        **_share("attacked_to_class", *to_class),
        **_mean("artifact_relevance", relevance_share),
        "n_attacked": len(labels),
    }


def accuracy(name: str, logits: Tensor, labels: np.ndarray) -> dict[str, Any]:
    """Return the share of logits (n, classes) that are largest for their label, with its 95 % interval, as `name`."""
    return _share(name, int((logits.argmax(dim=1).numpy() == labels).sum()), len(labels))


def relevance_inside(relevance: Tensor, mask: Tensor) -> Tensor:
    """Return R_bias = Σ|R·M| / Σ|R| of each map.

    Parameters
    ----------
    relevance : Tensor
        (n, C, H, W).
    mask : Tensor
        (n, 1, H, W) in [0, 1].

    Returns
    -------
    Tensor
        (n,); 0 for a map without relevance.
    """
    size = relevance.abs().sum(dim=1, keepdim=True)
    total = size.sum(dim=(1, 2, 3))
    inside = (size * mask).sum(dim=(1, 2, 3))
    return torch.where(total > 0, inside / total.clamp_min(torch.finfo(total.dtype).tiny), 0)


def _share(name: str, hits: int, n: int) -> dict[str, Any]:
    return {name: hits / n if n else None, f"{name}_interval": wilson_interval(hits, n)}


def _mean(name: str, values: Tensor) -> dict[str, Any]:
    """Return a mean of numbers in [0, 1] with its normal interval."""
    if not len(values):
        return {name: None, f"{name}_interval": [0.0, 1.0]}
    mean = float(values.double().mean())
    error = float(values.double().std()) / len(values) ** 0.5 if len(values) > 1 else 1.0
    half = float(norm.isf(0.025)) * error
    return {name: mean, f"{name}_interval": [max(0.0, mean - half), min(1.0, mean + half)]}
