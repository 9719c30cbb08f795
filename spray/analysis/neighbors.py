"""Nearest neighbours of heatmaps and the graph that SpRAy makes of them.

Three ways, of which `method="auto"` takes the one that costs least:

- "exact": all inner products, in blocks. The only one on a GPU, and for few samples.
- "cells": only the samples of cells that lie near; its recall is measured on a few samples and logged.
- "pynndescent": NN-descent (Dong, Moses and Li, 2011). It's compiled anew in each process, which takes half a minute,
  longer than "cells" takes for a few hundred thousand samples, and its neighbours depend on the number of threads:
  "auto" never chooses it.

Where rows are long, the screening may take principal components instead; how many is chosen by the recall that they
give on a few samples. Whatever the screening, neighbours are then chosen by the true distances.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix

from spray.analysis.cells import Cells, needed_reach, partition, search_cells
from spray.analysis.neighbor_search import (
    Screen,
    against_all,
    components,
    exhaustive,
    on_device,
    reduced,
    rerank,
    whole,
)
from spray.analysis.vectors import Vectors
from spray.errors import UserError

log = logging.getLogger(__name__)

METHODS = ("auto", "exact", "cells", "pynndescent")
MARGIN = 6
"""Candidates beyond the neighbours asked for, which make up for the rounding of single precision."""
CELLS_FROM = 20_000
"""Distinct samples from which cells cost less than all pairs."""
PLAN_FROM = 3e8
"""Nanoseconds of the whole exact search below which nothing sooner is looked for."""
PROBES = 256
"""Samples whose true neighbours tell the recall."""
RECALL = 0.98
"""Recall asked of principal components, and again of cells: together at least 0.96 of the neighbours are found."""
LARGEST_REACH = {True: 16_384, False: 8_192}
"""Samples that a cell looks through at most, by whether principal components are screened."""
COARSE = 32
"""Principal components that cells are made of where all dimensions are screened: a quarter of the time for a million
samples of 256 dimensions, and with less noise in their centres cells enclose neighbours more tightly."""


class Plan(NamedTuple):
    """How to screen, and what is known of it.

    Attributes
    ----------
    screen : Screen
        What to take products of.
    n_candidates : int
        Candidates of each sample.
    probes : ndarray of int64
        (p,), samples whose true neighbours are known.
    truth : ndarray of int64
        (p, k), those neighbours.
    radius : ndarray of float64
        (p,), the squared distance of the last of them.
    coarse : Screen or None
        What cells may be made of instead.
    """

    screen: Screen
    n_candidates: int
    probes: np.ndarray
    truth: np.ndarray
    radius: np.ndarray
    coarse: Screen | None = None


def nearest_neighbors(
    X: np.ndarray,
    n_neighbors: int,
    metric: str = "euclidean",
    method: str = "auto",
    seed: int = 0,
    device: torch.device | str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest neighbours of each sample, without itself.

    Parameters
    ----------
    X : ndarray
        (n, d), n at least 2, finite.
    n_neighbors : int
        At most n - 1 are taken: k.
    metric : str
        "euclidean" or "cosine". A row of zeros, which has no direction, has cosine distance 1 from all others than
        rows of zeros.
    method : str
        "auto", "exact", "cells" or "pynndescent".
    seed : int
        Of what is approximate. The same seed gives the same result, whatever the number of threads.
    device : torch.device or str, optional
        A CUDA device makes "auto" search exactly, on it.

    Returns
    -------
    indices : ndarray of int64
        (n, k), nearest first. Of identical samples, those of lowest index come first.
    distances : ndarray of float64
        (n, k).

    Raises
    ------
    UserError
        If there is no such metric or method, or `n_neighbors` is less than 1.
    ValueError
        If `X` holds NaN or infinity, or fewer than two samples.

    Notes
    -----
    Memory above that of `X`: n · (q + c) · 4 bytes, with q the principal components (at most 256, or d where they
    lose too much; twice that for cells) and c the candidates (k + 6 to 4 k), and 50 MB a thread.
    """
    if method not in METHODS:
        raise UserError(f"there is no neighbour search {method!r}; there are {', '.join(METHODS)}")
    if n_neighbors < 1:
        raise UserError(f"n_neighbors={n_neighbors}: a graph needs at least 1 neighbour of each sample")
    vectors = Vectors(X, metric)
    k = min(n_neighbors, vectors.n_samples - 1)
    distinct = min(k, len(vectors) - 1)
    if distinct == 0:
        found = np.empty((len(vectors), 0), np.int64), np.empty((len(vectors), 0))
    else:
        found = _search(vectors, distinct, method, seed, torch.device(device or "cpu"))
    indices, squared = vectors.expand(*found, k)
    return indices, vectors.distances(squared)


