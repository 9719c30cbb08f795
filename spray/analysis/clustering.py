"""Clusterings of an embedding: one registry, every member gives an integer label to each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from spray.registry import Registry

CLUSTERINGS: Registry[Callable[..., np.ndarray]] = Registry("clustering")


def cluster(embedding: np.ndarray, method: str = "kmeans", **options: Any) -> np.ndarray:
    """Cluster the rows of an embedding.

    Parameters
    ----------
    embedding : ndarray
        (n, m), finite.
    method : str
        A name in `CLUSTERINGS`: "kmeans", "agglomerative", "dbscan" or "hdbscan".
    **options
        Of the method: `n_clusters` and `seed` of k-means, `n_clusters` of agglomerative, `eps` and `min_samples`
        of DBSCAN, `min_cluster_size` of HDBSCAN.

    Returns
    -------
    ndarray of int64
        (n,): labels 0, 1, …, -1 for noise.

    Raises
    ------
    UserError
        If there is no such method.
    ValueError
        If the embedding is not finite.
    """
    embedding = np.asarray(embedding, dtype=np.float64)
    if not np.isfinite(embedding).all():
        raise ValueError("the embedding holds NaN or infinity")
    return CLUSTERINGS.get(method)(embedding, **options).astype(np.int64)


def spectral_rows(embedding: np.ndarray, n_columns: int) -> np.ndarray:
    """Return the first columns of a spectral embedding with rows of unit length (Ng, Jordan and Weiss, 2001)."""
    rows = embedding[:, :n_columns]
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


@CLUSTERINGS.register("kmeans")
def kmeans(embedding: np.ndarray, n_clusters: int = 8, seed: int = 0) -> np.ndarray:
    """k-means, the best of ten starts."""
    from sklearn.cluster import KMeans

    k = min(n_clusters, len(np.unique(embedding, axis=0)))
    return KMeans(k, n_init=10, random_state=seed).fit_predict(embedding)


@CLUSTERINGS.register("agglomerative")
def agglomerative(embedding: np.ndarray, n_clusters: int = 8) -> np.ndarray:
    """Agglomerative clustering with Ward's linkage."""
    from sklearn.cluster import AgglomerativeClustering

    if len(embedding) < 2:
        return np.zeros(len(embedding))
    return AgglomerativeClustering(min(n_clusters, len(embedding))).fit_predict(embedding)


@CLUSTERINGS.register("dbscan")
def dbscan(embedding: np.ndarray, eps: float = 0.5, min_samples: int = 5) -> np.ndarray:
    """DBSCAN; samples in no dense region are noise."""
    from sklearn.cluster import DBSCAN

    return DBSCAN(eps=eps, min_samples=min_samples).fit_predict(embedding)


@CLUSTERINGS.register("hdbscan")
def hdbscan(embedding: np.ndarray, min_cluster_size: int = 15) -> np.ndarray:
    """HDBSCAN; samples in no dense region are noise."""
    from sklearn.cluster import HDBSCAN

    if len(embedding) < 2:
        return np.full(len(embedding), -1)
    size = max(2, min(min_cluster_size, len(embedding)))
    return HDBSCAN(min_cluster_size=size, copy=True).fit_predict(embedding)
