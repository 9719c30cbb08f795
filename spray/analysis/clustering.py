"""Clusterings of an embedding: one registry, every member gives an integer label to each sample.

Each method costs no more than it must as the number of samples grows: where its cost or memory grows with the square,
a sample of the rows is clustered and the others follow their nearest row of it (`FULL`), which is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from spray.analysis.options import at_least
from spray.registry import Registry

log = logging.getLogger(__name__)

CLUSTERINGS: Registry[Callable[..., np.ndarray]] = Registry("clustering")

FULL = {"agglomerative": 50_000, "dbscan": 10_000, "hdbscan": 50_000}
"""Most rows that are clustered as they are.

DBSCAN holds all pairs within `eps`, up to 0.8 GB for 10,000 rows. HDBSCAN needs the time for all pairs but not the
memory: 10 s on one core for 50,000, as agglomerative clustering along a neighbour graph does.
"""

DENSE_WARD = 5_000
"""Rows above which Ward's linkage only joins neighbours: all pairs would take n² · 8 bytes."""

MINI_BATCH = 100_000
"""Rows above which k-means learns from batches: all ten starts on a million took 4 s and took 2 s in batches."""


def cluster(embedding: np.ndarray, method: str = "kmeans", **options: Any) -> np.ndarray:
    """Cluster the rows of an embedding.

    Parameters
    ----------
    embedding : ndarray
        (n, m), finite.
    method : str
        A name in `CLUSTERINGS`: "kmeans", "agglomerative", "dbscan" or "hdbscan".
    **options
        Of the method: `n_clusters`, `seed` and `starts` of k-means, `n_clusters` and `n_neighbors` of agglomerative,
        `eps` and `min_samples` of DBSCAN, `min_cluster_size` and `min_samples` of HDBSCAN.

    Returns
    -------
    ndarray of int64
        (n,): labels 0, 1, …, -1 for noise.

    Raises
    ------
    UserError
        If there is no such method, or an option is out of range.
    ValueError
        If the embedding is not finite.
    """
    embedding = np.asarray(embedding, dtype=np.float64)
    if not np.isfinite(embedding).all():
        raise ValueError("the embedding holds NaN or infinity")
    part = CLUSTERINGS.get(method)
    full = FULL.get(method, len(embedding))
    if len(embedding) <= full:
        return part(embedding, **options).astype(np.int64)
    log.warning(
        "%s clusters %d of %d rows, drawn at random; the others follow the nearest of them",
        method,
        full,
        len(embedding),
    )
    chosen = np.sort(np.random.default_rng(0).permutation(len(embedding))[:full])
    labels = part(embedding[chosen], **options).astype(np.int64)
    return labels[nearest_of(embedding[chosen], embedding)]


