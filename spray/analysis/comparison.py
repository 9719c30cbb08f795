"""Two models on the same samples: which strategies of one the other has as well.

A cluster of model A's heatmaps is a set of samples. Whether model B treats these samples as one kind too is asked in
three ways, none of which needs the heatmaps of both models to look alike:

- is one of B's own clusters made of the same samples (Jaccard index, with a hypergeometric p-value)?
- do B's heatmaps hold the set together: how much of the weight of the members' neighbours lies inside of the set
  (one minus its conductance, corrected for chance)?
- do B's heatmaps separate the set from the rest: Fisher's criterion, cross-fitted, so that it holds out of sample?

The last two are compared with what A itself reaches. Where heatmaps of both models lie on the same pixels, the
cosines of their means and how much of A's difference between members and rest B has as well are told too; they decide
nothing. The rule, `verdict`, was calibrated on models that differ in nothing but the seed of their training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.stats import hypergeom, norm

from spray.analysis.ranking import cross_fitted_separability, principal_components
from spray.analysis.spectral import neighbor_graph

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

REAL = 0.5
"""Least cohesion of a cluster in its own model: one that doesn't hold together there is a cut through a cloud."""

CLEAR = 3.0
"""How many times as separable as the tail of a normal distribution a cluster has to be in its own model."""

MOST = 0.75
"""Share of the smaller of two clusters that makes it a part of the other."""

LEVEL = 0.01
"""Largest p-value of an overlap that counts."""


@dataclass(frozen=True, eq=False)
class Side:
    """What one model gives for a group of samples, all arrays in the same order.

    Attributes
    ----------
    features : ndarray of float
        (n, d): the vectors that its clusters were made from.
    clusterings : mapping of str to ndarray of int
        (n,) labels by the clustering's name; negative ones are noise.
    maps : ndarray of float, optional
        (n, p): heatmaps on pixels that both models share, each divided by its absolute sum.
    """

    features: np.ndarray
    clusterings: Mapping[str, np.ndarray]
    maps: np.ndarray | None = None


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


@dataclass(frozen=True, eq=False)
class Compared:
    """A cluster of one model, and what the other one makes of its samples.

    Attributes
    ----------
    cluster : str
        `clustering/label`.
    member : ndarray of bool
        (n,): its samples.
    overlap : Overlap
        Its best counterpart among the other's clusters.
    separability, cohesion : tuple of float
        In the model's own heatmaps, and in the other's.
    cosine, contrast_cosine, retention : float or None
        Of the mean heatmaps, of the differences between members and rest, and how much of that difference the other
        model has as well; None where the heatmaps can't be laid over each other.
    verdict : str
        `shared`, `only` or `undecided`.
    """

    cluster: str
    member: np.ndarray
    overlap: Overlap
    separability: tuple[float, float]
    cohesion: tuple[float, float]
    cosine: float | None
    contrast_cosine: float | None
    retention: float | None
    verdict: str

    @property
    def clear(self) -> float:
        """How many times as separable it is in its own model as the tail of a normal distribution is."""
        return self.separability[0] / normal_tail(int(self.member.sum()), len(self.member))

    @property
    def kept(self) -> float:
        """Share of the separability that the other model's heatmaps have."""
        return ratio(self.separability)

    @property
    def held(self) -> float:
        """Share of the cohesion that the other model's heatmaps have."""
        return ratio(self.cohesion)


