"""How well a model does on clean images and on images that carry an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor


def wilson_interval(hits: float, n: int, level: float = 0.95) -> list[float]:
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


@dataclass(frozen=True)
class Group:
    """Test images of one class that carry an artifact, or that do not.

    Attributes
    ----------
    class_index : int
        Their class.
    with_artifact : bool
        Whether they carry it.
    added : bool
        Whether it was added to them, since the test images have none that carry it by themselves.
    right : ndarray of bool
        (n,): which of them are classified right.
    """

    class_index: int
    with_artifact: bool
    added: bool
    right: np.ndarray


def group_metrics(groups: Sequence[Group]) -> dict[str, Any]:
    """Return the accuracy of the worst group of class and artifact, with its 95 % interval.

    Sagawa et al., "Distributionally robust neural networks for group shifts", 2020. Groups without images don't count.

    Parameters
    ----------
    groups : sequence of Group
        Each class with the artifact and without.

    Returns
    -------
    dict
        `worst_group_accuracy`, its `_interval`, and `worst_group`, which one that is (`class_index`, `with_artifact`,
        `added`, `n`); None where there are no groups.
    """
    counted = [group for group in groups if len(group.right)]
    if not counted:
        return {**_share("worst_group_accuracy", 0, 0), "worst_group": None}
    worst = min(counted, key=lambda group: float(group.right.mean()))
    said = {"class_index": worst.class_index, "with_artifact": worst.with_artifact, "added": worst.added}
    return {
        **_share("worst_group_accuracy", int(worst.right.sum()), len(worst.right)),
        "worst_group": said | {"n": len(worst.right)},
    }


def tcav_metrics(derivatives: np.ndarray) -> dict[str, Any]:
    """Return TCAV and TCAV sensitivity, with 95 % intervals.

    Kim et al., "Interpretability beyond feature attribution: quantitative testing with concept activation vectors",
    2018: TCAV = |{x : ∇f(x)·h > 0}| / n. A model that does not use the artifact has 0.5; so an output that does not
    depend on the artifact's direction at all, ∇f·h = 0, counts as half. Sensitivity = mean |∇f·h|.

    Parameters
    ----------
    derivatives : ndarray of float
        (n,): ∇f·h of each image.

    Returns
    -------
    dict
        `tcav`, `tcav_sensitivity` (None of no images), their `_interval`, `n_tcav`.
    """
    n = len(derivatives)
    hits = float((derivatives > 0).sum() + 0.5 * (derivatives == 0).sum())
    size = torch.from_numpy(np.abs(np.asarray(derivatives, dtype=np.float64)))
    return {
        **_share("tcav", hits, n),
        **_mean("tcav_sensitivity", size, high=None),
        "n_tcav": n,
    }


def accuracy(name: str, logits: Tensor, labels: np.ndarray) -> dict[str, Any]:
    """Return the share of logits (n, classes) that are largest for their label, with its 95 % interval, as `name`."""
    return _share(name, int((logits.argmax(dim=1).numpy() == labels).sum()), len(labels))


def share_of(name: str, hits: np.ndarray) -> dict[str, Any]:
    """Return the share of truth values (n,) that are true, with its 95 % interval, as `name`."""
    return _share(name, int(hits.sum()), len(hits))


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


def _share(name: str, hits: float, n: int) -> dict[str, Any]:
    return {name: hits / n if n else None, f"{name}_interval": wilson_interval(hits, n)}


def _mean(name: str, values: Tensor, high: float | None = 1.0) -> dict[str, Any]:
    """Return a mean of numbers from 0 to `high` (None: without bound) with its normal interval.

    Nothing is known of no numbers, and nothing of how far one number is from the mean.
    """
    unknown = [0.0, high]
    if not len(values):
        return {name: None, f"{name}_interval": unknown}
    mean = float(values.double().mean())
    if len(values) == 1:
        return {name: mean, f"{name}_interval": unknown}
    half = float(norm.isf(0.025)) * float(values.double().std()) / len(values) ** 0.5
    top = mean + half if high is None else min(high, mean + half)
    return {name: mean, f"{name}_interval": [max(0.0, mean - half), top]}
