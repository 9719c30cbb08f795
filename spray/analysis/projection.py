"""Pictures of an embedding in the plane: one registry, every member gives two coordinates to each sample.

They are to look at; nothing is computed from them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from spray.analysis.clustering import nearest_of
from spray.registry import Registry

log = logging.getLogger(__name__)

PROJECTIONS: Registry[Callable[..., np.ndarray]] = Registry("projection")

FULL = {"tsne": 5_000, "umap": 100_000}
"""Most rows that are laid out; others are put beside the nearest of these. On one core 5,000 take t-SNE 25 s."""

FEWEST = 5
"""Fewer rows are laid out by their first coordinates."""


def project(vectors: np.ndarray, method: str = "umap", seed: int = 0) -> np.ndarray:
    """Lay the rows of a spectral embedding out in the plane.

    Parameters
    ----------
    vectors : ndarray
        (n, m), finite, columns by ascending eigenvalue; the second and third are where the layout starts from.
    method : str
        A name in `PROJECTIONS`: "umap" or "tsne".
    seed : int
        Of the layout.

    Returns
    -------
    ndarray of float32
        (n, 2).

    Raises
    ------
    UserError
        If there is no such method.
    ValueError
        If the embedding is not finite.
    """
    vectors = np.asarray(vectors)
    if not np.isfinite(vectors).all():
        raise ValueError("the embedding holds NaN or infinity")
    part, n, full = PROJECTIONS.get(method), len(vectors), FULL.get(method, len(vectors))
    if n < FEWEST:
        return _start(vectors, seed)
    if n <= full:
        return part(vectors.astype(np.float32), _start(vectors, seed), seed)
    log.warning(
        "%s lays out %d of %d rows, drawn at random; the others lie beside the nearest of them", method, full, n
    )
    chosen = np.sort(np.random.default_rng(seed).permutation(n)[:full])
    plane = part(vectors[chosen].astype(np.float32), _start(vectors[chosen], seed), seed)
    everywhere = plane[nearest_of(vectors[chosen], vectors)]
    # Beside, not upon each other.
    spread = 0.002 * float(np.ptp(plane, axis=0).max())
    everywhere += np.random.default_rng(seed).normal(scale=spread, size=everywhere.shape).astype(np.float32)
    everywhere[chosen] = plane
    return everywhere


@PROJECTIONS.register("umap")
def umap(vectors: np.ndarray, start: np.ndarray, seed: int) -> np.ndarray:
    """UMAP of the spectral embedding."""
    from umap import UMAP

    n = len(vectors)
    threads = torch.get_num_threads()
    options: dict[str, Any] = {"n_neighbors": min(15, n - 1), "n_epochs": 200 if n < 2000 else 100}
    try:
        return UMAP(init=start, random_state=seed, n_jobs=1, **options).fit_transform(vectors)
    finally:
        # Numba sets the number of OpenMP threads, which torch shares, and with it the rounding of what follows.
        torch.set_num_threads(threads)


@PROJECTIONS.register("tsne")
def tsne(vectors: np.ndarray, start: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE (Barnes and Hut) of the spectral embedding."""
    from sklearn.manifold import TSNE

    # As wide as scikit-learn's own start; several threads would add up the forces in any order.
    start = start / max(float(start[:, 0].std()), 1e-12) * 1e-4
    with threadpool_limits(1):
        perplexity = min(30.0, (len(vectors) - 1) / 3)
        return TSNE(perplexity=perplexity, init=start, random_state=seed, n_jobs=1).fit_transform(vectors)


def _start(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Return the second and third column, ten units wide, with a little noise that tells equal rows apart."""
    start = vectors[:, 1:3] if vectors.shape[1] >= 3 else np.pad(vectors, ((0, 0), (0, 2)))[:, :2]
    scale = np.abs(start).max(initial=0.0)
    noise = np.random.default_rng(seed).normal(scale=1e-4, size=start.shape)
    result: np.ndarray = (10 * start / (scale if scale > 0 else 1) + noise).astype(np.float32)
    return result
