"""Whether clusters are found again when some of the samples are left out.

Hennig, "Cluster-wise assessment of cluster stability", 2007, section 3, with subsets instead of bootstrap samples: of
a sample drawn twice both copies lie in the same place, which by itself looks like a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from spray.analysis.clustering import cluster, spectral_rows
from spray.analysis.spectral import spectral_embedding

if TYPE_CHECKING:
    from spray.analysis.scoring import Candidate

DRAWS, SHARE = 10, 0.8
"""Subsets of a class that are drawn, and the share of its samples in each."""

STARTS = 2
"""Starts of k-means in each subset."""

MOST = 30_000
"""Samples of all subsets together: of classes with more than 3,750 fewer subsets are drawn."""

FEWEST_DRAWS = 3
"""Fewer subsets than this tell nothing, so that of classes with more than 12,500 samples none are drawn."""

Clusterer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From the eigenvalues (m,) and eigenvectors (n, m) of a spectral embedding to labels (n,), -1 for noise."""


def subsets(n: int, draws: int = DRAWS, share: float = SHARE, seed: int = 0) -> list[np.ndarray]:
    """Return the samples of each subset of n, ascending: at most `draws`, none of very many samples.

    Parameters
    ----------
    n : int
        Number of samples.
    draws : int
        Most subsets.
    share : float
        Of the samples in each.
    seed : int
        The same seed gives the same subsets.
    """
    size = round(share * n)
    draws = min(draws, MOST // max(1, size))
    rng = np.random.default_rng([seed, n])
    return [np.sort(rng.permutation(n)[:size]) for _ in range(draws if draws >= FEWEST_DRAWS else 0)]


def resampled_labelings(
    features: np.ndarray,
    clusterers: Mapping[str, Clusterer],
    drawn: Sequence[np.ndarray],
    n_neighbors: int = 10,
    n_components: int = 8,
    seed: int = 0,
    metric: str = "euclidean",
) -> Iterator[dict[str, np.ndarray]]:
    """Embed and cluster each subset of a class anew, from its neighbours on.

    Parameters
    ----------
    features : ndarray
        (n, d): what samples are compared by. Samples whose features are all zero are noise.
    clusterers : mapping of str to callable
        By name, what makes a clustering of a spectral embedding.
    drawn : sequence of ndarray of int
        Subsets, see `subsets`.
    n_neighbors, n_components, seed, metric
        Of the embedding, see `spectral_embedding`.

    Yields
    ------
    dict of str to ndarray of int64
        Of each subset its clusterings by name: labels (n,), -1 for samples that were not drawn and for noise.
    """
    used = np.asarray(features.any(axis=1))
    for subset in drawn:
        rows = subset[used[subset]]
        found = {name: np.full(len(features), -1, dtype=np.int64) for name in clusterers}
        if len(rows) >= 2:
            values, vectors = spectral_embedding(features[rows], n_neighbors, n_components, seed, metric)
            for name, clusterer in clusterers.items():
                found[name][rows] = clusterer(values, vectors)
        yield found


def recovery(member: np.ndarray, drawn: Sequence[np.ndarray], labelings: Sequence[np.ndarray]) -> float:
    """Return how well a cluster is found again: the mean over subsets of its best Jaccard index with their clusters.

    Of the cluster only the samples that were drawn count; a subset without any of them is left out of the mean.

    Parameters
    ----------
    member : ndarray of bool
        (n,): the cluster.
    drawn : sequence of ndarray of int
        The subsets.
    labelings : sequence of ndarray of int
        The clustering (n,) of each, -1 elsewhere.

    Returns
    -------
    float
        In [0, 1]: 1 for a cluster that is found again in every subset; 0 if there are no subsets.
    """
    best = []
    for subset, labels in zip(drawn, labelings, strict=True):
        own, label = member[subset], labels[subset]
        if not own.any():
            continue
        there = label >= 0
        sizes = np.bincount(label[there], minlength=1)
        inside = np.bincount(label[there & own], minlength=len(sizes))
        best.append(float((inside / np.maximum(sizes + own.sum() - inside, 1)).max()))
    return float(np.mean(best)) if best else 0.0


def kmeans_clusterer(n_clusters: int, seed: int = 0) -> Clusterer:
    """Return what makes a k-means clustering of a spectral embedding, with few starts: it is done many times."""
    return lambda _, vectors: cluster(
        spectral_rows(vectors, n_clusters), "kmeans", n_clusters=n_clusters, seed=seed, starts=STARTS
    )


def add_recovery(
    chosen: Sequence[Candidate],
    features: np.ndarray,
    clusterers: Mapping[str, Clusterer],
    draws: int = DRAWS,
    n_neighbors: int = 10,
    n_components: int = 8,
    seed: int = 0,
    metric: str = "euclidean",
) -> None:
    """Add to clusters of a view how well they are found again in subsets of the class, as the evidence `resampling`.

    Parameters
    ----------
    chosen : sequence of Candidate
        Clusters of one view of one class.
    features : ndarray
        (n, d): what samples are compared by in that view.
    clusterers : mapping of str to callable
        What makes the clusterings that they are of, by name; clusters of others get no evidence.
    draws, n_neighbors, n_components, seed, metric
        See `subsets` and `resampled_labelings`.
    """
    names = {x.cluster.rpartition("/")[0] for x in chosen}
    wanted = {name: clusterer for name, clusterer in clusterers.items() if name in names}
    drawn = subsets(len(features), draws, seed=seed) if wanted else []
    if not drawn:
        return
    found = list(resampled_labelings(features, wanted, drawn, n_neighbors, n_components, seed, metric))
    for x in chosen:
        name = x.cluster.rpartition("/")[0]
        if name in wanted:
            x.evidence["resampling"] = recovery(x.member, drawn, [labelings[name] for labelings in found])
