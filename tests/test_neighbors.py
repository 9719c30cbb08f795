"""Nearest neighbours against comparisons of all pairs in loops and scikit-learn's, for every way to search."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse.csgraph import connected_components
from sklearn.metrics.pairwise import cosine_distances
from sklearn.neighbors import NearestNeighbors

from spray.analysis import cells, neighbor_search, neighbors
from spray.analysis.neighbors import nearest_neighbors, neighbor_graph, neighbor_recall
from spray.analysis.vectors import Vectors
from spray.errors import UserError

METRICS = ["euclidean", "cosine"]


def cloud(n: int, d: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def manifold(n: int, d: int, seed: int = 0, noise: float = 0.02) -> np.ndarray:
    """Points on a curved surface of three dimensions, among d."""
    rng = np.random.default_rng(seed)
    waves = np.sin(rng.uniform(-2, 2, size=(n, 3)) @ rng.normal(size=(3, d)) + rng.uniform(0, 6, d))
    return (waves + noise * rng.normal(size=(n, d))).astype(np.float32)


def all_distances(X: np.ndarray, metric: str) -> np.ndarray:
    """From the definition, in double precision, pair by pair; nothing is its own neighbour."""
    X = X.astype(np.float64)
    D = np.empty((len(X), len(X)))
    for i, x in enumerate(X):
        for j, y in enumerate(X):
            if metric == "euclidean":
                D[i, j] = np.sqrt(((x - y) ** 2).sum())
            elif not x.any() or not y.any():
                D[i, j] = float(x.any() or y.any())
            else:
                D[i, j] = 1 - x @ y / np.sqrt((x @ x) * (y @ y))
    np.fill_diagonal(D, np.inf)
    return D


def assert_nearest(X: np.ndarray, k: int, metric: str, indices: np.ndarray, distances: np.ndarray, tol: float) -> None:
    """Assert that the rows are valid nearest neighbours, whichever is taken of those at equal distance."""
    n, D = len(X), all_distances(X, metric)
    assert indices.shape == distances.shape == (n, min(k, n - 1))
    scale = max(1.0, D[np.isfinite(D)].max()) if n > 1 else 1.0
    for i in range(n):
        assert len(set(indices[i])) == len(indices[i])
        np.testing.assert_allclose(distances[i], D[i, indices[i]], atol=tol * scale)
        np.testing.assert_allclose(distances[i], np.sort(D[i])[: indices.shape[1]], atol=tol * scale)
    assert (np.diff(distances, axis=1) >= 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "d", "k"), [(2, 3, 1), (2, 3, 10), (11, 4, 10), (40, 7, 3), (90, 1, 5), (150, 20, 12)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_the_loops(n: int, d: int, k: int, metric: str, dtype: type) -> None:
    X = cloud(n, d).astype(dtype)
    assert_nearest(X, k, metric, *nearest_neighbors(X, k, metric), 1e-5 if dtype == np.float32 else 1e-7)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    X=arrays(np.float64, st.tuples(st.integers(2, 25), st.integers(1, 4)), elements=st.integers(-2, 2)),
    k=st.integers(1, 30),
    metric=st.sampled_from(METRICS),
    method=st.sampled_from(["exact", "cells"]),
)
def test_equals_the_loops_where_many_distances_are_equal(X: np.ndarray, k: int, metric: str, method: str) -> None:
    indices, distances = nearest_neighbors(X, k, metric, method)
    assert_nearest(X, k, metric, indices, distances, 1e-7)
    # Among identical samples the first are taken.
    for i in range(len(X)):
        same = [j for j in range(len(X)) if j != i and (X[j] == X[i]).all()][: indices.shape[1]]
        if metric == "euclidean":
            assert indices[i, : len(same)].tolist() == same


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [500, 3000])
def test_exact_equals_scikit_learn(n: int, metric: str) -> None:
    X = manifold(n, 30)
    indices, distances = nearest_neighbors(X, 10, metric, "exact")
    true, _ = NearestNeighbors(n_neighbors=10, metric=metric, algorithm="brute").fit(X.astype(np.float64)).kneighbors()
    np.testing.assert_allclose(distances, true, rtol=1e-4, atol=1e-6)
    assert not (indices == np.arange(n)[:, None]).any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("kind", "d"), [("manifold", 96), ("round", 12)])
def test_cells_find_what_they_promise(kind: str, d: int, metric: str) -> None:
    X = manifold(6000, d) if kind == "manifold" else cloud(6000, d).astype(np.float32)
    indices, distances = nearest_neighbors(X, 10, metric, "cells")
    search = NearestNeighbors(n_neighbors=10, metric=metric, algorithm="brute").fit(X.astype(np.float64))
    true, true_indices = search.kneighbors()
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(indices, true_indices, strict=True)])
    assert recall >= 0.95
    assert (distances >= true - 1e-5).all()
    assert abs(neighbor_recall(X, indices, metric, 1000) - recall) < 0.02


def test_principal_components_are_used_where_they_keep_the_neighbours(caplog: pytest.LogCaptureFixture) -> None:
    X = manifold(6000, 400, noise=0.01)
    with caplog.at_level(logging.INFO, logger="spray.analysis.neighbors"):
        indices, _ = nearest_neighbors(X, 10)
    assert "components of 400 dimensions" in caplog.text
    true = NearestNeighbors(n_neighbors=10, algorithm="brute").fit(X.astype(np.float64)).kneighbors()[1]
    assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(indices, true, strict=True)]) >= 0.96


def test_principal_components_are_not_used_where_they_lose_the_neighbours() -> None:
    X = cloud(4000, 1100).astype(np.float32)
    indices, _ = nearest_neighbors(X, 10)
    assert neighbor_recall(X, indices, n_probes=500) == 1


@pytest.mark.parametrize("method", ["exact", "auto"])
def test_far_apart_clusters_keep_their_inner_order(method: str) -> None:
    """Products in single precision know nothing of what lies within a cluster here."""
    X = np.concatenate([cloud(60, 3, 1), cloud(60, 3, 2) + 1e5, cloud(60, 3, 3) - 3e5])
    indices, distances = nearest_neighbors(X, 5, method=method)
    true = NearestNeighbors(n_neighbors=5, algorithm="kd_tree").fit(X).kneighbors()
    np.testing.assert_allclose(distances, true[0], rtol=1e-9)
    np.testing.assert_array_equal(indices, true[1])


@pytest.mark.parametrize("offset", [0, 1e6])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1, 1e12, 1e30])
def test_scale_and_place_do_not_matter(scale: float, offset: float) -> None:
    X = cloud(300, 4)
    expected = nearest_neighbors(X, 6)
    indices, distances = nearest_neighbors(scale * (X + offset), 6)
    np.testing.assert_array_equal(indices, expected[0])
    np.testing.assert_allclose(distances / scale, expected[1], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_large_and_small_numbers_of_single_precision(scale: float) -> None:
    X = cloud(300, 4).astype(np.float32)
    expected = nearest_neighbors(X, 6)
    for metric in METRICS:
        indices, distances = nearest_neighbors(X * np.float32(scale), 6, metric)
        assert np.isfinite(distances).all()
        if metric == "euclidean":
            np.testing.assert_array_equal(indices, expected[0])
        else:
            np.testing.assert_array_equal(indices, nearest_neighbors(X, 6, metric)[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, bool])
def test_takes_other_types(dtype: type) -> None:
    X = (np.random.default_rng(0).random((50, 12)) * 3).astype(dtype)
    assert_nearest(X, 4, "euclidean", *nearest_neighbors(X, 4), 1e-5)


def test_takes_views_and_leaves_its_input_alone() -> None:
    X = cloud(200, 12).astype(np.float32)
    before = X.copy()
    for metric in METRICS:
        transposed = nearest_neighbors(np.asfortranarray(X)[:, ::2], 4, metric)
        np.testing.assert_array_equal(transposed[0], nearest_neighbors(X[:, ::2].copy(), 4, metric)[0])
    np.testing.assert_array_equal(X, before)


# ------------------------------------------------------------------------------------------------------- duplicates


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", ["auto", "cells", "pynndescent"])
def test_all_samples_the_same(metric: str, method: str) -> None:
    indices, distances = nearest_neighbors(np.full((50, 3), 0.3), 4, metric, method)
    assert not distances.any()
    # The first four, or where a sample is one of them, the fifth too.
    np.testing.assert_array_equal(indices[7], [0, 1, 2, 3])
    np.testing.assert_array_equal(indices[2], [0, 1, 3, 4])
    assert connected_components(neighbor_graph(np.full((50, 3), 0.3), 4, metric))[0] == 1


def test_many_copies_hang_together_and_to_nothing_else() -> None:
    X = np.repeat(cloud(6), [1, 2, 3, 40, 200, 5], axis=0)
    X = X[np.random.default_rng(0).permutation(len(X))]
    indices, distances = nearest_neighbors(X, 4)
    assert_nearest(X, 4, "euclidean", indices, distances, 1e-9)
    _, part = connected_components(neighbor_graph(X, 4), directed=False)
    for row in np.unique(X, axis=0):
        assert len(set(part[(row == X).all(axis=1)])) == 1


def test_minus_zero_is_zero() -> None:
    X = np.array([[0.0, 1], [-0.0, 1], [0, 2], [0, 3], [0, 4]])
    assert len(Vectors(X, "euclidean")) == 4
    np.testing.assert_array_equal(nearest_neighbors(X, 1)[0][:2], [[1], [0]])


def test_equal_keys_of_different_samples_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Same:
        def integers(self, low: int, high: int, size: int, dtype: type) -> np.ndarray:
            return np.zeros(size, dtype)

    X = np.array([[1.0, 2], [2, 1], [1, 2], [3, 0], [2, 1]], np.float32)
    with monkeypatch.context() as patch:
        # Every sample's key is the sum of its words then: 1, 2 and 2, 1 collide.
        patch.setattr(np.random, "default_rng", lambda seed: Same())
        vectors = Vectors(X, "euclidean")
    np.testing.assert_array_equal(vectors.group, [0, 1, 0, 2, 3])
    np.testing.assert_array_equal(vectors.take(np.arange(4)), X[[0, 1, 3, 4]])


def test_rows_without_direction_are_alone_under_cosine() -> None:
    X = np.concatenate([cloud(30), np.zeros((3, 5)), 2 * cloud(30), np.full((2, 5), 1.0), np.full((1, 5), 7.0)])
    indices, distances = nearest_neighbors(X, 4, "cosine")
    assert_nearest(X, 4, "cosine", indices, distances, 1e-7)
    np.testing.assert_array_equal(indices[31, :2], [30, 32])
    np.testing.assert_allclose(distances[31], [0, 0, 1, 1], atol=1e-12)
    # Constant rows point the same way.
    np.testing.assert_allclose(distances[[63, 64, 65], :2], 0, atol=1e-12)
    there = X.any(axis=1)
    D = cosine_distances(X[there])
    np.fill_diagonal(D, np.inf)
    np.testing.assert_allclose(distances[there][:, 0], D.min(axis=1), atol=1e-9)


# ---------------------------------------------------------------------------------------------- the same every time


@pytest.mark.parametrize("method", ["exact", "cells", "auto"])
def test_the_same_bits_whatever_the_number_of_threads(method: str) -> None:
    X = manifold(5000, 150)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(nearest_neighbors(X, 10, method=method, seed=3))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        np.testing.assert_array_equal(other[0], found[0][0])
        np.testing.assert_array_equal(other[1], found[0][1])


def test_a_seed_fixes_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "RECALL", 0.7)
    monkeypatch.setattr(cells, "LEAST", 64)
    X = cloud(3000, 12).astype(np.float32)
    first = nearest_neighbors(X, 10, method="cells", seed=1)[0]
    np.testing.assert_array_equal(nearest_neighbors(X, 10, method="cells", seed=1)[0], first)
    assert (nearest_neighbors(X, 10, method="cells", seed=2)[0] != first).any()


@pytest.mark.slow
def test_pynndescent_leaves_the_threads_as_they_are() -> None:
    import numba
    import torch

    before, numbas = torch.get_num_threads(), numba.get_num_threads()
    X = np.random.default_rng(0).normal(size=(3000, 6)).astype(np.float32)
    torch.set_num_threads(3)
    try:
        first, _ = nearest_neighbors(X, 10, method="pynndescent")
        assert torch.get_num_threads() == 3
        assert numba.get_num_threads() == numbas
        assert neighbor_recall(X, first) > 0.97
        assert (nearest_neighbors(X, 10, method="pynndescent")[0] == first).all()
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------- the pieces


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(1, 6), width=st.integers(1, 400), data=st.data())
def test_the_smallest_of_each_row(rows: int, width: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, width))
    values = data.draw(arrays(np.float32, (rows, width), elements=st.integers(-9, 9).map(float) | st.just(np.inf)))
    found = neighbor_search.smallest(values, count)
    assert found.shape == (rows, count)
    for row, columns in zip(values, found, strict=True):
        assert len(set(columns.tolist())) == count
        np.testing.assert_array_equal(np.sort(row[columns]), np.sort(row)[:count])


def test_the_smallest_among_many_columns() -> None:
    values = np.random.default_rng(0).normal(size=(30, 1003)).astype(np.float32)
    found = np.sort(neighbor_search.smallest(values, 9), axis=1)
    np.testing.assert_array_equal(found, np.sort(np.argsort(values, axis=1)[:, :9], axis=1))


def test_columns_in_parts_and_a_torch_device_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = Vectors(cloud(700, 6), "euclidean")
    screen = neighbor_search.whole(vectors)
    expected = np.sort(neighbor_search.exhaustive(screen, 9)[0], axis=1)
    on_device, worst = neighbor_search.on_device(screen, 9, torch.device("cpu"))
    np.testing.assert_array_equal(np.sort(on_device, axis=1), expected)
    np.testing.assert_allclose(worst, neighbor_search.exhaustive(screen, 9)[1], rtol=1e-5)
    rows = np.array([3, 500, 42])
    few, _ = neighbor_search.against_all(vectors, rows, 9, np.float64)
    np.testing.assert_array_equal(np.sort(few, axis=1), expected[rows])
    monkeypatch.setattr(neighbor_search, "COLUMNS", 100)
    monkeypatch.setattr(neighbor_search, "BLOCK", 5000)
    np.testing.assert_array_equal(np.sort(neighbor_search.exhaustive(screen, 9)[0], axis=1), expected)
    np.testing.assert_array_equal(np.sort(neighbor_search.exhaustive(screen, 9, rows)[0], axis=1), expected[rows])


def test_candidates_that_are_missing_are_never_chosen() -> None:
    X = np.array([[0.0], [1], [5], [0.1]])
    vectors = Vectors(X, "euclidean")
    # Minus one would be the last sample, which is the nearest to the first.
    indices, squared = neighbor_search.rerank(vectors, np.array([[-1, 2, 1], [2, -1, -1]]), 2, np.array([0, 1]))
    np.testing.assert_array_equal(indices[0], [1, 2])
    np.testing.assert_allclose(squared, [[1, 25], [16, np.inf]])


def test_components_span_the_leading_directions() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(500, 8)) * 2.0 ** -np.arange(8) @ np.linalg.qr(rng.normal(size=(40, 40)))[0][:8]
    basis = neighbor_search.components(Vectors(X, "euclidean"), np.arange(500), 4, 0)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
    leading = np.linalg.svd(X - X.mean(axis=0), full_matrices=False)[2][:4]
    np.testing.assert_allclose(np.abs(leading @ basis), np.eye(4), atol=1e-2)


def test_cells_are_a_partition_and_know_their_reach() -> None:
    screen = neighbor_search.whole(Vectors(cloud(3000, 3), "euclidean"))
    made = cells.partition(screen, 0)
    np.testing.assert_array_equal(np.sort(made.order), np.arange(3000))
    np.testing.assert_array_equal(made.cell[made.order], np.repeat(np.arange(len(made.near)), np.diff(made.starts)))
    np.testing.assert_array_equal(made.near[:, 0], np.arange(len(made.near)))
    np.testing.assert_array_equal(made.reach[:, -1], 3000)
    assert (np.bincount(made.cell) > 0).all()
    rows, neighbors = np.array([5, 17]), np.array([[5, 900], [30, 31]])
    needed = cells.needed_reach(made, rows, neighbors)
    for i, row in enumerate(rows):
        for j, neighbor in enumerate(neighbors[i]):
            home = made.cell[row]
            rank = made.near[home].tolist().index(made.cell[neighbor])
            assert needed[i, j] == sum(np.diff(made.starts)[made.near[home, : rank + 1]])


def test_cells_of_components_where_all_dimensions_are_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of noise decides who is nearest, so that no components will do; but not in which region."""
    X = manifold(8000, 160, noise=0.4)
    made: list[int] = []

    def partition(screen: neighbor_search.Screen, seed: int) -> cells.Cells:
        made.append(screen.points.shape[1])
        return cells.partition(screen, seed)

    monkeypatch.setattr(neighbors, "partition", partition)
    indices, _ = nearest_neighbors(X, 10, method="cells")
    assert made[0] == neighbors.COARSE
    assert neighbor_recall(X, indices, n_probes=500, seed=3) >= 0.96