def neighbor_recall(
    X: np.ndarray, indices: np.ndarray, metric: str = "euclidean", n_probes: int = PROBES, seed: int = 0
) -> float:
    """Return the share of true nearest neighbours among those found, measured on a few samples.

    Parameters
    ----------
    X : ndarray
        (n, d).
    indices : ndarray of int
        (n, k), of `nearest_neighbors`.
    metric : str
        The metric.
    n_probes : int
        Samples whose neighbours are compared with the true ones.
    seed : int
        Draws them.
    """
    vectors = Vectors(X, metric)
    probes = np.random.default_rng(seed).choice(len(X), min(n_probes, len(X)), replace=False)
    own, k = vectors.group[probes], indices.shape[1]
    distinct = min(k, len(vectors) - 1)
    true = np.zeros((len(probes), k))
    if distinct:
        found, squared = _true_neighbors(vectors, own, distinct)
        # As many copies of the sample itself come first as there are.
        for row, (group, others) in enumerate(zip(own, found, strict=True)):
            groups = np.concatenate([[group], others])
            copies = vectors.starts[groups + 1] - vectors.starts[groups] - (groups == group)
            true[row] = np.repeat(np.concatenate([[0], squared[row]]), copies)[:k]
    got = np.stack(
        [
            ((vectors.take(vectors.group[indices[probe]]) - vectors.take(group[None])) ** 2).sum(
                axis=1, dtype=np.float64
            )
            for probe, group in zip(probes, own, strict=True)
        ]
    )
    return float((got <= true[:, -1:] * (1 + 1e-5)).mean())


def neighbor_graph(
    X: np.ndarray,
    n_neighbors: int = 10,
    metric: str = "euclidean",
    method: str = "auto",
    seed: int = 0,
    device: torch.device | str | None = None,
) -> csr_matrix:
    """Return the symmetric affinity A = (B + Bᵀ)/2 of the k-nearest-neighbour graph B.

    Parameters are those of `nearest_neighbors`, and so are the errors.

    Returns
    -------
    csr_matrix of float64
        (n, n), with weights 1/2 and 1 and an empty diagonal.
    """
    return affinity_of(nearest_neighbors(X, n_neighbors, metric, method, seed, device)[0])


def affinity_of(indices: np.ndarray) -> csr_matrix:
    """Return the symmetric affinity A = (B + Bᵀ)/2 of neighbours found: `indices` (n, k) of `nearest_neighbors`."""
    n, k = indices.shape
    starts = np.arange(n + 1, dtype=np.int64) * k
    graph = csr_matrix((np.full(n * k, 0.5), indices.ravel(), starts), shape=(n, n))
    graph = csr_matrix(graph + graph.T)
    graph.sort_indices()
    return graph