def compare(a: Side, b: Side, n_neighbors: int = 10, seed: int = 0) -> list[Compared]:
    """Look for the counterpart of every cluster of `a` in `b`.

    Parameters
    ----------
    a, b : Side
        Two models on the same samples.
    n_neighbors : int
        Of the neighbour graph in which cohesion is measured.
    seed : int
        Of the folds of the cross-fitting.

    Returns
    -------
    list of Compared
        One for each distinct set of samples, those known to `a` only first, the clearest ones first.

    Raises
    ------
    ValueError
        If the sides hold different numbers of samples.
    """
    lengths = {len(a.features), len(b.features)}
    lengths |= {len(labels) for side in (a, b) for labels in side.clusterings.values()}
    if len(lengths) != 1:
        raise ValueError(f"both models must be given for the same samples, not for {sorted(lengths)}")
    if not (chosen := distinct_clusters(a.clusterings)):
        return []
    graphs = [neighbor_graph(side.features, n_neighbors) for side in (a, b)]
    components = [principal_components(side.features, seed=seed) for side in (a, b)]
    others = [(f"{name}/{label}", member) for name, label, member in _clusters(b.clusterings)]
    rows = []
    for cluster, member in chosen:
        overlap, tail = best_overlap(member, others), normal_tail(int(member.sum()), len(member))
        separability = tuple(cross_fitted_separability(X, member, seed) for X in components)
        held = tuple(cohesion(graph, member) for graph in graphs)
        rows.append(
            Compared(
                cluster,
                member,
                overlap,
                (separability[0], separability[1]),
                (held[0], held[1]),
                *likeness(a.maps, b.maps, member),
                verdict(overlap, (separability[0], separability[1]), (held[0], held[1]), tail),
            )
        )
    return sorted(rows, key=lambda row: (VERDICTS.index(row.verdict), -row.clear, row.cluster))


def verdict(overlap: Overlap, separability: tuple[float, float], cohesion: tuple[float, float], tail: float) -> str:
    """Say whether a cluster's strategy is the other model's as well.

    `shared`
        One of the other's clusters holds the same samples (Jaccard index at least 0.5, p at most 0.01) and its
        heatmaps keep more than a quarter of the separability; or they keep at least half of it and 0.6 of the
        cohesion.
    `only`
        The cluster is clear in its own model: cohesion at least 0.5, and at least three times as separable as the tail
        of a normal distribution, which any cloud without clusters has. The other's heatmaps keep at most a quarter of
        the separability and less than 0.6 of the cohesion, and none of its clusters holds the same samples.
    `undecided`
        Everything else.

    Parameters
    ----------
    overlap : Overlap
        With the other model's clusters.
    separability, cohesion : tuple of float
        In the model's own heatmaps, and in the other's.
    tail : float
        See `normal_tail`.
    """
    kept, held = ratio(separability), ratio(cohesion)
    same = overlap.jaccard >= ENOUGH_SAME and overlap.p_value <= LEVEL
    if (same and kept > LOST) or (kept >= KEPT and held >= HELD):
        return SHARED
    clear = separability[0] >= CLEAR * tail and cohesion[0] >= REAL
    if clear and kept <= LOST and held < HELD and not same:
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
        "real": REAL,
        "clear": CLEAR,
        "text": [
            f"Compared are clusters of at least {SMALLEST} samples that are at most {LARGEST:.0%} of their class.",
            "Separability is Fisher's criterion of the cluster against the rest of its class, cross-fitted. Cohesion "
            "is the share of its samples' neighbours that are in the cluster too, 0 for a random set, 1 for one that "
            "stands alone. Both are measured in the heatmaps of either model, for the same samples.",
            f"Shared: one of the other model's clusters has a Jaccard index of at least {ENOUGH_SAME:g} with it "
            f"(p at most {LEVEL:g}) and its heatmaps keep more than {LOST:.0%} of the separability; or they keep at "
            f"least {KEPT:.0%} of it and {HELD:.0%} of the cohesion.",
            f"Only in one model: the cluster is clear there (cohesion at least {REAL:g}, separability at least "
            f"{CLEAR:g} times that of a normal distribution's tail of its size); the other's heatmaps keep at most "
            f"{LOST:.0%} of the separability and less than {HELD:.0%} of the cohesion; and none of its clusters has a "
            "Jaccard index as above.",
            "Undecided: everything between.",
        ],
    }


