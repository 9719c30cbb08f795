"""Clusters that are strangers in their class: a kind of sample that it has too few of."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from spray.data.base import ImageDataset
from spray.isolation.causal import LEVEL
from spray.isolation.sample_bias import STRANGE, WORSE, strangeness, worse
from spray.pipelines.clusters import ranked_clusters
from spray.pipelines.context import Context
from spray.pipelines.samples import AT_ONCE, Samples, some
from spray.store.reading import Attributions
from spray.training import batches

FEWEST = 16
"""Fewest samples of a kind: of fewer neither neighbors nor mistakes say much."""
LARGEST = 0.5
"""Largest share of a class; a kind with more is what the class consists of."""
AMONG = 20_000
"""Most training samples that neighbors are looked for among."""
SIDE = 16
"""Side of the thumbnails, in pixels, by which images are compared as they are."""
SAME = 0.5
"""Share of the smaller of two clusters from which on they are of the same kind."""

Kind = tuple[dict[str, Any], np.ndarray]
"""A row of the ranking, with `strangeness`, and its samples."""


def strangers(context: Context, samples: Samples, attributions: Attributions) -> list[Kind]:
    """Return the clusters that are strangers in their class and that the model is wrong on, the strangest first.

    Parameters
    ----------
    context : Context
        Of the run.
    samples : Samples
        What is known of its images.
    attributions : Attributions
        Of all training samples, with predictions.
    """
    labels = np.asarray(context.train.labels)
    suspects = _suspects(context, labels, _right(attributions, labels), attributions.valid)
    if not suspects:
        return []
    rng = np.random.default_rng([context.config.seed, 14])
    members = np.unique(np.concatenate([each for _, each in suspects]))
    among = np.union1d(some(np.arange(len(labels)), AMONG, rng), members)
    spaces = _spaces(context.train, samples, among)
    found: list[tuple[float, Kind]] = []
    for row, each in suspects:
        own, member = labels[among] == row["class_index"], np.isin(among, each)
        value = strangeness(spaces, own, member, context.config.seed)
        if value <= STRANGE:
            found.append((value, ({**row, "strangeness": value}, each)))
    kept: list[Kind] = []
    for _, (row, each) in sorted(found, key=lambda one: one[0]):
        if all(len(np.intersect1d(each, other)) < SAME * min(len(each), len(other)) for _, other in kept):
            kept.append((row, each))
    return kept


def _right(attributions: Attributions, labels: np.ndarray) -> np.ndarray:
    """Return which training samples the model gets right, (N,)."""
    parts = [attributions.prediction[part].argmax(axis=1) == labels[part] for part in batches(len(labels), 10_000)]
    return np.concatenate(parts)


def _suspects(context: Context, labels: np.ndarray, right: np.ndarray, valid: np.ndarray) -> list[Kind]:
    """Return the clusters that the model does far worse on than on the rest of their class, by more than chance."""
    found = []
    with ranked_clusters(context.run_dir, len(labels)) as clusters:
        for row in clusters.rows:
            members = clusters.members(row)
            of_class = np.flatnonzero(valid & (labels == row["class_index"]))
            if not FEWEST <= len(members) <= LARGEST * len(of_class):
                continue
            accuracy, rest_accuracy, p_value = worse(np.isin(of_class, members), right[of_class])
            if rest_accuracy - accuracy >= WORSE and p_value * len(clusters.rows) < LEVEL:
                found.append((row, members))
    return found


def _spaces(images: ImageDataset, samples: Samples, among: np.ndarray) -> list[np.ndarray]:
    """Return what samples are compared by, float32 (n, d) each: thumbnails, statistics, and the model's activations."""
    thumbnails, features = [], []
    for part in batches(len(among), AT_ONCE):
        pixels = images.batch(among[part])
        height, width = (min(SIDE, side) for side in pixels.shape[2:])
        thumbnails.append(torch.nn.functional.adaptive_avg_pool2d(pixels, (height, width)).flatten(1).numpy())
        features.append(samples.features(pixels).astype(np.float32))
    known = np.concatenate(features)
    known = (known - known.mean(axis=0)) / (known.std(axis=0) + 1e-6)
    n = samples.n_statistics
    return [np.concatenate(thumbnails), known[:, -n:], known[:, :-n]]
