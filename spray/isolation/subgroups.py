"""Groups of a class's samples that a model's inner activations show, and no other class has anything like.

Heatmaps tell where a model looks. What changes a whole image (noise, light, a frame) makes no cluster of them, but the
model can't rely on it without a trace in its activations: there independent component analysis finds it (as in Chen et
al., "Detecting backdoor attacks on deep neural networks by activation clustering", 2018). What makes a class is in most
of its samples, and natural kinds of images are in other classes, too; so that the components of interest are those of
which some samples of the class, and hardly any of others, have much.
"""

from __future__ import annotations

import warnings

import numpy as np

from spray.isolation.growing import MOST

COMPONENTS = (10, 20, 40)
"""Independent components sought: a few gather all that have an artifact, of which many find the purest."""
SMALLEST = 8
"""Fewest samples of a group."""
EXCLUSIVE = 0.5
"""Least logarithm of how many times as frequent the group is in its class as in others."""
RARE = 0.01
"""Added to both frequencies: less can't be told from nothing."""
SAME = 0.5
"""Jaccard index from which on two groups are the same one."""


def subgroups(features: np.ndarray, others: np.ndarray, seed: int, most: int) -> list[np.ndarray]:
    """Return groups of a class's samples, those that are most its own first.

    Parameters
    ----------
    features : ndarray
        (n, d), of the class's samples.
    others : ndarray
        (m, d), of samples of other classes.
    seed : int
        Of the analysis.
    most : int
        How many groups at most.

    Returns
    -------
    list of ndarray of bool
        (n,) each: the samples in which a component exceeds Otsu's threshold, no two groups the same. Ordered by the
        logarithm of how many times as frequent they are as in other classes, times the share of the component's
        variance that lies between both parts.
    """
    found: list[tuple[float, np.ndarray]] = []
    if min(len(features), len(others)) < 2 * SMALLEST or most < 1:
        return []
    principal = _principal(features, others)
    for k in sorted({min(k, principal.shape[1]) for k in COMPONENTS}):
        inside, outside = _independent(principal[:, :k], len(features), seed)
        for one, other in zip(inside.T, outside.T, strict=True):
            for sign in (1, -1):
                found += _group(sign * one, sign * other)
    kept: list[np.ndarray] = []
    for _, member in sorted(found, key=lambda each: -each[0]):
        if len(kept) < most and all((member & one).sum() < SAME * (member | one).sum() for one in kept):
            kept.append(member)
    return kept


def _group(inside: np.ndarray, outside: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Return the samples (n,) of a class in which a component is large, with their worth; none that others have too."""
    from skimage.filters import threshold_otsu

    threshold = threshold_otsu(inside)
    member = inside > threshold
    share = member.mean()
    if member.sum() < SMALLEST or share > MOST:
        return []
    exclusive = float(np.log((share + RARE) / ((outside > threshold).mean() + RARE)))
    between = share * (1 - share) * (inside[member].mean() - inside[~member].mean()) ** 2 / inside.var()
    return [(exclusive * float(between), member)] if exclusive >= EXCLUSIVE else []


def _principal(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the principal components (n + m, r) of both sets of samples together; at most one for ten samples."""
    from sklearn.decomposition import PCA

    both = np.concatenate([features, others])
    both = (both - both.mean(axis=0)) / (both.std(axis=0) + 1e-6)
    k = min(max(COMPONENTS), both.shape[1], len(both) // 10)
    principal = PCA(k, svd_solver="full").fit_transform(both) if k and both.any() else both[:, :0]
    return np.asarray(principal[:, principal.std(axis=0) > 1e-6])


def _independent(principal: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the independent components (n, r), (m, r) of principal ones (n + m, r); none of fewer than two."""
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    if principal.shape[1] < 2:
        return principal[:n, :0], principal[n:, :0]
    with warnings.catch_warnings():
        # Components that go on turning a little are as good a start as any.
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica = FastICA(principal.shape[1], whiten="unit-variance", max_iter=300, tol=1e-3, random_state=seed)
        components = ica.fit_transform(principal)
    return components[:n], components[n:]