def test_cells_of_components_that_tell_nothing_are_made_anew() -> None:
    X = manifold(6000, 30)
    vectors = Vectors(X, "euclidean")
    probes = np.arange(0, 6000, 50)
    true = NearestNeighbors(n_neighbors=10).fit(X).kneighbors(X[probes], 11)[1][:, 1:]
    whole, noise = neighbor_search.whole(vectors), cloud(6000, 8).astype(np.float32)
    useless = neighbor_search.Screen(noise, np.zeros(6000, np.float32), np.eye(30, 8, dtype=np.float32))
    plan = neighbors.Plan(whole, 16, probes, true, np.zeros(len(probes)), useless)
    limits = {True: 16_384, False: 2_000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "LARGEST_REACH", limits)
        made, reach = neighbors._cells(plan, 0)
    np.testing.assert_array_equal(made.cell, cells.partition(whole, 0).cell)
    assert reach < 2_000


def test_the_recall_of_wrong_neighbours_is_what_is_left() -> None:
    X = cloud(400)
    indices, _ = nearest_neighbors(X, 10)
    assert neighbor_recall(X, indices) == 1
    far = np.argsort(-np.linalg.norm(X[:, None] - X, axis=2), axis=1)[:, :4]
    assert neighbor_recall(X, np.concatenate([indices[:, :6], far], axis=1)) == pytest.approx(0.6)
    # Copies of a sample are as good as each other.
    copied = np.repeat(X, 15, axis=0)
    assert neighbor_recall(copied, nearest_neighbors(copied, 10)[0]) == 1


