"""Scores that hold out of sample, and p-values against simulations and formulas of their own."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.covariance import LedoitWolf

from spray.analysis import ranking, separability
from spray.analysis.ranking import (
    cross_fitted_projections,
    cross_fitted_separability,
    outlier_p_value,
    principal_components,
    shrunk_covariance,
    structureless_null,
    structureless_p_value,
)


def noise(n: int, d: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)) * np.linspace(1, 3, d)


def first(n: int, size: int) -> np.ndarray:
    return np.arange(n) < size


def with_cluster(n: int, size: int, offset: float, deviation: float = 1.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 30))
    X[:size] = deviation * rng.normal(size=(size, 30))
    X[:size, 0] += offset
    return X


def test_principal_components_are_those_of_the_svd() -> None:
    X = noise(40, 12)
    centered = X - X.mean(axis=0)
    left, singular, _ = np.linalg.svd(centered, full_matrices=False)
    expected = left[:, :5] * singular[:5]
    components = principal_components(X, 5)
    np.testing.assert_allclose(np.abs(components), np.abs(expected), atol=1e-9)
    assert components.dtype == np.float64
    assert principal_components(X[:4], 30).shape == (4, 4)


def test_the_randomized_solver_keeps_the_strong_directions_and_repeats() -> None:
    X = noise(300, 200)
    X[:60, :3] += 60
    components = principal_components(X)
    assert components.shape == (300, 30)
    np.testing.assert_array_equal(components, principal_components(X))
    exact = np.linalg.svd(X - X.mean(axis=0), compute_uv=False)
    assert np.linalg.norm(components[:, 0]) == pytest.approx(exact[0], rel=1e-3)


def test_equals_a_slow_cross_fit() -> None:
    X, member = with_cluster(90, 25, 2.0), first(90, 25)
    folds = ranking._folds(member, 3)
    projected = np.zeros(90)
    for fold in range(5):
        a, b = X[(folds != fold) & member], X[(folds != fold) & ~member]
        residuals = np.concatenate([a - a.mean(axis=0), b - b.mean(axis=0)])
        within = LedoitWolf(assume_centered=True).fit(residuals).covariance_
        w = np.linalg.inv(within) @ (a.mean(axis=0) - b.mean(axis=0))
        for i in np.flatnonzero(folds == fold):
            projected[i] = (X[i] - (a.mean(axis=0) + b.mean(axis=0)) / 2) @ w / np.sqrt(w @ within @ w)
    a, b = projected[member], projected[~member]
    between = 25 * (a.mean() - projected.mean()) ** 2 + 65 * (b.mean() - projected.mean()) ** 2
    expected = between / (25 * a.var() + 65 * b.var())
    assert cross_fitted_separability(X, member, 3) == pytest.approx(expected, rel=1e-6)


def test_the_folds_share_cluster_and_rest_evenly() -> None:
    member = first(103, 22)
    folds = ranking._folds(member, 0)
    for side in (member, ~member):
        counts = np.bincount(folds[side], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert not np.array_equal(folds, ranking._folds(member, 1))


@pytest.mark.parametrize("size", [8, 30, 100])
def test_a_random_part_of_noise_scores_next_to_nothing(size: int) -> None:
    scores = [cross_fitted_separability(noise(300, seed=seed), first(300, size), seed) for seed in range(6)]
    in_sample = [separability(noise(300, seed=seed), first(300, size).astype(int)) for seed in range(6)]
    assert max(scores) < 0.06
    assert all(held < seen for held, seen in zip(scores, in_sample, strict=True))


def test_a_cluster_of_its_own_keeps_its_score_and_more_distance_gives_more() -> None:
    scores = [cross_fitted_separability(with_cluster(500, 100, offset), first(500, 100)) for offset in (2, 4, 6)]
    # The population's criterion is (100 · 400 / 500²) offset².
    for score, offset in zip(scores, (2, 4, 6), strict=True):
        assert 0.8 * 0.16 * offset**2 < score < 1.1 * 0.16 * offset**2


def test_thirteen_tight_samples_do_not_outrank_a_hundred() -> None:
    tiny, large = first(500, 13), first(500, 100)
    tight = cross_fitted_separability(with_cluster(500, 13, 6, deviation=0.1), tiny)
    assert tight < 0.5 * cross_fitted_separability(with_cluster(500, 100, 4), large)
    # Memorising thirteen of forty samples in as many dimensions makes the circular score large, not this one.
    few = noise(40, 30, seed=2)
    assert separability(few, first(40, 13).astype(int)) > 1.5
    assert cross_fitted_separability(few, first(40, 13)) < 0.2


def test_scale_and_place_do_not_matter_and_the_seed_decides() -> None:
    X, member = with_cluster(120, 30, 2), first(120, 30)
    score = cross_fitted_separability(X, member, 1)
    assert cross_fitted_separability(X, member, 1) == score
    assert cross_fitted_separability(X, member, 2) != score
    assert cross_fitted_separability(1e-4 * X + 5, member, 1) == pytest.approx(score, rel=1e-6)
    assert cross_fitted_separability(X, ~member, 1) == pytest.approx(score, rel=0.05)


@pytest.mark.filterwarnings("error")
def test_degenerate_clusters_score_zero() -> None:
    X = noise(50, 5)
    for size in (0, 1, 2, 48, 50):
        assert cross_fitted_separability(X, first(50, size) if size < 48 else ~first(50, 50 - size)) == 0
    assert cross_fitted_separability(np.ones((50, 5)), first(50, 20)) == 0
    assert cross_fitted_separability(np.repeat([[0.0, 1.0], [2.0, 3.0]], 25, axis=0), first(50, 25)) == 0


def test_the_null_equals_a_simulation_in_loops() -> None:
    n, size = 30, 6
    rng = np.random.default_rng(99)
    simulated = []
    for _ in range(2000):
        values = np.sort(rng.normal(size=n))
        labels = np.arange(n) >= n - size
        simulated.append(separability(values[:, None], labels.astype(int)))
    null = structureless_null(n, size)
    assert null.shape == (999,)
    assert stats.ks_2samp(null, simulated).pvalue > 0.01
    np.testing.assert_array_equal(null, structureless_null(n, size))
    assert not np.array_equal(null, structureless_null(n, size, seed=1))


def test_no_other_part_of_a_normal_sample_is_separated_better() -> None:
    rng = np.random.default_rng(0)
    values = np.sort(rng.normal(size=12))
    top = separability(values[:, None], (np.arange(12) >= 8).astype(int))
    bottom = separability(values[:, None], (np.arange(12) < 4).astype(int))
    for _ in range(300):
        member = np.isin(np.arange(12), rng.permutation(12)[:4]).astype(int)
        assert separability(values[:, None], member) <= max(top, bottom) + 1e-9


def test_p_values_of_the_best_part_of_noise_are_uniform() -> None:
    p_values = []
    for seed in range(200):
        values = np.sort(np.random.default_rng([7, seed]).normal(size=100))
        score = separability(values[:, None], first(100, 20).astype(int))
        p_values.append(structureless_p_value(score, 100, 20))
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


@pytest.mark.parametrize(("n", "d"), [(200, 30), (100, 30), (60, 10)])
def test_p_values_of_clusters_that_were_sought_in_noise_are_not_too_small(n: int, d: int) -> None:
    p_values = []
    for seed in range(10):
        X = noise(n, d, seed)
        labels = KMeans(4, n_init=2, random_state=seed).fit_predict(X)
        for member in (labels == label for label in range(4)):
            if member.sum() >= 8:
                score = cross_fitted_separability(X, member, seed)
                p_values.append(structureless_p_value(score, n, int(member.sum())))
    small = int((np.array(p_values) < 0.05).sum())
    assert stats.binomtest(small, len(p_values), 0.05, alternative="greater").pvalue > 0.05
    assert min(p_values) > 0.005


def test_p_values_are_those_of_the_draws_and_large_classes_are_drawn_smaller() -> None:
    null = structureless_null(50, 10)
    for hits in (50, 200, 500, 800):
        score = float(np.sort(null)[-hits])
        assert structureless_p_value(score, 50, 10) == pytest.approx(hits / 999, rel=0.25)
    assert structureless_p_value(0.0, 50, 10) == 1
    score = 0.95 * float(np.median(structureless_null(1000, 200)))
    assert structureless_p_value(score, 60_000, 12_000) == structureless_p_value(score, 1000, 200)


def test_the_tail_beyond_the_draws_is_that_of_many_more_draws() -> None:
    rng = np.random.default_rng(5)
    values = np.sort(rng.normal(size=(200_000, 40)), axis=1)
    top, rest = values[:, 30:], values[:, :30]
    between = 10 * 30 / 40 * (top.mean(axis=1) - rest.mean(axis=1)) ** 2
    scores = np.sort(between / (10 * top.var(axis=1) + 30 * rest.var(axis=1)))
    for hits in (20, 200, 2000):
        assert 0.2 < structureless_p_value(float(scores[-hits]), 40, 10) / (hits / 200_000) < 5


def test_a_real_cluster_is_significant() -> None:
    score = cross_fitted_separability(with_cluster(300, 60, 6), first(300, 60))
    assert structureless_p_value(score, 300, 60) < 1e-6


def test_the_outlier_p_value_is_that_of_the_prediction_interval() -> None:
    others = [0.0, 0.7, 1.4, 0.4, 1.1]
    for level in (0.5, 0.05, 0.001):
        # The upper end of a one-sided prediction interval for one more draw.
        upper = np.mean(others) + stats.t.isf(level, 4) * np.sqrt(np.var(others, ddof=1) * (1 + 1 / 5))
        assert outlier_p_value(float(upper), others, weight=0) == pytest.approx(level, rel=1e-6)


def test_outlier_p_values_are_uniform_for_one_more_class_of_the_same_kind() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(2, 0.7, size=(500, 8))
    assert stats.kstest([outlier_p_value(row[0], row[1:], weight=0) for row in draws], "uniform").pvalue > 0.01
    # The same with a spread that varies around the prior as moderation supposes: 4 d s²/χ²(4) with s = 0.5.
    spread = 0.5 * np.sqrt(4 / rng.chisquare(4, size=(2000, 1)))
    moderated = [outlier_p_value(row[0], row[1:], 0.5, 4) for row in spread * rng.normal(size=(2000, 6)) + 1]
    assert stats.kstest(moderated, "uniform").pvalue > 0.01


def test_outlier_p_values_depend_on_no_origin_and_without_a_prior_on_no_unit() -> None:
    others = [0.3, 0.9, 0.1, 0.6]
    p_value = outlier_p_value(1.5, others)
    assert outlier_p_value(1.5 + 7, [other + 7 for other in others]) == pytest.approx(p_value)
    alone = outlier_p_value(1.5, others, weight=0)
    assert outlier_p_value(15.0, [10 * other for other in others], weight=0) == pytest.approx(alone)


def test_equal_scores_need_the_prior() -> None:
    assert outlier_p_value(1.2, [1.0] * 5) > 0.2
    assert outlier_p_value(4.0, [1.0] * 5) < 0.001


def test_outlier_p_values_without_enough_to_compare_with() -> None:
    assert outlier_p_value(5.0, [1.0, 2.0]) == 0
    assert outlier_p_value(5.0, [1.0, 2.0, -np.inf]) == 0


@pytest.mark.parametrize(("n", "d"), [(40, 5), (30, 60), (200, 30)])
def test_the_shrunk_covariance_is_scikit_learns(n: int, d: int) -> None:
    X = noise(n, d, seed=4)
    X = X - X.mean(axis=0)
    expected = LedoitWolf(assume_centered=True).fit(X).covariance_
    np.testing.assert_allclose(shrunk_covariance(X), expected, rtol=1e-8, atol=1e-10)
    assert not shrunk_covariance(np.zeros((5, 3))).any()


def test_projections_tell_the_cluster_from_the_rest_and_leave_each_sample_out() -> None:
    # Half of six standard deviations from the border: one of 741 is on the wrong side.
    X, member = with_cluster(200, 50, 6), first(200, 50)
    projected = cross_fitted_projections(X, member, 2)
    assert projected is not None
    assert (projected[member] > 0).mean() > 0.95
    assert (projected[~member] < 0).mean() > 0.95
    # A sample that is moved far away changes its own projection, and that of none in its fold.
    folds, moved = ranking._folds(member, 2), X.copy()
    moved[0, 0] += 100
    again = cross_fitted_projections(moved, member, 2)
    assert again is not None
    same = (folds == folds[0]) & (np.arange(200) > 0)
    np.testing.assert_allclose(again[same], projected[same], rtol=1e-9)
    assert again[0] > projected[0] + 50
