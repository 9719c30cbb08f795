"""The separability against a generalised eigenproblem built in loops, its closed forms and its invariances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh

from spray.analysis import separability
from spray.analysis.fisher import scatter

seeds = st.integers(0, 10_000)


def slow_scatter(X: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    d = X.shape[1]
    mean = np.array([sum(X[:, j]) / len(X) for j in range(d)])
    between, within = np.zeros((d, d)), np.zeros((d, d))
    for label in set(labels.tolist()):
        members = [x for x, other in zip(X, labels, strict=True) if other == label]
        center = sum(members) / len(members)
        for a in range(d):
            for b in range(d):
                between[a, b] += len(members) * (center[a] - mean[a]) * (center[b] - mean[b])
                within[a, b] += sum((x[a] - center[a]) * (x[b] - center[b]) for x in members)
    return between, within


def sample(seed: int, n: int = 60, d: int = 4, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    mixing = np.linalg.qr(rng.normal(size=(d, d)))[0] * rng.uniform(0.5, 2, d)
    return rng.normal(size=(n, d)) @ mixing + rng.normal(size=(k, d))[labels], labels


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=seeds, d=st.integers(1, 6), k=st.integers(2, 5))
def test_equals_the_largest_generalised_eigenvalue(seed: int, d: int, k: int) -> None:
    X, labels = sample(seed, 50, d, k)
    between, within = slow_scatter(X, labels)
    np.testing.assert_allclose(scatter(X, labels)[0], between, atol=1e-9)
    np.testing.assert_allclose(scatter(X, labels)[1], within, atol=1e-9)
    expected = eigh(between, within, eigvals_only=True).max()
    assert separability(X, labels) == pytest.approx(expected, rel=1e-4)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=seeds)
def test_two_clusters_have_a_closed_form(seed: int) -> None:
    X, labels = sample(seed, k=2)
    a, b = X[labels == 0], X[labels == 1]
    difference = a.mean(axis=0) - b.mean(axis=0)
    within = (a - a.mean(axis=0)).T @ (a - a.mean(axis=0)) + (b - b.mean(axis=0)).T @ (b - b.mean(axis=0))
    expected = len(a) * len(b) / len(X) * difference @ np.linalg.inv(within) @ difference
    assert separability(X, labels) == pytest.approx(expected, rel=1e-4)


def test_no_direction_does_better() -> None:
    X, labels = sample(7)
    between, within = slow_scatter(X, labels)
    directions = np.random.default_rng(0).normal(size=(2000, 4))
    ratios = [w @ between @ w / (w @ within @ w) for w in directions]
    best = separability(X, labels)
    assert max(ratios) <= best * (1 + 1e-6)
    assert max(ratios) > 0.9 * best


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=seeds, shift=st.floats(-100, 100))
def test_linear_maps_shifts_and_names_of_clusters_do_not_matter(seed: int, shift: float) -> None:
    X, labels = sample(seed)
    rng = np.random.default_rng(seed + 1)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    mapped = X @ rotation @ np.diag(rng.uniform(0.1, 10, 4)) + shift
    order = rng.permutation(len(X))
    expected = separability(X, labels)
    assert separability(mapped, labels) == pytest.approx(expected, rel=1e-4)
    assert separability(X[order], 10 - labels[order]) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, derandomize=True)
@given(scale=st.floats(1e-8, 1e8))
def test_units_do_not_matter(scale: float) -> None:
    X, labels = sample(3)
    assert separability(scale * X, labels) == pytest.approx(separability(X, labels), rel=1e-6)


def test_noise_is_left_out() -> None:
    X, labels = sample(1)
    far = np.concatenate([X, np.full((5, 4), 1e4)])
    marked = np.concatenate([labels, np.full(5, -1)])
    assert separability(far, marked) == separability(X, labels)
    assert separability(X, np.where(labels == 2, -1, labels)) == separability(X[labels != 2], labels[labels != 2])


def test_known_numbers() -> None:
    X = np.array([[0.0], [2.0], [10.0], [12.0]])
    assert separability(X, np.array([0, 0, 1, 1])) == pytest.approx(100 / 4)
    assert separability(X, np.array([0, 1, 1, 0])) == pytest.approx(0, abs=1e-12)


def test_degenerate_cases() -> None:
    X = np.random.default_rng(0).normal(size=(10, 3))
    assert separability(X, np.zeros(10, dtype=int)) == 0
    assert separability(X, np.full(10, -1)) == 0
    assert separability(X, np.array([0] * 5 + [-1] * 5)) == 0
    assert separability(np.ones((10, 3)), np.arange(10) % 2) == 0
    assert separability(np.array([[0.0], [0.0], [1.0]]), np.array([0, 0, 1])) == float("inf")


def test_a_column_without_any_variance_changes_nothing() -> None:
    X, labels = sample(4)
    padded = np.concatenate([X, np.full((60, 1), 3.0)], axis=1)
    assert separability(padded, labels) == pytest.approx(separability(X, labels), rel=1e-6)


def test_more_columns_than_samples_are_finite() -> None:
    X = np.random.default_rng(0).normal(size=(6, 30))
    assert 1e3 < separability(X, np.array([0, 0, 0, 1, 1, 1])) < np.inf


@pytest.mark.parametrize(
    ("X", "labels", "message"),
    [
        (np.ones((3, 2)), np.zeros(4), "need an embedding"),
        (np.ones(3), np.zeros(3), "need an embedding"),
        (np.array([[0.0], [np.nan]]), np.array([0, 1]), "NaN"),
        (np.array([[0.0], [np.inf]]), np.array([0, 1]), "NaN or infinity"),
    ],
)
def test_refuses_what_does_not_fit(X: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        separability(X, labels)
