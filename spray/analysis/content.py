"""What the images of a cluster of heatmaps have in common where the relevance is: the mark of an artifact.

Natural kinds of images make clusters too: bags with and without handles, boots with and without heels. Their heatmaps
are alike, and their images vary everywhere. An artifact is the same in all its images at the place of the relevance,
while what is around it varies as it does in the rest of the class. Images that are near-duplicates are alike at the
place and around it, so that neither they nor flat surfaces pass for artifacts.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import gaussian_filter

SIDE = 32
"""Images with longer sides are best averaged down to about so many pixels."""

REACH = 2
"""By how many pixels an image's window may be moved to match the others'."""

NOISE = 0.03**2
"""Mean squared difference that nobody would see, of pixels in [0, 1]."""

MOST, STARTS, AVERAGED, ROUNDS = 150, 12, 64, 2
"""Samples of the cluster, and of the rest, that are looked at; members tried as first template; members that the
template is the median of; turns of aligning."""


def relevance_peaks(relevance: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    """Return where each heatmap has the most positive relevance after a blur.

    Parameters
    ----------
    relevance : ndarray
        (n, H, W).
    sigma : float
        Of the blur, in pixels.

    Returns
    -------
    ndarray of int64
        (n, 2): row and column.
    """
    return separate_peaks(relevance, 1, sigma)[:, 0]


def separate_peaks(relevance: np.ndarray, number: int, sigma: float = 1.0) -> np.ndarray:
    """Return where each heatmap (n, H, W) has most positive relevance, int64 (n, number, 2), a tenth of it apart."""
    blurred = gaussian_filter(np.maximum(relevance, 0), (0, sigma, sigma))
    n, height, width = blurred.shape
    apart = max(2, round(min(height, width) / 10))
    rows, columns = np.ogrid[:height, :width]
    found = []
    for _ in range(number):
        at = np.stack(np.unravel_index(blurred.reshape(n, -1).argmax(axis=1), (height, width)), axis=1)
        found.append(at)
        near = (abs(rows - at[:, 0, None, None]) <= apart) & (abs(columns - at[:, 1, None, None]) <= apart)
        blurred[near] = -1
    return np.stack(found, axis=1)


def place_of_gain(relevance: np.ndarray, member: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    """Return the pixel (2,) where a cluster's mean share of positive relevance exceeds the rest's the most."""
    share = np.maximum(relevance, 0) / np.maximum(np.abs(relevance).sum(axis=(1, 2), keepdims=True), 1e-30)
    gain = gaussian_filter(share[member].mean(axis=0) - share[~member].mean(axis=0), sigma)
    return np.array(np.unravel_index(gain.argmax(), gain.shape))


def shared_content(
    images: np.ndarray, relevance: np.ndarray, member: np.ndarray, peaks: np.ndarray | None = None
) -> float:
    """Return how much more alike a cluster's images are where the relevance is than around it, beside the class.

    At each place a window is compared with a template, the median over the cluster of windows that are moved by up
    to two pixels to match it. With d the median over samples of the mean squared difference, the result is

        log (d_rest + e) / (d_cluster + e)  inside the window, less the same of a ring around it,

    where e is what nobody would see. Two places are tried, and the better one counts: where each sample has most
    relevance (an artifact that is somewhere else in each image), and where the cluster has more of it than the rest
    (one at a fixed place, though other parts may have more relevance).

    Parameters
    ----------
    images : ndarray
        (n, C, H, W) in [0, 1]: of a class, or some of it.
    relevance : ndarray
        (n, H, W): their heatmaps.
    member : ndarray of bool
        (n,): who is in the cluster.
    peaks : ndarray of int, optional
        (n, 2): the heatmaps' `relevance_peaks`, if they are known.

    Returns
    -------
    float
        0 or less where the cluster's content varies as much as the rest's; 0 if one side has fewer than two samples.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    if images.ndim != 4 or relevance.shape != (len(images), *images.shape[2:]) or member.shape != (len(images),):
        raise ValueError(f"images {images.shape}, relevance {relevance.shape} and members {member.shape} do not fit")
    if member.sum() < 2 or (~member).sum() < 2:
        return 0.0
    gain = place_of_gain(relevance, member)
    some = np.sort(np.concatenate([spread_evenly(np.flatnonzero(side), MOST) for side in (member, ~member)]))
    peaks = relevance_peaks(relevance[some]) if peaks is None else peaks[some]
    images, member = images[some], member[some]
    return max(_at(images, places, member) for places in (peaks, np.tile(gain, (len(images), 1))))