def distinct_clusters(clusterings: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """Return name and members (n,) of each cluster that is worth comparing; one found twice is named once."""
    found: dict[bytes, tuple[str, np.ndarray]] = {}
    for name, label, member in _clusters(clusterings):
        if SMALLEST <= member.sum() <= LARGEST * len(member):
            found.setdefault(member.tobytes(), (f"{name}/{label}", member))
    return list(found.values())


def best_overlap(member: np.ndarray, others: Sequence[tuple[str, np.ndarray]]) -> Overlap:
    """Return which of the other model's clusters shares most samples with a cluster.

    Parameters
    ----------
    member : ndarray of bool
        (n,).
    others : sequence of (str, ndarray of bool)
        Name and members (n,) of each.
    """
    n, size = len(member), int(member.sum())
    best = Overlap("", 0, 0, 0.0, 1.0)
    for name, other in others:
        both = int((member & other).sum())
        jaccard = both / int((member | other).sum())
        if jaccard > best.jaccard:
            chance = float(hypergeom.sf(both - 1, n, size, int(other.sum())))
            best = Overlap(name, int(other.sum()), both, jaccard, min(1.0, len(others) * chance))
    return best


def cohesion(graph: csr_matrix, member: np.ndarray) -> float:
    """Return how well a neighbour graph holds a set of nodes together.

    That is the share of the weight at its nodes which lies inside of it (one minus the set's conductance), set to 0
    for what a random set of that size has, and to 1 for one that hangs together with nothing else.

    Parameters
    ----------
    graph : csr_matrix
        (n, n), symmetric.
    member : ndarray of bool
        (n,).

    Returns
    -------
    float
        At most 1; 0 for a set without weight.
    """
    inside = member.astype(np.float64)
    weight = float(inside @ np.asarray(graph.sum(axis=1)).ravel())
    if weight <= 0 or member.all():
        return 0.0
    chance = (inside.sum() - 1) / (len(member) - 1)
    return float((inside @ (graph @ inside) / weight - chance) / (1 - chance))


def likeness(
    maps_a: np.ndarray | None, maps_b: np.ndarray | None, member: np.ndarray
) -> tuple[float | None, float | None, float | None]:
    """Compare the mean heatmaps of a set of samples in two models.

    Parameters
    ----------
    maps_a, maps_b : ndarray, optional
        (n, p) each: heatmaps on the same pixels.
    member : ndarray of bool
        (n,).

    Returns
    -------
    cosine : float or None
        Of the mean heatmaps of the members.
    contrast_cosine : float or None
        Of the contrasts d = mean of members - mean of the others.
    retention : float or None
        d_a · d_b / d_a · d_a: the share of a's contrast that is in b's heatmaps as well; may be negative or above 1.
        All three are None where there is nothing to compare.
    """
    if maps_a is None or maps_b is None or maps_a.shape != maps_b.shape or member.all() or not member.any():
        return None, None, None
    means = [maps[member].mean(axis=0, dtype=np.float64) for maps in (maps_a, maps_b)]
    rests = [maps[~member].mean(axis=0, dtype=np.float64) for maps in (maps_a, maps_b)]
    contrasts = [mean - rest for mean, rest in zip(means, rests, strict=True)]
    square = float(contrasts[0] @ contrasts[0])
    retention = float(contrasts[0] @ contrasts[1]) / square if square > 0 else None
    return _cosine(*means), _cosine(*contrasts), retention


def strategies(rows: Sequence[Compared]) -> list[list[Compared]]:
    """Put clusters of one model that hold mostly the same samples together, in the order of the rows.

    Several clusterings find the same samples with more or fewer at the border, or find parts of them. A cluster joins
    the first strategy of the same verdict whose leading cluster has a Jaccard index of at least 0.5 with it or, where
    the other model knows neither, holds most of it.

    Returns
    -------
    list of list of Compared
        The leading cluster of each strategy first, which is the clearest one.
    """
    found: list[list[Compared]] = []
    for row in rows:
        for group in found:
            if row.verdict == group[0].verdict and _belongs(row, group[0]):
                group.append(row)
                break
        else:
            found.append([row])
    return found


def _belongs(row: Compared, first: Compared) -> bool:
    both = int((first.member & row.member).sum())
    sizes = int(first.member.sum()), int(row.member.sum())
    part = row.verdict == ONLY and both >= MOST * min(sizes)
    return part or both >= ENOUGH_SAME * (sum(sizes) - both)


def ratio(values: tuple[float, float]) -> float:
    """Return how much of a model's own value, the first, the other model reaches; 1 where there is nothing to reach."""
    own, other = values
    return max(0.0, other) / own if own > 0 else 1.0


def _clusters(clusterings: Mapping[str, np.ndarray]) -> Iterator[tuple[str, int, np.ndarray]]:
    for name, labels in clusterings.items():
        for label in np.unique(labels[labels >= 0]):
            yield name, int(label), labels == label


def _cosine(u: np.ndarray, v: np.ndarray) -> float | None:
    length = float(np.linalg.norm(u) * np.linalg.norm(v))
    return float(u @ v) / length if length > 0 else None
