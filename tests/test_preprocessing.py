"""Heatmap features against a slow computation, maps that have no sum to divide by, and steps streamed from a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from sklearn.metrics import adjusted_rand_score

from spray.analysis import cluster, heatmap_features, spectral_embedding
from spray.analysis.clustering import spectral_rows
from spray.analysis.preprocessing import Preprocessing
from spray.errors import UserError


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


def features(steps: Sequence[object], relevance: np.ndarray, size: int = 50) -> np.ndarray:
    def batches() -> Iterator[np.ndarray]:
        for at in range(0, len(relevance), size):
            yield relevance[at : at + size]

    return Preprocessing(steps).features(batches, len(relevance)).values


def test_the_default_steps_are_those_of_heatmap_features() -> None:
    relevance = np.random.default_rng(3).normal(size=(9, 3, 20, 30)).astype(np.float32)
    found = features(["sum", {"pool": 7}, "normalize_sum"], relevance, 4)
    np.testing.assert_array_equal(found, heatmap_features(relevance, 7))
    default = Preprocessing().features(lambda: [relevance], 9).values
    np.testing.assert_array_equal(default, heatmap_features(relevance))


@pytest.mark.parametrize("steps", [["sum", "pool", "normalize_sum"], ["normalize_l2"], ["histogram"], []])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_steps_refuse_what_is_not_finite(steps: list[str], bad: float) -> None:
    relevance = np.ones((4, 1, 5, 5), np.float32)
    relevance[2, 0, 1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        features(steps, relevance)


def test_a_fitted_step_reads_once_more_and_learns_from_samples_with_relevance_only() -> None:
    rng = np.random.default_rng(0)
    relevance = rng.normal(size=(40, 1, 6, 6)).astype(np.float32) + 3
    relevance[::4] = 0
    passes: list[int] = []

    def batches() -> Iterator[np.ndarray]:
        passes.append(0)
        yield from np.array_split(relevance, 3)

    steps = Preprocessing(["positive", {"pca": 4}, "normalize_l2"])
    found = steps.features(batches, 40)
    assert len(passes) == steps.passes == 2
    np.testing.assert_array_equal(found.used, np.arange(40) % 4 > 0)
    alone = Preprocessing(["positive", {"pca": 4}, "normalize_l2"]).features(lambda: [relevance[found.used]], 30)
    np.testing.assert_allclose(found.values[found.used], alone.values, atol=1e-4)
    np.testing.assert_array_equal(found.values[~found.used], 0)


def test_two_fitted_steps_see_what_the_first_has_made() -> None:
    relevance = np.random.default_rng(0).normal(size=(30, 12)).astype(np.float32)
    twice = features([{"pca": 6}, {"pca": 3}], relevance)
    np.testing.assert_allclose(np.abs(twice), np.abs(features([{"pca": 3}], relevance)), atol=1e-4)


def test_what_positive_leaves_nothing_of_is_not_used() -> None:
    relevance = np.stack([np.full((1, 3, 3), value, np.float32) for value in (1, -1, 2)])
    found = Preprocessing(["sum", "positive", "normalize_sum"]).features(lambda: [relevance], 3)
    assert found.used.tolist() == [True, False, True]


def test_samples_none_of_which_has_relevance() -> None:
    found = Preprocessing(["sum", {"pca": 3}]).features(lambda: [np.zeros((2, 1, 4, 4))] * 3, 6)
    assert not found.used.any()
    assert not found.values.any()


def test_no_samples_at_all() -> None:
    found = Preprocessing(["sum", "pca"]).features(lambda: [], 0)
    assert (found.values.shape[0], found.used.shape) == (0, (0,))


def test_steps_that_do_not_fit_each_other_are_refused_before_anything_is_read() -> None:
    assert Preprocessing(["sum", "pool", "normalize_sum"]).width((3, 224, 224)) == 256
    assert Preprocessing(["normalize_sum", {"pca": 8}]).width((512,)) == 8
    with pytest.raises(
        UserError, match=r"steps\[2\]=pool needs heatmaps, not vectors of 20 values; put it before marg"
    ):
        Preprocessing(["sum", "marginals", "pool"]).width((3, 10, 10))


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("steps", [["sum", "pool", "normalize_sum"], ["sum", "histogram"], ["sum", "pool", {"pca": 8}]])
def test_maps_are_never_in_memory_together(tmp_path: Path, steps: list[object]) -> None:
    from spray.pipelines.analyze import read_features
    from spray.store import open_attributions

    n, shape = 600, (3, 224, 224)
    with h5py.File(tmp_path / "maps.h5", "w") as file:
        maps = file.create_dataset("attribution", (n, *shape), np.float32, chunks=(1, *shape))
        part = np.random.default_rng(0).normal(size=(60, *shape)).astype(np.float32)
        for at in range(0, n, 60):
            maps[at : at + 60] = part
    del part
    whole = n * 4 * int(np.prod(shape))
    with open_attributions(tmp_path / "maps.h5") as attributions:
        read_features(attributions, np.arange(20), Preprocessing(steps))  # what is loaded once
        Path("/proc/self/clear_refs").write_text("5")
        before = resident()
        found = read_features(attributions, np.arange(n), Preprocessing(steps))
        taken = resident() - before
    assert found.values.shape[0] == n
    assert whole > 360e6
    # A few times the 16 MiB that are read at once, in whatever form a step needs them.
    assert taken < 160 << 20


def planted(place: str, n: int = 300, side: int = 28, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Heatmaps of objects near the middle, a fifth of them with a tag of fine structure; the fifth."""
    rng = np.random.default_rng(seed)
    tagged = np.arange(n) < n // 5
    tag = np.indices((4, 4)).sum(axis=0) % 2 * 1.5 - 0.25
    maps = np.zeros((n, 1, side, side), np.float32)
    for i in range(n):
        blobs = np.zeros((side, side))
        for _ in range(rng.integers(3, 7)):
            y, x = rng.normal(side / 2, side / 6, 2).clip(1, side - 2).astype(int)
            blobs[y, x] += rng.normal(0.6, 0.6)
        blobs = gaussian_filter(blobs, rng.uniform(1.2, 2.5))
        noise = gaussian_filter(rng.normal(size=(side, side)), 0.7)
        maps[i, 0] = blobs / np.abs(blobs).sum() + 0.3 * noise / np.abs(noise).sum()
        if tagged[i]:
            y, x = rng.integers(0, side - 3, 2) if place == "random" else (1, 2)
            maps[i, 0, y : y + 4, x : x + 4] += tag / np.abs(tag).sum()
        maps[i] *= rng.lognormal()
    return maps, tagged


PLAIN = ["sum", "pool", "normalize_sum"]
# The least adjusted Rand index with a tag at a fixed and at a random place. A tag upon the object isn't always the
# strongest relevance there is: then `peak` cuts out something else.
LEAST = {
    "plain": (PLAIN, 0.9, None),
    "histogram": (["sum", "histogram"], 0.85, 0.85),
    "spectrum": (["sum", "spectrum", "normalize_sum"], 0.9, 0.9),
    "peak": (["sum", "absolute", "normalize_sum", "peak"], 0.85, 0.6),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", LEAST)
def test_an_artifact_at_a_random_place_is_a_cluster_where_place_does_not_count(kind: str, seed: int) -> None:
    steps, *least = LEAST[kind]
    for place, bound in zip(("fixed", "random"), least, strict=True):
        maps, tagged = planted(place, seed=seed)
        _, embedding = spectral_embedding(features(steps, maps))
        agreement = adjusted_rand_score(tagged, cluster(spectral_rows(embedding, 2), n_clusters=2))
        if bound is None:
            assert agreement < 0.1
        else:
            assert agreement > bound
