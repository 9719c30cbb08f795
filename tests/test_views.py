"""Further views: what is scaled, what is compared at the peak, and that rare and moved artifacts cluster in them."""

from __future__ import annotations

import numpy as np
import pytest

from spray.analysis.views import FLOOR, LIMIT, STEPS, scaled, view_features, view_labelings

N = 200


def maps(seed: int = 0, n: int = N) -> np.ndarray:
    """Heatmaps with relevance in the middle, of varying strength."""
    rng = np.random.default_rng(seed)
    found = np.zeros((n, 1, 16, 16), np.float32)
    found[:, :, 4:12, 4:12] = rng.normal(1, 0.5, size=(n, 1, 8, 8))
    return found


def test_scaled_is_the_distance_from_the_median_in_deviations() -> None:
    X = np.random.default_rng(0).normal(3, [0.5, 2, 8], size=(400, 3))
    expected = np.zeros_like(X)
    for j in range(3):
        middle = sorted(X[:, j])[199:201]
        middle = sum(middle) / 2
        deviations = sorted(abs(x - middle) for x in X[:, j])[199:201]
        expected[:, j] = (X[:, j] - middle) / (1.4826 * sum(deviations) / 2 + FLOOR * np.abs(X).mean())
    np.testing.assert_allclose(scaled(X), np.clip(expected, -LIMIT, LIMIT), rtol=1e-5)
    np.testing.assert_allclose(scaled(7 * X), scaled(X), rtol=1e-5)
    assert not scaled(np.zeros((5, 3))).any()
    assert scaled(np.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize(("view", "moved"), [("scaled", False), ("peak", True)])
def test_a_rare_or_moved_artifact_makes_a_cluster_of_its_own(view: str, moved: bool) -> None:
    X, member = maps(), np.arange(N) < 16
    rng = np.random.default_rng(3)
    for i in np.flatnonzero(member):
        row, column = rng.integers(1, 12, size=2) if moved else (0, 0)
        X[i, 0, row : row + 3, column : column + 3] = 20 * np.eye(3) if moved else 0.5
    features = view_features(view, lambda: [X[:90], X[90:]], N)
    found = view_labelings(view, features, [2, 4])
    assert list(found) == [f"{view}-kmeans-02", f"{view}-kmeans-04"]
    overlaps = [
        ((labels == label) & member).sum() / ((labels == label) | member).sum()
        for labels in found.values()
        for label in range(4)
    ]
    assert max(overlaps) > 0.9


def test_what_speaks_against_the_class_is_no_peak() -> None:
    X = maps()
    against = X.copy()
    against[:20, 0, 0, 0] = -50
    first, second = (view_features("peak", lambda X=X: [X], N) for X in (X, against))
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_samples_without_relevance_are_noise() -> None:
    X = maps()
    X[:7] = 0
    for labels in view_labelings("peak", view_features("peak", lambda: [X], N), [3]).values():
        assert (labels[:7] == -1).all()
        assert (labels[7:] >= 0).all()
    none = view_labelings("peak", np.zeros((9, 4)), [2])
    assert (none["peak-kmeans-02"] == -1).all()
    assert set(STEPS) == {"scaled", "peak"}
