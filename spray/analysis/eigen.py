"""The smallest eigenpairs of a graph's normalised Laplacian, by whichever solver its size makes cheapest.

On one core, for 32 pairs of a graph with ten neighbours a node: a dense solver takes 10 ms for 400 nodes; Lanczos
(ARPACK) 6.0 s in double and 2.5 s in single precision for 100,000; LOBPCG 10.1 s, so it's not used.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh, qr
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import reverse_cuthill_mckee
from scipy.sparse.linalg import LinearOperator, eigsh

from spray.analysis.threads import one_blas_thread

DENSE = 400
"""Components with at most so many nodes are solved densely: as fast, and exact."""
DOUBLE = 20_000
"""Components with more nodes are solved in single precision; a last step in double makes eigenvalues exact again."""
TOLERANCE = {np.float64: 1e-9, np.float32: 1e-5}


def smallest_pairs(affinity: csr_matrix, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `m` smallest eigenpairs of L = I - D^-1/2 A D^-1/2 of a connected graph A.

    The smallest is known: zero, with the roots of the degrees. The solver looks for the others only.

    Parameters
    ----------
    affinity : csr_matrix
        (n, n), symmetric, connected, with positive weights.
    m : int
        At most n.
    seed : int
        Start of an iterative solver.

    Returns
    -------
    eigenvalues : ndarray of float64
        (m,), ascending, in [0, 2]; the first is exactly 0.
    eigenvectors : ndarray of float64
        (n, m), orthonormal columns.
    """
    n = affinity.shape[0]
    degree = np.asarray(affinity.sum(axis=1), dtype=np.float64).ravel()
    # A single node has no degree.
    constant = np.sqrt(degree / degree.sum()) if n > 1 else np.ones(1)
    if m == 1:
        return np.zeros(1), constant[:, None]
    # One thread: the bits don't depend on how many there are.
    with one_blas_thread():
        if n <= DENSE or m >= n - 1:
            values, vectors = _dense(affinity, degree, constant, m - 1)
        else:
            values, vectors = _lanczos(affinity, degree, constant, m - 1, seed)
    return np.concatenate([[0], values]), np.column_stack([constant, vectors])


def _dense(affinity: csr_matrix, degree: np.ndarray, constant: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `m` smallest pairs after the constant one."""
    n = len(degree)
    laplacian = np.eye(n) - affinity.toarray() / np.sqrt(np.outer(degree, degree))
    # The known pair goes to the far end.
    values, vectors = eigh(laplacian + 3 * np.outer(constant, constant), subset_by_index=(0, m - 1))
    return np.clip(values, 0, 2), vectors


def _lanczos(
    affinity: csr_matrix, degree: np.ndarray, constant: np.ndarray, m: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `m` smallest pairs after the constant one."""
    n = len(degree)
    dtype = np.float64 if n <= DOUBLE else np.float32
    # Nodes that are joined lie near each other in memory then.
    order = reverse_cuthill_mckee(affinity, symmetric_mode=True)
    root, first = 1 / np.sqrt(degree[order]), constant[order]
    normalised = affinity[order][:, order].astype(np.float64)
    normalised.sort_indices()
    normalised.data *= root[normalised.indices] * np.repeat(root, np.diff(normalised.indptr))
    single, known = normalised.astype(dtype), first.astype(dtype)

    def product(vector: np.ndarray) -> np.ndarray:
        vector = vector.ravel()
        return single @ vector - (2 * (known @ vector)) * known

    operator = LinearOperator((n, n), matvec=product, dtype=dtype)
    start = np.random.default_rng(seed).standard_normal(n).astype(dtype)
    _, found = eigsh(operator, k=m, which="LA", v0=start, tol=TOLERANCE[dtype])
    # Rayleigh and Ritz in double, orthogonal to the known pair: eigenvalues gain twice the digits of the vectors.
    basis = qr(np.column_stack([first, found.astype(np.float64)]), mode="economic", overwrite_a=True)[0][:, 1:]
    values, turn = eigh(basis.T @ (normalised @ basis))
    vectors = np.empty((n, m))
    vectors[order] = basis @ turn[:, ::-1]
    return np.clip(1 - values[::-1], 0, 2), vectors
