"""Picks the samples that the report shows: galleries of an artifact, points and thumbnails of a class."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from spray.data.base import ImageDataset
from spray.figures import fitted, relevance_map, shared_limit
from spray.report.data import Embedding, Gallery, Tile
from spray.report.pictures import thumbnail
from spray.store import open_attributions
from spray.store.analyses import AnalysisGroup

_TOP, _RANDOM, _NEAR = 9, 6, 6
_BATCH = 128


def read_scores(path: Path) -> dict[int, float]:
    """Return the score of each training sample from a `scores.csv`."""
    with path.open(newline="") as file:
        return {int(row["sample_index"]): float(row["score"]) for row in csv.DictReader(file)}


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


def embedding(
    dataset: ImageDataset,
    group: AnalysisGroup,
    class_index: int,
    clustering: str | None,
    members: set[int],
    most: int,
) -> Embedding | None:
    """Return the points of one class, at most `most` of them, an artifact's samples first.

    Parameters
    ----------
    dataset : ImageDataset
        The training samples.
    group : AnalysisGroup
        The class' group in the analysis file.
    class_index : int
        The class.
    clustering : str or None
        The clustering that gives the colours; where the file has none of that name, its first one.
    members : set of int
        Training samples that belong to an artifact.
    most : int
        Largest number of points.

    Returns
    -------
    Embedding or None
        None where the file holds nothing to show.
    """
    names = group.clusterings
    if not names or not group.embeddings or not len(group):
        return None
    shown = clustering if clustering is not None and clustering in names else names[0]
    kind, points, eigenvalues = _points(group)
    indices = group.index
    is_member = np.isin(indices, list(members))
    order = np.random.default_rng(0).permutation(len(indices))
    order = order[np.argsort(~is_member[order], kind="stable")]
    # Artifact samples take half of the places at most, so that there is something to compare them with.
    first = order[: min(int(is_member.sum()), most // 2)]
    others = order[int(is_member.sum()) :][: most - len(first)]
    rows = np.sort(np.concatenate([first, others]))
    return Embedding(
        class_index=class_index,
        class_name=dataset.classes[class_index],
        kind=kind,
        clustering=shown,
        points=points[rows].astype(np.float64),
        clusters=group.labels(shown)[rows],
        members=is_member[rows],
        indices=indices[rows],
        names=tuple(dataset.names[i] for i in indices[rows]),
        thumbnails=_thumbnails(dataset, indices[rows]),
        eigenvalues=eigenvalues,
        total=len(indices),
    )


def _points(group: AnalysisGroup) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the kind of the embedding, its points (n, 2), and the eigenvalues in ascending order."""
    eigenvalues = group.eigenvalues("spectral")
    order = np.argsort(eigenvalues)
    if "umap" in group.embeddings:
        return "UMAP", group.embedding("umap")[:, :2], eigenvalues[order]
    name = "spectral" if "spectral" in group.embeddings else group.embeddings[0]
    points = group.embedding(name)
    # The eigenvector of the smallest eigenvalue is trivial: it only tells how many neighbours a sample has.
    columns = order[1:3] if len(order) == points.shape[1] >= 3 else np.array([0, 1])
    kind = "first two spectral components" if name == "spectral" else "first two components"
    return kind, points[:, columns], eigenvalues[order]


def _tiles(
    dataset: ImageDataset, attributions: Path, indices: Sequence[int], scores: Mapping[int, float]
) -> tuple[Tile, ...]:
    images = dataset.batch(np.asarray(indices)).numpy()
    with open_attributions(attributions) as file:
        maps = [np.nan_to_num(relevance_map(relevance)) for relevance in file.attribution[np.asarray(indices)]]
    relevances = [fitted(relevance, dataset.image_shape[1:]) for relevance in maps]
    return tuple(
        Tile(dataset.names[index], index, image, relevance, scores.get(index))
        for index, image, relevance in zip(indices, images, relevances, strict=True)
    )


def _thumbnails(dataset: ImageDataset, indices: np.ndarray) -> np.ndarray:
    batches = (dataset.batch(indices[at : at + _BATCH]).numpy() for at in range(0, len(indices), _BATCH))
    return np.stack([thumbnail(image) for batch in batches for image in batch])
