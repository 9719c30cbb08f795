"""What a correction may cost, and what it is worth: on the same images before and after, without any truth."""

from __future__ import annotations

import numpy as np

DEAR = 2.0
"""How many points of accuracy with the artifact a lost point of clean accuracy outweighs."""
OF_CLASS = 0.05
"""By how much the accuracy of a class may fall ..."""
ERRORS = 2.0
"""... and by how many standard errors beyond that: there are several classes, and in each one few images."""


def costs(reference: np.ndarray, right: np.ndarray, max_loss: float, labels: np.ndarray | None = None) -> bool:
    """Return whether clean accuracy falls: by more than `max_loss` and one standard error of the paired difference.

    Parameters
    ----------
    reference, right : ndarray of bool
        (n,): whether each image is classified right, before and after.
    max_loss : float
        The share that may be lost.
    labels : ndarray of int, optional
        (n,): the images' classes; where they are given no class may fall either, see `fallen`: unless all together
        gain more than a standard error, and it is no worse then than the worst class was. A class that a model sees in
        too many images has more of its own right than it will have in a better model.
    """
    loss, error = _lost(reference, right)
    if loss > max_loss + error:
        return True
    if labels is None or not (lost := fallen(reference, right, labels, max_loss)):
        return False
    worst = worst_class(reference, labels)
    return loss >= -error or any(float(right[labels == c].mean()) < worst for c in lost)


def fallen(reference: np.ndarray, right: np.ndarray, labels: np.ndarray, max_loss: float = 0.0) -> list[int]:
    """Return the classes whose accuracy falls: by more than 5 points and two standard errors of the paired difference.

    Parameters
    ----------
    reference, right, labels
        As of `costs`.
    max_loss : float
        Where more than 5 points may be lost of all, as much may be lost of a class.
    """
    found = []
    for c in np.unique(labels).tolist():
        loss, error = _lost(reference[labels == c], right[labels == c])
        if loss > max(OF_CLASS, max_loss) + ERRORS * error:
            found.append(int(c))
    return found


def value(before: float, clean: float, attacked: float) -> float:
    """Return what a correction is worth: its accuracy with the artifact, less twice what it loses without."""
    return attacked - DEAR * max(0.0, before - clean)


def worst_class(right: np.ndarray, labels: np.ndarray) -> float:
    """Return the least accuracy of a class."""
    return min(float(right[labels == c].mean()) for c in np.unique(labels).tolist())


def _lost(reference: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Return which share is lost, and its standard error."""
    n = max(1, len(right))
    difference = reference.astype(int) - right.astype(int)
    loss = float(difference.mean()) if len(difference) else 0.0
    return loss, float(np.sqrt(max(0.0, float((difference**2).sum() / n - loss**2)) / n))
