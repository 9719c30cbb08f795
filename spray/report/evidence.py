"""Picks the samples of an artifact that the report shows, with their heatmaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from spray.data.base import ImageDataset
from spray.errors import UserError
from spray.figures import fitted, relevance_map, shared_limit
from spray.report.data import Gallery, Tile
from spray.store import open_attributions

_TOP, _RANDOM, _NEAR = 9, 6, 6


def read_scores(path: Path) -> dict[int, float]:
    """Return the score of each training sample from a `scores.csv`."""
    rows = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    return dict(zip(rows[:, 0].astype(int).tolist(), rows[:, 1].tolist(), strict=True)) if rows.size else {}


def galleries(
    dataset: ImageDataset,
    attributions: Path,
    samples: Sequence[int],
    class_index: int,
    scores: Mapping[int, float],
) -> tuple[tuple[Gallery, ...], float | None]:
    """Return an artifact's galleries and the limit that all their heatmaps share.

    Parameters
    ----------
    dataset : ImageDataset
        The training samples.
    attributions : Path
        HDF5 file whose row i of `/attribution` belongs to training sample i.
    samples : sequence of int
        The artifact's samples.
    class_index : int
        Its class, from which the near misses come.
    scores : mapping
        Score of each training sample; without one the first samples are shown, and no near misses.
    """
    ranked = sorted(samples, key=lambda sample: -scores.get(sample, 0.0))
    rest = ranked[_TOP:]
    drawn = np.random.default_rng(0).permutation(len(rest))[:_RANDOM]
    members = set(samples)
    outside = [int(i) for i in np.flatnonzero(dataset.labels == class_index) if i in scores and i not in members]
    near = sorted(outside, key=lambda sample: -scores[sample])[:_NEAR]
    chosen = (
        ("Top members", "the highest artifact scores", ranked[:_TOP]),
        ("Random members", "drawn from the others", [rest[i] for i in sorted(drawn)]),
        ("Near misses", "the highest scores in this class outside of the finding", near),
    )
    groups = tuple(
        Gallery(title, note, _tiles(dataset, attributions, indices, scores))
        for title, note, indices in chosen
        if indices
    )
    relevances = [tile.relevance for group in groups for tile in group.tiles]
    return groups, shared_limit(relevances) if relevances else None


def read_images(dataset: ImageDataset, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return images (n, C, H, W) in [0, 1]; one that can't be read is grey."""
    indices = np.asarray(indices, dtype=np.int64)
    try:
        return dataset.batch(indices).numpy()
    except UserError:
        if len(indices) == 1:
            return np.full((1, *dataset.image_shape), 0.5, dtype=np.float32)
    return np.concatenate([read_images(dataset, indices[i : i + 1]) for i in range(len(indices))])


def _tiles(
    dataset: ImageDataset, attributions: Path, indices: Sequence[int], scores: Mapping[int, float]
) -> tuple[Tile, ...]:
    images = read_images(dataset, indices)
    with open_attributions(attributions) as file:
        maps = [np.nan_to_num(relevance_map(relevance)) for relevance in file.attribution[np.asarray(indices)]]
    relevances = [fitted(relevance, dataset.image_shape[1:]) for relevance in maps]
    return tuple(
        Tile(dataset.names[index], index, image, relevance, scores.get(index))
        for index, image, relevance in zip(indices, images, relevances, strict=True)
    )
