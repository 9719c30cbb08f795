"""Which clusters separate so well that they ask for an explanation: scores that hold out of sample, and p-values.

The Fisher discriminant of a clustering, measured on the embedding that made it, is circular and grows without bound
for tiny clusters. Here a cluster's separability is measured against the rest of its class in the space of the
heatmaps' principal components, along a direction that other samples decided (cross-fitting), with the clusters'
sizes as weights, so that a handful of samples cannot win.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import t

from spray.analysis.fisher import separability

FOLDS = 5
DRAWS = 999
"""Draws of the null distribution."""


def principal_components(X: np.ndarray, n_components: int = 30, seed: int = 0) -> np.ndarray:
    """Return the samples' first principal components, float64 (n, at most `n_components`)."""
    from sklearn.decomposition import PCA

    m = min(n_components, *X.shape)
    solver = "randomized" if m < 0.2 * min(X.shape) else "full"
    return PCA(m, svd_solver=solver, random_state=seed).fit_transform(np.asarray(X, dtype=np.float64))


def cross_fitted_separability(X: np.ndarray, member: np.ndarray, seed: int = 0) -> float:
    """Return Fisher's criterion of one cluster against the rest, on samples that did not choose the direction.

    In each of five folds the direction w = S_w^-1 (μ_1 - μ_0) is estimated on the other folds, S_w with Ledoit and
    Wolf's shrinkage; the fold's samples are projected on it, in units of the standard deviation within and with
    the middle between the means as origin. The criterion is that of all projections together.

    Parameters
    ----------
    X : ndarray
        (n, d).
    member : ndarray of bool
        (n,): who is in the cluster.
    seed : int
        Assigns the folds.

    Returns
    -------
    float
        At least 0; 0 for clusters that are too small to be left out in parts.
    """
    from sklearn.covariance import ledoit_wolf

    folds = _folds(member, seed)
    projections = np.full(len(X), np.nan)
    for fold in range(FOLDS):
        inside, outside = X[(folds != fold) & member], X[(folds != fold) & ~member]
        if len(inside) < 2 or len(outside) < 2:
            return 0.0
        centers = inside.mean(axis=0), outside.mean(axis=0)
        within, _ = ledoit_wolf(np.concatenate([inside - centers[0], outside - centers[1]]), assume_centered=True)
        if not within.any():
            return 0.0
        w = np.linalg.lstsq(within, centers[0] - centers[1], rcond=None)[0]
        deviation = np.sqrt(w @ within @ w)
        if deviation == 0:
            return 0.0
        held = folds == fold
        projections[held] = (X[held] - (centers[0] + centers[1]) / 2) @ w / deviation
    return separability(projections[:, None], member.astype(int))


def structureless_null(n: int, size: int, seed: int = 0) -> np.ndarray:
    """Draw the separability that a class without any structure gives to a cluster of `size` out of `n` samples.

    A projection of a normal distribution is normal, and no part of a normal sample is separated better from the rest
    than the largest values are. So the null is: n standard normal numbers, the largest `size` of them against the
    others. It bounds what a cluster of that size can reach in a normal cloud of any covariance and dimension.

    Parameters
    ----------
    n, size : int
        Samples of the class and of the cluster.
    seed : int
        Of the draws.

    Returns
    -------
    ndarray of float64
        (999,).
    """
    draws = np.sort(np.random.default_rng([seed, n, size]).standard_normal((DRAWS, n)), axis=1)
    rest, top = draws[:, : n - size], draws[:, n - size :]
    center = draws.mean(axis=1)
    between = size * (top.mean(axis=1) - center) ** 2 + (n - size) * (rest.mean(axis=1) - center) ** 2
    within = ((top - top.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    within += ((rest - rest.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    return between / within


def structureless_p_value(score: float, n: int, size: int, seed: int = 0) -> float:
    """Return how often a class without structure separates a cluster of that size as well: (1 + hits) / 1000.

    The null is drawn for at most 300 samples in the same proportion: more would only narrow it.
    """
    scale = min(1.0, 300 / n)
    null = structureless_null(max(4, round(n * scale)), max(2, round(size * scale)), seed)
    return float((1 + (null >= score).sum()) / (1 + DRAWS))


def outlier_p_value(score: float, others: Sequence[float]) -> float:
    """Return how extraordinary a score is beside the best scores of the other classes.

    The logarithms are taken for normal; the p-value is that of Student's prediction interval for one more draw. Natural
    kinds of images make clusters too: what an artifact makes has to stand out from them.

    Parameters
    ----------
    score : float
        Of the cluster or class.
    others : sequence of float
        Best score of each other class. With fewer than three there is nothing to compare with, and the answer is 0.

    Returns
    -------
    float
    """
    logs = np.log(np.maximum([other for other in others if other > 0], 1e-6))
    m = len(logs)
    if m < 3:
        return 0.0
    spread = max(float(logs.std(ddof=1)), 0.1) * np.sqrt(1 + 1 / m)
    return float(t.sf((np.log(max(score, 1e-6)) - logs.mean()) / spread, df=m - 1))


def _folds(member: np.ndarray, seed: int) -> np.ndarray:
    """Return the fold of each sample, the cluster and the rest dealt out evenly."""
    rng = np.random.default_rng(seed)
    folds = np.empty(len(member), dtype=np.int64)
    for side in (member, ~member):
        where = rng.permutation(np.flatnonzero(side))
        folds[where] = np.arange(len(where)) % FOLDS
    return folds
