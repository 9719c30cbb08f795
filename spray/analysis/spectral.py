"""Spectral embedding of a symmetric k-nearest-neighbour graph.

von Luxburg, "A tutorial on spectral clustering", 2007; for heatmaps Lapuschkin et al. 2019.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from spray.analysis.eigen import smallest_pairs
from spray.analysis.neighbors import neighbor_graph
from spray.errors import UserError


def spectral_embedding(
    X: np.ndarray,
    n_neighbors: int = 10,
    n_components: int = 32,
    seed: int = 0,
    metric: str = "euclidean",
    method: str = "auto",
    device: torch.device | str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Embed samples by the smallest eigenpairs of the normalised Laplacian L = D^-1/2 (D - A) D^-1/2.

    Parameters
    ----------
    X : ndarray
        (n, d), finite.
    n_neighbors : int
        Neighbours of each sample in the graph.
    n_components : int
        Number of eigenpairs; at most n are there.
    seed : int
        Start of what is iterative or approximate. The same seed gives the same bits, whatever the number of threads.
    metric : str
        "euclidean" or "cosine".
    method : str
        How neighbours are searched: "auto", "exact", "cells" or "pynndescent", see `nearest_neighbors`.
    device : torch.device or str, optional
        Where neighbours are searched.

    Returns
    -------
    eigenvalues : ndarray of float64
        (m,), ascending, in [0, 2]; as many zeros as the graph has components, up to m.
    embedding : ndarray of float64
        (n, m), the eigenvectors in columns, of unit length, the largest entry of each positive. Each is zero outside
        of one component of the graph. Of several zeros, those of larger components come first; where there are more
        than m components, samples of the others lie at the origin.

    Raises
    ------
    UserError
        If an option is none of those, or less than 1.
    ValueError
        If `X` holds NaN or infinity, or fewer than two samples.
    """
    if n_components < 1:
        raise UserError(f"n_components={n_components}: an embedding has at least 1 dimension")
    return graph_embedding(neighbor_graph(X, n_neighbors, metric, method, seed, device), n_components, seed)


def graph_embedding(affinity: csr_matrix, n_components: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embed the nodes of a graph by the smallest eigenpairs of its normalised Laplacian.

    Connected components are solved one by one: an iterative solver would miss copies of the eigenvalue zero.

    Parameters
    ----------
    affinity : csr_matrix
        (n, n), symmetric, no weight negative.
    n_components, seed : int
        See `spectral_embedding`, and there for what is returned.
    """
    n = affinity.shape[0]
    m = min(n_components, n)
    n_parts, part = connected_components(affinity, directed=False)
    sizes = np.bincount(part)
    largest = np.argsort(-sizes, kind="stable")[:m]
    # Each component has one zero, so that none needs more pairs than the other zeros leave.
    wanted = m - (min(n_parts, m) - 1)
    members = np.split(np.argsort(part, kind="stable"), np.cumsum(sizes)[:-1])
    values, columns = [], []
    for p in largest:
        rows = members[p]
        of_part = affinity if n_parts == 1 else affinity[rows][:, rows]
        eigenvalues, eigenvectors = smallest_pairs(of_part, min(wanted, len(rows)), seed)
        values.append(eigenvalues)
        columns += [(rows, eigenvector) for eigenvector in eigenvectors.T]
    eigenvalues = np.concatenate(values)
    order = np.argsort(eigenvalues, kind="stable")[:m]
    eigenvalues, embedding = eigenvalues[order], np.zeros((n, m))
    for column, chosen in enumerate(order):
        rows, eigenvector = columns[chosen]
        embedding[rows, column] = eigenvector * _sign(eigenvector)
    return eigenvalues, embedding


def _sign(vector: np.ndarray) -> float:
    """Return the sign that makes the largest entry positive; of nearly equal ones the first."""
    size = np.abs(vector)
    return float(np.sign(vector[np.argmax(size > size.max() * (1 - 1e-6))]))


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
