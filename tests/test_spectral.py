"""The spectral embedding against a dense computation in loops, and on graphs whose spectrum is known."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from spray.analysis import eigen, eigengap, spectral_embedding
from spray.analysis.spectral import graph_embedding, neighbor_graph
from spray.errors import UserError


def slow_graph(X: np.ndarray, k: int) -> np.ndarray:
    n = len(X)
    B = np.zeros((n, n))
    for i in range(n):
        others = sorted((float(((X[i] - X[j]) ** 2).sum()), j) for j in range(n) if j != i)
        for _, j in others[:k]:
            B[i, j] = 1
    return (B + B.T) / 2


def laplacian(A: np.ndarray) -> np.ndarray:
    n = len(A)
    degree = A.sum(axis=1)
    L = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            L[i, j] = ((degree[i] if i == j else 0) - A[i, j]) / np.sqrt(degree[i] * degree[j])
    return L


def cloud(n: int, d: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def blocks(sizes: list[int], seed: int = 0, apart: float = 100.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(size=(size, 4)) + apart * i for i, size in enumerate(sizes)])


@pytest.mark.parametrize(("n", "k"), [(2, 1), (12, 3), (40, 10), (6, 10)])
def test_the_graph_equals_the_slow_one(n: int, k: int) -> None:
    X = cloud(n)
    np.testing.assert_array_equal(neighbor_graph(X, k).toarray(), slow_graph(X, k))


def test_duplicates_are_neighbours_of_each_other_and_never_of_themselves() -> None:
    X = np.repeat(cloud(8), 6, axis=0)
    A = neighbor_graph(X, 3).toarray()
    assert not A.diagonal().any()
    np.testing.assert_array_equal((A > 0)[:6, 6:], False)
    np.testing.assert_array_equal(A, A.T)
    assert A.sum() == 48 * 3
    assert set(np.unique(A)) <= {0, 0.5, 1}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(n=st.integers(2, 60), k=st.integers(1, 12), m=st.integers(1, 40), seed=st.integers(0, 1000))
def test_equals_the_dense_computation(n: int, k: int, m: int, seed: int) -> None:
    X = cloud(n, 3, seed)
    eigenvalues, embedding = spectral_embedding(X, k, m)
    assert eigenvalues.shape == (min(m, n),)
    assert embedding.shape == (n, min(m, n))
    L = laplacian(slow_graph(X, k))
    np.testing.assert_allclose(eigenvalues, np.linalg.eigh(L)[0][:m], atol=1e-10)
    np.testing.assert_allclose(L @ embedding, embedding * eigenvalues, atol=1e-9)
    np.testing.assert_allclose(embedding.T @ embedding, np.eye(min(m, n)), atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_iterative_solver_finds_the_same_pairs(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    X = np.concatenate([cloud(150, 3, seed), cloud(90, 3, seed + 10) + 100, cloud(12, 3, seed + 20) - 100])
    expected = spectral_embedding(X, 8, 20)
    monkeypatch.setattr(eigen, "DENSE", 50)
    eigenvalues, embedding = spectral_embedding(X, 8, 20, seed=seed)
    np.testing.assert_allclose(eigenvalues, expected[0], atol=1e-8)
    L = laplacian(neighbor_graph(X, 8).toarray())
    np.testing.assert_allclose(L @ embedding, embedding * eigenvalues, atol=1e-6)
    np.testing.assert_allclose(embedding.T @ embedding, np.eye(20), atol=1e-6)


def test_counts_components_even_where_an_iterative_solver_would_miss_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigen, "DENSE", 20)
    X = blocks([60] * 10)
    for seed in range(5):
        eigenvalues, embedding = spectral_embedding(X, 8, 16, seed=seed)
        assert (eigenvalues < 1e-9).sum() == 10
        assert eigenvalues[10] > 1e-3
        # Every zero's eigenvector lives on one component, where it is sqrt(degree).
        assert sorted((np.abs(embedding[:, :10]) > 1e-12).sum(axis=0)) == [60] * 10
        assert eigengap(eigenvalues, largest=15) == 10


def test_many_small_components_make_no_more_columns_than_asked_for() -> None:
    X = np.repeat(1000.0 * np.arange(300)[:, None], 3, axis=0)
    eigenvalues, embedding = spectral_embedding(X, 2, 32)
    assert embedding.shape == (900, 32)
    np.testing.assert_allclose(eigenvalues, 0, atol=1e-12)
    np.testing.assert_allclose(embedding.T @ embedding, np.eye(32), atol=1e-12)


def test_duplicated_samples_have_a_proper_spectrum() -> None:
    X = np.repeat(cloud(5), 12, axis=0)
    eigenvalues, embedding = spectral_embedding(X, 10, 32)
    assert np.isfinite(embedding).all()
    assert (eigenvalues < 1e-9).sum() == 5
    # A clique of twelve, nearly: everything else lies near n / (n - 1).
    assert eigenvalues[5] > 0.9


def test_a_complete_graph_has_its_known_spectrum() -> None:
    eigenvalues, _ = spectral_embedding(cloud(9), n_neighbors=30, n_components=30)
    np.testing.assert_allclose(eigenvalues, [0] + [9 / 8] * 8, atol=1e-12)


def test_of_more_components_than_columns_the_largest_are_kept() -> None:
    sizes = [12, 30, 12, 50, 12, 41]
    eigenvalues, embedding = spectral_embedding(blocks(sizes), 5, 3)
    np.testing.assert_array_equal(eigenvalues, 0)
    part = np.repeat(np.arange(6), sizes)
    assert [set(part[column != 0]) for column in embedding.T] == [{3}, {5}, {1}]


def test_equally_large_components_come_in_the_order_of_their_samples() -> None:
    X = blocks([12] * 6)
    order = np.random.default_rng(0).permutation(72)
    _, embedding = spectral_embedding(X[order], 5, 6)
    first = [int(np.flatnonzero(column)[0]) for column in embedding.T]
    assert first == sorted(first)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_metric_and_the_search_are_passed_on(metric: str) -> None:
    X = cloud(150) + 3
    lengths = np.linalg.norm(X, axis=1, keepdims=True)
    graph = slow_graph(X / lengths if metric == "cosine" else X, 6)
    np.testing.assert_array_equal(neighbor_graph(X, 6, metric, "cells").toarray(), graph)
    eigenvalues, embedding = spectral_embedding(X, 6, 8, metric=metric, method="cells")
    np.testing.assert_allclose(laplacian(graph) @ embedding, embedding * eigenvalues, atol=1e-9)
    with pytest.raises(UserError, match="no neighbour search"):
        spectral_embedding(X, method="other")


def test_single_precision_spans_what_a_dense_computation_does(monkeypatch: pytest.MonkeyPatch) -> None:
    X = np.concatenate([cloud(700, 3), cloud(500, 3, 1) + 4, cloud(60, 3, 2) + 100])
    L = laplacian(neighbor_graph(X, 8).toarray())
    values, vectors = np.linalg.eigh(L)
    monkeypatch.setattr(eigen, "DOUBLE", 100)
    eigenvalues, embedding = spectral_embedding(X, 8, 20)
    assert list(eigenvalues[:2]) == [0, 0]
    np.testing.assert_allclose(eigenvalues, values[:20], atol=1e-8)
    np.testing.assert_allclose(embedding.T @ embedding, np.eye(20), atol=1e-12)
    assert np.linalg.norm(L @ embedding - embedding * eigenvalues, axis=0).max() < 1e-4
    assert np.linalg.svd(vectors[:, :20].T @ embedding)[1].min() > 1 - 1e-5


@pytest.mark.parametrize("double", [100, 10**6])
def test_the_same_bits_whatever_the_number_of_threads(monkeypatch: pytest.MonkeyPatch, double: int) -> None:
    monkeypatch.setattr(eigen, "DOUBLE", double)
    X, found = cloud(1500, 4), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            with threadpool_limits(count):
                found.append(spectral_embedding(X, 10, 12))
    finally:
        torch.set_num_threads(threads)
    for eigenvalues, embedding in found[1:]:
        np.testing.assert_array_equal(eigenvalues, found[0][0])
        np.testing.assert_array_equal(embedding, found[0][1])


def test_thousands_of_components_take_no_time() -> None:
    X = np.repeat(np.random.default_rng(0).normal(size=(5000, 3)), 4, axis=0)
    start = time.process_time()
    eigenvalues, embedding = spectral_embedding(X, 3, 32)
    assert time.process_time() - start < 20
    np.testing.assert_array_equal(eigenvalues, 0)
    np.testing.assert_array_equal((embedding != 0).sum(axis=0), 4)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_a_path_has_its_known_spectrum(n: int) -> None:
    """The normalised Laplacian of a path has the eigenvalues 1 - cos(πk / (n - 1))."""
    path = csr_matrix(np.diag(np.ones(n - 1), 1) + np.diag(np.ones(n - 1), -1))
    eigenvalues, embedding = graph_embedding(path, 32)
    np.testing.assert_allclose(eigenvalues, 1 - np.cos(np.pi * np.arange(n) / max(1, n - 1)), atol=1e-12)
    assert embedding.shape == (n, n)


def test_an_embedding_has_at_least_one_dimension() -> None:
    assert spectral_embedding(cloud(30), 5, 1)[1].shape == (30, 1)
    with pytest.raises(UserError, match="n_components=0"):
        spectral_embedding(cloud(30), 5, 0)


def test_signs_are_fixed_and_runs_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    X = cloud(80)
    first, second = spectral_embedding(X, 6, 12), spectral_embedding(X, 6, 12)
    np.testing.assert_array_equal(first[1], second[1])
    largest = first[1][np.abs(first[1]).argmax(axis=0), np.arange(12)]
    assert (largest > 0).all()
    monkeypatch.setattr(eigen, "DENSE", 10)
    for seed in range(4):
        np.testing.assert_allclose(spectral_embedding(X, 6, 12, seed=seed)[1], first[1], atol=1e-5)


def test_order_of_the_samples_does_not_matter() -> None:
    X, order = cloud(50), np.random.default_rng(5).permutation(50)
    values, vectors = spectral_embedding(X, 6, 8)
    shuffled_values, shuffled = spectral_embedding(X[order], 6, 8)
    np.testing.assert_allclose(shuffled_values, values, atol=1e-10)
    np.testing.assert_allclose(np.abs(shuffled), np.abs(vectors[order]), atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_what_is_not_finite(bad: float) -> None:
    X = cloud(20)
    X[3, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        spectral_embedding(X)


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (5,)])
def test_refuses_too_few_samples(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two samples"):
        neighbor_graph(np.ones(shape))


def test_leaves_its_input_alone() -> None:
    X = cloud(30)
    before = X.copy()
    spectral_embedding(X)
    np.testing.assert_array_equal(X, before)


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_the_eigengap_counts_planted_clusters(k: int) -> None:
    rng = np.random.default_rng(k)
    centers = 12 * np.eye(k, 8)
    X = np.concatenate([rng.normal(size=(40, 8)) + center for center in centers])
    assert eigengap(spectral_embedding(X, 10, 16)[0]) == k


def test_the_eigengap_stays_in_its_range() -> None:
    values = np.array([0, 0.9, 0.91, 0.92, 0.95, 0.96, 1.5, 1.6])
    assert eigengap(values) == 6
    assert eigengap(values, largest=5) == 4
    assert eigengap(values, smallest=1) == 1
    assert eigengap(values, smallest=3, largest=4) == 4
    assert eigengap(values[:3]) == 2
    assert eigengap(values[:2]) == 1


def test_the_graph_is_sparse() -> None:
    graph = neighbor_graph(cloud(300), 5)
    assert isinstance(graph, csr_matrix)
    assert graph.nnz <= 2 * 300 * 5