def window_sides(height: int, width: int) -> tuple[int, int]:
    """Return the odd sides of the window and of the ring around it: about a quarter and a half of an image's."""
    unit = 2 * max(1, round(min(height, width) / 9))
    return unit + 1, 2 * unit + 1


def _at(images: np.ndarray, places: np.ndarray, member: np.ndarray) -> float:
    inner, outer = window_sides(*images.shape[2:])
    side = outer + 2 * REACH
    wide = cut_windows(images, places - side // 2, (side, side))
    margin = (outer - inner) // 2
    core = wide[:, :, margin : wide.shape[2] - margin, margin : wide.shape[3] - margin]
    shifts = all_windows(core, inner)
    template = _template(shifts, member)
    distances, best = _distances(shifts, template[None])
    distance = distances[:, 0]
    rows, columns = np.divmod(best[:, 0], 2 * REACH + 1)
    around = sliding_window_view(wide, (outer, outer), axis=(2, 3))[np.arange(len(images)), :, rows, columns]
    ring = np.ones((outer, outer), dtype=bool)
    ring[margin:-margin, margin:-margin] = False
    ringed = around[:, :, ring].reshape(len(images), -1)
    typical = np.median(_spread(ringed, member), axis=0)
    other = ((ringed - typical) ** 2).mean(axis=1)
    return _ratio(distance, member) - _ratio(other, member)


def cut_windows(images: np.ndarray, corners: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return windows (n, C, h, w) from their upper left corners (n, 2); border pixels continue an image."""
    rows, columns = (
        np.clip(corners[:, axis, None] + np.arange(shape[axis]), 0, images.shape[2 + axis] - 1) for axis in (0, 1)
    )
    cut: np.ndarray = images[np.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.transpose(0, 3, 1, 2)


def all_windows(images: np.ndarray, side: int) -> np.ndarray:
    """Return the windows of `side` pixels at each of their places in images, (n, places, C * side * side)."""
    found = sliding_window_view(images, (side, side), axis=(2, 3))
    return found.transpose(0, 2, 3, 1, 4, 5).reshape(len(images), found.shape[2] * found.shape[3], -1)


def _template(shifts: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Return the median of the members' windows, aligned, from the member on that most others come close to."""
    some = _spread(shifts, member)
    starts = some[:: max(1, len(some) // STARTS), shifts.shape[1] // 2]
    distances, _ = _distances(some, starts)
    template = starts[int(np.median(distances, axis=0).argmin())]
    for _ in range(ROUNDS):
        _, best = _distances(some, template[None])
        template = np.median(some[np.arange(len(some)), best[:, 0]], axis=0)
    return template


def _distances(shifts: np.ndarray, templates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each sample's mean squared difference (n, t) from templates (t, p) at its best shift, and that shift."""
    squares = np.einsum("nsp,nsp->ns", shifts, shifts)[:, :, None]
    distances = (squares - 2 * shifts @ templates.T + (templates**2).sum(axis=1)) / shifts.shape[2]
    return np.maximum(distances.min(axis=1), 0), distances.argmin(axis=1)


def _spread(values: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Return the members' values, or of many members some that are spread evenly."""
    return values[spread_evenly(np.flatnonzero(member), AVERAGED)]


def spread_evenly(indices: np.ndarray, most: int) -> np.ndarray:
    """Return at most so many of some indices (n,), spread evenly over them."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).round().astype(np.int64)]


def _ratio(distance: np.ndarray, member: np.ndarray) -> float:
    return float(np.log((np.median(distance[~member]) + NOISE) / (np.median(distance[member]) + NOISE)))
