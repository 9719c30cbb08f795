"""Whether two sets of images can be told apart: the classifier two-sample test (Lopez-Paz and Oquab, 2017)."""

from __future__ import annotations

import numpy as np

from spray.isolation.growing import FOLDS

DIRECTIONS = 30
"""Most principal components that a classifier sees; their squares as well, for what differs in spread alone."""
PER_DIRECTION = 5
"""Least samples for each of them."""
FEWEST = 8
"""Fewest samples of a set."""
FINEST = 1e-3
"""Smallest difference that counts, as a share of a feature's size: what is always the same is known to rounding."""
PENALTY = 0.05
"""Ridge of the classifier, on standardised features."""


def told_apart(first: np.ndarray, second: np.ndarray, seed: int) -> float:
    """Return how well a classifier tells two sets of samples apart that it was not fitted on.

    Parameters
    ----------
    first, second : ndarray
        (n, d) and (m, d): features of the two sets.
    seed : int
        Of the folds.

    Returns
    -------
    float
        Area under the receiver's operating characteristic: 1 if they share nothing, 0.5 if they are alike. 0.5 as well
        for fewer than `FEWEST` samples in either, which say nothing.
    """
    fewest = min(len(first), len(second))
    if fewest < FEWEST:
        return 0.5
    folds = min(FOLDS, fewest // 2)
    rows = np.concatenate([first, second])
    labels = np.arange(len(rows)) < len(first)
    rng = np.random.default_rng([seed, 31])
    fold = np.empty(len(rows), dtype=int)
    for part in (labels, ~labels):
        fold[part] = rng.permutation(int(part.sum())) % folds
    scores = np.empty(len(rows))
    for k in range(folds):
        used = fold != k
        scores[~used] = _classified(rows[used], labels[used], rows[~used])
    # Folds are compared within themselves: each has a classifier, and a scale, of its own.
    parts = [(scores[(fold == k) & labels], scores[(fold == k) & ~labels]) for k in range(folds)]
    return float(np.mean([area(inside, outside) for inside, outside in parts]))


def area(inside: np.ndarray, outside: np.ndarray) -> float:
    """Return how often a value inside is larger than one outside: the area under the ROC curve; half counts a tie."""
    larger, equal = inside[:, None] > outside, inside[:, None] == outside
    return float(larger.mean() + 0.5 * equal.mean())


def _classified(rows: np.ndarray, labels: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return the scores of new rows by a ridge regression on principal components and their squares."""
    center, size = rows.mean(axis=0), np.sqrt((rows**2).mean(axis=0))
    spread = rows.std(axis=0) + FINEST * size + 1e-6
    z = (rows - center) / spread
    k = max(1, min(DIRECTIONS, len(rows) // PER_DIRECTION))
    axes = _principal(z, k)
    inside, outside = z @ axes, ((new - center) / spread).clip(-10, 10) @ axes
    unit = inside.std(axis=0) + 1e-9

    def seen(u: np.ndarray) -> np.ndarray:
        u = (u / unit).clip(-4, 4)
        return np.concatenate([u, u**2 - 1], axis=1)

    x = seen(inside)
    weight = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    y = np.where(labels, 1.0, -1.0)
    mean, level = weight @ x, weight @ y
    a = (x - mean) * np.sqrt(weight)[:, None]
    w = np.linalg.solve(a.T @ a + PENALTY * np.eye(x.shape[1]), a.T @ ((y - level) * np.sqrt(weight)))
    return np.asarray((seen(outside) - mean) @ w)


def _principal(z: np.ndarray, k: int) -> np.ndarray:
    """Return the first k principal axes (d, k) of centred rows (n, d), from the smaller of both products of them."""
    n, d = z.shape
    if d <= n:
        return np.asarray(np.linalg.eigh(z.T @ z)[1][:, -k:])
    values, vectors = np.linalg.eigh(z @ z.T)
    return np.asarray(z.T @ vectors[:, -k:] / np.sqrt(values[-k:].clip(1e-12)))
