"""What `rank` sees in the images themselves: what a cluster's have in common, and what is repeated in a class's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from spray.analysis import repeated
from spray.analysis.content import SIDE, relevance_peaks, shared_content, spread_evenly
from spray.analysis.repeated import Repeated, repeated_content
from spray.analysis.scoring import Candidate, concentration
from spray.pipelines.context import Context
from spray.store import Attributions
from spray.training import batches

SAMPLED, OF_CLUSTER = 400, 100
"""Images of a class, and of each cluster that is looked at, that shared content is measured on."""


def look_at(context: Context, chosen: Sequence[Candidate], index: np.ndarray, attributions: Attributions) -> None:
    """Look at the images and heatmaps of some clusters, and some others of their class, and add that evidence.

    Parameters
    ----------
    context : Context
        Of the run.
    chosen : sequence of Candidate
        Clusters of one class.
    index : ndarray of int, shape (n,)
        The samples of the class.
    attributions : Attributions
        Their heatmaps.
    """
    kinds, n = context.config.rank.evidence, len(index)
    wanted = [
        spread_evenly(np.arange(n), SAMPLED),
        *(spread_evenly(np.flatnonzero(x.member), OF_CLUSTER) for x in chosen),
    ]
    used = np.unique(np.concatenate(wanted))
    images, maps = _images(context, index[used], SIDE), _maps(context, index[used], attributions, SIDE)
    sharpness, peaks = concentration(maps), relevance_peaks(maps)
    for x in chosen:
        member = x.member[used]
        if "content" in kinds:
            x.evidence["content"] = shared_content(images, maps, member, peaks)
        if "concentration" in kinds and sharpness.std() > 0:
            x.evidence["concentration"] = float(
                (sharpness[member].mean() - sharpness[~member].mean()) / sharpness.std()
            )


@dataclass(frozen=True)
class Drawn:
    """Some images of the whole set, drawn and read once, of which each class is compared with those of other classes.

    Attributes
    ----------
    index : ndarray of int64
        (m,): which samples.
    images : ndarray of float32
        (m, C, h, w).
    """

    index: np.ndarray
    images: np.ndarray


def draw_images(context: Context) -> Drawn:
    """Draw twice as many images as a class is compared with, so that mostly enough are left of the others."""
    order = np.random.default_rng(context.config.seed).permutation(len(context.train))
    index = np.sort(order[: 2 * repeated.OTHERS])
    return Drawn(index, _images(context, index, repeated.SIDE))


def repeated_in_class(
    context: Context, c: int, index: np.ndarray, attributions: Attributions, drawn: Drawn
) -> list[Repeated]:
    """Return what is repeated in the images of a class and not in others; samples not searched have no copy.

    Parameters
    ----------
    context : Context
        Of the run.
    c : int
        The class.
    index : ndarray of int, shape (n,)
        Its samples.
    attributions : Attributions
        Their heatmaps.
    drawn : Drawn
        Images to compare with, of all classes.
    """
    labels = np.asarray(context.train.labels)
    searched = spread_evenly(np.arange(len(index)), repeated.MOST)
    if len(index) < 2 * repeated.FEWEST or (labels == c).all():
        return []
    others = drawn.images[labels[drawn.index] != c]
    if len(others) < repeated.OTHERS and len(drawn.index) < len(labels):
        # About half of all samples are of this class, or more.
        others = _images(context, spread_evenly(np.flatnonzero(labels != c), repeated.OTHERS), repeated.SIDE)
    found = repeated_content(
        _images(context, index[searched], repeated.SIDE),
        _maps(context, index[searched], attributions, repeated.SIDE),
        others,
        context.device,
    )
    return [_in_class(each, searched, len(index)) for each in found]


def _in_class(found: Repeated, searched: np.ndarray, n: int) -> Repeated:
    """Return what was found among some samples for all of the class."""
    member, distance = np.zeros(n, dtype=bool), np.full(n, np.inf, dtype=np.float32)
    member[searched], distance[searched] = found.member, found.distance
    return replace(found, member=member, distance=distance)


def _factor(context: Context, most: int) -> int:
    return -(-max(context.train.image_shape[1:]) // most)


def _size(context: Context, most: int) -> tuple[int, int]:
    factor = _factor(context, most)
    _, height, width = context.train.image_shape
    return -(-height // factor), -(-width // factor)


def _images(context: Context, indices: np.ndarray, most: int) -> np.ndarray:
    """Return images (n, C, h, w), float32, averaged down where they have more than `most` rows or columns."""
    whole = _factor(context, most) == 1
    found = []
    for part in batches(len(indices), 256):
        pixels = context.train.batch(indices[part])
        found.append(pixels if whole else adaptive_avg_pool2d(pixels, _size(context, most)))
    return torch.cat(found).float().numpy()


def _maps(context: Context, indices: np.ndarray, attributions: Attributions, most: int) -> np.ndarray:
    """Return heatmaps (n, h, w) of the size that images have then; they may be stored smaller than that."""
    size, found = _size(context, most), []
    for part in batches(len(indices), 256):
        relevance = torch.from_numpy(attributions.attribution[indices[part]].astype(np.float32))
        relevance = relevance.sum(dim=1, keepdim=True)
        smaller = relevance.shape[2] < size[0] or relevance.shape[3] < size[1]
        found.append(interpolate(relevance, size) if smaller else adaptive_avg_pool2d(relevance, size))
    return torch.cat(found)[:, 0].numpy()
