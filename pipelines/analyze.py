"""The third stage: SpRAy, the spectral clusters of each class's heatmaps."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
import torch
from threadpoolctl import threadpool_limits

from spray.analysis import cluster, eigengap, heatmap_features, spectral_embedding
from spray.analysis.clustering import spectral_rows
from spray.pipelines.context import Context
from spray.pipelines.stage import Stage
from spray.storage import hdf5_writer
from spray.store import Attributions, open_attributions

FEWEST = 5
"""A class with fewer heatmaps than this is not clustered: all its samples are one cluster."""


def run(context: Context) -> dict[str, Any]:
    """Write `analysis.h5`, a group for each class."""
    classes, small = context.train.classes, []
    shape = (len(context.train), None, None, None)
    with (
        open_attributions(context.run_dir / "attributions.h5", shape=shape) as attributions,
        hdf5_writer(context.run_dir / "analysis.h5") as file,
    ):
        for c in context.progress(range(len(classes)), len(classes), "classes analyzed"):
            index = np.flatnonzero(context.train.labels == c)
            features = class_features(attributions, index, context.config.analysis.grid)
            group = file.create_group(f"{c:08d}")
            group.attrs["class_name"] = classes[c]
            group["index"] = index.astype(np.uint32)
            used = np.flatnonzero(features.any(axis=1))
            if len(used) < FEWEST:
                small.append(classes[c])
                nowhere = np.zeros((len(index), 2))
                _write(group, np.zeros(2), nowhere, nowhere if context.config.analysis.umap else None)
                for k in context.config.analysis.n_clusters:
                    group[f"cluster/kmeans-{k:02d}"] = np.zeros(len(index), dtype=np.int32)
                continue
            _analyze(context, group, features, used)
    for name in small:
        context.log.warning("class %r has fewer than %d heatmaps: too few to cluster", name, FEWEST)
    return {"classes": len(classes), "too_small": small}


def class_features(attributions: Attributions, index: np.ndarray, grid: int) -> np.ndarray:
    """Return the heatmap features (n, d) of the samples at `index`, read in parts."""
    parts = [heatmap_features(part.astype(np.float32), grid) for _, part in attributions.batches(index)]
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)


def _analyze(context: Context, group: h5py.Group, features: np.ndarray, used: np.ndarray) -> None:
    """Embed and cluster one class; samples without relevance are noise, at the origin of the embedding."""
    options, seed = context.config.analysis, context.config.seed
    n = len(features)
    eigenvalues, vectors = spectral_embedding(features[used], options.n_neighbors, options.n_components, seed)
    embedding = np.zeros((n, vectors.shape[1]))
    embedding[used] = vectors
    plane = None
    if options.umap:
        plane = np.zeros((n, 2))
        plane[used] = _umap(vectors, seed)
    _write(group, eigenvalues, embedding, plane)
    group.attrs["eigengap"] = eigengap(eigenvalues)
    for k in options.n_clusters:
        labels = np.full(n, -1, dtype=np.int32)
        # So little work is done sooner by one thread, by far where other jobs want the cores.
        with threadpool_limits(1):
            labels[used] = cluster(spectral_rows(vectors, k), "kmeans", n_clusters=k, seed=seed)
        dataset = group.create_dataset(f"cluster/kmeans-{k:02d}", data=labels)
        dataset.attrs["embedding"], dataset.attrs["k"] = "spectral", k


def _write(group: h5py.Group, eigenvalues: np.ndarray, embedding: np.ndarray, plane: np.ndarray | None) -> None:
    """Write the embeddings; eigenvalues descend, as ViRelAy shows them, and so do the columns."""
    spectral = group.create_dataset("embedding/spectral", data=embedding[:, ::-1].astype(np.float32))
    spectral.attrs["eigenvalue"] = eigenvalues[::-1].astype(np.float32)
    if plane is not None:
        group.create_dataset("embedding/umap", data=plane.astype(np.float32)).attrs["embedding"] = "spectral"


def _umap(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Return a plane picture (n, 2) of the spectral embedding, which is also what UMAP starts from."""
    from umap import UMAP

    n = len(vectors)
    start = vectors[:, 1:3] if vectors.shape[1] >= 3 else np.pad(vectors, ((0, 0), (0, 2)))[:, :2]
    scale = np.abs(start).max()
    noise = np.random.default_rng(seed).normal(scale=1e-4, size=start.shape)
    start = (10 * start / (scale if scale > 0 else 1) + noise).astype(np.float32)
    threads = torch.get_num_threads()
    try:
        return UMAP(
            n_neighbors=min(15, n - 1), init=start, random_state=seed, n_jobs=1, n_epochs=200 if n < 2000 else 100
        ).fit_transform(vectors.astype(np.float32))
    finally:
        # Numba sets the number of OpenMP threads, which torch shares, and with it the rounding of what follows.
        torch.set_num_threads(threads)


STAGE = Stage(
    name="analyze",
    needs=("attribute",),
    settings=("analysis", "seed"),
    outputs=("analysis.h5",),
    run=run,
)
