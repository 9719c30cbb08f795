"""Content that is repeated in the images of a class where its relevance is: a mark put on some of them.

Heatmaps of a rare artifact, or of one that is somewhere else in each image, need not be alike: what each shares with
the others is a small part of it. Their images do share something, to the pixel. A natural part of a class is alike in
many images too, but by degrees: the more difference is allowed, the more images have it. Of a mark there are copies,
then nothing for long. That gap is measured here, for windows cut out where relevance peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import conv2d

from spray.analysis.content import NOISE, REACH, all_windows, cut_windows, separate_peaks, spread_evenly

SIDE = 64
"""Images with longer sides are best averaged down to about so many pixels."""

SHARES = (0.12, 0.17, 0.23)
"""Sides of the windows that are tried, of the image's shorter one."""

PEAKS, AGAINST = 4, 2
"""Places of each heatmap that windows are cut out at: with the most relevance for the class, and against it.

A mark that a model hasn't learned is evidence against every class, and found by that."""

SOURCES, MATCHED, OTHERS = 300, 400, 400
"""Most samples that windows are cut out of, and that are searched for them; of the other classes together."""

KEPT, SIFTED = 12, 16
"""Windows of each side whose copies are searched for everywhere; images of other classes that they are chosen with."""

MOST = 10_000
"""Most samples of a class whose images are searched."""

CLEAR = 1.5
"""Strength from which on a group counts: most classes of clean models have none above 1.1 (`scripts/rank_bench.py`)."""

COMPARED = 60
"""Images with a copy, and without one, whose surroundings are compared."""

FEWEST, LARGEST = 4, 0.65
"""Copies that there are at least; most of them, of the class."""

OVERLAP, NEARLY = 0.5, 0.8
"""Share of the smaller of two groups that the larger one has too, from which on they are the same one; share of the
strength that a larger group needs to be preferred."""


@dataclass(frozen=True)
class Repeated:
    """A window and its copies.

    Attributes
    ----------
    template : ndarray of float32
        (C, s, s).
    member : ndarray of bool
        (n,): the samples that have a copy.
    distance : ndarray of float32
        (n,): mean squared difference of each sample's most similar window.
    strength : float
        log of how much farther than the copies the next windows are, of this class or another, less what the
        surroundings have of that.
    """

    template: np.ndarray
    member: np.ndarray
    distance: np.ndarray
    strength: float


def repeated_content(
    images: np.ndarray, relevance: np.ndarray, others: np.ndarray, device: torch.device | str = "cpu"
) -> list[Repeated]:
    """Return windows that are repeated in images of a class and nowhere in other classes, the clearest first.

    With d(m) the mean squared difference of the m-th most similar image's best window, and e what nobody would see,
    the gap behind m copies is

        log (min(d(3/2 m + 2), d'(1 %)) + e) / (d(m) + e),

    where d' are the other classes' differences. The largest gap over m counts. Images of the same thing, such as
    crops that overlap, are alike around the window as well: the same ratio of the surroundings is subtracted.

    Parameters
    ----------
    images : ndarray of float32
        (n, C, H, W) in [0, 1]: those of a class.
    relevance : ndarray
        (n, H, W): their heatmaps.
    others : ndarray of float32
        (m, C, H, W): some of the other classes'.
    device : torch.device or str
        Where windows are compared.

    Returns
    -------
    list of Repeated
        One for each group of samples whose strength is at least `CLEAR`. None for a class of fewer than 8 samples, or
        without another class.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    if images.ndim != 4 or relevance.shape != (len(images), *images.shape[2:]) or others.shape[1:] != images.shape[1:]:
        raise ValueError(f"images {images.shape}, relevance {relevance.shape} and others {others.shape} do not fit")
    if len(images) < 2 * FEWEST or not len(others):
        return []
    others = others[spread_evenly(np.arange(len(others)), OTHERS)]
    matched = spread_evenly(np.arange(len(images)), MATCHED)
    maps = relevance[matched]
    peaks = np.concatenate([separate_peaks(maps, PEAKS), separate_peaks(-maps, AGAINST)], axis=1)
    found: list[Repeated] = []
    for side in sorted({_odd(share * min(images.shape[2:])) for share in SHARES}):
        templates = _promising(images[matched], peaks, others, side, device)
        if not len(templates):
            continue
        distance, place = best_windows(images, templates, device)
        elsewhere, _ = best_windows(others, templates, device)
        gaps, middles = gap(distance, elsewhere)
        for t in range(len(templates)):
            member = distance[t] <= middles[t]
            if not FEWEST <= member.sum() <= LARGEST * len(images):
                continue
            around = _surrounding_gap(images, int(distance[t].argmin()), place[t], side, member)
            strength = float(gaps[t]) - max(0.0, around)
            if strength >= CLEAR:
                found.append(Repeated(templates[t], member, distance[t], strength))
    return _distinct(sorted(found, key=lambda each: -each.strength))


def best_windows(
    images: np.ndarray, templates: np.ndarray, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Return for templates (t, C, s, s) each image's (n, C, H, W) least mean squared difference (t, n) and its place.

    The place (t, n, 2) is the upper left corner of that window.
    """
    kernels = torch.from_numpy(templates).to(device)
    ones, squares = torch.ones_like(kernels[:1]), (kernels**2).sum(dim=(1, 2, 3))[:, None, None]
    least, places = [], []
    with torch.inference_mode():
        for at in range(0, len(images), 64):
            x = torch.from_numpy(images[at : at + 64]).to(device, torch.float32)
            difference = conv2d(x * x, ones) - 2 * conv2d(x, kernels) + squares
            values, where = difference.flatten(2).min(dim=2)
            least.append(values.clamp_min(0) / kernels[0].numel())
            places.append(where)
    width = images.shape[3] - templates.shape[3] + 1
    corners = np.stack(np.divmod(torch.cat(places).T.cpu().numpy(), width), axis=2)
    return torch.cat(least).T.contiguous().cpu().numpy(), corners


