"""Many p-values at once: how many of what is called may be called wrongly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CORRECTIONS = ("benjamini_hochberg", "benjamini_yekutieli")


def q_values(p_values: Sequence[float] | np.ndarray, correction: str = "benjamini_hochberg") -> np.ndarray:
    """Return for each test the least false discovery rate at which it is called.

    Benjamini and Hochberg (1995): q_(i) = min over j >= i of m p_(j) / j, for tests that are independent or
    positively dependent. Benjamini and Yekutieli (2001): that times 1 + 1/2 + ... + 1/m, for any dependence.

    Parameters
    ----------
    p_values : array_like
        (m,), in [0, 1].
    correction : str
        One of `CORRECTIONS`.

    Returns
    -------
    ndarray of float64
        (m,), at most 1, in the order of the p-values.

    Raises
    ------
    ValueError
        If there is no such correction, or a p-value is outside of [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if correction not in CORRECTIONS:
        raise ValueError(f"{correction!r} is none of {', '.join(CORRECTIONS)}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values must lie in [0, 1]")
    m = len(p)
    order = np.argsort(-p, kind="stable")
    factor = float((1 / np.arange(1, m + 1)).sum()) if correction == "benjamini_yekutieli" else 1.0
    steps = np.minimum.accumulate(p[order] * factor * m / np.arange(m, 0, -1)) if m else p
    q = np.empty(m)
    q[order] = np.minimum(steps, 1)
    return q


def simes(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p-values that hold for a test that was chosen among others, as the smallest was (Simes, 1986).

    They are Benjamini and Hochberg's q-values, since the smallest of those is Simes' p-value of the hypothesis that
    none of the tests has found anything.
    """
    return q_values(p_values)
