"""Scores of clusters, made of several kinds of evidence, and how surprising they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from spray.analysis.discovery import q_values, simes
from spray.analysis.fisher import separability
from spray.analysis.neighbors import nearest_neighbors
from spray.analysis.ranking import (
    cross_fitted_projections,
    outlier_p_value,
    principal_components,
    structureless_p_value,
)
from spray.analysis.repeated import FEWEST, Repeated

SMALLEST = 8
"""Clusters with fewer samples are not scored."""

LARGEST = 0.65
"""Nor are those with a larger share of their class: the rest has to be enough to compare with."""

WEIGHTS = {
    "repeated": 3.0,
    "content": 2.0,
    "held_out": 0.25,
    "confidence": 0.5,
    "concentration": 0.5,
    "stability": 1.0,
    "resampling": 1.0,
}
"""How much each kind of evidence counts beside the logarithm of the separability, where it is asked for.

By default only the first two are: the others made the ranking no better (`scripts/rank_bench.py`)."""

PRIOR, CONTENT_PRIOR = (0.75, 4.0), (2.3, 16.0)
"""Usual standard deviation of natural classes' scores and the degrees of freedom that it counts, without and with
content, whose tail is heavy. Set on 54 clean models: the first 30 alone gave 2.0, with which 5.4 % of the classes of
the next 24 had p < 0.05."""

WORST = -5.0
"""Score of clusters that are not separated at all, whose logarithm would be infinite."""


@dataclass(frozen=True)
class View:
    """One way of comparing the samples of a class.

    Attributes
    ----------
    features : ndarray
        (n, d): what the samples were compared by.
    labelings : mapping of str to ndarray of int
        Clusterings (n,) by name; -1 is noise.
    """

    features: np.ndarray
    labelings: Mapping[str, np.ndarray]


@dataclass
class Candidate:
    """A cluster of a class and what is known about it.

    Attributes
    ----------
    class_index : int
        Of the class.
    cluster : str
        Name of the clustering, a slash, and the label.
    member : ndarray of bool
        (n,) over the class's samples.
    separability : float
        τ against the rest of the class, cross-fitted.
    distinct : int
        Members that are no near-duplicates of each other.
    n : int
        Samples of the class that are no near-duplicates of each other.
    projection : ndarray of float64
        (n,): on which side of the cluster's border each sample is, and how far.
    evidence : dict of str to float
        Further evidence by name, as in `WEIGHTS`.
    of_heatmaps : bool
        Whether it was found by clustering heatmaps, so that the tails of a cloud of them could explain it.
    """

    class_index: int
    cluster: str
    member: np.ndarray
    separability: float
    distinct: int
    n: int
    projection: np.ndarray | None = None
    evidence: dict[str, float] = field(default_factory=dict)
    of_heatmaps: bool = True

    @property
    def size(self) -> int:
        """Number of members."""
        return int(self.member.sum())

    def score(self, kinds: Iterable[str] = ()) -> float:
        """Return log τ and the evidence of these kinds by its weight; none speaks against a cluster."""
        base = max(WORST, float(np.log(self.separability))) if self.separability > 0 else WORST
        return base + sum(WEIGHTS[kind] * max(0.0, self.evidence.get(kind, 0.0)) for kind in kinds)


@dataclass(frozen=True)
class Verdict:
    """How surprising a class or cluster is."""

    score: float
    p_value: float
    q_value: float


def find_candidates(
    class_index: int,
    view: View,
    seed: int = 0,
    first: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    score: Callable[[np.ndarray], float] | None = None,
) -> list[Candidate]:
    """Return the clusters of a view of a suitable size, each with its separability.

    Parameters
    ----------
    class_index : int
        The class.
    view : View
        Features and clusterings of its samples.
    seed : int
        Of folds and principal components.
    first : ndarray of bool, optional
        (n,): the samples that count; of near-duplicates only one should. All if not given.
    held_out : ndarray, optional
        (n, d'): features that had no part in the clusterings, such as the relevance of an inner layer; the
        separability there is evidence of its own.
    score : callable, optional
        Returns the separability of a cluster given as a mask (n,). By default it is cross-fitted on the principal
        components of the features.
    """
    n = len(view.features)
    first = np.ones(n, dtype=bool) if first is None else first
    total = int(first.sum())
    found: dict[bytes, Candidate] = {}
    for name, labels in view.labelings.items():
        for label in np.unique(labels[labels >= 0]):
            member = labels == label
            distinct = int((member & first).sum())
            if SMALLEST <= distinct <= LARGEST * total and member.tobytes() not in found:
                found[member.tobytes()] = Candidate(class_index, f"{name}/{label}", member, 0.0, distinct, total)
    if not found:
        return []
    X = principal_components(view.features[first], seed=seed) if score is None else None
    other = None if held_out is None else principal_components(held_out[first], seed=seed)
    for x in found.values():
        if X is None:
            assert score is not None
            x.separability = score(x.member)
        else:
            x.separability, x.projection = _separability(X, x.member, first, seed)
        if other is not None:
            x.evidence["held_out"] = float(np.log1p(_separability(other, x.member, first, seed)[0]))
        x.evidence["stability"] = stability(x, view.labelings)
    return list(found.values())


def content_candidate(
    class_index: int,
    cluster: str,
    features: np.ndarray,
    repeated: Repeated,
    first: np.ndarray,
    seed: int = 0,
) -> Candidate | None:
    """Return a group of samples that have a window in common, with its separability among heatmaps.

    Parameters
    ----------
    class_index : int
        The class.
    cluster : str
        Its name.
    features : ndarray
        (n, d): what heatmaps are compared by.
    repeated : Repeated
        The window and its copies.
    first : ndarray of bool
        (n,): the samples that count.
    seed : int
        Of folds and principal components.

    Returns
    -------
    Candidate or None
        None if near-duplicates are most of it.
    """
    distinct = int((repeated.member & first).sum())
    if distinct < FEWEST:
        return None
    X = principal_components(features[first], seed=seed)
    value = _separability(X, repeated.member, first, seed)[0]
    evidence, by_distance = {"repeated": repeated.strength}, -repeated.distance.astype(np.float64)
    return Candidate(
        class_index,
        cluster,
        repeated.member,
        value,
        distinct,
        int(first.sum()),
        by_distance,
        evidence,
        of_heatmaps=False,
    )


def most_separable(candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """Return the candidates of the largest separability, at most so many."""
    return sorted(candidates, key=lambda x: (-x.separability, x.cluster))[:most]


def concentration(relevance: np.ndarray) -> np.ndarray:
    """Return for each heatmap (n, H, W) log Σ p², p being the shares of |R|: large where few pixels have it all."""
    size = np.abs(relevance).reshape(len(relevance), -1).astype(np.float64)
    share = size / np.maximum(size.sum(axis=1, keepdims=True), 1e-30)
    return np.log(np.maximum((share**2).sum(axis=1), 1 / share.shape[1]))


def stability(candidate: Candidate, labelings: Mapping[str, np.ndarray]) -> float:
    """Return how well a cluster is found again in the other clusterings: the mean of its best Jaccard indices.

    The clusterings are those for other numbers of clusters. See `recovery` for parts of the samples.
    """
    own = candidate.cluster.rpartition("/")[0]
    best = []
    for name, labels in labelings.items():
        if name == own or not (labels >= 0).any():
            continue
        inside = np.bincount(labels[candidate.member & (labels >= 0)], minlength=labels.max() + 1)
        union = np.bincount(labels[labels >= 0], minlength=labels.max() + 1) + candidate.size - inside
        best.append(float((inside / union).max()))
    return float(np.mean(best)) if best else 0.0


def distinct_samples(features: np.ndarray, threshold: float = 0.02) -> np.ndarray:
    """Return which samples (n,) count when near-duplicates count as one: the first of each group of them.

    Parameters
    ----------
    features : ndarray
        (n, d): what the samples are compared by.
    threshold : float
        Neighbours whose distance is at most this share of the typical distance between samples are near-duplicates.
    """
    n = len(features)
    if n < 3:
        return np.ones(n, dtype=bool)
    X = np.asarray(features, dtype=np.float64)
    # The median distance of two samples, were they normal, is that of one from the mean times the root of two.
    typical = np.sqrt(2) * float(np.median(np.linalg.norm(X - X.mean(axis=0), axis=1)))
    neighbors, distances = nearest_neighbors(features, min(4, n - 1))
    close = distances <= threshold * typical
    rows = np.repeat(np.arange(n), close.sum(axis=1))
    graph = csr_matrix((np.ones(len(rows)), (rows, neighbors[close])), shape=(n, n))
    first = np.zeros(n, dtype=bool)
    first[np.unique(connected_components(graph, directed=False)[1], return_index=True)[1]] = True
    return first


def judge(
    candidates: Sequence[Candidate],
    classes: Sequence[int],
    kinds: Iterable[str] = (),
    correction: str = "benjamini_hochberg",
    against_structureless: bool = True,
) -> tuple[dict[int, Verdict], list[Verdict]]:
    """Say how surprising each class and each cluster is.

    Two explanations have to be refuted, so that the larger of two p-values counts: a class without structure, whose
    clusters are the tails of a cloud (chosen among all clusters of the class: Simes; not asked of groups that were
    found in the images); and a natural kind of images, such as the best cluster of each other class is. The latter is a
    comparison with a maximum over a whole class and needs no correction for the choice of the cluster.

    Parameters
    ----------
    candidates : sequence of Candidate
        Of all classes.
    classes : sequence of int
        All classes, also those without a candidate.
    kinds : iterable of str
        The evidence that counts.
    correction : str
        For many tests, see `q_values`; over all classes, and over all clusters of all classes.
    against_structureless : bool
        Whether the first explanation is tested: it can't be where separability was measured on what made the clusters.

    Returns
    -------
    dict of int to Verdict
        Of each class: its score is that of its best cluster.
    list of Verdict
        Of each candidate.
    """
    kinds = tuple(kinds)
    prior = CONTENT_PRIOR if "content" in kinds else PRIOR
    scores = np.array([candidate.score(kinds) for candidate in candidates])
    owner = np.array([candidate.class_index for candidate in candidates], dtype=int)
    best = {c: float(scores[owner == c].max()) for c in classes if (owner == c).any()}
    p_values = np.ones(len(candidates))
    for c in best:
        own = np.flatnonzero(owner == c)
        structure = np.zeros(len(own))
        clustered = [k for k, i in enumerate(own) if candidates[int(i)].of_heatmaps]
        if against_structureless and clustered:
            tested = (candidates[int(own[k])] for k in clustered)
            structure[clustered] = simes([structureless_p_value(x.separability, x.n, x.distinct) for x in tested])
        others = [score for other, score in best.items() if other != c]
        for i, p_structure in zip(own, structure, strict=True):
            p_values[i] = max(p_structure, outlier_p_value(float(scores[i]), others, *prior))
    of_class = {c: float(p_values[owner == c].min()) if c in best else 1.0 for c in classes}
    class_q = dict(zip(of_class, q_values(list(of_class.values()), correction), strict=True))
    cluster_q = q_values(p_values, correction)
    return (
        {c: Verdict(best.get(c, WORST), of_class[c], float(class_q[c])) for c in classes},
        [Verdict(float(s), float(p), float(q)) for s, p, q in zip(scores, p_values, cluster_q, strict=True)],
    )


def _separability(X: np.ndarray, member: np.ndarray, first: np.ndarray, seed: int) -> tuple[float, np.ndarray | None]:
    """Return a cluster's separability among the samples that count, and the projection (n,) of those; else NaN."""
    projections = cross_fitted_projections(X, member[first], seed)
    if projections is None:
        return 0.0, None
    everywhere = np.full(len(member), np.nan)
    everywhere[first] = projections
    return separability(projections[:, None], member[first].astype(int)), everywhere
