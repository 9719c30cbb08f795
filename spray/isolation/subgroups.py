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

COMPONENTS = 20
"""Independent components sought."""
SMALLEST = 8
"""Fewest samples of a group."""
EXCLUSIVE = 0.5
"""Least logarithm of how many times as frequent the group is in its class as in others."""
RARE = 0.01
"""Added to both frequencies: less can't be told from nothing."""


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
        (n,) each: the samples in which a component exceeds Otsu's threshold. Ordered by how many times as frequent they
        are as in other classes.
    """
    from skimage.filters import threshold_otsu

    k = min(COMPONENTS, features.shape[1], (len(features) + len(others)) // 10)
    if min(len(features), len(others)) < 2 * SMALLEST or k < 2 or most < 1:
        return []
    inside, outside = _components(features, others, k, seed)
    found = []
    for one, other in zip(inside.T, outside.T, strict=True):
        if one.std() < 1e-9:
            continue
        for sign in (1, -1):
            values = sign * one
            threshold = threshold_otsu(values)
            member = values > threshold
            if member.sum() < SMALLEST or member.mean() > MOST:
                continue
            exclusive = np.log((member.mean() + RARE) / ((sign * other > threshold).mean() + RARE))
            if exclusive >= EXCLUSIVE:
                found.append((float(exclusive), member))
    found.sort(key=lambda each: -each[0])
    return [member for _, member in found[:most]]


def _components(features: np.ndarray, others: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the independent components (n, r), (m, r) of both sets of samples together, r at most k."""
    from sklearn.decomposition import PCA, FastICA
    from sklearn.exceptions import ConvergenceWarning

    both = np.concatenate([features, others])
    both = (both - both.mean(axis=0)) / (both.std(axis=0) + 1e-6)
    principal = PCA(k, svd_solver="full").fit_transform(both) if both.any() else both[:, :0]
    principal = principal[:, principal.std(axis=0) > 1e-6]
    if principal.shape[1] < 2:
        return principal[: len(features)], principal[len(features) :]
    with warnings.catch_warnings():
        # Components that go on turning a little are as good a start as any.
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica = FastICA(principal.shape[1], whiten="unit-variance", max_iter=300, tol=1e-3, random_state=seed)
        components = ica.fit_transform(principal)
    return components[: len(features)], components[len(features) :]
