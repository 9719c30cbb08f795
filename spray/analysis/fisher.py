"""Fisher discriminant analysis: how well a clustering separates the samples.

Fisher's criterion I(w) = wᵀ S_b w / wᵀ S_w w, maximised over w, is the separability τ of a clustering; as proposed
for ranking classes and clusters in part 4 of Samek and Montavon's tutorial "Explainable AI for Deep Networks"
(ECML/PKDD 2020).
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh

RIDGE = 1e-9
"""Added to S_w, relative to its mean variance, only so that directions without any variance do not divide 0/0."""


def scatter(X: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scatter between, S_b = Σ_c n_c (μ_c - μ)(μ_c - μ)ᵀ, and within the clusters, S_w.

    Parameters
    ----------
    X : ndarray
        (n, d).
    labels : ndarray of int
        (n,): cluster of each sample.

    Returns
    -------
    between, within : ndarray of float64
        (d, d) each.
    """
    X = np.asarray(X, dtype=np.float64)
    mean = X.mean(axis=0)
    between = np.zeros((X.shape[1], X.shape[1]))
    within = np.zeros_like(between)
    for label in np.unique(labels):
        members = X[labels == label]
        center = members.mean(axis=0)
        between += len(members) * np.outer(center - mean, center - mean)
        within += (members - center).T @ (members - center)
    return between, within


def separability(embedding: np.ndarray, labels: np.ndarray) -> float:
    """Return τ = max_w wᵀ S_b w / wᵀ S_w w, the largest eigenvalue of S_b w = τ S_w w.

    Parameters
    ----------
    embedding : ndarray
        (n, m), finite.
    labels : ndarray of int
        (n,): clusters; samples labelled -1 (noise) are left out.

    Returns
    -------
    float
        At least 0; 0 if there are fewer than two clusters.

    Raises
    ------
    ValueError
        If the shapes do not fit or the embedding is not finite.
    """
    X, labels = np.asarray(embedding, dtype=np.float64), np.asarray(labels)
    if X.ndim != 2 or labels.shape != X.shape[:1]:
        raise ValueError(f"need an embedding (n, m) and n labels, not {X.shape} and {labels.shape}")
    if not np.isfinite(X).all():
        raise ValueError("the embedding holds NaN or infinity")
    X, labels = X[labels != -1], labels[labels != -1]
    if len(np.unique(labels)) < 2:
        return 0.0
    between, within = scatter(X, labels)
    scale = np.trace(within) / len(within)
    if scale <= 0:
        return float("inf") if np.trace(between) > 0 else 0.0
    within = within + RIDGE * scale * np.eye(len(within))
    last = len(within) - 1
    return max(0.0, float(eigh(between, within, eigvals_only=True, subset_by_index=(last, last))[0]))
