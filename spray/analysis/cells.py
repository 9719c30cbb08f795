"""Approximate neighbours: the samples fall into cells around centres, and only cells that lie near are searched.

An inverted file (Jégou, Douze and Schmid, "Product quantization for nearest neighbor search", 2011, section IV),
searched cell by cell: all samples of a cell look through the same cells, so that it's products of matrices. How many
cells is chosen by how far away, in cells, the true neighbours of a few samples lie.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spray.analysis.neighbor_search import BLOCK, Screen, in_threads, smallest

CELL = 128
"""Samples of a cell on average, of up to 262,144 samples; the square root of their number / 4 of more.

Small cells enclose neighbours more tightly, but each sample is compared with the centres of all.
"""
LEAST = 1024
"""Samples that every cell looks through at least."""


class Cells(NamedTuple):
    """A partition of n points into L cells.

    Attributes
    ----------
    order : ndarray of int64
        (n,), the points sorted by cell.
    starts : ndarray of int64
        (L + 1,), where each cell starts in `order`.
    cell : ndarray of int64
        (n,), the cell of each point.
    near : ndarray of int32
        (L, L), the cells sorted by their centres' distance from each; itself comes first.
    reach : ndarray of int64
        (L, L): how many points the first cells of each row of `near` hold together.
    """

    order: np.ndarray
    starts: np.ndarray
    cell: np.ndarray
    near: np.ndarray
    reach: np.ndarray


def partition(screen: Screen, seed: int) -> Cells:
    """Return cells around the centres that a few steps of k-means find from a sample of the points."""
    points, n = screen.points, len(screen.points)
    rng = np.random.default_rng(seed)
    n_cells = max(2, n // max(CELL, round(n**0.5 / 4)))
    sample = points[np.sort(rng.choice(n, min(n, 20 * n_cells), replace=False))]
    centres = sample[rng.choice(len(sample), n_cells, replace=False)]
    for _ in range(4):
        cell = _nearest(sample, centres)
        order = np.argsort(cell, kind="stable")
        there, first = np.unique(cell[order], return_index=True)
        # Centres without a point go.
        sums = np.add.reduceat(sample[order], first, axis=0, dtype=np.float64)
        centres = (sums / np.bincount(cell, minlength=len(centres))[there, None]).astype(np.float32)
    there, cell = np.unique(_nearest(points, centres), return_inverse=True)
    centres = centres[there].astype(np.float64)
    length = (centres**2).sum(axis=1)
    apart = length[:, None] + length - 2 * centres @ centres.T
    np.fill_diagonal(apart, -1)
    near = np.argsort(apart, axis=1, kind="stable").astype(np.int32)
    sizes = np.bincount(cell)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Cells(np.argsort(cell, kind="stable"), starts, cell, near, np.cumsum(sizes[near], axis=1))


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the nearest centre of each point."""
    half = np.einsum("ij,ij->i", centres, centres) / 2
    cell = np.empty(len(points), np.int64)
    step = max(64, BLOCK // len(centres))

    def assign(at: int) -> None:
        block = points[at : at + step] @ centres.T
        np.subtract(half, block, out=block)
        cell[at : at + step] = block.argmin(axis=1)

    in_threads(assign, range(0, len(points), step))
    return cell


def needed_reach(cells: Cells, rows: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
    """Return how many points the cell of each row must look through to see each of the row's true neighbours."""
    home = cells.cell[rows]
    rank = np.empty(cells.near[home].shape, np.int32)
    np.put_along_axis(rank, cells.near[home], np.arange(rank.shape[1], dtype=np.int32)[None], axis=1)
    return np.take_along_axis(
        cells.reach[home], np.take_along_axis(rank, cells.cell[neighbors], axis=1).astype(np.int64), axis=1
    )


def search_cells(screen: Screen, cells: Cells, count: int, reach: int) -> np.ndarray:
    """Return, of each point, `count` others that lie near, among at least `reach` points of the cells around it.

    Returns
    -------
    ndarray of int32
        (n, count), in no order.
    """
    points, half = screen.points[cells.order], screen.half[cells.order]
    n = len(points)
    reach = min(n, max(reach, LEAST, 4 * count))
    candidates = np.empty((n, count), np.int32)

    def search(home: int) -> None:
        n_near = int(np.searchsorted(cells.reach[home], reach)) + 1
        near = np.sort(cells.near[home, :n_near])
        columns = np.concatenate([np.arange(cells.starts[c], cells.starts[c + 1]) for c in near])
        others, other_half = points[columns].T, half[columns]
        first, last = cells.starts[home], cells.starts[home + 1]
        own = int(np.searchsorted(columns, first)) - first
        # Twice as many rows at a time as elsewhere: for each block the columns are laid out anew.
        step = max(64, 2 * BLOCK // len(columns))
        for at in range(first, last, step):
            block = points[at : min(at + step, last)] @ others
            np.subtract(other_half, block, out=block)
            here = np.arange(len(block))
            block[here, here + at + own] = np.inf
            candidates[cells.order[at : at + len(block)]] = cells.order[columns[smallest(block, count)]]

    in_threads(search, range(len(cells.starts) - 1))
    return candidates
