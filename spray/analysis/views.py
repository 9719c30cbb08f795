"""Further ways of comparing the heatmaps of a class, in which rare and moved artifacts make clusters of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spray.analysis.clustering import cluster, spectral_rows
from spray.analysis.content import SIDE
from spray.analysis.preprocessing import Batches, Preprocessing
from spray.analysis.spectral import spectral_embedding

STEPS: dict[str, tuple[Any, ...]] = {
    "scaled": ("sum", "pool", "normalize_sum"),
    "peak": ("sum", {"pool": SIDE}, "positive", {"peak": 9}, "normalize_sum"),
}
"""The views by name: `scaled` compares heatmaps place by place in units of what is usual there, so that a little
relevance counts where there is none in other samples; `peak` compares the surroundings of where each sample has most
relevance, wherever that is."""

FLOOR, LIMIT = 0.05, 10.0
"""Deviation that every place has at least, relative to the mean of all values; most deviations that a value counts."""


def view_features(view: str, batches: Batches, n: int, grid: int = 16) -> np.ndarray:
    """Return what samples are compared by in a view, float32 (n, d).

    Parameters
    ----------
    view : str
        A name in `STEPS`.
    batches : callable
        Returns the heatmaps (m, C, H, W) in batches, the same ones each time.
    n : int
        Number of samples.
    grid : int
        What heatmaps are averaged down to.
    """
    values = Preprocessing(STEPS[view], grid).features(batches, n).values
    return scaled(values) if view == "scaled" else values


def scaled(features: np.ndarray) -> np.ndarray:
    """Return features (n, d) less their medians in units of their median absolute deviations, float32.

    The deviations are those of a normal distribution, 1.4826 times the median; clipped at `LIMIT`.
    """
    if not features.size:
        return features.astype(np.float32)
    middle = np.median(features, axis=0)
    deviation = 1.4826 * np.median(np.abs(features - middle), axis=0) + FLOOR * np.abs(features).mean()
    result = np.divide(features - middle, deviation, out=np.zeros(features.shape), where=deviation > 0)
    return np.clip(result, -LIMIT, LIMIT).astype(np.float32)


def view_labelings(
    view: str, features: np.ndarray, counts: Sequence[int], n_neighbors: int = 10, n_components: int = 32, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return the view's k-means clusterings of the spectral embedding, int64 (n,), by name, such as `peak-kmeans-04`.

    Samples whose features are all zero are noise: -1.
    """
    used = features.any(axis=1)
    found = {f"{view}-kmeans-{k:02d}": np.full(len(features), -1, dtype=np.int64) for k in counts}
    if used.sum() < 5:
        return found
    _, vectors = spectral_embedding(features[used], n_neighbors, n_components, seed)
    for k, labels in zip(counts, found.values(), strict=True):
        labels[used] = cluster(spectral_rows(vectors, k), "kmeans", n_clusters=k, seed=seed)
    return found