def nearest_of(known: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the index of the row of `known` (k, m) that is nearest to each of `rows` (n, m), int64 (n,)."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=1).fit(known)
    parts = np.array_split(rows, max(1, len(rows) // 65_536))
    return np.concatenate([search.kneighbors(part, return_distance=False)[:, 0] for part in parts])


def spectral_rows(embedding: np.ndarray, n_columns: int) -> np.ndarray:
    """Return the first columns of a spectral embedding with rows of unit length (Ng, Jordan and Weiss, 2001)."""
    rows = embedding[:, :n_columns]
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


@CLUSTERINGS.register("kmeans")
def kmeans(embedding: np.ndarray, n_clusters: int = 8, seed: int = 0, starts: int = 10) -> np.ndarray:
    """k-means, the best of so many starts; learned from batches of 4,096 where there are very many rows."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    at_least("n_clusters", n_clusters, 1)
    at_least("starts", starts, 1)
    k = _distinct(embedding, n_clusters)
    if len(embedding) <= MINI_BATCH:
        return KMeans(k, n_init=starts, random_state=seed).fit_predict(embedding)
    return MiniBatchKMeans(k, n_init=starts, batch_size=4096, random_state=seed).fit_predict(embedding)


@CLUSTERINGS.register("agglomerative")
def agglomerative(embedding: np.ndarray, n_clusters: int = 8, n_neighbors: int = 10) -> np.ndarray:
    """Agglomerative clustering with Ward's linkage; of many rows, only neighbours are joined."""
    from sklearn.cluster import AgglomerativeClustering

    at_least("n_clusters", n_clusters, 1)
    at_least("n_neighbors", n_neighbors, 1)
    if len(embedding) < 2:
        return np.zeros(len(embedding))
    graph = connected_graph(embedding, n_neighbors) if len(embedding) > DENSE_WARD else None
    return AgglomerativeClustering(min(n_clusters, len(embedding)), connectivity=graph).fit_predict(embedding)


@CLUSTERINGS.register("dbscan")
def dbscan(embedding: np.ndarray, eps: float | None = None, min_samples: int = 5) -> np.ndarray:
    """DBSCAN; samples in no dense region are noise.

    Without `eps` it is the distance within which nine of ten samples have `min_samples` (with themselves): no fixed one
    suits both two columns of an embedding and ten.
    """
    from sklearn.cluster import DBSCAN
    from sklearn.neighbors import NearestNeighbors

    at_least("min_samples", min_samples, 1)
    if eps is None:
        search = NearestNeighbors(n_neighbors=min(min_samples, len(embedding))).fit(embedding)
        eps = max(float(np.quantile(search.kneighbors(embedding)[0][:, -1], 0.9)), 1e-9)
    at_least("eps", eps, 0, strictly=True)
    return DBSCAN(eps=eps, min_samples=min_samples).fit_predict(embedding)


@CLUSTERINGS.register("hdbscan")
def hdbscan(embedding: np.ndarray, min_cluster_size: int = 15, min_samples: int | None = None) -> np.ndarray:
    """HDBSCAN; samples in no dense region are noise."""
    from sklearn.cluster import HDBSCAN

    at_least("min_cluster_size", min_cluster_size, 2)
    at_least("min_samples", 1 if min_samples is None else min_samples, 1)
    if len(embedding) < 2:
        return np.full(len(embedding), -1)
    size = max(2, min(min_cluster_size, len(embedding)))
    density = None if min_samples is None else min(min_samples, len(embedding))
    return HDBSCAN(min_cluster_size=size, min_samples=density, copy=True).fit_predict(embedding)


def connected_graph(X: np.ndarray, n_neighbors: int) -> csr_matrix:
    """Return a graph of the rows' nearest neighbours, with more edges where it would fall into parts.

    Left to itself scikit-learn compares all pairs of two parts to join them, which large ones have no memory for. Here
    the parts are joined where their most central rows are neighbours.
    """
    from sklearn.neighbors import kneighbors_graph

    graph = kneighbors_graph(X, min(n_neighbors, len(X) - 1))
    while True:
        n_parts, part = connected_components(graph, directed=False)
        if n_parts == 1:
            return csr_matrix(graph + graph.T)
        centers = np.stack([np.bincount(part, column) for column in X.T], axis=1) / np.bincount(part)[:, None]
        distance = ((X - centers[part]) ** 2).sum(axis=1)
        order = np.lexsort((distance, part))
        central = order[np.unique(part[order], return_index=True)[1]]
        bridges = kneighbors_graph(X[central], min(3, n_parts - 1)).tocoo()
        ends = central[bridges.row], central[bridges.col]
        graph = graph + csr_matrix((bridges.data, ends), shape=graph.shape)


def _distinct(rows: np.ndarray, most: int) -> int:
    """Return how many different rows there are, counted up to `most`."""
    left, count = np.arange(len(rows)), 0
    while len(left) and count < most:
        left = left[(rows[left] != rows[left[0]]).any(axis=1)]
        count += 1
    return count
