"""Which clusters separate so well that they ask for an explanation: scores that hold out of sample, and p-values.

The Fisher discriminant of a clustering, measured on the embedding that made it, is circular and grows without bound
for tiny clusters. Here a cluster's separability is measured against the rest of its class in the space of the
heatmaps' principal components, along a direction that other samples decided (cross-fitting), with the clusters'
sizes as weights, so that a handful of samples cannot win.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.stats import norm, t

from spray.analysis.fisher import separability

FOLDS = 5
DRAWS = 999
"""Draws of the null distribution."""

PRIOR_SPREAD, PRIOR_WEIGHT = 0.5, 4.0
"""Standard deviation of natural classes' scores where nothing else is known, and the degrees of freedom it counts."""


def principal_components(X: np.ndarray, n_components: int = 30, seed: int = 0) -> np.ndarray:
    """Return the samples' first principal components, float64 (n, at most `n_components`)."""
    from sklearn.decomposition import PCA

    m = min(n_components, *X.shape)
    solver = "randomized" if m < 0.2 * min(X.shape) else "full"
    return PCA(m, svd_solver=solver, random_state=seed).fit_transform(np.asarray(X, dtype=np.float64))


def cross_fitted_projections(X: np.ndarray, member: np.ndarray, seed: int = 0) -> np.ndarray | None:
    """Project each sample on Fisher's direction for a cluster against the rest, found without that sample.

    In each of five folds the direction w = S_w^-1 (μ_1 - μ_0) is estimated on the other folds, S_w with Ledoit and
    Wolf's (2004) shrinkage; the fold's samples are projected on it, in units of the standard deviation within and with
    the middle between the means as origin.

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
    ndarray of float64 or None
        (n,): positive on the cluster's side; None for clusters that are too small to be left out in parts, or
        without any spread within.
    """
    folds = _folds(member, seed)
    projections = np.full(len(X), np.nan)
    for fold in range(FOLDS):
        inside, outside = X[(folds != fold) & member], X[(folds != fold) & ~member]
        if len(inside) < 2 or len(outside) < 2:
            return None
        centers = inside.mean(axis=0), outside.mean(axis=0)
        within = shrunk_covariance(np.concatenate([inside - centers[0], outside - centers[1]]))
        if not within.any():
            return None
        w = _solve(within, centers[0] - centers[1])
        deviation = np.sqrt(w @ within @ w)
        if deviation == 0:
            return None
        held = folds == fold
        projections[held] = (X[held] - (centers[0] + centers[1]) / 2) @ w / deviation
    return projections


def cross_fitted_separability(X: np.ndarray, member: np.ndarray, seed: int = 0) -> float:
    """Return Fisher's criterion of one cluster against the rest, on samples that did not choose the direction.

    It is that of all `cross_fitted_projections` together.

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
    projections = cross_fitted_projections(X, member, seed)
    return 0.0 if projections is None else separability(projections[:, None], member.astype(int))


def shrunk_covariance(residuals: np.ndarray) -> np.ndarray:
    """Return the covariance (d, d) of centred rows (n, d), shrunk towards a multiple of the identity.

    Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004.
    """
    n, d = residuals.shape
    sample = residuals.T @ residuals / n
    mean = np.trace(sample) / d
    squared = float((sample**2).sum())
    distance = squared / d - mean**2
    if distance <= 0:
        return sample
    fourth = float(((residuals**2).sum(axis=1) ** 2).sum()) / n
    error = min((fourth - squared) / (n * d), distance)
    share = error / distance
    return (1 - share) * sample + share * mean * np.eye(d)


def _solve(within: np.ndarray, difference: np.ndarray) -> np.ndarray:
    try:
        w: np.ndarray = np.linalg.solve(within, difference)
        if np.isfinite(w).all():
            return w
    except np.linalg.LinAlgError:
        pass
    return np.linalg.lstsq(within, difference, rcond=None)[0]


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
    """Return how likely a class without structure separates a cluster of that size as well.

    The logarithm of the null is taken for normal, so that p-values reach far below one over the number of draws,
    which a choice among hundreds of clusters asks for. It is drawn for at most 300 samples in the same proportion:
    more would only narrow it.
    """
    if score <= 0:
        return 1.0
    center, spread = _log_null(n, size, seed)
    return float(norm.sf((np.log(score) - center) / spread))


@lru_cache(maxsize=4096)
def _log_null(n: int, size: int, seed: int) -> tuple[float, float]:
    scale = min(1.0, 300 / n)
    logs = np.log(structureless_null(max(4, round(n * scale)), max(2, round(size * scale)), seed))
    return float(logs.mean()), float(logs.std(ddof=1))


def outlier_p_value(
    score: float, others: Sequence[float], prior: float = PRIOR_SPREAD, weight: float = PRIOR_WEIGHT
) -> float:
    """Return how extraordinary a class's score is beside the scores of the other classes.

    Natural kinds of images make clusters too: what an artifact makes has to stand out from them. Scores are taken for
    normal and the p-value is that of Student's prediction interval for one more draw. Since few classes tell little
    about their spread, it is moderated as in Smyth (2004): `prior` counts like `weight` further degrees of freedom.

    Parameters
    ----------
    score : float
        Of the cluster or class, on a scale where natural ones are about normal, such as a logarithm.
    others : sequence of float
        Best score of each other class. With fewer than three there is nothing to compare with, and the answer is 0.
    prior, weight : float
        Usual standard deviation of natural classes' scores, and how many degrees of freedom it is worth.

    Returns
    -------
    float
    """
    values = np.asarray([other for other in others if np.isfinite(other)], dtype=np.float64)
    m = len(values)
    if m < 3:
        return 0.0
    freedom = m - 1 + weight
    variance = ((m - 1) * values.var(ddof=1) + weight * prior**2) / freedom
    return float(t.sf((score - values.mean()) / np.sqrt(variance * (1 + 1 / m)), df=freedom))


def _folds(member: np.ndarray, seed: int) -> np.ndarray:
    """Return the fold of each sample, the cluster and the rest dealt out evenly."""
    rng = np.random.default_rng(seed)
    folds = np.empty(len(member), dtype=np.int64)
    for side in (member, ~member):
        where = rng.permutation(np.flatnonzero(side))
        folds[where] = np.arange(len(where)) % FOLDS
    return folds
