"""Heatmap features against a slow computation, and the maps that have no sum to divide by."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spray.analysis import heatmap_features


def slow_features(relevance: np.ndarray, grid: int) -> np.ndarray:
    n, channels, height, width = relevance.shape
    rows, columns = min(grid, height), min(grid, width)
    out = np.zeros((n, rows, columns))
    for i in range(n):
        for r in range(rows):
            for c in range(columns):
                top, bottom = r * height // rows, -(-(r + 1) * height // rows)
                left, right = c * width // columns, -(-(c + 1) * width // columns)
                cells = [
                    sum(float(relevance[i, channel, y, x]) for channel in range(channels))
                    for y in range(top, bottom)
                    for x in range(left, right)
                ]
                out[i, r, c] = sum(cells) / len(cells)
        total = np.abs(out[i]).sum()
        if total > 0:
            out[i] /= total
    return out.reshape(n, -1)


@pytest.mark.parametrize(
    ("height", "width", "grid"), [(8, 8, 16), (8, 8, 8), (12, 8, 4), (10, 7, 4), (5, 9, 6), (3, 3, 1)]
)
def test_equals_the_slow_computation(height: int, width: int, grid: int) -> None:
    relevance = np.random.default_rng(0).normal(size=(4, 3, height, width)).astype(np.float32)
    features = heatmap_features(relevance, grid)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, slow_features(relevance, grid), atol=1e-6)


@settings(deadline=None, derandomize=True)
@given(scale=st.floats(1e-12, 1e12), seed=st.integers(0, 50))
def test_scale_does_not_count_but_sign_does(scale: float, seed: int) -> None:
    relevance = np.random.default_rng(seed).normal(size=(3, 2, 6, 6)).astype(np.float32)
    features = heatmap_features(relevance, 4)
    np.testing.assert_allclose(heatmap_features(relevance * np.float32(scale), 4), features, atol=1e-6)
    np.testing.assert_allclose(heatmap_features(-relevance, 4), -features, atol=1e-7)
    np.testing.assert_allclose(np.abs(features).sum(axis=1), 1, atol=1e-5)


def test_a_map_whose_signed_sum_is_zero_or_negative_keeps_its_signs() -> None:
    relevance = np.array([[[[1.0, -1.0], [2.0, -2.0]]], [[[-3.0, 1.0], [0.0, 0.0]]]])
    expected = [[1 / 6, -1 / 6, 2 / 6, -2 / 6], [-0.75, 0.25, 0, 0]]
    np.testing.assert_allclose(heatmap_features(relevance), expected, atol=1e-7)


def test_a_map_without_relevance_stays_zero_beside_others() -> None:
    relevance = np.zeros((3, 1, 4, 4), dtype=np.float32)
    relevance[1, 0, 2, 2] = 5
    features = heatmap_features(relevance, 4)
    np.testing.assert_array_equal(features[[0, 2]], 0)
    assert features[1].max() == 1


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_takes_arrays_and_tensors_of_any_float_type(kind: type) -> None:
    relevance = np.random.default_rng(1).normal(size=(2, 3, 5, 5)).astype(kind)
    np.testing.assert_array_equal(heatmap_features(relevance), heatmap_features(torch.from_numpy(relevance)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(bad: float) -> None:
    relevance = np.ones((2, 1, 4, 4))
    relevance[1, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        heatmap_features(relevance)
