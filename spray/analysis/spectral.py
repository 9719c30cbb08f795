"""Spectral embedding of a symmetric k-nearest-neighbour graph.

von Luxburg, "A tutorial on spectral clustering", 2007; for heatmaps Lapuschkin et al. 2019.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh
from scipy.sparse import csr_matrix, diags
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh

DENSE = 400
"""Components with at most so many nodes are solved densely: as fast, and exact."""


def neighbor_graph(X: np.ndarray, n_neighbors: int = 10) -> csr_matrix:
    """Return the symmetric affinity A = (B + Bᵀ)/2 of the exact k-nearest-neighbour graph B.

    Parameters
    ----------
    X : ndarray
        (n, d), finite.
    n_neighbors : int
        Neighbours of each node, without itself; at most n - 1 are taken.

    Returns
    -------
    csr_matrix of float64
        (n, n), with weights 1/2 and 1 and an empty diagonal.

    Raises
    ------
    ValueError
        If `X` holds NaN or infinity, or fewer than two samples.
    """
    from sklearn.neighbors import NearestNeighbors

    X = np.ascontiguousarray(X)
    if X.ndim != 2 or len(X) < 2:
        raise ValueError(f"a neighbour graph needs at least two samples in rows, not shape {X.shape}")
    if not np.isfinite(X).all():
        raise ValueError("X holds NaN or infinity")
    k = min(n_neighbors, len(X) - 1)
    # Without an argument the search leaves each sample itself out, also where duplicates lie at distance zero.
    graph = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(X).kneighbors_graph(mode="connectivity")
    return csr_matrix((graph + graph.T) / 2)


def spectral_embedding(
    X: np.ndarray, n_neighbors: int = 10, n_components: int = 32, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Embed samples by the smallest eigenpairs of the normalised Laplacian L = D^-1/2 (D - A) D^-1/2.

    Connected components are solved one by one: an iterative solver would miss copies of the eigenvalue zero.

    Parameters
    ----------
    X : ndarray
        (n, d), finite.
    n_neighbors : int
        Neighbours of each sample in the graph.
    n_components : int
        Number of eigenpairs; at most n are there.
    seed : int
        Start of the iterative solver.

    Returns
    -------
    eigenvalues : ndarray of float64
        (m,), ascending, in [0, 2]; as many zeros as the graph has components.
    embedding : ndarray of float64
        (n, m), the eigenvectors in columns, of unit length, the largest entry of each positive.
    """
    affinity = neighbor_graph(X, n_neighbors)
    n = affinity.shape[0]
    m = min(n_components, n)
    n_parts, part = connected_components(affinity, directed=False)
    values, columns = [], []
    for p in range(n_parts):
        members = np.flatnonzero(part == p)
        eigenvalues, eigenvectors = _smallest(affinity[members][:, members], min(m, len(members)), seed)
        values.append(eigenvalues)
        columns += [(members, eigenvector) for eigenvector in eigenvectors.T]
    eigenvalues = np.concatenate(values)
    order = np.argsort(eigenvalues, kind="stable")[:m]
    eigenvalues, embedding = eigenvalues[order], np.zeros((n, m))
    for column, chosen in enumerate(order):
        members, eigenvector = columns[chosen]
        embedding[members, column] = eigenvector
    sign = np.sign(embedding[np.abs(embedding).argmax(axis=0), np.arange(m)])
    return eigenvalues, embedding * np.where(sign == 0, 1, sign)


def eigengap(eigenvalues: np.ndarray, smallest: int = 2, largest: int = 10) -> int:
    """Return the number of clusters after which the ascending eigenvalues jump the most.

    Parameters
    ----------
    eigenvalues : ndarray
        (m,), ascending.
    smallest, largest : int
        Range of the answer.
    """
    last = min(largest, len(eigenvalues) - 1)
    if last < smallest:
        return max(1, len(eigenvalues) - 1)
    gaps = np.diff(eigenvalues)[smallest - 1 : last]
    return smallest + int(np.argmax(gaps))


def _smallest(affinity: csr_matrix, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `m` smallest eigenpairs of the normalised Laplacian of one connected component."""
    n = affinity.shape[0]
    if n == 1:
        return np.zeros(1), np.ones((1, 1))
    inverse_root = diags(1 / np.sqrt(np.asarray(affinity.sum(axis=1)).ravel()))
    normalised = inverse_root @ affinity @ inverse_root
    if n <= DENSE or m >= n - 1:
        values, vectors = eigh(normalised.toarray(), subset_by_index=(n - m, n - 1))
    else:
        start = np.random.default_rng(seed).standard_normal(n)
        values, vectors = eigsh(normalised, k=m, which="LA", v0=start, tol=1e-9)
    order = np.argsort(-values, kind="stable")
    return np.clip(1 - values[order], 0, 2), vectors[:, order]
