"""The third stage: SpRAy, the spectral clusters of the heatmaps of each class or other group of samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import h5py
import numpy as np
import psutil
from threadpoolctl import threadpool_limits

from spray.analysis import cluster, eigengap, spectral_embedding
from spray.analysis.clustering import spectral_rows
from spray.analysis.preprocessing import Features, Preprocessing
from spray.analysis.projection import project
from spray.errors import UserError
from spray.pipelines.analysis_options import clusterings_of, preprocessing_of, projections_of, source_array
from spray.pipelines.context import Context
from spray.pipelines.stage import Stage
from spray.storage import hdf5_writer
from spray.store import Attributions, open_attributions
from spray.store.analyses import ALL, class_group, predicted_group

FEWEST = 5
"""A group with fewer heatmaps than this is not clustered: all its samples are one cluster."""

MEMORY = 0.5
"""Share of the free memory that the features of a group may take; their neighbour graph needs some as well."""


@dataclass(frozen=True)
class Group:
    """Samples that are analyzed together.

    Attributes
    ----------
    name : str
        Of its group in the file.
    kind : str
        As in `analysis.groups`.
    title : str
        For people.
    index : ndarray of int64
        The samples.
    """

    name: str
    kind: str
    title: str
    index: np.ndarray


def run(context: Context) -> dict[str, Any]:
    """Write `analysis.h5`, with the groups that `analysis.groups` asks for."""
    options, small = context.config.analysis, []
    preprocessing, source = preprocessing_of(options), source_array(options)
    with open_attributions(
        context.run_dir / "attributions.h5", shape=(len(context.train), *[None] * 3)
    ) as attributions:
        groups = list(_groups(context, attributions))
        width = preprocessing.width(attributions.array(source).shape[1:])
        _check_memory(max((len(group.index) for group in groups), default=0), width)
        with hdf5_writer(context.run_dir / "analysis.h5") as file:
            file.attrs.update(_recorded(context))
            for group in context.progress(groups, len(groups), "groups analyzed"):
                features = read_features(attributions, group.index, preprocessing, source)
                at = file.create_group(group.name)
                at.attrs["class_name"], at.attrs["kind"] = group.title, group.kind
                at.attrs["used"] = int(features.used.sum())
                _store(at, "index", group.index.astype(np.uint32))
                if features.used.sum() < FEWEST:
                    small.append(group.title)
                    _write_small(context, at, len(group.index))
                else:
                    _analyze(context, at, features)
    for title in small:
        context.log.warning("group %r has fewer than %d heatmaps: too few to cluster", title, FEWEST)
    return {"groups": len(groups), "too_small": small}


def read_features(
    attributions: Attributions, index: np.ndarray, preprocessing: Preprocessing, source: str = "attribution"
) -> Features:
    """Put samples through the steps as they are read; the relevance is never in memory as a whole.

    Parameters
    ----------
    attributions : Attributions
        Open file.
    index : ndarray of int
        (n,): which samples; fastest where they ascend.
    preprocessing : Preprocessing
        The steps.
    source : str
        Name of the array: `attribution` or `layer/<module>`.

    Returns
    -------
    Features
        Of the n samples.

    Raises
    ------
    UserError
        If the file is damaged, or holds values that are not finite.
    """
    return preprocessing.features(partial(_finite_batches, attributions, index, source), len(index))


def _finite_batches(attributions: Attributions, index: np.ndarray, source: str) -> Iterator[np.ndarray]:
    for rows, part in attributions.batches(index, name=source):
        values = part.astype(np.float32, copy=False)
        if not np.isfinite(values.sum()) and not np.isfinite(values).all():
            bad = rows[~np.isfinite(values.reshape(len(values), -1)).all(axis=1)]
            raise UserError(
                f"{attributions.path} is damaged: row {bad[0]} of /{source} holds NaN or infinity; "
                "delete it and start the run again, which computes it anew"
            )
        yield values


def _groups(context: Context, attributions: Attributions) -> Iterator[Group]:
    """Yield the groups of `analysis.groups`; samples that could not be explained belong to their class only."""
    train, kinds = context.train, context.config.analysis.groups
    labels = np.asarray(train.labels)
    if "class" in kinds:
        for c, name in enumerate(train.classes):
            yield Group(class_group(c), "class", name, np.flatnonzero(labels == c))
    explained = np.flatnonzero(attributions.valid)
    if "predicted" in kinds:
        parts = [part.argmax(axis=1) for _, part in attributions.batches(explained, name="prediction")]
        predicted = np.concatenate([np.zeros(0, np.int64), *parts])
        for c, name in enumerate(train.classes):
            if len(index := explained[predicted == c]):
                yield Group(predicted_group(c), "predicted", f"predicted as {name}", index)
    if "all" in kinds:
        yield Group(ALL, "all", "all samples", explained)


def _check_memory(n: int, width: int) -> None:
    needed, free = 4 * n * width, int(psutil.virtual_memory().available * MEMORY)
    if needed > free:
        raise UserError(
            f"analysis.steps leave {width} values of each of {n} samples, {needed / 1e9:.1f} GB, more than half of the "
            f"free memory ({2 * free / 1e9:.1f} GB); add pool or pca, or analyze smaller groups"
        )


def _recorded(context: Context) -> dict[str, Any]:
    """Return the options as the file keeps them: numbers and names as they are, lists as JSON."""
    options = asdict(context.config.analysis)
    plain = {key: json.dumps(value) if isinstance(value, list) else value for key, value in options.items()}
    return plain | {"seed": context.config.seed}


def _analyze(context: Context, at: h5py.Group, features: Features) -> None:
    """Embed and cluster one group; samples without relevance are noise, at the origin of the embedding."""
    options, seed = context.config.analysis, context.config.seed
    used = features.used
    X = features.values if used.all() else features.values[used]
    eigenvalues, vectors = spectral_embedding(
        X, options.n_neighbors, options.n_components, seed, options.metric, options.neighbors, context.device
    )
    # Eigenvalues descend, as ViRelAy shows them, and so do the columns.
    spectral = _store(at, "embedding/spectral", _spread(vectors[:, ::-1].astype(np.float32), used, 0))
    spectral.attrs["eigenvalue"] = eigenvalues[::-1].astype(np.float32)
    n_parts = at.attrs["eigengap"] = eigengap(eigenvalues)
    for name in projections_of(options):
        plane = project(vectors, name, seed).astype(np.float32)
        _store(at, f"embedding/{name}", _spread(plane, used, 0)).attrs["embedding"] = "spectral"
    for clustering in clusterings_of(options):
        k = clustering.n_clusters or max(2, n_parts)
        # So little work is done sooner by one thread, by far where other jobs want the cores.
        with threadpool_limits(1):
            labels = cluster(spectral_rows(vectors, k), clustering.method, **clustering.arguments(seed))
        dataset = _store(at, f"cluster/{clustering.name}", _spread(labels.astype(np.int32), used, -1))
        dataset.attrs["embedding"], dataset.attrs["k"] = "spectral", k
        dataset.attrs["options"] = json.dumps(clustering.options)


def _write_small(context: Context, at: h5py.Group, n: int) -> None:
    """Write what every group has, for one with too few samples to analyze."""
    options = context.config.analysis
    _store(at, "embedding/spectral", np.zeros((n, 2), np.float32)).attrs["eigenvalue"] = np.zeros(2, np.float32)
    for name in projections_of(options):
        _store(at, f"embedding/{name}", np.zeros((n, 2), np.float32)).attrs["embedding"] = "spectral"
    for clustering in clusterings_of(options):
        _store(at, f"cluster/{clustering.name}", np.zeros(n, np.int32))


def _spread(values: np.ndarray, used: np.ndarray, otherwise: int) -> np.ndarray:
    """Return the rows of the used samples in their places among all."""
    everywhere = np.full((len(used), *values.shape[1:]), otherwise, values.dtype)
    everywhere[used] = values
    return everywhere


def _store(at: h5py.Group, name: str, values: np.ndarray) -> h5py.Dataset:
    """Write an array with checksums, so that damage is noticed by whoever reads it."""
    return at.create_dataset(name, data=values, fletcher32=values.size > 0)


STAGE = Stage(
    name="analyze",
    needs=("attribute",),
    settings=("analysis", "seed"),
    outputs=("analysis.h5",),
    run=run,
)