def _search(vectors: Vectors, k: int, method: str, seed: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Return the neighbours among distinct samples and their squared distances."""
    n = len(vectors)
    if method == "exact" or (
        method == "auto" and (device.type != "cpu" or _nanoseconds(n, n, vectors.width) < PLAN_FROM)
    ):
        return _exact(vectors, k, device)
    if method == "pynndescent":
        found, squared = rerank(vectors, _descend(vectors, k, seed), k)
        lacking = np.flatnonzero(np.isinf(squared[:, -1]))
        if len(lacking):
            found[lacking], squared[lacking] = _true_neighbors(vectors, lacking, k)
        return found, squared
    plan = _plan(vectors, k, seed, cells=method == "cells" or n >= CELLS_FROM)
    if method == "cells" or n >= CELLS_FROM:
        cells, reach = _cells(plan, seed)
        candidates = search_cells(plan.screen, cells, plan.n_candidates, reach)
        how = f"cells of {len(cells.starts) - 1:,}, {reach:,} samples looked through"
    elif plan.screen.basis is None:
        del plan
        return _exact(vectors, k, device)
    else:
        candidates, _ = exhaustive(plan.screen, plan.n_candidates)
        how = "all pairs"
    found, squared = rerank(vectors, candidates, k)
    recall = float((squared[plan.probes] <= plan.radius[:, None] * (1 + 1e-6)).mean())
    width = "all" if plan.screen.basis is None else f"{plan.screen.points.shape[1]} components of"
    log.log(
        logging.INFO if recall >= 0.9 else logging.WARNING,
        "neighbours of %d samples by %s, %s %d dimensions, %d candidates: recall %.3f on %d samples",
        n, how, width, vectors.width, plan.n_candidates, recall, len(plan.probes),
    )  # fmt: skip
    return found, squared


def _cells(plan: Plan, seed: int) -> tuple[Cells, int]:
    """Return cells, and how many samples each has to look through."""
    most = LARGEST_REACH[plan.screen.basis is not None]
    found = []
    for screen in (plan.coarse, plan.screen):
        if screen is not None:
            cells = partition(screen, seed)
            needed = np.sort(needed_reach(cells, plan.probes, plan.truth), axis=None)
            found.append((int(needed[int(np.ceil(RECALL * len(needed))) - 1]), cells))
            if found[-1][0] <= most:
                break
    reach, cells = min(found, key=lambda each: each[0])
    return cells, min(reach, most)


def _nanoseconds(rows: int, columns: float, width: int) -> float:
    """Return about what products of so many rows with so many columns and the choice among them take, of one core."""
    return rows * columns * (0.02 * width + 1)


def _exact(vectors: Vectors, k: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Return the neighbours that comparing all pairs gives."""
    screen = whole(vectors)
    count = min(k + MARGIN, len(vectors) - 1)
    found = exhaustive(screen, count) if device.type == "cpu" else on_device(screen, count, device)
    del screen
    return _sure(vectors, np.arange(len(vectors)), *found, k)


def _true_neighbors(vectors: Vectors, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the neighbours of a few rows that comparing them with all gives."""
    return _sure(vectors, rows, *against_all(vectors, rows, min(k + MARGIN, len(vectors) - 1), np.float32), k)


def _sure(
    vectors: Vectors, rows: np.ndarray, candidates: np.ndarray, worst: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest candidates; rows that single precision may have denied some search again in double.

    Products of rows of length r are wrong by about r² · 2^-24 · √d: where samples lie far from each other but next to
    their neighbours, that may be more than the distance of neighbours.
    """
    found, squared = rerank(vectors, candidates, k, rows)
    if candidates.shape[1] == len(vectors) - 1:
        return found, squared
    half = np.empty(len(rows))
    for at in range(0, len(rows), 4096):
        taken = vectors.centred(rows[at : at + 4096])
        half[at : at + 4096] = np.einsum("ij,ij->i", taken, taken) / 2
    slack = 2 * half * 2.0**-24 * max(8, np.sqrt(vectors.width))
    unsure = np.flatnonzero(squared[:, -1] / 2 > half + worst - slack)
    for at in range(0, len(unsure), 1024):
        some = unsure[at : at + 1024]
        again, _ = against_all(vectors, rows[some], candidates.shape[1], np.float64)
        found[some], squared[some] = rerank(vectors, again, k, rows[some])
    return found, squared


def _plan(vectors: Vectors, k: int, seed: int, cells: bool) -> Plan:
    """Choose what to screen by what it costs, among what finds the true neighbours of a few samples."""
    n, d = len(vectors), vectors.width
    rng = np.random.default_rng(seed)
    probes = np.sort(rng.choice(n, min(PROBES, n), replace=False))
    truth, squared = _true_neighbors(vectors, probes, k)
    counts = [min(c, n - 1) for c in (k + MARGIN, 2 * k + 4, 4 * k + 4)]
    partners = min(n, LARGEST_REACH[True] / 2) if cells else n
    best, cost, screen, coarse = (d, counts[0]), _nanoseconds(n, partners, d), None, None
    rows = np.sort(rng.choice(n, min(2048, n), replace=False))
    # Few components are soon had, and mostly enough.
    for most in sorted({min(64, d // 4), min(256, d // 4)}):
        if most < 16 or screen is not None:
            break
        basis = components(vectors, rows, most, seed)
        points, half, _ = reduced(vectors, basis)
        for q in (q for q in (16, 32, 64, 128, 256) if most // 4 <= q <= points.shape[1]):
            found, _ = exhaustive(_first(points, half, basis, q), counts[-1], probes)
            order = np.argsort(_scores(points[:, :q], half, probes, found), axis=1, kind="stable")
            hit = (np.take_along_axis(found, order, axis=1)[:, :, None] == truth[:, None, :]).any(axis=2)
            for count in counts:
                # A candidate costs a row of the samples, from anywhere in memory.
                price = _nanoseconds(n, partners, q) + n * count * d * 1.2
                if hit[:, :count].sum() >= RECALL * truth.size and price < cost:
                    best, cost = (q, count), price
        if best[0] < d:
            screen, coarse = _first(points, half, basis, best[0]), None
        elif cells and coarse is None:
            # What the components leave out counts in the choice of neighbours, but not in that of a cell.
            coarse = _first(points, np.zeros_like(half), basis, COARSE)
        # Not all of the components and all of the samples at once.
        del points
    return Plan(screen or whole(vectors), best[1], probes, truth, squared[:, -1], coarse)


def _first(points: np.ndarray, half: np.ndarray, basis: np.ndarray, q: int) -> Screen:
    """Return the screen of the first `q` components."""
    return Screen(np.ascontiguousarray(points[:, :q]), half, basis[:, :q])


def _scores(points: np.ndarray, half: np.ndarray, rows: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return the screen's score of each candidate found."""
    return half[found] - np.einsum("ijk,ik->ij", points[found], points[rows])


def _descend(vectors: Vectors, k: int, seed: int) -> np.ndarray:
    """Return candidates (n, k + 1) of pynndescent; -1 in place of the sample itself."""
    from pynndescent import NNDescent

    n = len(vectors)
    points = whole(vectors).points
    threads = torch.get_num_threads()
    try:
        # More threads would find other neighbours.
        index = NNDescent(points, n_neighbors=min(k + 1 + MARGIN, n), random_state=seed, n_jobs=1)
        candidates = index.neighbor_graph[0].astype(np.int64)
    finally:
        # Numba sets the number of OpenMP threads, which torch shares, and with it the rounding of what follows.
        torch.set_num_threads(threads)
    candidates[candidates == np.arange(n)[:, None]] = -1
    return candidates
