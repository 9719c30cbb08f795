"""Candidates for nearest neighbours: products of blocks of rows, and a choice of the smallest in each.

A search screens with inner products of centred rows in single precision, maybe of their principal components, and
keeps a few more candidates than asked for; `rerank` then compares these by differences of the rows themselves.
Everything is computed in blocks by as many threads as torch uses, each with a BLAS of one: the results have the same
bits whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from spray.analysis.threads import one_blas_thread
from spray.analysis.vectors import Vectors

Task = TypeVar("Task")
Result = TypeVar("Result")

BLOCK = 1 << 19
"""Inner products at a time and thread: two megabytes, which stay in the cache."""
COLUMNS = 1 << 14
"""Columns of a block of inner products."""
GROUP = 8


class Screen(NamedTuple):
    """What inner products are taken of.

    Attributes
    ----------
    points : ndarray of float32
        (n, q): the centred rows, or their first principal components.
    half : ndarray of float32
        (n,): half the squared lengths of the centred rows, also where `points` are only components: what the
        components leave out is nearly orthogonal from row to row, so lengths tell more than nothing.
    basis : ndarray of float32 or None
        (d, q), orthonormal columns; None where `points` are the rows themselves.
    """

    points: np.ndarray
    half: np.ndarray
    basis: np.ndarray | None = None


def in_threads(function: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
    """Return what `function` gives for every task, in torch's number of threads, each with a BLAS of one thread."""
    threads = torch.get_num_threads()
    with one_blas_thread():
        if threads == 1:
            return [function(task) for task in tasks]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, tasks))


def whole(vectors: Vectors) -> Screen:
    """Return the screen that leaves nothing out."""
    points = np.empty((len(vectors), vectors.width), np.float32)
    half = np.empty(len(vectors), np.float32)

    def prepare(rows: slice) -> None:
        points[rows] = vectors.centred(rows)
        half[rows] = np.einsum("ij,ij->i", points[rows], points[rows]) / 2

    in_threads(prepare, vectors.blocks())
    return Screen(points, half)


