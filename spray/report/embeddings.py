"""The samples of each class in the plane: points, what they are coloured by, thumbnails."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spray.data.base import ImageDataset
from spray.report.data import Embedding
from spray.report.evidence import read_images
from spray.report.pictures import thumbnail
from spray.store import Attributions, open_attributions
from spray.store.analyses import Analysis, AnalysisGroup, open_analysis

CLASSES = 60
"""Classes shown at most."""

POINTS = 10_000
"""Points on the whole page at most."""

_WEIGHT = 3  # of a class with an artifact, where not all points can be shown
_BATCH = 128
_LABELS = 127  # clusters of one clustering that the page can hold


@dataclass
class Wanted:
    """What is to be shown of a class.

    Attributes
    ----------
    clustering : str, optional
        The clustering that is shown first; where the files have none of that name, the first there is.
    members : set of int
        Training samples that belong to an artifact.
    scores : dict
        Name of a score to the scores of training samples.
    """

    clustering: str | None = None
    members: set[int] = field(default_factory=set)
    scores: dict[str, Mapping[int, float]] = field(default_factory=dict)


def embeddings(
    dataset: ImageDataset,
    analysis: Path,
    further: Path | None,
    attributions: Path | None,
    wanted: Mapping[int, Wanted],
    points: int = POINTS,
) -> tuple[tuple[Embedding, ...], tuple[str, ...]]:
    """Return the embeddings of the classes, those in `wanted` first, and the names of classes that aren't shown.

    Parameters
    ----------
    dataset : ImageDataset
        The training samples.
    analysis : Path
        `analysis.h5`.
    further : Path, optional
        The same for clusterings of further views, `candidates.h5`.
    attributions : Path, optional
        `attributions.h5`, for the predictions.
    wanted : mapping of int to Wanted
        Of classes of which something is known, in the order in which they are shown.
    points : int
        Largest number of points altogether.
    """
    with ExitStack() as files:
        main = files.enter_context(open_analysis(analysis, len(dataset)))
        other = None if further is None else files.enter_context(open_analysis(further, len(dataset)))
        predicted = None if attributions is None else files.enter_context(open_attributions(attributions))
        order = [c for c in (*wanted, *(c for c in main.classes if c not in wanted)) if c in main.classes]
        shown, left = order[:CLASSES], order[CLASSES:]
        weights = [_WEIGHT if c in wanted and wanted[c].members else 1 for c in shown]
        shares = allot([len(main.group(c)) for c in shown], weights, points)
        made = {
            c: embedding(dataset, main.group(c), c, wanted.get(c, Wanted()), most, _group(other, c), predicted)
            for c, most in zip(shown, shares, strict=True)
        }
    without = (*(c for c in shown if made[c] is None), *left)
    return tuple(plot for plot in made.values() if plot is not None), tuple(dataset.classes[c] for c in without)


def allot(sizes: Sequence[int], weights: Sequence[int], most: int) -> list[int]:
    """Return how many samples of each class are shown: all if they are few, else in proportion to the weights."""
    if sum(sizes) <= most:
        return list(sizes)
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(n, w * middle) for n, w in zip(sizes, weights, strict=True)) <= most:
            low = middle
        else:
            high = middle - 1
    return [min(n, w * low) for n, w in zip(sizes, weights, strict=True)]


def embedding(
    dataset: ImageDataset,
    group: AnalysisGroup,
    class_index: int,
    wanted: Wanted,
    most: int,
    further: AnalysisGroup | None = None,
    attributions: Attributions | None = None,
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
    wanted : Wanted
        What is to be shown of it.
    most : int
        Largest number of points.
    further : AnalysisGroup, optional
        The class' group with the clusterings of further views.
    attributions : Attributions, optional
        The open file with the predictions.

    Returns
    -------
    Embedding or None
        None where the file holds nothing to show.
    """
    if not group.clusterings or not group.embeddings or not len(group) or most < 1:
        return None
    kind, points, eigenvalues = _points(group)
    rows = _chosen(np.isin(group.index, list(wanted.members)), most)
    indices = group.index[rows]
    clusterings = {name: group.labels(name) for name in group.clusterings}
    if further is not None and wanted.clustering in further.clusterings:
        clusterings = {wanted.clustering: _in_order(further, group.index, wanted.clustering)} | clusterings
    clusterings = {name: labels[rows] for name, labels in clusterings.items() if labels.max(initial=-1) < _LABELS}
    if not clusterings:
        return None
    scores = {name: np.array([values.get(int(i), np.nan) for i in indices]) for name, values in wanted.scores.items()}
    predictions = None
    if attributions is not None:
        logits = np.nan_to_num(np.asarray(attributions.prediction[indices], np.float64))
        predictions = logits.argmax(axis=1)
        if logits.shape[1] > 1:
            others = np.delete(logits, class_index, axis=1).max(axis=1)
            scores["lead of the class's logit"] = logits[:, class_index] - others
    return Embedding(
        class_index=class_index,
        class_name=dataset.classes[class_index],
        kind=kind,
        clustering=wanted.clustering if wanted.clustering in clusterings else next(iter(clusterings)),
        points=points[rows].astype(np.float64),
        clusterings=clusterings,
        scores=scores,
        predictions=predictions,
        members=np.isin(indices, list(wanted.members)),
        indices=indices,
        names=tuple(dataset.names[i] for i in indices),
        thumbnails=_thumbnails(dataset, indices),
        eigenvalues=eigenvalues,
        total=len(group),
    )


def _chosen(is_member: np.ndarray, most: int) -> np.ndarray:
    """Return rows, ascending; an artifact's take half of the places at most, so that there are others beside them."""
    order = np.random.default_rng(0).permutation(len(is_member))
    order = order[np.argsort(~is_member[order], kind="stable")]
    n_members = int(is_member.sum())
    room = max(most // 2, most - (len(order) - n_members))
    first = order[: min(n_members, room)]
    return np.sort(np.concatenate([first, order[n_members:][: most - len(first)]]))


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


def _in_order(further: AnalysisGroup, index: np.ndarray, clustering: str) -> np.ndarray:
    """Return the labels of a clustering in another file, for the samples `index`; -1 for one that isn't there."""
    label_of = dict(zip(further.index.tolist(), further.labels(clustering).tolist(), strict=True))
    return np.array([label_of.get(i, -1) for i in index.tolist()], dtype=np.int64)


def _group(analysis: Analysis | None, class_index: int) -> AnalysisGroup | None:
    return analysis.group(class_index) if analysis is not None and class_index in analysis.classes else None


def _thumbnails(dataset: ImageDataset, indices: Collection[int] | np.ndarray) -> np.ndarray:
    indices = np.asarray(indices)
    batches = (read_images(dataset, indices[at : at + _BATCH]) for at in range(0, len(indices), _BATCH))
    return np.stack([thumbnail(image) for batch in batches for image in batch])
