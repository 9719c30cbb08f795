"""When a cluster of one model counts as a strategy that the other model has as well, or lacks.

The numbers were set on pairs of models that differ in nothing but the seed of their training, of which hardly any
cluster may be called one model's own, and on models with a planted tag against such as had learned to ignore it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scipy.stats import norm

SHARED, ONLY, UNDECIDED = "shared", "only", "undecided"
VERDICTS = (ONLY, UNDECIDED, SHARED)

SMALLEST = 8
"""Clusters with fewer samples are not compared: nothing can be said about so few."""

LARGEST = 0.5
"""Nor are those with a larger share of their group: the others are then what stands apart."""

ENOUGH_SAME = 0.5
"""Jaccard index from which on a cluster of the other model is the same one."""

KEPT, LOST = 0.5, 0.25
"""Share of the separability from which on a cluster is shared, and up to which it is known to one model only."""

HELD = 0.6
"""Share of the cohesion below which the other model's heatmaps don't hold a cluster together any more."""

FADED = 0.35
"""Share of the difference of the mean heatmaps from which on too much is left of a cluster to call it lost."""

REAL = 0.5
"""Least cohesion of a cluster in its own model: one that doesn't hold together there is a cut through a cloud."""

CLEAR = 3.0
"""How many times as separable as the tail of a normal distribution a cluster has to be in its own model."""

LEVEL = 0.01
"""Largest p-value of an overlap that counts."""


@dataclass(frozen=True)
class Overlap:
    """The other model's cluster that shares most samples.

    Attributes
    ----------
    cluster : str
        Its name, `clustering/label`; empty if there is none.
    size, both : int
        Its samples, and those that are in both clusters.
    jaccard : float
        Of both sets of samples.
    p_value : float
        That a cluster of that size drawn at random shares as many, times the number of clusters that were looked at.
    """

    cluster: str
    size: int
    both: int
    jaccard: float
    p_value: float


def verdict(
    overlap: Overlap,
    separability: tuple[float, float],
    cohesion: tuple[float, float],
    retention: float | None,
    tail: float,
) -> str:
    """Say whether a cluster's strategy is the other model's as well.

    `shared`
        The cluster is clear in the other model's heatmaps too; or they keep at least half of the separability and 0.6
        of the cohesion; or they keep more than a quarter of the separability, and one of the other's clusters holds
        the same samples (Jaccard index at least 0.5, p at most 0.01).
    `only`
        The cluster is clear in its own model, while the other's heatmaps keep at most a quarter of the separability,
        less than 0.6 of the cohesion and less than 0.35 of the difference of the mean heatmaps (where these can be
        laid over each other), and none of its clusters holds the same samples.
    `undecided`
        Everything else.

    A cluster is clear in heatmaps where its cohesion is at least 0.5 and it is at least three times as separable as
    the tail of a normal distribution, which any cloud without clusters has.

    Parameters
    ----------
    overlap : Overlap
        With the other model's clusters.
    separability, cohesion : tuple of float
        In the model's own heatmaps, and in the other's.
    retention : float or None
        See `likeness`.
    tail : float
        See `normal_tail`.
    """
    kept, held = ratio(separability), ratio(cohesion)
    same = overlap.jaccard >= ENOUGH_SAME and overlap.p_value <= LEVEL
    here, there = (tau >= CLEAR * tail and held_by >= REAL for tau, held_by in zip(separability, cohesion, strict=True))
    if there or (kept >= KEPT and held >= HELD) or (same and kept > LOST):
        return SHARED
    if here and kept <= LOST and held < HELD and (retention is None or retention < FADED) and not same:
        return ONLY
    return UNDECIDED


def normal_tail(size: int, n: int) -> float:
    """Return Fisher's criterion of the largest `size` of `n` normal numbers against the others, for large n.

    No part of a normal distribution is separated better, in whatever direction, so that a cluster has to be beyond
    that to be more than a cut through a cloud. With p = size/n and z its quantile, the variance between is
    b = φ(z)²/(p(1-p)), the one within 1 - b.
    """
    p = size / n
    between = norm.pdf(norm.isf(p)) ** 2 / (p * (1 - p))
    return float(between / (1 - between))


def rule() -> dict[str, Any]:
    """Return the rule as numbers and, under `text`, in words."""
    return {
        "smallest": SMALLEST,
        "largest": LARGEST,
        "enough_same": ENOUGH_SAME,
        "level": LEVEL,
        "kept": KEPT,
        "lost": LOST,
        "held": HELD,
        "faded": FADED,
        "real": REAL,
        "clear": CLEAR,
        "text": [
            f"Compared are clusters of at least {SMALLEST} samples that are at most {LARGEST:.0%} of their class.",
            "Separability is Fisher's criterion of the cluster against the rest of its class, cross-fitted. Cohesion "
            "is the share of its samples' neighbours that are in the cluster too, 0 for a random set, 1 for one that "
            "stands alone. Both are measured in the heatmaps of either model, for the same samples.",
            f"Clear: a cohesion of at least {REAL:g}, and a separability at least {CLEAR:g} times that of a normal "
            "distribution's tail of the same size, which any cloud without clusters has.",
            f"Shared: the cluster is clear in the other model's heatmaps too; or they keep at least {KEPT:.0%} of the "
            f"separability and {HELD:.0%} of the cohesion; or they keep more than {LOST:.0%} of the separability, and "
            f"one of the other's clusters has a Jaccard index of at least {ENOUGH_SAME:g} with it, p at most "
            f"{LEVEL:g}.",
            f"Only in one model: the cluster is clear there; the other's heatmaps keep at most {LOST:.0%} of the "
            f"separability, less than {HELD:.0%} of the cohesion and, where the heatmaps can be laid over each other, "
            f"less than {FADED:.0%} of the difference between the means of members and others; and none of its "
            "clusters has such a Jaccard index.",
            "Undecided: everything between.",
        ],
    }


def ratio(values: tuple[float, float]) -> float:
    """Return how much of a model's own value, the first, the other model reaches; 1 where there is nothing to reach."""
    own, other = values
    return max(0.0, other) / own if own > 0 else 1.0
