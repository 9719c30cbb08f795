"""Directions of an artifact against their formulas in numpy, and on data whose direction is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spray.correction.cav import CAVS, detector, directions, pattern_cav


def marked_data(n: int = 300, d: int = 12, shift: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor, np.ndarray]:
    """Correlated noise, and in some samples a shift along a known direction."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / d**0.5
    t = rng.random(n) < 0.4
    h = rng.normal(size=d)
    h /= np.linalg.norm(h)
    a = rng.normal(size=(n, d)) @ mix + shift * t[:, None] * h
    return torch.from_numpy(a), torch.from_numpy(t), h


def test_pattern_cav_is_covariance_over_variance() -> None:
    rng = np.random.default_rng(0)
    a, t = rng.normal(size=(70, 9)), rng.random(70) < 0.3
    a[t, 2] += 3
    covariance = np.array([np.cov(a[:, j], t.astype(float), ddof=0)[0, 1] for j in range(9)])
    expected = covariance / t.var()
    h = pattern_cav(torch.from_numpy(a), torch.from_numpy(t))
    np.testing.assert_allclose(h.numpy(), expected / np.linalg.norm(expected), atol=1e-12)
    assert h.argmax() == 2
    assert h[2] > 0.9
    torch.testing.assert_close(pattern_cav(5 * torch.from_numpy(a) - 3, torch.from_numpy(t)), h)
    torch.testing.assert_close(pattern_cav(torch.from_numpy(a), torch.from_numpy(~t)), -h)


def test_pattern_cav_without_a_difference() -> None:
    same = torch.ones(6, 4)
    assert not pattern_cav(same, torch.arange(6) % 2 == 0).any()
    assert directions("pattern", same, torch.arange(6) % 2 == 0, 3).shape == (0, 4)


@pytest.mark.parametrize("kind", CAVS)
def test_every_estimator_needs_both_kinds_and_gives_a_unit_vector_towards_the_artifact(kind: str) -> None:
    a, t, true = marked_data()
    h = CAVS[kind](a, t)
    assert h.dtype == a.dtype
    assert h.norm() == pytest.approx(1)
    assert float(h @ torch.from_numpy(true)) > 0.3
    separated = (a[t] @ h).mean() - (a[~t] @ h).mean()
    assert separated > 0
    torch.testing.assert_close(CAVS[kind](7 * a + 2, t), h, atol=1e-3, rtol=0)
    for one_kind in (torch.ones_like(t), torch.zeros_like(t)):
        with pytest.raises(ValueError, match="with and without"):
            CAVS[kind](a, one_kind)


def test_the_pattern_is_closest_to_the_true_direction_and_filters_separate_better() -> None:
    # What the literature reports of them (Pahde et al. 2024), on noise that a filter can cancel.
    a, t, true = marked_data(n=2000, d=30, shift=1.0)
    cosine = {kind: float(CAVS[kind](a, t) @ torch.from_numpy(true)) for kind in CAVS}
    assert cosine["pattern"] > 0.85
    assert all(cosine["pattern"] > cosine[kind] + 0.1 for kind in ("svm", "logistic", "ridge"))

    def gap(kind: str) -> float:
        along = a @ CAVS[kind](a, t)
        return float((along[t].mean() - along[~t].mean()) / (along[t].var() + along[~t].var()).sqrt())

    assert all(gap(kind) > gap("pattern") for kind in ("svm", "logistic", "ridge"))


def test_the_lasso_filter_meets_its_optimality_conditions_and_leaves_most_weights_out() -> None:
    rng = np.random.default_rng(3)
    a, t = rng.normal(size=(90, 20)), rng.random(90) < 0.3
    a[t, 4] += 2
    a[t, 11] -= 1
    w, b = detector("lasso", torch.from_numpy(a), torch.from_numpy(t))
    assert b != 0
    # With u of standardised activations: |gradient| = penalty where u is not zero, and at most that elsewhere.
    scale = np.sqrt(((a - a.mean(0)) ** 2).mean())
    x, y = (a - a.mean(0)) / scale, np.where(t, 1.0, -1.0)
    share = np.where(t, 0.5 / t.sum(), 0.5 / (~t).sum())
    centered = x - share @ x
    penalty = 0.05 * np.abs((share * y) @ centered).max()
    u = w.numpy() * scale
    gradient = centered.T @ (share * (y - centered @ u))
    used = np.abs(u) > 1e-9
    assert used[4]
    assert used[11]
    assert used.sum() < 20
    np.testing.assert_allclose(gradient[used], penalty * np.sign(u[used]), atol=1e-4)
    assert (np.abs(gradient) <= penalty + 1e-4).all()
    assert not CAVS["lasso"](torch.ones(6, 4), torch.arange(6) % 2 == 0).any()


def test_the_ridge_filter_is_its_closed_form() -> None:
    a, t, _ = marked_data()
    x = a.numpy() - a.numpy().mean(0)
    x = x / np.sqrt((x**2).mean())
    w = np.where(t.numpy(), len(t) / (2 * t.sum()), len(t) / (2 * (~t).sum()))
    y = np.where(t.numpy(), 1.0, -1.0)
    design = np.hstack([x, np.ones((len(x), 1))])
    penalty = np.diag([1.0] * x.shape[1] + [0.0])
    expected = np.linalg.solve(design.T @ (w[:, None] * design) + penalty, design.T @ (w * y))[:-1]
    np.testing.assert_allclose(CAVS["ridge"](a, t), expected / np.linalg.norm(expected), atol=1e-6)


def test_a_detector_says_which_samples_carry_the_artifact_on_the_scale_of_the_activations() -> None:
    a, t, _ = marked_data(shift=6)
    w, b = detector("logistic", 100 * a + 5, t)
    assert (((100 * a + 5) @ w + b > 0) == t).float().mean() > 0.97


@pytest.mark.parametrize("kind", CAVS)
def test_several_directions_are_orthonormal_and_the_first_is_the_cav(kind: str) -> None:
    a, t, _ = marked_data()
    H = directions(kind, a, t, 4)
    assert H.shape == (4, 12)
    torch.testing.assert_close(H @ H.T, torch.eye(4, dtype=H.dtype), atol=1e-8, rtol=0)
    torch.testing.assert_close(H[0], CAVS[kind](a, t))


def test_further_directions_of_a_pattern_are_those_of_additional_variance() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(800, 6))
    t = np.arange(800) % 2 == 0
    a[t, 0] += 5
    a[t, 3] += 4 * rng.normal(size=400)  # the artifact varies along one axis
    a[:, 5] *= 10  # along which everything varies counts for nothing
    H = directions("pattern", torch.from_numpy(a), torch.from_numpy(t), 2).numpy()
    assert abs(H[1, 3]) > 0.95
    b = a - np.outer(a @ H[0], H[0])
    _, vectors = np.linalg.eigh(np.cov(b[t].T, ddof=0) - np.cov(b[~t].T, ddof=0))
    assert abs(vectors[:, -1] @ H[1]) == pytest.approx(1, abs=1e-6)


def test_more_directions_than_there_are_gives_those_that_there_are() -> None:
    a, t, _ = marked_data(n=40, d=3)
    for kind in CAVS:
        assert 1 <= len(directions(kind, a, t, 10)) <= 3