def gap(own: np.ndarray, elsewhere: np.ndarray | None = None, fewest: int = FEWEST) -> tuple[np.ndarray, np.ndarray]:
    """Return each template's largest gap (t,) in its differences (t, n), and a difference (t,) in the middle of it.

    `elsewhere` (t, m) are differences of samples that should have no copy; before the gap lie `fewest` samples or more.
    """
    ordered = np.sort(own, axis=1)
    n = ordered.shape[1]
    counts = np.unique(np.geomspace(fewest, max(fewest, LARGEST * n), 32).round().astype(int))
    last = ordered[:, counts - 1] + NOISE
    following = ordered[:, np.minimum(counts + counts // 2 + 2, n - 1)] + NOISE
    if elsewhere is not None:
        following = np.minimum(following, np.quantile(elsewhere, 0.01, axis=1, method="lower")[:, None] + NOISE)
    rows, best = np.arange(len(own)), (following / last).argmax(axis=1)
    last, following = last[rows, best], following[rows, best]
    return np.log(following / last), np.sqrt(following * last) - NOISE


def _promising(
    images: np.ndarray, peaks: np.ndarray, others: np.ndarray, side: int, device: torch.device | str
) -> np.ndarray:
    """Return windows (t, C, side, side) at peaks (n, p, 2) that have a copy at another peak, one of each group."""
    wide = side + 2 * REACH
    cuts = (cut_windows(images, peaks[:, p] - wide // 2, (wide, wide)) for p in range(peaks.shape[1]))
    moved = np.stack([all_windows(cut, side) for cut in cuts], axis=1)
    n, _, shifts, size = moved.shape
    sources = spread_evenly(np.arange(n), SOURCES)
    flat = np.unique(moved[sources, :, shifts // 2].reshape(-1, size), axis=0)
    windows, rows = torch.from_numpy(moved.reshape(-1, size)).to(device), []
    squares = (windows**2).sum(dim=1)
    for part in torch.from_numpy(flat).to(device).split(128):
        difference = (squares - 2 * part @ windows.T).view(len(part), n, -1).amin(dim=2)
        rows.append((difference + (part**2).sum(dim=1, keepdim=True)).clamp_min(0) / size)
    own = torch.cat(rows).cpu().numpy()
    # Relevance may peak at a mark in few of the images that have it. Other classes only make gaps smaller.
    some = gap(own, fewest=2)[0] >= CLEAR
    if not some.any():
        return np.empty((0, images.shape[1], side, side), np.float32)
    templates, own = flat[some].reshape(-1, images.shape[1], side, side), own[some]
    elsewhere, _ = best_windows(others[spread_evenly(np.arange(len(others)), SIFTED)], templates, device)
    gaps, middles = gap(own, elsewhere, fewest=2)
    kept: list[int] = []
    groups = own <= middles[:, None]
    for t in np.argsort(-gaps, kind="stable"):
        if len(kept) < KEPT and not any(_same(groups[t], groups[other]) for other in kept):
            kept.append(int(t))
    return templates[kept]


def _surrounding_gap(images: np.ndarray, source: int, place: np.ndarray, side: int, member: np.ndarray) -> float:
    """Return how much less all else differs where there is a copy than where there is none, as a log.

    Every image is moved so that its window lies on that of the source; those without a copy by the ways that the copies
    have gone.
    """
    copies = spread_evenly(np.flatnonzero(member & (np.arange(len(images)) != source)), COMPARED)
    rest = spread_evenly(np.flatnonzero(~member), COMPARED)
    ways = place[copies] - place[source]
    window = np.zeros(images.shape[2:], dtype=bool)
    top, left = np.maximum(place[source] - 1, 0)
    window[top : place[source, 0] + side + 1, left : place[source, 1] + side + 1] = True
    near, far = (
        float(np.median(_differences(images[which], images[source], np.resize(ways, (len(which), 2)), window)))
        for which in (copies, rest)
    )
    return float(np.log((far + NOISE) / (near + NOISE)))


def _differences(images: np.ndarray, source: np.ndarray, ways: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Return the mean squared differences (n,) of moved images from the source, outside of the source's window."""
    rows, columns = (ways[:, axis, None] + np.arange(window.shape[axis]) for axis in (0, 1))
    inside = ((rows >= 0) & (rows < window.shape[0]))[:, :, None] & ((columns >= 0) & (columns < window.shape[1]))[
        :, None
    ]
    used = inside & ~window
    squares = ((cut_windows(images, ways, window.shape) - source) ** 2).mean(axis=1)
    return (squares * used).sum(axis=(1, 2)) / np.maximum(used.sum(axis=(1, 2)), 1)


def _distinct(found: list[Repeated]) -> list[Repeated]:
    """Return one of all that are found in the same samples, or some of them: the clearest, or a larger one nearly so.

    A window that shows only a part of the mark may have fewer copies.
    """
    kept: list[Repeated] = []
    for each in found:
        same = next((i for i, other in enumerate(kept) if _same(each.member, other.member)), None)
        if same is None:
            kept.append(each)
        elif each.member.sum() > kept[same].member.sum() and each.strength >= NEARLY * kept[same].strength:
            kept[same] = each
    return sorted(kept, key=lambda each: -each.strength)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a & b).sum() >= OVERLAP * min(a.sum(), b.sum()))


def _odd(length: float) -> int:
    return max(3, 2 * round((length - 1) / 2) + 1)