def components(vectors: Vectors, rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return an orthonormal basis (d, most) of the leading principal components of some rows.

    Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, algorithm 4.4 with two iterations.
    """
    sample = vectors.centred(rows)
    start = np.random.default_rng(seed).standard_normal((sample.shape[1], min(most + 16, *sample.shape)))
    with one_blas_thread():
        basis = start.astype(np.float32)
        for _ in range(3):
            basis = np.linalg.qr(sample.T @ (sample @ basis))[0]
        _, _, turned = np.linalg.svd(sample @ basis, full_matrices=False)
        return np.ascontiguousarray((basis @ turned.T)[:, :most])


def reduced(vectors: Vectors, basis: np.ndarray) -> Screen:
    """Return the screen of the components along `basis`."""
    points = np.empty((len(vectors), basis.shape[1]), np.float32)
    half = np.empty(len(vectors), np.float32)

    def prepare(rows: slice) -> None:
        centred = vectors.centred(rows)
        np.matmul(centred, basis, out=points[rows])
        half[rows] = np.einsum("ij,ij->i", centred, centred) / 2

    in_threads(prepare, vectors.blocks())
    return Screen(points, half, basis)


def smallest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the columns of the `count` smallest entries of each row, in no order.

    The smallest entries of a row lie in those of its groups of columns whose minima are smallest: the minima of
    groups are soon found, and few groups remain to be looked at.
    """
    n_rows, width = values.shape
    stride = width // GROUP
    if stride < 4 * count:
        return np.argpartition(values, count - 1, axis=1)[:, :count] if count < width else _all_columns(values)
    minima = np.minimum(values[:, :stride], values[:, stride : 2 * stride])
    for group in range(2, GROUP):
        np.minimum(minima, values[:, group * stride : (group + 1) * stride], out=minima)
    chosen = np.argpartition(minima, count - 1, axis=1)[:, :count]
    columns = (chosen[:, :, None] + stride * np.arange(GROUP)).reshape(n_rows, -1)
    if rest := width - GROUP * stride:
        columns = np.concatenate([columns, np.tile(np.arange(width - rest, width), (n_rows, 1))], axis=1)
    among = _pick(values, columns)
    return _pick(columns, np.argpartition(among, count - 1, axis=1)[:, :count])


def _all_columns(values: np.ndarray) -> np.ndarray:
    return np.tile(np.arange(values.shape[1]), (len(values), 1))


def _pick(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return what `take_along_axis` of the rows does, sooner."""
    return values.ravel().take(columns + values.shape[1] * np.arange(len(values))[:, None])


def exhaustive(screen: Screen, count: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return, of each row, the `count` others that the screen says are nearest, and the greatest score among them.

    Parameters
    ----------
    screen : Screen
        Of n points.
    count : int
        At most n - 1.
    rows : ndarray of int, optional
        The rows to search for; by default all.

    Returns
    -------
    candidates : ndarray of int64
        (len(rows), count), in no order.
    worst : ndarray of float32
        (len(rows),): a score is half the squared distance, less half the squared length of the row.
    """
    points, half = screen.points, screen.half
    n = len(points)
    rows = np.arange(n) if rows is None else rows
    candidates, worst = np.empty((len(rows), count), np.int64), np.empty(len(rows), points.dtype)
    width = min(n, COLUMNS)
    step = max(32, BLOCK // width)

    def search(at: int) -> None:
        mine = rows[at : at + step]
        best, scores = np.empty((len(mine), 0), np.int64), np.empty((len(mine), 0), points.dtype)
        for left in range(0, n, width):
            right = min(left + width, n)
            block = points[mine] @ points[left:right].T
            np.subtract(half[left:right], block, out=block)
            inside = np.flatnonzero((mine >= left) & (mine < right))
            block[inside, mine[inside] - left] = np.inf
            found = smallest(block, min(count, right - left))
            best = np.concatenate([best, found + left], axis=1)
            scores = np.concatenate([scores, _pick(block, found)], axis=1)
            if best.shape[1] > count:
                kept = smallest(scores, count)
                best, scores = _pick(best, kept), _pick(scores, kept)
        candidates[at : at + step], worst[at : at + step] = best, scores.max(axis=1)

    in_threads(search, range(0, len(rows), step))
    return candidates, worst


def against_all(vectors: Vectors, rows: np.ndarray, count: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Do what `exhaustive` does for few rows in the precision of `dtype`, without all samples prepared at once."""
    queries = vectors.centred(rows, dtype)

    def search(part: slice) -> tuple[np.ndarray, np.ndarray]:
        left, right = part.start, part.stop
        others = vectors.centred(part, dtype)
        block = np.einsum("ij,ij->i", others, others) / 2 - queries @ others.T
        inside = np.flatnonzero((rows >= left) & (rows < right))
        block[inside, rows[inside] - left] = np.inf
        found = smallest(block, min(count, right - left))
        return found + left, _pick(block, found)

    parts = in_threads(search, vectors.blocks())
    best, scores = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    kept = smallest(scores, count)
    return _pick(best, kept), _pick(scores, kept).max(axis=1)


def on_device(screen: Screen, count: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Do what `exhaustive` does for all rows with torch, on `device`."""
    points, half = torch.from_numpy(screen.points).to(device), torch.from_numpy(screen.half).to(device)
    n = len(points)
    candidates, worst = np.empty((n, count), np.int64), np.empty(n, np.float32)
    step = max(1, (1 << 28) // n)
    with torch.no_grad():
        for at in range(0, n, step):
            block = torch.addmm(half, points[at : at + step], points.T, alpha=-1)
            here = torch.arange(len(block), device=device)
            block[here, here + at] = torch.inf
            scores, found = block.topk(count, dim=1, largest=False, sorted=False)
            candidates[at : at + step] = found.cpu().numpy()
            worst[at : at + step] = scores.amax(dim=1).cpu().numpy()
    return candidates, worst


def rerank(
    vectors: Vectors, candidates: np.ndarray, k: int, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` nearest candidates of each row, by differences, ties by index, and their squared distances.

    Parameters
    ----------
    vectors : Vectors
        The samples.
    candidates : ndarray of int
        (len(rows), c); -1 where there is none.
    k : int
        At most c.
    rows : ndarray of int, optional
        The rows; by default all.

    Returns
    -------
    tuple of ndarray
        Indices (len(rows), k) int64 and squared distances (len(rows), k) float64, ascending.
    """
    rows = np.arange(len(vectors)) if rows is None else rows
    indices, squared = np.empty((len(rows), k), np.int64), np.empty((len(rows), k))
    step = max(1, BLOCK // max(1, candidates.shape[1] * vectors.width))

    def compare(at: int) -> None:
        some = np.sort(candidates[at : at + step], axis=1)
        others = vectors.take(some.ravel()).reshape(*some.shape, -1)
        others -= vectors.take(rows[at : at + step])[:, None]
        distance = np.einsum("ijk,ijk->ij", others, others).astype(np.float64)
        distance[some < 0] = np.inf
        order = np.argsort(distance, axis=1, kind="stable")[:, :k]
        indices[at : at + step], squared[at : at + step] = _pick(some, order), _pick(distance, order)

    in_threads(compare, range(0, len(rows), step))
    return indices, squared