def test_a_poor_recall_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(neighbors, "LARGEST_REACH", {True: 1, False: 1})
    monkeypatch.setattr(cells, "LEAST", 1)
    nearest_neighbors(cloud(6000, 14).astype(np.float32), 10, method="cells")
    assert caplog.records[-1].levelname == "WARNING"
    assert "recall 0." in caplog.text


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("metric", METRICS)
def test_refuses_what_is_not_finite(bad: float, metric: str) -> None:
    X = cloud(20)
    X[3, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        nearest_neighbors(X, 3, metric)


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (5,)])
def test_refuses_too_few_samples(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two samples"):
        nearest_neighbors(np.ones(shape), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "chebyshev"}, "no metric 'chebyshev'; there are euclidean, cosine"),
        ({"method": "faiss"}, "no neighbour search 'faiss'; there are auto, exact, cells, pynndescent"),
        ({"n_neighbors": 0}, "n_neighbors=0: a graph needs at least 1"),
    ],
)
def test_tells_what_there_is(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        nearest_neighbors(cloud(20), **{"n_neighbors": 3, **options})  # type: ignore[arg-type]


def test_samples_without_features_are_all_the_same() -> None:
    indices, distances = nearest_neighbors(np.empty((4, 0)), 2)
    assert indices.shape == (4, 2)
    assert not distances.any()
