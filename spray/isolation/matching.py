"""Samples that are like those of a cluster in everything but what made it.

What shares an artifact may share more: the images of a group are dark, since the mark is seen best there. Compared with
dark images of the rest only the mark is left (matching on covariates: Rubin, "Matching to remove bias in observational
studies", 1973).
"""

from __future__ import annotations

import numpy as np

EACH = 3
"""Nearest others of each sample."""
FEWEST = 32
"""Fewest others altogether, if there are so many."""


def alike(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Return which of the others are nearest to the samples of a cluster.

    Parameters
    ----------
    inside, outside : ndarray
        (n, d) and (m, d): covariates of the cluster's samples and the others.

    Returns
    -------
    ndarray of int
        Indices of others, sorted, each once: of each sample the `EACH` nearest ones, in units of the standard
        deviations over all, or as many more as it takes for `FEWEST`.
    """
    from scipy.spatial.distance import cdist

    unit = np.concatenate([inside, outside]).std(axis=0) + 1e-6
    order = cdist(inside / unit, outside / unit).argsort(axis=1, kind="stable")
    for each in range(EACH, len(outside) + 1):
        chosen = np.unique(order[:, :each])
        if len(chosen) >= FEWEST:
            return chosen
    return np.arange(len(outside))
