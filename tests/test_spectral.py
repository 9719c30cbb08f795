"""The spectral embedding against a dense computation in loops, and on graphs whose spectrum is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from spray.analysis import eigen, eigengap, spectral_embedding
from spray.analysis.spectral import neighbor_graph


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
