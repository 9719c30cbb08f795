"""Two models on the same samples: which strategies of one the other has as well.

A cluster of model A's heatmaps is a set of samples. Whether model B treats these samples as one kind too is asked in
three ways, none of which needs the heatmaps of both models to look alike:

- is one of B's own clusters made of the same samples (Jaccard index, with a hypergeometric p-value)?
- do B's heatmaps hold the set together: how much of the weight of the members' neighbours lies inside of the set
  (one minus its conductance, corrected for chance)?
- do B's heatmaps separate the set from the rest: Fisher's criterion, cross-fitted, so that it holds out of sample?

The last two are compared with what A itself reaches. Where heatmaps of both models lie on the same pixels, the
cosines of their means are told too, and how much of A's difference between members and rest B has as well. The rule
is in `comparison_rule`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.stats import hypergeom

from spray.analysis.comparison_rule import (
    CLEAR,
    ENOUGH_SAME,
    LARGEST,
    LOST,
    ONLY,
    REAL,
    SMALLEST,
    VERDICTS,
    Overlap,
    normal_tail,
    ratio,
    verdict,
)
from spray.analysis.neighbors import neighbor_graph
from spray.analysis.ranking import cross_fitted_separability, principal_components

MOST = 0.75
"""Share of the smaller of two clusters that makes it a part of the other."""


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
    def weaker(self) -> bool:
        """Whether it is clear, the other model keeps at most a quarter of its separability, and yet it isn't lost."""
        clear = self.clear >= CLEAR and self.cohesion[0] >= REAL
        return clear and self.kept <= LOST and self.verdict != ONLY

    @property
    def held(self) -> float:
        """Share of the cohesion that the other model's heatmaps have."""
        return ratio(self.cohesion)


def compare(a: Side, b: Side, n_neighbors: int = 10, metric: str = "euclidean", seed: int = 0) -> list[Compared]:
    """Look for the counterpart of every cluster of `a` in `b`.

    Parameters
    ----------
    a, b : Side
        Two models on the same samples.
    n_neighbors : int
        Of the neighbour graph in which cohesion is measured.
    metric : str
        Of that graph: "euclidean" or "cosine".
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
    graphs = [neighbor_graph(side.features, n_neighbors, metric, seed=seed) for side in (a, b)]
    components = [principal_components(side.features, seed=seed) for side in (a, b)]
    others = [(f"{name}/{label}", member) for name, label, member in _clusters(b.clusterings)]
    rows = []
    for cluster, member in chosen:
        overlap, tail = best_overlap(member, others), normal_tail(int(member.sum()), len(member))
        own, other = (cross_fitted_separability(X, member, seed) for X in components)
        held = cohesion(graphs[0], member), cohesion(graphs[1], member)
        alike = likeness(a.maps, b.maps, member)
        said = verdict(overlap, (own, other), held, alike[2], tail)
        rows.append(Compared(cluster, member, overlap, (own, other), held, *alike, said))
    return sorted(rows, key=lambda row: (VERDICTS.index(row.verdict), -row.clear, row.cluster))


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


def _clusters(clusterings: Mapping[str, np.ndarray]) -> Iterator[tuple[str, int, np.ndarray]]:
    for name, labels in clusterings.items():
        for label in np.unique(labels[labels >= 0]):
            yield name, int(label), labels == label


def _cosine(u: np.ndarray, v: np.ndarray) -> float | None:
    length = float(np.linalg.norm(u) * np.linalg.norm(v))
    return float(u @ v) / length if length > 0 else None
